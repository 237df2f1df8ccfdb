"""The numbers of a matrix: what can stand in the rows of a channel, for one layer and for layers in chains and sums.

On each axis a row has slots (`convtool.core.taps`), each with a column and the number of what stands there. The
channels' numbers are made for a few channels at a time, so that a matrix of any size takes the memory of these.

A chain's numbers are those of its unfused layers at each place, with every border as it is. On each axis, outputs with
the same pattern of live taps through all layers form a class, and all outputs of a class share one kernel. It is found
by going from an output back to the input: what an output weighs is carried from each layer's outputs to its inputs, by
its tap table, for one output of each class and all pairs of classes of two axes at once.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from convtool.core.classes import Classes, classes, period
from convtool.core.conv import Conv, swap_channels
from convtool.core.expression import Expression, exact_type, in_channels, out_channels, output_size, run
from convtool.core.moves import NOTHING, Selection
from convtool.core.rounding import exact_dtype
from convtool.core.taps import MOST_ENTRIES, PADDED, AxisSlots, axis_slots, tap_table
from convtool.core.tree import Tree, leaves, map_leaves, sole_layer, walk
from convtool.core.ways import LayerWay, Places, Rows, pull, way_back, widest
from convtool.errors import UsageError

Order: TypeAlias = Literal["CHW", "HWC"]
ORDERS: tuple[Order, ...] = get_args(Order)  # how inputs and outputs are flattened

BLOCK_NUMBERS = 1 << 19  # of the kernels, or of what is on the way to them, that are made at a time: 4 MiB
KEPT_BLOCKS = 4  # of these


@dataclass(frozen=True, eq=False)
class Kernels:
    """What a matrix is made of.

    Attributes:
        output_size: of the layers, at the matrix's input size.
        row_size, column_size: sizes of the axes of the rows' positions, and of the columns'.
        dtype: of their numbers.
        bias: (C_out,) or (C_out, *output_size), or None.
        slots: of each axis, by the positions of the matrix's rows.
        row_channels: of all groups.
        column_channels: of one group.
        groups: the most that are sure to have nothing to do with each other.
        periods: after how many of the rows' positions each axis repeats itself, away from the borders.
        values: gives what can stand in rows of channels first:last, (channels, column_channels * numbers an axis).
    """

    output_size: tuple[int, ...]
    row_size: tuple[int, ...]
    column_size: tuple[int, ...]
    dtype: torch.dtype
    bias: Tensor | None
    slots: list[AxisSlots]
    row_channels: int
    column_channels: int
    groups: int
    periods: tuple[int, ...]
    values: Callable[[int, int], Tensor]

    @property
    def per_group(self) -> int:
        """Return how many row channels a group has."""
        return max(1, self.row_channels // max(1, self.groups))


def _of_layer(conv: Conv, input_size: tuple[int, ...], transpose: bool) -> Kernels:
    """Return the numbers of one layer: its weight, and sums of taps where padding brings several to one place."""
    geometry, weight, output_size = conv.geometry, conv.weight, conv.output_size(input_size)
    slots = [axis_slots(tap_table(axis, size)) for axis, size in zip(geometry.axes, input_size, strict=True)]
    if transpose:
        slots = [axis.adjoint(size) for axis, size in zip(slots, input_size, strict=True)]
        weight = swap_channels(weight, geometry.groups)  # (C_in, C_out/groups, *kernel)

    def values(first: int, last: int) -> Tensor:
        some = weight[first:last]
        for number, axis in enumerate(slots, 2):
            if axis.merges:
                exact = some.to(exact_dtype(some.dtype))
                members = torch.from_numpy(axis.members).to(exact.dtype)  # (subsets, kernel)
                some = torch.tensordot(exact, members, dims=([number], [1])).movedim(-1, number)
        return some.flatten(1)

    sides = (input_size, output_size) if transpose else (output_size, input_size)
    # A transposed layer reads in the rhythm of its stride, and so does the transpose of a plain one.
    periods = geometry.stride if geometry.transposed != transpose else (1,) * len(slots)
    shape = len(weight), weight.shape[1]
    return Kernels(output_size, *sides, conv.dtype, conv.bias, slots, *shape, geometry.groups, periods, values)


def _of_tree(tree: Expression, input_size: tuple[int, ...], transpose: bool) -> Kernels:
    """Return the numbers of layers in chains and sums, in float64 (complex128)."""
    found = [classes(tree, input_size, axis) for axis in range(len(input_size))]
    slots = list(map(_slots, found))
    way, _ = way_back(tree, input_size, [Places.each(one.first) for one in found], range(len(slots)))
    values = _TreeValues(tree, way, math.prod(len(axis.members) for axis in slots), transpose)
    made = output_size(tree, input_size)
    sides = (input_size, made) if transpose else (made, input_size)
    turned = [axis.adjoint(n) for axis, n in zip(slots, input_size, strict=True)] if transpose else slots
    periods = tuple(period(tree, axis, transpose) for axis in range(len(slots)))
    bias, dtype, shape = _bias(tree, input_size), next(leaves(tree)).dtype, (values.rows, values.columns)
    return Kernels(made, *sides, dtype, bias, turned, *shape, values.groups, periods, values)


class _TreeValues:
    """The numbers of layers in chains and sums, made block by block.

    Args:
        way: back through them from an output of each class.
        spread: numbers for each pair of channels.
    """

    def __init__(self, tree: Expression, way: Tree[LayerWay], spread: int, transpose: bool) -> None:
        self._tree, self._way, self._spread, self._transpose = tree, way, spread, transpose
        self.groups = reduce(math.gcd, (conv.geometry.groups for conv in leaves(tree)))
        self._outputs, inputs = out_channels(tree) // max(1, self.groups), in_channels(tree) // max(1, self.groups)
        self._per_group, self.columns = (inputs, self._outputs) if transpose else (self._outputs, inputs)
        self.rows = self._per_group * self.groups
        self._exact = exact_type(tree)
        # How many channels of the rows are made at a time, how many of the columns, and how many outputs carried back.
        self._step, self._turned_step = (
            max(1, BLOCK_NUMBERS // max(1, count * spread)) for count in (self.columns, self._per_group)
        )
        self._together = max(1, BLOCK_NUMBERS * max(1, self.groups) // widest(way))
        self._block = lru_cache(KEPT_BLOCKS)(self._make_block)
        self._here = -1, way  # the way of one group
        self._lock = threading.Lock()

    def __call__(self, first: int, last: int) -> Tensor:
        parts = [torch.zeros(0, self.columns * self._spread, dtype=self._exact)]
        while first < last:
            group, channel = divmod(first, self._per_group)
            number, start = divmod(channel, self._step)
            stop = min(last - first + channel, self._per_group, (number + 1) * self._step)
            with self._lock:  # the threads that fill one matrix mostly want the same block
                parts.append(self._block(group, number)[start : stop - number * self._step])
            first += stop - channel
        return parts[1] if len(parts) == 2 else torch.cat(parts)

    def _make_block(self, group: int, number: int) -> Tensor:
        """Return the numbers of one block of a group's row channels, (channels, column channels * spread)."""
        start, stop = number * self._step, min((number + 1) * self._step, self._per_group)
        return (self._turned if self._transpose else self._pulled)(group, start, stop).flatten(1)

    def _turned(self, group: int, start: int, stop: int) -> Tensor:
        """Return (stop - start, C_out/groups, spread) the numbers of some of a group's input channels."""
        cuts = itertools.pairwise([*range(0, self.columns, self._turned_step), self.columns])
        made = [self._pulled(group, *cut)[:, start:stop].clone() for cut in cuts]
        return torch.cat(made).transpose(0, 1).contiguous()

    def _pulled(self, group: int, start: int, stop: int) -> Tensor:
        """Return (stop - start, C_in/groups, spread) the numbers of some of a group's output channels."""
        if self._here[0] != group:
            parts = (_of_group(conv, group, self.groups) for conv in leaves(self._tree))
            through = map_leaves(lambda way: way if way.conv is None else way.through(next(parts)), self._way)
            self._here = group, through
        cuts = itertools.pairwise([*range(start, stop, self._together), stop])
        made = (Rows.of(*cut, 1, self._outputs, (), self._exact) for cut in cuts)
        return torch.cat([pull(self._here[1], rows).dense(self._spread).movedim(1, 2) for rows in made])


