"""Layers that only move numbers: from positions to channels and back, and from channel to channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from convtool.core.fields import INTEGER, INTEGERS, LIST, RANGE, Fields
from convtool.core.geometry import Geometry, per_axis
from convtool.errors import UsageError
from convtool.kinds.flatten import spread_out
from convtool.kinds.kind import Kind, Shape, Shapes, Tensors, check_size

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.core.conv import Conv


class PixelUnshuffle(Kind):
    """nn.PixelUnshuffle: each block of positions as that many channels; output c*P + p is position p of channel c."""

    name = "pixel_unshuffle"
    fields = {"factor": INTEGERS}
    written = True
    bare_modules: ClassVar[tuple[str, ...]] = ("torch.nn.modules.pixelshuffle.PixelUnshuffle",)
    operations: ClassVar[tuple[str, ...]] = ("aten.pixel_unshuffle.default",)

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        return {"factor": module.downscale_factor}

    def over(self, fields: Fields, axes: int) -> Fields:
        return {"factor": list(per_axis("factor", fields.get("factor", 2), axes, least=1))}

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        return _divided(gives, math.prod(fields["factor"]))

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return None if takes is None else takes * math.prod(fields["factor"])

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        return {"factor": arguments["downscale_factor"]} if len(takes) == 4 else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        size = tuple(self.over(fields, axes)["factor"])
        return _selection(torch.arange(math.prod(size) * (channels or 0)), channels, Geometry.of(size, stride=size))


class Focus(PixelUnshuffle):
    """YOLOv5's Focus: each 2x2 block as channels, position by position, all channels of the first position first."""

    name = "focus"
    fields = {}
    bare_modules = operations = ()

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        size, taps = (2,) * axes, 2**axes
        # Of the positions the first axis runs fastest, and so rows before columns.
        place = torch.arange(taps).reshape(size).permute(*reversed(range(axes))).flatten()
        picked = torch.arange(channels or 0) * taps + place[:, None]  # (taps, C)
        return _selection(picked.flatten(), channels, Geometry.of(size, stride=size))


class PixelShuffle(PixelUnshuffle):
    """nn.PixelShuffle: blocks of channels as blocks of positions, the adjoint of pixel_unshuffle."""

    name = "pixel_shuffle"
    bare_modules = ("torch.nn.modules.pixelshuffle.PixelShuffle",)
    operations = ("aten.pixel_shuffle.default",)

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        return {"factor": module.upscale_factor}

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        return PIXEL_UNSHUFFLE.gives(shapes, fields, gives)

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return PIXEL_UNSHUFFLE.takes(shapes, fields, takes)

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        return {"factor": arguments["upscale_factor"]} if len(takes) == 4 else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        size = tuple(self.over(fields, axes)["factor"])
        return spread_out(size, channels or 0, stride=size)


class Select(Kind):
    """Channels A up to B, as x[:, A:B] of a model's code."""

    name = "select"
    fields = {"channels": RANGE}
    written = True
    operations = ("aten.slice.Tensor",)

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        return None

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        first, last = fields["channels"]
        return None if last is None and takes is None else (last or takes or 0) - first

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        if arguments.get("dim", 0) != 1 or arguments.get("step", 1) != 1 or len(takes) < 3:
            return None
        first = arguments.get("start") or 0
        first = first + takes[1] if first < 0 else min(first, takes[1])
        return {"channels": [first, first + gives[1]]} if gives[1] else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        first, count = fields["channels"][0], channels or 0
        last = count if fields["channels"][1] is None else fields["channels"][1]
        if not first < last <= count:
            raise UsageError(f"expected channels of the {channels} that there are, got {first}:{last}")
        return _selection(torch.arange(first, last), channels, Geometry.of((1,) * axes))


class Place(Kind):
    """The adjoint of select: the input as channels from A on of a layer that has more, zeros in the others.

    A stack of branches is the sum of each of them placed.
    """

    name = "place"
    fields = {"channels": RANGE, "of": INTEGER}
    written = True
    inverse = "select"

    def undone_by(self, fields: Fields) -> Fields | None:
        return {"channels": fields["channels"]}

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        first, last = fields["channels"]
        count: int = (fields["of"] if last is None else last) - first
        return count

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        count: int = fields["of"]
        return count

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        from convtool.core.moves import NOTHING

        (first, last), count = fields["channels"], fields["of"]
        last = count if last is None else last
        if last - first != channels or last > count:
            raise UsageError(f"{channels} channels don't go into {first}:{last} of {count}")
        check_size(count, self.name)
        picked = torch.full((count,), NOTHING)
        picked[first:last] = torch.arange(last - first)
        return _selection(picked, channels, Geometry.of((1,) * axes))


class Permute(Kind):
    """Channels in another order: output i reads input p[i]; permute(2,1,0) makes RGB of BGR."""

    name = "permute"
    fields = {"order": LIST}
    written = True

    def width(self, shapes: Shapes, fields: Fields) -> int | None:
        return len(fields["order"])

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        order = fields["order"]
        if sorted(order) != list(range(channels or 0)):
            raise UsageError(f"expected each of the channels 0 to {(channels or 0) - 1} once, got {order}")
        return _selection(torch.tensor(order), channels, Geometry.of((1,) * axes))


class ChannelShuffle(Kind):
    """nn.ChannelShuffle: the channels of each group, dealt out one after the other."""

    name = "channel_shuffle"
    fields = {"groups": INTEGER}
    written = True
    inverse: ClassVar[str] = "channel_unshuffle"
    bare_modules: ClassVar[tuple[str, ...]] = ("torch.nn.modules.channelshuffle.ChannelShuffle",)
    operations: ClassVar[tuple[str, ...]] = ("aten.channel_shuffle.default",)

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        return {"groups": module.groups}

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        return {"groups": arguments["groups"]}

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        groups, count = fields["groups"], channels or 0
        if groups < 1 or count % groups:
            raise UsageError(f"groups: expected a divisor of the {count} channels, got {groups}")
        return _selection(self._dealt(torch.arange(count), groups), channels, Geometry.of((1,) * axes))

    def _dealt(self, numbers: Tensor, groups: int) -> Tensor:
        return numbers.reshape(groups, -1).T.flatten()


class ChannelUnshuffle(ChannelShuffle):
    """The adjoint of channel_shuffle, which undoes it: one channel after the other gathered into that many groups."""

    name = "channel_unshuffle"
    inverse = "channel_shuffle"
    bare_modules = operations = ()

    def _dealt(self, numbers: Tensor, groups: int) -> Tensor:
        return numbers.reshape(-1, groups).T.flatten()


PIXEL_UNSHUFFLE, FOCUS, PIXEL_SHUFFLE = PixelUnshuffle(), Focus(), PixelShuffle()
SELECT, PLACE, PERMUTE = Select(), Place(), Permute()
CHANNEL_SHUFFLE, CHANNEL_UNSHUFFLE = ChannelShuffle(), ChannelUnshuffle()


def _selection(picked: Tensor, channels: int | None, geometry: Geometry) -> Conv:
    from convtool.core.moves import Selection

    return Selection(picked, channels or 0, geometry)


def _divided(count: int | None, by: int) -> int | None:
    return count // by if count is not None and count % by == 0 else None
