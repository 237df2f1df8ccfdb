"""Matrices against the layers that they are of: every kind of layer, streamed, and each kind of fault."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, real_numbers
from torch import Tensor

import convtool
from convtool.core.conv import Conv
from convtool.core.kernels import ORDERS, Order
from convtool.core.rows import CsrBlock
from convtool.core.toeplitz import ToeplitzMatrix, toeplitz
from convtool.core.verify_matrix import MatrixForm, MatrixReport, verify_matrices, verify_matrix
from convtool.errors import UsageError


@dataclass(frozen=True)
class Stored:
    """A matrix in CSR form, given in blocks of so many rows."""

    counts: Tensor
    indices: Tensor
    values: Tensor
    shape: tuple[int, int]
    step: int = 17

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def blocks(self, entries: int = 0, /) -> Iterator[tuple[int, int]]:
        yield from ((start, min(start + self.step, self.shape[0])) for start in range(0, self.shape[0], self.step))

    def rows(self, start: int, stop: int, /) -> CsrBlock:
        first, last = int(self.counts[:start].sum()), int(self.counts[:stop].sum())
        return CsrBlock(self.counts[start:stop], self.indices[first:last], self.values[first:last])


def made(matrix: ToeplitzMatrix, rows: tuple[int, int] | None = None) -> Stored:
    start, stop = rows or (0, matrix.shape[0])
    block = matrix.rows(start, stop)
    return Stored(block.counts, block.indices, block.values, (stop - start, matrix.shape[1]))


def layer(case: Case) -> Conv:
    whole = case.conv()
    bias = None if whole.bias is None else real_numbers(4, len(whole.bias))
    return Conv(real_numbers(3, *whole.weight.shape) / 3, bias, whole.geometry)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("transpose", "affine"), [(False, False), (True, True)], ids=["T @ x", "x @ B affine"])
def test_the_matrix_of_every_kind_of_layer(case: Case, transpose: bool, affine: bool, order: Order) -> None:
    conv = layer(case)
    options: dict[str, Any] = {"transpose": transpose, "affine": affine}
    matrix = toeplitz(conv, case.input_size, dtype=torch.float32, order=order, **options)
    part = (matrix.shape[0] // 3, max(matrix.shape[0] // 3 + 1, matrix.shape[0] * 2 // 3))
    for rows in (None, part):
        bias = None if affine else matrix.bias
        if bias is not None and rows is not None:
            bias = bias[slice(*rows)]
        report = verify_matrix(
            conv, case.input_size, made(matrix, rows), MatrixForm(order=order, rows=rows, **options), bias=bias
        )
        assert report.equivalent, (rows, report)
        assert report.products.positions > 0


def test_a_matrix_in_one_order_is_not_the_one_in_the_other() -> None:
    pairs: list[tuple[Order, Order]] = [("CHW", "HWC"), ("HWC", "CHW")]
    for mine, other in pairs:
        matrix = toeplitz(CONV, SIZE, dtype=torch.float32, order=mine)
        assert verify_matrix(CONV, SIZE, made(matrix), MatrixForm(order=mine), bias=matrix.bias).equivalent
        report = verify_matrix(CONV, SIZE, made(matrix), MatrixForm(order=other), bias=matrix.bias)
        assert not report.entries.equal
        assert not report.products.equal
        assert not report.bias.equal


CONV = convtool.conv(real_numbers(1, 4, 2, 3, 2), real_numbers(2, 4), padding=[(1, 0), (2, 1)], stride=(2, 1))
SIZE = (5, 6)


def checked(matrix: Stored, bias: Tensor | None = None, conv: Conv = CONV) -> MatrixReport:
    whole = ToeplitzMatrix(conv, SIZE, dtype=torch.float32)
    return verify_matrix(conv, SIZE, matrix, bias=whole.bias if bias is None else bias)


@pytest.fixture
def good() -> Stored:
    return made(ToeplitzMatrix(CONV, SIZE, dtype=torch.float32))


def test_one_entry_off_is_found_where_it_is(good: Stored) -> None:
    for place in (0, 17, len(good.values) - 1):
        values = good.values.clone()
        up = torch.tensor(math.inf)
        values[place] = torch.nextafter(torch.nextafter(values[place], up), up)
        report = checked(replace(good, values=values))
        assert not report.equivalent
        row = int((good.counts.cumsum(0) <= place).sum())
        assert report.entries.where == (row, int(good.indices[place]))
        assert report.entries.differing == 1


def test_an_entry_that_is_missing_moved_or_too_many_is_found(good: Stored) -> None:
    counts = good.counts.clone()
    counts[4] -= 1
    place = int(good.counts[:4].sum())
    keep = torch.arange(len(good.values)) != place
    missing = replace(good, counts=counts, indices=good.indices[keep], values=good.values[keep])
    assert not checked(missing).equivalent
    indices = good.indices.clone()
    indices[place] = next(c for c in range(good.shape[1]) if c not in good.indices[place : place + int(good.counts[4])])
    assert checked(replace(good, indices=indices)).entries.differing == 2


def test_entries_in_any_order_and_in_parts_are_what_they_add_up_to(good: Stored) -> None:
    order = torch.cat([torch.arange(len(good.values))[a:b].flip(0) for a, b in _spans(good.counts)])
    backwards = replace(good, indices=good.indices[order], values=good.values[order])
    assert checked(backwards).equivalent
    halves = replace(
        good,
        counts=good.counts * 2,
        indices=good.indices.repeat_interleave(2),
        values=(good.values / 2).repeat_interleave(2),
    )
    assert checked(halves).equivalent


def _spans(counts: Tensor) -> list[tuple[int, int]]:
    ends = counts.cumsum(0).tolist()
    return list(zip([0, *ends], ends, strict=False))


def test_a_layer_of_another_geometry_is_not_it(good: Stored) -> None:
    shifted = Conv(CONV.weight, CONV.bias, replace(CONV.geometry, padding=((0, 1), (2, 1))))
    report = checked(good, conv=shifted)
    assert not report.equivalent
    assert not report.products.equal  # and so says torch's convolution
    larger = Conv(CONV.weight, CONV.bias, replace(CONV.geometry, padding=((2, 2), (2, 1))))
    assert "the layer's matrix is" in checked(good, conv=larger).mismatch


def test_the_products_witness_the_tables(good: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the tables themselves were wrong, the entries would agree, and the products would not."""
    wrong = Conv(CONV.weight.flip(-1), CONV.bias, CONV.geometry)
    tables = ToeplitzMatrix

    class Mistaken(tables):  # type: ignore[misc, valid-type]
        def __init__(self, conv: Conv, *args: object, **options: object) -> None:
            flipped = Conv(conv.weight.flip(-1), conv.bias, conv.geometry)
            super().__init__(flipped, *args, **options)

    monkeypatch.setattr("convtool.core.toeplitz.ToeplitzMatrix", Mistaken)
    report = verify_matrix(CONV, SIZE, made(tables(wrong, SIZE, dtype=torch.float32)), bias=good_bias())
    assert report.entries.equal
    assert not report.products.equal
    assert not report.equivalent


