"""Where a fusion is exact: the decision against running both, in both directions and position by position.

Three steps: `border_at` is held against the outputs of the layers themselves; `decide` for every size against
`border_at` at a great many sizes; and for two zero-padded layers, against the closed rule.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import make_conv, make_inputs, real_numbers, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import average_pool, make
from oracles import NOTHING, axis_taps
from strategies import chain_runs, chains, covering, geometry_of, geometry_runs, mixed_chains, runs, sizes_that_run

from convtool.core.border import Border, Mask, Verdict, all_of, border_at, decide, describe_sizes
from convtool.core.compose import compose, compose_chain
from convtool.core.conv import Conv
from convtool.core.expression import run
from convtool.core.forward import forward
from convtool.core.fuse import explain, fuse
from convtool.core.geometry import PADDING_MODES, Axis, Geometry, PaddingMode
from convtool.core.joint import compose_geometry
from convtool.core.tree import Chain
from convtool.errors import RefusedError, UsageError

Layers: TypeAlias = tuple[Axis, ...]

LARGE = 300  # numbers so large that what differs does not come out equal by accident


def differing(chain: Sequence[Conv], fused: Conv, size: Sequence[int]) -> Mask:
    """The output positions where running the layers and running the fused one gives different numbers."""
    x = make_inputs(chain[0], size, most=LARGE)
    absolute = [
        Conv(conv.weight.abs(), None if conv.bias is None else conv.bias.abs(), conv.geometry) for conv in chain
    ]
    assert run(Chain(tuple(absolute)), x.abs()).max() < 2**52  # so all of it is exact
    found: Mask = (run(Chain(tuple(chain)), x) != forward(fused, x)).flatten(0, 1).any(0).numpy()
    return found


def check_border(chain: Sequence[Conv], size: Sequence[int]) -> bool:
    """Whether the layers are exactly one at this size; what is said about the border is checked against them."""
    fused = compose_chain(chain)
    if not geometry_runs(fused.geometry, size):
        with pytest.raises(RefusedError, match="the fused layer would not"):
            border_at(chain, fused.geometry, size)
        with pytest.raises(RefusedError, match="the fused layer would not"):
            decide(chain, fused.geometry, size)
        return False
    border, verdict = border_at(chain, fused.geometry, size), decide(chain, fused.geometry, size)
    expected = differing(chain, fused, size)
    np.testing.assert_array_equal(border.differs(), expected)
    assert border.differs().shape == expected.shape
    assert tuple(size) == verdict.input_size
    assert border.exact == verdict.exact == (not expected.any())
    assert verdict.inside == expected.all()
    for axis, (start, end) in enumerate(verdict.rim):
        assert 0 <= start + end <= expected.shape[axis]
    if verdict.exact:
        assert verdict.rim == ((0, 0),) * len(verdict.rim)
    else:
        check_rim(verdict.rim, expected)
    bare = [Conv(conv.weight, None, conv.geometry) for conv in chain]
    assert verdict.only_bias == (not verdict.exact and border_at(bare, fused.geometry, size).exact)
    return verdict.exact


def check_rim(rim: Sequence[tuple[int, int]], expected: Mask) -> None:
    """Whatever differs lies in the rim, which isn't empty."""
    inside = expected[tuple(slice(start, size - end) for (start, end), size in zip(rim, expected.shape, strict=True))]
    assert not inside.any()
    assert any(start or end for start, end in rim)


# --- at one input size, against the layers themselves

more_positions = st.tuples(*(st.integers(0, 6),) * 3)


@pytest.mark.parametrize("mode", PADDING_MODES)
@settings(max_examples=120)
@given(data=st.data(), more=more_positions)
def test_along_one_axis(mode: PaddingMode, data: st.DataObject, more: tuple[int, ...]) -> None:
    chain = data.draw(chains(number=1, mode=mode, largest_number=LARGE))
    check_border(chain, sizes_that_run(chain, more[:1]))


@settings(max_examples=120)
@given(chain=mixed_chains(number=1, largest_number=LARGE), more=more_positions)
def test_along_one_axis_with_transposed_layers(chain: list[Conv], more: tuple[int, ...]) -> None:
    check_border(chain, sizes_that_run(chain, more[:1]))


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("number", [2, 3])
@settings(max_examples=50)
@given(data=st.data(), more=more_positions)
def test_along_several_axes(number: int, mode: PaddingMode, data: st.DataObject, more: tuple[int, ...]) -> None:
    chain = data.draw(chains(number=number, mode=mode, most=3 if number == 2 else 2, largest_number=LARGE))
    check_border(chain, sizes_that_run(chain, more[:number]))


