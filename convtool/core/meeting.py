"""Which positions meet in the Gram matrix of a block, how they are numbered so that these are near, and its numbers.

G = T* T, or T T* where T has fewer rows than columns. Its numbers are the products of two taps' own, added up axis by
axis where these meet.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.geometry import Axis
from convtool.core.taps import PADDED, AxisSlots, Table, tap_table

Array: TypeAlias = npt.NDArray[Any]

TOGETHER = 1 << 22  # numbers that are added up at a time


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """The positions of a block's shorter side, and the numbers of each two that meet.

    Attributes:
        place: (positions,) the number of each.
        width: by how much the numbers of two that meet differ, at most.
        channels: of each position.
        held: numbers that making the matrix takes, at most.
        make: returns (pairs, channels, channels) the numbers on and below the diagonal, the second position of each,
            and how far behind it the first is.
    """

    place: Array
    width: int
    channels: int
    held: int
    make: Callable[[], tuple[Array, Array, Array]]


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One axis of a matrix: `size` inputs, and which of them each tap of each output reads.

    Attributes:
        table: (outputs, taps)
        axis: that it was made of.
        copies: how many positions of the padded input hold the same input, at most.
    """

    size: int
    table: Table
    axis: Axis
    copies: int = 1

    @classmethod
    def of(cls, axis: Axis, size: int, outputs: int) -> Line:
        """Return a plain axis at one input size."""
        table, copies = tap_table(axis, size, 0, outputs), 1
        if axis.padding_mode != "zeros":
            padded = replace(axis, kernel=1, stride=1, dilation=1)
            copies = int(np.bincount(tap_table(padded, size)[:, 0]).max())
        return cls(size, table, axis, copies)

    @property
    def wraps(self) -> bool:
        """Whether each row is the one before it, moved by the stride, all around."""
        outputs = len(self.table)
        if self.size % outputs or (self.table == PADDED).any():
            return False
        moved = self.table - self.table[:1] - self.size // outputs * np.arange(outputs)[:, None]
        return not (moved % self.size).any()

    def components(self) -> Counter[Line]:
        """Return the parts that have nothing to do with each other, equal ones once and counted; needs scipy."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        outputs = len(self.table)
        row, tap = np.nonzero(self.table != PADDED)
        edges = np.ones(len(row), dtype=np.int8), (row, outputs + self.table[row, tap])
        _, label = connected_components(coo_array(edges, shape=(outputs + self.size,) * 2), directed=False)
        nodes = np.argsort(label, kind="stable")
        found: dict[tuple[int, bytes], Line] = {}
        counts: Counter[Line] = Counter()
        place = np.zeros(self.size, dtype=np.int64)
        for part in np.split(nodes, np.cumsum(np.bincount(label))[:-1]):
            rows, columns = part[part < outputs], part[part >= outputs] - outputs
            place[columns] = np.arange(len(columns))
            table = np.where(self.table[rows] == PADDED, PADDED, place[self.table[rows]])
            line = found.setdefault((len(columns), table.tobytes()), Line(len(columns), table, self.axis, self.copies))
            counts[line] += 1
        return counts


class _Axis(NamedTuple):
    """One axis of the shorter side.

    Attributes:
        positions: how many there are.
        who, how: (rows, width) the numbers of positions that meet, PADDED beyond, and by which tap each does.
        place: (positions,) the number of each.
        reach: by how much the numbers of two that meet differ, at most.
    """

    positions: int
    who: Table
    how: Table
    place: Array
    reach: int

    @classmethod
    def of(cls, line: Line, flipped: bool) -> _Axis:
        """Number the positions as they are, or, where they wrap around, folded: 0, n-1, 1, n-2, ..."""
        table, count = line.table, len(line.table) if flipped else line.size
        who, how = table, np.broadcast_to(np.arange(table.shape[1]), table.shape)
        if flipped:  # for each input the outputs that read it
            readers = AxisSlots(table, how, (table != PADDED).sum(1), np.eye(table.shape[1])).adjoint(line.size)
            who, how = readers.columns, readers.subsets

        def reach(place: Array) -> int:
            highest = np.where(who != PADDED, place[who], 0).max(axis=1, initial=0)
            lowest = np.where(who != PADDED, place[who], count).min(axis=1, initial=count)
            return int((highest - lowest).max(initial=0))

        natural = np.arange(count)
        place = min(natural, np.minimum(2 * natural, 2 * (count - 1 - natural) + 1), key=reach)
        return cls(count, np.where(who == PADDED, PADDED, place[who]), how, place, reach(place))

    def meet(self, products: Tensor, *, lower: bool) -> Tensor:
        """Add up the products of pairs of taps, (taps * taps, ...), where these meet.

        Args:
            lower: leave out what stands above the diagonal.

        Returns:
            (positions, offsets, ...) by the second position, and how far behind it the first is, from -reach (or 0) on.
        """
        first, taps = 0 if lower else self.reach, math.isqrt(len(products))
        offsets = self.reach + first + 1
        out = products.new_zeros(self.positions * offsets, *products.shape[1:])
        pieces = max(1, self.who.size * self.who.shape[1] * max(1, products[0].numel()) // TOGETHER)
        for who, how in zip(np.array_split(self.who, pieces), np.array_split(self.how, pieces), strict=True):
            behind = who[:, :, None] - who[:, None, :] + first
            live = (who[:, :, None] != PADDED) & (who[:, None, :] != PADDED) & (behind >= 0)
            where, which = who[:, None, :] * offsets + behind, how[:, :, None] * taps + how[:, None, :]
            out.index_add_(0, torch.from_numpy(where[live]), products[torch.from_numpy(which[live])])
        return out.reshape(self.positions, offsets, *products.shape[1:])


def meeting_of(weight: Tensor, lines: Sequence[Line], flipped: bool) -> Meeting:
    """Return which positions meet in a block of (C_out, C_in, *taps) numbers.

    Args:
        flipped: whether the outputs are its shorter side.
    """
    axes, channels = [_Axis.of(line, flipped) for line in lines], weight.shape[0 if flipped else 1]
    options = []
    for order in itertools.permutations(range(len(axes))):
        counts = [axes[number].positions for number in order]
        steps = [math.prod(counts[at + 1 :]) for at in range(len(order))]
        width = sum(axes[number].reach * step for number, step in zip(order, steps, strict=True))
        options.append((width, order, steps))
    width, order, steps = min(options)
    place = reduce(np.add.outer, (axes[n].place * steps[order.index(n)] for n in range(len(axes))), np.array(0))
    reaches = [axes[number].reach for number in order]
    filled = place.size * channels**2 * math.prod(reach + max(0, at and reach) + 1 for at, reach in enumerate(reaches))
    products = channels**2 * math.prod(weight.shape[2:]) ** 2

    def make() -> tuple[Array, Array, Array]:
        numbers = weight.permute(0, 1, *(2 + number for number in order))
        return _numbers(numbers, [axes[number] for number in order], steps, flipped)

    return Meeting(place.ravel(), width, channels, max(filled, products), make)


def _numbers(weight: Tensor, axes: Sequence[_Axis], steps: Sequence[int], flipped: bool) -> tuple[Array, Array, Array]:
    taps = weight.shape[2:]
    numbers = weight.movedim((0, 1), (-2, -1)).reshape(-1, *weight.shape[:2])
    left, right = (numbers, numbers.mH) if flipped else (numbers.mH, numbers)
    values = left[:, None] @ right
    values = values.reshape(*taps, *taps, *values.shape[2:])
    for number, axis in enumerate(axes):
        values = values.movedim((2 * number, number + len(taps)), (0, 1)).flatten(0, 1)
        values = axis.meet(values, lower=number == 0).movedim((0, 1), (2 * number, 2 * number + 1))
    # (positions, offsets) of each axis, channels, channels
    grid = np.ogrid[tuple(slice(size) for size in values.shape[:-2])]
    column, behind, live = np.zeros((), np.int64), np.zeros((), np.int64), np.ones((), bool)
    for number, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        position, offset = grid[2 * number], grid[2 * number + 1] - (axis.reach if number else 0)
        column, behind = column + position * step, behind + offset * step
        live = live & (position + offset >= 0) & (position + offset < axis.positions)
    chosen = np.flatnonzero(live & (behind >= 0))
    column, behind = (np.broadcast_to(one, values.shape[:-2]).reshape(-1)[chosen] for one in (column, behind))
    return values.reshape(-1, *values.shape[-2:]).numpy()[chosen], column, behind
