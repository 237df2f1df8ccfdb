"""Two layers side by side: their outputs added, at every input size, border included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import CASES, IDS, Case, make_conv, make_inputs, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import average_pool, identity
from strategies import MODES, covering, geometry_of, runs, smallest_size

from convtool.core.compose import add
from convtool.core.conv import Conv
from convtool.core.fields import geometry_fields
from convtool.core.forward import forward
from convtool.core.geometry import PADDING_MODES, Axis, Geometry, PaddingMode
from convtool.core.joint import add_geometry
from convtool.core.toeplitz import toeplitz
from convtool.errors import RefusedError, UsageError


def check(a: Conv, b: Conv, size: tuple[int, ...]) -> Conv:
    """add(a, b) gives the sum of the outputs of a and b; returned for more."""
    total = add(a, b)
    assert Geometry.of(total.geometry.kernel_size, **geometry_fields(total.geometry)) == total.geometry
    x = make_inputs(a, size, batch=1)
    assert torch.equal(forward(total, x), forward(a, x) + forward(b, x))
    return total


def refusal(a: Conv, b: Conv) -> str:
    """Why their sum is refused, or ''."""
    try:
        add_geometry(a.geometry, b.geometry)
    except RefusedError as error:
        return str(error)
    return ""


def slack(axis: Axis) -> int:
    """What decides on the output size beside the stride: equal slack, equal sizes."""
    return axis.dilation * (axis.kernel - 1) - axis.before - axis.after + axis.output_padding


# --- small axes

KERNELS, STRIDES, DILATIONS, BEFORE, AFTER = (1, 2, 3), (1, 2), (1, 2, 3), (0, 1, 2), (0, 1, 3)
FIELDS = STRIDES, KERNELS, DILATIONS, BEFORE, AFTER, KERNELS, DILATIONS, BEFORE


def small_pairs(least: int, mode: PaddingMode) -> Iterator[tuple[Axis, Axis]]:
    """Yield pairs of axes that give outputs of one size."""
    for stride, k1, d1, p1, q1, k2, d2, p2 in covering(least, *FIELDS, seed=PADDING_MODES.index(mode)):
        one = Axis(k1, stride, p1, q1, d1, mode)
        q2 = d2 * (k2 - 1) - p2 - slack(one)
        if q2 >= 0:
            yield one, Axis(k2, stride, p2, q2, d2, mode)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_small_pairs(mode: PaddingMode) -> None:
    added = 0
    for number, (one, two) in enumerate(small_pairs(700 if mode == "zeros" else 500, mode)):
        a, b = (make_conv(geometry_of([axis]), 2, 1, seed=number + i) for i, axis in enumerate((one, two)))
        reason = refusal(a, b)
        if reason:
            assert mode != "zeros"
            assert f"no single layer of {mode} padding holds both kernels" in reason
            continue
        least = max(smallest_size([one]), smallest_size([two]))
        for size in (least, least + 1, least + 5):
            check(a, b, (size,))
        # It runs wherever both run, and nowhere else.
        fused = add_geometry(a.geometry, b.geometry).axes[0]
        for size in range(1, least + 3):
            assert fused.runs_on(size) == (runs(one, size) and runs(two, size))
        added += 1
    assert added > (250 if mode == "zeros" else 60)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_other_sizes_are_refused_and_do_differ(mode: PaddingMode) -> None:
    refused = 0
    for stride, k1, d1, p1, q1, k2, d2, p2, q2 in covering(200, *FIELDS, AFTER):
        one, two = Axis(k1, stride, p1, q1, d1, mode), Axis(k2, stride, p2, q2, d2, mode)
        if slack(one) == slack(two):
            continue
        with pytest.raises(RefusedError, match="outputs differ in size"):
            add(*(make_conv(geometry_of([axis]), 2, 1) for axis in (one, two)))
        least = max(smallest_size([one]), smallest_size([two]))
        assert any(one.output_size(size) != two.output_size(size) for size in range(least, least + 3))
        refused += 1
    assert refused > 100


def test_small_pairs_of_transposed_axes() -> None:
    added, extras = 0, (0, 1)
    fields = (1, 2, 3), *(KERNELS, (1, 2), (0, 2), (0, 1), extras) * 2
    for number, (stride, k1, d1, p1, q1, e1, k2, d2, p2, q2, e2) in enumerate(covering(4500, *fields)):
        one, two = (
            Axis(kernel, stride, before, after, dilation, "zeros", True, extra)
            for kernel, dilation, before, after, extra in ((k1, d1, p1, q1, e1), (k2, d2, p2, q2, e2))
        )
        if slack(one) != slack(two) or any(axis.output_padding >= max(stride, axis.dilation) for axis in (one, two)):
            continue
        a, b = (make_conv(geometry_of([axis]), 1, 2, seed=number + i) for i, axis in enumerate((one, two)))
        least = max(smallest_size([one]), smallest_size([two]))
        for size in (least, least + 3):
            check(a, b, (size,))
        added += 1
    assert added > 250


# --- any number of axes, groups, biases


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Conv, Conv, tuple[int, ...]]:
    """Two layers that can be added, and an input size."""
    count, mode = draw(st.integers(1, 3)), draw(MODES)
    transposed = mode == "zeros" and draw(st.booleans())
    limit = (0, 4, 3, 2)[count]
    one, two = [], []
    for _ in range(count):
        stride = draw(st.integers(1, 3))
        kernel, dilation = draw(st.integers(1, limit)), draw(st.integers(1, 3))
        reach = dilation * (kernel - 1)
        if mode == "zeros" and not transposed:
            before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        else:
            before, after = 0, 0
        one.append(Axis(kernel, stride, before, after, dilation, mode, transposed))
        other, spread = draw(st.integers(1, limit)), draw(st.integers(1, 3))
        free = spread * (other - 1) - (reach - before - after)
        if transposed:  # a longer kernel is cropped, a shorter one lengthened where its stride allows
            if free < 0:
                other, spread, free = kernel, dilation, 0
            first = draw(st.integers(0, free))
            two.append(Axis(other, stride, first, free - first, spread, mode, True))
            continue
        if free < 0:
            other, spread, free = kernel, dilation, before + after
        first = draw(st.integers(0, free))
        two.append(Axis(other, stride, first, free - first, spread, mode))
    groups = [draw(st.sampled_from((1, 2, 3, 6))) for _ in range(2)]
    inner, outer = 6, draw(st.sampled_from((6, 12)))
    seed = draw(st.integers(0, 999))
    a, b = (
        make_conv(geometry_of(parts, own), inner, outer, bias=draw(st.booleans()), seed=seed + own)
        for parts, own in zip((one, two), groups, strict=True)
    )
    size = [
        max(smallest_size([x]), smallest_size([y])) + draw(st.integers(0, 2)) for x, y in zip(one, two, strict=True)
    ]
    return a, b, tuple(size)


@settings(max_examples=200)
@given(pair=pairs())
def test_random_pairs(pair: tuple[Conv, Conv, tuple[int, ...]]) -> None:
    a, b, size = pair
    if reason := refusal(a, b):
        assert a.geometry.padding_mode != "zeros", reason
        return
    total = check(a, b, size)
    assert total.geometry.groups == math.gcd(a.geometry.groups, b.geometry.groups)
    assert (total.bias is None) == (a.bias is None and b.bias is None)
    assert total.weight.dtype == torch.float64
    turned = add(b, a)
    assert turned.geometry == total.geometry
    assert torch.equal(turned.weight, total.weight)
    if total.bias is not None and turned.bias is not None:
        assert torch.equal(turned.bias, total.bias)


@settings(max_examples=80)
@given(data=st.data())
def test_adding_is_associative(data: st.DataObject) -> None:
    a, b, size = data.draw(pairs().filter(lambda pair: pair[0].geometry.padding_mode == "zeros"))
    geometry = replace(b.geometry, groups=data.draw(st.sampled_from((1, 2, 3, 6))))
    c = make_conv(geometry, a.in_channels, a.out_channels, seed=7)
    one, other = add(add(a, b), c), add(a, add(b, c))
    assert one.geometry == other.geometry
    assert torch.equal(one.weight, other.weight)
    assert one.bias is not None
    assert other.bias is not None
    assert torch.equal(one.bias, other.bias)
    x = make_inputs(a, size)
    assert torch.equal(forward(one, x), forward(a, x) + forward(b, x) + forward(c, x))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_layer_added_to_itself_is_twice_it(case: Case) -> None:
    conv = case.conv()
    total = check(conv, conv, case.input_size)
    assert total.geometry.kernel_size == case.geometry.kernel_size
    assert torch.equal(total.weight, 2 * conv.weight)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_layer_and_its_negative_cancel(case: Case) -> None:
    conv = case.conv()
    bias = None if conv.bias is None else -conv.bias
    total = add(conv, Conv(-conv.weight, bias, conv.geometry))
    assert not total.weight.any()
    assert not total.has_bias


# --- what it is for


def test_the_branches_of_a_reparametrized_block() -> None:
    # RepVGG: 3x3, 1x1 and the identity, of which only the first is padded
    wide = make_conv(Geometry.of((3, 3), padding=1), 4, 4, seed=1)
    point = make_conv(Geometry.of((1, 1)), 4, 4, seed=2)
    total = check(check(wide, point, (4, 5)), identity(4, 2), (4, 5))
    assert total.geometry == wide.geometry
    center = wide.weight[:, :, 1, 1] + point.weight[:, :, 0, 0] + torch.eye(4, dtype=torch.float64)
    assert torch.equal(total.weight[:, :, 1, 1], center)
    assert torch.equal(total.weight[:, :, 0], wide.weight[:, :, 0])


def test_depthwise_branches_stay_depthwise() -> None:
    # a large kernel and a small one, as in large-kernel networks
    large = make_conv(Geometry.of((7, 5), padding=(3, 2), groups=3), 3, 3)
    small = make_conv(Geometry.of((3, 1), padding=(1, 0), groups=3), 3, 3)
    total = check(large, small, (8, 9))
    assert total.weight.shape == (3, 1, 7, 5)
    # the identity has as many groups as channels, so it costs nothing
    assert check(total, identity(3, 2), (8, 9)).geometry.groups == 3


def test_parallel_dilated_branches() -> None:
    # 3 taps 2 apart and 3 taps 3 apart: a grid of 1
    two = make_conv(Geometry.of(3, dilation=2, padding=2), 2, 2, seed=1)
    three = make_conv(Geometry.of(3, dilation=3, padding=3), 2, 2, seed=2)
    assert check(two, three, (5,)).geometry.kernel_size == (7,)
    # 2 and 4 apart: a grid of 2
    four = make_conv(Geometry.of(3, dilation=4, padding=4), 2, 2, seed=2)
    total = check(two, four, (5,))
    assert (total.geometry.kernel_size, total.geometry.dilation) == ((5,), (2,))
    # the same grid but shifted against each other: half of the dilation
    shifted = make_conv(Geometry.of(3, dilation=2, padding=[(1, 3)]), 2, 2, seed=2)
    total = check(two, shifted, (5,))
    assert (total.geometry.kernel_size, total.geometry.dilation) == ((6,), (1,))


def test_groups_are_expanded_no_further_than_needed() -> None:
    a = make_conv(Geometry.of((1, 2), groups=4), 12, 24, seed=1)
    b = make_conv(Geometry.of((1, 2), groups=6), 12, 24, seed=2)
    total = check(a, b, (3, 4))
    assert total.geometry.groups == 2
    assert total.weight.shape == (24, 6, 1, 2)
    # and where only the first has anything, nothing stands between its groups
    zero = Conv(torch.zeros_like(b.weight), None, b.geometry)
    only = add(a, zero)
    dense = toeplitz(only, (3, 4)).to_dense()
    assert torch.equal(dense, toeplitz(a, (3, 4)).to_dense())


def test_average_pooling_beside_a_convolution() -> None:
    # ... of the same kernel and stride
    conv = make_conv(Geometry.of((2, 2), stride=2), 3, 3)
    check(conv, average_pool(3, 2, 2), (4, 6))


@pytest.mark.parametrize("biases", list(itertools.product((False, True), repeat=2)), ids=str)
def test_biases(biases: tuple[bool, bool]) -> None:
    a, b = (make_conv(Geometry.of(2), 2, 3, bias=bias, seed=i) for i, bias in enumerate(biases))
    total = check(a, b, (4,))
    assert (total.bias is not None) == any(biases)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_adds_in_float64(dtype: torch.dtype) -> None:
    a, b = (make_conv(Geometry.of(2), 2, 3, seed=i).to(dtype) for i in range(2))
    total = add(a, b)
    assert total.weight.dtype == torch.float64
    assert torch.equal(total.weight, a.weight.double() + b.weight.double())
    mixed = add(a, b.to(torch.float64))
    assert torch.equal(mixed.weight, total.weight)


def test_complex_layers() -> None:
    a = make_conv(Geometry.of(2), 2, 3)
    b = Conv(torch.complex(a.weight, whole_numbers(5, *a.weight.shape)), None, a.geometry)
    total = add(a, b)
    assert total.weight.dtype == torch.complex128
    assert torch.equal(total.weight.real, 2 * a.weight)
    assert torch.equal(total.weight.imag, b.weight.imag)


# --- what has no single layer


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (Geometry.of(3, stride=2), Geometry.of(3, stride=3), "cannot add layers of stride 2 and 3"),
        (Geometry.of(3), Geometry.of(3, transposed=True), "cannot add a convolution and a transposed one"),
        (
            Geometry.of(3, padding=1),
            Geometry.of(3, padding=1, padding_mode="circular"),
            "no single layer pads with both zeros and circular",
        ),
        (
            Geometry.of(3, padding=1),
            Geometry.of(3),
            "cannot add layers whose outputs differ in size: kernel 3 with padding 1:1 and kernel 3 with padding 0:0",
        ),
    ],
)
def test_layers_that_cannot_be_added(a: Geometry, b: Geometry, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        add_geometry(a, b)


def test_layers_that_do_not_fit() -> None:
    conv = make_conv(Geometry.of(3), 2, 3)
    with pytest.raises(UsageError, match="cannot add a layer of 2 → 3 channels and one of 3 → 2"):
        add(conv, make_conv(Geometry.of(3), 3, 2))
    with pytest.raises(UsageError, match="cannot add layers of 1 and 2 spatial axes"):
        add(conv, make_conv(Geometry.of((3, 1)), 2, 3))


def test_an_unpadded_layer_goes_with_any_mode() -> None:
    point = make_conv(Geometry.of(1), 2, 2, seed=1)
    for mode in PADDING_MODES:
        wide = make_conv(Geometry.of(3, padding=1, padding_mode=mode), 2, 2, seed=2)
        assert check(wide, point, (4,)).geometry.padding_mode == mode
        assert check(point, wide, (4,)).geometry.padding_mode == mode
