"""What the data flow takes an operation of aten for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convtool.graph.flow import Op


def classify(
    name: str,
    read: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Op:
    """What an operation of aten is, by its name and the shapes that it reads and gives."""
    if name in ("add.Tensor", "add_.Tensor") and kwargs.get("alpha", 1) == 1 and len(args) == 2:
        if len(read) == 2 and read[0] == read[1] == shape:
            return Op.ADD
        numbers = [value for value in args if isinstance(value, int | float)]
        return Op.PASS if numbers and not numbers[0] and read[0] == shape else Op.OTHER
    if len(read) != 1:
        return Op.OTHER
    if name in _PASSES and read[0] == shape:
        return Op.PASS
    if (
        name in ("dropout.default", "feature_dropout.default", "alpha_dropout.default")
        and read[0] == shape
        and len(args) == 3
        and args[2] is False
    ):
        return Op.PASS
    if name in _VIEWS and read[0] == shape:
        return Op.PASS
    if name in _VIEWS and len(read[0]) > 2 and shape == (read[0][0], math.prod(read[0][1:])):
        return Op.FLATTEN
    return Op.OTHER


_PASSES = frozenset({"clone.default", "alias.default", "detach.default", "contiguous.default", "lift_fresh.default"})
_VIEWS = frozenset(
    {"view.default", "reshape.default", "flatten.using_ints", "_unsafe_view.default"}
    | {"squeeze.default", "squeeze.dim", "squeeze.dims"}
)
