"""The im2col form: the input gathered by the tap tables, so that a convolution becomes one matrix product.

In matrices, T = (W x I) @ U: W is the kernel, (C_out, C_in * prod(kernel_size)), I the identity over output positions,
x their Kronecker product, and U, the gather matrix, has a one in each row, or nothing where the tap reads padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.taps import PADDED, tap_table
from convtool.core.toeplitz import CsrBlock, Stretch, index_dtype
from convtool.errors import UsageError


def gather_taps(x: Tensor, geometry: Geometry) -> Tensor:
    """What every tap of every output position reads.

    Args:
        x: (N, C, *input_size)
        geometry: of the layer; its groups are not looked at.

    Returns:
        (N, C, *output_size, *kernel_size), padded taps zero.
    """
    axes = len(geometry.kernel_size)
    if x.dim() != axes + 2:
        raise UsageError(f"expected an input of shape (N, C, {axes} spatial sizes), got {tuple(x.shape)}")
    geometry.output_size(x.shape[2:])
    for number, axis in enumerate(geometry.axes):
        dim = 2 + 2 * number  # the axes before this one are (output, kernel) pairs by now
        table = torch.from_numpy(tap_table(axis, x.shape[dim]))  # (output, kernel)
        shape = (*x.shape[:dim], *table.shape, *x.shape[dim + 1 :])
        x = x.index_select(dim, table.clamp(min=0).flatten()).reshape(shape)
        if bool((table == PADDED).any()):
            mask = (table != PADDED).reshape(*table.shape, *(1,) * (x.dim() - dim - 2))
            x = torch.where(mask, x, torch.zeros((), dtype=x.dtype))
    outputs, kernels = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return x.permute(0, 1, *outputs, *kernels)


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """im2col: (N, C * prod(kernel_size), prod(output_size)), as torch.nn.functional.unfold, for any geometry.

    Args:
        x: (N, C, *input_size)

    Raises:
        UsageError: the layer cannot run on that input.
    """
    axes = len(geometry.kernel_size)
    taps = gather_taps(x, geometry)  # (N, C, *output_size, *kernel_size)
    order = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    outputs = math.prod(taps.shape[2 : 2 + axes])
    return taps.permute(order).reshape(x.shape[0], -1, outputs)


def kernel_matrix(conv: Conv) -> Tensor:
    """W, (C_out, C_in * prod(kernel_size)): the kernel as a matrix, block diagonal where there are groups."""
    groups = conv.geometry.groups
    flat = conv.weight.flatten(1)  # (C_out, C_in/groups * prod(kernel_size))
    if groups == 1:
        return flat
    blocks: Tensor = torch.block_diag(*flat.chunk(groups))
    return blocks


class GatherMatrix:
    """U: what each tap of each output position reads, as a matrix whose rows are made on demand.

    Rows are (input channel, tap, output position), columns (input channel, input position), all row-major:
    U @ x.reshape(-1) is unfold(x) of one input, flattened.

    Args:
        geometry: of the layer; its groups are not looked at.
        channels: input channels of the layer.
        input_size: spatial sizes of its input.
        dtype: of the ones.

    Attributes:
        shape: (C_in * prod(kernel_size) * prod(output_size), C_in * prod(input_size)).
        nnz: number of ones.

    Raises:
        UsageError: the layer cannot run on that input size.
    """

    def __init__(
        self, geometry: Geometry, channels: int, input_size: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        self.geometry = geometry
        self.dtype = dtype
        self.input_size = tuple(input_size)
        self.output_size = geometry.output_size(input_size)
        self._tables = [
            tap_table(axis, size) for axis, size in zip(geometry.axes, self.input_size, strict=True)
        ]  # (output, kernel) each
        self._positions, self._inputs = math.prod(self.output_size), math.prod(self.input_size)
        self._taps = list(itertools.product(*(range(size) for size in geometry.kernel_size)))
        self.shape = channels * len(self._taps) * self._positions, channels * self._inputs
        live = [(table != PADDED).sum(0) for table in self._tables]  # (kernel,) each
        self._live = [math.prod(int(one[t]) for one, t in zip(live, tap, strict=True)) for tap in self._taps]
        self._before = [0, *itertools.accumulate(self._live)]
        self.nnz = channels * self._before[-1]
        self._made: tuple[int, Tensor] | None = None

    @property
    def index_dtype(self) -> torch.dtype:
        """int32 wherever it reaches, int64 only where it doesn't."""
        return index_dtype(max(self.nnz, *self.shape))

    def entries(self, start: int, stop: int) -> int:
        """The number of ones in rows start:stop."""
        self._check_rows(start, stop)
        return self._entries_before(stop) - self._entries_before(start)

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Rows start:stop cut where a tap ends."""
        self._check_rows(start, stop)
        for number, first, last in self._pieces(start, stop):
            channel, tap = divmod(number, len(self._taps))
            row = number * self._positions
            yield Stretch(row + first, row + last, (channel, tap, first, last), self.entries(row + first, row + last))

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form."""
        return CsrBlock(self.row_counts(start, stop), self.indices(start, stop), self.values(start, stop))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense (stop - start, columns) tensor."""
        counts, columns, values = self.rows(start, stop)
        out = torch.zeros(stop - start, self.shape[1], dtype=self.dtype)
        out[torch.repeat_interleave(torch.arange(stop - start), counts), columns.long()] = values
        return out

    def row_counts(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64: 1, or 0 where the tap reads padding."""
        self._check_rows(start, stop)
        parts = [(self._read(number)[first:last] != PADDED).long() for number, first, last in self._pieces(start, stop)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def indices(self, start: int, stop: int) -> Tensor:
        """(entries,) the columns of rows start:stop."""
        self._check_rows(start, stop)
        parts = [torch.zeros(0, dtype=self.index_dtype)]
        for number, first, last in self._pieces(start, stop):
            read = self._read(number)[first:last]
            channel = number // len(self._taps)
            parts.append((read[read != PADDED] + channel * self._inputs).to(self.index_dtype))
        return torch.cat(parts)

    def values(self, start: int, stop: int) -> Tensor:
        """(entries,) ones."""
        return torch.ones(self.entries(start, stop), dtype=self.dtype)

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(number of channel and tap, first, last position) of rows start:stop."""
        while start < stop:
            number, first = divmod(start, self._positions)
            last = min(self._positions, first + stop - start)
            yield number, first, last
            start += last - first

    def _read(self, number: int) -> Tensor:
        """(prod(output_size),) int64: the position of the first channel that a tap reads, or PADDED."""
        tap = number % len(self._taps)
        if self._made is None or self._made[0] != tap:
            position, live = np.zeros((), dtype=np.int64), np.ones((), dtype=bool)
            for table, t, size in zip(self._tables, self._taps[tap], self.input_size, strict=True):
                column = table[:, t]
                position = position[..., None] * size + column
                live = live[..., None] & (column != PADDED)
            self._made = tap, torch.from_numpy(np.where(live, position, PADDED).reshape(-1))
        return self._made[1]

    def _entries_before(self, row: int) -> int:
        number, position = divmod(row, self._positions)
        channel, tap = divmod(number, len(self._taps))
        within = int((self._read(number)[:position] != PADDED).sum()) if position else 0
        return channel * self._before[-1] + self._before[tap] + within
