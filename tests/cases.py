"""The table of layers that every law is held against, and numbers to fill layers and inputs with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Geometry


def whole_numbers(seed: int, *shape: int, most: int = 9) -> Tensor:
    """Random whole numbers from -most to most, never 0, in float64.

    Products and sums of them are exact, in whatever order they are formed: what has to be equal is equal to the bit,
    and a test of it needs no tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, most + 1, shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sizes * signs).to(torch.float64)


def real_numbers(seed: int, *shape: int) -> Tensor:
    """Random normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_conv(
    geometry: Geometry, in_channels: int, out_channels: int, *, bias: bool = True, seed: int = 0, most: int = 9
) -> Conv:
    """A layer of whole numbers."""
    weight = whole_numbers(seed, out_channels, in_channels // geometry.groups, *geometry.kernel_size, most=most)
    return Conv(weight, whole_numbers(seed + 1, out_channels, most=most) if bias else None, geometry)


def make_inputs(conv: Conv, size: Sequence[int], batch: int = 2, seed: int = 100, most: int = 9) -> Tensor:
    """Inputs of whole numbers, (batch, C_in, *size)."""
    return whole_numbers(seed, batch, conv.in_channels, *size, most=most)


@dataclass(frozen=True)
class Case:
    """A layer's shape and the input size it is run on."""

    name: str
    channels: tuple[int, int]  # in, out
    geometry: Geometry
    input_size: tuple[int, ...]
    bias: bool = True

    def conv(self, seed: int = 0) -> Conv:
        """The layer, filled with whole numbers."""
        return make_conv(self.geometry, *self.channels, bias=self.bias, seed=seed)

    @property
    def outputs(self) -> int:
        """The number of outputs, that is of the matrix's rows."""
        return self.channels[1] * math.prod(self.geometry.output_size(self.input_size))


def _case(
    name: str,
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    input_size: tuple[int, ...],
    *,
    bias: bool = True,
    **fields: Any,
) -> Case:
    return Case(name, channels, Geometry.of(kernel, **fields), input_size, bias)


