"""The Toeplitz matrix of a convolution: T @ x.reshape(-1) == conv(x).reshape(-1), less the bias.

Rows are (output channel, output position), columns (input channel, input position), both row-major, which is
nn.Linear.weight's layout. Which columns a row has is read off the tap tables, an axis at a time, and is the same for
every output channel of a group; `convtool.core.tiles` has the rows of one channel as runs of a few templates. Here they
get their values and become a matrix, of which any range of rows can be made by itself. Most of it is copies of what
was made before, so it is made about as fast as memory is filled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convtool.core.conv import Conv, _swap_channels
from convtool.core.rounding import check_room
from convtool.core.slots import axis_slots
from convtool.core.taps import tap_table
from convtool.core.tiles import RUN_ENTRIES, ChannelRows, Run
from convtool.errors import UsageError

if TYPE_CHECKING:
    import scipy.sparse

INT32_MAX = 2**31 - 1

# Values are moved as integers of their size, since numpy has no bfloat16 and torch's own copies start threads.
WORDS: dict[int, npt.DTypeLike] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
_TORCH_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

_NUMPY_INDEX: dict[torch.dtype, npt.DTypeLike] = {torch.int32: np.int32, torch.int64: np.int64}

# Entries in a block of rows: 8 MiB of values at most, long enough that the per-block overhead doesn't show.
BLOCK_ENTRIES = 1 << 20

# Entries for each thread at least: below, starting threads takes longer than they save.
PART_ENTRIES = 1 << 19


def _words(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's numbers as `WORDS` has them."""
    words: npt.NDArray[Any] = tensor.resolve_conj().contiguous().view(_TORCH_WORDS[tensor.dtype.itemsize]).numpy()
    return words


def index_dtype(largest: int) -> torch.dtype:
    """int32 wherever `largest` (of the number of entries, rows and columns) fits, int64 only where it doesn't."""
    return torch.int32 if largest <= INT32_MAX else torch.int64


class CsrBlock(NamedTuple):
    """Consecutive rows of a matrix in CSR form."""

    counts: Tensor  # (rows,) entries in each row
    indices: Tensor  # (entries,) columns, ascending within a row
    values: Tensor  # (entries,)


class Stretch(NamedTuple):
    """Consecutive rows that are best made in one go, and what else they are equal to.

    Stretches of one matrix with equal `same_indices` have equal columns, entry by entry; with equal `same_values`,
    equal values. Whoever writes a matrix can so reuse what it made.
    """

    start: int
    stop: int
    same_indices: Hashable
    same_values: Hashable


class _Band(NamedTuple):
    """Row channels first:last at the same positions."""

    first: int
    last: int
    start: int
    stop: int


