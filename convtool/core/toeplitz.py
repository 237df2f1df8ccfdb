"""The Toeplitz matrix of a convolution: T @ x.reshape(-1) == conv(x).reshape(-1), less the bias.

Rows are (output channel, output position), columns (input channel, input position), both row-major, which is
nn.Linear.weight's layout. Nothing about a matrix depends on the numbers but its values: which columns a row has is
read off the tap tables, an axis at a time, and is the same for every output channel of a group. And away from the
borders it is the same at every position, up to a shift. So a channel's positions are cut into tiles, a few templates
serve all tiles of all channels, and any range of rows can be made by itself.
"""

from __future__ import annotations

import itertools
import math
import threading
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
from convtool.core.slots import axis_slots
from convtool.core.taps import PADDED, tap_table
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

# Entries in a tile: its template (12 bytes an entry) and what is made from it stay in a core's own cache.
TILE_ENTRIES = 1 << 17

# Templates kept, 18 MiB at most. A tile is at the start of an axis, inside or at its end: nine kinds for two axes.
TEMPLATES = 12


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


class _Tile(NamedTuple):
    """A range of positions of a channel, and the template that it shares with all tiles that look like it."""

    start: int
    stop: int
    pattern: tuple[int, ...]
    shift: int  # of its columns against the template's


