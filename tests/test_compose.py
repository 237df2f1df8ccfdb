"""Two layers as one: against running the two, and the laws of an algebra. Whole numbers, so equal means to the bit.

Where padding of the second layer comes in, the two and the one differ near the border; `test_border` is about that.
Here the border is kept out in three ways: no padding on the second, only outputs that don't meet it, and the first
layer's padding raised so that the second needs none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from cases import CASES, IDS, Case, make_conv, make_inputs, real_numbers, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import identity
from oracles import NOTHING, axis_taps, run_layers
from strategies import (
    axes,
    chain_runs,
    chains,
    covering,
    geometry_of,
    geometry_runs,
    mixed_chains,
    runs,
    sizes_that_run,
    smallest_input,
    smallest_size,
)

import convtool
from convtool.core.compose import add, compose, compose_chain, compose_work
from convtool.core.conv import Conv
from convtool.core.expression import run
from convtool.core.fields import geometry_fields
from convtool.core.forward import forward
from convtool.core.fuse import Fusion, NamedConv, fuse_tree
from convtool.core.geometry import PADDING_MODES, Axis, Geometry, PaddingMode
from convtool.core.joint import compose_geometry
from convtool.core.toeplitz import toeplitz
from convtool.core.tree import Chain, Sum
from convtool.errors import InputError, RefusedError, UsageError

PLAIN = [case for case in CASES if not case.geometry.transposed]


def raised(chain: Sequence[Conv], fused: Geometry) -> list[Conv]:
    """The chain with all its padding on the first layer, as what trains before a fusion has to have it."""
    first, *others = chain
    unpadded = [
        Conv(conv.weight, conv.bias, replace(conv.geometry, padding=((0, 0),) * conv.spatial_axes)) for conv in others
    ]
    geometry = replace(first.geometry, padding=fused.padding, padding_mode=fused.padding_mode)
    return [Conv(first.weight, first.bias, geometry), *unpadded]


def stripped(conv: Conv) -> Conv:
    """Without its bias."""
    return Conv(conv.weight, None, conv.geometry)


def same(a: Conv, b: Conv) -> None:
    """Equal in all there is to a layer."""
    assert a.geometry == b.geometry
    assert torch.equal(a.weight, b.weight)
    assert (a.bias is None) == (b.bias is None)
    if a.bias is not None and b.bias is not None:
        assert torch.equal(a.bias, b.bias)


def same_map(a: Conv, b: Conv, size: Sequence[int]) -> None:
    """Equal in what they compute; kernels may carry zeros that the other hasn't."""
    one, other = toeplitz(a, size, affine=True), toeplitz(b, size, affine=True)
    assert one.output_size == other.output_size
    assert torch.equal(one.to_dense(), other.to_dense())


# --- against running the two, exhaustively along one axis

FIELDS = (1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2), (1, 2, 3), (1, 2), ((0, 0), (1, 3)), ((0, 0), (1, 0), (2, 1))


def small_pairs(least: int, seed: int) -> Iterator[tuple[Axis, Axis]]:
    """Yield pairs of small axes, every two values of two fields together."""
    for k1, k2, s1, s2, d1, d2, p1, p2 in covering(least, *FIELDS, seed=seed):
        yield Axis(k1, s1, p1[0], p1[1], d1), Axis(k2, s2, p2[0], p2[1], d2)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_small_pairs_with_raised_padding(mode: PaddingMode) -> None:
    for number, pair in enumerate(small_pairs(250, PADDING_MODES.index(mode))):
        one, two = (replace(axis, padding_mode=mode) for axis in pair)
        first = make_conv(geometry_of([one]), 2, 1, seed=number)
        second = make_conv(geometry_of([two]), 1, 2, seed=number + 1)
        fused = compose(first, second)
        before = raised([first, second], fused.geometry)
        least = smallest_size([before[0].geometry.axes[0], before[1].geometry.axes[0]])
        for size in (least, least + 1, least + 6):
            x = make_inputs(first, (size,), batch=1)
            assert torch.equal(run(Chain(tuple(before)), x), forward(fused, x)), (one, two, size)


