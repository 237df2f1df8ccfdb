"""Numbers that aren't a module's weight: fixed kernels and offsets, as buffers of a checkpoint or written out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convtool.core.fields import FLAG, GEOMETRY, GEOMETRY_DEFAULTS, NUMBERS_OR_TENSOR, TENSOR, Fields
from convtool.core.geometry import Geometry
from convtool.errors import UsageError
from convtool.kinds.kind import Kind, Shapes, Tensors
from convtool.kinds.scale import channels_of, per_channel

if TYPE_CHECKING:
    from convtool.core.conv import Conv


class FixedKernel(Kind):
    """A convolution by a tensor's full name or by its numbers; with `each`, one kernel for every channel by itself."""

    name = "kernel"
    tensors = ("kernel",)
    fields = {"kernel": TENSOR, **GEOMETRY, "each": FLAG}
    defaults = {**GEOMETRY_DEFAULTS, "groups": None, "each": False}
    written = True
    parameter = True
    main = True

    def axes(self, shapes: Shapes, fields: Fields) -> int | None:
        return len(_shape(shapes, fields)) - (0 if fields.get("each") else 2)

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        if fields.get("each"):
            return gives
        return _shape(shapes, fields)[1] * fields["groups"] if fields.get("groups") else None

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return takes if fields.get("each") else _shape(shapes, fields)[0]

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        from convtool.core.conv import Conv

        given = {**self.defaults, **fields}
        _check_there(tensors, fields.get("kernel"))
        weight = tensors["kernel"] if tensors else torch.tensor(fields["kernel"], dtype=torch.float64)
        each, groups = given.pop("each"), given["groups"]
        if each:
            groups = channels if groups is None else groups
            weight = weight.expand(groups or 0, 1, *weight.shape)
        elif weight.dim() < 3:
            raise UsageError(f"expected a weight (C_out, C_in/groups, ...), got {tuple(weight.shape)}; or add `; each`")
        elif groups is None:
            if channels is not None and channels % weight.shape[1]:
                raise UsageError(f"{channels} channels don't make groups of {weight.shape[1]}")
            groups = 1 if channels is None else channels // weight.shape[1]
        geometry = {name: given[name] for name in ("stride", "padding", "dilation", "padding_mode")}
        return Conv(weight, None, Geometry.of(tuple(weight.shape[2:]), groups=groups or 1, **geometry))


class Offset(Kind):
    """A number that is added to each channel: a bias by itself, from a tensor or as written."""

    name = "offset"
    tensors = ("offset",)
    fields = {"offset": NUMBERS_OR_TENSOR}
    written = True
    parameter = True

    def width(self, shapes: Shapes, fields: Fields) -> int | None:
        count = channels_of(shapes["offset"]) if shapes else len(fields["offset"])
        return None if count == 1 else count

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        _check_there(tensors, fields.get("offset"))
        given = tensors["offset"] if tensors else torch.tensor(fields["offset"], dtype=torch.float64)
        if channels_of(tuple(given.shape)) is None:
            raise UsageError(f"expected a number for each channel, got a tensor of shape {tuple(given.shape)}")
        offsets = given.reshape(-1)
        count = len(offsets) if channels is None else channels
        if len(offsets) not in (1, count):
            raise UsageError(f"expected 1 or {count} numbers, one per channel, got {len(offsets)}")
        offsets = offsets.expand(count)
        return per_channel(torch.ones_like(offsets), axes, offsets)


KERNEL, OFFSET = FixedKernel(), Offset()


def _check_there(tensors: Tensors, numbers: object) -> None:
    if isinstance(numbers, str) and not tensors:
        raise UsageError(f"{numbers} is the name of a tensor, and here there is no checkpoint")


def _shape(shapes: Shapes, fields: Fields) -> tuple[int, ...]:
    """Return the kernel's shape, of the tensor or of the numbers that are written out."""
    if "kernel" in shapes:
        return shapes["kernel"]
    numbers: Any = fields["kernel"]
    shape: list[int] = []
    while isinstance(numbers, list):
        shape.append(len(numbers))
        numbers = numbers[0]
    return tuple(shape)
