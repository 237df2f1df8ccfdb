"""Trees of `Conv`s: running them, and what can be said of one as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.joint import add_geometry, compose_geometry
from convtool.core.moves import Selection, compose_moves
from convtool.core.tree import Chain, Leaf, Sum, Tree, flat_parts, fold, leaves, walk
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
        if isinstance(moves, Selection) and conv is not None and _reads_each_once(conv):
            geometry = compose_geometry(moves.geometry, conv.geometry)
            parts[-1] = replace(part, conv=compose_moves(moves, conv, geometry))  # in its own dtype
        else:
            parts.append(part)
    return Chain(tuple(parts))


def _reads_each_once(conv: Conv) -> bool:
    """Return whether it is a dense layer over the channels of one position, as what follows a flatten is."""
    return conv.geometry.groups == 1 and math.prod(conv.geometry.kernel_size) == 1


def run(expression: Expression, x: Tensor) -> Tensor:
    """Return the expression's output for x (N, C, *size), in x's dtype, each layer through torch."""
    return walk(expression, x, forward, lambda _, outputs: reduce(lambda a, b: a + b, outputs))


def output_size(expression: Expression, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the spatial output size; UsageError where a layer cannot run on its input, or branches differ in size."""
    return walk(expression, size, lambda conv, at: conv.output_size(at), _common_size)


def with_sizes(expression: Expression, size: tuple[int, ...]) -> list[tuple[Conv, tuple[int, ...]]]:
    """Return every layer with the spatial size of its input; the expression's is `size`. Errors are `output_size`'s."""
    found = []

    def step(conv: Conv, at: tuple[int, ...]) -> tuple[int, ...]:
        found.append((conv, at))
        return conv.output_size(at)

    walk(expression, size, step, _common_size)
    return found


def widest_layer(expression: Expression, size: tuple[int, ...]) -> int:
    """Count the numbers of one input where the expression is widest."""
    return max(
        max(conv.in_channels * math.prod(at), conv.out_channels * math.prod(conv.output_size(at)))
        for conv, at in with_sizes(expression, size)
    )


def _common_size(_: tuple[int, ...], sizes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if len(set(sizes)) > 1:
        raise UsageError(f"the branches of a sum give outputs of different sizes: {sorted(set(sizes))}")
    return sizes[0]


def exact_type(expression: Expression) -> torch.dtype:
    """Return what an expression is computed in: float64, or complex128 where some of its numbers are complex."""
    return torch.complex128 if any(conv.dtype.is_complex for conv in leaves(expression)) else torch.float64


def in_channels(expression: Expression) -> int:
    """Channels of the input."""
    return expression.in_channels if isinstance(expression, Conv) else in_channels(expression.parts[0])


def out_channels(expression: Expression) -> int:
    """Channels of the output."""
    return expression.out_channels if isinstance(expression, Conv) else out_channels(expression.parts[-1])


def depth(expression: Expression, of: Callable[[Conv], int]) -> int:
    """Return `of` added up along the path where that comes to most; each addition of branches counts 1 besides."""
    return fold(expression, of, lambda parts: sum(parts), lambda parts: max(parts) + len(parts) - 1)


def window(conv: Conv) -> int:
    """Return how many numbers an output is added up of, at most, with its bias and a rounding to spare."""
    return 0 if isinstance(conv, Selection) else conv.weight[0].numel() + 2


def multiply_adds(expression: Expression, input_size: tuple[int, ...]) -> int:
    """Return the multiply-adds for one input; a transposed layer's taps are counted where they read."""
    return sum(
        _products(conv) * math.prod(size if conv.geometry.transposed else conv.output_size(size))
        for conv, size in with_sizes(expression, input_size)
    )


def work_per_position(expression: Expression, *, of_output: bool = False) -> float:
    """Return the multiply-adds per input (or output) position for inputs so large that borders don't count."""

    def step(conv: Conv, before: tuple[float, float]) -> tuple[float, float]:
        (total, positions), stride = before, math.prod(conv.geometry.stride)
        ratio = stride if conv.geometry.transposed else 1 / stride  # output positions per input position
        runs = 1 if conv.geometry.transposed else ratio  # of the kernel
        return total + positions * runs * _products(conv), positions * ratio

    def merge(before: tuple[float, float], branches: list[tuple[float, float]]) -> tuple[float, float]:
        return before[0] + sum(total - before[0] for total, _ in branches), branches[0][1]

    total, positions = walk(expression, (0.0, 1.0), step, merge)
    return total / positions if of_output else total


def _products(conv: Conv) -> int:
    """Multiply-adds per position; none of a layer that only copies, as padding, an identity and an upsampling do."""
    if isinstance(conv, Selection):
        return 0
    geometry, weight = conv.geometry, conv.weight
    apart = geometry.transposed and geometry.kernel_size == geometry.stride  # each output reads one input
    if (weight[0].numel() == 1 or apart) and geometry.groups == len(weight) and conv.bias is None:
        return 0 if bool((weight == 1).all()) else weight.numel()
    return weight.numel()


def fused_geometry(tree: Expression) -> Geometry:
    """Return the geometry of the one layer that stands for the tree; RefusedError where there is none."""

    def chain(parts: list[Geometry]) -> Geometry:
        return reduce(compose_geometry, parts)

    def total(parts: list[Geometry]) -> Geometry:
        return reduce(add_geometry, parts)

    return fold(tree, lambda conv: conv.geometry, chain, total)