def good_bias() -> Tensor:
    bias = ToeplitzMatrix(CONV, SIZE, dtype=torch.float32).bias
    assert bias is not None
    return bias


def test_the_bias_counts(good: Stored) -> None:
    bias = good_bias()
    off = bias.clone()
    off[7] += 1
    report = checked(good, off)
    assert not report.equivalent
    assert report.bias.where == (7,)
    assert not checked(good, bias[:-1]).equivalent
    assert not verify_matrix(CONV, SIZE, good).equivalent  # there is room for one, and there is none
    without = verify_matrix(CONV, SIZE, good, stores_bias=False)
    assert without.equivalent
    assert without.bias_missing
    unbiased = Conv(CONV.weight, None, CONV.geometry)
    assert not verify_matrix(unbiased, SIZE, good, bias=bias).equivalent
    assert verify_matrix(unbiased, SIZE, good, bias=torch.zeros_like(bias)).equivalent


def test_taps_that_were_added_up_in_lower_precision_pass_with_computed_in() -> None:
    conv = convtool.conv(real_numbers(1, 3, 2, 3, 4), padding=[(2, 2), (3, 3)], padding_mode="reflect")
    size = (4, 5)
    exact = Conv(conv.weight.float(), None, conv.geometry)
    stored = made(ToeplitzMatrix(exact, size))
    assert verify_matrix(exact, size, stored).equivalent
    several = ToeplitzMatrix(Conv(torch.ones_like(exact.weight), None, conv.geometry), size).values(0, 144) > 1
    assert several.any()
    assert not several.all()
    off = stored.values * (1 + 2.0**-22)
    rough = replace(stored, values=torch.where(several, off, stored.values))
    assert not verify_matrix(exact, size, rough).equivalent
    assert verify_matrix(exact, size, rough, computed_in=torch.float32).equivalent
    single = replace(stored, values=torch.where(several, stored.values, off))
    assert not verify_matrix(exact, size, single, computed_in=torch.float32).equivalent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outwards", [True, False])
def test_one_number_one_unit_in_its_last_place_off_is_found(dtype: torch.dtype, outwards: bool) -> None:
    below_one = 1 - torch.finfo(dtype).eps / 2
    weight = torch.tensor([[[[below_one, 0.3], [-1.0, -0.7], [-below_one, 3e-5]]]], dtype=torch.float64).to(dtype)
    conv = Conv(weight, weight.flatten()[:1], CONV.geometry)
    conv = replace(conv, geometry=replace(conv.geometry, padding=((0, 0), (0, 0)), stride=(1, 1)))
    matrix = ToeplitzMatrix(conv, SIZE)
    good, bias = made(matrix), matrix.bias
    assert verify_matrix(conv, SIZE, good, bias=bias).equivalent
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    step = 1 if outwards else -1  # of the magnitude
    for entry in range(6):  # each number of the kernel
        off = good.values.clone()
        off.view(words)[entry] += step
        changed = replace(good, values=off)
        report = verify_matrix(conv, SIZE, changed, bias=bias)
        assert not report.equivalent, weight.flatten()[entry]
        assert report.entries.differing == 1
        assert not verify_matrices(good, changed).equivalent
    assert bias is not None
    off = bias.clone()
    off.view(words)[3] += step
    assert not verify_matrix(conv, SIZE, good, bias=off).equivalent


def test_two_matrices_of_which_one_is_the_other_rounded() -> None:
    wide, half = (made(ToeplitzMatrix(CONV, SIZE, dtype=dtype)) for dtype in (torch.float64, torch.float16))
    report = verify_matrices(wide, replace(half, step=3))
    assert report.equivalent
    assert 0.5 < report.ratio <= 1
    assert not verify_matrices(half, wide).equivalent
    assert "differ in shape" in verify_matrices(wide, made(ToeplitzMatrix(CONV, (6, 6)))).mismatch
    values = half.values.clone()
    values[3] = math.nan
    assert verify_matrices(wide, replace(half, values=values)).ratio == math.inf


def test_nothing_is_no_proof(good: Stored) -> None:
    with pytest.raises(UsageError, match="no comparison is no proof"):
        verify_matrix(CONV, SIZE, good, trials=0)
    with pytest.raises(UsageError, match="seed"):
        verify_matrix(CONV, SIZE, good, seed=-1)
    assert not MatrixReport((0, 5)).equivalent
