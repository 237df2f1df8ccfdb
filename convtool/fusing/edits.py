"""What has to change in a model for it to fit a new checkpoint: as lines of code, or in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.fields import Fields
from convtool.core.geometry import format_sizes
from convtool.core.names import is_written
from convtool.core.tree import Chain, LayerRef, Sum, Tree, first_leaves, has_sum, leaves, map_leaves
from convtool.fusing.dependence import changed_fields
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer
from convtool.graph.again import adds_again, done_by_the_model

# What becomes of a layer of the model.
Fate: TypeAlias = Literal["stays", "in code", "parameters", "deleted", "silent", "nn.Identity"]


def module_edits(planned: PlannedLayer) -> list[str]:
    """Return the lines that make a model's code fit the new checkpoint; of what isn't known, only what changes."""
    conv, name = planned.fusion.conv, planned.name
    lines = _own_line(planned)
    if conv.has_bias_map:
        lines.append(f"y = {_code(name)}(x) + bias_map  # that of the checkpoint, in place of {name}(x)")
    first = {leaf.layer.name: leaf.layer.kind for leaf in first_leaves(planned.tree)}
    if len(first) == 1 and "input" in {kind.code for kind in first.values()}:  # a normalisation of the whole input
        lines.append(f"give {name} its input as it was before {''.join(first)}")
    lines += [_taken_out(one, name) for one in goes_on(planned.record.tree, name)]
    silent = []
    for leaf, fate in fates(planned):
        layer = leaf.layer
        if fate == "in code":
            lines.append(_taken_out(layer.name, name))
        elif fate == "parameters":
            lines += [f"{_code(tensor)} = None" for tensor in layer.tensor_names()]
        elif fate == "deleted" and not layer.name.startswith(f"{name}."):  # those went with what they were in
            lines.append(f"del {_code(layer.name)}")
        elif fate == "silent":
            silent.append(layer.name)
        elif fate == "nn.Identity":
            # Tensors don't tell whether the module does more: timm's BatchNormAct2d has an activation inside.
            inside = "but for an activation inside of it, which stays"
            if not ends_with(planned, leaf):
                inside = "only if there is no activation inside of it"
            more = f"  # {inside}" if layer.kind.spare else ""
            lines.append(f"{_code(layer.name)} = nn.Identity(){more}")
    lines += [
        f"{one}: a {what} in this model, whose code has to be changed where it does more; convtool.apply refuses it"
        for one, what in planned.others.items()
    ]
    if silent:
        lines.append(f"{', '.join(silent)}: nn.Identity(), and zeros from each branch, as convtool.apply has it")
    return list(dict.fromkeys(lines))


def _taken_out(what: str, name: str) -> str:
    return f"take {what} out of the model's code, as {name} does it"


def fates(planned: PlannedLayer) -> Iterator[tuple[LoweredLayer, Fate]]:
    """Yield what becomes of each of the model's layers in a fusion."""
    own = [leaf for leaf in planned.layers if leaf.own]
    stays = any(leaf.layer.name == planned.name for leaf in own)  # then the model goes on to call all of the branches
    # What is deleted can't be called any more: by a name of its own, the model's forward has to call the fused layer.
    other: Fate = "deleted" if not stays else "silent" if has_sum(planned.tree) else "nn.Identity"
    for leaf in own:
        layer = leaf.layer
        if is_written(layer.name):
            yield leaf, "in code"
        elif layer.kind.parameter and (layer.name in planned.blocks or layer.name in layer.tensor_names()):
            yield leaf, "parameters"
        else:
            yield leaf, "stays" if layer.name == planned.name else other


def _code(name: str) -> str:
    """Return a layer's name as code has it: 'layer1[0].conv1'; 'model[0]' where it begins with a number."""
    return re.sub(r"^\[", "model[", re.sub(r"(?:^|\.)([0-9]+)(?=\.|$)", r"[\1]", name))


def ends_with(planned: PlannedLayer, leaf: LoweredLayer) -> bool:
    """Return whether a fusion ends with a layer, so that what its module does besides may stay; see `last_layer`."""
    last = last_layer(planned.record.tree)
    return leaf.own and last is not None and leaf.name == last.name


def last_layer(tree: Tree[SourceLayer]) -> SourceLayer | None:
    """Return the layer with which a tree ends, whatever is written behind it; None where that is a sum."""
    while isinstance(tree, Chain):
        solid = [part for part in tree.parts if not (isinstance(part, SourceLayer) and part.written)]
        tree = (solid or tree.parts)[-1]
    return None if isinstance(tree, Sum) else tree


