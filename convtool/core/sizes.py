"""Input sizes: as users give them, those at which a tree of layers shows all that it does, a small one for a large."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from convtool.core.conv import Conv
from convtool.core.expression import Expression, widest_layer
from convtool.core.geometry import format_sizes
from convtool.core.tree import Chain, leaves, walk
from convtool.errors import UsageError

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
