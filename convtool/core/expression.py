"""Trees of `Conv`s: running them, what can be said of one as a whole, and the sizes at which one shows all it does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry, format_sizes
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
        taps = 0 if conv is None else math.prod(conv.geometry.kernel_size)
        # A dense layer over the channels of one position, as what follows a flatten is, reads each once.
        if isinstance(moves, Selection) and conv is not None and conv.geometry.groups == taps == 1:
            geometry = compose_geometry(moves.geometry, conv.geometry)
            parts[-1] = replace(part, conv=compose_moves(moves, conv, geometry))  # in its own dtype
        else:
            parts.append(part)
    return Chain(tuple(parts))


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


COMFORTABLE_INPUT = 1 << 18  # numbers of one input in the widest layer that take a second or few


def split_input_size(input_size: Sequence[int], channels: int, axes: int) -> tuple[int, ...]:
    """Return the spatial part of an input size given with or without the channels in front.

    Raises:
        UsageError: a wrong number of sizes, or other channels than the layer takes.
    """
    if len(input_size) == axes:
        return tuple(input_size)
    if len(input_size) == axes + 1:
        if input_size[0] != channels:
            raise UsageError(
                f"input size {format_sizes(input_size)}: the layer takes {channels} channels, not {input_size[0]}"
            )
        return tuple(input_size[1:])
    raise UsageError(
        f"input size {format_sizes(input_size)}: expected {axes} spatial sizes, with or without the {channels}"
        " channels in front"
    )


def default_sizes(*sides: Sequence[Conv] | Expression) -> list[tuple[int, ...]]:
    """Input sizes at which trees show their borders on every side and an interior, one per remainder of their stride.

    The first is the smallest comfortable one; the axes differ, so that height and width cannot be mixed up; at most
    four sizes.
    """
    trees = [Chain(tuple(tree)) if isinstance(tree, Sequence) else tree for tree in sides]
    axes = next(leaves(trees[0])).spatial_axes
    if axes == 0:
        return [()]
    reaches, strides = zip(*(_reach(tree, axes) for tree in trees), strict=True)
    reach = [max(each) for each in zip(*reaches, strict=True)]
    stride = [math.lcm(*each) for each in zip(*strides, strict=True)]
    smallest: list[int] = []
    for r, s in zip(reach, stride, strict=True):
        least = 1 + r + 2 * s
        smallest.append(next(n for n in itertools.count(least) if n not in smallest))
    return [tuple(n + step for n in smallest) for step in range(min(4, max(stride)))]


def alike_size(trees: Sequence[Expression], size: tuple[int, ...]) -> tuple[int, ...]:
    """Return a size to run in place of a large one: what is equal at the one is equal at the other.

    Every output of a large input has its like in the smaller one. The smaller is long enough for both borders and a
    whole period of the strides in between, and leaves the same remainder by the strides, so that every layer meets
    either border at the same step. What is padded or wrapped around, and what of it is read by which entry of a
    kernel, then follows from the distance to the borders alone.

    Returns:
        The size itself where running it is no matter, or a bias map or a flatten ties a layer to it.
    """
    if max(widest_layer(tree, size) for tree in trees) <= COMFORTABLE_INPUT:
        return size
    if any(conv.has_bias_map for tree in trees for conv in leaves(tree)):
        return size
    found = [_reach(tree, len(size)) for tree in trees]
    alike: list[int] = []
    for axis, n in enumerate(size):
        step = math.lcm(*(stride[axis] for _, stride in found))
        least = 1 + 2 * max(reach[axis] for reach, _ in found) + 2 * step
        smaller = least + (n - least) % step
        while smaller in alike:  # height and width stay apart
            smaller += step
        alike.append(min(n, smaller))
    return tuple(alike)


def _reach(tree: Expression, axes: int) -> tuple[list[int], list[int]]:
    """Return per axis, how far one output sees including padding, in input positions at most, and the stride."""

    def step(conv: Conv, before: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        reach, stride = [*before[0]], [*before[1]]
        for number, axis in enumerate(conv.geometry.axes):
            seen = math.ceil(axis.reach / axis.stride) if axis.transposed else axis.reach
            reach[number] += stride[number] * (seen + axis.before + axis.after)
            stride[number] *= 1 if axis.transposed else axis.stride
        return reach, stride

    def merge(
        _: tuple[list[int], list[int]], branches: list[tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[int]]:
        reaches, strides = zip(*branches, strict=True)
        # A branch that strides and then spreads again has a longer period than its output tells.
        return [max(each) for each in zip(*reaches, strict=True)], [
            math.lcm(*each) for each in zip(*strides, strict=True)
        ]

    return walk(tree, ([0] * axes, [1] * axes), step, merge)
