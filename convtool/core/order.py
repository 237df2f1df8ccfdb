"""The matrix for channels-last data: x is flattened as (*spatial, C), and so is the output.

T with its rows and columns in another order: row (position, channel), column (position, channel). A position's columns
are the same for every output channel of a group, so they are sorted once for a run of positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.toeplitz import BLOCK_ENTRIES, WORDS, CsrBlock, Stretch, ToeplitzMatrix
from convtool.errors import UsageError

Order: TypeAlias = Literal["CHW", "HWC"]

SORTED_ENTRIES = 1 << 17  # entries that are put in order at a time


class ChannelsLastMatrix(ToeplitzMatrix):
    """The matrix of one layer at one input size, channels last; everything else is as in `ToeplitzMatrix`."""

    def __init__(
        self,
        conv: Conv,
        input_size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        transpose: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__(conv, input_size, dtype=dtype, transpose=transpose, affine=affine)
        self._plain = ToeplitzMatrix(conv, input_size, dtype=dtype, transpose=transpose, affine=affine)
        self._row_channels = self._weight.shape[0]
        self._column_channels = self._weight.shape[1] * conv.geometry.groups
        self._column_positions = math.prod(self._column_size)

    @property
    def bias(self) -> Tensor | None:
        """The bias as a vector over all outputs, (prod(output_size) * C_out,), or None where the layer has none."""
        return None if self.conv.bias is None else self._bias_rows.to(self.dtype).T.flatten()

    def bias_part(self, start: int, stop: int) -> Tensor:
        """The bias of outputs start:stop, without making all of it; only of a layer that has one."""
        row = torch.arange(start, stop)
        channels = self._bias_rows.shape[0]
        return self._bias_rows[row % channels, row // channels].to(self.dtype)

    def entries(self, start: int, stop: int) -> int:
        """The number of entries in rows start:stop, without making them."""
        self._check_rows(start, stop)
        return self._before(stop) - self._before(start)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        step = max(1, entries // max(1, self._channel.longest))
        yield from ((at, min(at + step, self._plain_rows)) for at in range(0, self._plain_rows, step))
        if self.shape[0] > self._plain_rows:
            yield self._plain_rows, self.shape[0]

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Rows start:stop cut into stretches of about `SORTED_ENTRIES` entries (one row at least), each by itself."""
        self._check_rows(start, stop)
        step, end = max(1, SORTED_ENTRIES // max(1, self._channel.longest)), min(stop, self._plain_rows)
        for first in range(start, end, step):
            last = min(first + step, end)
            yield Stretch(first, last, (first, last), (first, last))
        if start < stop and stop > self._plain_rows:
            yield Stretch(self._plain_rows, stop, None, None)

    def row_counts(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64 number of entries in each of rows start:stop."""
        self._check_rows(start, stop)
        channels = max(1, self._row_channels)
        end = min(stop, self._plain_rows)
        first = min(start, end) // channels  # position
        position = torch.arange(min(start, end), end) // channels - first
        counts = self._plain.row_counts(first, -(-end // channels))[position]
        if start < stop and stop > self._plain_rows:
            counts = torch.cat([counts, torch.tensor([self._plain_columns])])
        return counts

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, the columns of each row ascending and unique."""
        return CsrBlock(self.row_counts(start, stop), self.indices(start, stop), self.values(start, stop))

    def indices(self, start: int, stop: int) -> Tensor:
        """(entries,) the columns of rows start:stop, those of each row ascending and unique."""
        self._check_rows(start, stop)
        made = [np.zeros(0, dtype=np.int64), *self._made(start, stop, "indices")]
        if start < stop and stop > self._plain_rows:
            made.append(np.arange(self._plain_columns))
        return torch.from_numpy(np.concatenate(made)).to(self.index_dtype)

    def values(self, start: int, stop: int) -> Tensor:
        """(entries,) the values of rows start:stop, in the order of `indices`."""
        self._check_rows(start, stop)
        made = [torch.zeros(0, dtype=self.dtype)]
        made += (torch.from_numpy(part).view(self.dtype) for part in self._made(start, stop, "values"))
        if start < stop and stop > self._plain_rows:
            made.append(self._bias_rows.to(self.dtype).T.flatten())
        return torch.cat(made)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense (stop - start, columns) tensor."""
        counts, columns, values = self.rows(start, stop)
        out = torch.zeros(stop - start, self.shape[1], dtype=self.dtype)
        out[torch.repeat_interleave(torch.arange(stop - start), counts), columns.long()] = values
        return out

    def _before(self, row: int) -> int:
        """The number of entries in all rows before this one."""
        position, channel = divmod(min(row, self._plain_rows), max(1, self._row_channels))
        before = self._plain._entries_before(position) * self._row_channels
        if channel:
            before += channel * (self._plain._entries_before(position + 1) - self._plain._entries_before(position))
        return before + (self._plain_columns if row > self._plain_rows else 0)

    def _made(self, start: int, stop: int, what: Literal["indices", "values"]) -> Iterator[npt.NDArray[Any]]:
        """Indices or values (as words) of rows start:stop, as far as they are channels', some positions at a time."""
        stop = min(stop, self._plain_rows)
        if start >= stop:
            return
        channels = self._row_channels
        step = max(1, SORTED_ENTRIES // max(1, self._channel.longest * channels))
        for first in range(start // channels, -(-stop // channels), step):
            last = min(first + step, -(-stop // channels))
            counts = self._plain.row_counts(first, last).numpy()
            block = self._block(first, last, counts, what)
            skipped = max(0, start - first * channels) * int(counts[0])
            left = max(0, last * channels - stop) * int(counts[-1])
            yield block[skipped : len(block) - left]

    def _block(
        self, first: int, last: int, counts: npt.NDArray[np.int64], what: Literal["indices", "values"]
    ) -> npt.NDArray[Any]:
        """All rows of positions first:last; each position's channels stand one after the other."""
        channels, entries = self._row_channels, int(counts.sum())
        row = np.repeat(np.arange(last - first), counts)  # (entries of a channel,)
        columns = self._columns(first, last)
        order = np.lexsort((columns, row))  # the same for every channel
        starts = np.cumsum(counts) - counts
        place = channels * starts[row] + np.arange(entries) - starts[row]  # of channel 0; each next one `counts` on
        out = np.empty(channels * entries, dtype=np.int64 if what == "indices" else WORDS[self.dtype.itemsize])
        for channel in range(channels):
            where = place + channel * counts[row]
            if what == "values":
                out[where] = self._channel_words(channel, first, last)[order]
                continue
            out[where] = columns[order] + channel // self._per_group * self._weight.shape[1]
            if self._has_bias_column:
                out[where[columns[order] == self._plain_columns]] = self._plain_columns
        return out

    def _columns(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Columns of channel 0's positions first:last, channels last, in the order of the plain matrix."""
        plain = self._plain.indices(first, last).numpy().astype(np.int64)
        source, position = np.divmod(plain, max(1, self._column_positions))
        moved: npt.NDArray[np.int64] = position * self._column_channels + source
        return np.where(plain == self._plain_columns, plain, moved) if self._has_bias_column else moved

    def _channel_words(self, channel: int, first: int, last: int) -> npt.NDArray[Any]:
        at = channel * self._positions
        out = np.empty(self._plain.entries(at + first, at + last), dtype=WORDS[self.dtype.itemsize])
        self._plain._fill_values(at + first, at + last, out)
        return out


MATRICES: dict[Order, type[ToeplitzMatrix]] = {"CHW": ToeplitzMatrix, "HWC": ChannelsLastMatrix}


def matrix_in_order(
    order: Order,
    conv: Conv,
    input_size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    transpose: bool = False,
    affine: bool = False,
) -> ToeplitzMatrix:
    """The matrix of a layer whose data is flattened in that order.

    Raises:
        UsageError: another order, or the layer cannot run on that input size.
    """
    if order not in MATRICES:
        raise UsageError(f"--order: expected {' or '.join(MATRICES)}, got {order!r}")
    return MATRICES[order](conv, input_size, dtype=dtype, transpose=transpose, affine=affine)
