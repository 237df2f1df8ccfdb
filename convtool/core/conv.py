"""`Conv`, the one value that every linear layer is lowered into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convtool.core.geometry import Geometry, Padding, PerAxis, format_sizes
from convtool.core.rounding import check_room, dtype_name, exact_dtype, rounded
from convtool.errors import UsageError

MOST_NUMBERS = 1 << 28  # of a kernel that is written in a few characters and stored nowhere: 2 GiB in float64


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        kind = dtype_name(self.weight.dtype)
        bias = "no bias" if self.bias is None else "a bias map" if self.has_bias_map else "bias"
        channels = f"{self.in_channels} -> {self.out_channels} channels"
        return f"{type(self).__name__}({channels}, {self.geometry.describe()}, {kind}, {bias})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the weight's."""
        return tuple(self.weight.shape)

    @property
    def out_channels(self) -> int:
        return self.shape[0]

    @property
    def in_channels(self) -> int:
        return self.shape[1] * self.geometry.groups

    @property
    def spatial_axes(self) -> int:
        return len(self.shape) - 2

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers."""
        return self.weight.dtype

    @property
    def only_scales(self) -> bool:
        """Return whether each output is one input times a number: a depthwise 1x1 layer, as a batch norm is."""
        geometry = self.geometry
        plain = set(geometry.kernel_size) <= {1} and set(geometry.stride) <= {1} and not geometry.padded
        return plain and not geometry.transposed and geometry.groups == self.in_channels == self.out_channels

    @property
    def has_bias(self) -> bool:
        """Return whether there is a bias that isn't zero throughout."""
        if self.bias is None:
            return False
        bias = self.bias if self.bias.element_size() > 1 else self.bias.to(torch.float32)  # float8 knows no counting
        return bool(bias.count_nonzero())

    @property
    def has_bias_map(self) -> bool:
        """Return whether the bias differs from output position to output position."""
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

    def rows(self, first: int, last: int) -> Tensor:
        """Return the weight's rows first:last, of those output channels."""
        return self.weight[first:last]

    def with_geometry(self, geometry: Geometry) -> Conv:
        """Return the layer with another geometry and the same numbers."""
        return Conv(self.weight, self.bias, geometry)

    def without_bias(self) -> Conv:
        """Return the linear part of the layer."""
        return self if self.bias is None else Conv(self.weight, None, self.geometry)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Conv:
        """Return the layer with its weight and its bias changed."""
        return Conv(change(self.weight), None if self.bias is None else change(self.bias), self.geometry)

    def absolute(self) -> Conv:
        """Return the layer of the absolute values, which bounds what rounding does to this one's sums."""
        return self.changed(torch.abs)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Conv:
        """Return the layer with its numbers rounded to `dtype`; RefusedError for complex numbers in a real dtype."""
        check_room(self.dtype, dtype)
        return self.changed(lambda numbers: rounded(numbers, dtype).to(device))

    def exact(self) -> Conv:
        """Return the layer in float64 (complex128), in which all arithmetic is done."""
        return self.to(exact_dtype(self.dtype))

    def torch_weight(self) -> Tensor:
        """Return the weight in the layout of torch's modules: (C_in, C_out/groups, *kernel) where transposed."""
        return swap_channels(self.weight, self.geometry.groups) if self.geometry.transposed else self.weight


class Computed(Conv):
    """A layer whose weight is computed each time that it is asked for, of numbers that take much less room."""

    __slots__ = ("compute", "numbers", "sizes")
    compute: Callable[[], Tensor]
    sizes: tuple[int, ...]
    numbers: torch.dtype

    def __init__(self, like: Conv, compute: Callable[[], Tensor], geometry: Geometry | None = None) -> None:
        values = {"compute": compute, "sizes": like.shape, "numbers": like.dtype, "bias": like.bias}
        for name, value in (values | {"geometry": geometry or like.geometry}).items():
            object.__setattr__(self, name, value)

    @property
    def weight(self) -> Tensor:
        return self.compute()

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def with_geometry(self, geometry: Geometry) -> Conv:
        return Computed(self, self.compute, geometry)


class Scaled(Computed):
    """A layer with each output channel multiplied by a number, row by row when asked for: what batch norms make.

    Args:
        layer: whose weight is multiplied.
        factors: (C_out,), in float64 or complex128, as the result is.
        bias: of the result.
    """

    __slots__ = ("factors", "layer")
    layer: Conv
    factors: Tensor

    def __init__(self, layer: Conv, factors: Tensor, bias: Tensor | None) -> None:
        super().__init__(layer, lambda: self.rows(0, len(factors)))
        for name, value in (("layer", layer), ("factors", factors), ("numbers", factors.dtype), ("bias", bias)):
            object.__setattr__(self, name, value)

    def rows(self, first: int, last: int) -> Tensor:
        factors = self.factors[first:last].reshape(-1, *(1,) * (len(self.shape) - 1))
        return self.layer.rows(first, last).to(factors.dtype).mul(factors)


def conv(
    weight: Tensor | Conv,
    bias: Tensor | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: PerAxis = 0,
) -> Conv:
    """Return a `Conv` from the tensors of an nn.Conv (nn.ConvTranspose where `transposed`) and its fields.

    Args:
        weight: as torch lays it out: (C_out, C_in/groups, *kernel), or (C_in, C_out/groups, *kernel) transposed. Or a
            module of a known kind, and nothing else.
        bias: (C_out,) or None.
        stride, dilation, output_padding: an int, or one int per spatial axis.
        padding: an int; an int or a pair (before, after) per axis; 'same'; 'half'.
        groups, padding_mode, transposed: as in torch.

    Raises:
        UsageError: a field is out of range, or doesn't fit the weight.
    """
    fields: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    fields |= {"padding_mode": padding_mode, "transposed": transposed, "output_padding": output_padding}
    if isinstance(weight, Conv):
        if bias is not None or Geometry.of((1,), **fields) != pointwise(1):
            raise UsageError("conv: a module says itself what its bias and its fields are; pass it alone")
        return weight
    geometry = Geometry.of(tuple(weight.shape[2:]), **fields)
    return lower_conv(weight, bias, geometry)


def lower_conv(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Conv:
    """Return a `Conv` from the tensors of an nn.Conv or nn.ConvTranspose.

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
        weight = swap_channels(weight, geometry.groups)
    return Conv(weight, bias, geometry)


def pointwise(axes: int, groups: int = 1) -> Geometry:
    """Return the geometry of a 1x1 layer over `axes` spatial axes."""
    return Geometry.of((1,) * axes, groups=groups)


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Swap output and input channels, (groups*A, B, *kernel) <-> (groups*B, A, *kernel); its own inverse."""
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])  # (groups, A, B, *kernel)
    return grouped.transpose(1, 2).flatten(0, 1)
