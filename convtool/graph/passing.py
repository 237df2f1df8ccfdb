"""Operations that a factor and an offset for each channel can as well follow as precede.

Means, whatever their weights are, and whatever only moves numbers: y = a*x + b goes through them as it is, as long as
no position is made of anything but the input's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convtool.kinds.kind import Shape

_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int"),
        *("reshape_as.default", "view_as.default", "unsqueeze.default"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims"),
    )
)
_RESAMPLES = ("aten.upsample_", "aten.adaptive_avg_pool", "aten.reflection_pad", "aten.replication_pad")


def moved_axes(name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> dict[int, int]:
    """Return, for each axis that channels may be on in what an operation reads, the axis that they are on behind it.

    Args:
        name: ATen's, dotted.
        arguments: by the names of its schema, None for tensors; not the defaults.
        takes, gives: the shapes of what it reads and makes.
    """
    rank = len(takes)
    if name in _VIEWS:
        return _kept_by_view(takes, gives)
    if name in ("aten.transpose.int", "aten.permute.default", "aten.t.default", "aten.movedim.int"):
        order = _order(name, arguments, rank)
        return {axis: order.index(axis) for axis in range(rank)} if order else {}
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


def _order(name: str, arguments: Mapping[str, Any], rank: int) -> list[int]:
    """Return the axis of the input that each axis of the output is; none where that isn't known."""
    if name == "aten.permute.default":
        return [axis % rank for axis in arguments["dims"]]
    order = list(range(rank))
    if name == "aten.movedim.int":
        order.insert(arguments["destination"] % rank, order.pop(arguments["source"] % rank))
        return order
    one, other = (arguments["dim0"] % rank, arguments["dim1"] % rank) if "dim0" in arguments else (0, rank - 1)
    order[one], order[other] = order[other], order[one]
    return order


def _kept_by_view(takes: Shape, gives: Shape) -> dict[int, int]:
    """Return the axes that are axes of the other shape too: of one size, with as many numbers before them."""
    before = {(math.prod(gives[:axis]), size): axis for axis, size in enumerate(gives) if size > 1}
    at = ((axis, (math.prod(takes[:axis]), size)) for axis, size in enumerate(takes) if size > 1)
    return {axis: before[place] for axis, place in at if place in before}
