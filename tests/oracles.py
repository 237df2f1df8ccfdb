"""What everything is compared with: nested loops from the definitions, too slow to be wrong.

Nothing of convtool is used here but the values themselves: a `Conv`'s tensors, a `Geometry`'s fields.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from convtool.core.conv import Conv
from convtool.core.geometry import Axis

Array: TypeAlias = npt.NDArray[Any]

NOTHING = -1  # stands in a padded line where a zero was put


def padded_line(axis: Axis, size: int) -> list[int]:
    """The input positions of one axis written down side by side with its padding around them."""
    line = list(range(size))
    if axis.padding_mode == "zeros":
        return [NOTHING] * axis.before + line + [NOTHING] * axis.after
    if axis.padding_mode == "replicate":
        return [line[0]] * axis.before + line + [line[-1]] * axis.after
    if axis.padding_mode == "circular":
        return line[size - axis.before :] + line + line[: axis.after]
    if axis.padding_mode == "symmetric":
        return line[: axis.before][::-1] + line + line[size - axis.after :][::-1]
    front = [line[number] for number in range(axis.before, 0, -1)]
    back = [line[size - 1 - number] for number in range(1, axis.after + 1)]
    return front + line + back


def axis_taps(axis: Axis, size: int) -> list[list[int]]:
    """For each output position the input position that each tap reads, or `NOTHING`."""
    if axis.transposed:
        return _axis_taps_transposed(axis, size)
    line = padded_line(axis, size)
    rows = []
    start = 0
    while start + axis.dilation * (axis.kernel - 1) < len(line):
        rows.append([line[start + tap * axis.dilation] for tap in range(axis.kernel)])
        start += axis.stride
    return rows


def _axis_taps_transposed(axis: Axis, size: int) -> list[list[int]]:
    """Every input position puts its taps down; what comes to lie in the padding is cut off."""
    longest = (size - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1 + axis.output_padding
    rows = [[NOTHING] * axis.kernel for _ in range(longest)]
    for position in range(size):
        for tap in range(axis.kernel):
            rows[position * axis.stride + tap * axis.dilation][tap] = position
    return rows[axis.before : longest - axis.after]


def convolve(conv: Conv, x: Array) -> Array:
    """The layer's output, in x's dtype.

    Args:
        x: (C_in, *input_size) or, for several inputs at once, (C_in, *input_size, batch).

    Returns:
        (C_out, *output_size) or (C_out, *output_size, batch)
    """
    return _scatter(conv, x) if conv.geometry.transposed else _gather(conv, x)


def _gather(conv: Conv, x: Array) -> Array:
    geometry, weight = conv.geometry, conv.weight.numpy()
    axes = len(geometry.kernel_size)
    tables = [axis_taps(axis, size) for axis, size in zip(geometry.axes, x.shape[1 : 1 + axes], strict=True)]
    columns, rows = x.shape[0] // geometry.groups, weight.shape[0] // geometry.groups
    out = np.zeros((weight.shape[0], *(len(table) for table in tables), *x.shape[1 + axes :]), dtype=x.dtype)
    for place in itertools.product(*(range(len(table)) for table in tables)):
        for tap in itertools.product(*(range(kernel) for kernel in geometry.kernel_size)):
            source = [table[o][t] for table, o, t in zip(tables, place, tap, strict=True)]
            if NOTHING in source:
                continue
            for channel in range(weight.shape[0]):
                for column in range(columns):
                    read = x[(channel // rows * columns + column, *source)]
                    out[(channel, *place)] += weight[(channel, column, *tap)] * read
    return _with_bias(conv, out)


def _scatter(conv: Conv, x: Array) -> Array:
    geometry, weight = conv.geometry, conv.weight.numpy()
    axes = len(geometry.kernel_size)
    sizes = x.shape[1 : 1 + axes]
    columns, rows = x.shape[0] // geometry.groups, weight.shape[0] // geometry.groups
    full = [
        (size - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1 + axis.output_padding
        for axis, size in zip(geometry.axes, sizes, strict=True)
    ]
    out = np.zeros((weight.shape[0], *full, *x.shape[1 + axes :]), dtype=x.dtype)
    for source in itertools.product(*(range(size) for size in sizes)):
        for tap in itertools.product(*(range(kernel) for kernel in geometry.kernel_size)):
            target = [
                i * axis.stride + t * axis.dilation for axis, i, t in zip(geometry.axes, source, tap, strict=True)
            ]
            for channel in range(weight.shape[0]):
                for column in range(columns):
                    read = x[(channel // rows * columns + column, *source)]
                    out[(channel, *target)] += weight[(channel, column, *tap)] * read
    crop = [slice(axis.before, length - axis.after) for axis, length in zip(geometry.axes, full, strict=True)]
    return _with_bias(conv, out[(slice(None), *crop)])


def _with_bias(conv: Conv, out: Array) -> Array:
    if conv.bias is not None:
        for channel in range(out.shape[0]):
            out[channel] += conv.bias[channel].item()
    return out


def toeplitz(conv: Conv, size: Sequence[int]) -> Array:
    """The matrix, dense: what the layer without its bias makes of every basis vector."""
    elements = conv.in_channels * math.prod(size)
    basis = np.eye(elements).reshape(conv.in_channels, *size, elements)
    return convolve(Conv(conv.weight, None, conv.geometry), basis).reshape(-1, elements)


def run_layers(layers: Sequence[Conv], x: Array) -> Array:
    """One layer after the other: what a composition has to equal."""
    for layer in layers:
        x = convolve(layer, x)
    return x


def batch_norm(x: Array, mean: Array, variance: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """A batch norm in eval mode, x being (C, ...)."""
    out = np.empty_like(x)
    for channel in range(len(x)):
        out[channel] = (x[channel] - mean[channel]) / math.sqrt(variance[channel] + eps)
        if weight is not None:
            out[channel] *= weight[channel]
        if bias is not None:
            out[channel] += bias[channel]
    return out


def matrix_entries(conv: Conv, size: Sequence[int]) -> int:
    """How many entries the matrix has: DESIGN section 3.1, columns that several taps share counted once."""
    entries = conv.out_channels * (conv.in_channels // conv.geometry.groups)
    for axis, length in zip(conv.geometry.axes, size, strict=True):
        entries *= sum(len(set(row) - {NOTHING}) for row in axis_taps(axis, length))
    return entries
