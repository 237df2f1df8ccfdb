"""Layers of a checkpoint by the names that people give them."""

from __future__ import annotations

from collections.abc import Mapping

from convtool.core.names import unwrap
from convtool.errors import UsageError, did_you_mean
from convtool.kinds import KINDS
from convtool.kinds.kind import UNKNOWN, Layer


def find_layer(layers: Mapping[str, Layer], name: str, where: str) -> Layer:
    """Return the layer of that name: a module path, or one of its tensors' full names, wrappers' prefixes left out.

    Raises:
        UsageError: there is none, or several differ only in wrappers; the nearest names are suggested.
    """
    if name in layers:
        return layers[name]
    path, _, parameter = name.rpartition(".")
    if path in layers and parameter in layers[path].tensors:
        return layers[path]
    same = [layer for layer in layers.values() if unwrap(layer.name) in (unwrap(name), unwrap(path))]
    same = [layer for layer in same if unwrap(layer.name) == unwrap(name) or parameter in layer.tensors]
    if len(same) == 1:
        return same[0]
    if same:
        names = ", ".join(layer.name for layer in same)
        raise UsageError(f"{where}: {name!r} fits several layers ({names}); give one of these in full")
    inside = [layer for layer in layers if layer.startswith(name + ".")][:3] if name else []
    others = "; layers are separated by blanks" if "," in name else "; `convtool inspect` lists the layers"
    near = f"; did you mean {' or '.join(inside)}?" if inside else did_you_mean(name, layers, others)
    raise UsageError(f"{where}: no layer {name!r}{near}")


def named_part(layer: Layer, name: str) -> Layer:
    """Return the layer that a name means: the one found by it, or where the name is a tensor's, that tensor alone.

    A full key of a convolution or a batch norm means the layer; that of a tensor of another module, which can be a
    scale per channel, means the scale.

    Raises:
        RefusedError: it may be something that only looks like what it was found as.
    """
    parameter = name.rpartition(".")[2]
    if name == layer.name or parameter not in layer.tensors:
        layer.kind.check_found(layer)
        return layer
    known = {tensor for kind in KINDS if not kind.parameter for tensor in kind.tensors}
    if parameter not in known and (layer.kind is UNKNOWN or layer.kind.parameter):
        info = layer.tensors[parameter]
        kind = next((kind for kind in KINDS if kind.is_tensor(parameter, info)), None)
        if kind is not None:
            return Layer(name, kind, {kind.tensors[0]: info})
    return layer