def _own_line(planned: PlannedLayer) -> list[str]:
    """Return what becomes of the fused layer's own module."""
    conv, known, missing = planned.fusion.conv, planned.record.fields, missing_fields(planned)
    own = next((leaf for leaf in planned.layers if leaf.own and leaf.layer.name == planned.name), None)
    changes = None
    if own is not None and own.layer.kind.main:
        plain = ["a plain convolution, whose weight is standardized already"] if "standardized" in own.fields else []
        changes = plain + list(_changes(conv, own.conv, known, changed_fields(planned.tree, own), planned.layers))
    if changes == []:
        return []
    if not missing:
        return [f"{_code(planned.name)} = {module_text(conv)}"]
    if changes is not None:
        return [f"{planned.name}: {', '.join(changes)}"]
    whose = [leaf.name for leaf in planned.layers if any(leaf.open.values())]
    have = f"{', '.join(whose)} {'have' if len(whose) > 1 else 'has'}"
    written: dict[str, str] = {name: "..." for name in ("stride", "padding", "dilation", "groups") if name in missing}
    written |= {"in_channels": "..."} if "groups" in missing else {}  # as many as its groups have together
    return [f"{_code(planned.name)} = {module_text(conv, **written)}  # what is left out, as {have} it"]


def missing_fields(planned: PlannedLayer) -> list[str]:
    """Return the fields without which the fused layer's constructor can't be written, and that aren't known."""
    geometry, known = planned.fusion.conv.geometry, planned.record.fields
    needed = [
        *("stride", "padding", "groups", "transposed"),
        *(["dilation"] if any(k > 1 for k in geometry.kernel_size) else []),
        *(["padding_mode"] if geometry.padded or "padding" not in known else []),
        *(["output_padding"] if known.get("transposed") else []),
    ]
    return [name for name in needed if name not in known] if geometry.kernel_size else []


def _changes(
    conv: Conv, own: Conv, known: Fields, changed: frozenset[str], layers: list[LoweredLayer]
) -> Iterator[str]:
    """Yield in what the fused layer is another than the module that it takes the place of."""
    if conv.in_channels != own.in_channels:
        yield f"{conv.in_channels} input channels"
    if conv.out_channels != own.out_channels:
        yield f"{conv.out_channels} output channels"
    if conv.geometry.kernel_size != own.geometry.kernel_size:
        yield f"kernel size {_sizes(conv.geometry.kernel_size)}"
    if conv.geometry.groups != own.geometry.groups:
        yield f"groups {conv.geometry.groups}"
    kind = next(leaf.layer.kind for leaf in layers if leaf.conv is own)
    for name in sorted(changed - {"groups"}):
        whose = " and ".join(leaf.name for leaf in layers if leaf.open.get(name) or leaf.conv is own)
        yield kind.say(name, known[name]) if name in known else f"the {name} that {whose} make together"
    if (conv.bias is None) != (own.bias is None) and not conv.has_bias_map:
        yield "add a bias" if own.bias is None else "no bias"


def _sizes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else format_sizes(values)


def torch_module(conv: Conv) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return the name of torch's class for a layer, its shape as that takes it, and its other arguments.

    Those at torch's defaults are left out. Padding that the class cannot say, as its sides differ, isn't among them.
    """
    geometry, axes = conv.geometry, conv.spatial_axes
    sides = [before if before == after else 0 for before, after in geometry.padding]
    even = all(before == after for before, after in geometry.padding)
    fields = {
        "stride": (geometry.stride, 1),
        "padding": (tuple(sides) if even else (0,), 0),
        "output_padding": (geometry.output_padding, 0),
        "dilation": (geometry.dilation, 1),
        "groups": (geometry.groups, 1),
        "bias": (conv.bias is not None and not conv.has_bias_map, True),
        "padding_mode": (geometry.padding_mode if even and geometry.padded else "zeros", "zeros"),
    }
    others = {
        name: value
        for name, (value, default) in fields.items()
        if (set(value) - {default} if isinstance(value, tuple) else value != default)
    }
    shape = (conv.in_channels, conv.out_channels)
    if not axes:
        return "Linear", shape, others
    return f"Conv{'Transpose' if geometry.transposed else ''}{axes}d", (*shape, geometry.kernel_size), others


def module_text(conv: Conv, **unknown: str) -> str:
    """Return the layer as a line of torch code: 'nn.Conv2d(3, 16, (5, 7), stride=2)'.

    Args:
        unknown: what stands in place of arguments that aren't known.
    """
    name, (inputs, *shape), others = torch_module(conv)
    channels = unknown.pop("in_channels", str(inputs))
    given = {key: _argument(value) for key, value in others.items()} | unknown
    arguments = [channels, *map(_argument, shape), *(f"{key}={value}" for key, value in given.items())]
    text, geometry = f"nn.{name}({', '.join(arguments)})", conv.geometry
    if all(before == after for before, after in geometry.padding):
        return text
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    if geometry.transposed:
        return f"{text}  # then F.pad(y, {[-side for side in sides]})"
    mode = "" if geometry.padding_mode == "zeros" else f", mode={geometry.padding_mode!r}"
    return f"{text}  # after F.pad(x, {sides}{mode})"


def _argument(value: object) -> str:
    return str(value[0]) if isinstance(value, tuple) and len(set(value)) == 1 else repr(value)


def goes_on(tree: Tree[SourceLayer], name: str) -> list[str]:
    """Return what the model's code does of a fusion, and would go on to do with the layer of that name in its place."""
    stays = name in {source.name for source in leaves(tree) if source.owned()}
    named = map_leaves(lambda source: LayerRef(source.name, source.origin), tree)
    adds = stays and adds_again(named, name)
    return [*done_by_the_model(named), *(["the addition of its input"] if adds else [])]