def test_small_pairs_away_from_the_border() -> None:
    checked = inside = 0
    for number, (one, two) in enumerate(small_pairs(500, 9)):
        first = make_conv(geometry_of([one]), 1, 2, seed=number)
        second = make_conv(geometry_of([two]), 2, 1, seed=number + 1)
        fused = compose(first, second)
        for size in (smallest_size([one, two]), smallest_size([one, two]) + 9):
            x = make_inputs(first, (size,), batch=1)
            expected, found = run(Chain((first, second)), x), forward(fused, x)
            assert expected.shape == found.shape  # the output size agrees everywhere, border or not
            keep = torch.tensor([NOTHING not in row for row in axis_taps(two, one.output_size(size))])
            assert torch.equal(expected[..., keep], found[..., keep]), (one, two, size)
            checked += 1
            inside += int(keep.sum())
    assert inside > 2 * checked


@pytest.mark.parametrize("mode", PADDING_MODES)
@settings(max_examples=80)
@given(data=st.data())
def test_random_chains_with_raised_padding(mode: str, data: st.DataObject) -> None:
    chain = data.draw(chains(mode=mode))  # type: ignore[arg-type]
    fused = compose_chain(chain)
    before = raised(chain, fused.geometry)
    extra = data.draw(st.tuples(*(st.integers(0, 3),) * chain[0].spatial_axes))
    x = make_inputs(chain[0], sizes_that_run(before, extra), batch=1)
    assert torch.equal(run(Chain(tuple(before)), x), forward(fused, x))


@settings(max_examples=150)
@given(chain=chains(length=2, mode="zeros"), more=st.integers(0, 4))
def test_random_pairs_away_from_the_border(chain: list[Conv], more: int) -> None:
    first, second = chain
    size = sizes_that_run(chain, (more,) * first.spatial_axes)
    x = make_inputs(first, size, batch=1)
    expected, found = run(Chain(tuple(chain)), x), forward(compose(first, second), x)
    assert expected.shape == found.shape
    keep = np.ones((), dtype=bool)
    for axis, length in zip(second.geometry.axes, first.output_size(size), strict=True):
        keep = np.logical_and.outer(keep, [NOTHING not in row for row in axis_taps(axis, length)])
    assert torch.equal(expected[..., torch.from_numpy(keep)], found[..., torch.from_numpy(keep)])


@settings(max_examples=60)
@given(chain=chains(number=1, most=3))
def test_against_the_definition(chain: list[Conv]) -> None:
    # without torch's convolutions on either side
    fused = compose_chain(chain)
    before = raised(chain, fused.geometry)
    x = make_inputs(chain[0], smallest_input(before), batch=1)[0].numpy()
    np.testing.assert_array_equal(run_layers(before, x), run_layers([fused], x))


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_every_layer_of_the_table_after_and_before_another(case: Case) -> None:
    conv, axes = case.conv(), len(case.input_size)
    inner, outer = conv.in_channels, conv.out_channels
    other = Geometry.of((2, 1, 3, 1)[:axes], dilation=(1, 2, 1, 1)[:axes])
    after = make_conv(other, outer, 2, seed=9)
    before = make_conv(replace(other, stride=(1, 2, 1, 1)[:axes]), 2, inner, seed=9)
    for chain in ([conv, after], [before, conv]):
        fused = compose(*chain)
        pair = raised(chain, fused.geometry)
        x = make_inputs(chain[0], sizes_that_run(pair, (1, 2, 0, 1)[:axes]), batch=1)
        assert torch.equal(run(Chain(tuple(pair)), x), forward(fused, x))


def test_the_formulas_of_the_design() -> None:
    for number, (one, two) in enumerate(small_pairs(600, 10)):
        fused = compose_geometry(geometry_of([one]), geometry_of([two])).axes[0]
        dilation = math.gcd(one.dilation if one.kernel > 1 else 0, one.stride * two.dilation if two.kernel > 1 else 0)
        reach = one.dilation * (one.kernel - 1) + one.stride * two.dilation * (two.kernel - 1)
        assert fused.stride == one.stride * two.stride, number
        assert fused.before == one.before + one.stride * two.before
        assert fused.after == one.after + one.stride * two.after
        assert fused.dilation == (dilation or 1)
        assert fused.kernel == reach // (dilation or 1) + 1
        least = smallest_size([one, two])
        for size in range(1, least + 20):
            if chain_runs([one, two], size):
                assert fused.output_size(size) == two.output_size(one.output_size(size))


# --- the algebra


