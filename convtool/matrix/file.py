"""A matrix in files, and what can be asked of it; `convtool.matrix.read` opens one.

What was read from a file is checked when it is handed out: an index that is out of range would make the libraries that
it is handed to read memory that isn't theirs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convtool.core.rounding import dtype_name, with_room_for
from convtool.core.rows import BLOCK_ENTRIES, CsrBlock, check_scipy_holds, sparse_csr
from convtool.errors import InputError, UsageError
from convtool.formats.matrices import ARRAYS, Layout
from convtool.formats.source import Array, mapped

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive rows of a matrix, all those that are in one file.

    Attributes:
        path: the file.
        shape: (rows, columns) of the part.
        arrays: the file's arrays by their names in `ARRAYS`, read in parts where the format allows; not checked.
    """

    path: Path
    layout: Layout
    shape: tuple[int, int]
    arrays: Mapping[str, Array]

    @property
    def values(self) -> Array:
        """The stored numbers."""
        return self.arrays[ARRAYS[self.layout][-1]]

    def blocks(self, entries: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows that cover the part in order, each of about `entries` entries (one row at least)."""
        rows = self.shape[0]
        # As many rows as hold that many entries on average, fewer where they turn out to hold more.
        step = max(1, entries * rows // max(1, self.values.numel()))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if self.layout == "dense":
                yield start, stop
            else:
                yield from _split(self._starts(start, stop), start, entries)

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Return rows start:stop in CSR form, checked; columns stand as in the file."""
        if self.layout == "dense":
            block = self.values[start:stop]
            row, column = block.nonzero(as_tuple=True)
            return CsrBlock(torch.bincount(row, minlength=stop - start), column, block[row, column])
        starts = self._starts(start, stop)
        part = slice(int(starts[0]), int(starts[-1]))
        columns = self.arrays[ARRAYS[self.layout][1]][part]
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < self.shape[1]:
            raise self._damaged(f"rows {start}:{stop} name columns that the matrix doesn't have")
        return CsrBlock(starts.diff(), columns, self.values[part])

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop as a dense tensor, of a dense file its own; entries at the same place are summed."""
        if self.layout == "dense":
            return self.values[start:stop]
        counts, columns, values = self.rows(start, stop)
        out = torch.zeros(stop - start, self.shape[1], dtype=values.dtype)
        row = torch.repeat_interleave(torch.arange(stop - start), counts)
        out.index_put_((row, columns.long()), values, accumulate=True)
        return out

    def _starts(self, start: int, stop: int) -> Tensor:
        """Return where the rows begin, and where the last one ends: (stop - start + 1,) int64."""
        nnz = self.values.numel()
        if self.layout == "coo":  # whose entries stand in the order of their rows
            row = self.arrays["row"]
            first = bisect.bisect_left(range(nnz), start, key=lambda entry: int(row[entry : entry + 1]))
            last = bisect.bisect_left(range(nnz), stop, first, key=lambda entry: int(row[entry : entry + 1]))
            starts = first + torch.searchsorted(row[first:last].long(), torch.arange(start, stop + 1))
        else:
            starts = self.arrays["indptr"][start : stop + 1].long()
        ends = (start == 0 and int(starts[0]) != 0) or (stop == self.shape[0] and int(starts[-1]) != nnz)
        if ends or int(starts[0]) < 0 or int(starts[-1]) > nnz or bool((starts.diff() < 0).any()):
            raise self._damaged(f"the starts of rows {start}:{stop} don't ascend from 0 to the number of entries")
        return starts

    def _damaged(self, how: str) -> InputError:
        return InputError(f"{self.path}: the matrix is damaged: {how}")


@dataclass(frozen=True, slots=True, eq=False)
class MatrixFile:
    """A matrix in a file or in several, read as far as it is asked for.

    Attributes:
        path: the file; of a matrix in shards, the index.
        shape: (rows, columns).
        parts: the rows, in order; of a matrix in shards, each shard's.
        bias: (outputs,) the vector stored beside the matrix, or None.
        record: what convtool noted when it wrote the file, or None.
        digits: decimal ones of the numbers, in a text that holds them rounded to so many; else None.
    """

    path: Path
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    bias: Tensor | None
    record: dict[str, Any] | None
    digits: int | None = None

    def __repr__(self) -> str:
        (rows, columns), dtype = self.shape, dtype_name(self.dtype)
        return f"MatrixFile({str(self.path)!r}, {rows} x {columns}, {self.nnz} entries, {dtype}, {self.layout})"

    @property
    def layout(self) -> Layout:
        """csr, coo or dense."""
        return self.parts[0].layout

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.parts[0].values.dtype

    @property
    def nnz(self) -> int:
        """Stored entries; all of them where dense."""
        return sum(part.values.numel() for part in self.parts)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        first = 0
        for part in self.parts:
            yield from ((first + start, first + stop) for start, stop in part.blocks(entries))
            first += part.shape[0]

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Return rows start:stop in CSR form, checked.

        Columns stand as in the file: sorted and unique where it is convtool's.

        Raises:
            UsageError: rows that the matrix doesn't have.
            InputError: the file is damaged.
        """
        found = [part.rows(a, b) for part, a, b in self._within(start, stop)]
        return found[0] if len(found) == 1 else CsrBlock(*map(torch.cat, zip(*found, strict=True)))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop as a dense (stop - start, columns) tensor; entries at the same place are summed."""
        found = [part.dense_rows(a, b) for part, a, b in self._within(start, stop)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def product(self, x: Tensor, *, absolute: bool = False) -> Tensor:
        """Return the matrix times x, (columns, n), in x's dtype and block by block; complex where either is.

        Args:
            absolute: of the magnitudes of the values instead, for bounds on rounding errors.

        Returns:
            (rows, n)
        """
        if x.dim() != 2 or x.shape[0] != self.shape[1]:
            raise UsageError(f"expected x of shape ({self.shape[1]}, n), got {tuple(x.shape)}")
        x = with_room_for(x, self.dtype)
        out = torch.empty(self.shape[0], x.shape[1], dtype=x.dtype)
        for start, stop in self.blocks():
            if self.layout == "dense":
                block = self.dense_rows(start, stop).to(x.dtype)
            else:
                block = self.rows(start, stop).to_torch(x.shape[0], x.dtype)
            out[start:stop] = (block.abs().to(x.dtype) if absolute else block) @ x
        return out

    def to_torch(self) -> Tensor:
        """Return the matrix as torch has it: sparse CSR, sparse COO or dense, as in the file.

        Its arrays stand on the file, mapped into memory, where the format allows: it has to stay as it is meanwhile.

        Shards don't lie beside one another: a matrix in several is put together in memory, as CSR where it is sparse.

        Raises:
            InputError: the file is damaged.
        """
        layout, arrays = self._whole()
        if layout == "dense":
            return arrays["weight"]
        if layout == "coo":
            indices = torch.stack([arrays["row"].long(), arrays["col"].long()])
            return torch.sparse_coo_tensor(indices, arrays["data"], self.shape, check_invariants=False)
        return sparse_csr(arrays["indptr"], arrays["indices"], arrays["data"], self.shape)

    def to_scipy(self) -> scipy.sparse.csr_array[Any] | scipy.sparse.coo_array[Any]:
        """Return the matrix as a scipy csr_array or coo_array, as `to_torch`; a dense one becomes a csr_array.

        Raises:
            UsageError: scipy isn't installed.
            RefusedError: a dtype that scipy doesn't have.
            InputError: the file is damaged.
        """
        check_scipy_holds(self.dtype, f"load {self.path} as torch's")
        import scipy.sparse

        layout, tensors = self._whole()
        arrays = [tensors[name].numpy() for name in ARRAYS[layout]]
        if layout == "dense":
            return scipy.sparse.csr_array(arrays[0])
        if layout == "coo":
            return scipy.sparse.coo_array((arrays[2], (arrays[0], arrays[1])), shape=self.shape)
        return scipy.sparse.csr_array((arrays[2], arrays[1], arrays[0]), shape=self.shape)

    def _whole(self) -> tuple[Layout, Mapping[str, Tensor]]:
        """Return the arrays of all rows, checked."""
        if self.layout == "dense":
            weight = mapped(self.parts[0].values) if len(self.parts) == 1 else self.dense_rows(0, self.shape[0])
            return "dense", {"weight": weight}
        if len(self.parts) == 1:
            for start, stop in self.blocks():
                self.rows(start, stop)
            return self.layout, {name: mapped(array) for name, array in self.parts[0].arrays.items()}
        counts, columns, values = self.rows(0, self.shape[0])
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))  # where each row begins, and where the last one ends
        starts = starts.to(columns.dtype if len(columns) < 2**31 else torch.int64)
        return "csr", {"indptr": starts, "indices": columns.to(starts.dtype), "data": values}

    def _within(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Yield the parts that rows start:stop are in, and which of their rows these are; one part at least."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        if start == stop:
            yield self.parts[0], 0, 0
        first = 0
        for part in self.parts:
            a, b = max(start - first, 0), min(stop - first, part.shape[0])
            if a < b:
                yield part, a, b
            first += part.shape[0]


def _split(starts: Tensor, first: int, entries: int) -> Iterator[tuple[int, int]]:
    """Cut rows first:first + len(starts) - 1 so that none but a single row has more than `entries` entries."""
    begin, rows = 0, len(starts) - 1
    while begin < rows:
        end = int(torch.searchsorted(starts, int(starts[begin]) + entries, right=True)) - 1
        end = min(max(end, begin + 1), rows)
        yield first + begin, first + end
        begin = end
