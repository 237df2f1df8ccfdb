"""Trees of `Conv`s: running them, and what can be said of one as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, TypeAlias

from torch import Tensor

from convtool.core.compose import compose_geometry
from convtool.core.conv import Conv, Selection
from convtool.core.forward import forward
from convtool.core.tree import Chain, Leaf, Sum, Tree, flat_parts, fold
from convtool.errors import UsageError

Expression: TypeAlias = Tree[Conv]


def joined(tree: Tree[Leaf]) -> Tree[Leaf]:
    """Return the tree as it is computed with: what only moves numbers is read through by the layer behind it.

    Args:
        tree: its leaves are dataclasses with a `conv`.
    """
    if isinstance(tree, Sum):
        return Sum(tuple(map(joined, tree.parts)))
    if not isinstance(tree, Chain):
        return tree
    parts: list[Any] = []
    for part in map(joined, flat_parts(tree)):
        moves, conv = getattr(parts[-1] if parts else None, "conv", None), getattr(part, "conv", None)
        read = None
        if isinstance(moves, Selection) and conv is not None:
            read = moves.then(conv, compose_geometry(moves.geometry, conv.geometry))
        if read is None:
            parts.append(part)
        else:
            parts[-1] = replace(part, conv=read)
    return Chain(tuple(parts))


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


def multiply_adds(expression: Expression, input_size: tuple[int, ...]) -> int:
    """Multiply-adds for one input; a transposed layer's taps are counted where they read."""
    if isinstance(expression, Chain):
        total, size = 0, input_size
        for part in expression.parts:
            total += multiply_adds(part, size)
            size = output_size(part, size)
        return total
    if isinstance(expression, Sum):
        return sum(multiply_adds(part, input_size) for part in expression.parts)
    size = input_size if expression.geometry.transposed else expression.output_size(input_size)
    return _products(expression) * math.prod(size)


def work_per_position(expression: Expression) -> float:
    """Multiply-adds per input position for inputs so large that borders don't count."""
    return _work(expression)[0]


def _work(expression: Expression) -> tuple[float, float]:
    """(multiply-adds, output positions) per input position."""
    if isinstance(expression, Chain):
        total, positions = 0.0, 1.0
        for part in expression.parts:
            work, ratio = _work(part)
            total, positions = total + positions * work, positions * ratio
        return total, positions
    if isinstance(expression, Sum):
        parts = [_work(part) for part in expression.parts]
        return sum(work for work, _ in parts), parts[0][1]
    stride = math.prod(expression.geometry.stride)
    if expression.geometry.transposed:
        return float(_products(expression)), float(stride)
    return _products(expression) / stride, 1 / stride


def _products(conv: Conv) -> int:
    """Multiply-adds per position; none of a layer that only copies, as padding, an identity and an upsampling do."""
    geometry, weight = conv.geometry, conv.weight
    apart = geometry.transposed and geometry.kernel_size == geometry.stride  # each output reads one input
    if (weight[0].numel() == 1 or apart) and geometry.groups == len(weight) and conv.bias is None:
        return 0 if bool((weight == 1).all()) else weight.numel()
    return weight.numel()
