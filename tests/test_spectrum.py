"""Singular values: every way to them against a dense SVD of the matrix from the definition."""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import CASES, IDS, Case, make_conv, real_numbers
from hypothesis import given, settings
from oracles import toeplitz as dense_toeplitz
from strategies import layers_with_sizes

import convtool
from convtool.core import gram as gram_module
from convtool.core import krylov as krylov_module
from convtool.core import spectrum as module
from convtool.core.conv import Conv
from convtool.core.dissection import dissect
from convtool.core.geometry import Geometry
from convtool.core.gram import gram
from convtool.core.spectrum import SingularValue, Spectrum, spectrum
from convtool.errors import InputError, UsageError


def dense_ends(conv: Conv, size: Sequence[int]) -> tuple[float, float]:
    values = np.linalg.svd(dense_toeplitz(conv, size), compute_uv=False)
    return float(values[0]), float(values[-1])


def check(found: Spectrum, conv: Conv, size: Sequence[int]) -> None:
    high, low = dense_ends(conv, size)
    rounding = 1e-10 * high
    assert found.largest.converged
    assert abs(found.largest.value - high) <= found.largest.error + rounding
    assert found.smallest.converged
    assert abs(found.smallest.value - low) <= found.smallest.error + rounding
    assert found.largest.error <= found.tolerance * found.largest.value
    if low > 1e-6 * high:
        assert math.isclose(found.condition, high / low, rel_tol=1e-3)
        assert found.condition_at_least <= high / low * (1 + 1e-9)
    elif low < 1e-12 * high:
        assert found.condition > 1e9


