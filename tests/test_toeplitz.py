"""The matrix: one list of laws, held against every row of the table and against random layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypedDict

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import CASES, IDS, Case, make_conv, make_inputs, real_numbers, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import convolve, matrix_entries
from oracles import toeplitz as dense_toeplitz
from strategies import layers_with_sizes
from torch import Tensor

import convtool
from convtool.core import rows as rows_module
from convtool.core import tiles as tiles_module
from convtool.core import toeplitz as module
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.rows import index_dtype
from convtool.core.toeplitz import ToeplitzMatrix, toeplitz
from convtool.errors import UsageError

Size: TypeAlias = tuple[int, ...]
Law: TypeAlias = Callable[[Conv, Size], None]


class Form(TypedDict):
    """What `toeplitz` can be asked for."""

    transpose: bool
    affine: bool


FORMS = [Form(transpose=flip, affine=bias) for flip in (False, True) for bias in (False, True)]


def forms(conv: Conv, size: Size) -> Iterator[ToeplitzMatrix]:
    """The matrix, its transpose, and both with the bias."""
    for form in FORMS:
        yield toeplitz(conv, size, **form)


def wholes(conv: Conv, size: Size) -> Iterator[tuple[ToeplitzMatrix, Tensor]]:
    """The same, each with the dense matrix that it has to be, from the definition."""
    plain = torch.from_numpy(dense_toeplitz(conv, size))
    per_channel = torch.zeros(conv.out_channels, dtype=torch.float64) if conv.bias is None else conv.bias
    bias = per_channel.repeat_interleave(math.prod(conv.output_size(size)))
    extended = torch.cat([plain, bias[:, None]], 1)
    for form in FORMS:
        dense = extended if form["affine"] else plain
        yield toeplitz(conv, size, **form), dense.T.contiguous() if form["transpose"] else dense


def flat_inputs(conv: Conv, size: Size) -> tuple[Tensor, Tensor]:
    """Inputs (2, C_in, *size), and the same as columns (C_in * prod(size), 2)."""
    x = make_inputs(conv, size)
    return x, x.flatten(1).T


# --- the laws


def matrix_times_input_is_the_layer(conv: Conv, size: Size) -> None:
    matrix = toeplitz(conv, size)
    x, columns = flat_inputs(conv, size)
    product = matrix.to_dense() @ columns  # (C_out * prod(output), 2)
    if matrix.bias is not None:
        product = product + matrix.bias[:, None]
    assert torch.equal(product, forward(conv, x).flatten(1).T)
    expected = convolve(conv, x.movedim(0, -1).numpy()).reshape(-1, 2)
    assert torch.equal(product, torch.from_numpy(expected))


def it_is_what_the_layer_makes_of_each_basis_vector(conv: Conv, size: Size) -> None:
    for matrix, dense in wholes(conv, size):
        assert torch.equal(matrix.to_dense(), dense), (matrix.transpose, matrix.affine)


def transposing_gives_exactly_the_adjoint(conv: Conv, size: Size) -> None:
    matrix, adjoint = toeplitz(conv, size), toeplitz(conv, size, transpose=True)
    assert adjoint.shape == matrix.shape[::-1]
    assert adjoint.nnz == matrix.nnz
    turned = matrix.to_scipy().T.tocsr()
    turned.sort_indices()
    found = adjoint.to_scipy()
    np.testing.assert_array_equal(found.indptr, turned.indptr)
    np.testing.assert_array_equal(found.indices, turned.indices)
    np.testing.assert_array_equal(found.data, turned.data)
    # <T x, y> == <x, T* y>
    x = make_inputs(conv, size, batch=1).flatten()
    y = whole_numbers(7, matrix.shape[0])
    assert (matrix.to_dense() @ x) @ y == x @ (adjoint.to_dense() @ y)


def an_affine_matrix_takes_the_bias_along(conv: Conv, size: Size) -> None:
    x, columns = flat_inputs(conv, size)
    extended = torch.cat([columns, torch.ones(1, 2, dtype=torch.float64)])
    expected = forward(conv, x).flatten(1)
    assert torch.equal(toeplitz(conv, size, affine=True).to_dense() @ extended, expected.T)
    assert torch.equal(extended.T @ toeplitz(conv, size, affine=True, transpose=True).to_dense(), expected)


def any_range_of_rows_is_a_slice_of_the_whole(conv: Conv, size: Size) -> None:
    for matrix, dense in wholes(conv, size):
        pointer, full = matrix.indptr(), matrix.rows(0, matrix.shape[0])
        assert torch.equal(pointer[1:] - pointer[:-1], full.counts.to(pointer.dtype))
        rows, half = matrix.shape[0], matrix.shape[0] // 2
        for start, stop in ((0, 0), (0, 1), (half, half + 1), (min(1, half), rows), (0, half), (rows, rows)):
            assert torch.equal(matrix.dense_rows(start, stop), dense[start:stop])
            block, part = matrix.rows(start, stop), slice(int(pointer[start]), int(pointer[stop]))
            assert torch.equal(block.counts, full.counts[start:stop])
            assert torch.equal(block.indices, full.indices[part])
            assert torch.equal(block.values, full.values[part])
            assert matrix.entries(start, stop) == len(block.indices) == int(block.counts.sum())


def blocks_cover_the_rows_in_order(conv: Conv, size: Size) -> None:
    for matrix in forms(conv, size):
        for entries in (1, 2, 7, 50, matrix.nnz // 2 + 1, matrix.nnz + 1, 10**6):
            end = 0
            for start, stop in matrix.blocks(entries):
                assert start == end < stop
                end = stop
            assert end == matrix.shape[0]
        assert torch.equal(
            torch.cat([matrix.dense_rows(start, stop) for start, stop in matrix.blocks(20)]), matrix.to_dense()
        )


def blocks_are_no_larger_than_asked_for(conv: Conv, size: Size) -> None:
    for matrix in forms(conv, size):
        longest = int(matrix.row_counts(0, matrix.shape[0]).max())
        for entries in (1, 7, 50, matrix.nnz // 2 + 1):
            for start, stop in matrix.blocks(entries):
                assert matrix.entries(start, stop) <= max(entries, longest)


def stretches_cover_the_rows_and_tell_what_is_equal(conv: Conv, size: Size) -> None:
    for matrix in forms(conv, size):
        same_indices: dict[Any, Tensor] = {}
        same_values: dict[Any, Tensor] = {}
        for start, stop in ((0, matrix.shape[0]), (matrix.shape[0] // 3, matrix.shape[0] - 1)):
            end = start
            for stretch in matrix.stretches(start, stop):
                assert stretch.start == end < stretch.stop
                end = stretch.stop
                indices = matrix.indices(stretch.start, stretch.stop)
                values = matrix.values(stretch.start, stretch.stop)
                if stretch.same_indices is not None:
                    assert torch.equal(same_indices.setdefault(stretch.same_indices, indices), indices)
                if stretch.same_values is not None:
                    assert torch.equal(same_values.setdefault(stretch.same_values, values), values)
            assert end == max(start, stop)


def the_number_of_entries_is_known_beforehand(conv: Conv, size: Size) -> None:
    live, outputs = matrix_entries(conv, size), conv.out_channels * math.prod(conv.output_size(size))
    for form, matrix in zip(FORMS, forms(conv, size), strict=True):
        expected = live + (outputs if form["affine"] else 0)
        assert matrix.nnz == expected == matrix.entries(0, matrix.shape[0])
        assert len(matrix.rows(0, matrix.shape[0]).values) == expected
        assert int(matrix.indptr()[-1]) == expected


def columns_are_sorted_unique_and_int32(conv: Conv, size: Size) -> None:
    for matrix in forms(conv, size):
        sparse = matrix.to_scipy()
        assert sparse.has_canonical_format
        fresh = scipy.sparse.csr_array((sparse.data, sparse.indices, sparse.indptr), shape=sparse.shape)
        fresh.check_format(full_check=True)
        assert fresh.has_canonical_format  # a new object has to look for itself
        assert sparse.indices.dtype == sparse.indptr.dtype == np.int32
        assert matrix.index_dtype == matrix.indptr().dtype == matrix.rows(0, 1).indices.dtype == torch.int32


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def every_form_of_it_is_the_same_matrix(conv: Conv, size: Size) -> None:
    for matrix in forms(conv, size):
        dense = matrix.to_dense()
        assert matrix.to_scipy().shape == tuple(dense.shape) == matrix.shape
        np.testing.assert_array_equal(matrix.to_scipy().toarray(), dense.numpy())
        csr = matrix.to_sparse_csr()
        torch._validate_sparse_csr_tensor_args(csr.crow_indices(), csr.col_indices(), csr.values(), csr.shape)
        assert torch.equal(csr.to_dense(), dense)
        assert csr.crow_indices().dtype == csr.col_indices().dtype == torch.int32


def rows_made_again_are_the_same(conv: Conv, size: Size) -> None:
    # in another order, by the same object: nothing that it keeps goes stale
    for matrix in forms(conv, size):
        first, step = matrix.to_dense(), matrix.shape[0] // 20 + 1
        for row in reversed(range(0, matrix.shape[0], step)):
            assert torch.equal(matrix.dense_rows(row, row + 1)[0], first[row])
        assert torch.equal(matrix.to_dense(), first)


LAWS: tuple[Law, ...] = (
    matrix_times_input_is_the_layer,
    it_is_what_the_layer_makes_of_each_basis_vector,
    transposing_gives_exactly_the_adjoint,
    an_affine_matrix_takes_the_bias_along,
    any_range_of_rows_is_a_slice_of_the_whole,
    blocks_cover_the_rows_in_order,
    blocks_are_no_larger_than_asked_for,
    stretches_cover_the_rows_and_tell_what_is_equal,
    the_number_of_entries_is_known_beforehand,
    columns_are_sorted_unique_and_int32,
    every_form_of_it_is_the_same_matrix,
    rows_made_again_are_the_same,
)
LAW_IDS = [law.__name__ for law in LAWS]

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("law", LAWS, ids=LAW_IDS)
def test_laws_over_the_table(law: Law, case: Case) -> None:
    law(case.conv(), case.input_size)


@pytest.mark.parametrize("law", LAWS, ids=LAW_IDS)
@settings(max_examples=100)
@given(layer=layers_with_sizes())
def test_laws_for_random_layers(law: Law, layer: tuple[Conv, Size]) -> None:
    law(*layer)


# --- tiles: which rows are made together must not show. Real tiles are larger than any matrix of the table.


def small_tiles(patch: pytest.MonkeyPatch, tile: int, run: int, templates: int) -> None:
    """Tiles and runs of so many entries at most, as far as positions allow."""
    patch.setattr(tiles_module, "TILE_ENTRIES", tile)
    patch.setattr(tiles_module, "TEMPLATES", templates)
    for one in (tiles_module, module):
        patch.setattr(one, "RUN_ENTRIES", run)


# Tiles within runs, tiles as runs, runs without end; templates so few that they are thrown away.
@pytest.mark.parametrize(("tile", "run", "templates"), [(4, 25, 100), (30, 30, 2), (4, 10**6, 100)])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_laws_over_the_table_in_small_tiles(
    case: Case, tile: int, run: int, templates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, tile, run, templates)
    conv = case.conv()
    it_is_what_the_layer_makes_of_each_basis_vector(conv, case.input_size)
    any_range_of_rows_is_a_slice_of_the_whole(conv, case.input_size)
    stretches_cover_the_rows_and_tell_what_is_equal(conv, case.input_size)


@settings(max_examples=80)
@given(layer=layers_with_sizes(), tile=st.sampled_from((3, 10, 30)), tiles=st.sampled_from((1, 3, 10)))
def test_random_layers_in_small_tiles(tile: int, tiles: int, layer: tuple[Conv, Size]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, tile, tile * tiles, templates=6)
        it_is_what_the_layer_makes_of_each_basis_vector(*layer)
        stretches_cover_the_rows_and_tell_what_is_equal(*layer)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_laws_over_the_table_in_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(rows_module, "PART_ENTRIES", 1)
    small_tiles(monkeypatch, 20, 100, templates=2)
    it_is_what_the_layer_makes_of_each_basis_vector(case.conv(), case.input_size)
    any_range_of_rows_is_a_slice_of_the_whole(case.conv(), case.input_size)


# Stretches of a few channels cross into the next group, whose columns are others.
@pytest.mark.parametrize("small", [True, False], ids=["small", "real"])
@pytest.mark.parametrize(("together", "per_group"), [(2, 3), (2, 5), (3, 4)])
def test_stretches_that_cross_from_group_to_group(
    together: int, per_group: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        small_tiles(monkeypatch, 15 * together, 15 * together, templates=6)
    size = (7,) if small else (120_000 // together,)
    channels = 3 * per_group
    conv = make_conv(Geometry.of((2,), groups=3), 3, channels)
    matrix = toeplitz(conv, size)
    rows = matrix.shape[0]
    assert [one.start * channels // rows for one in matrix.stretches(0, rows)] == list(range(0, channels, together))
    stretches_cover_the_rows_and_tell_what_is_equal(conv, size)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (Geometry.of((3, 3), padding=1), (57, 61)),
        (Geometry.of((3, 2), padding=[(2, 1), (0, 3)], padding_mode="reflect", groups=2), (70, 64)),
        (Geometry.of((2, 3), stride=(2, 1), dilation=(1, 2), transposed=True), (40, 50)),
    ],
    ids=["same", "reflect", "transposed"],
)
def test_a_matrix_of_several_whole_tiles(geometry: Geometry, size: Size, form: Form) -> None:
    conv = make_conv(geometry, 8, 6)
    matrix = toeplitz(conv, size, **form)
    assert matrix.nnz > 2 * tiles_module.RUN_ENTRIES
    x = make_inputs(conv, size, batch=1)
    expected = forward(conv, x).flatten().numpy()
    sparse = matrix.to_scipy().T if form["transpose"] else matrix.to_scipy()
    row = np.append(x.numpy(), 1.0) if form["affine"] else x.numpy().reshape(-1)
    found = sparse @ row
    if not form["affine"] and matrix.bias is not None:
        found = found + matrix.bias.numpy()
    np.testing.assert_array_equal(found, expected)
    fresh = scipy.sparse.csr_array(
        (matrix.to_scipy().data, matrix.to_scipy().indices, matrix.to_scipy().indptr), shape=matrix.shape
    )
    assert fresh.has_canonical_format


# --- channels last


def check_channels_last(conv: Conv, size: Size) -> None:
    """The same entries, rows and columns in the order (position, channel)."""

    def last(channels: int, sizes: Size) -> Tensor:
        """What stands where in (*spatial, C): its place in (C, *spatial)."""
        return torch.arange(channels * math.prod(sizes)).reshape(channels, -1).T.flatten()

    outputs, inputs = last(conv.out_channels, conv.output_size(size)), last(conv.in_channels, size)
    for form, (plain, dense) in zip(FORMS, wholes(conv, size), strict=True):
        matrix = toeplitz(conv, size, order="HWC", **form)
        rows, columns = (inputs, outputs) if form["transpose"] else (outputs, inputs)
        end = torch.tensor([dense.shape[form["transpose"] ^ 1] - 1])  # the bias stays the last
        if form["affine"]:
            rows, columns = (
                (torch.cat([rows, end]), columns) if form["transpose"] else (rows, torch.cat([columns, end]))
            )
        expected = dense[rows][:, columns]
        assert torch.equal(matrix.to_dense(), expected), form
        assert (matrix.shape, matrix.nnz) == (plain.shape, plain.nnz)
        if plain.bias is not None:
            assert matrix.bias is not None
            assert torch.equal(matrix.bias, plain.bias[outputs])
        sparse = matrix.to_scipy()
        fresh = scipy.sparse.csr_array((sparse.data, sparse.indices, sparse.indptr), shape=sparse.shape)
        assert fresh.has_canonical_format
        total, half = matrix.shape[0], matrix.shape[0] // 2
        for start, stop in ((0, 0), (0, 1), (half, half + 1), (min(1, half), total), (0, half), (total, total)):
            assert torch.equal(matrix.dense_rows(start, stop), expected[start:stop])
            assert matrix.entries(start, stop) == len(matrix.indices(start, stop)) == len(matrix.values(start, stop))
        for pieces in (matrix.blocks(20), (stretch[:2] for stretch in matrix.stretches(0, total))):
            end_before = 0
            for start, stop in pieces:
                assert start == end_before < stop
                end_before = stop
            assert end_before == total


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_channels_last(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "RUN_ENTRIES", 100)  # some channels of a position at a time
    check_channels_last(case.conv(), case.input_size)


@settings(max_examples=40)
@given(layer=layers_with_sizes())
def test_random_layers_channels_last(layer: tuple[Conv, Size]) -> None:
    check_channels_last(*layer)


@pytest.mark.parametrize("form", [{}, {"affine": True}, {"affine": True, "transpose": True}, {"order": "HWC"}])
@pytest.mark.parametrize("case", CASES[::3], ids=IDS[::3])
def test_columns_are_those_of_the_dense_matrix(case: Case, form: dict[str, Any]) -> None:
    matrix = toeplitz(case.conv(), case.input_size, **form)
    (rows, count), dense = matrix.shape, matrix.to_dense()
    for start, stop in {(0, count), (count // 3, count // 3 + 1), (count // 2, count)}:
        part = matrix.columns(start, stop)
        assert torch.equal(part.to_dense(), dense[:, start:stop])
        assert part.nnz == part.entries(0, rows) == len(part.indices(0, rows))
        some = rows // 3, rows // 3 + 1 + rows // 2
        assert torch.equal(matrix.columns(start, stop, some).dense_rows(*some), dense[slice(*some), start:stop])
    for wrong in ((0, 0), (-1, 1), (0, count + 1), (0.0, 1)):
        with pytest.raises(UsageError, match=f"expected A:B with 0 <= A < B <= {count}"):
            matrix.columns(*wrong)


# --- values and types


def test_merged_taps_are_summed_in_float64_and_rounded_once() -> None:
    # Three taps of one column: in float32, one after the other, the small ones would be lost.
    small = 2.0**-24
    kernel = torch.tensor([[[1.0, small, small]]], dtype=torch.float32)
    conv = Conv(kernel, None, Geometry.of(3, padding=[(2, 0)], padding_mode="replicate"))
    found = toeplitz(conv, (1,)).to_dense()
    assert found.dtype == torch.float32
    assert found.item() == 1.0 + 2.0**-23
    assert (kernel[0, 0, 0] + kernel[0, 0, 1] + kernel[0, 0, 2]).item() == 1.0


@pytest.mark.parametrize("name", ["2d-reflect-grouped", "1d-circular-shared-column", "3d-replicate", "2d-everything"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("made", [torch.float16, torch.bfloat16, torch.float32, torch.float64, None])
def test_dtypes(name: str, stored: torch.dtype, made: torch.dtype | None) -> None:
    case = next(case for case in CASES if case.name == name)
    shape = case.conv().weight.shape
    conv = Conv(real_numbers(0, *shape), real_numbers(1, shape[0]), case.geometry).to(stored)
    matrix = toeplitz(conv, case.input_size, dtype=made, affine=True)
    expected = torch.from_numpy(dense_toeplitz(conv.to(torch.float64), case.input_size))
    target = made or stored
    dense = matrix.to_dense()
    assert dense.dtype == matrix.dtype == target
    assert matrix.bias is not None
    assert matrix.bias.dtype == target
    assert torch.equal(matrix.bias, dense[:, -1])
    assert conv.bias is not None
    assert torch.equal(matrix.bias[:: math.prod(matrix.output_size)], conv.bias.to(target))
    # Rounding float64 sums once; a sum along several axes may come out in another order, an ulp of float64 apart.
    tolerance = 2.0**-50 if target == torch.float64 else torch.finfo(target).eps / 2
    assert ((dense[:, :-1].double() - expected).abs() <= tolerance * (1 + 2.0**-20) * expected.abs()).all()
    turned = toeplitz(conv, case.input_size, dtype=made, affine=True, transpose=True).to_dense()
    assert torch.equal(turned, dense.T)


def test_whole_tables_of_complex_numbers() -> None:
    case = next(case for case in CASES if case.name == "2d-reflect")
    weight = torch.complex(case.conv(1).weight, case.conv(2).weight)
    dense = toeplitz(Conv(weight, None, case.geometry), case.input_size).to_dense()
    assert torch.equal(dense.real, toeplitz(case.conv(1), case.input_size).to_dense())
    assert torch.equal(dense.imag, toeplitz(case.conv(2), case.input_size).to_dense())


def test_an_entry_is_stored_also_where_the_weight_is_zero() -> None:
    conv = Conv(torch.tensor([[[0.0, 2.0]]]), None, Geometry.of(2))
    matrix = toeplitz(conv, (3,))
    assert matrix.nnz == 4
    assert matrix.rows(0, 2).values.tolist() == [0.0, 2.0, 0.0, 2.0]


def test_a_layer_without_bias() -> None:
    conv = make_conv(Geometry.of(2), 1, 2, bias=False)
    assert toeplitz(conv, (3,)).bias is None
    affine = toeplitz(conv, (3,), affine=True)
    assert affine.to_dense()[:, -1].tolist() == [0.0] * 4
    assert affine.nnz == 8 + 4


def test_the_bias_is_repeated_over_each_channels_outputs() -> None:
    conv = make_conv(Geometry.of((2, 1)), 1, 2)
    assert conv.bias is not None
    first, second = conv.bias.tolist()
    bias = toeplitz(conv, (3, 2)).bias
    assert bias is not None
    assert bias.tolist() == [first] * 4 + [second] * 4


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", ["1d-pad-after", "2d-everything", "2d-transposed-groups", "4d-reflect", "linear"])
def test_a_bias_map_is_the_bias(name: str, form: Form) -> None:
    case = next(case for case in CASES if case.name == name)
    plain = case.conv()
    bias = whole_numbers(5, plain.out_channels, *plain.output_size(case.input_size))
    conv = Conv(plain.weight, bias, case.geometry)
    matrix = toeplitz(conv, case.input_size, **form)
    assert matrix.bias is not None
    assert torch.equal(matrix.bias, bias.flatten())
    dense = torch.from_numpy(dense_toeplitz(Conv(plain.weight, None, case.geometry), case.input_size))
    if form["affine"]:
        dense = torch.cat([dense, bias.reshape(-1, 1)], 1)
    dense = dense.T if form["transpose"] else dense
    assert torch.equal(matrix.to_dense(), dense)
    # What is said to be equal is: with a map, the rows of two positions are not.
    made: dict[Any, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, 4, 10, templates=6)
        pieces = toeplitz(conv, case.input_size, **form)
        for stretch in pieces.stretches(0, pieces.shape[0]):
            values = pieces.values(stretch.start, stretch.stop)
            if stretch.same_values is not None:
                assert torch.equal(made.setdefault(stretch.same_values, values), values)
        assert torch.equal(pieces.to_dense(), dense)


# --- numbers that need 64 bits


def test_index_dtype() -> None:
    assert index_dtype(0) == index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64


def test_rows_of_a_matrix_that_would_not_fit_into_memory() -> None:
    conv = make_conv(Geometry.of((3, 2), padding=[(1, 1), (0, 1)]), 64, 48)
    size = (500, 600)
    matrix = toeplitz(conv, size)
    assert matrix.nnz == 48 * 64 * (3 * 500 - 2) * (2 * 600 - 1) > 2**31
    assert matrix.index_dtype == torch.int64
    assert matrix.entries(0, matrix.shape[0]) == matrix.nnz
    # The last row: the bottom right corner, where two rows of the kernel and one column of it still read.
    last = matrix.shape[0] - 1
    block = matrix.rows(last, last + 1)
    assert block.indices.dtype == torch.int64
    columns = [(channel * 500 + row) * 600 + 599 for channel in range(64) for row in (498, 499)]
    assert block.indices.tolist() == columns
    assert torch.equal(block.values, conv.weight[47, :, :2, 0].flatten())
    # An inner one, far beyond what 32 bits count
    channel, row, column = 40, 321, 123
    inner = (channel * 500 + row) * 600 + column
    assert matrix.entries(0, inner) > 2**31
    block = matrix.rows(inner, inner + 1)
    places = itertools.product(range(64), range(row - 1, row + 2), range(column, column + 2))
    assert block.indices.tolist() == [(c * 500 + r) * 600 + w for c, r, w in places]
    assert torch.equal(block.values, conv.weight[channel].flatten())


def test_few_entries_in_very_many_columns() -> None:
    # 2**31 columns and hardly an entry: the columns alone ask for 64 bits.
    conv = make_conv(Geometry.of(1, stride=2**30), 1, 1)
    matrix = toeplitz(conv, (2**31 - 1,))
    assert matrix.index_dtype == torch.int32
    assert matrix.rows(0, 2).indices.tolist() == [0, 2**30]
    wide = toeplitz(make_conv(Geometry.of(1, stride=2**30), 2, 1), (2**31 - 1,))
    assert wide.index_dtype == torch.int64
    assert wide.rows(0, 2).indices.tolist() == [0, 2**31 - 1, 2**30, 2**31 - 1 + 2**30]


# --- the outside


def test_it_is_the_public_function() -> None:
    conv = make_conv(Geometry.of((2, 3)), 2, 3)
    matrix = convtool.toeplitz(conv, [4, 5])
    assert isinstance(matrix, convtool.ToeplitzMatrix)
    assert matrix.input_size == (4, 5)
    assert matrix.output_size == (3, 3)
    assert matrix.shape == (27, 40)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 28), (28, 28)])
def test_rows_that_are_none(start: int, stop: int) -> None:
    matrix = toeplitz(make_conv(Geometry.of((2, 3)), 2, 3), (4, 5))
    for ask in (matrix.rows, matrix.dense_rows, matrix.row_counts, matrix.indices, matrix.values, matrix.entries):
        with pytest.raises(UsageError, match=f"rows: expected 0 <= A <= B <= 27, got {start}:{stop}"):
            ask(start, stop)
    with pytest.raises(UsageError, match="rows: expected"):
        list(matrix.stretches(start, stop))


def test_sizes_that_do_not_run() -> None:
    with pytest.raises(UsageError, match="smaller than the kernel"):
        toeplitz(make_conv(Geometry.of((2, 3)), 2, 3), (1, 5))
    with pytest.raises(UsageError, match="expected an input size of 2 values, one per spatial axis, got 3,4,5"):
        toeplitz(make_conv(Geometry.of((2, 3)), 3, 3), (3, 4, 5))
