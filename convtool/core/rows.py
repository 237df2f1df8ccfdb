"""Matrices whose rows are made on demand, any range of them by itself: what is the same for all of them."""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.rounding import dtype_name
from convtool.errors import RefusedError, UsageError, enough_memory

if TYPE_CHECKING:
    import scipy.sparse

Array: TypeAlias = npt.NDArray[Any]

INT32_MAX = 2**31 - 1

# Values are moved as integers of their size, since numpy has no bfloat16 and torch's own copies start threads.
WORDS: dict[int, npt.DTypeLike] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
_TORCH_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

# Entries in a block of rows: 8 MiB of values at most, long enough that the per-block overhead doesn't show.
BLOCK_ENTRIES = 1 << 20

# Entries for each thread at least: below, starting threads takes longer than they save.
PART_ENTRIES = 1 << 19


class CsrBlock(NamedTuple):
    """Consecutive rows of a matrix in CSR form."""

    counts: Tensor  # (rows,) entries in each row
    indices: Tensor  # (entries,) columns, ascending within a row
    values: Tensor  # (entries,)

    def to_torch(self, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the rows as a torch sparse CSR tensor of that many columns, with 64-bit indices."""
        starts = torch.zeros(len(self.counts) + 1, dtype=torch.int64)
        torch.cumsum(self.counts, 0, out=starts[1:])
        return sparse_csr(starts, self.indices.long(), self.values.to(dtype), (len(self.counts), columns))


class Stretch(NamedTuple):
    """Consecutive rows that are best made in one go, and what else they are equal to.

    Stretches of one matrix with equal `same_indices` have equal columns, entry by entry; with equal `same_values`,
    equal values. Whoever writes a matrix can so reuse what it made.
    """

    start: int
    stop: int
    same_indices: Hashable
    same_values: Hashable


def words(tensor: Tensor) -> Array:
    """Return the tensor's numbers as `WORDS` has them."""
    made: Array = tensor.resolve_conj().contiguous().view(_TORCH_WORDS[tensor.dtype.itemsize]).numpy()
    return made


def sparse_csr(starts: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a torch sparse CSR tensor over these arrays, which aren't checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, indices, values, shape, check_invariants=False)


def index_dtype(largest: int) -> torch.dtype:
    """Return int32 wherever `largest`, of the numbers of entries, rows and columns, fits, and int64 elsewhere."""
    return torch.int32 if largest <= INT32_MAX else torch.int64


def has_scipy() -> bool:
    """Return whether scipy is installed."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return False
    return True


def check_scipy(what: str) -> None:
    """Raise UsageError, which begins with what needs scipy, where that isn't installed."""
    if not has_scipy():
        raise UsageError(f"{what} scipy: pip install 'convtool[scipy]'")


def check_scipy_holds(dtype: torch.dtype, advice: str) -> None:
    """Raise UsageError where scipy isn't installed, and RefusedError where it has no sparse matrices of that dtype."""
    check_scipy("a scipy matrix needs")
    if dtype.is_floating_point and dtype.itemsize < 4:
        raise RefusedError(f"scipy has no sparse matrices of {dtype_name(dtype)}; {advice}")


class RowMatrix(ABC):
    """A matrix whose size is known at once, and whose rows are made on demand.

    Attributes:
        shape: (rows, columns).
        nnz: number of stored entries.
        dtype: of the values.
    """

    shape: tuple[int, int]
    nnz: int
    dtype: torch.dtype
    _longest: int = 1  # the most entries of a row
    _period: int  # rows after which the matrix repeats itself, but for shifts: shares of threads are cut there
    _last_apart: bool = False  # the last row is like none of the others: the bias under a transposed matrix

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        # Several periods, which have as many entries each, or about equal parts of one.
        together = step = max(1, entries * self.shape[0] // max(1, self.nnz)) // self._period * self._period
        if not step:
            parts = math.ceil(self._period / max(1, entries // self._longest))
            together, step = self._period, math.ceil(self._period / parts)
        rows = self.shape[0] - self._last_apart
        for start in range(0, rows, together):
            stop = min(start + together, rows)
            yield from ((first, min(first + step, stop)) for first in range(start, stop, step))
        if self._last_apart:
            yield rows, rows + 1

    @abstractmethod
    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Cut rows start:stop into stretches."""

    @abstractmethod
    def _counts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the (stop - start,) numbers of entries in each row."""

    @abstractmethod
    def _before(self, row: int) -> int:
        """Return the number of entries in all rows before this one."""

    @abstractmethod
    def _fill_indices(self, start: int, stop: int, out: Array) -> None:
        """Write the columns of rows start:stop."""

    @abstractmethod
    def _fill_values(self, start: int, stop: int, out: Array) -> None:
        """Write the values of rows start:stop, as words."""

    @property
    def index_dtype(self) -> torch.dtype:
        """int32 wherever it reaches, int64 only where it doesn't."""
        return index_dtype(max(self.nnz, *self.shape))

    @property
    def _index(self) -> npt.DTypeLike:
        return dtype_name(self.index_dtype)

    def indptr(self) -> Tensor:
        """Return the (rows + 1,) starts of the rows among all entries."""
        pointer = np.zeros(self.shape[0] + 1, dtype=self._index)
        np.cumsum(self.row_counts(0, self.shape[0]).numpy(), out=pointer[1:])
        return torch.from_numpy(pointer)

    def entries(self, start: int, stop: int) -> int:
        """Return the number of entries in rows start:stop, without making them."""
        self._check_rows(start, stop)
        return self._before(stop) - self._before(start)

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Cut rows start:stop into stretches; how long they are is the matrix's own choice."""
        self._check_rows(start, stop)
        return self._stretches(start, stop)

    def row_counts(self, start: int, stop: int) -> Tensor:
        """Return the (stop - start,) int64 numbers of entries in each of rows start:stop."""
        self._check_rows(start, stop)
        return torch.from_numpy(self._counts(start, stop))

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Return rows start:stop in CSR form, the columns of each row ascending and unique."""
        with enough_memory(f"{self!r}: rows {start}:{stop}"):
            return CsrBlock(self.row_counts(start, stop), self.indices(start, stop), self.values(start, stop))

    def indices(self, start: int, stop: int) -> Tensor:
        """Return the (entries,) columns of rows start:stop, those of each row ascending and unique."""
        out = np.empty(self.entries(start, stop), dtype=self._index)
        self._in_parts(start, stop, lambda first, last, part: self._fill_indices(first, last, out[part]))
        return torch.from_numpy(out)

    def values(self, start: int, stop: int) -> Tensor:
        """Return the (entries,) values of rows start:stop, in the order of `indices`."""
        out = np.empty(self.entries(start, stop), dtype=WORDS[self.dtype.itemsize])
        self._in_parts(start, stop, lambda first, last, part: self._fill_values(first, last, out[part]))
        return torch.from_numpy(out).view(self.dtype)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop as a dense (stop - start, columns) tensor."""
        self._check_rows(start, stop)
        out = np.zeros((stop - start, self.shape[1]), dtype=WORDS[self.dtype.itemsize])

        def fill(first: int, last: int, part: slice) -> None:
            columns = np.empty(part.stop - part.start, dtype=self._index)
            values = np.empty(len(columns), dtype=out.dtype)
            self._fill_indices(first, last, columns)
            self._fill_values(first, last, values)
            begins = np.arange(first - start, last - start) * self.shape[1]
            place = np.repeat(begins, self.row_counts(first, last).numpy())
            place += columns  # in place: more memory to get would take longer than adding
            out.reshape(-1)[place] = values

        self._in_parts(start, stop, fill, out.size // 8)  # most of the time goes into getting the memory
        return torch.from_numpy(out).view(self.dtype)

    def _in_parts(self, start: int, stop: int, fill: Callable[[int, int, slice], None], work: int = 0) -> None:
        """Call `fill` with ranges of rows that make up start:stop, and where their entries stand; in several threads.

        How many depends on the number of entries, or of as much `work` as so many entries are.
        The threads are this function's own: torch's would start and meet again for each tile, which takes longer than
        a tile does.
        """
        count = self.entries(start, stop)
        threads = min(torch.get_num_threads(), max(count, work) // PART_ENTRIES, stop - start)
        if threads <= 1:
            fill(start, stop, slice(0, count))
            return
        cuts = [start + (stop - start) * number // threads for number in range(threads + 1)]
        if cuts[1] - cuts[0] > self._period:
            cuts[1:-1] = [cut - cut % self._period for cut in cuts[1:-1]]
        places = [self.entries(start, cut) for cut in cuts]
        parts = (slice(*pair) for pair in itertools.pairwise(places))
        with ThreadPoolExecutor(threads) as pool:
            begun = [pool.submit(fill, *cut, part) for cut, part in zip(itertools.pairwise(cuts), parts, strict=True)]
            for part_done in begun:
                part_done.result()

    def columns(self, start: int, stop: int, rows: tuple[int, int] | None = None) -> ColumnsOf:
        """Return columns start:stop as a matrix of their own.

        Args:
            rows: the range that will be asked about, where that isn't all.
        """
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= self.shape[1]:
            raise UsageError(f"columns: expected A:B with 0 <= A < B <= {self.shape[1]}, got {start}:{stop}")
        with enough_memory(f"{self!r}: columns {start}:{stop}"):
            return _columns_of(self, start, stop, rows or (0, self.shape[0]))

    def to_sparse_csr(self) -> Tensor:
        """Return the whole matrix as a torch sparse CSR tensor."""
        _, indices, values = self.rows(0, self.shape[0])
        return sparse_csr(self.indptr(), indices, values, self.shape)

    def to_sparse_coo(self) -> Tensor:
        """Return the whole matrix as a torch sparse COO tensor, coalesced."""
        counts, indices, values = self.rows(0, self.shape[0])
        row = torch.repeat_interleave(torch.arange(self.shape[0]), counts)
        return torch.sparse_coo_tensor(
            torch.stack([row, indices.long()]), values, self.shape, check_invariants=False, is_coalesced=True
        )

    def to_dense(self) -> Tensor:
        """Return the whole matrix as a dense tensor; InputError where memory doesn't suffice."""
        with enough_memory(f"{self!r}: to_dense"):
            return self.dense_rows(0, self.shape[0])

    def __matmul__(self, x: Any) -> Any:
        """Return the matrix times x, (columns,) or (columns, n), made block by block; a tensor, or an array for one."""
        given = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        if not isinstance(given, Tensor):
            return NotImplemented
        if given.dim() not in (1, 2) or len(given) != self.shape[1]:
            raise UsageError(f"expected x of shape ({self.shape[1]},) or ({self.shape[1]}, n), got {tuple(x.shape)}")
        dtype = torch.promote_types(self.dtype, given.dtype)
        out = torch.empty(self.shape[0], *given.shape[1:], dtype=dtype)
        for start, stop in self.blocks():
            out[start:stop] = self.rows(start, stop).to_torch(self.shape[1], dtype) @ given.to(dtype)
        return out.numpy() if isinstance(x, np.ndarray) else out

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"{type(self).__name__}({rows} x {columns}, {self.nnz} entries, {dtype_name(self.dtype)})"

    def to_scipy(self) -> scipy.sparse.csr_array[Any]:
        """Return the whole matrix as a scipy.sparse.csr_array in canonical form.

        Raises:
            UsageError: scipy isn't installed.
            RefusedError: a dtype that scipy doesn't have.
        """
        check_scipy_holds(self.dtype, "pass dtype=torch.float32, or take to_sparse_csr()")
        import scipy.sparse

        _, indices, values = self.rows(0, self.shape[0])
        matrix = scipy.sparse.csr_array((values.numpy(), indices.numpy(), self.indptr().numpy()), shape=self.shape)
        matrix.has_canonical_format = True  # sorted and unique by construction: spares scipy the check
        return matrix

    def _check_rows(self, start: int, stop: int) -> None:
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")


class ColumnsOf(RowMatrix):
    """Some columns of a matrix; how many entries each row has there is counted at once, of the rows that are wanted."""

    def __init__(self, matrix: RowMatrix, start: int, stop: int, rows: tuple[int, int]) -> None:
        self._matrix, self._first, self._last, self._top = matrix, start, stop, rows[0]
        self.shape, self.dtype = (matrix.shape[0], stop - start), matrix.dtype
        self._period = 1
        self._starts = np.zeros(rows[1] - rows[0] + 1, dtype=np.int64)
        for first, last, _, _ in matrix.stretches(*rows):
            row = np.repeat(np.arange(last - first), matrix.row_counts(first, last).numpy())
            counts = np.bincount(row[self._live(first, last)[1]], minlength=last - first)
            self._starts[first - self._top + 1 : last - self._top + 1] = counts
        np.cumsum(self._starts, out=self._starts)
        self.nnz = int(self._starts[-1])

    def _live(self, start: int, stop: int) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the columns of all entries of some rows, and which of these are wanted."""
        columns: Array = self._matrix.indices(start, stop).numpy()
        return columns, (columns >= self._first) & (columns < self._last)

    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        for first, last, columns, values in self._matrix.stretches(start, stop):
            yield Stretch(first, last, columns, (columns, values))

    def _counts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.diff(self._starts[start - self._top : stop - self._top + 1])

    def _before(self, row: int) -> int:
        return int(self._starts[row - self._top])

    def _fill_indices(self, start: int, stop: int, out: Array) -> None:
        columns, live = self._live(start, stop)
        out[:] = columns[live] - self._first

    def _fill_values(self, start: int, stop: int, out: Array) -> None:
        out[:] = words(self._matrix.values(start, stop))[self._live(start, stop)[1]]


# Planned, written and drawn one after the other, and to count takes going through all entries.
@lru_cache(maxsize=4)
def _columns_of(matrix: RowMatrix, start: int, stop: int, rows: tuple[int, int]) -> ColumnsOf:
    return ColumnsOf(matrix, start, stop, rows)
