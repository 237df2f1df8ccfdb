"""Operations that a factor and an offset for each channel can as well follow as precede.

Means, whatever their weights are, and whatever only moves numbers: y = a*x + b goes through them as it is, as long as
no position is made of anything but the input's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convtool.kinds.kind import Shape

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int"),
        *("reshape_as.default", "view_as.default", "unsqueeze.default"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims"),
    )
)
# Operations that turn axes, and the arguments that name two of them.
_TURNS = {
    "aten.transpose.int": ("dim0", "dim1"),
    "aten.swapaxes.default": ("axis0", "axis1"),
    "aten.permute.default": (),
    "aten.movedim.int": ("source", "destination"),
    "aten.t.default": (),
}
_RESAMPLES = ("aten.upsample_", "aten.adaptive_avg_pool", "aten.reflection_pad", "aten.replication_pad")


def moved_axes(name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> dict[int, int]:
    """Return, for each axis that channels may be on in what an operation reads, the axis that they are on behind it.

    Args:
        name: ATen's, dotted.
        arguments: by the names of its schema, None for tensors; not the defaults.
        takes, gives: the shapes of what it reads and makes.
    """
    rank = len(takes)
    if name in VIEWS:
        return _kept_by_view(takes, gives)
    if order := new_order(name, arguments, rank):
        return {axis: order.index(axis) for axis in range(rank)}
    same = {0: 0, 1: 1} if len(gives) == rank and gives[:2] == takes[:2] else {}
    if name.startswith("aten.avg_pool"):
        padded = any(_numbers(arguments.get("padding"))) and arguments.get("count_include_pad", True)
        return {} if padded or arguments.get("divisor_override") is not None else same
    if name.startswith(_RESAMPLES):
        return same
    if name == "aten.pad.default":
        return same if arguments.get("mode", "constant") in ("reflect", "replicate", "circular") else {}
    if name == "aten.mean.dim":
        over = {axis % rank for axis in arguments.get("dim") or range(rank)}
        kept = [axis for axis in range(rank) if axis not in over]
        return {axis: axis if arguments.get("keepdim") else kept.index(axis) for axis in kept}
    return {}


def _numbers(value: Any) -> Sequence[int]:
    return [value] if isinstance(value, int) else value or []


def new_order(name: str, arguments: Mapping[str, Any], rank: int) -> list[int]:
    """Return the axis of the input that each axis of the output is; none where it doesn't turn axes."""
    if name not in _TURNS:
        return []
    if name == "aten.permute.default":
        return [axis % rank for axis in arguments["dims"]]
    order = list(range(rank))
    one, other = (arguments[key] % rank for key in _TURNS[name]) if _TURNS[name] else (0, rank - 1)
    if name == "aten.movedim.int":
        order.insert(other, order.pop(one))
    else:
        order[one], order[other] = order[other], order[one]
    return order


def _kept_by_view(takes: Shape, gives: Shape) -> dict[int, int]:
    """Return the axes that are axes of the other shape too: of one size, with as many numbers before them."""
    before = {(math.prod(gives[:axis]), size): axis for axis, size in enumerate(gives) if size > 1}
    at = ((axis, (math.prod(takes[:axis]), size)) for axis, size in enumerate(takes) if size > 1)
    return {axis: before[place] for axis, place in at if place in before}