@pytest.fixture
def factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix is small enough for a dense SVD, and pieces of a factorisation are small."""
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    monkeypatch.setattr(gram_module, "LEAST", 6)


@pytest.fixture
def iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is any Gram matrix small enough to factor."""
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    monkeypatch.setattr(gram_module, "FACTOR_WORK", 0)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_by_lanczos_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_by_cholesky_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@pytest.mark.parametrize("work", [0, 1 << 40])
@settings(max_examples=75)
@given(layer=layers_with_sizes())
def test_by_iteration_for_random_layers(work: int, layer: tuple[Conv, tuple[int, ...]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSE_SIDE", 0)
        patch.setattr(gram_module, "LEAST", 6)
        patch.setattr(gram_module, "FACTOR_WORK", work)
        check(spectrum(*layer), *layer)


# --- just above the limit of a dense SVD, which is made smaller

LARGE: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "padded": (3, 3, (3, 3), (9, 11), {"padding": 1}),
    "wide": (5, 3, (3, 3), (8, 9), {"padding": 1}),
    "tall": (3, 5, (3, 2), (9, 8), {"padding": (1, 0)}),
    "strided": (4, 6, (3, 3), (15, 18), {"padding": 1, "stride": 2}),
    "circular": (3, 4, (3, 3), (16, 12), {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    "reflected": (3, 3, (3, 3), (8, 11), {"padding": (1, 2), "padding_mode": "reflect"}),
    "dilated": (2, 3, (3, 3), (11, 12), {"padding": 2, "dilation": 2}),
    "transposed": (4, 2, (4, 4), (7, 8), {"padding": 1, "stride": 2, "transposed": True}),
    "long": (2, 3, (5,), (90,), {"padding": 2}),
    "deep": (2, 2, (3, 2, 3), (5, 6, 4), {"padding": (1, 0, 1)}),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_too_large_for_a_dense_svd_is_known_and_proved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer, kernel, size, fields = LARGE[name]
    monkeypatch.setattr(module, "DENSE_SIDE", 100)
    conv = Conv(real_numbers(1, outer, inner, *kernel), None, Geometry.of(kernel, **fields))
    found = spectrum(conv, size)
    assert min(found.shape) > 100
    assert found.methods == ("cholesky",)
    assert found.largest.proved
    assert found.smallest.proved
    check(found, conv, size)
    high, low = dense_ends(conv, size)
    assert abs(found.condition - high / low) <= found.condition_error


@pytest.mark.parametrize("name", LARGE)
def test_a_factor_in_single_precision_serves_as_well(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer, kernel, size, fields = LARGE[name]
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    monkeypatch.setattr(gram_module, "EXACT_BYTES", 0)
    conv = Conv(real_numbers(1, outer, inner, *kernel), None, Geometry.of(kernel, **fields))
    product = gram(conv, size)
    assert product is not None
    assert product.kept_dtype == torch.float32
    found = spectrum(conv, size)
    assert found.smallest.proved
    check(found, conv, size)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 4)])
def test_depthwise_layers_are_factored_together(kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    monkeypatch.setattr(gram_module, "LEAST", 8)
    weight = real_numbers(2, 24, 1, *kernel) * torch.logspace(-1, 1, 12).repeat_interleave(2).reshape(24, 1, 1, 1)
    conv = Conv(weight, None, Geometry.of(kernel, padding=1, groups=12))  # two outputs for each input
    product = gram(conv, (9, 10))
    assert product is not None
    assert product.size == 12 * 90
    found = spectrum(conv, (9, 10))
    assert found.methods == ("cholesky",)
    assert found.largest.proved
    assert found.smallest.proved
    check(found, conv, (9, 10))


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("outer", [2, 4, 7])
def test_a_rank_deficient_layer_has_smallest_zero(outer: int) -> None:
    weight = real_numbers(0, outer, 4, 3, 3)
    weight[-1] = 2 * weight[0]
    weight[:, 3] = weight[:, 0] - weight[:, 1]
    conv = Conv(weight, None, Geometry.of((3, 3), padding=1))
    found = spectrum(conv, (5, 6))
    assert found.methods == ("cholesky",)
    assert found.smallest.value <= 1e-7 * found.largest.value
    assert found.smallest.proved
    assert found.condition == found.condition_error == math.inf
    check(found, conv, (5, 6))


@pytest.mark.usefixtures("factor")
def test_singular_values_that_are_small_but_not_zero_are_told_from_zero() -> None:
    # Two channels that differ by a little: the smallest is some 1e-5 of the largest.
    weight = real_numbers(0, 3, 2, 3, 3)
    weight[:, 1] = weight[:, 0] + 1e-4 * weight[:, 1]
    conv = Conv(weight, None, Geometry.of((3, 3), padding=1))
    found, (high, low) = spectrum(conv, (9, 10)), dense_ends(conv, (9, 10))
    assert 1e-6 * high < low < 1e-4 * high
    assert abs(found.smallest.value - low) <= min(found.smallest.error, 1e-6 * high)
    assert found.smallest.converged
    assert math.isclose(found.condition, high / low, rel_tol=1e-3)


def test_an_input_that_is_cut_off_makes_the_smallest_zero() -> None:
    geometry = Geometry.of(1, padding=[(1, 0)], dilation=2, transposed=True, output_padding=1)
    conv = make_conv(geometry, 3, 4)
    assert conv.output_size((6,)) == (6,)
    found = spectrum(conv, (6,))
    assert found.smallest.value <= found.smallest.error < 1e-9
    check(found, conv, (6,))


def test_singular_values_beyond_float64_are_an_error() -> None:
    conv = convtool.conv(torch.full((2, 2, 3), 1.5e308, dtype=torch.float64), padding=1)
    with pytest.raises(InputError, match=r"as large as 1\.5e\+308 have singular values beyond what float64 holds"):
        spectrum(conv, (5,))


@pytest.mark.parametrize("work", [0, 1 << 40])
@pytest.mark.parametrize("exponent", [-900, 900])
def test_weights_whose_squares_are_no_numbers(exponent: int, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    monkeypatch.setattr(gram_module, "FACTOR_WORK", work)
    weight = real_numbers(0, 2, 3, 3)
    plain, scaled = (Conv(weight * 2.0**power, None, Geometry.of(3, padding=1)) for power in (0, exponent))
    there, here = spectrum(scaled, (20,)), spectrum(plain, (20,))
    assert there.largest.value == here.largest.value * 2.0**exponent
    assert there.smallest.value == here.smallest.value * 2.0**exponent
    assert there.condition == here.condition
    check(here, plain, (20,))


@pytest.mark.usefixtures("factor")
def test_complex_layers() -> None:
    weight = torch.complex(real_numbers(0, 3, 2, 3), real_numbers(1, 3, 2, 3))
    conv = Conv(weight, None, Geometry.of(3, padding=1))
    found = spectrum(conv, (30,))
    values = torch.linalg.svdvals(convtool.toeplitz(conv, (30,)).to_dense())
    assert found.largest.proved
    assert abs(found.largest.value - float(values[0])) <= found.largest.error
    assert found.smallest.proved
    assert abs(found.smallest.value - float(values[-1])) <= found.smallest.error


# --- the Gram matrix


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_factor_exists_where_all_eigenvalues_are_on_its_side(case: Case) -> None:
    conv = case.conv()
    product = gram(conv, case.input_size)
    assert product is not None
    dense = dense_toeplitz(conv, case.input_size)
    dense = dense @ dense.T if dense.shape[0] < dense.shape[1] else dense.T @ dense
    eigenvalues = np.linalg.eigvalsh(dense)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    assert product.size == len(dense)
    assert high <= product.norm
    margin = 1e-6 * high
    assert product.factor(low + margin) is None
    assert product.factor(high - margin, -1) is None
    assert product.factor(high + margin, -1) is not None
    factor = product.factor(low - margin, keep=torch.float64)
    assert factor is not None
    assert 0 < factor.rounding < product.rounding < margin
    x = np.stack([np.linspace(1, 2, product.size), np.linspace(-1, 1, product.size) ** 3], 1)
    right = torch.from_numpy(dense @ x - (low - margin) * x)
    np.testing.assert_allclose(factor.solve(right).numpy(), x, rtol=1e-5, atol=1e-5)


def test_what_is_not_the_last_is_not_called_so() -> None:
    conv = Conv(real_numbers(0, 3, 3, 3), None, Geometry.of(3, padding=1))
    product = gram(conv, (30,))
    assert product is not None
    values = np.linalg.svd(dense_toeplitz(conv, (30,)), compute_uv=False)
    second = SingularValue(float(values[1]), 1e-12, True)
    assert not module._nothing_above(product, second, 1e-6).converged
    assert module._nothing_above(product, replace(second, value=float(values[0])), 1e-6).proved
    second = SingularValue(float(values[-2]), 1e-12, False)
    assert module._nothing_below(product, second, 1e-6 * float(values[0]), 1e-12) is None
    last = module._nothing_below(product, replace(second, value=float(values[-1])), 1e-6 * float(values[0]), 1e-12)
    assert last is not None
    assert last.proved


def test_a_factor_that_would_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = Conv(real_numbers(0, 128, 128, 3, 3), None, Geometry.of((3, 3), padding=1))
    assert gram(conv, (56, 56)) is None
    small = Conv(real_numbers(0, 2, 2, 3, 3), None, Geometry.of((3, 3), padding=1))
    assert gram(small, (6, 7)) is not None
    for limit in ("FACTOR_BYTES", "FACTOR_WORK", "MEETINGS"):
        with monkeypatch.context() as patch:
            patch.setattr(gram_module, limit, 1000)
            assert gram(small, (6, 7)) is None


@pytest.mark.usefixtures("factor")
def test_large_layers_need_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"this large need scipy: pip install 'convtool\[scipy\]'"):
        spectrum(Conv(real_numbers(0, 2, 2, 3), None, Geometry.of(3, padding=1)), (9,))


@pytest.mark.parametrize(
    ("lengths", "reach", "wrapped"),
    [
        ((23,), 2, False),
        ((23,), 2, True),
        ((9, 14), 2, False),
        ((12, 11), 1, True),
        ((5, 6, 7), 1, False),
        ((), 0, False),
    ],
)
def test_a_dissection_is_what_a_factorisation_needs(lengths: tuple[int, ...], reach: int, wrapped: bool) -> None:
    places = np.indices(lengths).reshape(len(lengths), math.prod(lengths))
    apart = np.abs(places[:, :, None] - places[:, None, :])
    if wrapped:
        apart = np.minimum(apart, np.array(lengths)[:, None, None] - apart)
    connected = (apart <= reach).all(0)
    found = dissect(scipy.sparse.csr_array(connected.astype(float)), lengths, 5)
    assert sorted(found.order) == list(range(len(connected)))
    connected = connected[np.ix_(found.order, found.order)]
    end, parents = 0, [child for front in found.fronts for child in front.children]
    assert sorted(parents) == list(range(len(found.fronts) - 1))  # all but the last
    for number, front in enumerate(found.fronts):
        assert front.start == end <= front.stop
        end = front.stop
        assert list(front.boundary) == sorted(set(front.boundary))
        for node in range(front.start, front.stop):  # what it meets and is left is here
            assert set(np.nonzero(connected[node])[0]) - set(range(front.start)) <= set(front.nodes)
            connected[np.ix_(front.nodes, front.nodes)] = True  # as eliminating it fills in
        for child in front.children:
            assert child < number
            assert set(found.fronts[child].boundary) <= set(front.nodes)
    assert end == len(connected)
    assert not len(found.fronts[-1].boundary)
    assert len(found.fronts) == 1 or max(sum(front.sizes) for front in found.fronts) < len(connected)


def test_what_a_factor_takes_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "LEAST", 8)
    conv = Conv(real_numbers(0, 4, 4, 3, 3), None, Geometry.of((3, 3), padding=1, groups=1))
    product = gram(conv, (12, 11))
    assert product is not None
    factor = product.factor(-1.0, keep=torch.float64)
    assert factor is not None
    plan = product._pieces.dissection
    assert sum(upper.numel() + below.numel() for upper, below in factor._kept) == plan.kept(4)
    dense = product.size**3 / 6
    assert dense / 30 < product.work < dense / 3
    assert plan.in_flight(4) < 2 * product.size**2


CIRCULAR: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3,), (7,), {"padding": 1}),
    ((3, 2), (5, 4), {"padding": [(1, 1), (0, 1)]}),
    ((3, 5), (4, 3), {"padding": (1, 2)}),  # taps meet: as wide as the input and wider
    ((3, 2), (6, 5), {"padding": [(2, 2), (0, 1)], "dilation": (2, 1), "groups": 2}),
    ((2, 3, 2), (3, 4, 3), {"padding": [(1, 0), (1, 1), (0, 1)]}),
    ((1, 1), (3, 4), {}),
]


