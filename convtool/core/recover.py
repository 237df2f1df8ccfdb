"""The same map as another kind of layer: a convolution as a linear layer, a linear layer as a convolution.

A convolution whose kernel is its stride reads patches that don't overlap; on each it is a linear layer. At one input
size any convolution is a linear layer, whose weight is its Toeplitz matrix. The other way round, a weight is taken for
a Toeplitz matrix, and the kernel that comes nearest to it is its least-squares solution: each kernel entry is the mean
of all places where the matrix has it (where padding sums taps up, the solution of the normal equations, which factor
into one small system per axis).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Geometry, format_sizes
from convtool.core.rounding import exact_dtype
from convtool.core.taps import PADDED, AxisSlots, axis_slots, tap_table, taps_read
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import RefusedError, UsageError


@dataclass(frozen=True, slots=True)
class Residual:
    """How far a weight is from the matrix of the convolution that comes nearest to it.

    Attributes:
        largest: |weight - matrix|, at most, over all entries.
        where: (row, column) of that entry.
        scale: the largest |weight|.
        unmet: kernel entries that no input of this size meets; they are set to zero.
        relative: the largest difference relative to the largest weight.
    """

    largest: float
    where: tuple[int, int]
    scale: float
    unmet: int
    relative: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "relative", self.largest / self.scale if self.scale else self.largest)


def patches_to_linear(conv: Conv) -> Tensor:
    """(C_out, C_in * prod(kernel_size)): the weight of the linear layer that a patch convolution is on each patch.

    Raises:
        RefusedError: the layer's windows overlap, leave gaps, or are padded; or it has groups, whose linear layer would
            be mostly zeros.
    """
    geometry = conv.geometry
    axes = geometry.axes
    if not axes or geometry.transposed:
        raise RefusedError(
            f"a patch convolution is expected, a plain one with kernel = stride; got {conv.geometry.describe()}"
        )
    if any(axis.kernel != axis.stride or (axis.kernel > 1 and axis.dilation > 1) for axis in axes) or geometry.padded:
        raise RefusedError(
            f"expected kernel = stride, no padding, no dilation, as of a patch embedding; got {geometry.describe()},"
            " whose windows are no patches; --as-toeplitz writes any convolution for one input size"
        )
    if geometry.groups != 1:
        raise RefusedError(f"groups {geometry.groups}: as a linear layer it would be mostly zeros; it is left as it is")
    if conv.has_bias_map:
        raise RefusedError("a bias map belongs to one input size, and a linear layer over patches to none")
    return conv.weight.flatten(1)


def matrix_to_conv(
    weight: Tensor, bias: Tensor | None, geometry: Geometry, input_size: Sequence[int]
) -> tuple[Conv, Residual]:
    """Find the convolution whose matrix comes nearest to a linear layer's weight, and how near that is.

    Args:
        weight: (C_out * prod(output_size), C_in * prod(input_size))
        bias: (C_out * prod(output_size),) or None. One that isn't the same all over a channel becomes a bias map.
        geometry: of the convolution.
        input_size: spatial sizes of what was flattened.

    Returns:
        The layer, in the weight's dtype, and the residual, which is zero for a matrix that was written exactly.

    Raises:
        UsageError: the weight's shape doesn't fit the geometry.
    """
    size, output_size = tuple(input_size), geometry.output_size(input_size)
    positions, inputs = math.prod(output_size), math.prod(size)
    rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
    groups = geometry.groups
    if rows % (positions * groups) or columns % (inputs * groups) or not rows * columns:
        raise UsageError(
            f"a weight of shape {tuple(weight.shape)} isn't the matrix of a convolution ({geometry.describe()}) from"
            f" {format_sizes(size)} to {format_sizes(output_size)}: expected multiples of {positions * groups}"
            f" rows and {inputs * groups} columns"
        )
    slots = [axis_slots(tap_table(axis, length)) for axis, length in zip(geometry.axes, size, strict=True)]
    blocks = weight.reshape(groups, rows // groups, groups, columns // groups)
    kernel = torch.cat([_kernel(blocks[g, :, g], slots, output_size, size) for g in range(groups)]).to(weight.dtype)
    conv = Conv(kernel, _bias(bias, output_size), geometry)
    met, taps = taps_read(geometry, size)
    unmet = (taps - met) * kernel.shape[0] * kernel.shape[1]
    return conv, _residual(weight, conv, size, unmet)


def _kernel(block: Tensor, slots: list[AxisSlots], output_size: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """(C_out, C_in, *kernel) in float64 (complex128): least squares for one group's block of the matrix."""
    exact, axes = exact_dtype(block.dtype), len(size)
    outer, inner = block.shape[0] // math.prod(output_size), block.shape[1] // math.prod(size)
    kernels = []
    for part in block.reshape(outer, -1, block.shape[1]):  # a channel at a time: less memory
        entries = part.to(exact).reshape(*output_size, inner, *size)
        for number, axis in enumerate(slots):
            entries = _gather_axis(entries, number, axes, axis)
        kernels.append(entries)
    return torch.stack(kernels)  # (C_out, C_in, *kernel)


