"""Layers held number by number against those that they stand for: rows of both matrices, by `convtool.core.bound`.

An output is a sum of inputs, each times a number, and of what the biases come to. Two trees of layers are equal for all
inputs exactly if these numbers are. They are found for each tree by the way back (`convtool.core.ways`), which uses
nothing of `convtool.core.compose`, for one output of each class. Away from the border, one period of outputs has all
the numbers of the one layer that stands for a tree; where the tables say that the borders agree as well, comparing
these is a proof for all inputs of all sizes. At one size, an output of every class is one for all inputs of that size,
whatever the layers and their borders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from convtool.core.bound import Bound, Tolerance
from convtool.core.classes import classes, inside, period
from convtool.core.conv import Conv
from convtool.core.expression import Expression, exact_type, in_channels, out_channels, output_size, run
from convtool.core.geometry import LARGEST, Geometry
from convtool.core.rounding import rounded
from convtool.core.stored import Stored, half_ulp, stored_within
from convtool.core.tally import Index, Region, Worst
from convtool.core.taps import tap_table
from convtool.core.tree import Sum, Tree, leaves, map_leaves, sole_layer
from convtool.core.ways import LayerWay, Places, Rows, placed_among, pull, union, way_back, widest
from convtool.errors import RefusedError, UsageError

AT_ONCE = 1 << 18  # numbers of a row, times the rows that are made together: they stay in the processor's cache
MANY = 1 << 15  # numbers that are looked at together for a start

Ways = Tree[LayerWay]


def compare_numbers(
    before: Expression,
    after: Tree[Stored],
    bound: Bound | Tolerance,
    size: tuple[int, ...] | None = None,
    *,
    everywhere: bool = False,
) -> Region:
    """Hold each number of some layers against that of the layers that they stand for.

    Args:
        before: its numbers are taken as exact.
        size: of the input. Only there bias maps can be compared.
        everywhere: look at all outputs of that size; else at those away from the border of a large input.

    Returns:
        What was compared; `where` is (output channel, input channel, *tap), or the channel alone of a bias. Where AFTER
        isn't one layer with such a tap, it has the number of the place among those that the output reads instead.

    Raises:
        RefusedError: everything is near a border, at all sizes.
    """
    return _Comparison(before, after, bound, size, everywhere).run()


class _Comparison:
    """The numbers of layers while they are compared; see `compare_numbers`."""

    def __init__(
        self,
        before: Expression,
        after: Tree[Stored],
        bound: Bound | Tolerance,
        size: tuple[int, ...] | None,
        everywhere: bool,
    ) -> None:
        self.before, self.kept, self.bound = before, map_leaves(lambda leaf: leaf.conv, after), bound
        self.layer, one = sole_layer(self.kept), sole_layer(after)
        # Several taps of one layer may meet at a border, and then no entry is a number as it was stored.
        alone = one is not None and one.given is None and not everywhere and isinstance(bound, Bound)
        self.dtype = (one.dtype or one.conv.dtype) if one is not None and alone else None
        bias = None if one is None else one.conv.bias
        self.bias_dtype = self.dtype if one is None or bias is None or self.dtype is None else one.dtype or bias.dtype
        both, self.map_size = (self.before, self.kept), size
        self.convs = [conv for tree in both for conv in leaves(tree)]
        bare, given_by = [_shape(tree) for tree in both], size if everywhere else None
        self.size, self.given, self.read, self.reading = _ways((bare[0], bare[1]), given_by)
        self.places = math.prod(len(places.positions) for places in self.read)
        self.groups = math.gcd(*(conv.geometry.groups for conv in self.convs))
        self.channels, self.inputs = out_channels(before) // self.groups, in_channels(before)
        self.ways: dict[int, tuple[Expression, Ways]] = {}
        self.worst = Worst("number")

    def run(self) -> Region:
        """Compare all of them."""
        mapped = any(conv.has_bias_map for conv in self.convs)
        biased = any(conv.bias is not None for conv in self.convs)
        widths = (widest(self.way(tree)) for tree in (self.before, self.kept))
        step = max(1, AT_ONCE // max(self.places * self.inputs, *widths))
        spans = [(first, min(first + step, self.channels)) for first in range(0, self.channels, step)]
        offsets: dict[int, list[Tensor]] = {id(self.before): [], id(self.kept): []}
        for span in spans:
            pulled = {id(tree): self.rows(tree, *span) for tree in (self.before, self.kept)}
            for number, rows in pulled.items():
                offsets[number].append(rows.offset)

            def dense(tree: Expression, span: tuple[int, int] = span, pulled: dict[int, Rows] = pulled) -> Tensor:
                return (pulled.get(id(tree)) or self.rows(tree, *span)).dense(self.places)

            if not self.nearest(dense(self.before), dense(self.kept)):
                self.hold(dense, partial(self.place, span[0]), self.dtype)
        if biased and not mapped:
            self.hold(
                lambda tree: torch.cat(offsets.get(id(tree)) or [self.rows(tree, *span).offset for span in spans]),
                self.channel,
                self.bias_dtype,
            )
        if mapped and self.map_size is not None:
            shape = 1, self.inputs, *self.map_size
            nothing = torch.zeros(shape, dtype=exact_type(self.before))
            self.hold(lambda tree: run(map_leaves(Conv.exact, tree), nothing)[0], lambda where: where[:1])
        return self.worst.region

    def nearest(self, expected: Tensor, found: Tensor) -> bool:
        """Return whether many numbers of one layer are all the nearest that its dtype has, and if so count them.

        That takes a fraction of the time, and for so many the largest ratio is hardly ever much below 1.
        """
        if self.dtype is None or expected.numel() < MANY or expected.is_complex() != found.is_complex():
            return False
        same = torch.equal(rounded(expected, self.dtype).to(found.dtype), found)
        if same:
            self.worst.count(expected.numel())
        return same

    def hold(
        self,
        evaluated: Callable[[Expression], Tensor],
        place: Callable[[Index], Index],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Hold what is evaluated of AFTER against what is of BEFORE.

        Args:
            dtype: of AFTER's numbers, where these are evaluated as they are stored.
        """
        expected, found = evaluated(self.before), evaluated(self.kept)
        lost = None if dtype is None else stored_within(expected, found, half_ulp(found, dtype), dtype)
        most = self.bound.of(evaluated, expected, found, numbers=True, lost=lost)
        self.worst.hold(expected, found, most, place)

    def way(self, tree: Expression) -> Ways:
        """Return the way back through BEFORE, AFTER, or layers of their geometry, to what both read."""
        if id(tree) not in self.ways:
            convs, found = leaves(map_leaves(_without_map, tree)), self.reading[_shape(tree)]
            through = map_leaves(lambda way: way if way.conv is None else way.through(next(convs)), found)
            self.ways[id(tree)] = tree, through
        return self.ways[id(tree)][1]

    def rows(self, tree: Expression, first: int, last: int) -> Rows:
        """Return the numbers of each group's output channels first:last."""
        counts, channels = [len(places.positions) for places in self.given], self.channels * self.groups
        return pull(self.way(tree), Rows.of(first, last, self.groups, channels, counts, exact_type(tree)))

    def channel(self, where: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output channel of an offset, (row, *class, group)."""
        return (where[-1] * self.channels + where[0],)

    def place(self, first: int, where: tuple[int, ...]) -> tuple[int, ...]:
        """Return (output channel, input channel, *tap) of a number, (row, place, input channel)."""
        row, place, channel = where
        output = channel // (self.inputs // self.groups) * self.channels + first + row
        numbers = np.unravel_index(place, tuple(len(places.positions) for places in self.read)) if self.read else ()
        return (output, channel, *(self.tap(axis, int(number)) for axis, number in enumerate(numbers)))

    def tap(self, axis: int, number: int) -> int:
        """Return the tap of AFTER that reads a place; the place's number in its class where none does."""
        own = self.read[axis].classes[number]
        if self.layer is not None:
            output = int(self.given[axis].positions[own])
            taps = tap_table(self.layer.geometry.axes[axis], self.size[axis], output, output + 1)[0]
            if len(found := np.flatnonzero(taps == self.read[axis].positions[number])):
                return int(found[0])
        return number - int(self.read[axis].starts(int(own) + 1)[own])


def _without_map(conv: Conv) -> Conv:
    return conv.without_bias() if conv.has_bias_map else conv


def _shape(tree: Expression) -> Tree[Geometry]:
    return map_leaves(lambda conv: conv.geometry, sole_layer(tree) or tree)


@lru_cache(maxsize=16)  # networks have many layers of few geometries
def _ways(
    shapes: tuple[Tree[Geometry], Tree[Geometry]], size: tuple[int, ...] | None
) -> tuple[tuple[int, ...], list[Places], list[Places], dict[Tree[Geometry], Ways]]:
    """Return the outputs that are looked at, what they read, and the way back to that through either tree.

    Args:
        size: of the input; None for outputs away from the border of a large one.

    Returns:
        (size of the input, places of the outputs on each axis, places read on each axis, ways by the tree's geometry)
    """
    trees = [map_leaves(lambda axes: Conv(_no_numbers(axes), None, axes), shape) for shape in shapes]
    if size is None:
        size, given = _far(trees)
    else:  # an output of each class that any of the trees tells apart, on each axis
        given = [Places.each(classes(Sum(tuple(trees)), size, axis).first) for axis in range(len(size))]
    back = [way_back(tree, size, given, range(len(size))) for tree in trees]
    read = [union(each, n) for each, n in zip(zip(*(places for _, places in back), strict=True), size, strict=True)]
    ways = {shape: placed_among(read, *found, size) for shape, found in zip(shapes, back, strict=True)}
    return size, given, read, ways


def _no_numbers(geometry: Geometry) -> Tensor:
    return torch.empty(geometry.groups, 1, *geometry.kernel_size, device="meta")


def _far(trees: list[Expression]) -> tuple[tuple[int, ...], list[Places]]:
    """Return a size so large, and a period of outputs so far inside, that nothing near a border comes into it."""
    axes = range(next(leaves(trees[0])).spatial_axes)
    every = [math.lcm(*(period(tree, axis) for tree in trees)) for axis in axes]
    for power in range(5, LARGEST.bit_length()):
        size = (1 << power,) * len(axes)
        try:
            middle = [n // 2 for n in output_size(trees[0], size)]
            given = [at + np.arange(n) for at, n in zip(middle, every, strict=True)]
            if all(inside(tree, size, axis, given[axis]).all() for tree, axis in itertools.product(trees, axes)):
                return size, [Places.each(positions) for positions in given]
        except UsageError:  # too small to run
            continue
    raise RefusedError("no input is so large that outputs of both stand far inside of it")
