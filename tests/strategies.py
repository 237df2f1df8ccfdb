"""Random layers, sizes on which they run, and chains, for Hypothesis.

Only shapes are drawn number by number; weights come from a drawn seed. What is drawn shrinks towards a small plain
layer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cases import make_conv
from hypothesis import strategies as st

from convtool.core.conv import Conv
from convtool.core.geometry import PADDING_MODES, Axis, Geometry, PaddingMode

MODES = st.sampled_from(PADDING_MODES)
SEEDS = st.integers(0, 2**20)


def covering(least: int, *axes: Sequence[Any], seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Yield random combinations of the axes' values: at least so many, and every two values of two axes together.

    What goes wrong hangs on one or two fields at a time, so this finds what the whole product would, in a fraction of
    the time.
    """
    rng, count = random.Random(seed), 0
    places = list(itertools.combinations(range(len(axes)), 2))
    left = {(i, j, a, b) for i, j in places for a, b in itertools.product(range(len(axes[i])), range(len(axes[j])))}
    while left or count < least:
        chosen = [rng.randrange(len(values)) for values in axes]
        left -= {(i, j, chosen[i], chosen[j]) for i, j in places}
        count += 1
        yield tuple(values[number] for values, number in zip(axes, chosen, strict=True))


@st.composite
def axes(draw: st.DrawFn, mode: PaddingMode = "zeros", transposed: bool = False, most: int = 4) -> Axis:
    """One axis; `most` bounds the kernel, and with it all the rest."""
    kernel = draw(st.integers(1, most))
    stride = draw(st.integers(1, most - 1))
    dilation = draw(st.integers(1, most - 1))
    before, after = draw(st.integers(0, most)), draw(st.integers(0, most))
    extra = draw(st.integers(0, max(stride, dilation) - 1)) if transposed else 0
    return Axis(kernel, stride, before, after, dilation, mode, transposed, extra)


def geometry_of(parts: Sequence[Axis], groups: int = 1) -> Geometry:
    """The checked geometry that has these axes, of which there is at least one."""
    return Geometry.of(
        tuple(axis.kernel for axis in parts),
        stride=tuple(axis.stride for axis in parts),
        padding=[(axis.before, axis.after) for axis in parts],
        dilation=tuple(axis.dilation for axis in parts),
        groups=groups,
        padding_mode=parts[0].padding_mode,
        transposed=parts[0].transposed,
        output_padding=tuple(axis.output_padding for axis in parts),
    )


def runs(axis: Axis, size: int) -> bool:
    """Whether the axis has an output for `size` input positions: the rules written out once more."""
    if axis.transposed:
        full = (size - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1 + axis.output_padding
        return full > axis.before + axis.after
    if axis.padding_mode == "reflect" and max(axis.before, axis.after) > size - 1:
        return False
    if axis.padding_mode in ("circular", "symmetric") and max(axis.before, axis.after) > size:
        return False
    return size + axis.before + axis.after > axis.dilation * (axis.kernel - 1)


def chain_runs(layers: Sequence[Axis], size: int) -> bool:
    """Whether layers, one after the other, all have an output."""
    for axis in layers:
        if not runs(axis, size):
            return False
        size = axis.output_size(size)
    return True


def smallest_size(layers: Sequence[Axis]) -> int:
    """The smallest input size on which the layers run."""
    size = 1
    while not chain_runs(layers, size):
        size += 1
    return size


@st.composite
def geometries(
    draw: st.DrawFn,
    number: int | None = None,
    mode: PaddingMode | None = None,
    transposed: bool | None = None,
    groups: int = 1,
    most: int | None = None,
) -> Geometry:
    """A geometry of one to three axes unless `number` is given; a mode or a transposed one unless that is given."""
    count = draw(st.integers(1, 3)) if number is None else number
    flipped = draw(st.booleans()) if transposed is None else transposed
    chosen: PaddingMode = "zeros" if flipped else (draw(MODES) if mode is None else mode)
    limit = (4, 4, 3, 2)[count] if most is None else most
    return geometry_of([draw(axes(chosen, flipped, limit)) for _ in range(count)], groups)


@st.composite
def layers_with_sizes(
    draw: st.DrawFn, number: int | None = None, transposed: bool | None = None
) -> tuple[Conv, tuple[int, ...]]:
    """A layer of up to six channels on each side, filled with whole numbers, and an input size."""
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    geometry = draw(geometries(number, transposed=transposed, groups=groups))
    inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    conv = make_conv(geometry, groups * inner, groups * outer, bias=draw(st.booleans()), seed=draw(SEEDS))
    longest = (0, 8, 4, 2)[len(geometry.axes)]
    return conv, tuple(smallest_size([axis]) + draw(st.integers(0, longest)) for axis in geometry.axes)


@st.composite
def chains(
    draw: st.DrawFn,
    number: int | None = None,
    length: int | None = None,
    mode: PaddingMode | None = None,
    transposed: bool | None = False,
    most: int | None = None,
    biases: bool | None = None,
    largest_number: int = 9,
) -> list[Conv]:
    """Two or three layers whose channels fit one another, with groups that need not nest."""
    count = draw(st.integers(1, 3)) if number is None else number
    chosen = draw(MODES) if mode is None else mode
    layers = draw(st.integers(2, 3)) if length is None else length
    groups = [draw(st.sampled_from((1, 1, 2, 3))) for _ in range(layers)]
    convs = []
    channels = groups[0] * draw(st.integers(1, 2))
    for position, own in enumerate(groups):
        following = groups[position + 1] if position + 1 < layers else 1
        out = own * following * (draw(st.integers(1, 2)) if own * following < 4 else 1)
        geometry = draw(geometries(count, chosen, transposed, own, most))
        bias = draw(st.booleans()) if biases is None else biases
        convs.append(make_conv(geometry, channels, out, bias=bias, seed=draw(SEEDS), most=largest_number))
        channels = out
    return convs


@st.composite
def mixed_chains(
    draw: st.DrawFn, number: int | None = None, biases: bool | None = None, largest_number: int = 9
) -> list[Conv]:
    """Two or three layers of which at least one is transposed, such that one transposed layer has their form."""
    count = draw(st.integers(1, 2)) if number is None else number
    flipped = draw(st.lists(st.booleans(), min_size=2, max_size=3).filter(any))
    convs = []
    channels = draw(st.integers(1, 2))
    for transposed in flipped:
        parts = [draw(axes("zeros", transposed, 4 - count)) for _ in range(count)]
        if not transposed:  # a stride of a plain layer beside a transposed one has no single-layer form
            parts = [replace(axis, stride=1) for axis in parts]
        out = draw(st.integers(1, 2))
        bias = draw(st.booleans()) if biases is None else biases
        convs.append(make_conv(geometry_of(parts), channels, out, bias=bias, seed=draw(SEEDS), most=largest_number))
        channels = out
    return convs


def smallest_input(convs: Sequence[Conv]) -> tuple[int, ...]:
    """The smallest input size of a chain, axis by axis."""
    return tuple(smallest_size(layers) for layers in zip(*(conv.geometry.axes for conv in convs), strict=True))


def sizes_that_run(convs: Sequence[Conv], extra: Sequence[int]) -> tuple[int, ...]:
    """The smallest input size and `extra` on top, axis by axis."""
    return tuple(least + more for least, more in zip(smallest_input(convs), extra, strict=True))


def geometry_runs(geometry: Geometry, size: Sequence[int]) -> bool:
    """Whether a layer of this geometry runs on `size`; a fused one may need more than its parts."""
    return all(runs(axis, length) for axis, length in zip(geometry.axes, size, strict=True))
