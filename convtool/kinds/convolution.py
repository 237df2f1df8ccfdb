"""nn.Conv and nn.ConvTranspose of any number of axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from convtool.core.fields import FLAG, INTEGER, INTEGERS, MODE, PADDING, Fields, geometry_fields
from convtool.core.geometry import Geometry, format_padding, format_sizes
from convtool.errors import InputError, UsageError
from convtool.kinds.kind import Kind, Reading, Shapes, TensorInfo, Tensors

if TYPE_CHECKING:
    from convtool.core.conv import Conv


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
    tensors = ("weight", "bias", "bias_map")
    fields = {
        "stride": INTEGERS,
        "padding": PADDING,
        "dilation": INTEGERS,
        "groups": INTEGER,
        "padding_mode": MODE,
        "transposed": FLAG,
        "output_padding": INTEGERS,
    }
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros", "transposed": False}
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

    def settle(self, shapes: Shapes, fields: Fields, channels: int | None, origin: str) -> tuple[Fields, list[str]]:
        # Of each field, only what some number hangs on is worth saying: a 1x1 kernel has no dilation, and where nothing
        # is padded there is no padding mode.
        weight, assumed = shapes["weight"], []
        large = any(k > 1 for k in weight[2:])
        if "stride" not in fields:
            assumed.append("stride 1")
        if "padding" not in fields:
            assumed.append("padding 0")
        elif "padding_mode" not in fields and fields["padding"] != 0:
            assumed.append("padding_mode zeros")
        if "dilation" not in fields and large:
            assumed.append("dilation 1")
        if "groups" not in fields:
            per_group, groups = weight[1], 0
            if channels is not None and not fields.get("transposed") and per_group and channels % per_group == 0:
                groups = channels // per_group
                fields = {**fields, "groups": groups}
            if groups > 1:
                assumed.append(f"groups {groups} ({channels} channels from {origin}, {per_group} per group)")
            elif not groups:
                assumed.append("groups 1")
        # Tensors tell a transposed layer by their shapes, unless it has as many output as input channels.
        if "transposed" not in fields and weight[0] == weight[1] * fields.get("groups", 1) and large:
            assumed.append("not transposed")
        return fields, assumed

    def other_readings(self, shapes: Shapes) -> Iterator[Reading]:
        yield Reading(shapes["weight"][0], shapes["weight"][1], "a transposed convolution", "transposed=true")

    def moves_over(self, rank: int, shapes: Shapes, fields: Fields) -> int | None:
        axes = len(shapes["weight"]) - 2
        if rank == axes + 1:
            raise UsageError(
                f"reads an input of {rank} axes, which is one without a batch; the input size is that of the model's"
                " input with the channels in front, such as 3,224,224"
            )
        return axes if rank == axes + 2 else None

    def full_fields(self, conv: Conv, fields: Fields) -> Fields:
        return geometry_fields(conv.geometry)

    def written_out(self, fields: Fields, shapes: Shapes) -> Fields:
        full = geometry_fields(Geometry.of(shapes["weight"][2:], **fields))
        return {name: value for name, value in full.items() if name in fields}

    def check_fields(self, fields: Fields) -> None:
        super().check_fields(fields)
        # What fits a layer's own kernel is known where that is; here one tap an axis has to do.
        counts = (len(value) for value in fields.values() if isinstance(value, list | tuple))
        Geometry.of((1,) * next(counts, 1), **fields)

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        from convtool.core.conv import lower_conv

        weight = tensors["weight"]
        if "bias" in tensors and "bias_map" in tensors:
            raise InputError("holds a bias and a bias_map, of which a layer has one")
        bias = tensors.get("bias_map", tensors.get("bias"))
        turned = bias is not None and len(bias) != len(weight) and len(bias) == weight.shape[1]
        if turned and bias is not None and "transposed" not in fields:
            raise UsageError(
                f"its bias of {len(bias)} numbers is that of a transposed convolution; say so: transposed=true"
            )
        return lower_conv(weight, bias, Geometry.of(tuple(weight.shape[2:]), **fields))

    def module_fields(self, module: Any) -> Fields:
        # Only a transposed layer has an output padding.
        fields = {name: getattr(module, name) for name in self.fields if name != "padding_mode"}
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
        geometry, large = Geometry.of(shapes["weight"][2:], **fields), any(k > 1 for k in shapes["weight"][2:])
        said = [f"stride {format_sizes(geometry.stride)}", f"padding {','.join(format_padding(geometry.padding))}"]
        said += [f"padding_mode {geometry.padding_mode}"] if geometry.padded else []
        said += [f"dilation {format_sizes(geometry.dilation)}"] if large else []
        said += [f"groups {geometry.groups}", "transposed" if geometry.transposed else "not transposed"]
        said += [f"output_padding {format_sizes(geometry.output_padding)}"] if any(geometry.output_padding) else []
        return ", ".join(said)

    def describe(self, fields: Fields, shapes: Shapes) -> str:
        return Geometry.of(shapes["weight"][2:], **fields).describe()


CONV = Convolution()
