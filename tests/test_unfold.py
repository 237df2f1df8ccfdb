"""The im2col form: what each tap reads, against torch where it has it and against the definition elsewhere."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, IDS, Case, make_inputs, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NOTHING, axis_taps
from oracles import toeplitz as dense_toeplitz
from strategies import layers_with_sizes
from torch import Tensor

import convtool
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.unfold import GatherMatrix, kernel_matrix, unfold
from convtool.errors import UsageError


def by_hand(x: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, *output, *kernel), read position by position."""
    tables = [axis_taps(axis, size) for axis, size in zip(geometry.axes, x.shape[2:], strict=True)]
    out = x.new_zeros(*x.shape[:2], *(len(table) for table in tables), *geometry.kernel_size)
    for place in itertools.product(*(range(len(table)) for table in tables)):
        for tap in itertools.product(*(range(kernel) for kernel in geometry.kernel_size)):
            source = [table[o][t] for table, o, t in zip(tables, place, tap, strict=True)]
            if NOTHING not in source:
                target: Any = (..., *place, *tap)
                read: Any = (..., *source)
                out[target] = x[read]
    return out


def check(conv: Conv, size: tuple[int, ...]) -> None:
    geometry, x = conv.geometry, make_inputs(conv, size)
    axes, groups = len(size), geometry.groups
    expected = by_hand(x, geometry)
    columns = unfold(x, geometry)
    assert columns.shape == (2, conv.in_channels * math.prod(geometry.kernel_size), math.prod(conv.output_size(size)))
    order = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    assert torch.equal(columns, expected.permute(order).reshape(columns.shape))
    # One matrix product per group is the convolution.
    weight = conv.weight.reshape(groups, conv.out_channels // groups, -1)
    product = weight @ columns.reshape(2, groups, -1, columns.shape[-1])
    found = product.reshape(2, conv.out_channels, *conv.output_size(size))
    assert torch.equal(found, forward(Conv(conv.weight, None, geometry), x))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_unfold_over_the_table(case: Case) -> None:
    check(case.conv(), case.input_size)


@settings(max_examples=300)
@given(layer=layers_with_sizes())
def test_unfold_of_random_layers(layer: tuple[Conv, tuple[int, ...]]) -> None:
    check(*layer)


@settings(max_examples=200)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_unfold_is_what_torch_calls_unfold(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    x = whole_numbers(0, 2, 3, 6, 5)
    geometry = Geometry.of(kernel, stride=stride, padding=padding, dilation=dilation)
    expected = F.unfold(x, kernel, dilation, padding, stride)
    assert torch.equal(unfold(x, geometry), expected)


def check_matrices(conv: Conv, size: tuple[int, ...]) -> None:
    """T = (W x I) @ U, U the unfolding as a matrix; and U whole and in parts."""
    gather = GatherMatrix(conv.geometry, conv.in_channels, size, torch.float64)
    basis = torch.eye(gather.shape[1], dtype=torch.float64).reshape(-1, conv.in_channels, *size)
    dense = unfold(basis, conv.geometry).flatten(1).T  # (C_in * kernel * outputs, inputs)
    assert torch.equal(gather.dense_rows(0, gather.shape[0]), dense)
    assert gather.nnz == int(dense.sum())
    weight, identity = kernel_matrix(conv), torch.eye(math.prod(gather.output_size), dtype=torch.float64)
    assert weight.shape == (conv.out_channels, conv.in_channels * math.prod(conv.geometry.kernel_size))
    expected = torch.from_numpy(dense_toeplitz(conv, size))
    assert torch.equal(torch.kron(weight.contiguous(), identity) @ dense, expected)
    rows, half = gather.shape[0], gather.shape[0] // 2
    for start, stop in ((0, 0), (0, 1), (half, half + 1), (min(1, half), rows), (0, half), (rows, rows)):
        assert torch.equal(gather.dense_rows(start, stop), dense[start:stop])
        assert gather.entries(start, stop) == len(gather.indices(start, stop)) == int(dense[start:stop].sum())
    end, made = half, dict[Any, Tensor]()
    for stretch in gather.stretches(half, rows):
        assert stretch.start == end < stretch.stop
        end = stretch.stop
        indices = gather.indices(stretch.start, stretch.stop)
        assert torch.equal(made.setdefault(stretch.same_indices, indices), indices)
    assert end == rows


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_matrix_is_the_kernel_times_the_gather_matrix(case: Case) -> None:
    check_matrices(case.conv(), case.input_size)


@settings(max_examples=150)
@given(layer=layers_with_sizes())
def test_the_gather_matrix_of_random_layers(layer: tuple[Conv, tuple[int, ...]]) -> None:
    check_matrices(*layer)


def test_a_gather_matrix_that_would_not_fit_into_memory() -> None:
    gather = GatherMatrix(Geometry.of((3, 3), padding=1), 512, (1000, 1000))
    assert gather.shape == (512 * 9 * 10**6, 512 * 10**6)
    assert gather.nnz == 512 * (3 * 1000 - 2) ** 2
    assert gather.index_dtype == torch.int64
    inside = (511 * 9 + 4) * 10**6 + 123456  # the middle tap reads where it stands
    assert gather.indices(inside, inside + 1).tolist() == [511 * 10**6 + 123456]
    with pytest.raises(UsageError, match="rows: expected 0 <= A <= B"):
        gather.rows(3, 2)


def test_unfold_keeps_the_dtype_and_nothing_of_the_padding() -> None:
    geometry = Geometry.of(2, padding=[(1, 0)])
    x = torch.tensor([[[float("nan"), 1.0]]], dtype=torch.float32)
    found = convtool.unfold(x, geometry)
    assert found.dtype == torch.float32
    # A padded tap is a zero, not 0 times what happens to be in the input.
    assert found[0, 0].tolist()[0] == 0.0
    whole = unfold(torch.tensor([[[3, 4]]]), geometry)
    assert whole.tolist() == [[[0, 3], [3, 4]]]


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"expected an input of shape \(N, C, 2 spatial sizes\), got \(1, 5, 5\)"):
        unfold(torch.zeros(1, 5, 5), Geometry.of((3, 2)))
    with pytest.raises(UsageError, match="smaller than the kernel"):
        unfold(torch.zeros(1, 1, 2, 5), Geometry.of((3, 2)))
