"""The im2col form: the input gathered by the tap tables, so that a convolution becomes one matrix product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convtool.core.geometry import Geometry
from convtool.core.taps import PADDED, tap_table
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
