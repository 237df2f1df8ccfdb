"""A matrix in a file, and what can be asked of it; `convtool.matrix.read` opens one.

What was read from a file is checked when it is handed out: an index that is out of range would make the libraries that
it is handed to read memory that isn't theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convtool.core.rows import BLOCK_ENTRIES, CsrBlock
from convtool.errors import InputError, RefusedError, UsageError
from convtool.matrix.contents import Layout
from convtool.matrix.reading import ARRAYS

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True, slots=True, eq=False)
class MatrixFile:
    """A matrix in a file, read as far as it is asked for.

    Attributes:
        path: the file.
        layout: csr, coo or dense.
        shape: (rows, columns).
        arrays: the file's arrays by their names in `ARRAYS`, mapped into memory where the format allows. Not checked:
            `rows` and what is built on it hand out what is.
        bias: (outputs,) the vector stored beside the matrix, or None.
        record: what convtool noted when it wrote the file, or None.
    """

    path: Path
    layout: Layout
    shape: tuple[int, int]
    arrays: Mapping[str, Tensor]
    bias: Tensor | None
    record: dict[str, Any] | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.arrays[ARRAYS[self.layout][-1]].dtype

    @property
    def nnz(self) -> int:
        """Stored entries; all of them where dense."""
        return self.arrays[ARRAYS[self.layout][-1]].numel()

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        rows, columns = self.shape
        if self.layout == "csr":
            # As many rows as hold that many entries on average, fewer where they turn out to hold more.
            step = max(1, entries * rows // max(1, self.nnz))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield from _split(self._starts(start, stop), start, entries)
            return
        width = columns if self.layout == "dense" else max(1, self.nnz // max(1, rows))
        step = max(1, entries // max(1, width))
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, checked. Columns stand as in the file: sorted and unique where it is convtool's.

        Raises:
            UsageError: rows that the matrix doesn't have.
            InputError: the file is damaged.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        if self.layout == "dense":
            return self._dense_rows(start, stop)
        if self.layout == "coo":
            counts, part = self._coo_rows(start, stop)
            columns = self.arrays["col"][part]
        else:
            starts = self._starts(start, stop)
            counts, part = starts[1:] - starts[:-1], slice(int(starts[0]), int(starts[-1]))
            columns = self.arrays["indices"][part]
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < self.shape[1]:
            raise self._damaged(f"rows {start}:{stop} name columns that the matrix doesn't have")
        return CsrBlock(counts, columns, self.arrays["data"][part])

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense (stop - start, columns) tensor; entries at the same place are summed."""
        if self.layout == "dense":
            block = self.arrays["weight"][start:stop]
            return block.clone()
        counts, columns, values = self.rows(start, stop)
        out = torch.zeros(stop - start, self.shape[1], dtype=self.dtype)
        row = torch.repeat_interleave(torch.arange(stop - start), counts)
        out.index_put_((row, columns.long()), values, accumulate=True)
        return out

    def product(self, x: Tensor, *, absolute: bool = False) -> Tensor:
        """The matrix times x, (columns, n), in x's dtype and block by block.

        Args:
            absolute: of the magnitudes of the values instead, for bounds on rounding errors.

        Returns:
            (rows, n)
        """
        if x.dim() != 2 or x.shape[0] != self.shape[1]:
            raise UsageError(f"expected x of shape ({self.shape[1]}, n), got {tuple(x.shape)}")
        out = torch.empty(self.shape[0], x.shape[1], dtype=x.dtype)
        for start, stop in self.blocks():
            if self.layout == "dense":
                block = self.arrays["weight"][start:stop].to(x.dtype)
                out[start:stop] = (block.abs() if absolute else block) @ x
                continue
            counts, columns, values = self.rows(start, stop)
            starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
            torch.cumsum(counts, 0, out=starts[1:])
            values = values.to(x.dtype)
            out[start:stop] = _csr_times(starts, columns, values.abs() if absolute else values, x)
        return out

    def to_torch(self) -> Tensor:
        """The matrix as torch has it: sparse CSR, sparse COO or dense, as in the file, over its mapped arrays.

        Raises:
            InputError: the file is damaged.
        """
        if self.layout == "dense":
            return self.arrays["weight"]
        self._check()
        if self.layout == "coo":
            indices = torch.stack([self.arrays["row"].long(), self.arrays["col"].long()])
            return torch.sparse_coo_tensor(indices, self.arrays["data"], self.shape, check_invariants=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.arrays["indptr"], self.arrays["indices"], self.arrays["data"], self.shape, check_invariants=False
            )

    def to_scipy(self) -> scipy.sparse.csr_array[Any] | scipy.sparse.coo_array[Any]:
        """The matrix as a scipy csr_array or coo_array over its mapped arrays; a dense one becomes a csr_array.

        Raises:
            UsageError: scipy isn't installed.
            RefusedError: a dtype that scipy doesn't have.
            InputError: the file is damaged.
        """
        try:
            import scipy.sparse
        except ImportError:
            raise UsageError("a scipy matrix needs scipy: pip install 'convtool[scipy]'") from None
        if self.dtype.is_floating_point and self.dtype.itemsize < 4:
            name = str(self.dtype).removeprefix("torch.")
            raise RefusedError(f"{self.path}: scipy has no sparse matrices of {name}; load it as torch's")
        if self.layout == "dense":
            return scipy.sparse.csr_array(self.arrays["weight"].numpy())
        self._check()
        arrays = [self.arrays[name].numpy() for name in ARRAYS[self.layout]]
        if self.layout == "coo":
            return scipy.sparse.coo_array((arrays[2], (arrays[0], arrays[1])), shape=self.shape)
        return scipy.sparse.csr_array((arrays[2], arrays[1], arrays[0]), shape=self.shape)

    def _check(self) -> None:
        for start, stop in self.blocks():
            self.rows(start, stop)

    def _starts(self, start: int, stop: int) -> Tensor:
        """(stop - start + 1,) int64: where the rows begin, and where the last one ends."""
        starts = self.arrays["indptr"][start : stop + 1].long()
        ends = (start == 0 and int(starts[0]) != 0) or (stop == self.shape[0] and int(starts[-1]) != self.nnz)
        if ends or int(starts[0]) < 0 or int(starts[-1]) > self.nnz or bool((starts[1:] < starts[:-1]).any()):
            raise self._damaged(f"the starts of rows {start}:{stop} don't ascend from 0 to the number of entries")
        return starts

    def _coo_rows(self, start: int, stop: int) -> tuple[Tensor, slice]:
        """The entries in each of the rows, and where they stand."""
        row = self.arrays["row"]
        bounds = torch.tensor([start, stop], dtype=row.dtype)
        first, last = torch.searchsorted(row, bounds).tolist()
        part = row[first:last].long() - start
        if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < stop - start:
            raise self._damaged("the entries don't stand in the order of their rows")
        return torch.bincount(part, minlength=stop - start), slice(first, last)

    def _dense_rows(self, start: int, stop: int) -> CsrBlock:
        block = self.arrays["weight"][start:stop]
        row, column = block.nonzero(as_tuple=True)
        return CsrBlock(torch.bincount(row, minlength=stop - start), column, block[row, column])

    def _damaged(self, how: str) -> InputError:
        return InputError(f"{self.path}: the matrix is damaged: {how}")


