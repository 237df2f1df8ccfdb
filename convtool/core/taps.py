"""The tap table: which input position each tap of each output position reads, one spatial axis at a time.

    i = o*s - p + t*d          zeros:     i if 0 <= i < I else -1
                               circular:  i mod I
                               replicate: clip(i, 0, I-1)
                               reflect:   mirrored once at 0 and at I-1
                               symmetric: mirrored once with the edge repeated, which no nn.Conv does
    transposed:  the i for which o = i*s - p + t*d, where it is an integer in range, else -1

with I the input size and k, s, p, d kernel, stride, padding before, dilation. The Toeplitz matrix, unfolding,
composition and the question where a fusion is exact are all read off this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from convtool.core.geometry import Axis, Geometry
from convtool.errors import UsageError

Table: TypeAlias = npt.NDArray[np.int64]

MOST_ENTRIES = 1 << 28  # 2 GiB of indices: far beyond any layer on any input

PADDED = -1  # a tap that reads a padded zero, or that a transposed convolution doesn't have at this position


def tap_table(axis: Axis, size: int, start: int = 0, stop: int | None = None) -> Table:
    """Return rows start:stop (all by default) of the axis's tap table for `size` input positions, (rows, kernel)."""
    stop = axis.output_size(size) if stop is None else stop
    if (stop - start) * axis.kernel > MOST_ENTRIES:
        raise UsageError(f"an axis of {stop - start} outputs with {axis.kernel} taps each is too long for a tap table")
    output = np.arange(start, stop, dtype=np.int64)[:, None]  # (rows, 1)
    offset = np.arange(axis.kernel, dtype=np.int64) * axis.dilation - axis.before  # (kernel,)
    if axis.transposed:
        source, rest = np.divmod(output - offset, axis.stride)  # both (rows, kernel)
        return np.where((rest == 0) & (source >= 0) & (source < size), source, PADDED)
    index: Table = output * axis.stride + offset  # (rows, kernel)
    if axis.padding_mode == "circular":
        return index % size
    if axis.padding_mode == "replicate":
        return index.clip(0, size - 1)
    if axis.padding_mode == "symmetric":
        index = np.where(index < 0, -1 - index, index)
        return np.where(index < size, index, 2 * size - 1 - index)
    if axis.padding_mode == "reflect":
        index = np.abs(index)
        return np.where(index < size, index, 2 * (size - 1) - index)
    return np.where((index >= 0) & (index < size), index, PADDED)


def taps_read(geometry: Geometry, size: tuple[int, ...]) -> tuple[int, int]:
    """Count of a kernel's taps those that some output reads the input with at this size, and of how many."""
    read = [int((tap_table(axis, n) != PADDED).any(axis=0).sum()) for axis, n in zip(geometry.axes, size, strict=True)]
    return math.prod(read), math.prod(geometry.kernel_size)


def compose_tables(first: Table, second: Table) -> Table:
    """Return what `second` reads through `first`: [o, t2, t1] = first[second[o, t2], t1]; a padded tap stays padded.

    Args:
        first: (O1, columns) table of the first layer, or of several composed.
        second: (O2, k2) table of the second, with entries below O1.

    Returns:
        (O2, k2, columns)
    """
    through = first[second]  # (O2, k2, columns); -1 picks the last row, which the next line overwrites
    through[second == PADDED] = PADDED
    return through


@dataclass(frozen=True, slots=True, eq=False)
class AxisSlots:
    """One axis of the matrix: for each row its columns, ascending and unique, and which taps are summed there.

    Attributes:
        columns: (rows, width) column of each slot; PADDED beyond the row's count.
        subsets: (rows, width) the set of taps that lands there, as a row of `members`.
        counts: (rows,) slots in use.
        members: (subsets, kernel) 0/1; the identity where no two taps of a row share a column.
    """

    columns: Table
    subsets: Table
    counts: Table
    members: npt.NDArray[np.float64]

    @property
    def merges(self) -> bool:
        """Whether some column gets several taps: reflect, replicate, or circular over a kernel as wide as the input."""
        subsets, kernel = self.members.shape
        return bool(subsets > kernel)

    def adjoint(self, rows: int) -> AxisSlots:
        """Read the axis the other way: for each of `rows` input positions the output positions that use it."""
        output, slot = np.nonzero(self.columns != PADDED)  # ascending in output
        column = self.columns[output, slot]
        order = np.argsort(column, kind="stable")  # by input position, output ascending within it
        column, output, subset = column[order], output[order], self.subsets[output, slot][order]
        counts = np.bincount(column, minlength=rows)  # (rows,)
        place = np.arange(len(column)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = np.full((rows, int(counts.max(initial=0))), PADDED, dtype=np.int64)
        subsets = np.zeros_like(columns)
        columns[column, place] = output
        subsets[column, place] = subset
        return AxisSlots(columns, subsets, counts, self.members)


def axis_slots(table: Table) -> AxisSlots:
    """Read the slots of one axis off its tap table, taps that share a column merged."""
    kernel = table.shape[1]
    last = np.iinfo(np.int64).max
    keyed = np.where(table == PADDED, last, table)  # padded taps sort to the end
    taps = np.argsort(keyed, axis=1, kind="stable")  # (rows, kernel)
    columns = np.take_along_axis(keyed, taps, axis=1)
    live = columns != last
    columns = np.where(live, columns, PADDED)
    counts = live.sum(axis=1)
    members = np.eye(kernel)
    repeated = (columns[:, 1:] == columns[:, :-1]) & live[:, 1:]
    if not repeated.any():
        return AxisSlots(columns, taps, counts, members)
    # Rows that meet a border: few, however long the axis, so a loop over them costs nothing.
    found: dict[bytes, int] = {}
    extra: list[npt.NDArray[np.float64]] = []
    for row in np.flatnonzero(repeated.any(axis=1)):
        unique, where = np.unique(columns[row, : counts[row]], return_inverse=True)
        columns[row] = PADDED
        columns[row, : len(unique)] = unique
        merged = np.zeros((len(unique), kernel))
        merged[where, taps[row, : counts[row]]] = 1.0
        counts[row] = len(unique)
        for slot, member in enumerate(merged):
            if member.sum() == 1:
                taps[row, slot] = member.argmax()
                continue
            if (key := member.tobytes()) not in found:
                found[key] = kernel + len(extra)
                extra.append(member)
            taps[row, slot] = found[key]
    return AxisSlots(columns, taps, counts, np.vstack([members, *extra]))