@pytest.mark.parametrize(("kernel", "size", "fields"), CIRCULAR)
def test_by_fourier_transform(kernel: tuple[int, ...], size: tuple[int, ...], fields: dict[str, Any]) -> None:
    geometry = Geometry.of(kernel, padding_mode="circular", **fields)
    conv = make_conv(geometry, 4, 6)
    found = spectrum(conv, size)
    assert found.methods == ("fourier",)
    check(found, conv, size)


@pytest.mark.usefixtures("iterate")
def test_lanczos_stops_when_both_ends_are_known() -> None:
    conv = Conv(real_numbers(0, 2, 4, 3, 3), None, Geometry.of((3, 3), padding=1, stride=2))
    found = spectrum(conv, (12, 14), tolerance=1e-4)
    assert found.methods == ("lanczos",)
    assert found.steps < min(found.shape)
    check(found, conv, (12, 14))


@pytest.mark.usefixtures("iterate")
def test_what_is_not_known_within_the_steps_is_not_called_known() -> None:
    conv = Conv(real_numbers(0, 5, 5, 3, 3), None, Geometry.of((3, 3), padding=1))
    found, (high, low) = spectrum(conv, (9, 10), steps=12), dense_ends(conv, (9, 10))
    assert found.steps == 12
    assert not found.largest.converged
    assert not found.smallest.converged
    assert found.largest.value <= high
    assert found.smallest.value >= low
    assert 1 < found.condition_at_least <= high / low


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("inner", [4, 7])
def test_the_largest_is_taken_further_than_vectors_fit(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov_module, "STEPS", 15)
    monkeypatch.setattr(krylov_module, "BASIS", 20)
    conv = Conv(real_numbers(0, 5, inner, 3, 3), None, Geometry.of((3, 3), padding=1))
    found, (high, low) = spectrum(conv, (9, 10)), dense_ends(conv, (9, 10))
    assert found.methods == ("lanczos",)
    assert found.steps > 15 + 20
    assert found.largest.converged
    assert not found.largest.proved
    assert abs(found.largest.value - high) <= found.largest.error <= 1e-6 * high
    assert not found.smallest.converged
    assert found.smallest.value >= low


