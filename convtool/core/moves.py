"""Layers that only copy, select or place numbers: composed with others by indexing, their weights never made.

A flattening of 64 channels at 56x56 would be a kernel of 5 GB, and holds no number but 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from convtool.core.conv import MOST_NUMBERS, Conv
from convtool.core.geometry import Geometry
from convtool.core.joint import compose_axis
from convtool.errors import RefusedError, UsageError

NOTHING = -1  # in the place of an entry: the output is 0


class Selection(Conv):
    """A layer that only copies: each output channel is one entry of the input's window, or nothing.

    Attributes:
        picked: (C_out,) the entry that each output channel copies, of C_in * taps, taps running fastest; or NOTHING.
    """

    __slots__ = ("inputs", "picked")
    inputs: int
    picked: Tensor

    def __init__(self, picked: Tensor, in_channels: int, geometry: Geometry) -> None:
        taps, outputs = math.prod(geometry.kernel_size), len(picked)
        lowest, highest = _channels_read(picked.reshape(-1, 1), taps)
        groups = most_groups(lowest, highest, outputs, in_channels)
        values = (("picked", picked), ("inputs", in_channels), ("bias", None))
        for name, value in (*values, ("geometry", replace(geometry, groups=groups))):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Selection({self.in_channels} -> {self.out_channels} channels, {self.geometry.describe()})"

    @property
    def weight(self) -> Tensor:
        width = math.prod(self.shape[1:])  # of a group's window
        if self.out_channels * width > MOST_NUMBERS:
            raise UsageError(f"a layer that copies {width} entries would need a kernel of too many numbers")
        group = torch.arange(self.out_channels) * self.geometry.groups // max(1, self.out_channels)
        dense = F.one_hot((self.picked - group * width).clamp(min=0), width).to(torch.float64)
        dense[self.picked == NOTHING] = 0
        return dense.reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.picked), self.inputs // self.geometry.groups, *self.geometry.kernel_size

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Conv:
        # Zeros and ones are what they are in every dtype.
        return self if device is None else Selection(self.picked.to(device), self.inputs, self.geometry)

    def exact(self) -> Conv:
        return self

    def absolute(self) -> Conv:
        return self

    def carry(self, values: Tensor) -> Tensor:
        """Return (C_out,) the outputs for an input that is constant over the positions, (C_in,)."""
        channel = self.picked.clamp(min=0) // math.prod(self.geometry.kernel_size)
        return torch.where(self.picked == NOTHING, 0, values[channel])


def compose_moves(first: Conv, second: Conv, geometry: Geometry) -> Conv:
    """Return `second` after `first`, of which one or both only move numbers.

    Args:
        geometry: of the result, as `compose_geometry` has it; its groups become the most that the moves allow.
    """
    if isinstance(second, Selection):
        return _picked(first, second, geometry)
    assert isinstance(first, Selection)
    groups, per_group = second.geometry.groups, second.shape[1]
    channels = torch.arange(groups * per_group).reshape(groups, per_group, 1)
    landings, width = _landings(first.geometry, second.geometry, geometry), math.prod(geometry.kernel_size)
    entry = first.picked[channels]  # (g2, C_mid/g2, 1)
    moved = entry.clamp(min=0) // len(landings) * width + landings[entry.clamp(min=0) % len(landings)].squeeze(-2)
    entries = torch.where(entry == NOTHING, NOTHING, moved)  # (g2, C_mid/g2, taps2)
    numbers = second.weight.reshape(groups, second.out_channels // groups, -1)  # (g2, C_out/g2, C_mid/g2 * taps)
    return _placed(numbers, entries.flatten(1), first.in_channels, second.bias, geometry)


def _picked(first: Conv, second: Selection, geometry: Geometry) -> Conv:
    """Return what picks its outputs from those of another layer."""
    taps = math.prod(second.geometry.kernel_size)
    nothing, channel = second.picked == NOTHING, second.picked.clamp(min=0) // taps  # (C_out,)
    landings = _landings(first.geometry, second.geometry, geometry)[:, second.picked.clamp(min=0) % taps]
    if isinstance(first, Selection):
        entry = first.picked[channel]  # (C_out,)
        inside = math.prod(first.geometry.kernel_size)
        place = landings[entry.clamp(min=0) % inside, torch.arange(len(entry))]
        moved = entry.clamp(min=0) // inside * math.prod(geometry.kernel_size) + place
        return Selection(torch.where(nothing | (entry == NOTHING), NOTHING, moved), first.in_channels, geometry)
    per_group, outputs = first.shape[1], max(1, first.out_channels // first.geometry.groups)
    inputs = (channel // outputs * per_group)[:, None] + torch.arange(per_group)  # (C_out, C_in/g1)
    entries = inputs[:, :, None] * math.prod(geometry.kernel_size) + landings.T[:, None, :]
    entries[nothing] = NOTHING
    bias = None if first.bias is None else torch.where(nothing, 0, first.bias[channel])
    return _placed(first.weight[channel].flatten(1)[:, None], entries.flatten(1), first.in_channels, bias, geometry)


def _landings(first: Geometry, second: Geometry, fused: Geometry) -> Tensor:
    """Return (taps1, taps2) the fused layer's tap that each pair of taps becomes, all axes in one number."""
    total = torch.zeros(1, 1, dtype=torch.int64)
    for a, b, size in zip(first.axes, second.axes, fused.kernel_size, strict=True):
        plan = compose_axis(a, b, fused.padding_mode)
        one, two = torch.arange(a.kernel)[:, None] * plan.step1, torch.arange(b.kernel) * plan.step2
        place = (plan.base + one + two) // plan.axis.dilation  # (k1, k2)
        total = total[:, None, :, None] * size + place[:, None]
        total = total.reshape(total.shape[0] * a.kernel, -1)
    return total


