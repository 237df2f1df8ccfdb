"""The parts of the Python API that are no other module's business: building a Conv by hand, and live modules."""

from __future__ import annotations

from torch import Tensor

from convtool.core.conv import Conv, lower_conv
from convtool.core.geometry import Geometry, Padding, PerAxis


def conv(
    weight: Tensor,
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
    """A `Conv` from the tensors of an nn.Conv (nn.ConvTranspose where `transposed`) and its fields.

    Args:
        weight: as torch lays it out: (C_out, C_in/groups, *kernel), or (C_in, C_out/groups, *kernel) transposed.
        bias: (C_out,) or None.
        stride, dilation, output_padding: an int, or one int per spatial axis.
        padding: an int; an int or a pair (before, after) per axis; 'same'; 'half'.
        groups, padding_mode, transposed: as in torch.

    Raises:
        UsageError: a field is out of range, or doesn't fit the weight.
    """
    geometry = Geometry.of(
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    return lower_conv(weight, bias, geometry)