@pytest.mark.usefixtures("factor")
def test_steps_bound_every_iteration() -> None:
    conv = Conv(real_numbers(0, 5, 5, 3, 3), None, Geometry.of((3, 3), padding=1))
    found, (high, low) = spectrum(conv, (9, 10), steps=4), dense_ends(conv, (9, 10))
    assert found.steps == 4
    assert not found.largest.converged
    assert not found.largest.proved
    within = 1 + 1e-12  # of the dense values, which are rounded too
    assert low <= found.smallest.value * within
    assert found.smallest.value <= found.largest.value <= high * within


def test_many_groups_take_no_longer_than_one_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 100)
    geometry = Geometry.of((3, 3), padding=1, groups=8)
    conv = Conv(real_numbers(0, 8, 1, 3, 3), None, geometry)
    found = spectrum(conv, (8, 9))  # 72 a side, and eight of them
    assert found.methods == ("cholesky",)
    check(found, conv, (8, 9))


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_are_told_apart_without_an_object_for_each_number(groups: int) -> None:
    conv = convtool.conv(real_numbers(1, 200, 300 // groups, 1), groups=groups)
    spectrum(conv, (1,))  # what is made once
    tracemalloc.start()
    spectrum(conv, (1,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * conv.weight.nbytes


def test_groups_are_taken_together() -> None:
    conv = make_conv(Geometry.of((2, 3), padding=1, groups=3), 6, 9)
    check(spectrum(conv, (4, 5)), conv, (4, 5))
    scaled = Conv(
        conv.weight * torch.tensor([1.0, 100, 0.01]).repeat_interleave(3).reshape(9, 1, 1, 1), None, conv.geometry
    )
    check(spectrum(scaled, (4, 5)), scaled, (4, 5))


@pytest.mark.parametrize("work", [0, 1 << 40])
def test_an_orthogonal_layer_and_a_zero_one(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    monkeypatch.setattr(gram_module, "FACTOR_WORK", work)
    delta = torch.zeros(3, 3, 3)
    delta[torch.arange(3), torch.arange(3), 1] = 2.0
    conv = Conv(delta, None, Geometry.of(3, padding=1))
    found = spectrum(conv, (9,))
    assert (found.largest.value, found.smallest.value) == pytest.approx((2.0, 2.0), rel=1e-14)
    assert found.condition == pytest.approx(1.0, rel=1e-14)
    nothing = spectrum(Conv(torch.zeros(2, 3, 3), None, Geometry.of(3, padding=1)), (9,))
    assert (nothing.largest.value, nothing.smallest.value) == (0.0, 0.0)
    assert nothing.condition == math.inf


def test_equal_calls_give_equal_numbers() -> None:
    conv = Conv(real_numbers(0, 4, 4, 3, 3), None, Geometry.of((3, 3), padding=1))
    assert spectrum(conv, (8, 9)) == convtool.spectrum(conv, (8, 9))


def test_weights_and_tolerances_that_do_not_do() -> None:
    conv = make_conv(Geometry.of((2, 3)), 2, 3)
    with pytest.raises(UsageError, match="tolerance: expected a number between 0 and 1, got 2"):
        spectrum(conv, (4, 5), tolerance=2)
    with pytest.raises(UsageError, match="smaller than the kernel"):
        spectrum(conv, (1, 5))
    conv.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        spectrum(conv, (4, 5))