@settings(max_examples=80)
@given(chain=mixed_chains(number=2, largest_number=LARGE), more=more_positions)
def test_along_two_axes_with_transposed_layers(chain: list[Conv], more: tuple[int, ...]) -> None:
    check_border(chain, sizes_that_run(chain, more[:2]))


@pytest.mark.parametrize("mode", PADDING_MODES)
@settings(max_examples=60)
@given(data=st.data(), more=more_positions)
def test_layers_that_are_often_exact(mode: PaddingMode, data: st.DataObject, more: tuple[int, ...]) -> None:
    # Random layers seldom are. Here the second is small and unpadded along most axes, and no bias comes first.
    first = data.draw(chains(number=2, length=2, mode=mode, most=3, biases=False, largest_number=LARGE))[0]
    axes = []
    for axis in first.geometry.axes:
        padding = data.draw(st.sampled_from((0, 0, 1)))
        axes.append(Axis(data.draw(st.integers(1, 2)), 1, padding, 0, 1, mode))
        if padding and mode == "zeros" and data.draw(st.booleans()):
            full = tuple((max(before, axis.reach), after) for before, after in first.geometry.padding)
            first = Conv(first.weight, None, replace(first.geometry, padding=full))
    second = make_conv(geometry_of(axes), first.out_channels, 2, seed=3, most=LARGE)
    check_border([first, second], sizes_that_run([first, second], more[:2]))


def test_small_pairs() -> None:
    exact = inexact = 0
    fields = (1, 2, 3), (1, 2, 3), (0, 1, 2), (0, 2), (1, 2), (1, 2), (0, 1), (0, 1), (3, 4, 6), (True, False, False)
    for number, (k1, s1, p1, q1, k2, s2, p2, q2, size, bias) in enumerate(covering(500, *fields)):
        layers = (Axis(k1, s1, p1, q1), Axis(k2, s2, p2, q2))
        if chain_runs(layers, size):
            chain = [
                make_conv(geometry_of([axis]), 1, 1, bias=bias, seed=number + i, most=LARGE)
                for i, axis in enumerate(layers)
            ]
            if check_border(chain, (size,)):
                exact += 1
            else:
                inexact += 1
    assert exact > 120
    assert inexact > 120


def test_weights_that_happen_to_be_zero() -> None:
    # The decision is for generic weights: the layers may be exact where it says they aren't, never the reverse.
    first = make_conv(Geometry.of(3, padding=1), 1, 1, bias=False)
    second = make_conv(Geometry.of(3, padding=1), 1, 1, bias=False)
    second.weight[..., 0] = second.weight[..., 2] = 0.0
    fused = compose_chain([first, second])
    assert not differing([first, second], fused, (5,)).any()
    assert not decide([first, second], fused.geometry, (5,)).exact


def test_a_bias_of_zeros_loses_nothing() -> None:
    first = make_conv(Geometry.of((1, 1)), 2, 2)
    second = make_conv(Geometry.of((3, 2), padding=1), 2, 2)
    geometry = compose_geometry(first.geometry, second.geometry)
    zero = Conv(first.weight, torch.zeros(2, dtype=torch.float64), first.geometry)
    for size in (None, (4, 5)):
        lost = decide([first, second], geometry, size)
        assert not lost.exact
        assert lost.only_bias
        assert lost.rim == ((1, 1), (1, 1))
        assert decide([zero, second], geometry, size).exact


# --- for every input size, against a sweep


def unit_layers(layers: Layers, biases: Sequence[bool]) -> list[Conv]:
    """A layer per axis whose numbers nobody looks at."""
    return [make_conv(geometry_of([axis]), 1, 1, bias=bias) for axis, bias in zip(layers, biases, strict=True)]


def sweep(chain: Sequence[Conv], fused: Geometry, sizes: Iterable[int]) -> dict[int, Mask]:
    """By size, which outputs differ, at the sizes on which both sides run."""
    layers = tuple(conv.geometry.axes[0] for conv in chain)
    return {
        size: border_at(chain, fused, (size,)).differs()
        for size in sizes
        if chain_runs(layers, size) and runs(fused.axes[0], size)
    }


FAR = 360  # a size at which no output sees both ends, whatever the layers drawn here


