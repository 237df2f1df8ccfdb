"""`Conv`, the one value that every linear layer is lowered into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convtool.core.geometry import Geometry, format_sizes
from convtool.core.rounding import check_room, rounded
from convtool.errors import InputError, UsageError


@dataclass(frozen=True, slots=True, eq=False)
class Conv:
    """A convolution of any number of spatial axes: its numbers and where they read.

    Attributes:
        weight: (C_out, C_in/groups, *kernel), also where transposed: torch's other layout for transposed layers
            exists only where tensors enter and leave, in `lower_conv` and `torch_weight`.
        bias: (C_out,) or None; or a bias map (C_out, *output_size), one number for each output, which ties the layer to
            inputs that give outputs of that size.
        geometry: stride, padding, dilation, groups, padding mode, transposed, output padding.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    def __post_init__(self) -> None:
        if tuple(self.weight.shape[2:]) != self.geometry.kernel_size:
            raise UsageError(
                f"expected a kernel of {format_sizes(self.geometry.kernel_size)},"
                f" got a weight of shape {tuple(self.weight.shape)}"
            )
        if self.out_channels % self.geometry.groups:
            raise UsageError(
                f"groups: expected a divisor of the {self.out_channels} output channels, got {self.geometry.groups}"
            )
        if self.bias is None:
            return
        shape = tuple(self.bias.shape)
        if shape[:1] != (self.out_channels,) or len(shape) not in (1, 1 + self.spatial_axes):
            raise UsageError(f"expected a bias of shape ({self.out_channels},), got {shape}")

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.geometry.groups

    @property
    def spatial_axes(self) -> int:
        return self.weight.dim() - 2

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias that isn't zero throughout."""
        return self.bias is not None and bool(self.bias.count_nonzero())

    @property
    def has_bias_map(self) -> bool:
        """Whether the bias differs from output position to output position."""
        return self.bias is not None and self.bias.dim() > 1

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size; UsageError where the layer cannot run on that input."""
        size = self.geometry.output_size(input_size)
        if self.bias is not None and self.has_bias_map and tuple(self.bias.shape[1:]) != size:
            made_for = format_sizes(self.bias.shape[1:])
            raise UsageError(
                f"input size {format_sizes(input_size)} gives outputs of {format_sizes(size)},"
                f" and the layer's bias map was made for {made_for}"
            )
        return size

    def bias_over(self, output_size: Sequence[int]) -> Tensor | None:
        """The bias for every output, (C_out, *output_size), or None."""
        if self.bias is None or self.has_bias_map:
            return self.bias
        return self.bias.reshape(-1, *(1,) * self.spatial_axes).expand(-1, *output_size)

    def to(self, dtype: torch.dtype) -> Conv:
        """The same layer with its numbers rounded to `dtype`; RefusedError for complex numbers in a real dtype."""
        check_room(self.weight.dtype, dtype)
        bias = None if self.bias is None else rounded(self.bias, dtype)
        return Conv(rounded(self.weight, dtype), bias, self.geometry)

    def exact(self) -> Conv:
        """The same layer in float64 (complex128), in which all arithmetic is done."""
        return self.to(torch.complex128 if self.weight.is_complex() else torch.float64)

    def torch_weight(self) -> Tensor:
        """The weight in the layout of torch's modules: (C_in, C_out/groups, *kernel) where transposed."""
        return _swap_channels(self.weight, self.geometry.groups) if self.geometry.transposed else self.weight


def lower_conv(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Conv:
    """A `Conv` from the tensors of an nn.Conv or nn.ConvTranspose.

    Args:
        weight: (C_out, C_in/groups, *kernel); (C_in, C_out/groups, *kernel) where `geometry.transposed`.
        bias: (C_out,) or None.

    Raises:
        UsageError: the tensors don't fit the geometry.
    """
    if weight.dim() < 2:
        raise UsageError(f"expected a convolution's weight of at least 2 axes, got shape {tuple(weight.shape)}")
    if geometry.transposed:
        if weight.shape[0] % geometry.groups:
            raise UsageError(
                f"groups: expected a divisor of the {weight.shape[0]} input channels, got {geometry.groups}"
            )
        weight = _swap_channels(weight, geometry.groups)
    return Conv(weight, bias, geometry)


def lower_linear(weight: Tensor, bias: Tensor | None, axes: int = 0) -> Conv:
    """A linear layer as the 1x1 convolution over `axes` spatial axes that it is at every position.

    Args:
        weight: (C_out, C_in)
        bias: (C_out,) or None
    """
    if weight.dim() != 2:
        raise UsageError(f"expected a linear layer's weight of 2 axes, got shape {tuple(weight.shape)}")
    return Conv(weight.reshape(*weight.shape, *(1,) * axes), bias, pointwise(axes))


def lower_batch_norm(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axes: int,
) -> Conv:
    """A batch norm in eval mode as the depthwise 1x1 convolution that it is.

    y = (x - mean) / sqrt(variance + eps) * weight + bias, a missing weight being 1 and a missing bias 0.

    Args:
        mean, variance: (C,) running statistics.
        weight, bias: (C,) or None (affine=False).
        eps: as the module's, added to the variance.
        axes: number of spatial axes of the layer's input.

    Returns:
        float64 Conv with C groups, whatever the dtype of the tensors.

    Raises:
        InputError: a variance + eps that isn't positive, which no trained batch norm has.
    """
    exact = [None if t is None else t.to(torch.float64) for t in (mean, variance, weight, bias)]
    shift, spread, gain, offset = exact
    assert shift is not None
    assert spread is not None
    lowest = float((spread + eps).min()) if spread.numel() else 1.0
    if not lowest > 0:
        raise InputError(
            f"batch norm: expected running_var + eps above 0, got {lowest:g} (eps {eps:g}); the statistics are damaged"
        )
    scale = (torch.ones_like(spread) if gain is None else gain) / torch.sqrt(spread + eps)
    moved = -shift * scale if offset is None else offset - shift * scale
    channels = scale.shape[0]
    return Conv(scale.reshape(channels, 1, *(1,) * axes), moved, pointwise(axes, groups=channels))


def pointwise(axes: int, groups: int = 1) -> Geometry:
    """The geometry of a 1x1 layer over `axes` spatial axes."""
    return Geometry.of((1,) * axes, groups=groups)


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    """(groups*A, B, *kernel) <-> (groups*B, A, *kernel), group by group; its own inverse."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, A, B, *kernel)
    return grouped.transpose(1, 2).flatten(0, 1)