def _gather_axis(entries: Tensor, number: int, axes: int, axis: AxisSlots) -> Tensor:
    """One axis's output and input positions become its kernel entries.

    The output axis of this spatial axis is the first one (those before are done and gone), its input axis the first
    behind the channels; the kernel axis comes last.
    """
    left = axes - number  # output axes still there
    output, slot = (axis.columns != PADDED).nonzero()
    moved = entries.movedim(left + 1, 1)  # (output, input, other outputs, C_in, other inputs, kernels done)
    picked = moved[output, axis.columns[output, slot]]  # (slots in use, ...)
    subset = torch.from_numpy(axis.subsets[output, slot])
    members = torch.from_numpy(axis.members).to(entries.dtype)  # (subsets, kernel)
    # Each tap as the first place has it where it stands alone, and the least squares of what that leaves: nothing where
    # they are all the same, so that a mean's rounding doesn't come into it.
    alone = subset < members.shape[1]
    first = picked.new_zeros(members.shape[1], *picked.shape[1:])
    first[subset[alone].flip(0)] = picked[alone].flip(0)
    rest = picked - torch.tensordot(members, first, dims=1)[subset]
    totals = rest.new_zeros(len(members), *rest.shape[1:]).index_add_(0, subset, rest)
    counts = torch.bincount(subset, minlength=len(members))
    gram = members.T @ (counts[:, None] * members)  # (kernel, kernel)
    solved = torch.tensordot(torch.linalg.pinv(gram, hermitian=True) @ members.T, totals, dims=1)
    kernel_last: Tensor = (first + solved).movedim(0, -1)
    return kernel_last


def _bias(bias: Tensor | None, output_size: tuple[int, ...]) -> Tensor | None:
    """(C_out,) where each channel has one, else (C_out, *output_size)."""
    if bias is None:
        return None
    channels = bias.reshape(-1, math.prod(output_size))
    same = bool((channels == channels[:, :1]).all())
    return channels[:, 0].clone() if same else bias.reshape(-1, *output_size)


def _residual(weight: Tensor, conv: Conv, size: tuple[int, ...], unmet: int) -> Residual:
    matrix = ToeplitzMatrix(conv, size)
    largest, where, scale = -1.0, (0, 0), 0.0
    step = max(1, (1 << 20) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        block = weight[start:stop]
        exact = exact_dtype(block.dtype)
        difference = (block.to(exact) - matrix.dense_rows(start, stop).to(exact)).abs()
        scale = max(scale, float(block.abs().max()))
        if float(difference.max()) > largest:
            largest = float(difference.max())
            row, column = divmod(int(difference.argmax()), weight.shape[1])
            where = start + row, column
    return Residual(largest, where, scale, unmet)