def check_all_sizes(layers: Layers, biases: Sequence[bool], upto: int = 60) -> Verdict:
    """The verdict for every size, held against all small sizes and one period of large ones."""
    chain = unit_layers(layers, biases)
    fused = compose_chain(chain).geometry
    verdict = decide(chain, fused)
    period = math.prod(axis.stride for axis in layers if not axis.transposed)
    small = sweep(chain, fused, range(1, upto))
    large = sweep(chain, fused, range(FAR, FAR + period))
    assert len(large) == period
    masks = small | large
    label = f"{layers} {biases} {verdict}"
    assert verdict.exact == (not any(mask.any() for mask in masks.values())), label
    if small:
        assert verdict.smallest == (min(small),), label
    expected = [rim_of(mask) for mask in large.values()]
    if None not in expected:
        sides = tuple(max(rim[side] for rim in expected if rim is not None) for side in (0, 1))
        assert verdict.rim == (sides,), label
    assert verdict.inside == (None in expected), label
    if verdict.exact:
        assert verdict.rim == ((0, 0),)
        assert verdict.multiples == ()
        assert not verdict.only_bias
        return verdict
    # The sizes named are exact, all of them and, among long ones, no others.
    for size, mask in masks.items():
        named = any(size % divisor in residues for divisor, residues in verdict.multiples)
        if named:
            assert not mask.any(), f"{size} {label}"
        elif size in large:
            assert mask.any(), f"{size} {label}"
    assert verdict.only_bias == decide(unit_layers(layers, (False,) * len(layers)), fused).exact, label
    return verdict


def rim_of(mask: Mask) -> tuple[int, int] | None:
    """How far differences reach in from the start and from the end; None where they reach the middle."""
    third = len(mask) // 3
    if mask[third : len(mask) - third].any():
        return None
    start, end = np.flatnonzero(mask[:third]), np.flatnonzero(mask[::-1][:third])
    return (int(start[-1]) + 1 if len(start) else 0, int(end[-1]) + 1 if len(end) else 0)


