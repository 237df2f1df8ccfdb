"""The way back through layers: what an output weighs, carried from what each layer gives to what it reads.

Places of an axis are positions of several classes, each class by itself: outputs that are looked at apart, though they
read the same inputs. So one pass carries what outputs of all classes weigh.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, output_size
from convtool.core.moves import NOTHING, Selection
from convtool.core.taps import PADDED, Table, tap_table
from convtool.core.tree import Chain, Sum


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Positions of one axis, of several classes; ascending, those of each class together.

    Attributes:
        classes: (places,) the class of each.
        positions: (places,)
    """

    classes: Table
    positions: Table

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


class Way(ABC):
    """How what an output weighs is carried back from what some layers give to what they read.

    Attributes:
        sizes: of each axis, the places of what they give.
    """

    sizes: tuple[int, ...]

    @abstractmethod
    def pull(self, weighs: Tensor, layers: list[Conv]) -> Tensor:
        """Return (n, C_in, *places read) of (n, C_out, *sizes).

        Args:
            layers: those of the whole tree that are still ahead; each takes its own off the end.
        """

    @abstractmethod
    def of_layers(self) -> Iterator[LayerWay]:
        """Yield the ways through the layers, the last one first."""

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """Yield how the places on the way are read of each other; of a way along one axis."""


class LayerWay(Way):
    """Through one layer, whose taps at some places read other places, on each axis."""

    def __init__(self, conv: Conv, axes: list[Step]) -> None:
        self.conv, self.axes = conv, axes
        self.sizes = tuple(len(axis.table) for axis in axes)
        self.reads = tuple(len(axis.read.positions) for axis in axes)

    def of_layers(self) -> Iterator[LayerWay]:
        yield self

    def steps(self) -> Iterator[Step]:
        yield from self.axes

    def pull(self, weighs: Tensor, layers: list[Conv]) -> Tensor:
        conv, flat = layers.pop(), weighs.flatten(2)
        out = weighs.new_zeros(len(weighs), conv.in_channels, math.prod(self.reads))
        for tap, given, read in self._taps():
            out.index_add_(2, read, _times(conv, tap, flat if given is None else flat[:, :, given]))
        return out.reshape(len(weighs), conv.in_channels, *self.reads)

    def _taps(self) -> Iterator[tuple[tuple[int, ...], Tensor | None, Tensor]]:
        """Yield each tap with the places that it is live at, flat (None for all), and what it reads there."""
        for tap in itertools.product(*(range(axis.table.shape[1]) for axis in self.axes)):
            given, read = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
            for axis, count, t in zip(self.axes, self.reads, tap, strict=True):
                live = np.flatnonzero(axis.table[:, t] != PADDED)
                given = (given[:, None] * len(axis.table) + live).ravel()
                read = (read[:, None] * count + axis.table[live, t]).ravel()
            if len(given):
                every = len(given) == math.prod(self.sizes)
                yield tap, None if every else torch.from_numpy(given), torch.from_numpy(read)


class _ChainWay(Way):
    """Through parts one after the other, the last one first."""

    def __init__(self, parts: list[Way]) -> None:
        self.parts, self.sizes = parts, parts[0].sizes

    def of_layers(self) -> Iterator[LayerWay]:
        for part in self.parts:
            yield from part.of_layers()

    def steps(self) -> Iterator[Step]:
        for part in self.parts:
            yield from part.steps()

    def pull(self, weighs: Tensor, layers: list[Conv]) -> Tensor:
        return reduce(lambda at, part: part.pull(at, layers), self.parts, weighs)