class ToeplitzMatrix:
    """The matrix of one layer at one input size; its size is known at once, its rows are made on demand.

    Args:
        conv: the layer.
        input_size: spatial sizes of its input.
        dtype: of the values; the weight's by default. Sums of taps are formed in float64 and rounded once.
        transpose: make the matrix B for row vectors, x @ B, instead of T.
        affine: append the bias as T's last column (its last row with `transpose`), so that an input extended by a
            final 1 gives the layer's output, bias included.

    Attributes:
        shape: (rows, columns).
        nnz: number of stored entries; every live tap counts, also where the weight is zero.

    Raises:
        UsageError: the layer cannot run on that input size.
        RefusedError: its numbers are complex and `dtype` isn't.
    """

    def __init__(
        self,
        conv: Conv,
        input_size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        transpose: bool = False,
        affine: bool = False,
    ) -> None:
        self.conv = conv
        self.input_size = tuple(input_size)
        self.output_size = conv.output_size(input_size)
        self.dtype = conv.weight.dtype if dtype is None else dtype
        check_room(conv.weight.dtype, self.dtype)
        self.transpose = transpose
        self.affine = affine
        slots = [
            axis_slots(tap_table(axis, size)) for axis, size in zip(conv.geometry.axes, self.input_size, strict=True)
        ]
        weight = conv.weight
        row_size, column_size = self.output_size, self.input_size
        if transpose:
            slots = [axis.adjoint(size) for axis, size in zip(slots, self.input_size, strict=True)]
            weight = _swap_channels(weight, conv.geometry.groups)  # (C_in, C_out/groups, *kernel)
            row_size, column_size = column_size, row_size
        self._slots = slots
        self._row_size = row_size
        self._column_size = column_size
        self._positions = math.prod(row_size)
        self._weight = weight
        self._column_step = weight.shape[1] * math.prod(column_size)  # columns of one group
        # A transposed layer reads in the rhythm of its stride, and so does the transpose of a plain one.
        stride = conv.geometry.stride
        periods = stride if conv.geometry.transposed != transpose else (1,) * len(stride)
        bias_column = affine and not transpose
        self._channel = ChannelRows(slots, row_size, column_size, weight.shape[1], periods, bias_column=bias_column)
        self._channel_values: tuple[tuple[int, int], npt.NDArray[Any]] | None = None
        rows = weight.shape[0] * self._positions
        columns = self._column_step * conv.geometry.groups
        self._plain_rows, self._plain_columns = rows, columns
        self.nnz = weight.shape[0] * self._channel.entries + (columns if affine and transpose else 0)
        self.shape = (rows + (affine and transpose), columns + (affine and not transpose))

    @property
    def index_dtype(self) -> torch.dtype:
        """int32 wherever it reaches, int64 only where it doesn't."""
        return index_dtype(max(self.nnz, *self.shape))

    @property
    def bias(self) -> Tensor | None:
        """The bias as a vector over all outputs, (C_out * prod(output_size),), or None where the layer has none."""
        return None if self.conv.bias is None else self._bias_rows.to(self.dtype).flatten()

    def bias_part(self, start: int, stop: int) -> Tensor:
        """The bias of outputs start:stop, without making all of it; only of a layer that has one."""
        row = torch.arange(start, stop)
        positions = self._bias_rows.shape[1]
        return self._bias_rows[row // positions, row % positions].to(self.dtype)

    def indptr(self) -> Tensor:
        """(rows + 1,) the start of each row among all entries."""
        pointer = np.zeros(self.shape[0] + 1, dtype=_NUMPY_INDEX[self.index_dtype])
        np.cumsum(self.row_counts(0, self.shape[0]).numpy(), out=pointer[1:])
        return torch.from_numpy(pointer)

    def entries(self, start: int, stop: int) -> int:
        """The number of entries in rows start:stop, without making them."""
        self._check_rows(start, stop)
        return self._entries_before(stop) - self._entries_before(start)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        longest = max(1, self._channel.longest)
        per_channel = max(1, self.nnz // max(1, self._weight.shape[0]))
        if per_channel <= entries:
            step = self._positions * max(1, entries // per_channel)
        else:
            step = math.ceil(self._positions / math.ceil(self._positions / max(1, entries // longest)))
        for start in range(0, self._plain_rows, self._positions if step < self._positions else step):
            if step < self._positions:
                for inner in range(0, self._positions, step):
                    yield start + inner, start + min(inner + step, self._positions)
            else:
                yield start, min(start + step, self._plain_rows)
        if self.shape[0] > self._plain_rows:
            yield self._plain_rows, self.shape[0]

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Rows start:stop cut into stretches of about `RUN_ENTRIES` entries (one row at least)."""
        self._check_rows(start, stop)
        for (first, last, begin, end), runs in self._pieces(start, stop):
            groups = first // self._per_group, (last - 1) // self._per_group
            place = (*groups, last - first, first if groups[0] < groups[1] else None)
            columns = tuple((run.tile.shift, run.step, run.tiles, *run.look) for run in runs)
            looks = tuple((run.tiles, *run.look) for run in runs)
            bias = begin if self._has_bias_column and self.conv.has_bias_map else None
            rows = first * self._positions + begin, (last - 1) * self._positions + end
            yield Stretch(*rows, (*place, *columns), (first, last, bias, *looks))
        if start < stop and stop > self._plain_rows:
            yield Stretch(self._plain_rows, stop, None, None)

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, the columns of each row ascending and unique."""
        return CsrBlock(self.row_counts(start, stop), self.indices(start, stop), self.values(start, stop))

    def row_counts(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64 number of entries in each of rows start:stop."""
        self._check_rows(start, stop)
        end = min(stop, self._plain_rows)
        if end - start > self._positions:  # every channel is like the first
            channel = self._channel.counts(np.arange(self._positions))
            counts = np.resize(np.roll(channel, -(start % self._positions)), end - start)
        else:
            counts = self._channel.counts(np.arange(start, end, dtype=np.int64) % self._positions)
        if start < stop and stop > self._plain_rows:
            counts = np.append(counts, self._plain_columns)
        return torch.from_numpy(counts)

    def indices(self, start: int, stop: int) -> Tensor:
        """(entries,) the columns of rows start:stop, those of each row ascending and unique."""
        out = np.empty(self.entries(start, stop), dtype=_NUMPY_INDEX[self.index_dtype])
        self._in_parts(start, stop, lambda first, last, part: self._fill_indices(first, last, out[part]))
        return torch.from_numpy(out)

    def values(self, start: int, stop: int) -> Tensor:
        """(entries,) the values of rows start:stop, in the order of `indices`."""
        out = np.empty(self.entries(start, stop), dtype=WORDS[self.dtype.itemsize])
        self._in_parts(start, stop, lambda first, last, part: self._fill_values(first, last, out[part]))
        return torch.from_numpy(out).view(self.dtype)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense (stop - start, columns) tensor."""
        self._check_rows(start, stop)
        out = np.zeros((stop - start, self.shape[1]), dtype=WORDS[self.dtype.itemsize])

        def fill(first: int, last: int, part: slice) -> None:
            columns = np.empty(part.stop - part.start, dtype=_NUMPY_INDEX[self.index_dtype])
            values = np.empty(len(columns), dtype=out.dtype)
            self._fill_indices(first, last, columns)
            self._fill_values(first, last, values)
            row = np.repeat(np.arange(first - start, last - start), self.row_counts(first, last).numpy())
            out.reshape(-1)[row * self.shape[1] + columns] = values

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
        if cuts[1] - cuts[0] > self._positions:  # whole channels
            cuts[1:-1] = [cut - cut % self._positions for cut in cuts[1:-1]]
        places = [self.entries(start, cut) for cut in cuts]
        parts = (slice(*pair) for pair in itertools.pairwise(places))
        with ThreadPoolExecutor(threads) as pool:
            begun = [pool.submit(fill, *cut, part) for cut, part in zip(itertools.pairwise(cuts), parts, strict=True)]
            for part_done in begun:
                part_done.result()

    def _fill_indices(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        for band, target in self._targets(start, stop, out):
            offset = np.arange(band.first, band.last) // self._per_group * self._column_step  # (channels,)
            further = (offset[1:, None] - offset[0]).astype(out.dtype)
            done = 0
            for run in self._channel.runs(band.start, band.stop):
                columns = self._channel.template(run, out.dtype).columns
                block = target[:, done : done + run.entries]  # (channels, entries)
                shift = (offset[0] + run.tile.shift + run.step * np.arange(run.tiles)).astype(out.dtype)
                np.add(columns, shift[:, None], out=block[0].reshape(run.tiles, -1))
                if further.any():
                    np.add(block[0], further, out=block[1:])
                else:
                    np.copyto(block[1:], block[0])
                done += run.entries
            if self._has_bias_column:
                target[:, self._row_ends(band)] = self._plain_columns
        if start < stop and stop > self._plain_rows:  # the bias under a transposed matrix, in full
            out[len(out) - self._plain_columns :] = np.arange(self._plain_columns, dtype=out.dtype)

    def _fill_values(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        index = _NUMPY_INDEX[self.index_dtype]
        for band, target in self._targets(start, stop, out):
            values, runs = self._values(band.first, band.last), self._channel.runs(band.start, band.stop)
            if len(runs) == runs[0].tiles == 1:  # small channels, in one go
                np.take(values, self._channel.template(runs[0], index).sources, axis=1, out=target, mode="clip")
            else:
                for channel, row in zip(values, target, strict=True):
                    self._fill_channel(runs, channel, row)
            if self._has_bias_column:
                bias = self._bias_rows[band.first : band.last, band.start : band.stop]
                target[:, self._row_ends(band)] = _words(bias.to(self.dtype))
        if start < stop and stop > self._plain_rows:
            out[len(out) - self._plain_columns :] = _words(self._bias_rows.to(self.dtype)).reshape(-1)

    def _fill_channel(self, runs: list[Run], values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        """The values of a channel's runs: each tile gathered when it first comes up, and copied from then on."""
        made: dict[tuple[int, ...], npt.NDArray[Any]] = {}  # the longest run of each look
        start = 0
        for run in runs:
            target = out[start : start + run.entries]
            start += run.entries
            before = made.get(run.look)
            if before is None:
                done = run.entries // run.tiles
                sources = self._channel.template(run, _NUMPY_INDEX[self.index_dtype]).sources
                np.take(values, sources, out=target[:done], mode="clip")
            else:
                done = min(len(before), run.entries)
                np.copyto(target[:done], before[:done])
            while done < run.entries:
                more = min(done, run.entries - done)
                np.copyto(target[done : done + more], target[:more])
                done += more
            if before is None or len(before) < run.entries:
                made[run.look] = target

    def to_sparse_csr(self) -> Tensor:
        """The whole matrix as a torch sparse CSR tensor."""
        block = self.rows(0, self.shape[0])
        return torch.sparse_csr_tensor(
            self.indptr(), block.indices, block.values, size=self.shape, check_invariants=False
        )

    def to_dense(self) -> Tensor:
        """The whole matrix as a dense tensor."""
        return self.dense_rows(0, self.shape[0])

    def to_scipy(self) -> scipy.sparse.csr_array[Any]:
        """The whole matrix as a scipy.sparse.csr_array in canonical form; needs scipy."""
        import scipy.sparse

        block = self.rows(0, self.shape[0])
        matrix = scipy.sparse.csr_array(
            (block.values.numpy(), block.indices.numpy(), self.indptr().numpy()), shape=self.shape
        )
        matrix.has_canonical_format = True  # sorted and unique by construction: spares scipy the check
        return matrix

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")

    @property
    def _per_group(self) -> int:
        return max(1, self._weight.shape[0] // self.conv.geometry.groups)

    def _values(self, first: int, last: int) -> npt.NDArray[Any]:
        """(channels, column channels * subsets [+ 1]) every value that can stand in rows of channels first:last.

        The one more is the place of the bias, whose value depends on the position.
        """
        kept = self._channel_values
        if kept is None or kept[0] != (first, last):
            kept = self._channel_values = ((first, last), _words(self._make_values(first, last)))
        return kept[1]

    def _make_values(self, first: int, last: int) -> Tensor:
        weight = self._weight[first:last]
        for number, axis in enumerate(self._slots):
            if axis.merges:
                exact = weight.to(torch.promote_types(weight.dtype, torch.float64))
                members = torch.from_numpy(axis.members).to(exact.dtype)  # (subsets, kernel)
                weight = torch.tensordot(exact, members, dims=([number + 2], [1])).movedim(-1, number + 2)
        values = weight.flatten(1).to(self.dtype)
        return F.pad(values, (0, 1)) if self._has_bias_column else values.contiguous()

    @property
    def _has_bias_column(self) -> bool:
        """Whether each row ends in its bias."""
        return self.affine and not self.transpose

    @cached_property
    def _bias_rows(self) -> Tensor:
        """(C_out, prod(output_size)) the bias of every output, zero where there is none; a view."""
        bias = self.conv.bias_over(self.output_size)
        if bias is None:
            bias = torch.zeros((), dtype=self.dtype).expand(self.conv.out_channels, *self.output_size)
        return bias.reshape(self.conv.out_channels, math.prod(self.output_size))

    def _entries_before(self, row: int) -> int:
        """The number of entries in all rows before this one."""
        channel, position = divmod(min(row, self._plain_rows), self._positions)
        live = channel * self._channel.entries + self._channel.entries_before(position)
        return live + (self._plain_columns if row > self._plain_rows else 0)

    def _bands(self, start: int, stop: int) -> Iterator[_Band]:
        """Rows start:stop, as far as they are channels': what is left of the first channel, whole ones, the rest."""
        row, end = start, min(stop, self._plain_rows)
        while row < end:
            channel, position = divmod(row, self._positions)
            whole = 0 if position else (end - row) // self._positions
            last = channel + max(1, whole)
            upto = self._positions if whole else min(self._positions, end - channel * self._positions)
            yield _Band(channel, last, position, upto)
            row = (last - 1) * self._positions + upto

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[_Band, list[Run]]]:
        """The same cut at runs, and with them: a few runs of one channel, or all runs of a few."""
        for band in self._bands(start, stop):
            runs = self._channel.runs(band.start, band.stop)
            together = RUN_ENTRIES // max(1, self._width(band.start, band.stop))  # channels
            for first in range(band.first, band.last, max(1, together)):
                if together:
                    yield band._replace(first=first, last=min(first + together, band.last)), runs
                    continue
                for run in runs:
                    yield _Band(first, first + 1, run.start, run.stop), [run]

    def _targets(self, start: int, stop: int, out: npt.NDArray[Any]) -> Iterator[tuple[_Band, npt.NDArray[Any]]]:
        """The bands of rows start:stop, and where in `out` each is to be, (channels, entries)."""
        done = 0
        for band in self._bands(start, stop):
            channels, width = band.last - band.first, self._width(band.start, band.stop)
            yield band, out[done : done + channels * width].reshape(channels, width)
            done += channels * width

    def _width(self, start: int, stop: int) -> int:
        """Entries of positions start:stop in one channel."""
        return self._channel.entries_before(stop) - self._channel.entries_before(start)

    def _row_ends(self, band: _Band) -> npt.NDArray[np.int64]:
        """Where in a channel of a band the last entry of each row is."""
        ends: npt.NDArray[np.int64] = np.cumsum(self._channel.counts(np.arange(band.start, band.stop))) - 1
        return ends


def toeplitz(
    conv: Conv,
    input_size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    transpose: bool = False,
    affine: bool = False,
) -> ToeplitzMatrix:
    """The matrix of `conv` on inputs of spatial size `input_size`; see `ToeplitzMatrix` for what it offers.

    >>> import torch, convtool
    >>> kernel = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> matrix = convtool.toeplitz(convtool.conv(kernel), (3, 3))
    >>> matrix.shape, matrix.nnz
    ((4, 9), 16)
    >>> matrix.to_dense()[0]
    tensor([1., 2., 0., 3., 4., 0., 0., 0., 0.])
    """
    return ToeplitzMatrix(conv, input_size, dtype=dtype, transpose=transpose, affine=affine)
