"""Which outputs of an axis are alike: those with the same pattern of live taps through all layers, but for a shift.

Away from the borders a tree repeats itself, so only one period of that is looked at.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from convtool.core.conv import Conv
from convtool.core.expression import Expression, output_size
from convtool.core.taps import Table
from convtool.core.tree import Chain, Sum, leaves, walk
from convtool.core.ways import Places, way_back

CLASS_ENTRIES = 1 << 22  # of tap tables that are looked through at a time


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """The classes of one axis's outputs.

    Attributes:
        number: (outputs,) the class of each.
        first: (classes,) an output of each.
        moved: (outputs,) how far to the right of what is looked at each output reads.
        looked: (outputs,) which output of its class each is looked at as.
        reads: for each output that is looked at, what it reads.
    """

    number: Table
    first: Table
    moved: Table
    looked: Table
    reads: dict[int, Table]


def classes(tree: Expression, size: tuple[int, ...], axis: int) -> Classes:
    """Return the classes of an axis of what a tree gives."""
    outputs = output_size(tree, size)[axis]
    every = period(tree, axis)
    found, rate = np.flatnonzero(inside(tree, size, axis, np.arange(outputs))), _rates(tree, axis)[-1]
    looked, moved = np.arange(outputs), np.zeros(outputs, dtype=np.int64)
    if rate and len(found) and found[-1] - found[0] + 1 == len(found):
        # Away from the borders each output is like one of the first period, moved.
        looked[found] = found[0] + np.arange(len(found)) % every
        moved[found] = np.arange(len(found)) // every * int(every / rate)
    kinds: dict[bytes, int] = {}
    number, first, reads = np.zeros(outputs, dtype=np.int64), list[int](), dict[int, Table]()
    some = np.flatnonzero(looked == np.arange(outputs))
    wide = sum(conv.geometry.kernel_size[axis] for conv in leaves(tree))
    for part in np.array_split(some, min(len(some), 1 + len(some) * wide**2 // CLASS_ENTRIES)):
        way, (read,) = way_back(tree, size, [Places.each(part)], [axis])
        looks = [b""] * len(part)
        for step in (step for leaf in leaves(way) for step in leaf.axes):
            looks = [look + seen for look, seen in zip(looks, step.looks(len(part)), strict=True)]
        rows = np.split(read.positions, read.starts(len(part))[1:-1])
        for output, look, row in zip(part.tolist(), looks, rows, strict=True):
            if look not in kinds:
                kinds[look] = len(first)
                first.append(output)
            number[output], reads[output] = kinds[look], row
    return Classes(number[looked], np.array(first, dtype=np.int64), moved, looked, reads)


def inside(tree: Expression, size: tuple[int, ...], axis: int, outputs: Table) -> npt.NDArray[np.bool_]:
    """Return for which outputs of an axis no tap of any layer reads padding: those away from both borders."""
    within = np.ones(len(outputs), dtype=bool)

    def back(part: Expression, at: tuple[int, ...], lowest: Table, highest: Table) -> tuple[Table, Table]:
        """Carry the first and the last place that each output may read back to the part's input."""
        nonlocal within
        if isinstance(part, Chain):
            sizes = itertools.accumulate(part.parts[:-1], lambda to, one: output_size(one, to), initial=at)
            for layers, before in reversed(list(zip(part.parts, sizes, strict=True))):
                lowest, highest = back(layers, before, lowest, highest)
            return lowest, highest
        if isinstance(part, Sum):
            ends = [back(branch, at, lowest, highest) for branch in part.parts]
            return np.minimum.reduce([low for low, _ in ends]), np.maximum.reduce([high for _, high in ends])
        one = part.geometry.axes[axis]
        if one.transposed:
            lowest, highest = -((one.reach - one.before - lowest) // one.stride), (highest + one.before) // one.stride
        else:
            lowest, highest = lowest * one.stride - one.before, highest * one.stride - one.before + one.reach
        within = within & (lowest >= 0) & (highest < at[axis])
        return lowest, highest

    back(tree, size, outputs, outputs)
    return within


def _rates(tree: Expression, axis: int) -> list[Fraction]:
    """Return the positions behind each layer for each of the input, those of the output last.

    Branches of different strides give outputs of one size at some input sizes alone, and then nothing repeats itself:
    0 for what comes of them.
    """
    rates = [Fraction(1)]

    def step(conv: Conv, rate: Fraction) -> Fraction:
        stride = conv.geometry.stride[axis]
        rates.append(rate * stride if conv.geometry.transposed else rate / stride)
        return rates[-1]

    given = walk(tree, rates[0], step, lambda _, branches: branches[0] if len(set(branches)) == 1 else Fraction(0))
    return [*rates, given]


def period(tree: Expression, axis: int, transpose: bool = False) -> int:
    """Return after how many outputs (inputs where `transpose`) an axis repeats itself, away from the borders."""
    rates = _rates(tree, axis)
    if not rates[-1]:
        return 1
    return math.lcm(*((rate if transpose else rate / rates[-1]).denominator for rate in rates))