def _channels_last(made: Kernels) -> Kernels:
    """Return the numbers of a matrix for channels-last data: x is flattened as (*spatial, C), and so is the output.

    The channels are one more axis, the innermost: there an output reads all inputs of its group, each by a number of
    its own. What is left is one channel, which has all numbers.
    """
    rows, columns = made.row_channels, made.column_channels
    row, column = np.arange(rows)[:, None], np.arange(columns)
    subsets, members = row * columns + column, np.empty((rows * columns, 0))
    channels = AxisSlots(row // made.per_group * columns + column, subsets, np.full(rows, columns), members)

    def values(first: int, last: int) -> Tensor:
        numbers = made.values(0, rows)
        if not numbers.numel():  # nothing is read of the input
            return numbers.reshape(1, 0)
        numbers = numbers.reshape(rows, columns, *(len(axis.members) for axis in made.slots))
        return numbers.movedim((0, 1), (-2, -1)).reshape(1, -1)

    return replace(
        made,
        slots=[*made.slots, channels],
        periods=(*made.periods, 1),
        row_size=(*made.row_size, rows),
        column_size=(*made.column_size, columns * made.groups),
        row_channels=1,
        column_channels=1,
        groups=1,
        values=values,
    )


def kernels(layers: Expression, input_size: tuple[int, ...], transpose: bool, order: Order = "CHW") -> Kernels:
    """Return what the matrix of a layer, or of layers in chains and sums, is made of; see `Kernels`.

    Raises:
        UsageError: another order, or they cannot run on that input size, or on each other's outputs.
    """
    if order not in ORDERS:
        raise UsageError(f"order: expected {' or '.join(ORDERS)}, got {order!r}")
    if order == "HWC":
        return _channels_last(kernels(layers, input_size, transpose))
    if (layer := sole_layer(layers)) is not None:
        return _of_layer(layer, input_size, transpose)
    _check_channels(layers)
    return _of_tree(layers, input_size, transpose)


def _check_channels(tree: Expression) -> None:
    def step(conv: Conv, channels: int) -> int:
        if conv.in_channels != channels:
            raise UsageError(
                f"channels don't fit: a layer takes {conv.in_channels}, and the one before gives {channels}"
            )
        if conv.spatial_axes != axes:
            raise UsageError(f"layers of {axes} and {conv.spatial_axes} spatial axes cannot be chained")
        return conv.out_channels

    def merge(_: int, channels: list[int]) -> int:
        if len(set(channels)) > 1:
            raise UsageError(f"the branches of a sum give different numbers of channels: {sorted(set(channels))}")
        return channels[0]

    axes = next(leaves(tree)).spatial_axes
    walk(tree, in_channels(tree), step, merge)


def _bias(tree: Expression, input_size: tuple[int, ...]) -> Tensor | None:
    """Return (C_out, *output_size) what comes of zeros, or None where no layer has a bias."""
    if all(conv.bias is None for conv in leaves(tree)):
        return None
    zeros = torch.zeros(1, in_channels(tree), *input_size, dtype=exact_type(tree))
    return run(map_leaves(Conv.exact, tree), zeros)[0]


def _of_group(conv: Conv, group: int, groups: int) -> Conv:
    """Return the part of a layer that one of a chain's groups runs through, without its bias."""
    if groups == 1:
        return conv.without_bias()
    outputs, inputs = conv.out_channels // groups, conv.in_channels // groups
    part, geometry = slice(group * outputs, (group + 1) * outputs), conv.geometry
    geometry = replace(geometry, groups=geometry.groups // groups)
    if not isinstance(conv, Selection):
        return Conv(conv.weight[part], None, geometry)
    own = conv.picked[part] - group * inputs * math.prod(geometry.kernel_size)
    return Selection(torch.where(conv.picked[part] == NOTHING, NOTHING, own), inputs, geometry)


def _slots(axis: Classes) -> AxisSlots:
    """Return the slots of one axis; see the module."""
    rows = [axis.reads[at] for at in axis.first.tolist()]
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    outputs, widest = len(axis.number), int(counts.max(initial=0))
    if outputs * widest > MOST_ENTRIES:
        raise UsageError(f"an axis of {outputs} outputs that read up to {widest} inputs each is too long")
    begins = np.concatenate([[0], np.cumsum(counts)])  # of each class among the numbers
    live = np.arange(widest) < counts[axis.number][:, None]
    columns = np.full((outputs, widest), PADDED)
    looked, place = np.unique(axis.looked, return_inverse=True)
    padded = np.full((len(looked), widest), PADDED)
    for row, at in zip(padded, looked.tolist(), strict=True):
        row[: len(axis.reads[at])] = axis.reads[at]
    columns = np.where(live, padded[place] + axis.moved[:, None], PADDED)
    subsets = np.where(live, begins[axis.number][:, None] + np.arange(widest), 0)
    return AxisSlots(columns, subsets, counts[axis.number], np.empty((max(1, int(begins[-1])), 0)))
