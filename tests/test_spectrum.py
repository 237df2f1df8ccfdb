"""Singular values: every way to them against a dense SVD of the matrix from the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, IDS, Case, make_conv, real_numbers
from hypothesis import given, settings
from oracles import toeplitz as dense_toeplitz
from strategies import layers_with_sizes

import convtool
from convtool.core import spectrum as module
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.spectrum import Spectrum, spectrum
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
def iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix is small enough for a dense SVD."""
    monkeypatch.setattr(module, "DENSE_SIDE", 0)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@pytest.mark.usefixtures("iterate")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_by_lanczos_over_the_table(case: Case) -> None:
    check(spectrum(case.conv(), case.input_size), case.conv(), case.input_size)


@settings(max_examples=150)
@given(layer=layers_with_sizes())
def test_by_lanczos_for_random_layers(layer: tuple[Conv, tuple[int, ...]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSE_SIDE", 0)
        check(spectrum(*layer), *layer)


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


def test_lanczos_stops_when_both_ends_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    conv = Conv(real_numbers(0, 2, 4, 3, 3), None, Geometry.of((3, 3), padding=1, stride=2))
    found = spectrum(conv, (12, 14), tolerance=1e-4)
    assert found.methods == ("lanczos",)
    assert found.steps < min(found.shape)
    check(found, conv, (12, 14))


def test_what_is_not_known_within_the_steps_is_not_called_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    conv = Conv(real_numbers(0, 5, 5, 3, 3), None, Geometry.of((3, 3), padding=1))
    found, (high, low) = spectrum(conv, (9, 10), steps=12), dense_ends(conv, (9, 10))
    assert found.steps == 12
    assert not found.largest.converged
    assert not found.smallest.converged
    assert found.largest.value <= high
    assert found.smallest.value >= low
    assert 1 < found.condition_at_least <= high / low


def test_groups_are_taken_together() -> None:
    conv = make_conv(Geometry.of((2, 3), padding=1, groups=3), 6, 9)
    check(spectrum(conv, (4, 5)), conv, (4, 5))
    scaled = Conv(
        conv.weight * torch.tensor([1.0, 100, 0.01]).repeat_interleave(3).reshape(9, 1, 1, 1), None, conv.geometry
    )
    check(spectrum(scaled, (4, 5)), scaled, (4, 5))


def test_an_orthogonal_layer_and_a_zero_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_SIDE", 0)
    delta = torch.zeros(3, 3, 3)
    delta[torch.arange(3), torch.arange(3), 1] = 2.0
    conv = Conv(delta, None, Geometry.of(3, padding=1))
    found = spectrum(conv, (9,))
    assert (found.largest.value, found.smallest.value) == (2.0, 2.0)
    assert found.condition == 1.0
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
