"""The way back through layers: what rows of a matrix weigh, carried from what each layer gives to what it reads.

Places of an axis are positions of several classes, each class by itself: outputs that are looked at apart, though they
read the same inputs. So one pass carries what outputs of all classes weigh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, output_size
from convtool.core.moves import NOTHING, Selection
from convtool.core.rounding import exact_dtype
from convtool.core.taps import PADDED, Table, tap_table
from convtool.core.tree import Chain, Sum, Tree, leaves

AT_ONCE = 1 << 22  # products that are made before they are added up


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Positions of one axis, of several classes; ascending, those of each class together.

    Attributes:
        classes: (places,) the class of each.
        positions: (places,)
    """

    classes: Table
    positions: Table

    @classmethod
    def each(cls, positions: Table) -> Places:
        """Return positions, each a class of its own."""
        return cls(np.arange(len(positions)), positions)

    def starts(self, count: int) -> Table:
        """Return (count + 1,) where each class begins, and the last one ends."""
        return np.searchsorted(self.classes, np.arange(count + 1))

    def find(self, some: Places, size: int) -> Table:
        """Return where some of these places stand."""
        return np.searchsorted(self.classes * size + self.positions, some.classes * size + some.positions)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What is read of some places on one axis.

    Attributes:
        given: those places.
        table: (places given, taps) which of the places read, or PADDED.
        read: the places that are read, each class by itself.
    """

    given: Places
    table: Table
    read: Places

    def looks(self, count: int) -> Iterator[bytes]:
        """Yield what each of so many classes reads, numbered from the first of its own."""
        begins = self.read.starts(count)[self.given.classes]
        seen = np.where(self.table == PADDED, PADDED, self.table - begins[:, None]).astype(np.int32)
        starts = self.given.starts(count)
        return (seen[start:stop].tobytes() for start, stop in itertools.pairwise(starts))


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What rows of a matrix weigh at some layer: of each group, those of the output channels first:last.

    Groups don't meet, so the rows of one number in all of them are carried as one.

    Attributes:
        channels: of the output.
        numbers: (rows, places, C); None as long as each weighs nothing but its own channel.
        factors: (C,) what each channel is still to be multiplied by; None for nothing.
        offset: (rows, *classes, groups) what the biases on the way come to.
    """

    first: int
    last: int
    groups: int
    channels: int
    offset: Tensor
    numbers: Tensor | None = None
    factors: Tensor | None = None

    @classmethod
    def of(cls, first: int, last: int, groups: int, channels: int, classes: Sequence[int], dtype: torch.dtype) -> Rows:
        """Return rows as they are at the outputs of the last layer."""
        return cls(first, last, groups, channels, torch.zeros(last - first, *classes, groups, dtype=dtype))

    def own(self, values: Tensor) -> Tensor:
        """Return (groups, rows, ...) of (C, ...), the rows' own channels."""
        return values.reshape(self.groups, len(values) // self.groups, *values.shape[1:])[:, self.first : self.last]

    def dense(self, places: int) -> Tensor:
        """Return (rows, places, C)."""
        if self.numbers is not None:
            return self.numbers
        count, dtype = self.last - self.first, self.offset.dtype
        found = torch.zeros(count, places, self.groups, self.channels // self.groups, dtype=dtype)
        factors = torch.ones(self.channels, dtype=dtype) if self.factors is None else self.factors
        found[torch.arange(count), :, :, torch.arange(self.first, self.last)] = self.own(factors).T[:, None]
        return found.flatten(2)

    def scaled(self, factors: Tensor) -> Rows:
        """Return them with each channel multiplied by a number, (C,)."""
        if self.numbers is not None:
            return replace(self, numbers=self.numbers * factors)
        return replace(self, factors=factors if self.factors is None else self.factors * factors)


class LayerWay:
    """Through one layer, whose taps at some places read other places, on each axis.

    Args:
        conv: None for what only finds a branch's places among those of all branches.
    """

    def __init__(self, conv: Conv | None, axes: list[Step]) -> None:
        self.conv, self.axes = conv, axes
        self.given = math.prod(len(axis.table) for axis in axes)
        self.read = math.prod(len(axis.read.positions) for axis in axes)

    def through(self, conv: Conv) -> LayerWay:
        """Return the way through another layer that reads where this one does."""
        other = LayerWay(conv, self.axes)
        other.landing = self.landing
        return other

    @cached_property
    def landing(self) -> Tensor:
        """(places given, taps) which of the places each tap reads, of all axes together; `read` for none of them."""
        at, live = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
        for axis in self.axes:
            shape = len(at) * len(axis.table), at.shape[1] * axis.table.shape[1]
            at = (at[:, None, :, None] * len(axis.read.positions) + axis.table[None, :, None, :]).reshape(shape)
            live = (live[:, None, :, None] & (axis.table != PADDED)[None, :, None, :]).reshape(shape)
        return torch.from_numpy(np.where(live, at, self.read))

    @cached_property
    def direct(self) -> bool:
        """Whether each place read is read by one tap of one place, in order."""
        return torch.equal(self.landing.flatten(), torch.arange(self.read))

    @cached_property
    def weight(self) -> Tensor:
        """(C_out, C_in/groups, taps), as stored."""
        assert self.conv is not None
        return self.conv.weight.flatten(2) if self.axes else self.conv.weight[:, :, None]

    @cached_property
    def factors(self) -> Tensor:
        """(groups, C_out/groups, taps, C_in/groups)"""
        assert self.conv is not None
        groups = self.conv.geometry.groups
        by_group = self.weight.reshape(groups, len(self.weight) // max(1, groups), *self.weight.shape[1:])
        return by_group.to(exact_dtype(by_group.dtype)).transpose(2, 3).contiguous()

    def pull(self, rows: Rows) -> Rows:
        """Return what rows that weigh what the layer gives weigh of what it reads."""
        conv = self.conv
        if conv is None:
            return rows if self.direct else replace(rows, numbers=self._placed(rows), factors=None)
        rows = self._with_bias(rows)
        if conv.only_scales:
            return rows.scaled(conv.weight.to(rows.offset.dtype).flatten())
        if isinstance(conv, Selection):
            numbers = self._copied(conv, rows.dense(self.given))
        elif rows.numbers is None:
            own = self._own(conv, rows)
            numbers = own if self.direct and self.given == 1 else self._spread(own)
        else:
            numbers = self._times(conv, rows.numbers)
        return replace(rows, numbers=numbers, factors=None)

    def _with_bias(self, rows: Rows) -> Rows:
        bias = None if self.conv is None else self.conv.bias
        if bias is None:
            return rows
        bias = bias.to(rows.offset.dtype)
        if rows.numbers is None:
            own = rows.own(bias if rows.factors is None else bias * rows.factors).T  # (rows, groups)
            return replace(rows, offset=rows.offset + own.reshape(len(own), *(1,) * len(self.axes), rows.groups))
        shape = *rows.numbers.shape[:2], rows.groups, len(bias) // max(1, rows.groups)
        added = (rows.numbers * bias).reshape(shape).sum(-1)  # (rows, places, groups)
        classes = np.zeros(1, dtype=np.int64)
        for axis, count in zip(self.axes, rows.offset.shape[1:-1], strict=True):
            classes = (classes[:, None] * count + axis.given.classes).ravel()
        offset = rows.offset.flatten(1, -2) if self.axes else rows.offset[:, None]
        return replace(rows, offset=offset.index_add(1, torch.from_numpy(classes), added).reshape(rows.offset.shape))

    def _placed(self, rows: Rows) -> Tensor:
        given = rows.dense(self.given)
        out = given.new_zeros(len(given), self.read, given.shape[2])
        out[:, self.landing.flatten()] = given
        return out

    def _own(self, conv: Conv, rows: Rows) -> Tensor:
        """Return (rows, taps, C_in) of rows that weigh their own channels alone."""
        part = rows.own(self.weight).to(rows.offset.dtype)  # (groups, rows, C_in/own groups, taps)
        part = part if rows.factors is None else part * rows.own(rows.factors)[:, :, None, None]
        part = part.permute(1, 3, 0, 2)
        within = conv.geometry.groups // rows.groups
        if within > 1:
            number = torch.arange(rows.first, rows.last)
            wide = part.new_zeros(*part.shape[:3], within, part.shape[3])
            wide[number - rows.first, :, :, number // (conv.out_channels // conv.geometry.groups)] = part
            part = wide
        return part.flatten(2)

    @cached_property
    def live(self) -> list[tuple[Tensor, Tensor]]:
        """Return places that have the same live taps, and those taps: of a transposed layer's, few are live."""
        patterns, which = torch.unique(self.landing != self.read, dim=0, return_inverse=True)
        every = ((which == number).nonzero().flatten() for number in range(len(patterns)))
        return [(places, pattern.nonzero().flatten()) for places, pattern in zip(every, patterns, strict=True)]

    def _spread(self, own: Tensor) -> Tensor:
        """Return (rows, places read, C_in) of what each tap weighs, (rows, taps, C_in), whatever the place."""
        out = own.new_zeros(len(own), self.read, own.shape[2])
        for places, taps in self.live:
            step = max(1, AT_ONCE // max(1, own[:, taps].numel()))
            for some in places.split(step):
                made = own[:, None, taps].expand(-1, len(some), -1, -1).flatten(1, 2)
                out.index_add_(1, self.landing[some][:, taps].flatten(), made)
        return out

    def _times(self, conv: Conv, numbers: Tensor) -> Tensor:
        out = numbers.new_zeros(len(numbers) * self.read, conv.in_channels)
        groups, outer, _, inner = self.factors.shape
        for places, taps in self.live:
            flat = numbers[:, places].flatten(0, 1)
            pairs = torch.arange(len(flat))  # of a row and a place
            if conv.in_channels * len(taps) > 4 and bool((some := flat.any(1)).logical_not().any()):
                pairs = some.nonzero().flatten()
                flat = flat[pairs]
            begins = pairs // max(1, len(places)) * self.read
            lands = self.landing[places[pairs % max(1, len(places))]]
            apart = flat.reshape(len(flat), groups, outer).transpose(0, 1)
            for few in taps.split(max(1, AT_ONCE // max(1, len(flat) * conv.in_channels))):
                factors = self.factors[:, :, few].to(flat.dtype)
                if outer == inner == 1:
                    made = flat[:, None] * factors.flatten(1).T  # (pairs, taps, C_in)
                else:
                    made = (apart @ factors.flatten(2)).reshape(groups, len(flat), len(few), inner)
                    made = made.movedim(0, 2).flatten(2)
                out.index_add_(0, (begins[:, None] + lands[:, few]).flatten(), made.flatten(0, 1))
        return out.reshape(len(numbers), self.read, conv.in_channels)

    def _copied(self, conv: Selection, numbers: Tensor) -> Tensor:
        """Return the same for a layer that copies: what the outputs that copy an entry weigh."""
        output = (conv.picked != NOTHING).nonzero().flatten()
        taps = math.prod(conv.geometry.kernel_size)
        target = self.landing[:, conv.picked[output] % taps] * conv.in_channels + conv.picked[output] // taps
        out = numbers.new_zeros(len(numbers), (self.read + 1) * conv.in_channels)
        out.index_add_(1, target.flatten(), numbers[:, :, output].flatten(1))
        return out.reshape(len(numbers), self.read + 1, conv.in_channels)[:, :-1]


def pull(way: Tree[LayerWay], rows: Rows) -> Rows:
    """Return what rows that weigh what some layers give weigh of what they read."""
    if isinstance(way, Chain):
        return reduce(lambda at, part: pull(part, at), reversed(way.parts), rows)
    if isinstance(way, Sum):
        nothing = torch.zeros_like(rows.offset)
        first: LayerWay = next(leaves(way.parts[0]))
        pulled = [pull(part, replace(rows, offset=nothing)) for part in way.parts]
        numbers = reduce(torch.add, (one.dense(first.read) for one in pulled))
        offset = reduce(torch.add, (one.offset for one in pulled), rows.offset)
        return replace(rows, numbers=numbers, factors=None, offset=offset)
    return way.pull(rows)


def widest(way: Tree[LayerWay]) -> int:
    """Return the most numbers that a row has on the way."""
    return max(1, *(one.conv.out_channels * one.given for one in leaves(way) if one.conv is not None))


def way_back(
    tree: Expression, size: tuple[int, ...], given: Sequence[Places], axes: Sequence[int]
) -> tuple[Tree[LayerWay], list[Places]]:
    """Return the way back through a tree from some places of what it gives, and the places that it reads.

    Args:
        size: of the tree's input, all axes.
        axes: which of them `given` is about.
    """
    if isinstance(tree, Chain):
        sizes = itertools.accumulate(tree.parts[:-1], lambda at, part: output_size(part, at), initial=size)
        ways, places = [], list(given)
        for part, at in reversed(list(zip(tree.parts, sizes, strict=True))):
            way, places = way_back(part, at, places, axes)
            ways.append(way)
        return Chain(tuple(reversed(ways))), places
    if isinstance(tree, Sum):
        found = [way_back(part, size, given, axes) for part in tree.parts]
        here = [size[axis] for axis in axes]
        every = [
            union(each, n) for each, n in zip(zip(*(places for _, places in found), strict=True), here, strict=True)
        ]
        return Sum(tuple(placed_among(every, way, places, here) for way, places in found)), every
    steps = [_step(tree, axis, size[axis], places) for axis, places in zip(axes, given, strict=True)]
    return LayerWay(tree, steps), [step.read for step in steps]


def placed_among(
    every: Sequence[Places], way: Tree[LayerWay], places: Sequence[Places], size: Sequence[int]
) -> Tree[LayerWay]:
    """Return the way back to all of some places, on each axis, of one that reads a part of them."""
    spots = [Step(own, all_.find(own, n)[:, None], all_) for all_, own, n in zip(every, places, size, strict=True)]
    return Chain((LayerWay(None, spots), way))


def _step(conv: Conv, axis: int, size: int, given: Places) -> Step:
    """Return what a layer's taps read of some places on one axis."""
    # A few outputs at a time look at what these read, and not at the whole axis.
    first, last = (int(end) for end in (given.positions.min(initial=size), given.positions.max(initial=-1)))
    table = tap_table(conv.geometry.axes[axis], size, first, max(first, last + 1))
    own = table[given.positions - first]  # (places, taps)
    live, classes = own != PADDED, np.broadcast_to(given.classes[:, None], own.shape)
    reading = Places(classes[live], own[live])
    read = union([reading], size)
    table = np.full_like(own, PADDED)
    table[live] = read.find(reading, size)
    return Step(given, table, read)


def union(places: Sequence[Places], size: int) -> Places:
    """Return the places that any of these has, in order."""
    key = np.sort(np.concatenate([one.classes * size + one.positions for one in places]))
    key = key[np.diff(key, prepend=-1) > 0]  # np.unique, which imports numpy's masked arrays
    return Places(*np.divmod(key, size))
