"""What has to change in a model's code for it to fit a new checkpoint, as lines of it or in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from convtool.core.conv import Conv
from convtool.core.fields import Fields
from convtool.core.geometry import format_sizes
from convtool.core.names import is_written
from convtool.core.tree import first_leaves, has_sum
from convtool.fusing.dependence import changed_fields
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer


def module_edits(planned: PlannedLayer) -> list[str]:
    """Return the lines that make a model's code fit the new checkpoint; of what isn't known, only what changes."""
    conv, name = planned.fusion.conv, planned.name
    lines = _own_line(planned)
    if conv.has_bias_map:
        lines.append(f"y = {name}(x) + bias_map  # that of the checkpoint, in place of {name}(x)")
    lines += _normalizations(planned)
    gone = [layer.layer for layer in planned.layers if layer.own]
    stays = any(layer.name == name for layer in gone)  # then the model goes on to call all of the branches
    silent = []
    for layer in gone:
        if is_written(layer.name):
            lines.append(f"take {layer.name} out of the model's code, as {name} does it")
        elif layer.kind.parameter and (layer.name in planned.blocks or layer.name in layer.tensor_names()):
            lines += [f"{tensor} = None" for tensor in layer.tensor_names()]
        elif layer.name != name and stays and has_sum(planned.tree):
            silent.append(layer.name)
        elif layer.name != name and has_sum(planned.tree):  # an identity would add its input to the sum
            lines.append(f"del {layer.name}")
        elif layer.name != name:
            # Tensors don't tell whether the module does more: timm's BatchNormAct2d has an activation inside.
            more = "  # but for an activation inside of it, which stays" if layer.kind.spare else ""
            lines.append(f"{layer.name} = nn.Identity(){more}")
    lines += [
        f"{one}: a {what} in this model, whose code has to be changed where it does more; convtool.apply refuses it"
        for one, what in planned.others.items()
    ]
    if silent:
        lines.append(f"{', '.join(silent)}: nn.Identity(), and zeros from each branch, as convtool.apply has it")
    return lines


def _own_line(planned: PlannedLayer) -> list[str]:
    """Return what becomes of the fused layer's own module."""
    conv, known = planned.fusion.conv, planned.record.fields
    missing = [name for name in needed_fields(conv, known) if name not in known] if conv.spatial_axes else []
    if not missing:
        return [f"{planned.name} = {module_text(conv)}"]
    own = next((leaf for leaf in planned.layers if leaf.own and leaf.layer.name == planned.name), None)
    if own is None or not own.layer.kind.main:
        whose = ", ".join(leaf.name for leaf in planned.layers if any(leaf.open.values()))
        return [f"{planned.name} = {module_text(conv, missing)}  # what is left out, as {whose} {_have(whose)} it"]
    changes = list(_changes(conv, own.conv, known, changed_fields(planned.tree, own), planned.layers))
    return [f"{planned.name}: {', '.join(changes)}"] if changes else []


def needed_fields(conv: Conv, known: Fields) -> list[str]:
    """Return the fields without which the layer's constructor can't be written."""
    geometry = conv.geometry
    return [
        *("stride", "padding", "groups", "transposed"),
        *(["dilation"] if any(k > 1 for k in geometry.kernel_size) else []),
        *(["padding_mode"] if geometry.padded or "padding" not in known else []),
        *(["output_padding"] if known.get("transposed") else []),
    ]


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


def _have(names: str) -> str:
    return "have" if "," in names else "has"


def _normalizations(planned: PlannedLayer) -> list[str]:
    """Return what becomes of normalisations: that of the input is in front of the model, others in its own code."""
    first = list(first_leaves(planned.tree))
    in_front = first if len({layer.layer.name for layer in first}) == 1 else []
    lines = [
        f"give {planned.name} its input as it was before {layer.layer.name}"
        if any(layer is one for one in in_front)
        else f"take {layer.layer.name} out of the model's code, as {planned.name} does it"
        for layer in planned.layers
        if layer.layer.kind.code == "input"
    ]
    return list(dict.fromkeys(lines))


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


def module_text(conv: Conv, unknown: Collection[str] = ()) -> str:
    """Return the layer as a line of torch code: 'nn.Conv2d(3, 16, (5, 7), stride=2)'.

    Args:
        unknown: fields that have three dots in place of a value.
    """
    name, (inputs, *shape), others = torch_module(conv)
    given = {key: "..." if key in unknown else _argument(value) for key, value in others.items()}
    given |= {key: "..." for key in ("stride", "padding", "dilation", "groups") if key in unknown}
    channels = "..." if "groups" in unknown else str(inputs)  # as many as its groups have together
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
