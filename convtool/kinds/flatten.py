"""nn.Flatten and nn.Unflatten of a feature map: the convolution whose kernel is the whole map, and its adjoint.

With P positions, output channel c*P + p of a flatten is position p of channel c: one group a channel, an identity
(P, P) for its weight. What follows a flatten runs at the one position that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from convtool.core.fields import SIZES, Fields
from convtool.core.geometry import Geometry, format_sizes
from convtool.errors import RefusedError, UsageError
from convtool.kinds.kind import Kind, Shape, Shapes, Tensors, check_size

if TYPE_CHECKING:
    from convtool.core.conv import Conv


# Operations that give the numbers that they read in another shape.
VIEWS = (
    *(f"aten.{name}.default" for name in ("view", "reshape", "_unsafe_view", "squeeze")),
    *("aten.flatten.using_ints", "aten.squeeze.dim", "aten.squeeze.dims"),
)


class Flatten(Kind):
    """A feature map of that size as channels at one position."""

    name = "flatten"
    inverse = "unflatten"
    fields = {"size": SIZES}
    written = True
    reshapes = True
    code = "nowhere"  # a model's own flatten may stay: what is left of the map, one position, it flattens as well
    bare_modules = ("torch.nn.modules.flatten.Flatten",)
    operations = VIEWS

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise RefusedError("it flattens other axes than all but the batch's")
        size = size_of()
        if size is None:
            raise UsageError("how large a map it reads isn't known here; write it as 'flatten(7,7)'")
        return {"size": list(size)}

    def axes(self, shapes: Shapes, fields: Fields) -> int | None:
        return len(fields["size"])

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        positions = math.prod(fields["size"])
        return gives // positions if gives is not None and gives % positions == 0 else None

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return None if takes is None else takes * math.prod(fields["size"])

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        flat = len(takes) > 2 and gives == (takes[0], math.prod(takes[1:]))
        return {"size": list(takes[2:])} if flat else None

    def check_input(self, fields: Fields, size: tuple[int, ...]) -> None:
        if tuple(fields["size"]) != size:
            raise UsageError(
                f"reads a feature map of {format_sizes(fields['size'])}, and of this input size it is"
                f" {format_sizes(size)}"
            )

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        from convtool.core.moves import Selection

        size = tuple(fields["size"])
        return Selection(torch.arange(math.prod(size) * (channels or 0)), channels or 0, Geometry.of(size))


class Unflatten(Kind):
    """Channels at one position as a feature map of that size."""

    name = "unflatten"
    inverse = "flatten"
    fields = {"size": SIZES}
    written = True
    reshapes = True

    def axes(self, shapes: Shapes, fields: Fields) -> int | None:
        return len(fields["size"])

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        return FLATTEN.gives(shapes, fields, gives)

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return FLATTEN.takes(shapes, fields, takes)

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        size = tuple(fields["size"])
        if len(size) != axes:
            raise UsageError(f"expected {axes} sizes, got {format_sizes(size)}")
        return spread_out(size, channels or 0, stride=(1,) * axes)


FLATTEN, UNFLATTEN = Flatten(), Unflatten()


def spread_out(size: tuple[int, ...], channels: int, stride: tuple[int, ...]) -> Conv:
    """Return the transposed layer that makes positions of channels: channel c*P + p is position p of output c."""
    import torch

    from convtool.core.conv import Conv

    positions = math.prod(size)
    if channels % positions:
        raise UsageError(f"{channels} numbers don't make channels of that size")
    check_size(positions**2, "the layer")
    kernel = torch.eye(positions, dtype=torch.float64).reshape(1, positions, *size)
    groups = channels // positions
    geometry = Geometry.of(size, stride=stride, groups=groups, transposed=True)
    return Conv(kernel.expand(groups, -1, *(-1,) * len(size)), None, geometry)
