"""The Toeplitz matrix of a convolution: T @ x.reshape(-1) == conv(x).reshape(-1), less the bias.

Rows are (output channel, output position), columns (input channel, input position), both row-major, which is
nn.Linear.weight's layout. Nothing about a matrix depends on the numbers but its values: which columns a row has is
read off the tap tables, an axis at a time, and is the same for every output channel of a group. So one template per
range of positions serves them all, and any range of rows can be made by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv, _swap_channels
from convtool.core.taps import PADDED, Table, tap_table
from convtool.errors import UsageError

if TYPE_CHECKING:
    import scipy.sparse

INT32_MAX = 2**31 - 1

# Entries made at a time when a matrix is streamed: 8 MiB of values at most, which keeps a block in cache while
# staying long enough that the per-block overhead doesn't show.
BLOCK_ENTRIES = 1 << 20


class CsrBlock(NamedTuple):
    """Consecutive rows of a matrix in CSR form."""

    counts: Tensor  # (rows,) entries in each row
    indices: Tensor  # (entries,) columns, ascending within a row
    values: Tensor  # (entries,)


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
        """The same axis read the other way: for each of `rows` input positions the output positions that use it."""
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
    """The slots of one axis from its tap table, taps that share a column merged."""
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


class _Template(NamedTuple):
    """What a range of positions looks like in every output channel of the first group."""

    counts: Tensor  # (positions,) entries of each row
    columns: Tensor  # (entries,)
    sources: Tensor  # (entries,) where in the channel's row of `ToeplitzMatrix._values` each value stands


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
        self._cached: tuple[tuple[int, int], _Template] | None = None
        rows = weight.shape[0] * self._positions
        columns = self._column_step * conv.geometry.groups
        live = weight.shape[0] * weight.shape[1] * math.prod(int(axis.counts.sum()) for axis in slots)
        self._plain_rows, self._plain_columns = rows, columns
        self.nnz = live + (conv.out_channels * math.prod(self.output_size) if affine else 0)
        self.shape = (rows + (affine and transpose), columns + (affine and not transpose))

    @property
    def index_dtype(self) -> torch.dtype:
        """int32 wherever it reaches, int64 only where it doesn't."""
        return torch.int32 if max(self.nnz, *self.shape) <= INT32_MAX else torch.int64

    @property
    def bias(self) -> Tensor | None:
        """The bias as a vector over all outputs, (C_out * prod(output_size),), or None where the layer has none."""
        if self.conv.bias is None:
            return None
        return self.conv.bias.to(self.dtype).repeat_interleave(math.prod(self.output_size))

    def indptr(self) -> Tensor:
        """(rows + 1,) the start of each row among all entries."""
        counts = torch.cat(list(self._row_counts()))
        pointer = torch.zeros(self.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=pointer[1:])
        return pointer.to(self.index_dtype)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        longest = max(1, self._longest_row)
        per_channel = max(1, self.nnz // max(1, self._weight.shape[0]))
        if per_channel <= entries:
            step = self._positions * max(1, entries // per_channel)
        else:
            # Ranges that divide a channel evenly come back for the next channel, and find their template cached.
            step = math.ceil(self._positions / math.ceil(self._positions / max(1, entries // longest)))
        for start in range(0, self._plain_rows, self._positions if step < self._positions else step):
            if step < self._positions:
                for inner in range(0, self._positions, step):
                    yield start + inner, start + min(inner + step, self._positions)
            else:
                yield start, min(start + step, self._plain_rows)
        if self.shape[0] > self._plain_rows:
            yield self._plain_rows, self.shape[0]

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, the columns of each row ascending and unique."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        parts: list[CsrBlock] = []
        end = min(stop, self._plain_rows)
        row = start
        while row < end:
            channel, position = divmod(row, self._positions)
            if position == 0 and end - row >= self._positions:  # whole channels at once
                channels = (end - row) // self._positions
                parts.append(self._channels(channel, channel + channels, 0, self._positions))
                row += channels * self._positions
            else:
                upto = min(end - channel * self._positions, self._positions)
                parts.append(self._channels(channel, channel + 1, position, upto))
                row = channel * self._positions + upto
        if stop > self._plain_rows and start < stop:
            parts.append(self._affine_row())
        if len(parts) == 1:
            return parts[0]
        empty = torch.zeros(0, dtype=self.index_dtype)
        return CsrBlock(
            torch.cat([empty.long(), *(part.counts for part in parts)]),
            torch.cat([empty, *(part.indices for part in parts)]),
            torch.cat([empty.to(self.dtype), *(part.values for part in parts)]),
        )

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense (stop - start, columns) tensor."""
        block = self.rows(start, stop)
        out = torch.zeros(stop - start, self.shape[1], dtype=self.dtype)
        row = torch.repeat_interleave(torch.arange(stop - start), block.counts)
        out.view(-1)[row * self.shape[1] + block.indices] = block.values
        return out

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

    @cached_property
    def _values(self) -> Tensor:
        """(row channels, column channels * subsets [+ 1]) every value that can stand in a channel's rows."""
        weight = self._weight
        for number, axis in enumerate(self._slots):
            if axis.merges:
                exact = weight.to(torch.promote_types(weight.dtype, torch.float64))
                members = torch.from_numpy(axis.members).to(exact.dtype)  # (subsets, kernel)
                weight = torch.tensordot(exact, members, dims=([number + 2], [1])).movedim(-1, number + 2)
        values = weight.flatten(1).to(self.dtype)
        if self.affine and not self.transpose:
            values = torch.cat([values, self._bias_column()], 1)
        return values.contiguous()

    def _bias_column(self) -> Tensor:
        bias = self.conv.bias
        if bias is None:
            return torch.zeros(self.conv.out_channels, 1, dtype=self.dtype)
        return bias.to(self.dtype)[:, None]

    @cached_property
    def _longest_row(self) -> int:
        return self._weight.shape[1] * math.prod(int(axis.counts.max(initial=0)) for axis in self._slots) + self.affine

    def _row_counts(self) -> Iterator[Tensor]:
        counts = np.full((1,), self._weight.shape[1], dtype=np.int64)
        for axis in self._slots:
            counts = np.multiply.outer(counts, axis.counts).reshape(-1)
        plain = torch.from_numpy(counts) + int(self.affine and not self.transpose)
        for _ in range(self._weight.shape[0]):
            yield plain
        if self.shape[0] > self._plain_rows:
            yield torch.tensor([self._plain_columns])

    def _channels(self, first: int, last: int, start: int, stop: int) -> CsrBlock:
        """Row channels first:last, positions start:stop of each."""
        template = self._template(start, stop)
        entries, channels = len(template.columns), last - first
        indices = torch.empty(channels, entries, dtype=self.index_dtype)
        per_group = self._weight.shape[0] // self.conv.geometry.groups
        for group in range(first // per_group, (last - 1) // per_group + 1):
            shared = slice(max(0, group * per_group - first), (group + 1) * per_group - first)
            torch.add(template.columns, group * self._column_step, out=indices[shared.start])
            if self.affine and not self.transpose:
                indices[shared.start, template.counts.cumsum(0) - 1] = self._plain_columns
            indices[shared] = indices[shared.start].clone()
        values = torch.empty(channels, entries, dtype=self.dtype)
        for channel in range(channels):
            torch.index_select(self._values[first + channel], 0, template.sources, out=values[channel])
        return CsrBlock(template.counts.repeat(channels), indices.view(-1), values.view(-1))

    def _affine_row(self) -> CsrBlock:
        """The bias under a transposed matrix: one more row, full."""
        values = self._bias_column().expand(-1, math.prod(self.output_size)).reshape(-1)
        return CsrBlock(
            torch.tensor([self._plain_columns]), torch.arange(self._plain_columns, dtype=self.index_dtype), values
        )

    def _template(self, start: int, stop: int) -> _Template:
        if self._cached is None or self._cached[0] != (start, stop):
            self._cached = ((start, stop), self._make_template(start, stop))
        return self._cached[1]

    def _make_template(self, start: int, stop: int) -> _Template:
        """Columns and value sources of positions start:stop, in order, for the first channel of the first group."""
        positions = stop - start
        where = np.unravel_index(np.arange(start, stop), self._row_size) if self._row_size else ()
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
        flat_columns = np.broadcast_to(columns, full)[chosen]
        flat_sources = np.broadcast_to(sources, full)[chosen]
        if self.affine and not self.transpose:
            ends = np.cumsum(counts)  # the bias goes behind the last entry of each row
            flat_columns = np.insert(flat_columns, ends, self._plain_columns)
            flat_sources = np.insert(flat_sources, ends, channels * subsets)
            counts = counts + 1
        index_type = np.int32 if self.index_dtype == torch.int32 else np.int64
        return _Template(
            torch.from_numpy(counts),
            torch.from_numpy(flat_columns.astype(index_type)),
            torch.from_numpy(flat_sources),
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
