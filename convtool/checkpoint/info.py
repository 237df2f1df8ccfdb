"""What is known of a checkpoint's tensors without loading one; nothing here needs torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from convtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's description; `dtype` is torch's name without the 'torch.'."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors that share a module path.

    Attributes:
        name: module path; '' for a state dict of one bare module.
        kind: 'conv', 'linear', 'batch_norm', 'scale' or 'other', as far as names and shapes tell.
        tensors: by parameter name ('weight', 'running_mean', ...).
    """

    name: str
    kind: str
    tensors: Mapping[str, TensorInfo]

    @property
    def spatial_axes(self) -> int | None:
        """Number of spatial axes, where the weight tells."""
        return len(self.tensors["weight"].shape) - 2 if self.kind == "conv" else None

    def tensor_names(self) -> Iterator[str]:
        """Full names of the layer's tensors."""
        return (info.name for info in self.tensors.values())


FUNCTION = "function"  # the kind of a layer without tensors, which stands in no checkpoint
SCALES = ("gamma", "layer_scale_parameter", "lambda1")  # what per-channel scales are called in timm and transformers

# Containers that training wrappers leave in the names; they say nothing about the layer.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def group_layers(infos: Iterable[TensorInfo]) -> dict[str, Layer]:
    """Layers in order of their first tensor."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for info in infos:
        path, _, parameter = info.name.rpartition(".")
        grouped.setdefault(path, {})[parameter] = info
    return {path: Layer(path, kind_of(tensors), tensors) for path, tensors in grouped.items()}


def kind_of(tensors: Mapping[str, TensorInfo]) -> str:
    """What a module must be, as far as its tensors' names and shapes tell."""
    if "running_mean" in tensors and "running_var" in tensors:
        return "batch_norm"
    if len(tensors) == 1 and (scale := next((tensors[name] for name in SCALES if name in tensors), None)):
        return "scale" if len(scale.shape) == 1 else "other"
    if "weight" not in tensors:
        return "other"
    axes = len(tensors["weight"].shape)
    if "bias" in tensors and len(tensors["bias"].shape) != 1:
        return "other"
    return "conv" if axes > 2 else "linear" if axes == 2 else "other"


def find_layer(layers: Mapping[str, Layer], name: str, where: str) -> Layer:
    """The layer of that name: a module path, or one of its tensors' full names; wrappers' prefixes may be left out.

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
    near = difflib.get_close_matches(name, layers, n=3, cutoff=0.5)
    inside = [layer for layer in layers if layer.startswith(name + ".")][:3] if name else []
    hint = f"; did you mean {' or '.join(near or inside)}?" if near or inside else ""
    if not hint:
        hint = "; `convtool inspect` lists the layers"
    raise UsageError(f"{where}: no layer {name!r}{hint}")


def unwrap(name: str) -> str:
    """The name without wrappers' components."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
