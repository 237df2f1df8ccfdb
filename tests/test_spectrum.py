"""Singular values: every way to them against a dense SVD of the matrix from the definition."""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, IDS, Case, make_conv, real_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import toeplitz as dense_toeplitz
from strategies import layers_with_sizes
from test_chain_matrix import random_chain, truth

import convtool
from convtool.core import gram as gram_module
from convtool.core import spectrum as module
from convtool.core.blocks import Apart, Block
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.gram import Gram, Side
from convtool.core.singular import SingularValue, Spectrum
from convtool.core.spectrum import spectrum
from convtool.core.tree import Chain
from convtool.errors import InputError, UsageError


def dense_ends(conv: Conv, size: Sequence[int]) -> tuple[float, float]:
    values = np.linalg.svd(dense_toeplitz(conv, size), compute_uv=False)
    return float(values[0]), float(values[-1])


def smallest(found: Spectrum) -> SingularValue:
    """The smallest, where it was asked for."""
    assert found.smallest is not None
    return found.smallest


def check(found: Spectrum, conv: Conv, size: Sequence[int]) -> None:
    """What is said holds, and is known to the tolerance."""
    high, low = check_claims(found, conv, size)
    assert found.largest.proved
    assert smallest(found).proved
    if low > 1e-6 * high:
        assert math.isclose(found.condition, high / low, rel_tol=1e-3)
        assert found.condition_at_least <= high / low * (1 + 1e-9)
    elif low < 1e-12 * high:
        assert found.condition > 1e9


def check_claims(found: Spectrum, conv: Conv, size: Sequence[int]) -> tuple[float, float]:
    """What is said holds, proved or not: both ends are held from both sides."""
    high, low = dense_ends(conv, size)
    rounding = 1e-13 * high
    for value, end in ((found.largest, high), (found.smallest, low)):
        if value is None:
            continue
        assert abs(value.value - end) <= value.error + rounding
        assert value.proved == (value.error <= found.tolerance * found.largest.value)
    assert found.largest.value <= high * (1 + 1e-9)
    assert found.smallest is None or found.smallest.value >= low - 1e-9 * high
    return high, low


def budgets(patch: pytest.MonkeyPatch, **most: int) -> None:
    """Set how much work of each kind, and what sizes, `spectrum` allows itself; little for grids and iterations."""
    for name, value in {"SMALLEST_SIDE": 3, "GRID_WORK": 1 << 24, "PRODUCTS": 100, **most}.items():
        patch.setattr(module, name, value)


@pytest.fixture
def factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any matrix is small enough for a dense SVD."""
    monkeypatch.setattr(module, "DENSE_WORK", -1)
    monkeypatch.setattr(module, "SMALLEST_SIDE", 8)


@pytest.fixture
def iterate(factor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is any Gram matrix small enough to factor; and an iteration isn't long."""
    monkeypatch.setattr(gram_module, "FACTOR_WORK", -1)
    monkeypatch.setattr(module, "GRID_WORK", 1 << 26)
    monkeypatch.setattr(module, "PRODUCTS", 300)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_by_cholesky_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_what_cannot_be_factored_has_bounds(case: Case, steps: int | None) -> None:
    found = spectrum(case.conv(), case.input_size, steps=steps)
    high, _ = check_claims(found, case.conv(), case.input_size)
    assert found.largest.value + found.largest.error <= 4 * high  # of small inputs; of large ones it is nearly tight