def _placed(numbers: Tensor, entries: Tensor, inputs: int, bias: Tensor | None, geometry: Geometry) -> Conv:
    """Return the layer that has these numbers at these entries of its window.

    Args:
        numbers: (blocks, rows, n) of blocks * rows output channels.
        entries: (blocks, n) of C_in * taps, taps running fastest; NOTHING where the number goes nowhere.
        geometry: but for the groups, which become the most that these entries allow.
    """
    blocks, rows, _ = numbers.shape
    taps = math.prod(geometry.kernel_size)
    lowest, highest = (one.repeat_interleave(rows) for one in _channels_read(entries, taps))
    groups = most_groups(lowest, highest, blocks * rows, inputs)
    width = inputs // groups * taps
    if blocks * rows * width > MOST_NUMBERS:
        raise RefusedError(
            f"as one layer they would hold {blocks * rows * width} numbers; leave the last of them out of the chain (a"
            " model's own flatten or shuffle does the same behind the fused layer)"
        )
    if blocks == 1 and torch.equal(entries[0], torch.arange(width)):  # its numbers are in their places already
        weight = numbers
    else:
        group = torch.arange(blocks) * rows * groups // max(1, blocks * rows)
        nothing = entries == NOTHING
        numbers = torch.where(nothing[:, None], 0, numbers) if bool(nothing.any()) else numbers
        at = (entries - group[:, None] * width).clamp(min=0)[:, None].expand_as(numbers)
        weight = numbers.new_zeros(blocks, rows, width)
        ordered = entries.sort(dim=1).values
        if bool(nothing.any()) or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            weight.scatter_add_(2, at, numbers)
        else:
            weight.scatter_(2, at, numbers)  # keeps the sign of zeros
    weight = weight.reshape(blocks * rows, inputs // groups, *geometry.kernel_size)
    return Conv(weight, bias, replace(geometry, groups=groups))


def _channels_read(entries: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last channel that each row of entries reads; of a row that reads nothing, -1."""
    nothing, channels = entries == NOTHING, entries.clamp(min=0) // max(1, taps)
    beyond = int(channels.max()) + 1 if channels.numel() else 0
    lowest = torch.where(nothing, beyond, channels).amin(1)
    highest = torch.where(nothing, -1, channels).amax(1)
    return torch.where(highest < 0, -1, lowest), highest


def most_groups(lowest: Tensor, highest: Tensor, outputs: int, inputs: int) -> int:
    """Return the most groups that a layer has in which each output reads these channels.

    Args:
        lowest, highest: (C_out,) the first and the last channel; -1 for an output that reads none.
    """
    reads, output = highest >= 0, torch.arange(outputs)
    for groups in (g for g in range(math.gcd(outputs, inputs), 0, -1) if outputs % g == inputs % g == 0):
        group = output * groups // outputs
        own = (lowest * groups // inputs == group) & (highest * groups // inputs == group)
        if bool((own | ~reads).all()):
            return groups
    return 1


def regrouped(fused: Conv, chain: Sequence[Conv]) -> Conv:
    """Return the layer that a chain was composed to, with the most groups that its layers' zeros allow.

    Composing by pairs forgets what permuting there and back does: a depthwise layer in between stays depthwise.
    """
    outputs, inputs = fused.out_channels, fused.in_channels
    if isinstance(fused, Selection) or not any(isinstance(conv, Selection) for conv in chain):
        return fused
    if all(conv.geometry.groups == 1 and not isinstance(conv, Selection) for conv in (chain[0], chain[-1])):
        return fused
    groups, old = groups_of(chain), fused.geometry.groups
    if groups <= old:
        return fused
    # Of each old group's window, the part that its outputs' new group reads.
    within = groups // old if groups % old == 0 else 0
    if not within:
        return fused
    blocks = fused.weight.reshape(old, within, outputs // groups, within, inputs // groups, -1)
    weight = torch.stack([blocks[:, number, :, number] for number in range(within)], 1)
    shape = outputs, inputs // groups, *fused.geometry.kernel_size
    return Conv(weight.reshape(shape), fused.bias, replace(fused.geometry, groups=groups))


def groups_of(chain: Sequence[Conv]) -> int:
    """Return the most groups that the zeros of a chain's layers allow the one that it is composed to."""
    reads = reduce(_reads, chain, torch.ones(0))  # (C_out, C_in)
    outputs, inputs = reads.shape
    number = torch.arange(inputs)
    lowest, highest = torch.where(reads, number, inputs).amin(1), torch.where(reads, number, -1).amax(1)
    return most_groups(lowest, highest, outputs, inputs)


def _reads(before: Tensor, conv: Conv) -> Tensor:
    """Return (C_out, C_in) which inputs of a chain each output of its next layer may hang on.

    Args:
        before: the same of the layers before it; empty where there are none.
    """
    if not len(before):
        before = torch.eye(conv.in_channels, dtype=torch.bool)
    if isinstance(conv, Selection):
        channel = conv.picked.clamp(min=0) // math.prod(conv.geometry.kernel_size)
        return before[channel] & (conv.picked != NOTHING)[:, None]
    groups = conv.geometry.groups
    some = before.reshape(groups, -1, before.shape[1]).any(1)  # (groups, C_in)
    return some.repeat_interleave(conv.out_channels // groups, 0)