@settings(max_examples=120)
@given(data=st.data())
def test_composing_is_associative(data: st.DataObject) -> None:
    a, b, c = data.draw(chains(length=3))
    same(compose(compose(a, b), c), compose(a, compose(b, c)))


@settings(max_examples=60)
@given(data=st.data())
def test_composing_transposed_layers_is_associative(data: st.DataObject) -> None:
    a, b, c = data.draw(chains(length=3, transposed=True, mode="zeros"))
    one, other = compose(compose(a, b), c), compose(a, compose(b, c))
    if one.geometry.kernel_size == other.geometry.kernel_size:
        same(one, other)
        return
    # An output padding as long as the stride became zero taps on one of the ways: the same layer, written differently.
    same_map(one, other, sizes_that_run([one], (2,) * one.spatial_axes))


@settings(max_examples=80)
@given(data=st.data())
def test_a_chain_does_not_depend_on_where_it_is_split(data: st.DataObject) -> None:
    chain = data.draw(chains(length=3, number=1))
    chain.append(make_conv(data.draw(st.sampled_from(LAST)), chain[-1].out_channels, 5, seed=3))
    chain.insert(0, make_conv(Geometry.of(2), 3, chain[0].in_channels, seed=4))
    unpadded = all(not conv.geometry.padded or conv.geometry.padding_mode == "zeros" for conv in chain)
    if unpadded:
        same(compose_chain(chain), reduce(compose, chain))


LAST = [Geometry.of(1), Geometry.of(3), Geometry.of(2, stride=2, dilation=3)]