@pytest.mark.parametrize("work", [-1, 1 << 40])
@settings(max_examples=60)
@given(layer=layers_with_sizes(), steps=st.sampled_from((None, 5)))
def test_no_value_is_outside_of_what_is_claimed(
    work: int, layer: tuple[Conv, tuple[int, ...]], steps: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        budgets(patch, DENSE_WORK=-1)
        patch.setattr(gram_module, "FACTOR_WORK", work)
        found = spectrum(*layer, steps=steps)
        check_claims(found, *layer)
        if work > 0 and steps is None:
            check(found, *layer)


# --- the largest alone


@pytest.mark.parametrize("work", [-1, 1 << 40])
@settings(max_examples=100)
@given(layer=layers_with_sizes(), steps=st.sampled_from((None, 3)))
def test_the_largest_alone_is_never_outside_of_what_is_claimed(
    work: int, layer: tuple[Conv, tuple[int, ...]], steps: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        budgets(patch, ALONE_WORK=-1, ALONE_FACTOR_WORK=work)
        found = spectrum(*layer, steps=steps, largest=True)
        check_claims(found, *layer)
        assert found.smallest is None
        assert math.isnan(found.condition)
        assert math.isnan(found.condition_error)
        assert math.isnan(found.condition_at_least)
        if work > 0 and steps is None:
            assert found.largest.proved


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_largest_alone_over_the_table(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for work in (-1, 1 << 40):
        budgets(monkeypatch, ALONE_WORK=-1, ALONE_FACTOR_WORK=work)
        check_claims(spectrum(case.conv(), case.input_size, largest=True), case.conv(), case.input_size)


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_alone_of_chains(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, size = random_chain(seed)
    values = torch.linalg.svdvals(truth(Chain(tuple(chain)), size)[0])
    if len(values) > 5:
        budgets(monkeypatch, ALONE_WORK=-1, ALONE_FACTOR_WORK=1 << 40 if seed % 2 else -1)
    largest, exact = spectrum(chain, size, largest=True).largest, float(values[0])
    assert exact * (1 - 1e-13) - largest.error <= largest.value <= exact * (1 + 1e-13)
    assert largest.proved or seed % 2 == 0


def test_of_the_largest_alone_no_svd_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = Conv(real_numbers(3, 800, 900), None, Geometry.of(()))
    values = np.linalg.svd(conv.weight.numpy(), compute_uv=False)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    monkeypatch.setattr(module, "_smallest", None)
    found = spectrum(conv, (), largest=True)
    assert (found.methods, found.largest.proved) == (("cholesky",), True)
    assert abs(found.largest.value - values[0]) <= found.largest.error
    # Where a factorisation would take too long, a bound is left; --memory has it made all the same.
    monkeypatch.setattr(module, "ALONE_FACTOR_WORK", 1)
    monkeypatch.setattr(module, "ALONE_WORK", 1 << 20)
    vague = spectrum(conv, (), largest=True)
    assert (vague.methods, vague.largest.proved) == (("sums",), False)
    assert vague.largest.value <= values[0] <= vague.largest.value + vague.largest.error
    assert spectrum(conv, (), largest=True, memory=vague.lacking).largest.proved


def test_the_largest_alone_needs_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = Conv(real_numbers(3, 700, 750), None, Geometry.of(()))
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert spectrum(conv, (), largest=True).methods == ("dense",)


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
    monkeypatch.setattr(module, "DENSE_WORK", -1)
    conv = Conv(real_numbers(1, outer, inner, *kernel), None, Geometry.of(kernel, **fields))
    found = spectrum(conv, size)
    assert min(found.shape) > 100
    assert found.methods == (("fourier",) if name == "circular" else ("cholesky",))
    check(found, conv, size)
    high, low = dense_ends(conv, size)
    assert abs(found.condition - high / low) <= found.condition_error


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("kernel", [(3, 3), (5, 4)])
def test_of_depthwise_layers_each_group_is_looked_at(kernel: tuple[int, int]) -> None:
    weight = real_numbers(2, 24, 1, *kernel) * torch.logspace(-1, 1, 12).repeat_interleave(2).reshape(24, 1, 1, 1)
    conv = Conv(weight, None, Geometry.of(kernel, padding=1, groups=12))  # two outputs for each input
    assert len(Apart.of(conv, (9, 10)).weights) == 12
    found = spectrum(conv, (9, 10))
    assert found.methods == ("cholesky",)
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
    assert smallest(found).value <= 1e-7 * found.largest.value
    assert smallest(found).proved
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
    assert abs(smallest(found).value - low) <= min(smallest(found).error, 1e-6 * high)
    assert smallest(found).proved
    assert math.isclose(found.condition, high / low, rel_tol=1e-3)


def test_an_input_that_is_cut_off_makes_the_smallest_zero() -> None:
    geometry = Geometry.of(1, padding=[(1, 0)], dilation=2, transposed=True, output_padding=1)
    conv = make_conv(geometry, 3, 4)
    assert conv.output_size((6,)) == (6,)
    found = spectrum(conv, (6,))
    assert smallest(found).value <= smallest(found).error < 1e-9
    check(found, conv, (6,))


def test_singular_values_beyond_float64_are_an_error() -> None:
    conv = convtool.conv(torch.full((2, 2, 3), 1.5e308, dtype=torch.float64), padding=1)
    with pytest.raises(InputError, match=r"weights near 8\.99e\+307 have singular values beyond what float64 holds"):
        spectrum(conv, (5,))


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("work", [-1, 1 << 40])
@pytest.mark.parametrize("exponent", [-900, 900])
def test_weights_whose_squares_are_no_numbers(exponent: int, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "FACTOR_WORK", work)
    weight = real_numbers(0, 2, 3, 3)
    plain, scaled = (Conv(weight * 2.0**power, None, Geometry.of(3, padding=1)) for power in (0, exponent))
    there, here = spectrum(scaled, (20,)), spectrum(plain, (20,))
    assert there.largest.value == here.largest.value * 2.0**exponent
    assert smallest(there).value == smallest(here).value * 2.0**exponent
    assert there.condition == here.condition
    check_claims(here, plain, (20,))


@pytest.mark.usefixtures("factor")
def test_complex_layers() -> None:
    weight = torch.complex(real_numbers(0, 3, 2, 3), real_numbers(1, 3, 2, 3))
    conv = Conv(weight, None, Geometry.of(3, padding=1))
    found = spectrum(conv, (30,))
    values = torch.linalg.svdvals(convtool.toeplitz(conv, (30,)).to_dense())
    assert found.largest.proved
    assert abs(found.largest.value - float(values[0])) <= found.largest.error
    assert smallest(found).proved
    assert abs(smallest(found).value - float(values[-1])) <= smallest(found).error


# --- apart


def test_dilation_makes_components_that_are_looked_at_apart() -> None:
    """Lanczos over all of it settled on the second largest: the two components have nearly equal tops."""
    weight = torch.tensor([[[-0.021681422463391387, -1.1367254747855586]], [[1.4270522761520927, 1.163598756061647]]])
    geometry = Geometry.of(2, dilation=2, padding_mode="reflect")
    conv = Conv(weight.double(), None, geometry)
    assert sorted(lines[0].size for lines in Apart.of(conv, (77,)).parts()) == [38, 39]
    high, _ = dense_ends(conv, (77,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSE_WORK", -1)
        for seed in range(20):
            found = spectrum(conv, (77,), seed=seed)
            assert found.largest.proved
            assert abs(found.largest.value - high) <= found.largest.error <= 1e-6 * high
            check(found, conv, (77,))


PARTS: list[tuple[str, dict[str, Any], tuple[int, ...], int, int, int]] = [
    # layer 4 -> 6 channels, input size: waves, parts that differ, all blocks
    ("a patch at a time", {"kernel_size": (2, 3), "stride": (2, 3)}, (6, 9), 2, 1, 9),
    ("a patch at a time, with a rest", {"kernel_size": (2, 3), "stride": (2, 3)}, (7, 9), 1, 2, 12),
    ("dilated", {"kernel_size": (3, 3), "padding": 2, "dilation": 2}, (8, 9), 0, 2, 4),
    ("gaps", {"kernel_size": (1,), "stride": 2}, (7,), 0, 2, 7),  # four inputs are read, three are not
    ("transposed, a patch at a time", {"kernel_size": (3,), "stride": 3, "transposed": True}, (5,), 1, 1, 5),
    ("connected", {"kernel_size": (3, 3), "padding": 1}, (6, 7), 0, 1, 1),
    ("circular", {"kernel_size": (3,), "padding": 1, "stride": 2, "padding_mode": "circular"}, (8,), 1, 1, 4),
]


@pytest.mark.parametrize(("name", "fields", "size", "waves", "differ", "blocks"), PARTS, ids=[row[0] for row in PARTS])
def test_a_matrix_falls_apart(
    name: str, fields: dict[str, Any], size: tuple[int, ...], waves: int, differ: int, blocks: int
) -> None:
    conv = make_conv(Geometry.of(**fields), 4, 6)
    apart = Apart.of(conv, size)
    parts = apart.parts()
    assert (len(apart.waves), len(parts), apart.repeats * sum(parts.values())) == (waves, differ, blocks)
    values = [
        torch.linalg.svdvals(Block(weight, lines).dense())
        for lines, count in parts.items()
        for batch in apart.batches()
        for weight in batch
        for _ in range(count)
    ]
    expected = np.linalg.svd(dense_toeplitz(conv, size), compute_uv=False)
    found = np.unique(torch.cat(values).numpy().round(9))
    assert np.array_equal(found[found > 0], np.unique(expected.round(9))[np.unique(expected.round(9)) > 0])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_symbol_bounds_the_largest(case: Case) -> None:
    apart = Apart.of(case.conv(), case.input_size)
    high = max(Block(weight, apart.lines).bound(1 << 26) for batch in apart.batches() for weight in batch)
    assert high >= dense_ends(case.conv(), case.input_size)[0] * (1 - 1e-12)


def test_the_bound_is_nearly_tight_for_long_inputs_and_holds_on_any_grid() -> None:
    conv = Conv(real_numbers(3, 3, 2, 5), None, Geometry.of(5, padding=2, stride=2))
    (block,) = (Block(weight, apart.lines) for apart in [Apart.of(conv, (400,))] for weight in apart.weights)
    high = float(np.linalg.svd(dense_toeplitz(conv, (400,)), compute_uv=False)[0])
    bounds = [block.bound(1 << power) for power in range(0, 32, 2)]
    assert all(bound >= high for bound in bounds)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 1.1 * high > 1.099 * bounds[-1]


@pytest.mark.usefixtures("factor")
def test_a_vector_that_is_not_the_last_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter((1, -2))  # the second largest, and then the last but one

    def mistaken(ends: Any, side: Side, *rest: object) -> None:
        ends.found(float(torch.linalg.svdvals(side.block.dense())[next(taken)]), 1e-12, 3)

    monkeypatch.setattr(module, "_iterate", mistaken)
    conv = Conv(real_numbers(0, 3, 3, 3), None, Geometry.of(3, padding=1))
    found = spectrum(conv, (30,))
    assert not found.largest.proved
    assert not smallest(found).proved
    check_claims(found, conv, (30,))


# --- the Gram matrix


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_factor_exists_where_all_eigenvalues_are_on_its_side(case: Case) -> None:
    apart = Apart.of(case.conv(), case.input_size)
    batch = next(apart.batches())
    block = Block(batch[-1], apart.lines)
    product = Gram(Side(block))
    dense = block.dense().numpy()
    dense = dense @ dense.conj().T if dense.shape[0] < dense.shape[1] else dense.conj().T @ dense
    eigenvalues, size = np.linalg.eigvalsh(dense), len(dense)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    assert product.side.size == size
    assert high <= product.norm * (1 + 1e-12)
    margin = 1e-6 * high
    assert product.proves(1, low + margin) is None
    assert product.proves(-1, high - margin) is None
    for sign, shift in ((1, low - margin), (-1, high + margin)):
        rounding = product.proves(sign, shift)
        assert rounding is not None
        assert 0 < rounding < margin
    factor = product.factor(1, low - margin)
    assert factor is not None
    right = torch.linspace(-1, 1, size, dtype=torch.float64).to(block.weight.dtype)
    x = torch.from_numpy(product.solve(factor, right))
    back = Side(block).gram(x[None])[0] - (low - margin) * x
    np.testing.assert_allclose(back.numpy(), right.numpy(), rtol=1e-6, atol=1e-6)


def test_a_factor_that_would_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(channels: int, size: tuple[int, int]) -> Gram:
        conv = Conv(real_numbers(0, channels, channels, 3, 3), None, Geometry.of((3, 3), padding=1))
        apart = Apart.of(conv, size)
        return Gram(Side(Block(apart.weights[0], apart.lines)))

    large, small = product(32, (56, 56)), product(2, (6, 7))
    assert not large.fits(None)
    assert large.fits(large.bytes)
    assert not large.fits(large.bytes - 1)
    assert small.fits(None)
    for limit in ("FACTOR_WORK", "BAND_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(gram_module, limit, 1000)
            assert not small.fits(None)


@pytest.mark.usefixtures("factor")
def test_large_layers_need_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"this large need scipy: pip install 'convtool\[scipy\]'"):
        spectrum(Conv(real_numbers(0, 2, 2, 3), None, Geometry.of(3, padding=1)), (9,))


CIRCULAR: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3,), (7,), {"padding": 1}),
    ((3, 2), (5, 4), {"padding": [(1, 1), (0, 1)]}),
    ((3, 5), (4, 3), {"padding": (1, 2)}),  # taps meet: as wide as the input and wider
    ((3, 2), (6, 5), {"padding": [(2, 2), (0, 1)], "dilation": (2, 1), "groups": 2}),
    ((2, 3, 2), (3, 4, 3), {"padding": [(1, 0), (1, 1), (0, 1)]}),
    ((1, 1), (3, 4), {}),
    ((3, 3), (6, 8), {"padding": 1, "stride": (3, 2)}),
    ((4, 3), (6, 4), {"padding": (2, 1), "stride": 2, "groups": 2}),  # one output more than there are strides: (4, 2)
]


@pytest.mark.parametrize(("kernel", "size", "fields"), CIRCULAR)
def test_by_fourier_transform(kernel: tuple[int, ...], size: tuple[int, ...], fields: dict[str, Any]) -> None:
    geometry = Geometry.of(kernel, padding_mode="circular", **fields)
    conv = make_conv(geometry, 4, 6)
    found = spectrum(conv, size)
    assert found.methods[:1] == ("fourier",)
    check(found, conv, size)


@pytest.mark.usefixtures("factor")
def test_an_axis_that_wraps_around_beside_one_that_does_not() -> None:
    conv = make_conv(Geometry.of((3, 3), padding=[(1, 1), (0, 0)], padding_mode="circular"), 3, 4)
    found = spectrum(conv, (6, 12))
    assert found.methods == ("fourier", "cholesky")
    check(found, conv, (6, 12))


@pytest.mark.usefixtures("iterate")
def test_without_a_factor_the_largest_is_found_and_bounded() -> None:
    conv = Conv(real_numbers(0, 2, 4, 3, 3), None, Geometry.of((3, 3), padding=1, stride=2))
    found = spectrum(conv, (24, 26))
    assert found.methods == ("lanczos",)
    high, low = check_claims(found, conv, (24, 26))
    assert found.largest.value >= high * (1 - 1e-6)
    assert found.largest.error <= 0.1 * high
    assert low <= smallest(found).value <= 2 * low + 0.1 * high


@pytest.mark.usefixtures("iterate")
def test_what_is_not_known_within_the_steps_is_not_called_known() -> None:
    conv = Conv(real_numbers(0, 5, 5, 3, 3), None, Geometry.of((3, 3), padding=1))
    found = spectrum(conv, (9, 10), steps=12)
    assert found.steps == 12
    assert not found.largest.proved
    assert not smallest(found).proved
    high, low = check_claims(found, conv, (9, 10))
    assert 1 < found.condition_at_least <= high / low


@pytest.mark.usefixtures("factor")
def test_steps_bound_every_iteration() -> None:
    conv = Conv(real_numbers(0, 5, 5, 3, 3), None, Geometry.of((3, 3), padding=1))
    found = spectrum(conv, (9, 10), steps=4)
    assert found.steps == 4
    assert not found.largest.proved
    check_claims(found, conv, (9, 10))


@pytest.mark.usefixtures("factor")
def test_of_many_groups_those_that_hold_neither_end_are_only_held_against_the_others() -> None:
    weight = real_numbers(0, 8, 1, 3, 3) * torch.linspace(1, 2, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    conv = Conv(weight, None, Geometry.of((3, 3), padding=1, groups=8))
    found = spectrum(conv, (8, 9))
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


@pytest.mark.usefixtures("factor")
@pytest.mark.parametrize("work", [-1, 1 << 40])
def test_an_orthogonal_layer_and_a_zero_one(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "FACTOR_WORK", work)
    delta = torch.zeros(3, 3, 3)
    delta[torch.arange(3), torch.arange(3), 1] = 2.0
    conv = Conv(delta, None, Geometry.of(3, padding=1))
    found = spectrum(conv, (9,))
    assert (found.largest.value, smallest(found).value) == pytest.approx((2.0, 2.0), rel=1e-14)
    assert found.condition_at_least == pytest.approx(1.0, rel=1e-12)
    assert work < 0 or found.condition == pytest.approx(1.0, rel=1e-6)
    nothing = spectrum(Conv(torch.zeros(2, 3, 3), None, Geometry.of(3, padding=1)), (9,))
    assert (nothing.largest.value, smallest(nothing).value) == (0.0, 0.0)
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


def test_numbers_of_8_bits_have_singular_values_too() -> None:
    weight = real_numbers(0, 3, 2, 3).to(torch.float8_e4m3fn)
    found = spectrum(Conv(weight, None, Geometry.of((3,))), (7,))
    assert found.largest.value == spectrum(Conv(weight.double(), None, Geometry.of((3,))), (7,)).largest.value


@pytest.mark.parametrize("shut", [False, True])
def test_both_ends_of_chains_are_enclosed(shut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a dense SVD, and where that is shut by ARPACK, a factorisation and the bounds of the layers."""
    if shut:
        monkeypatch.setattr(module, "DENSE_WORK", 0)
        monkeypatch.setattr(module, "SMALLEST_SIDE", 4)
    proved = 0
    for seed in range(8, 24):
        layers, size = random_chain(seed)
        values = torch.linalg.svdvals(truth(Chain(tuple(layers)), size)[0])
        if len(values) < 6:
            continue
        found = spectrum(layers, size)
        for value, exact in ((found.largest, float(values[0])), (smallest(found), float(values[-1]))):
            assert abs(value.value - exact) <= value.error + 1e-13 * float(values[0])
            proved += value.proved
    assert proved > 12


def test_a_chain_that_is_one_layer_is_looked_at_as_one() -> None:
    layer = make_conv(Geometry.of((3, 3), padding=1, padding_mode="circular"), 2, 3)
    scale = convtool.conv(torch.tensor([2.0, 3.0, 0.5]).reshape(3, 1, 1, 1), groups=3)
    found = spectrum([layer, scale], (6, 7))
    wanted = spectrum(convtool.fuse([layer, scale], dtype=torch.float64), (6, 7))
    assert found.methods == wanted.methods == ("fourier",)  # which no chain's matrix is
    assert found.largest.value == pytest.approx(wanted.largest.value, rel=1e-12)
