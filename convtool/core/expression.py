"""Trees of `Conv`s: running them, and what can be said of one as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeAlias

from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.tree import Chain, Sum, Tree, fold
from convtool.errors import UsageError

Expression: TypeAlias = Tree[Conv]


def run(expression: Expression, x: Tensor) -> Tensor:
    """The expression's output for x (N, C, *size), in x's dtype, each layer through torch."""
    if isinstance(expression, Chain):
        return reduce(lambda value, part: run(part, value), expression.parts, x)
    if isinstance(expression, Sum):
        return reduce(lambda a, b: a + b, (run(part, x) for part in expression.parts))
    return forward(expression, x)


def output_size(expression: Expression, size: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial output size; UsageError where a layer cannot run on its input, or branches differ in size."""
    if isinstance(expression, Chain):
        return reduce(lambda value, part: output_size(part, value), expression.parts, size)
    if isinstance(expression, Sum):
        sizes = {output_size(part, size) for part in expression.parts}
        if len(sizes) > 1:
            raise UsageError(f"the branches of a sum give outputs of different sizes: {sorted(sizes)}")
        return sizes.pop()
    return expression.output_size(size)


def in_channels(expression: Expression) -> int:
    """Channels of the input."""
    return expression.in_channels if isinstance(expression, Conv) else in_channels(expression.parts[0])


def out_channels(expression: Expression) -> int:
    """Channels of the output."""
    return expression.out_channels if isinstance(expression, Conv) else out_channels(expression.parts[-1])


def depth(expression: Expression, of: Callable[[Conv], int]) -> int:
    """`of` added up along the path where that comes to most; each addition of branches counts 1 besides."""
    return fold(expression, of, lambda parts: sum(parts), lambda parts: max(parts) + len(parts) - 1)