def test_the_cheaper_order_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 -> 8 -> 8 -> 1 channels: the dear product in the middle is best never formed in full.
    from convtool.core import compose as module

    chain = [make_conv(Geometry.of(3), *pair) for pair in ((1, 8), (8, 8), (8, 8), (8, 1))]
    work = []

    def counting(first: Conv, second: Conv) -> Conv:
        channels = first.in_channels, first.out_channels, second.out_channels
        work.append(compose_work(first.geometry, second.geometry, channels))
        return compose(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(module, "compose", counting)
        fused = compose_chain(chain)
    same(fused, reduce(compose, chain))
    orders = []
    for order in itertools.permutations(range(3)):
        shapes = [(conv.in_channels, conv.out_channels, conv.geometry) for conv in chain]
        total = 0
        for joint in order:
            place = joint - sum(earlier < joint for earlier in order[: order.index(joint)])
            left, right = shapes[place], shapes[place + 1]
            total += compose_work(left[2], right[2], (left[0], left[1], right[1]))
            shapes[place : place + 2] = [(left[0], right[1], compose_geometry(left[2], right[2]))]
        orders.append(total)
    assert sum(work) == min(orders) < max(orders)


@settings(max_examples=60)
@given(chain=chains(length=2))
def test_the_work_is_that_of_the_matrix_products(chain: list[Conv]) -> None:
    # Count every product W2[o, m, t2] * W1[m, i, t1] that the definition has.
    first, second = chain
    g1, g2 = first.geometry.groups, second.geometry.groups
    count = 0
    for o, m in itertools.product(range(second.out_channels), range(first.out_channels)):
        if o // (second.out_channels // g2) == m // (second.in_channels // g2):
            count += first.in_channels // g1
    taps = math.prod(first.geometry.kernel_size) * math.prod(second.geometry.kernel_size)
    channels = first.in_channels, first.out_channels, second.out_channels
    assert compose_work(first.geometry, second.geometry, channels) == count * taps


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_identity_changes_nothing(case: Case) -> None:
    conv, axes = case.conv(), len(case.input_size)
    if not conv.geometry.padded:  # a mode that nothing is padded with is forgotten
        conv = Conv(conv.weight, conv.bias, replace(conv.geometry, padding_mode="zeros"))
    zeros = torch.zeros(conv.out_channels, dtype=torch.float64)
    same(compose(conv, identity(conv.out_channels, axes)), conv)
    same(compose(identity(conv.in_channels, axes), conv), conv)
    shifted = Conv(conv.weight, zeros, conv.geometry)  # a bias of zeros stays one
    same(compose(shifted, identity(conv.out_channels, axes)), shifted)


@settings(max_examples=100)
@given(data=st.data())
def test_composing_distributes_over_adding(data: st.DataObject) -> None:
    a, c = data.draw(chains(length=2, mode="zeros", most=3))
    b, c = data.draw(siblings(a)), stripped(c)  # the second's bias would count twice
    size = [length + 2 for length in smallest_input([a, c])]
    same_map(compose(add(a, b), c), add(compose(a, c), compose(b, c)), size)
    before = data.draw(chains(number=a.spatial_axes, length=2, mode="zeros", most=2))[0]
    if a.in_channels % before.geometry.groups == 0:
        joint = make_conv(before.geometry, before.in_channels, a.in_channels, seed=1)
        size = [length + 2 for length in smallest_input([joint, a])]
        same_map(compose(joint, add(a, b)), add(compose(joint, a), compose(joint, b)), size)


@st.composite
def siblings(draw: st.DrawFn, conv: Conv) -> Conv:
    """Another layer with the same outputs for every input: it can be added."""
    parts = []
    for axis in conv.geometry.axes:
        dilation = draw(st.integers(1, 3))
        slack = axis.reach - axis.before - axis.after
        kernel = draw(st.integers(max(1, -(-slack // dilation) + 1), max(1, -(-slack // dilation) + 1) + 2))
        reach = dilation * (kernel - 1)
        before = draw(st.integers(0, reach - slack))
        parts.append(Axis(kernel, axis.stride, before, reach - slack - before, dilation))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, conv.geometry.groups) if _divides(g, conv)]))
    geometry = geometry_of(parts, groups)
    return make_conv(
        geometry, conv.in_channels, conv.out_channels, bias=draw(st.booleans()), seed=draw(st.integers(0, 99))
    )


def _divides(groups: int, conv: Conv) -> bool:
    return conv.in_channels % groups == conv.out_channels % groups == 0


# --- groups


@pytest.mark.parametrize("g1", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("g2", [1, 2, 3, 4, 6])
def test_groups_are_the_gcd_and_never_denser(g1: int, g2: int) -> None:
    first = make_conv(Geometry.of((2, 1), groups=g1), 12, 12, seed=1)
    second = make_conv(Geometry.of((1, 3), groups=g2), 12, 24, seed=2)
    fused = compose(first, second)
    groups = math.gcd(g1, g2)
    assert fused.geometry.groups == groups
    assert fused.weight.shape == (24, 12 // groups, 2, 3)
    x = make_inputs(first, (4, 5))
    assert torch.equal(run(Chain((first, second)), x), forward(fused, x))


@settings(max_examples=80)
@given(chain=chains(length=2, number=1, most=2))
def test_fused_entries_stand_only_where_channels_meet(chain: list[Conv]) -> None:
    first, second = chain
    fused = compose(first, second)
    g1, g2, g = first.geometry.groups, second.geometry.groups, fused.geometry.groups
    assert g == math.gcd(g1, g2)
    positive = [Conv(conv.weight.abs(), None, conv.geometry) for conv in chain]  # nothing cancels
    found = compose(*positive).weight.flatten(2).sum(2) > 0  # (C_out, C_in/g)
    middle = first.out_channels
    for o, i in itertools.product(range(fused.out_channels), range(fused.in_channels)):
        meets = any(
            m // (middle // g1) == i // (first.in_channels // g1)
            and o // (second.out_channels // g2) == m // (middle // g2)
            for m in range(middle)
        )
        group = o // (fused.out_channels // g)
        column = i - group * (fused.in_channels // g)
        inside = 0 <= column < fused.in_channels // g
        assert not meets or inside
        if inside:
            assert bool(found[o, column]) == meets


# --- biases


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("biases", list(itertools.product((False, True), repeat=2)), ids=str)
def test_biases(groups: tuple[int, int], biases: tuple[bool, bool]) -> None:
    first = make_conv(Geometry.of((3, 2), groups=groups[0]), 4, 8, bias=biases[0], seed=1)
    second = make_conv(Geometry.of((2, 3), groups=groups[1]), 8, 4, bias=biases[1], seed=2)
    fused = compose(first, second)
    assert (fused.bias is not None) == any(biases)
    x = make_inputs(first, (6, 5))
    assert torch.equal(run(Chain((first, second)), x), forward(fused, x))
    if fused.bias is None:
        return
    # b2 + (sum over taps of W2) @ b1, channel by channel
    for o in range(4):
        total = second.bias[o].item() if second.bias is not None else 0.0
        if first.bias is not None:
            start = o // (4 // groups[1]) * (8 // groups[1])
            for m in range(8 // groups[1]):
                total += second.weight[o, m].sum().item() * first.bias[start + m].item()
        assert fused.bias[o].item() == total


@settings(max_examples=100)
@given(chain=chains(length=3, number=1, biases=True))
def test_a_bias_is_what_the_chain_makes_of_nothing(chain: list[Conv]) -> None:
    fused = compose_chain(chain)
    before = raised(chain, fused.geometry)
    nothing = torch.zeros(1, chain[0].in_channels, *smallest_input(before), dtype=torch.float64)
    assert fused.bias is not None
    assert torch.equal(run(Chain(tuple(before)), nothing)[0, :, 0], fused.bias)


# --- transposed


@settings(max_examples=120)
@given(chain=mixed_chains(biases=False), more=st.integers(0, 3))
def test_transposed_chains_that_lose_nothing_on_the_way(chain: list[Conv], more: int) -> None:
    # Every layer but the last gives all that is not zero: plain ones padded by their reach, transposed ones uncropped.
    whole = []
    for conv in chain[:-1]:
        sides = tuple((0, 0) if axis.transposed else (axis.reach, axis.reach) for axis in conv.geometry.axes)
        whole.append(Conv(conv.weight, None, replace(conv.geometry, padding=sides)))
    whole.append(chain[-1])
    fused = compose_chain(whole)
    assert fused.geometry.transposed
    x = make_inputs(whole[0], sizes_that_run(whole, (more,) * chain[0].spatial_axes), batch=1)
    assert torch.equal(run(Chain(tuple(whole)), x), forward(fused, x))


@settings(max_examples=120)
@given(chain=mixed_chains(), more=st.integers(0, 3))
def test_transposed_chains_have_the_right_output_size(chain: list[Conv], more: int) -> None:
    fused = compose_chain(chain)
    size = sizes_that_run(chain, (more,) * chain[0].spatial_axes)
    expected = size
    for conv in chain:
        expected = conv.output_size(expected)
    assert geometry_runs(fused.geometry, size)
    assert fused.output_size(size) == expected
    # ... and a geometry that torch takes, and a record can hold: an output padding below stride or dilation
    assert Geometry.of(fused.geometry.kernel_size, **geometry_fields(fused.geometry)) == fused.geometry


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_transposed_layer_and_a_pointwise_one(groups: int, bias: bool) -> None:
    geometry = Geometry.of((3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 0), groups=groups, transposed=True)
    first = make_conv(geometry, 4, 6, bias=bias)
    second = make_conv(Geometry.of((1, 1), groups=groups), 6, 4, seed=5)
    fused = compose(first, second)
    assert fused.geometry == geometry
    x = make_inputs(first, (3, 4))
    assert torch.equal(run(Chain((first, second)), x), forward(fused, x))
    # the other way round only without a bias, which a stride of 2 spreads unevenly
    before = stripped(make_conv(Geometry.of((1, 1)), 3, 4, seed=6))
    x = make_inputs(before, (3, 4))
    assert torch.equal(run(Chain((before, first)), x), forward(compose(before, first), x))


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_computes_in_float64(dtype: torch.dtype) -> None:
    first = make_conv(Geometry.of((3, 2)), 3, 4).to(dtype)
    second = make_conv(Geometry.of((2, 3)), 4, 2, seed=3).to(dtype)
    fused = compose(first, second)
    assert fused.weight.dtype == torch.float64
    assert fused.bias is not None
    assert fused.bias.dtype == torch.float64
    same(fused, compose(first.exact(), second.exact()))
    single = compose_chain([first])
    assert single.weight.dtype == torch.float64


def test_a_float32_layer_and_a_float64_one() -> None:
    first = make_conv(Geometry.of(3), 3, 4).to(torch.float32)
    second = Conv(real_numbers(3, 2, 4, 2), None, Geometry.of(2))
    same(compose(first, second), compose(first.exact(), second))


def test_complex_layers() -> None:
    geometry = Geometry.of((2, 1))
    first = Conv(torch.complex(whole_numbers(1, 2, 3, 2, 1), whole_numbers(2, 2, 3, 2, 1)), None, geometry)
    second = make_conv(Geometry.of((1, 3)), 2, 3)
    fused = compose(first, second)
    assert fused.weight.dtype == torch.complex128
    x = make_inputs(second, (3, 4), seed=5)[:, :1].repeat(1, 3, 1, 1).to(torch.complex128)
    assert torch.equal(run(Chain((first, second)), x), forward(fused, x))


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_real_numbers_are_right_to_the_last_bits(case: Case) -> None:
    shape, axes = case.conv().weight.shape, len(case.input_size)
    conv = Conv(real_numbers(1, *shape), real_numbers(2, shape[0]), case.geometry)
    after = Conv(
        real_numbers(3, 3, shape[0], *(2, 1, 3, 2)[:axes]), real_numbers(4, 3), Geometry.of((2, 1, 3, 2)[:axes])
    )
    chain = [conv, after]
    fused = compose(*chain)
    size = sizes_that_run(chain, (1, 2, 1, 1)[:axes])
    x = real_numbers(5, 2, conv.in_channels, *size)
    absolute = [Conv(one.weight.abs(), None if one.bias is None else one.bias.abs(), one.geometry) for one in chain]
    # Running error analysis: twice the products along the longest sum, unit roundoff 2**-53, both sides.
    terms = conv.weight[0].numel() + after.weight[0].numel() + fused.weight[0].numel() + 4
    bound = 2 * terms * 2.0**-53 * run(Chain(tuple(absolute)), x.abs())
    assert ((run(Chain(tuple(chain)), x) - forward(fused, x)).abs() <= bound).all()


def test_the_layers_themselves_are_left_alone() -> None:
    first, second = make_conv(Geometry.of((3, 2)), 3, 4), make_conv(Geometry.of((2, 3)), 4, 2, seed=3)
    copies = [(conv.weight.clone(), conv.bias.clone()) for conv in (first, second) if conv.bias is not None]
    compose(first, second)
    add(first, first)
    for conv, (weight, bias) in zip((first, second), copies, strict=True):
        assert conv.bias is not None
        assert torch.equal(conv.weight, weight)
        assert torch.equal(conv.bias, bias)


# --- what has no single layer


def refusal(first: Geometry, second: Geometry) -> str:
    with pytest.raises(RefusedError) as raised:
        compose_geometry(first, second)
    layers = (Conv(torch.zeros(1, 1, *geometry.kernel_size), None, geometry) for geometry in (first, second))
    with pytest.raises(RefusedError):
        compose(*layers)
    return str(raised.value)


def test_strides_between_plain_and_transposed_layers() -> None:
    plain, transposed = Geometry.of((3, 2), stride=(1, 2)), Geometry.of((3, 2), stride=(2, 1), transposed=True)
    assert "is a convolution of stride 2 and then a transposed convolution" in refusal(plain, transposed)
    assert "is a transposed convolution and then a convolution of stride 2" in refusal(transposed, plain)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_that_do_not_go_together(mode: str) -> None:
    zeros, other = Geometry.of(3, padding=1), Geometry.of(3, padding=1, padding_mode=mode)
    assert f"pads with zeros and then with {mode}" in refusal(zeros, other)
    assert f"pads with {mode} and then with zeros" in refusal(other, zeros)
    unpadded = Geometry.of(3, padding_mode=mode)
    assert compose_geometry(zeros, unpadded).padding_mode == "zeros"
    assert compose_geometry(unpadded, zeros).padding_mode == "zeros"
    assert compose_geometry(Geometry.of(3), other).padding_mode == mode
    transposed = Geometry.of(3, padding=1, transposed=True)
    assert f"transposed and pads with {mode}" in refusal(transposed, other)
    assert f"transposed and pads with {mode}" in refusal(other, transposed)
    assert compose_geometry(transposed, unpadded).padding_mode == "zeros"


def test_channels_and_axes_that_do_not_fit() -> None:
    first = make_conv(Geometry.of(3), 2, 3)
    with pytest.raises(UsageError, match="the first layer has 3 output channels, the second takes 2"):
        compose(first, first)
    with pytest.raises(UsageError, match="cannot chain a layer of 1 spatial axes and one of 2"):
        compose(first, make_conv(Geometry.of((3, 1)), 3, 3))
    with pytest.raises(UsageError, match="expected at least one layer to fuse"):
        compose_chain([])


def test_layers_that_would_be_too_large() -> None:
    huge = Geometry.of(1, stride=2**20)
    with pytest.raises(RefusedError, match="would exceed"):
        compose_geometry(huge, huge)
    with pytest.raises(RefusedError, match="would exceed"):
        compose_geometry(Geometry.of(2, stride=2**20), Geometry.of(3, dilation=2**20))


def test_layers_with_a_bias_map() -> None:
    plain = make_conv(Geometry.of(1), 2, 2)
    mapped = Conv(plain.weight, whole_numbers(1, 2, 5), plain.geometry)
    for pair in ((plain, mapped), (mapped, plain)):
        with pytest.raises(RefusedError, match="a layer with a bias map cannot be fused further"):
            compose(*pair)
        with pytest.raises(RefusedError, match="a layer with a bias map cannot be fused further"):
            add(*pair)


# --- fuse: compose, decide, round


def pair_of_layers(padding: int = 0) -> list[Conv]:
    first = Conv(real_numbers(1, 4, 3, 3, 2), real_numbers(2, 4), Geometry.of((3, 2), padding=(1, 2)))
    second = Conv(real_numbers(3, 2, 4, 2, 3), real_numbers(4, 2), Geometry.of((2, 3), padding=padding))
    return [first, second]


def test_fuse_rounds_once_to_the_first_layers_dtype() -> None:
    layers = [conv.to(torch.float32) for conv in pair_of_layers()]
    exact = compose(*layers)
    for dtype in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        same(convtool.fuse(layers, dtype=dtype), exact.to(dtype or torch.float32))
    mixed = [layers[0].to(torch.float16), layers[1]]
    assert convtool.fuse(mixed).weight.dtype == torch.float16
    same(convtool.fuse(layers[:1], dtype=torch.float64), layers[0].exact())


def named(layers: Sequence[Conv], *names: str, allow_border: bool = False) -> Fusion:
    """Fuse layers that messages call by these names."""
    tree = Chain(tuple(map(NamedConv, names, layers)))
    return fuse_tree(tree, input_size=None, allow_border=allow_border, dtype=layers[0].dtype)


def test_fuse_refuses_what_is_not_exact_and_says_what_to_do() -> None:
    layers = pair_of_layers(padding=1)
    with pytest.raises(RefusedError) as raised:
        named(layers, "stem.conv", "stem.proj")
    message = str(raised.value)
    assert message == (
        "cannot fuse stem.conv, stem.proj exactly: stem.proj pads what the layers before compute, so the first row,"
        " the last row, the first column and the last column of the output would differ; give stem.conv padding 2,3"
        " and stem.proj none, and train on with that; or write their matrix for one input size, which is"
        " exact: `convtool toeplitz` with the same layers; or accept that: --allow-border"
    )
    with pytest.raises(RefusedError, match="cannot fuse layer 1, layer 2 exactly for input size 7,8: "):
        convtool.fuse(layers, input_size=(7, 8))
    allowed = named(layers, "a", "b", allow_border=True)
    assert not allowed.verdict.exact
    assert allowed.verdict.rim == ((1, 1), (1, 1))
    same(allowed.conv, compose(*layers))


def test_fuse_says_that_only_a_bias_is_lost() -> None:
    first, second = pair_of_layers(padding=1)
    pointwise = Conv(first.weight[..., :1, :1].contiguous(), first.bias, Geometry.of((1, 1)))
    with pytest.raises(RefusedError, match="the padding of layer 2 hides the bias of layer 1"):
        convtool.fuse([pointwise, second])
    assert convtool.fuse([stripped(pointwise), second]).geometry.padding == ((1, 1), (1, 1))


def test_what_would_make_it_exact_does() -> None:
    layers = pair_of_layers(padding=1)
    fused = convtool.fuse(layers, allow_border=True)
    before = raised(layers, fused.geometry)
    same(convtool.fuse(before), fused)


def test_fuse_names_the_layer_that_does_not_fit() -> None:
    first, second = pair_of_layers()
    with pytest.raises(
        UsageError, match=r"cannot fuse a, b, c: c: channels don't fit: it takes 4 channels, .* gives 2"
    ):
        named([first, second, second], "a", "b", "c")
    strided = Conv(first.weight, None, Geometry.of((3, 2), stride=2))
    transposed = make_conv(Geometry.of((3, 2), stride=2, transposed=True), 4, 2)
    with pytest.raises(RefusedError, match="cannot fuse layer 1, layer 2: layer 2: no single layer is a convolution"):
        convtool.fuse([strided, transposed])


def test_fuse_does_not_give_infinities() -> None:
    first, second = pair_of_layers()
    large = Conv(first.weight * 1e30, None, first.geometry)
    with pytest.raises(RefusedError, match=r"float32 cannot hold its numbers: .*e\+60.*; float64 would"):
        convtool.fuse([large, Conv(second.weight * 1e30, None, second.geometry)], dtype=torch.float32)
    for value in (math.inf, math.nan):
        weight = first.weight.clone()
        weight[0, 0, 0, 0] = value
        with pytest.raises(InputError, match="the fused weight is not finite; a layer holds inf or NaN"):
            convtool.fuse([Conv(weight, None, first.geometry), second])
    bias = torch.full((4,), 1e308, dtype=torch.float64)
    with pytest.raises(InputError, match="the fused bias is not finite"):
        convtool.fuse([Conv(first.weight, bias * 1e10, first.geometry), second])


def test_trees_of_layers() -> None:
    wide = make_conv(Geometry.of((3, 3), padding=1), 4, 4, seed=1)
    norm = make_conv(Geometry.of((1, 1), groups=4), 4, 4, seed=2)
    point = make_conv(Geometry.of((1, 1)), 4, 4, seed=3)
    tree: Chain[NamedConv] = Chain(
        (
            Sum(
                (
                    Chain((NamedConv("wide", wide), NamedConv("norm", norm))),
                    NamedConv("point", point),
                    NamedConv("same", identity(4, 2)),
                )
            ),
            NamedConv("last", point),
        )
    )
    fusion = fuse_tree(tree, input_size=None, allow_border=False, dtype=torch.float64)
    assert fusion.verdict.exact
    x = make_inputs(wide, (4, 5))
    inner = run(Chain((wide, norm)), x) + forward(point, x) + x
    assert torch.equal(forward(fusion.conv, x), forward(point, inner))


def test_a_branch_that_is_not_exact_is_refused_even_inside_a_sum() -> None:
    wide = make_conv(Geometry.of((3, 3), padding=1), 4, 4, seed=1)
    chain: Chain[NamedConv] = Chain((NamedConv("a", wide), NamedConv("b", wide)))
    branches: Sum[NamedConv] = Sum((chain, NamedConv("c", identity(4, 2))))
    with pytest.raises(RefusedError, match="cannot fuse a, b exactly"):
        fuse_tree(branches, input_size=None, allow_border=False, dtype=torch.float64)
    allowed = fuse_tree(branches, input_size=None, allow_border=True, dtype=torch.float64)
    assert not allowed.verdict.exact
    assert allowed.verdict.rim == ((1, 1), (1, 1))


def test_branches_that_cannot_be_added_are_named() -> None:
    wide, point = make_conv(Geometry.of((3, 3)), 4, 4), make_conv(Geometry.of((1, 1)), 4, 4)
    branches: Sum[NamedConv] = Sum((NamedConv("wide", wide), NamedConv("point", point)))
    with pytest.raises(RefusedError, match=r"wide, point: point: cannot add layers whose outputs differ in size"):
        fuse_tree(branches, input_size=None, allow_border=False, dtype=torch.float64)


@settings(max_examples=150)
@given(mode=st.sampled_from(PADDING_MODES), data=st.data(), more=st.integers(0, 4))
def test_a_layer_runs_where_its_formula_says(mode: str, data: st.DataObject, more: int) -> None:
    # fused axes, with their large kernels and paddings, against the rules written out
    first, second = (data.draw(axes(mode, most=3)) for _ in range(2))  # type: ignore[arg-type]
    fused = compose_geometry(geometry_of([first]), geometry_of([second])).axes[0]
    size = smallest_size([first, second]) + more
    assert fused.runs_on(size) == runs(fused, size)


@pytest.mark.parametrize("channels", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_layers_without_channels_compose_to_zeros(channels: tuple[int, int, int]) -> None:
    inner, middle, outer = channels
    first = Conv(torch.ones(middle, inner, 3, 2), torch.ones(middle), Geometry.of((3, 2)))
    second = Conv(torch.ones(outer, middle, 2, 4), torch.full((outer,), 2.0), Geometry.of((2, 4)))
    fused = compose(first, second)
    assert fused.weight.shape == (outer, inner, 4, 5)
    assert fused.bias is not None
    assert fused.bias.tolist() == [2.0 + 8 * middle] * outer