CASES: tuple[Case, ...] = (
    # --- no spatial axes: a linear layer is a convolution over none
    _case("linear", (5, 3), (), ()),
    # in groups, as the linear layers behind grouped heads; no bias anywhere
    _case("linear-groups", (6, 4), (), (), groups=2, bias=False),
    # --- one axis: each field by itself, where a mistake is easiest to see
    _case("1d-plain", (2, 3), (3,), (7,)),
    # nothing to pad, nothing to slide over: one output
    _case("1d-kernel-is-input", (2, 3), (4,), (4,)),
    # input positions that no output reads: empty columns, and a rest at the end that is never reached
    _case("1d-stride-beyond-kernel", (2, 2), (2,), (12,), stride=5),
    _case("1d-dilation", (1, 2), (3,), (11,), dilation=4, padding=2, bias=False),
    # one side only, which torch's own convolutions cannot say
    _case("1d-pad-before", (2, 1), (3,), (5,), padding=[(3, 0)]),
    _case("1d-pad-after", (2, 1), (3,), (5,), padding=[(0, 3)], stride=2),
    # 'same' with an even kernel: the odd one out goes after
    _case("1d-same-even", (2, 2), (4,), (6,), padding="same"),
    # 'half' with an even kernel: one output more than inputs
    _case("1d-half-even", (2, 2), (4,), (6,), padding="half"),
    # more padding than kernel: rows without a single entry at both ends
    _case("1d-rows-without-entries", (2, 3), (2,), (3,), padding=[(4, 3)]),
    # the only input position is in every window
    _case("1d-one-position", (2, 2), (3,), (1,), padding=2),
    # a reach so long that only outer taps ever meet the input
    _case("1d-all-taps-outside", (2, 2), (2,), (3,), dilation=6, padding=[(5, 4)]),
    _case("1d-circular", (2, 2), (3,), (6,), padding=1, padding_mode="circular"),
    # as wide as the input, each tap a column of its own, wrapped around: rows that need sorting
    _case("1d-circular-full", (1, 2), (5,), (5,), padding=2, padding_mode="circular"),
    # wider than the input: the first and the last tap share a column
    _case("1d-circular-shared-column", (2, 2), (5,), (4,), padding=2, padding_mode="circular"),
    # the same by dilation, and the most padding that can be wrapped
    _case("1d-circular-shared-dilated", (1, 3), (3,), (4,), padding=[(4, 4)], dilation=4, padding_mode="circular"),
    # as much as can be mirrored once: every input but the edge comes twice
    _case("1d-reflect-most", (2, 2), (4,), (5,), padding=4, padding_mode="reflect"),
    _case("1d-reflect-after", (2, 2), (3,), (6,), padding=[(0, 2)], padding_mode="reflect", stride=2),
    # far more than the input: whole windows on one column
    _case("1d-replicate-far", (2, 2), (3,), (4,), padding=[(7, 5)], padding_mode="replicate", stride=2),
    # a mode, but nothing padded
    _case("1d-symmetric-most", (2, 2), (4,), (5,), padding=5, padding_mode="symmetric"),
    _case("2d-symmetric", (2, 2), (3, 2), (4, 5), padding=[(4, 2), (0, 5)], padding_mode="symmetric"),
    _case("1d-mode-without-padding", (1, 1), (3,), (6,), padding_mode="reflect"),
    # --- two axes: height and width always different in kernel, stride, padding and input
    _case("2d-plain", (3, 4), (3, 2), (5, 7)),
    _case("2d-pointwise", (3, 5), (1, 1), (3, 4)),
    # a kernel that is the whole feature map: a linear layer behind a flatten
    _case("2d-linear-after-flatten", (2, 5), (3, 4), (3, 4)),
    _case("2d-stride", (2, 3), (2, 3), (7, 8), stride=(2, 3), bias=False),
    # kernel = stride: a patch embedding, whose input doesn't divide evenly along the second axis
    _case("2d-patches", (3, 4), (2, 3), (6, 10), stride=(2, 3)),
    _case("2d-everything", (4, 6), (3, 2), (8, 9), stride=(2, 1), padding=[(1, 2), (0, 3)], dilation=(1, 3), groups=2),
    # one axis a row vector: the other must not be mixed up with it
    _case("2d-row-kernel", (2, 2), (1, 5), (4, 6), padding=(0, 2)),
    _case("2d-groups-2", (4, 6), (2, 3), (4, 5), groups=2),
    # more groups than two, with uneven sides
    _case("2d-groups-3", (6, 3), (2, 1), (4, 5), groups=3, padding=(1, 0)),
    _case("2d-depthwise", (3, 3), (3, 2), (4, 5), groups=3, padding=(1, 1)),
    # depthwise with two output channels for each input channel
    _case("2d-multiplier-2", (3, 6), (2, 3), (4, 5), groups=3),
    # one input channel isn't depthwise, even though its weight looks the same
    _case("2d-one-input-channel", (1, 4), (2, 3), (4, 5)),
    _case("2d-same-dilated", (2, 2), (2, 4), (5, 6), padding="same", dilation=(3, 1)),
    _case("2d-half", (2, 2), (3, 5), (5, 4), padding="half", stride=(2, 1)),
    # every mode, each side of each axis padded by its own amount
    _case("2d-zeros", (2, 2), (3, 2), (4, 5), padding=[(1, 2), (0, 1)]),
    _case("2d-circular", (2, 2), (3, 2), (4, 5), padding=[(1, 2), (0, 1)], padding_mode="circular"),
    _case("2d-reflect", (2, 2), (3, 2), (4, 5), padding=[(3, 2), (0, 4)], padding_mode="reflect"),
    _case("2d-replicate", (2, 2), (3, 2), (4, 5), padding=[(1, 6), (2, 0)], padding_mode="replicate"),
    # merged taps together with stride, dilation and groups
    _case(
        "2d-reflect-grouped",
        (4, 2),
        (3, 2),
        (5, 6),
        padding=[(4, 1), (2, 3)],
        padding_mode="reflect",
        stride=(1, 2),
        dilation=(2, 1),
        groups=2,
    ),
    # --- transposed
    _case("1d-transposed", (2, 3), (3,), (5,), stride=2, transposed=True),
    # stride 1, dilation 2, output_padding 1: where 'transpose of the associated convolution' has the wrong size
    _case("1d-transposed-dilated", (2, 2), (3,), (4,), dilation=2, output_padding=1, transposed=True),
    # outputs between the taps that nothing reaches: rows without entries
    _case("1d-transposed-gaps", (2, 2), (2,), (4,), stride=4, output_padding=3, transposed=True),
    # cut off further than the kernel reaches
    _case("1d-transposed-cropped", (1, 2), (2,), (6,), stride=2, padding=[(4, 3)], transposed=True),
    _case("2d-transposed", (3, 2), (3, 2), (4, 5), stride=(2, 3), padding=(1, 0), transposed=True),
    _case("2d-transposed-asymmetric", (2, 2), (3, 4), (3, 4), stride=2, padding=[(0, 2), (3, 1)], transposed=True),
    # groups, where torch's weight has input and output channels the other way round
    _case(
        "2d-transposed-groups",
        (4, 6),
        (2, 3),
        (3, 4),
        stride=(2, 1),
        dilation=(1, 2),
        output_padding=(1, 0),
        groups=2,
        transposed=True,
    ),
    _case("2d-transposed-depthwise", (3, 6), (3, 2), (3, 4), stride=2, groups=3, transposed=True, bias=False),
    # --- three and more axes
    _case("3d-plain", (2, 2), (2, 3, 1), (3, 4, 5)),
    _case("3d-everything", (2, 4), (2, 1, 3), (4, 3, 6), stride=(1, 2, 2), padding=(1, 0, 2), groups=2),
    _case("3d-circular", (1, 2), (3, 2, 2), (3, 4, 2), padding=[(1, 1), (0, 1), (2, 0)], padding_mode="circular"),
    _case("3d-replicate", (1, 2), (2, 2, 3), (2, 3, 2), padding=[(0, 3), (1, 0), (2, 2)], padding_mode="replicate"),
    _case("3d-reflect", (1, 1), (2, 3, 2), (3, 2, 4), padding=[(2, 0), (1, 1), (0, 3)], padding_mode="reflect"),
    _case("3d-transposed", (2, 2), (2, 3, 1), (2, 3, 2), stride=(2, 1, 3), padding=(0, 1, 0), transposed=True),
    # four axes, where torch has no convolution at all
    _case("4d-plain", (2, 2), (2, 1, 2, 2), (3, 2, 2, 3), stride=(1, 1, 1, 2), groups=2),
    _case(
        "4d-reflect",
        (1, 2),
        (2, 2, 1, 2),
        (2, 3, 2, 2),
        padding=[(1, 0), (2, 1), (0, 0), (1, 1)],
        padding_mode="reflect",
    ),
    _case("4d-transposed", (1, 2), (2, 1, 2, 2), (2, 2, 1, 2), stride=(2, 1, 1, 1), transposed=True),
)

IDS = [case.name for case in CASES]
