"""What a bias becomes behind other layers: a plain bias, where that comes to the same number at every position.

A layer reads a constant map (the bias of the layer before it) with different taps at different positions: padding hides
some near the border, and a transposed layer has only every s-th tap at each. So what it makes of the map is a sum over
the taps that are live, and which sets of taps there are is read off the tap table, an axis at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Axis
from convtool.core.moves import Selection
from convtool.core.rounding import exact_dtype
from convtool.core.taps import PADDED, tap_table

_AT_ONCE = 1 << 22  # numbers of a map that are looked at together


def carry(conv: Conv, values: Tensor) -> Tensor:
    """Return (C_out,) what a layer without its bias makes of a constant map, at positions away from the border.

    Where a transposed layer makes different numbers at different positions, the sum over all of its taps.

    Args:
        values: (C_in,) the constant of each channel.
    """
    if isinstance(conv, Selection):
        return conv.carry(values)
    shares = _shares(conv, values)  # (C_out, *kernel)
    if conv.geometry.transposed and any(step > 1 for step in conv.geometry.stride):
        phases = [_phases(axis) for axis in conv.geometry.axes]
        first = _summed(shares, [phase[:1] for phase in phases]).flatten()
        if _agree(shares, first, phases, _slack(conv, values)):
            return first
    return shares.flatten(1).sum(1) if shares.dim() > 1 else shares  # a linear layer has no taps


def hidden_biases(chain: Sequence[Conv], input_size: Sequence[int] | None) -> tuple[bool, ...]:
    """Return for each layer of a chain whether it makes of the biases before it what no plain bias is.

    Args:
        input_size: of the chain; None for all sizes.
    """
    values, size, hidden = torch.zeros(chain[0].in_channels, dtype=torch.float64), input_size, list[bool]()
    for conv in chain:
        geometry, hides = conv.geometry, False
        if bool(values.any()):
            before, values = values, carry(conv.exact(), values)
            partial = geometry.transposed or (geometry.padded and geometry.padding_mode == "zeros")
            hides = partial and not _is_constant(conv.exact(), before, values, size)
        else:
            values = values.new_zeros(conv.out_channels)
        hidden.append(hides)
        if conv.bias is not None and not conv.has_bias_map:
            values = values + conv.bias.to(exact_dtype(conv.bias.dtype))
        size = None if size is None else conv.output_size(size)
    return tuple(hidden)


def _is_constant(conv: Conv, values: Tensor, behind: Tensor, size: Sequence[int] | None) -> bool:
    """Return whether a layer makes `behind`, (C_out,), of a constant map at every position, at one size or at all."""
    shares = _shares(conv, values)  # (C_out, *kernel)
    slack = _slack(conv, values)
    axes = conv.geometry.axes
    if size is not None:
        return _agree(shares, behind, [_patterns(axis, [at]) for axis, at in zip(axes, size, strict=True)], slack)
    long = [2 * (axis.reach + axis.before + axis.after + axis.stride) + 1 for axis in axes]
    if not _agree(shares, behind, [_patterns(axis, [at]) for axis, at in zip(axes, long, strict=True)], slack):
        return False  # without looking at all the sizes
    every = [_patterns(axis, range(1, at + axis.stride)) for axis, at in zip(axes, long, strict=True)]
    return _agree(shares, behind, every, slack)


def _agree(shares: Tensor, behind: Tensor, patterns: Sequence[Tensor], slack: Tensor) -> bool:
    """Return whether the shares add up to the same over every combination of live taps, channel by channel."""
    count = max(1, _AT_ONCE // math.prod(len(pattern) for pattern in patterns))
    for some, wanted, room in zip(shares.split(count), behind.split(count), slack.split(count), strict=True):
        sums = _summed(some, patterns).flatten(1)
        if bool(((sums - wanted[:, None]).abs() > room[:, None]).any()):
            return False
    return True


def _summed(shares: Tensor, patterns: Iterable[Tensor]) -> Tensor:
    """Return (C_out, patterns of axis 0, patterns of axis 1, ...), or (C_out,) for one pattern an axis."""
    for pattern in patterns:
        shares = torch.tensordot(shares, pattern.to(shares.dtype), ([1], [pattern.dim() - 1]))
    return shares


def _shares(conv: Conv, values: Tensor) -> Tensor:
    """Return (C_out, *kernel) what each tap adds where all channels read their constant."""
    groups, shape = conv.geometry.groups, conv.shape
    weight = conv.weight.reshape(groups, shape[0] // groups, shape[1], math.prod(shape[2:]))  # channels may be none
    dtype = torch.promote_types(weight.dtype, values.dtype)  # one of the two may be complex
    shares = torch.einsum("goik,gi->gok", weight.to(dtype), values.reshape(groups, shape[1]).to(dtype))
    return shares.reshape(shape[0], *conv.geometry.kernel_size)


def _slack(conv: Conv, values: Tensor) -> Tensor:
    """Return (C_out,) how far sums of the same numbers in another order can be apart."""
    count = conv.shape[1] * math.prod(conv.geometry.kernel_size)
    return 2 * count * 2.0**-52 * _shares(conv.absolute(), values.abs()).flatten(1).sum(1)


def _phases(axis: Axis) -> Tensor:
    """Return (stride, kernel) the taps that a transposed layer has at each kind of position, far from the border."""
    return torch.arange(axis.kernel) * axis.dilation % axis.stride == torch.arange(axis.stride)[:, None]


def _patterns(axis: Axis, sizes: Iterable[int]) -> Tensor:
    """Return (patterns, kernel) the sets of taps that read the input, over all positions at all of these sizes."""

    def live() -> Iterator[np.ndarray[tuple[int, int], np.dtype[np.bool_]]]:
        for size in sizes:
            if axis.runs_on(size):
                yield np.unique(tap_table(axis, size) != PADDED, axis=0)

    found = list(live())
    return torch.from_numpy(np.unique(np.concatenate(found), axis=0)) if found else torch.ones(1, axis.kernel)
