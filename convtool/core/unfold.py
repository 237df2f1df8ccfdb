"""The im2col form: the input gathered by the tap tables, so that a convolution becomes one matrix product.

In matrices, T = (W x I) @ U: W is the kernel, (C_out, C_in * prod(kernel_size)), I the identity over output positions,
x their Kronecker product, and U, the gather matrix, has a one in each row, or nothing where the tap reads padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from convtool.core.compose import in_groups
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.rows import Array, RowMatrix, Stretch, words
from convtool.core.taps import PADDED, tap_table
from convtool.errors import UsageError


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the im2col form, (N, C * prod(kernel_size), prod(output_size)), as torch's unfold, of any geometry.

    That is what every tap of every output position reads; zero where that is padding.

    Args:
        x: (N, C, *input_size)
        geometry: of the layer; its groups are not looked at.

    Raises:
        UsageError: the layer cannot run on that input.
    """
    axes = len(geometry.kernel_size)
    if x.dim() != axes + 2:
        raise UsageError(f"expected an input of shape (N, C, {axes} spatial sizes), got {tuple(x.shape)}")
    output_size = geometry.output_size(x.shape[2:])
    for number, axis in enumerate(geometry.axes):
        dim = 2 + 2 * number  # the axes before this one are (output, kernel) pairs by now
        table = torch.from_numpy(tap_table(axis, x.shape[dim]))  # (output, kernel)
        shape = (*x.shape[:dim], *table.shape, *x.shape[dim + 1 :])
        x = x.index_select(dim, table.clamp(min=0).flatten()).reshape(shape)
        if bool((table == PADDED).any()):
            mask = (table != PADDED).reshape(*table.shape, *(1,) * (x.dim() - dim - 2))
            x = torch.where(mask, x, torch.zeros((), dtype=x.dtype))
    outputs, kernels = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    columns = x.shape[1] * math.prod(geometry.kernel_size)
    return x.permute(0, 1, *kernels, *outputs).reshape(len(x), columns, math.prod(output_size))


def kernel_matrix(conv: Conv) -> Tensor:
    """Return W, (C_out, C_in * prod(kernel_size)), the kernel as a matrix, block diagonal where there are groups."""
    return in_groups(conv, 1).flatten(1)


class GatherMatrix(RowMatrix):
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
        self.geometry, self.dtype = geometry, dtype
        self.input_size, self.output_size = tuple(input_size), geometry.output_size(input_size)
        self._period, self._inputs = math.prod(self.output_size), math.prod(self.input_size)
        # What the rows of one channel read: the positions unfolded, counted from 1, as padding reads 0.
        positions = torch.arange(1, self._inputs + 1).reshape(1, 1, *self.input_size)
        self._read = unfold(positions, geometry).flatten().numpy() - 1  # PADDED where a tap reads padding
        self._ones_before = np.concatenate([[0], np.cumsum(self._read != PADDED)])  # ones in the rows before each
        self.shape = channels * len(self._read), channels * self._inputs
        self.nnz = channels * int(self._ones_before[-1])

    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Cut the rows where a tap ends."""
        while start < stop:
            last = min(stop, start - start % self._period + self._period)
            yield Stretch(start, last, (start, last), self.entries(start, last))
            start = last

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Yield each channel of rows start:stop, and what these read of the first one."""
        while start < stop:
            channel, first = divmod(start, len(self._read))
            read = self._read[first : first + stop - start]
            yield channel, read
            start += len(read)

    def _counts(self, start: int, stop: int) -> Array:
        """Return 1 for each row, or 0 where the tap reads padding."""
        parts = [(read != PADDED).astype(np.int64) for _, read in self._pieces(start, stop)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def _fill_indices(self, start: int, stop: int, out: Array) -> None:
        done = 0
        for channel, read in self._pieces(start, stop):
            live = read[read != PADDED]
            out[done : done + len(live)] = live + channel * self._inputs
            done += len(live)

    def _fill_values(self, start: int, stop: int, out: Array) -> None:
        out[:] = words(torch.ones(1, dtype=self.dtype))

    def _before(self, row: int) -> int:
        channel, first = divmod(row, len(self._read))
        return channel * int(self._ones_before[-1]) + int(self._ones_before[first])
