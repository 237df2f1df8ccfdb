"""The im2col form: what each tap reads, against torch where it has it and against the definition elsewhere."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
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
from convtool.core.unfold import gather_taps, unfold
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
    taps = gather_taps(x, geometry)
    assert torch.equal(taps, expected)
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


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_matrix_is_the_kernel_times_the_unfolding(case: Case) -> None:
    # T = (W x I) . U with U the unfolding as a matrix, group by group
    conv, geometry = case.conv(), case.geometry
    inputs, outputs = conv.in_channels * math.prod(case.input_size), math.prod(conv.output_size(case.input_size))
    basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, conv.in_channels, *case.input_size)
    gather = unfold(basis, geometry).flatten(1).T.numpy()  # (C_in * kernel * outputs, inputs)
    blocks = conv.weight.reshape(geometry.groups, conv.out_channels // geometry.groups, -1).numpy()
    weight = np.zeros((conv.out_channels, blocks.shape[2] * geometry.groups))
    for group, block in enumerate(blocks):
        rows, columns = block.shape
        weight[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns] = block
    matrix = np.kron(weight, np.eye(outputs)) @ gather
    np.testing.assert_array_equal(matrix, dense_toeplitz(conv, case.input_size))


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
