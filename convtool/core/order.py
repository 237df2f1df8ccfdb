"""The matrix for channels-last data: x is flattened as (*spatial, C), and so is the output.

T with its rows and columns in another order: row (position, channel), column (position, channel). A position's columns
are the same for every output channel of a group, so they are sorted once for a run of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression
from convtool.core.rows import BLOCK_ENTRIES, Array, Stretch
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.core.tree import Chain
from convtool.errors import UsageError

Order: TypeAlias = Literal["CHW", "HWC"]

SORTED_ENTRIES = 1 << 17  # entries that are put in order at a time


class _Sorted(NamedTuple):
    """Entries of channel 0 at positions first:last, by their columns; they stand alike in every channel."""

    first: int
    last: int
    counts: npt.NDArray[np.int64]  # (positions,)
    columns: npt.NDArray[np.int64]  # (entries,) ascending in each row
    order: npt.NDArray[np.int64]  # (entries,) which of the channels-first matrix's entries each is


class ChannelsLastMatrix(ToeplitzMatrix):
    """The matrix of layers at one input size, channels last; everything else is as in `ToeplitzMatrix`."""

    @property
    def _channels(self) -> int:
        return self._kernels.row_channels

    @property
    def _bias_grid(self) -> Tensor:
        return self._bias_rows.T

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        step = max(1, entries // max(1, self._channel.longest))
        yield from ((at, min(at + step, self._plain_rows)) for at in range(0, self._plain_rows, step))
        if self.shape[0] > self._plain_rows:
            yield self._plain_rows, self.shape[0]

    def _plain_stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Cut the rows into stretches of about `SORTED_ENTRIES` entries (one row at least), each by itself."""
        step = max(1, SORTED_ENTRIES // max(1, self._channel.longest))
        for first in range(start, stop, step):
            rows = first, min(first + step, stop)
            yield Stretch(*rows, rows, rows)

    def _plain_counts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._channel.counts(np.arange(start, stop) // max(1, self._channels))

    def _plain_before(self, row: int) -> int:
        position, channel = divmod(row, max(1, self._channels))
        before = self._channel.entries_before(position)
        following = self._channel.entries_before(position + 1) if channel else 0
        return before * self._channels + channel * (following - before)

    def _plain_indices(self, start: int, stop: int, out: Array) -> None:
        def of_channel(channel: int, tile: _Sorted) -> Array:
            moved = tile.columns + channel // self._kernels.per_group * self._kernels.column_channels
            return (
                np.where(tile.columns == self._plain_columns, tile.columns, moved) if self._has_bias_column else moved
            )

        self._fill(start, stop, out, of_channel)

    def _plain_values(self, start: int, stop: int, out: Array) -> None:
        def of_channel(channel: int, tile: _Sorted) -> Array:
            words, row = np.empty(len(tile.order), dtype=out.dtype), channel * self._period
            ToeplitzMatrix._plain_values(self, row + tile.first, row + tile.last, words)
            return words[tile.order]

        self._fill(start, stop, out, of_channel)

    def _fill(self, start: int, stop: int, out: Array, of_channel: Callable[[int, _Sorted], Array]) -> None:
        """Write what `of_channel` gives for each channel, in the order of its rows, where these stand."""
        channels, done = max(1, self._channels), 0
        step, end = max(1, SORTED_ENTRIES // max(1, self._channel.longest * channels)), -(-stop // channels)
        for first in range(start // channels, end, step):
            tile = self._sorted(first, min(first + step, end))
            entries = int(tile.counts.sum())  # of a channel
            block = np.empty(channels * entries, dtype=out.dtype)
            row, starts = np.repeat(np.arange(len(tile.counts)), tile.counts), np.cumsum(tile.counts) - tile.counts
            place = channels * starts[row] + np.arange(entries) - starts[row]  # of channel 0
            for channel in range(self._channels):
                block[place + channel * tile.counts[row]] = of_channel(channel, tile)
            skipped = self._plain_before(max(start, first * channels)) - self._plain_before(first * channels)
            part = block[skipped:][: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def _sorted(self, first: int, last: int) -> _Sorted:
        counts = self._channel.counts(np.arange(first, last))
        plain = np.empty(int(counts.sum()), dtype=np.int64)
        super()._plain_indices(first, last, plain)
        source, position = np.divmod(plain, max(1, self._column_positions))
        columns = position * (self._kernels.column_channels * self._kernels.groups) + source
        columns = np.where(plain == self._plain_columns, plain, columns) if self._has_bias_column else columns
        order = np.lexsort((columns, np.repeat(np.arange(last - first), counts)))
        return _Sorted(first, last, counts, columns[order], order)


MATRICES: dict[Order, type[ToeplitzMatrix]] = {"CHW": ToeplitzMatrix, "HWC": ChannelsLastMatrix}


def toeplitz(
    layers: Conv | Sequence[Conv] | Expression,
    input_size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    transpose: bool = False,
    affine: bool = False,
    order: Order = "CHW",
) -> ToeplitzMatrix:
    """Return the matrix of a layer, or of a chain, on inputs of that spatial size; see `ToeplitzMatrix`.

    Args:
        layers: a layer; or several, first to last, with every border as it is and their biases carried into one.
        input_size: spatial sizes of the input.
        dtype: of the values; the first layer's by default.
        transpose: make the matrix B for row vectors, x @ B, instead of T.
        affine: append the bias as T's last column.
        order: how inputs and outputs are flattened: "CHW", or "HWC" for channels last.

    Raises:
        UsageError: another order, or the layers cannot run on that input size.
        RefusedError: `dtype` doesn't hold the numbers.

    >>> import torch, convtool
    >>> kernel = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> layer = convtool.conv(kernel)
    >>> matrix = convtool.toeplitz(layer, (3, 3))
    >>> matrix
    ToeplitzMatrix(4 x 9, 16 entries, float32)
    >>> matrix.to_dense()[0]
    tensor([1., 2., 0., 3., 4., 0., 0., 0., 0.])
    >>> pair = convtool.toeplitz([convtool.conv(kernel, padding=1), layer], (2, 2))
    >>> x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    >>> pair @ x
    tensor([52., 54., 36., 41.])
    """
    if order not in MATRICES:
        raise UsageError(f"order: expected {' or '.join(MATRICES)}, got {order!r}")
    tree: Expression = Chain(tuple(layers)) if isinstance(layers, Sequence) else layers
    return MATRICES[order](tree, input_size, dtype=dtype, transpose=transpose, affine=affine)