def random_axis(rng: random.Random, mode: PaddingMode, most: int) -> Axis:
    """An axis that is plain in most respects, as those of real layers are."""
    return Axis(
        kernel=rng.randint(1, most),
        stride=rng.choice((1, 1, 2, 3)),
        before=rng.choice((0, 0, 1, 2, 3)),
        after=rng.choice((0, 0, 1, 2, 4)),
        dilation=rng.choice((1, 1, 2, 3)),
        padding_mode=mode,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_every_size_for_random_pairs(mode: PaddingMode, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40 if mode == "zeros" else 15):
        layers = tuple(random_axis(rng, mode, 4) for _ in range(2))
        check_all_sizes(layers, [rng.random() < 0.3 for _ in layers])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_every_size_for_random_triples(mode: PaddingMode, seed: int) -> None:
    rng = random.Random(100 + seed)
    for _ in range(12 if mode == "zeros" else 5):
        layers = tuple(random_axis(rng, mode, 3) for _ in range(3))
        check_all_sizes(layers, [rng.random() < 0.3 for _ in layers])


@pytest.mark.parametrize("seed", range(2))
def test_every_size_for_nearly_exact_layers(seed: int) -> None:
    # Layers padded in full, or strided by their kernel, where exactness hangs on a single position.
    rng = random.Random(200 + seed)
    exact = partly = 0
    for _ in range(60):
        kernel, dilation = rng.randint(1, 4), rng.choice((1, 1, 2, 5))
        reach = dilation * (kernel - 1)
        stride = rng.choice((1, kernel, kernel + 1, reach + 1))
        first = Axis(
            kernel,
            stride,
            max(0, rng.choice((reach, reach - stride + 1, reach - stride, 0))),
            max(0, rng.choice((reach, reach - 1, 0))),
            dilation,
        )
        second = Axis(
            rng.randint(1, 4),
            rng.choice((1, 2, 5)),
            rng.choice((0, 1, 3)),
            rng.choice((0, 1, 2)),
            rng.choice((1, 2, 4)),
        )
        verdict = check_all_sizes((first, second), (False, rng.random() < 0.5))
        exact += verdict.exact
        partly += bool(verdict.multiples)
    assert exact > 8
    assert partly > 2


@pytest.mark.parametrize("seed", range(2))
def test_every_size_for_transposed_layers(seed: int) -> None:
    rng = random.Random(300 + seed)
    for _ in range(40):
        flipped = rng.choice(((True, True), (True, False), (False, True), (True, False, True), (False, True, True)))
        layers = []
        for transposed in flipped:
            axis = random_axis(rng, "zeros", 3)
            extra = rng.randint(0, max(axis.stride, axis.dilation) - 1)
            layers.append(
                replace(axis, transposed=True, output_padding=extra) if transposed else replace(axis, stride=1)
            )
        check_all_sizes(tuple(layers), [rng.random() < 0.2 for _ in layers])


@pytest.mark.parametrize(
    "layers",
    [
        # ends that come apart late: a long reach, a large stride, and padding on top
        (Axis(5, 4, 2, 2, 3), Axis(4, 5, 3, 3, 2)),
        (Axis(7, 1, 0, 0, 5), Axis(2, 1, 1, 1, 9)),
        (Axis(1, 7), Axis(3, 3, 1, 1)),
        # patches of a patch embedding, merged by another one
        (Axis(4, 4), Axis(2, 2, 1, 1)),
        (Axis(4, 4), Axis(3, 2, 1, 1), Axis(2, 2, 0, 1)),
        # a stride so large that only some sizes ever reach the padding
        (Axis(3, 1, 2, 0), Axis(1, 6, 0, 5)),
        (Axis(3, 1, 2, 2), Axis(2, 6, 0, 5, 4)),
        # windows with gaps that step over the padding
        (Axis(2, 1, 0, 0, 7), Axis(2, 3, 3, 0, 3)),
        (Axis(2, 3, 0, 0, 6), Axis(3, 2, 2, 2, 3)),
        # cropped more than it made
        (Axis(3, 2, 4, 5, 1, "zeros", True), Axis(3, 1, 2, 2)),
        (Axis(3, 1, 2, 2), Axis(3, 3, 7, 5, 2, "zeros", True)),
        (Axis(2, 4, 6, 7, 1, "zeros", True), Axis(2, 3, 8, 9, 1, "zeros", True)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_every_size_for_hard_layers(layers: Layers, bias: bool) -> None:
    check_all_sizes(layers, (bias,) * len(layers), upto=130)


# --- for two zero-padded layers, against the closed rule


def harmless_sides(first: Axis, second: Axis, bias: bool) -> tuple[bool, bool]:
    """DESIGN section 3.3: whether the second's padding hides nothing, before and after.

    Derived from the virtual positions of the first layer's output that the second reads in its padding. The nearest of
    them before the start is v < 0 (-1 where the second has no stride); the first layer's last tap reads position
    v*s1 - p1 + d1*(k1-1) there, which has to be padding too. After the end, at some size, its first tap reads position
    I + (padding after) - d1*(k1-1).
    """
    reach = first.dilation * (first.kernel - 1)
    virtual = [
        position
        for step in range(second.before + 1)
        for tap in range(second.kernel)
        if (position := step * second.stride - second.before + tap * second.dilation) < 0
    ]
    before = not virtual or (not bias and first.before >= reach + max(virtual) * first.stride + 1)
    after = second.after == 0 or (not bias and first.after >= reach)
    return before, after


def test_the_closed_rule() -> None:
    exact = inexact = 0
    first_fields = (1, 2, 3), (1, 2, 3), (1, 2), (0, 1, 2), (0, 2, 4)
    second_fields = (1, 2, 3), (1, 2), (1, 2), ((0, 1), (1, 0), (3, 0))
    biases = (True, *(False,) * 12)
    for k1, s1, d1, p1, q1, k2, s2, d2, p2, bias in covering(450, *first_fields, *second_fields, biases):
        before, after = p2
        first, second = Axis(k1, s1, p1, q1, d1), Axis(k2, s2, before, after, d2)
        chain = unit_layers((first, second), (bias, False))
        verdict = decide(chain, compose_chain(chain).geometry)
        sides = harmless_sides(first, second, bias)
        assert verdict.exact == all(sides), (first, second, bias)
        # ... which is what the design says where the second layer steps over nothing, and never less than it
        reach = d1 * (k1 - 1)
        stated = (
            before == 0 or (not bias and p1 >= reach - s1 + 1),
            after == 0 or (not bias and q1 >= reach),
        )
        assert verdict.exact or not all(stated)
        if s2 == 1:
            assert verdict.exact == all(stated)
        if verdict.exact:
            exact += 1
        else:
            inexact += 1
            assert (verdict.rim[0][0] > 0) == (not sides[0])
            assert (verdict.rim[0][1] > 0) == (not sides[1])
    assert exact > 80
    assert inexact > 80


def test_the_rule_holds_side_by_side() -> None:
    rng = random.Random(7)
    for _ in range(200):
        first, second = random_axis(rng, "zeros", 3), random_axis(rng, "zeros", 3)
        bias = rng.random() < 0.2
        chain = unit_layers((first, second), (bias, False))
        verdict = decide(chain, compose_chain(chain).geometry)
        sides = harmless_sides(first, second, bias)
        assert verdict.exact == all(sides), (first, second, bias)


def test_only_the_first_padded_is_always_exact() -> None:
    rng = random.Random(8)
    for mode in PADDING_MODES:
        for _ in range(12):
            first = random_axis(rng, mode, 4)
            others = [replace(random_axis(rng, mode, 3), before=0, after=0) for _ in range(2)]
            verdict = check_all_sizes((first, *others), (True, True, True), upto=25)
            assert verdict.exact


# --- what real networks have


def verdict_of(*layers: Conv) -> Verdict:
    return decide(layers, compose_chain(layers).geometry)


def test_a_convolution_and_a_batch_norm() -> None:
    conv = make_conv(Geometry.of((3, 5), stride=2, padding=(1, 2)), 2, 3)
    norm = make_conv(Geometry.of((1, 1), groups=3), 3, 3)
    assert verdict_of(conv, norm).exact
    assert verdict_of(norm, make_conv(Geometry.of((3, 5)), 3, 2)).exact
    lost = verdict_of(norm, make_conv(Geometry.of((3, 5), padding=(1, 2)), 3, 2))
    assert not lost.exact
    assert lost.only_bias
    assert lost.rim == ((1, 1), (2, 2))
    assert lost.describe_rim() == "the first row, the last row, the first 2 columns and the last 2 columns"


@pytest.mark.parametrize("kernel", [(14, 14), (2, 3)])
def test_a_patch_embedding_and_a_padded_convolution(kernel: tuple[int, int]) -> None:
    patches = make_conv(Geometry.of(kernel, stride=kernel), 1, 2, bias=False)
    after = make_conv(Geometry.of((3, 3), padding=1), 2, 1)
    verdict = verdict_of(patches, after)
    assert not verdict.exact
    assert not verdict.only_bias
    assert verdict.multiples == tuple((length, (0,)) for length in kernel)
    words = {1: f"sizes divisible by {kernel[0]}", 2: "sizes divisible by 2 and sizes divisible by 3"}
    assert describe_sizes(verdict) == words[len(set(kernel))]
    fused = compose_chain([patches, after])
    for size in itertools.product((3 * kernel[0], 3 * kernel[0] + 1), (4 * kernel[1], 4 * kernel[1] + 1)):
        divides = all(length % step == 0 for length, step in zip(size, kernel, strict=True))
        assert decide([patches, after], fused.geometry, size).exact == divides
        assert check_border([patches, after], size) == divides


def test_full_padding_is_exact() -> None:
    full = make_conv(Geometry.of((3, 2), padding=(2, 1)), 1, 1, bias=False)
    assert verdict_of(full, make_conv(Geometry.of((5, 4), padding=(4, 3)), 1, 1)).exact
    one_less = make_conv(Geometry.of((3, 2), padding=(2, 0)), 1, 1, bias=False)
    verdict = verdict_of(one_less, make_conv(Geometry.of((5, 4), padding=(4, 3)), 1, 1))
    assert verdict.rim[0] == (0, 0)
    assert verdict.rim[1][0] > 0
    assert verdict.rim[1][1] > 0
    assert verdict.describe_rim() == "the first 3 columns and the last 3 columns"


def test_two_layers_of_same_padding_differ_by_the_second_ones_padding() -> None:
    for padding in (1, 2, 3):
        geometry = Geometry.of((2 * padding + 1,), padding="same")
        verdict = verdict_of(make_conv(geometry, 1, 1), make_conv(geometry, 1, 1))
        assert verdict.rim == ((padding, padding),)


def test_pooling_and_upsampling() -> None:
    conv = make_conv(Geometry.of((3, 3), padding=1), 2, 2)
    assert verdict_of(conv, average_pool(2, 2, 2)).exact
    assert not verdict_of(average_pool(2, 2, 2), conv).exact
    # Upsampling puts each input on one output per phase: a bias before it stays one number.
    assert verdict_of(conv, make("upsample", 2, 2, factor=2)).exact
    for kernel, exact in ((2, False), (3, False)):  # a transposed layer in general makes another number at each phase
        up = make_conv(Geometry.of((kernel, kernel), stride=2, transposed=True), 2, 2)
        assert verdict_of(conv, up).exact is exact
    point = make_conv(Geometry.of((1, 1)), 2, 2, bias=False)
    assert verdict_of(point, make("upsample", 2, 2, factor=2)).exact
    assert verdict_of(make("upsample", 2, 2, factor=2), point).exact
    # what is cut off of the upsampling's output cannot be brought back, but nothing is
    assert verdict_of(make("upsample", 2, 2, factor=2), conv).exact


def test_every_axis_has_to_be_exact() -> None:
    first = make_conv(Geometry.of((1, 3)), 1, 1, bias=False)
    rows = make_conv(Geometry.of((3, 1), padding=(1, 0)), 1, 1)
    columns = make_conv(Geometry.of((1, 3), padding=(0, 1)), 1, 1)
    assert verdict_of(first, rows).exact
    verdict = verdict_of(first, columns)
    assert not verdict.exact
    assert verdict.rim == ((0, 0), (1, 1))
    assert verdict.smallest == (1, 3)
    assert verdict.describe_rim() == "the first column and the last column"


@settings(max_examples=80)
@given(chain=chains(number=2, most=3), more=more_positions)
def test_exact_for_every_size_means_at_each(chain: list[Conv], more: tuple[int, ...]) -> None:
    geometry = compose_chain(chain).geometry
    verdict = decide(chain, geometry)
    size = sizes_that_run(chain, more[:2])
    if not geometry_runs(geometry, size):
        assert any(length < least for length, least in zip(size, verdict.smallest, strict=True))
        return
    assert all(length >= least for length, least in zip(size, verdict.smallest, strict=True))
    at = decide(chain, geometry, size)
    if verdict.exact:
        assert at.exact
    for number, pair in enumerate(zip(*(conv.geometry.axes for conv in chain), strict=True)):
        alone = [
            Conv(
                whole_numbers(0, 1, 1, axis.kernel),
                conv.bias if conv.bias is None else conv.bias[:1],
                geometry_of([axis]),
            )
            for axis, conv in zip(pair, chain, strict=True)
        ]
        single = decide(alone, compose_chain(alone).geometry)
        assert single.rim == (verdict.rim[number],)
        assert single.smallest == (verdict.smallest[number],)


# --- words


def test_all_of_a_sum() -> None:
    exact = Verdict(True, None, ((0, 0), (0, 0)), smallest=(1, 4))
    bias = Verdict(False, None, ((1, 0), (0, 2)), smallest=(3, 2), only_bias=True)
    taps = Verdict(False, None, ((0, 2), (1, 1)), smallest=(1, 1))
    assert all_of([exact, exact]) == exact
    assert all_of([exact, bias]) == Verdict(False, None, ((1, 0), (0, 2)), smallest=(3, 4), only_bias=True)
    assert all_of([bias, taps]) == Verdict(False, None, ((1, 2), (1, 2)), smallest=(3, 2), only_bias=False)


@pytest.mark.parametrize(
    ("rim", "text"),
    [
        (((0, 0), (0, 0)), ""),
        (((1, 0), (0, 0)), "the first row"),
        (((2, 1), (0, 3)), "the first 2 rows, the last row and the last 3 columns"),
        (((1, 2),), "the first position and the last 2 positions"),
        (((0, 1), (0, 0), (2, 0)), "the last position along axis 0 and the first 2 positions along axis 2"),
    ],
)
def test_describing_a_rim(rim: tuple[tuple[int, int], ...], text: str) -> None:
    assert Verdict(False, None, rim).describe_rim() == text


def test_describing_sizes() -> None:
    assert describe_sizes(Verdict(False, None, ((1, 1),))) == ""
    assert describe_sizes(Verdict(False, None, ((1, 1),), multiples=((4, (0,)),))) == "sizes divisible by 4"
    several = Verdict(False, None, ((1, 1),), multiples=((4, (1, 2)), (3, (0,))))
    assert describe_sizes(several) == "sizes that leave 1,2 when divided by 4 and sizes divisible by 3"
    twice = Verdict(False, None, ((1, 1), (1, 1)), multiples=((4, (0,)), (4, (0,))))
    assert describe_sizes(twice) == "sizes divisible by 4"


@settings(max_examples=80)
@given(chain=chains(number=2, most=3), more=more_positions)
def test_a_refusal_always_says_what_would_differ(chain: list[Conv], more: tuple[int, ...]) -> None:
    geometry = compose_chain(chain).geometry
    size = sizes_that_run(chain, more[:2])
    names = [f"layer{number}" for number in range(len(chain))]
    for at in (None, size if geometry_runs(geometry, size) else None):
        verdict = decide(chain, geometry, at)
        if verdict.exact:
            continue
        text = explain(chain, geometry, verdict, names)
        cause = text.partition(", so ")[0].partition("exactly")[2]
        assert all(conv.geometry.padded for name, conv in zip(names, chain, strict=True) if f"{name} pad" in cause)
        assert verdict.describe_rim()
        expected = "no output would be right" if verdict.inside else f"{verdict.describe_rim()} of the output would"
        assert f", so {expected}" in text


ADVICE = re.compile(r"give layer0 padding (\S+) and (.*) none, and train on with that")


@pytest.mark.parametrize("kind", ["plain", "transposed"])
@settings(max_examples=80)
@given(data=st.data())
def test_following_the_advice_of_a_refusal_makes_it_exact(kind: str, data: st.DataObject) -> None:
    chain = data.draw(chains(number=2, most=3) if kind == "plain" else mixed_chains(number=2))
    fused = compose_chain(chain)
    verdict = decide(chain, fused.geometry)
    if verdict.exact:
        return
    names = [f"layer{number}" for number in range(len(chain))]
    text = explain(chain, fused.geometry, verdict, names)
    assert "  " not in text  # no name is missing
    advice = ADVICE.search(text)
    if kind == "plain":
        assert advice is not None
    if advice is None:
        return
    padding = [tuple(map(int, side.split(":"))) * (1 if ":" in side else 2) for side in advice[1].split(",")]
    unpadded = advice[2].split(", ")
    changed = []
    for name, conv in zip(names, chain, strict=True):
        sides = conv.geometry.padding
        if name == "layer0":
            sides = tuple((before, after) for before, after in padding)
        elif name in unpadded:
            sides = ((0, 0),) * len(sides)
        mode = fused.geometry.padding_mode if name == "layer0" else conv.geometry.padding_mode
        changed.append(Conv(conv.weight, conv.bias, replace(conv.geometry, padding=sides, padding_mode=mode)))
    again = compose_chain(changed)
    assert again.geometry == fused.geometry
    assert decide(changed, again.geometry).exact


def test_what_differs_everywhere_is_no_border() -> None:
    # A transposed layer of stride 2 spreads the bias before it unevenly over all of its outputs: no single bias is
    # right anywhere, and whoever accepts a different border has not accepted that.
    first = make_conv(Geometry.of((1, 1)), 2, 2)
    second = make_conv(Geometry.of((3, 2), stride=2, transposed=True), 2, 2)
    assert differing([first, second], compose_chain([first, second]), (6, 5)).all()
    with pytest.raises(RefusedError, match="layer 2 spreads the bias of layer 1 unevenly over its outputs, so no"):
        fuse([first, second], allow_border=True)
    assert fuse([Conv(first.weight, None, first.geometry), second]).bias is not None


def test_a_size_that_does_not_run() -> None:
    layers = [make_conv(Geometry.of((3, 2)), 1, 1), make_conv(Geometry.of((3, 2)), 1, 1)]
    geometry = compose_chain(layers).geometry
    with pytest.raises(UsageError, match="axis 0 of input size 2,5: an input size of 2"):
        decide(layers, geometry, (2, 5))
    with pytest.raises(UsageError, match="axis 0 of input size 2,4: an input size of 2"):  # the second layer's input
        border_at(layers, geometry, (4, 5))
    with pytest.raises(UsageError, match="2 values, one per spatial axis, got 9"):
        decide(layers, geometry, (9,))


def test_a_size_on_which_only_the_fused_layer_does_not_run() -> None:
    # 3 + 3 positions mirrored need more of the input than 3 and then 3 do
    geometry = Geometry.of(3, padding=3, padding_mode="reflect")
    layers = [make_conv(geometry, 1, 1), make_conv(geometry, 1, 1)]
    fused = compose_geometry(geometry, geometry)
    for size in (4, 5, 6):
        with pytest.raises(RefusedError, match="the layers run on this size, but the fused layer would not: reflect"):
            border_at(layers, fused, (size,))
    assert not border_at(layers, fused, (7,)).exact
    assert decide(layers, fused).smallest == (7,)


def test_a_border_is_a_mask_of_the_outputs_shape() -> None:
    layers = [make_conv(Geometry.of((1, 3)), 1, 1, bias=False), make_conv(Geometry.of((3, 3), padding=1), 1, 1)]
    border = border_at(layers, compose_chain(layers).geometry, (4, 6))
    assert isinstance(border, Border)
    assert border.differs().tolist() == [[True, False, False, True]] * 4
    assert border.rims == ((0, 0), (1, 1))
    assert [axis.differs.tolist() for axis in border.axes] == [[False] * 4, [True, False, False, True]]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_which_outputs_read_the_input_at_all(size: int) -> None:
    layers = (Axis(2, 2, 3, 3), Axis(2, 1, 2, 2))
    border = border_at(
        unit_layers(layers, (False, False)), compose_chain(unit_layers(layers, (False,) * 2)).geometry, (size,)
    )
    inner, outer = axis_taps(layers[0], size), axis_taps(layers[1], layers[0].output_size(size))
    reads = [any(through != NOTHING and any(i != NOTHING for i in inner[through]) for through in row) for row in outer]
    assert border.axes[0].reads.tolist() == reads


def test_what_would_take_for_ever_to_decide_is_decided_for_one_size() -> None:
    layers = [make_conv(Geometry.of(5, padding=2), 1, 1), make_conv(Geometry.of(3, stride=4000, padding=1), 1, 1)]
    geometry = compose_chain(layers).geometry
    with pytest.raises(RefusedError, match="are too large to decide for every input size; give --input-size"):
        decide(layers, geometry)
    assert not decide(layers, geometry, (4001,)).exact


def biased(kernel: int, **fields: Any) -> Conv:
    """A layer of ones with a bias."""
    weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
    return Conv(weight, torch.tensor([3.0], dtype=torch.float64), Geometry.of((kernel, kernel), **fields))


@pytest.mark.parametrize(
    ("second", "exact"),
    [
        (biased(3, stride=3, transposed=True), True),  # the same at every phase
        (biased(4, stride=2, transposed=True), False),  # and here at the border it isn't
        (biased(4, stride=2, padding=1, transposed=True), False),
        (biased(2, stride=2, dilation=3, transposed=True, output_padding=1), False),
        (Conv(F.pad(torch.ones(1, 1, 1, 1).double(), (1,) * 4), None, Geometry.of((3, 3), padding=1)), True),
        (Conv(torch.ones(1, 1, 3, 3).double(), None, Geometry.of((3, 3), padding=1)), False),
        (Conv(torch.ones(1, 1, 3, 3).double(), None, Geometry.of((3, 3), padding=1, padding_mode="replicate")), True),
    ],
)  # fmt: skip
def test_a_bias_is_judged_by_the_numbers(second: Conv, exact: bool) -> None:
    first = biased(1)
    fused = compose(first, second)
    x = real_numbers(1, 1, 1, 5, 6)
    same = torch.allclose(forward(fused, x), forward(second, forward(first, x)))
    assert (decide([first, second], fused.geometry).exact, same) == (exact, exact)


def test_a_transposed_layer_of_stride_1_is_a_plain_one_behind_a_stride() -> None:
    first = make_conv(Geometry.of((3, 3), stride=2, padding=1), 2, 3)
    for kernel, fields in ((1, {}), (3, {"padding": 1}), (2, {"dilation": 2, "output_padding": 1})):
        second = make_conv(Geometry.of((kernel, kernel), transposed=True, **fields), 3, 2)  # type: ignore[arg-type]
        x = make_inputs(first, (15, 17))
        fused = fuse([first, second], allow_border=True)
        inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))
        assert torch.equal(forward(fused, x)[inside], forward(second, forward(first, x))[inside])
        assert not fused.geometry.transposed


@pytest.mark.parametrize("part", [1, 1j])
def test_a_complex_bias_is_lost_in_either_part(part: complex) -> None:
    bias = part * torch.tensor([1.0, -2.0, 3.0], dtype=torch.complex128)
    first = Conv(real_numbers(1, 3, 2, 1, 1).to(torch.complex128), bias, Geometry.of((1, 1)))
    second = Conv(real_numbers(2, 4, 3, 3, 3), None, Geometry.of((3, 3), padding=1))
    with pytest.raises(RefusedError, match="hides the bias"):
        fuse([first, second])
