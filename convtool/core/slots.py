"""One axis of a matrix, read off its tap table: which columns each row has, and which taps are summed there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convtool.core.taps import PADDED, Table


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