class _SumWay(Way):
    """Through branches side by side, the last one first; what these read is a part of what all of them do.

    Attributes:
        parts: with where each branch's places are among those of all, on each axis.
    """

    def __init__(self, parts: list[tuple[Way, list[Step]]]) -> None:
        self.parts, self.sizes = parts, parts[0][0].sizes
        self.reads = tuple(len(axis.read.positions) for axis in parts[0][1])

    def of_layers(self) -> Iterator[LayerWay]:
        for part, _ in self.parts:
            yield from part.of_layers()

    def steps(self) -> Iterator[Step]:
        for part, axes in self.parts:
            yield from part.steps()
            yield from axes

    def pull(self, weighs: Tensor, layers: list[Conv]) -> Tensor:
        total: Tensor | None = None
        for part, axes in self.parts:
            pulled, places = part.pull(weighs, layers).flatten(2), torch.zeros(1, dtype=torch.int64)
            for axis, count in zip(axes, self.reads, strict=True):
                places = (places[:, None] * count + torch.from_numpy(axis.table[:, 0])).flatten()
            total = weighs.new_zeros(*pulled.shape[:2], math.prod(self.reads)) if total is None else total
            total.index_add_(2, places, pulled)
        assert total is not None
        return total.reshape(*total.shape[:2], *self.reads)


def _times(conv: Conv, tap: tuple[int, ...], weighs: Tensor) -> Tensor:
    """Return (n, C_in, places) of (n, C_out, places), for one tap of a layer."""
    if isinstance(conv, Selection):
        return _copied(conv, tap, weighs)
    groups = max(1, conv.geometry.groups)
    weight = conv.weight.movedim((0, 1), (-2, -1))[tap]  # (C_out, C_in/groups)
    if weight.shape[1] == 1 and conv.out_channels == groups:
        return weighs * weight
    parts = weight.reshape(groups, -1, weight.shape[1]).mT  # (groups, C_in/groups, C_out/groups)
    return (parts @ weighs.reshape(len(weighs), groups, -1, weighs.shape[2])).flatten(1, 2)


def _copied(conv: Selection, tap: tuple[int, ...], weighs: Tensor) -> Tensor:
    """Return the same of a layer that copies: what the outputs that copy this tap of some input weigh."""
    kernel = conv.geometry.kernel_size
    number = int(np.ravel_multi_index(tap, kernel)) if kernel else 0
    output = ((conv.picked != NOTHING) & (conv.picked % math.prod(kernel) == number)).nonzero().flatten()
    source = conv.picked[output] // math.prod(kernel)
    out = weighs.new_zeros(len(weighs), conv.in_channels, weighs.shape[2])
    return out.index_add_(1, source, weighs[:, output])


def way_back(
    tree: Expression, size: tuple[int, ...], given: Sequence[Places], axes: Sequence[int]
) -> tuple[Way, list[Places]]:
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
        return _ChainWay(ways), places
    if isinstance(tree, Sum):
        found = [way_back(part, size, given, axes) for part in reversed(tree.parts)]
        every = [_all_of([places[number] for _, places in found], size[axis]) for number, axis in enumerate(axes)]
        spots = [
            [
                Step(own, union.find(own, size[axis])[:, None], union)
                for own, union, axis in zip(places, every, axes, strict=True)
            ]
            for _, places in found
        ]
        return _SumWay([(way, spot) for (way, _), spot in zip(found, spots, strict=True)]), every
    steps = [_step(tree, axis, size[axis], places) for axis, places in zip(axes, given, strict=True)]
    return LayerWay(tree, steps), [step.read for step in steps]


def _step(conv: Conv, axis: int, size: int, given: Places) -> Step:
    """Return what a layer's taps read of some places on one axis."""
    # A few outputs at a time look at what these read, and not at the whole axis.
    first, last = (int(end) for end in (given.positions.min(initial=size), given.positions.max(initial=-1)))
    table = tap_table(conv.geometry.axes[axis], size, first, max(first, last + 1))
    own = table[given.positions - first]  # (places, taps)
    live, classes = own != PADDED, np.broadcast_to(given.classes[:, None], own.shape)
    reading = Places(classes[live], own[live])
    read = _all_of([reading], size)
    table = np.full_like(own, PADDED)
    table[live] = read.find(reading, size)
    return Step(given, table, read)


def _all_of(places: Sequence[Places], size: int) -> Places:
    """Return the places that any of these has, in order."""
    key = np.unique(np.concatenate([one.classes * size + one.positions for one in places]))
    return Places(*np.divmod(key, size))