class _Template(NamedTuple):
    """What a tile looks like in every output channel of the first group."""

    starts: npt.NDArray[np.int64]  # (positions + 1,) where each position's entries begin
    columns: npt.NDArray[Any]  # (entries,) of the matrix's index dtype, less the tile's shift
    sources: npt.NDArray[np.int64]  # (entries,) where in `ToeplitzMatrix._values`, of its channel, each value stands

    def part(self, start: int, stop: int) -> slice:
        """The entries of its positions start:stop."""
        return slice(int(self.starts[start]), int(self.starts[stop]))

    def ends(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where in that part the last entry of each position stands."""
        ends: npt.NDArray[np.int64] = self.starts[start + 1 : stop + 1] - 1 - self.starts[start]
        return ends


class _Piece(NamedTuple):
    """Row channels first:last at the same positions, which are all of one tile."""

    first: int
    last: int
    start: int
    stop: int
    tile: _Tile


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
        self._templates: dict[tuple[object, ...], _Template] = {}
        self._tiles: dict[int, _Tile] = {}
        self._patterns: dict[object, int] = {}
        self._channel_values: tuple[tuple[int, int], npt.NDArray[Any]] | None = None
        self._lock = threading.Lock()  # of what threads find and keep: tiles, patterns, templates
        rows = weight.shape[0] * self._positions
        columns = self._column_step * conv.geometry.groups
        live = weight.shape[0] * weight.shape[1] * self._live_positions
        self._plain_rows, self._plain_columns = rows, columns
        self.nnz = live + (conv.out_channels * math.prod(self.output_size) if affine else 0)
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
        pointer = torch.zeros(self.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(self.row_counts(0, self.shape[0]), 0, out=pointer[1:])
        return pointer.to(self.index_dtype)

    def entries(self, start: int, stop: int) -> int:
        """The number of entries in rows start:stop, without making them."""
        self._check_rows(start, stop)
        return self._entries_before(stop) - self._entries_before(start)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        longest = max(1, self._longest_row)
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
        """Rows start:stop cut into stretches of about `TILE_ENTRIES` entries (one row at least)."""
        self._check_rows(start, stop)
        per_channel = max(1, self.nnz // max(1, self._weight.shape[0]))
        for first, last, begin, end, tile in self._pieces(start, stop, max(1, TILE_ENTRIES // per_channel)):
            groups = first // self._per_group, (last - 1) // self._per_group
            part = (*tile.pattern, begin - tile.start, end - tile.start)
            place = (*groups, last - first, first if groups[0] < groups[1] else None)
            rows = first * self._positions + begin, (last - 1) * self._positions + end
            bias = begin if self._has_bias_column and self.conv.has_bias_map else None
            yield Stretch(*rows, (tile.shift, *place, *part), (first, last, bias, *part))
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
            channel = self._position_counts(np.arange(self._positions))
            counts = np.resize(np.roll(channel, -(start % self._positions)), end - start)
        else:
            counts = self._position_counts(np.arange(start, end, dtype=np.int64) % self._positions)
        if start < stop and stop > self._plain_rows:
            counts = np.append(counts, self._plain_columns)
        return torch.from_numpy(counts)

    def _position_counts(self, position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(positions,) number of entries in the rows of these positions, in any channel."""
        counts = np.full(len(position), self._weight.shape[1], dtype=np.int64)
        for axis, where in zip(self._slots, self._unravel(position), strict=True):
            counts *= axis.counts[where]
        return counts + 1 if self._has_bias_column else counts

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
        done = 0
        for first, last, begin, end, tile in self._pieces(start, stop):
            template = self._template(tile)
            columns = template.columns[template.part(begin - tile.start, end - tile.start)]
            channels = last - first
            target = out[done : done + channels * len(columns)].reshape(channels, len(columns))
            group = np.arange(first, last)[:, None] // self._per_group  # (channels, 1)
            np.add(columns, (tile.shift + group * self._column_step).astype(out.dtype), out=target)
            if self._has_bias_column:
                target[:, template.ends(begin - tile.start, end - tile.start)] = self._plain_columns
            done += target.size
        if start < stop and stop > self._plain_rows:
            out[done:] = np.arange(self._plain_columns, dtype=out.dtype)  # the bias under a transposed matrix, in full

    def _fill_values(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        made: dict[tuple[int, ...], npt.NDArray[Any]] = {}  # the current channels', by what they look like
        done, channels = 0, (-1, -1)
        for first, last, begin, end, tile in self._pieces(start, stop):
            if (first, last) != channels:
                made, channels, values = {}, (first, last), self._values(first, last)
            template = self._template(tile)
            part = template.part(begin - tile.start, end - tile.start)
            sources = template.sources[part]
            target = out[done : done + (last - first) * len(sources)].reshape(last - first, len(sources))
            key = (*tile.pattern, part.start, part.stop)
            if key in made:
                np.copyto(target, made[key])
            else:
                made[key] = np.take(values, sources, axis=1, out=target, mode="clip")
            if self._has_bias_column:
                bias = _words(self._bias_rows[first:last, begin:end].to(self.dtype))
                target[:, template.ends(begin - tile.start, end - tile.start)] = bias
            done += target.size
        if start < stop and stop > self._plain_rows:
            out[done:] = _words(self._bias_rows.to(self.dtype)).reshape(-1)

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

    @cached_property
    def _longest_row(self) -> int:
        return self._weight.shape[1] * math.prod(int(axis.counts.max(initial=0)) for axis in self._slots) + self.affine

    def _unravel(self, position: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Positions of a channel as one index per axis."""
        return np.unravel_index(position, self._row_size) if self._row_size else ()

    def _entries_before(self, row: int) -> int:
        """The number of entries in all rows before this one."""
        channel, position = divmod(min(row, self._plain_rows), self._positions)
        # Positions before this one agree with it on some leading axes, are smaller on the next, and any on the rest.
        before, agree, inner, rest = 0, 1, self._positions, position
        for size, starts, below in zip(self._row_size, self._counts_before, self._totals_below, strict=True):
            inner //= size
            index, rest = divmod(rest, inner)
            before += agree * int(starts[index]) * below
            agree *= int(starts[index + 1] - starts[index])
        live = self._weight.shape[1] * (channel * self._live_positions + before)
        if self.affine and self.transpose:
            return live + (self._plain_columns if row > self._plain_rows else 0)
        return live + (row if self.affine else 0)

    @cached_property
    def _counts_before(self) -> list[npt.NDArray[np.int64]]:
        """For each axis the slots in use before each of its positions, and behind the last."""
        return [np.concatenate([[0], np.cumsum(axis.counts)]) for axis in self._slots]

    @cached_property
    def _totals_below(self) -> list[int]:
        """For each axis the slots in use of all axes after it, multiplied."""
        totals = [int(starts[-1]) for starts in self._counts_before]
        return [math.prod(totals[number + 1 :]) for number in range(len(totals))]

    @cached_property
    def _live_positions(self) -> int:
        """Slots in use of all axes, multiplied: a channel's entries for each of its input channels."""
        return math.prod(int(starts[-1]) for starts in self._counts_before)

    @cached_property
    def _tiling(self) -> tuple[int, int, int]:
        """(axis, step, inner): a tile is `step` positions of that axis, all `inner` ones of the axes after it.

        Axes before it have one position in a tile.
        """
        limit, inner = max(1, TILE_ENTRIES // max(1, self._longest_row)), 1
        for number, size in reversed(list(enumerate(self._row_size))):
            if inner * size > limit or number == 0:
                tiles = math.ceil(size / max(1, limit // inner))
                return number, math.ceil(size / tiles), inner
            inner *= size
        return 0, 1, 1

    def _tile(self, position: int) -> _Tile:
        """The tile that a position is in."""
        if not self._row_size:
            return _Tile(0, 1, (), 0)
        number, step, inner = self._tiling
        line, rest = divmod(position, self._row_size[number] * inner)
        place = rest // (step * inner)
        key = line * self._row_size[number] + place
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = self._make_tile(line, place * step)
            return self._tiles[key]

    def _make_tile(self, line: int, begin: int) -> _Tile:
        number, step, inner = self._tiling
        end = min(begin + step, self._row_size[number])
        leading = np.unravel_index(line, self._row_size[:number]) if number else ()
        ranges = [(int(index), int(index) + 1) for index in leading]
        ranges += [(begin, end), *((0, size) for size in self._row_size[number + 1 :])]
        pattern, shift, column_step = [], 0, math.prod(self._column_size)
        for axis, size, (start, stop) in zip(self._slots, self._column_size, ranges, strict=True):
            column_step //= size
            columns, subsets = axis.columns[start:stop], axis.subsets[start:stop]
            live = columns != PADDED
            lowest = int(columns[live].min(initial=size - 1))
            shape = np.where(live, columns - lowest, PADDED).tobytes(), np.where(live, subsets, 0).tobytes()
            pattern.append(self._patterns.setdefault((column_step, shape), len(self._patterns)))
            shift += lowest * column_step
        offset = line * self._row_size[number]
        return _Tile((offset + begin) * inner, (offset + end) * inner, tuple(pattern), shift)

    def _pieces(self, start: int, stop: int, channels: int | None = None) -> Iterator[_Piece]:
        """Rows start:stop, as far as they are channels', cut at tiles; whole channels together where a tile is one."""
        row, end = start, min(stop, self._plain_rows)
        while row < end:
            channel, position = divmod(row, self._positions)
            tile = self._tile(position)
            upto = min(tile.stop, end - channel * self._positions)
            last = channel + 1
            if position == 0 and upto == self._positions:
                whole = (end - row) // self._positions
                last = channel + (whole if channels is None else min(whole, channels))
            yield _Piece(channel, last, position, upto, tile)
            row = (last - 1) * self._positions + upto

    def _template(self, tile: _Tile) -> _Template:
        key = (self.index_dtype, *tile.pattern)
        with self._lock:
            if key not in self._templates:
                if len(self._templates) >= TEMPLATES:
                    self._templates.pop(next(iter(self._templates)))
                self._templates[key] = self._make_template(tile.start, tile.stop, tile.shift)
            return self._templates[key]

    def _make_template(self, start: int, stop: int, shift: int) -> _Template:
        """Columns and value sources of positions start:stop, in order, for the first channel of the first group."""
        positions = stop - start
        where = self._unravel(np.arange(start, stop))
        axes = len(self._slots)
        channels = self._weight.shape[1]
        subsets = math.prod(len(axis.members) for axis in self._slots)
        index = np.arange(channels, dtype=np.int64)
        # Index expressions over (positions, channels, slots of axis 0, slots of axis 1, ...), kept broadcastable.
        columns = (index * math.prod(self._column_size)).reshape(1, channels, *(1,) * axes)
        sources = (index * subsets).reshape(1, channels, *(1,) * axes)
        live = np.ones((1,) * (axes + 2), dtype=bool)
        column_step, source_step = math.prod(self._column_size), subsets
        counts = np.full(positions, channels, dtype=np.int64)
        for number, (axis, size, row) in enumerate(zip(self._slots, self._column_size, where, strict=True)):
            column_step //= size
            source_step //= len(axis.members)
            shape = [positions, 1, *(1,) * axes]
            shape[number + 2] = axis.columns.shape[1]
            columns = columns + (axis.columns[row] * column_step).reshape(shape)
            sources = sources + (axis.subsets[row] * source_step).reshape(shape)
            live = live & (axis.columns[row] != PADDED).reshape(shape)
            counts *= axis.counts[row]
        full = np.broadcast_shapes(columns.shape, live.shape, (positions, channels, *(1,) * axes))
        chosen = np.broadcast_to(live, full)
        flat_columns = np.broadcast_to(columns, full)[chosen] - shift
        flat_sources = np.broadcast_to(sources, full)[chosen]
        if self._has_bias_column:
            ends = np.cumsum(counts)  # the bias goes behind the last entry of each row
            flat_columns = np.insert(flat_columns, ends, 0)  # its column is filled in where it is known
            flat_sources = np.insert(flat_sources, ends, channels * subsets)  # as is its value
            counts = counts + 1
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        return _Template(
            starts,
            flat_columns.astype(_NUMPY_INDEX[self.index_dtype]),
            flat_sources,
        )


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
