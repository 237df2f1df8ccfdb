"""The matrix as an operator: what `toeplitz` makes, by convolution."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from cases import CASES, IDS, Case, make_conv, whole_numbers
from hypothesis import given, settings
from oracles import toeplitz as dense_toeplitz
from strategies import layers_with_sizes

import convtool
from convtool.core.conv import Conv
from convtool.core.forward import operator
from convtool.core.geometry import Geometry
from convtool.errors import UsageError


def check(conv: Conv, size: tuple[int, ...]) -> None:
    dense = dense_toeplitz(conv, size)
    made = operator(conv, size)
    assert made.shape == dense.shape
    assert made.dtype == np.float64
    for count in (1, 3, 1):  # the number of vectors may change between calls
        x = whole_numbers(count, dense.shape[1], count).numpy()
        y = whole_numbers(count + 1, dense.shape[0], count).numpy()
        np.testing.assert_array_equal(made.matmat(x), dense @ x)
        np.testing.assert_array_equal(made.rmatmat(y), dense.T @ y)
        np.testing.assert_array_equal(made.matvec(x[:, 0]), dense @ x[:, 0])
        np.testing.assert_array_equal(made.rmatvec(y[:, 0]), dense.T @ y[:, 0])
    np.testing.assert_array_equal(made.matmat(x[:, :1]), dense @ x[:, :1])  # a column stays one
    np.testing.assert_array_equal(made.H @ y[:, 0], dense.T @ y[:, 0])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_it_is_the_matrix_over_the_table(case: Case) -> None:
    check(case.conv(), case.input_size)


@settings(max_examples=150)
@given(layer=layers_with_sizes())
def test_it_is_the_matrix_for_random_layers(layer: tuple[Conv, tuple[int, ...]]) -> None:
    check(*layer)


def test_the_adjoint_of_complex_weights_is_the_conjugate_transpose() -> None:
    plain = make_conv(Geometry.of((2, 3), padding=(0, 1)), 2, 3)
    conv = Conv(torch.complex(plain.weight, plain.weight.flip(0)), None, plain.geometry)
    dense = convtool.toeplitz(conv, (3, 4)).to_dense()
    y = torch.complex(whole_numbers(1, dense.shape[0], 2), whole_numbers(2, dense.shape[0], 2))
    made = operator(conv, (3, 4))
    np.testing.assert_allclose(made.rmatmat(y.numpy()), dense.conj().T @ y)
    x = torch.complex(whole_numbers(1, dense.shape[1], 2), whole_numbers(2, dense.shape[1], 2))
    np.testing.assert_allclose(made.matmat(x.numpy()), dense @ x)


def test_a_solver_uses_it() -> None:
    conv = make_conv(Geometry.of((3, 2), padding=(1, 1)), 2, 4)
    made = convtool.operator(conv, (5, 6))
    x = whole_numbers(3, made.shape[1]).numpy()
    found = scipy.sparse.linalg.lsmr(made, made @ x, atol=1e-13, btol=1e-13)[0]
    np.testing.assert_allclose(found, x, rtol=1e-7)


def test_it_computes_in_the_dtype_asked_for_and_leaves_inputs_alone() -> None:
    conv = make_conv(Geometry.of((2, 2)), 1, 1).to(torch.float16)
    assert operator(conv, (3, 4)).dtype == np.float64
    made = operator(conv, (3, 4), dtype=torch.float32)
    x = np.ones(12, dtype=np.float32)
    x.setflags(write=False)
    assert made.matvec(x).dtype == np.float32
    assert made.rmatvec(np.ones(6, dtype=np.float64)).shape == (12,)
    assert (x == 1).all()


def test_inputs_that_do_not_fit() -> None:
    conv = make_conv(Geometry.of((2, 3)), 2, 3)
    with pytest.raises(UsageError, match="smaller than the kernel"):
        operator(conv, (1, 5))
