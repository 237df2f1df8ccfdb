"""Linear layers that hold no tensors, as the convolutions that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convtool.core.conv import Conv, pointwise
from convtool.core.geometry import Geometry, Padding, PerAxis, per_axis
from convtool.errors import RefusedError, UsageError

MOST_NUMBERS = 1 << 28  # of a kernel that is written in a few characters and stored nowhere: 2 GiB in float64


def identity(channels: int, axes: int) -> Conv:
    """The layer that changes nothing."""
    return scale(torch.ones(channels, dtype=torch.float64), axes)


def scale(factors: Tensor, axes: int, offsets: Tensor | None = None) -> Conv:
    """y[c] = factors[c] * x[c] + offsets[c]: a depthwise 1x1 convolution.

    Args:
        factors: (C,)
        axes: number of spatial axes.
        offsets: (C,) or None.
    """
    channels = factors.shape[0]
    return Conv(factors.reshape(channels, 1, *(1,) * axes), offsets, pointwise(axes, groups=channels))


def average_pool(
    channels: int,
    axes: int,
    kernel_size: PerAxis,
    *,
    stride: PerAxis | None = None,
    padding: Padding = 0,
    count_include_pad: bool = True,
) -> Conv:
    """nn.AvgPool as a depthwise convolution; its stride is the kernel size by default.

    Raises:
        RefusedError: padded zeros that don't count: then the divisor changes at the border, and no convolution does.
    """
    kernel = per_axis("kernel_size", kernel_size, axes, least=1)
    geometry = Geometry.of(kernel, stride=kernel if stride is None else stride, padding=padding, groups=channels)
    if geometry.padded and not count_include_pad:
        raise RefusedError(
            "an average pooling with padding and count_include_pad=False divides by less at the border, which no"
            " convolution does"
        )
    check_numbers(channels * math.prod(kernel), "avg_pool")
    weight = torch.full((channels, 1, *kernel), 1.0 / math.prod(kernel), dtype=torch.float64)
    return Conv(weight, None, geometry)


def nearest_upsample(channels: int, axes: int, factor: PerAxis) -> Conv:
    """nn.Upsample(mode='nearest') by whole factors: a transposed depthwise convolution of ones, kernel = stride."""
    factors = per_axis("factor", factor, axes, least=1)
    geometry = Geometry.of(factors, stride=factors, groups=channels, transposed=True)
    check_numbers(channels * math.prod(factors), "upsample")
    return Conv(torch.ones(channels, 1, *factors, dtype=torch.float64), None, geometry)


def zero_pad(channels: int, axes: int, padding: Padding) -> Conv:
    """nn.ZeroPad (F.pad with zeros): an identity that pads."""
    geometry = Geometry.of((1,) * axes, padding=padding, groups=channels)
    return Conv(torch.ones(channels, 1, *(1,) * axes, dtype=torch.float64), None, geometry)


def check_numbers(count: int, layer: str) -> None:
    """UsageError where a layer without tensors would need a kernel of more numbers than anyone means."""
    if count > MOST_NUMBERS:
        raise UsageError(f"{layer}: a kernel of {count} numbers is more than the {MOST_NUMBERS} that are built")


def linear_after_flatten(weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> Conv:
    """A linear layer behind nn.Flatten as the convolution whose kernel is the whole feature map.

    Args:
        weight: (C_out, C * prod(size))
        bias: (C_out,) or None
        size: spatial sizes of the feature map that is flattened.

    Raises:
        UsageError: the weight's columns aren't a multiple of the feature map's positions.
    """
    positions = math.prod(size)
    if weight.dim() != 2 or weight.shape[1] % positions:
        raise UsageError(
            f"a linear weight of shape {tuple(weight.shape)} doesn't follow the flattening of a feature map of"
            f" {positions} positions"
        )
    return Conv(weight.reshape(weight.shape[0], -1, *size), bias, Geometry.of(tuple(size)))
