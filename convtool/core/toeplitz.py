"""The Toeplitz matrix of a convolution, or of several: T @ x.reshape(-1) == conv(x).reshape(-1), less the bias.

Rows are (output channel, output position), columns (input channel, input position), both row-major, which is
nn.Linear.weight's layout. Which columns a row has is read off the tap tables, an axis at a time, and is the same for
every output channel of a group; `convtool.core.tiles` has the rows of one channel as runs of a few templates. Here they
get their values and become a matrix, of which any range of rows can be made by itself. Most of it is copies of what
was made before, so it is made about as fast as memory is filled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression
from convtool.core.kernels import Order, kernels
from convtool.core.rounding import check_room, held
from convtool.core.rows import Array, RowMatrix, Stretch, words
from convtool.core.tiles import RUN_ENTRIES, ChannelRows, Run
from convtool.core.tree import Chain


class _Band(NamedTuple):
    """Row channels first:last at the same positions."""

    first: int
    last: int
    start: int
    stop: int


class ToeplitzMatrix(RowMatrix):
    """The matrix of layers at one input size; its size is known at once, its rows are made on demand.

    Args:
        layers: one, or chains and sums of them, every border as it is and the biases carried into one.
        input_size: spatial sizes of the input.
        dtype: of the values; the first weight's by default. Sums are formed in float64 and rounded once.
        transpose: make the matrix B for row vectors, x @ B, instead of T.
        affine: append the bias as T's last column (its last row with `transpose`), so that an input extended by a
            final 1 gives the layer's output, bias included.
        order: how inputs and outputs are flattened: "CHW", or "HWC" for channels last.

    Attributes:
        shape: (rows, columns).
        nnz: number of stored entries; every place that a live tap reaches counts, also where the weight is zero.

    Raises:
        UsageError: the layer cannot run on that input size.
        RefusedError: its numbers are complex and `dtype` isn't; or `dtype` doesn't hold them, or sums of them.
    """

    def __init__(
        self,
        layers: Expression,
        input_size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        transpose: bool = False,
        affine: bool = False,
        order: Order = "CHW",
    ) -> None:
        self._kernels = made = kernels(layers, tuple(input_size), transpose, order)
        self.layers, self.input_size, self.output_size = layers, tuple(input_size), made.output_size
        self.dtype = made.dtype if dtype is None else dtype
        check_room(made.dtype, self.dtype)
        self.transpose, self.affine, self.order = transpose, affine, order
        self._period = math.prod(made.row_size)  # each channel is like the first
        self._column_step = made.column_channels * math.prod(made.column_size)  # columns of one group
        self._has_bias_column = affine and not transpose
        self._channel = ChannelRows(made, bias_column=self._has_bias_column)
        self._longest = max(1, self._channel.longest)
        self._channel_values: tuple[tuple[int, int], Array] | None = None
        self._plain_rows, self._plain_columns = made.row_channels * self._period, self._column_step * made.groups
        self._last_apart = affine and transpose
        self.nnz = made.row_channels * self._channel.entries + self._last_apart * self._plain_columns
        self.shape = self._plain_rows + self._last_apart, self._plain_columns + self._has_bias_column

    @property
    def has_bias(self) -> bool:
        """Whether the layers have a bias."""
        return self._kernels.bias is not None

    @property
    def outputs(self) -> int:
        """How many outputs there are: the length of the bias."""
        return self._plain_columns if self.transpose else self._plain_rows

    @property
    def T(self) -> Self:  # noqa: N802
        """The matrix's transpose."""
        form: dict[str, Any] = {"dtype": self.dtype, "affine": self.affine, "order": self.order}
        return type(self)(self.layers, self.input_size, transpose=not self.transpose, **form)

    @cached_property
    def _bias(self) -> Tensor | None:
        """The layer's bias in the matrix's dtype, which has to hold it only where it is asked for."""
        bias = self._kernels.bias
        return None if bias is None else held(bias, self.dtype, "the matrix's bias")

    @property
    def bias(self) -> Tensor | None:
        """The bias as a vector over all outputs, in their order, or None where the layer has none."""
        return None if self._bias is None else self._bias_rows.flatten()

    def bias_part(self, start: int, stop: int) -> Tensor:
        """Return the bias of outputs start:stop, without making all of it; only of a layer that has one."""
        return self._bias_at(torch.arange(start, stop))

    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Cut the rows into stretches of about `RUN_ENTRIES` entries (one row at least)."""
        for (first, last, begin, end), runs in self._pieces(start, stop):
            groups = first // self._kernels.per_group, (last - 1) // self._kernels.per_group
            # Channels of one group have the same columns; where groups meet, it matters where in the piece they do.
            place = (*groups, last - first, first if groups[0] < groups[1] else None)
            columns = tuple((run.tile.shift, run.step, run.tiles, *run.look) for run in runs)
            looks = tuple((run.tiles, *run.look) for run in runs)
            bias = begin if self._has_bias_column and self._varying_bias else None
            rows = first * self._period + begin, (last - 1) * self._period + end
            yield Stretch(*rows, (*place, *columns), (first, last, bias, *looks))
        if self._reaches_bias(start, stop):
            yield Stretch(self._plain_rows, stop, None, None)

    def _counts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        if self._reaches_bias(start, stop):
            return np.append(self._counts(start, stop - 1), self._plain_columns)
        if stop - start > self._period:  # every channel is like the first
            channel = self._channel.counts(np.arange(self._period))
            return np.resize(np.roll(channel, -(start % self._period)), stop - start)
        return self._channel.counts(np.arange(start, stop, dtype=np.int64) % self._period)

    def _before(self, row: int) -> int:
        if row > self._plain_rows:
            return self.nnz
        channel, position = divmod(row, self._period)
        return channel * self._channel.entries + self._channel.entries_before(position)

    def _fill_indices(self, start: int, stop: int, out: Array) -> None:
        for band, target in self._targets(start, stop, out):
            offset = np.arange(band.first, band.last) // self._kernels.per_group * self._column_step  # (channels,)
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
        if self._reaches_bias(start, stop):
            out[len(out) - self._plain_columns :] = np.arange(self._plain_columns, dtype=out.dtype)

    def _fill_values(self, start: int, stop: int, out: Array) -> None:
        for band, target in self._targets(start, stop, out):
            values, runs = self._values(band.first, band.last), self._channel.runs(band.start, band.stop)
            together = max(1, RUN_ENTRIES // max(1, target.shape[1]))  # channels
            for first in range(0, len(target), together):
                self._fill_channels(runs, values[first : first + together], target[first : first + together])
            if self._has_bias_column:
                channel = torch.arange(band.first, band.last)[:, None] * self._period
                bias = self._bias_at(channel + torch.arange(band.start, band.stop))
                target[:, self._row_ends(band)] = words(bias)
        if self._reaches_bias(start, stop):
            out[len(out) - self._plain_columns :] = words(self._bias_rows.flatten())

    def _fill_channels(self, runs: list[Run], values: Array, out: Array) -> None:
        """Write the values of channels' runs: each tile gathered when it first comes up, and copied from then on."""
        made: dict[tuple[object, ...], Array] = {}  # (channels, entries) a tile of each look
        start = 0
        for run in runs:
            target = out[:, start : start + run.entries].reshape(len(out), run.tiles, -1)
            start += run.entries
            if run.look not in made:
                sources = self._channel.template(run, self._index).sources
                values.take(sources, axis=1, out=target[:, 0], mode="clip")
                made[run.look], target = target[:, 0], target[:, 1:]
            np.copyto(target, made[run.look][:, None])

    def _values(self, first: int, last: int) -> Array:
        """Return every value that can stand in rows of channels first:last.

        Of shape (channels, columns' channels * subsets), or one more: the place of the bias, which depends on the
        position.
        """
        kept = self._channel_values
        if kept is None or kept[0] != (first, last):
            values = held(self._kernels.values(first, last), self.dtype, "the matrix")
            values = F.pad(values, (0, 1)) if self._has_bias_column else values.contiguous()
            kept = self._channel_values = ((first, last), words(values))
        return kept[1]

    @property
    def _varying_bias(self) -> bool:
        """Whether the bias differs from position to position."""
        return self._kernels.bias is not None and self._kernels.bias.dim() > 1

    @cached_property
    def _bias_rows(self) -> Tensor:
        """The bias of every output, zero where there is none, row by row in the order of the outputs; a view."""
        positions = math.prod(self.output_size)
        bias = torch.zeros(1, dtype=self.dtype) if self._bias is None else self._bias
        grid = (bias if self._varying_bias else bias[:, None]).flatten(1)
        grid = grid.expand(self.outputs // max(1, positions), positions)
        return grid.T if self.order == "HWC" else grid

    def _bias_at(self, outputs: Tensor) -> Tensor:
        width = self._bias_rows.shape[1]
        return self._bias_rows[outputs // width, outputs % width]

    def _reaches_bias(self, start: int, stop: int) -> bool:
        """Return whether the biases' own row, behind those of channels, is among rows start:stop."""
        return start < stop and stop > self._plain_rows

    def _bands(self, start: int, stop: int) -> Iterator[_Band]:
        """Cut the rows of channels into what is left of the first channel, whole ones, and the rest."""
        stop = min(stop, self._plain_rows)
        while start < stop:
            channel, position = divmod(start, self._period)
            whole = 0 if position else (stop - start) // self._period
            last = channel + max(1, whole)
            end = self._period if whole else min(self._period, stop - channel * self._period)
            yield _Band(channel, last, position, end)
            start = (last - 1) * self._period + end

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[_Band, list[Run]]]:
        """Cut the bands at runs, and yield them with these: a few runs of one channel, or all runs of a few."""
        for band in self._bands(start, stop):
            runs = self._channel.runs(band.start, band.stop)
            together = RUN_ENTRIES // max(1, self._width(band.start, band.stop))  # channels
            for first in range(band.first, band.last, max(1, together)):
                if together:
                    yield band._replace(first=first, last=min(first + together, band.last)), runs
                    continue
                for run in runs:
                    yield _Band(first, first + 1, run.start, run.stop), [run]

    def _targets(self, start: int, stop: int, out: Array) -> Iterator[tuple[_Band, Array]]:
        """Yield the bands of rows start:stop, and where in `out` each is to be, (channels, entries)."""
        done = 0
        for band in self._bands(start, stop):
            channels, width = band.last - band.first, self._width(band.start, band.stop)
            yield band, out[done : done + channels * width].reshape(channels, width)
            done += channels * width

    def _width(self, start: int, stop: int) -> int:
        """Return the number of entries of positions start:stop in one channel."""
        return self._channel.entries_before(stop) - self._channel.entries_before(start)

    def _row_ends(self, band: _Band) -> npt.NDArray[np.int64]:
        """Return where in a channel of a band the last entry of each row is."""
        ends: npt.NDArray[np.int64] = np.cumsum(self._channel.counts(np.arange(band.start, band.stop))) - 1
        return ends


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
    tree: Expression = Chain(tuple(layers)) if isinstance(layers, Sequence) else layers
    return ToeplitzMatrix(tree, input_size, dtype=dtype, transpose=transpose, affine=affine, order=order)
