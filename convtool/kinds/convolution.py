"""nn.Conv and nn.ConvTranspose of any number of axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from convtool.core.fields import FLAG, GEOMETRY, GEOMETRY_DEFAULTS, INTEGERS, Fields, field_text, geometry_fields
from convtool.core.geometry import Geometry, per_axis
from convtool.errors import InputError, UsageError
from convtool.kinds import standardized
from convtool.kinds.kind import Channels, Kind, Reading, Shapes, TensorInfo, Tensors

if TYPE_CHECKING:
    from convtool.core.conv import Conv
    from convtool.core.stored import Stored
    from convtool.core.tree import Tree


_CONVOLUTION = re.compile(r"aten\.(_?convolution|conv[123]d|conv_transpose[123]d)\.(default|input|padding)")
_PADDING = re.compile(r"aten\.(pad|constant_pad_nd|reflection_pad[123]d|replication_pad[123]d)\.default")
_MODES = {
    "constant": "zeros",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
    "constant_pad_nd": "zeros",
    **{
        f"{name}_pad{axes}d": mode
        for axes in (1, 2, 3)
        for name, mode in (("reflection", "reflect"), ("replication", "replicate"))
    },
}
_OF_OPERATION = ("stride", "padding", "dilation", "groups", "output_padding")


class Convolution(Kind):
    """A convolution; its weight tells kernel and spatial axes, and nothing else of its geometry."""

    name = "conv"
    tensors = ("weight", "bias", "bias_map", "gain")
    fields = {**GEOMETRY, "transposed": FLAG, "output_padding": INTEGERS, **standardized.FIELDS}
    defaults = {**GEOMETRY_DEFAULTS, "transposed": False, "output_padding": 0}
    by_rule = frozenset({"padding_mode", "transposed", "output_padding"})
    channelwise = frozenset({"groups"})
    main = True
    modules = (
        *(f"torch.nn.modules.conv.Conv{axes}d" for axes in (1, 2, 3)),
        *(f"torch.nn.modules.conv.ConvTranspose{axes}d" for axes in (1, 2, 3)),
    )

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        flat_bias = "bias" not in tensors or len(tensors["bias"].shape) == 1
        return "weight" in tensors and len(tensors["weight"].shape) > 2 and flat_bias

    def axes(self, shapes: Shapes, fields: Fields) -> int | None:
        return len(shapes["weight"]) - 2

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        if fields.get("transposed"):
            return shapes["weight"][0]
        return shapes["weight"][1] * fields["groups"] if "groups" in fields else None

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        if not fields.get("transposed"):
            return shapes["weight"][0]
        return shapes["weight"][1] * fields["groups"] if "groups" in fields else None

    def infer(self, shapes: Shapes, fields: Fields, takes: Channels, gives: int | None) -> tuple[Fields, list[str]]:
        found: Fields = {}
        said: list[str] = []
        per_group = shapes["weight"][1]
        if "transposed" not in fields and not _may_be_transposed(shapes, fields, takes.channels, gives):
            found["transposed"] = False
        if {**fields, **found}.get("transposed") is False and "output_padding" not in fields:
            found["output_padding"] = 0
        if fields.get("padding") == "same" and "stride" not in fields:
            found["stride"] = 1  # torch defines it for no other
        count, whose = (gives, "out") if fields.get("transposed") else (takes.channels, f"from {takes.origin}")
        if "groups" not in fields and count is not None and _groups(shapes, count):
            found["groups"] = _groups(shapes, count)
            if found["groups"] > 1:
                said.append(f"groups {found['groups']} ({count} channels {whose}, {per_group} per group)")
        return found, said

    def trials(self, shapes: Shapes, fields: Fields, gives: int | None) -> Mapping[str, Sequence[object]]:
        weight, transposed = shapes["weight"], bool(fields.get("transposed"))
        axes, kernel = len(weight) - 2, weight[2:]
        spread = per_axis("dilation", fields.get("dilation", 1), axes, least=1)
        reach = max((d * (k - 1) for d, k in zip(spread, kernel, strict=True)), default=0)
        # An axis has room for it only where it has a stride or a dilation, or may have.
        steps = (per_axis(name, fields.get(name, 2), axes, least=1) for name in ("stride", "dilation"))
        extra = tuple(min(1, max(step) - 1) for step in zip(*steps, strict=True))
        found: dict[str, Sequence[object]] = {
            "stride": (1, 2),
            "padding": tuple(dict.fromkeys((0, 1, reach))),  # from the last on, the padding behind it hides nothing
            "dilation": (1, 2) if reach else (1,),
            "padding_mode": ("zeros",) if transposed else ("zeros", "circular"),
            "output_padding": (0, extra) if transposed and any(extra) else (0,),
        }
        if weight[1] == 1 and gives == weight[0]:  # depthwise, and so of the same layout transposed
            found["transposed"] = (False, True)
        return found

    def with_fields(self, geometry: Geometry, fields: Fields) -> Geometry:
        return Geometry.of(geometry.kernel_size, **{**standardized.without(fields), "groups": geometry.groups})

    def other_readings(self, shapes: Shapes) -> Iterator[Reading]:
        yield Reading(shapes["weight"][0], shapes["weight"][1], "a transposed convolution", "transposed=true")

    def moves_over(self, rank: int, shapes: Shapes, fields: Fields) -> int | None:
        axes = len(shapes["weight"]) - 2
        return axes if rank == axes + 2 else None

    def written_out(self, fields: Fields, shapes: Shapes) -> Fields:
        kernel = shapes["weight"][2:]
        full = geometry_fields(Geometry.of(kernel, **standardized.without(fields)))
        known = {name: value for name, value in full.items() if name in fields} | standardized.only(fields)
        if fields.get("padding") == "half" and "dilation" not in fields and any(k > 1 for k in kernel):
            known["padding"] = "half"  # of what, nobody knows yet
        return known

    def check_fields(self, fields: Fields) -> None:
        super().check_fields(fields)
        # What fits a layer's own kernel is known where that is; here one tap an axis has to do.
        counts = (len(value) for value in fields.values() if isinstance(value, list | tuple))
        Geometry.of((1,) * next(counts, 1), **standardized.without(fields))

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        from convtool.core.conv import lower_conv

        weight = standardized.convolution_weight(tensors, fields)
        if "bias" in tensors and "bias_map" in tensors:
            raise InputError("holds a bias and a bias_map, of which a layer has one")
        bias = tensors.get("bias_map", tensors.get("bias"))
        turned = bias is not None and len(bias) != len(weight) and len(bias) == weight.shape[1]
        if turned and bias is not None and "transposed" not in fields:
            raise UsageError(
                f"its bias of {len(bias)} numbers is that of a transposed convolution; say so: transposed=true"
            )
        return lower_conv(weight, bias, Geometry.of(tuple(weight.shape[2:]), **standardized.without(fields)))

    def stored(self, conv: Conv, tensors: Tensors, fields: Fields) -> Tree[Stored]:
        from convtool.core.stored import stored

        # A standardised weight is computed in float64; other programs do that in the dtype of its tensors.
        return stored(conv, tensors["weight"].dtype if "standardized" in fields else None)

    def module_fields(self, module: Any) -> Fields:
        # Only a transposed layer has an output padding.
        fields = {name: getattr(module, name) for name in self.defaults if name != "padding_mode"}
        fields["padding_mode"] = getattr(module, "padding_mode", "zeros")  # torch before 1.1 had no other
        if not module.transposed:
            fields["output_padding"] = 0
        return geometry_fields(Geometry.of(tuple(module.kernel_size), **fields))

    def fields_of_run(self, run: Sequence[tuple[str, Mapping[str, Any]]], shapes: Shapes) -> Fields | None:
        *before, (name, arguments) = run
        if not _CONVOLUTION.fullmatch(name):
            return None
        fields = {field: arguments.get(field, self.defaults.get(field, 0)) for field in _OF_OPERATION}
        fields["transposed"] = "transpose" in name or bool(arguments.get("transposed"))
        if not fields["transposed"]:
            fields["output_padding"] = 0
        geometry = Geometry.of(tuple(shapes["weight"][2:]), **fields)
        if not before:
            return geometry_fields(geometry)
        padded = _PADDING.fullmatch(before[0][0])
        if len(before) > 1 or padded is None:
            return None
        # A convolution that doesn't pad by itself, behind its module's own padding.
        about = before[0][1]
        pad, value = about.get("pad", about.get("padding")), about.get("value")
        mode = _MODES.get(about.get("mode", "constant") if padded[1] == "pad" else padded[1])
        if geometry.padded or value not in (None, 0) or mode is None or len(pad or ()) != 2 * len(shapes["weight"][2:]):
            return None
        sides = tuple((pad[at], pad[at + 1]) for at in range(len(pad) - 2, -1, -2))
        geometry = replace(geometry, padding=sides, padding_mode=mode)  # type: ignore[arg-type]
        return geometry_fields(geometry)

    def claim(self, fields: Fields, shapes: Shapes) -> str:
        known = self.written_out(fields, shapes)
        padded = known.get("padding") == "half" or any(sum(sides) for sides in known.get("padding", ()))
        idle = {
            "dilation": all(k == 1 for k in shapes["weight"][2:]),
            "padding_mode": not padded,
            "output_padding": not any(known.get("output_padding", ())),
        }
        return ", ".join(self.say(name, value) for name, value in known.items() if not idle.get(name))

    def say(self, name: str, value: Any) -> str:
        if name in standardized.FIELDS:
            return standardized.say(name, value)
        if name == "transposed":
            return "transposed" if value else "not transposed"
        return f"{name} {field_text(value)}"

    def describe(self, fields: Fields, shapes: Shapes) -> str:
        stated = standardized.only(fields).items()
        made = (standardized.say(name, value) for name, value in stated if (name, value) != ("gain_scale", 1.0))
        return ", ".join([Geometry.of(shapes["weight"][2:], **standardized.without(fields)).describe(), *made])


def _groups(shapes: Shapes, count: int) -> int:
    """Return the groups with which a weight's second axis comes to that many channels; 0 where none do."""
    outer, per_group = shapes["weight"][:2]
    groups = count // per_group if per_group and count % per_group == 0 else 0
    return groups if groups and outer % groups == 0 else 0


def _may_be_transposed(shapes: Shapes, fields: Fields, takes: int | None, gives: int | None) -> bool:
    """Return whether the weight, read as a transposed layer's, fits what is known of the channels."""
    if takes not in (None, shapes["weight"][0]) or fields.get("padding_mode", "zeros") != "zeros":
        return False
    if isinstance(fields.get("padding"), str):  # of which a transposed layer knows none
        return False
    count = gives if gives is not None else next(iter(shapes.get("bias", ())), None)
    groups = None if count is None else _groups(shapes, count)
    return groups is None or (groups > 0 and fields.get("groups", groups) == groups)


CONV = Convolution()