@dataclass(frozen=True, slots=True, eq=False)
class ShardedMatrix(MatrixFile):
    """A matrix whose rows are in several files; see `convtool.matrix.shards`."""

    shards: tuple[MatrixFile, ...] = ()
    ends: tuple[int, ...] = ()  # behind the last row of each shard

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.shards[0].dtype

    @property
    def nnz(self) -> int:
        """Stored entries of all shards."""
        return sum(shard.nnz for shard in self.shards)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order; none reaches over the end of a shard."""
        for shard, end in zip(self.shards, self.ends, strict=True):
            first = end - shard.shape[0]
            yield from ((first + start, first + stop) for start, stop in shard.blocks(entries))

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, checked."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        parts = [shard.rows(a, b) for shard, a, b in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else CsrBlock(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense tensor."""
        return torch.cat([shard.dense_rows(a, b) for shard, a, b in self._parts(start, stop)])

    def product(self, x: Tensor, *, absolute: bool = False) -> Tensor:
        """The matrix times x, shard by shard."""
        return torch.cat([shard.product(x, absolute=absolute) for shard in self.shards])

    def to_torch(self) -> Tensor:
        """The matrix in memory: the shards don't lie beside one another, so nothing is mapped."""
        return self._whole().to_torch()

    def to_scipy(self) -> scipy.sparse.csr_array[Any] | scipy.sparse.coo_array[Any]:
        """The matrix in memory, as scipy has it."""
        return self._whole().to_scipy()

    def _whole(self) -> MatrixFile:
        if self.layout == "dense":
            arrays = {"weight": self.dense_rows(0, self.shape[0])}
        else:
            counts, columns, values = self.rows(0, self.shape[0])
            starts = torch.zeros(len(counts) + 1, dtype=columns.dtype if len(columns) < 2**31 else torch.int64)
            torch.cumsum(counts, 0, out=starts[1:])
            arrays = {"indptr": starts, "indices": columns.to(starts.dtype), "data": values}
        layout: Layout = "dense" if self.layout == "dense" else "csr"
        return MatrixFile(self.path, layout, self.shape, arrays, self.bias, self.record)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[MatrixFile, int, int]]:
        """The shards that rows start:stop are in, and which of their rows these are; one at least."""
        for shard, end in zip(self.shards, self.ends, strict=True):
            first = end - shard.shape[0]
            if max(start, first) < min(stop, end):
                yield shard, max(start, first) - first, min(stop, end) - first
        if start == stop:
            yield self.shards[0], 0, 0


def _split(starts: Tensor, first: int, entries: int) -> Iterator[tuple[int, int]]:
    """Rows first:first + len(starts) - 1 cut so that none but a single row has more than `entries` entries."""
    begin, rows = 0, len(starts) - 1
    while begin < rows:
        end = int(torch.searchsorted(starts, int(starts[begin]) + entries, right=True)) - 1
        end = min(max(end, begin + 1), rows)
        yield first + begin, first + end
        begin = end


def _csr_times(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        block = torch.sparse_csr_tensor(
            starts, columns.long(), values, (len(starts) - 1, x.shape[0]), check_invariants=False
        )
        return block @ x
