"""The questions that convtool was made to answer, each a test that names its case, with the sizes it was asked for.

Torch alone stands on the other side: its convolutions, `F.unfold` and `F.fold`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import real_numbers, whole_numbers
from safetensors.torch import save_file
from torch import Tensor

import convtool
from convtool.cli.app import run_app
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry

SQUARED_ERROR = 1e-27  # summed over all outputs: what the matrix may differ from torch by in float64


def squared_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).square().sum())


# --- a convolution as one matrix


def test_a_3x3_input_and_a_2x2_kernel_as_one_vector_matrix_product() -> None:
    """The question that started it: x @ B, one channel, no padding; B is what --transpose writes."""
    kernel = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    x = torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 10.0], [11.0, 12.0, 13.0]], dtype=torch.float64)
    matrix = convtool.toeplitz(convtool.conv(kernel[None, None]), (3, 3), transpose=True)
    assert matrix.shape == (9, 4)
    by_hand = torch.zeros(9, 4, dtype=torch.float64)
    for i, j, a, b in np.ndindex(2, 2, 2, 2):  # output (i, j) reads input (i + a, j + b) with weight (a, b)
        by_hand[3 * (i + a) + j + b, 2 * i + j] = kernel[a, b]
    assert torch.equal(matrix.to_dense(), by_hand)
    assert torch.equal(x.reshape(1, 9) @ matrix.to_dense(), F.conv2d(x[None, None], kernel[None, None]).reshape(1, 4))


def test_the_same_vector_matrix_product_from_the_command_line(tmp_path: Path) -> None:
    kernel = whole_numbers(1, 1, 1, 2, 2).float()
    save_file({"conv.weight": kernel}, tmp_path / "net.safetensors")
    out = tmp_path / "b.npy"
    assert (
        run_app(["toeplitz", f"{tmp_path}/net.safetensors", "conv", "--input-size=3,3", "--transpose", f"-o{out}"]) == 0
    )
    x = whole_numbers(2, 1, 1, 3, 3).float()
    np.testing.assert_array_equal(x.reshape(1, 9).numpy() @ np.load(out), F.conv2d(x, kernel).reshape(1, 4).numpy())


@pytest.fixture
def kernel() -> Tensor:
    """4x3x3x3"""
    return real_numbers(3, 4, 3, 3, 3)


@pytest.fixture
def x() -> Tensor:
    """3x7x9, with a batch in front"""
    return real_numbers(4, 1, 3, 7, 9)


def test_a_4x3x3x3_kernel_on_a_3x7x9_input_as_one_matrix_for_all_channels(kernel: Tensor, x: Tensor) -> None:
    matrix = convtool.toeplitz(convtool.conv(kernel), (7, 9)).to_dense()
    assert matrix.shape == (4 * 5 * 7, 3 * 7 * 9)
    assert squared_error((matrix @ x.reshape(-1)).reshape(1, 4, 5, 7), F.conv2d(x, kernel)) <= SQUARED_ERROR


def test_the_same_with_the_matrices_of_the_channels_summed_over_input_channels(kernel: Tensor, x: Tensor) -> None:
    """A matrix for each pair of output and input channel is a block of the one matrix, and a matrix of its own."""
    whole = convtool.toeplitz(convtool.conv(kernel), (7, 9)).to_dense().reshape(4, 35, 3, 63)
    outputs = []
    for o in range(4):
        blocks = [convtool.toeplitz(convtool.conv(kernel[o : o + 1, i : i + 1]), (7, 9)).to_dense() for i in range(3)]
        assert torch.equal(torch.stack(blocks, 1), whole[o])
        outputs.append(sum(blocks[i] @ x[0, i].reshape(-1) for i in range(3)))
    found = torch.stack(outputs).reshape(1, 4, 5, 7)  # type: ignore[arg-type]
    assert squared_error(found, F.conv2d(x, kernel)) <= SQUARED_ERROR


@pytest.mark.parametrize("padding", [1, (2, 0), (1, 3)])
def test_the_same_with_padding(kernel: Tensor, x: Tensor, padding: Any) -> None:
    expected = F.conv2d(x, kernel, padding=padding)
    matrix = convtool.toeplitz(convtool.conv(kernel, padding=padding), (7, 9)).to_dense()
    assert matrix.shape == (expected.numel(), x.numel())
    assert squared_error((matrix @ x.reshape(-1)).reshape(expected.shape), expected) <= SQUARED_ERROR


@pytest.mark.parametrize("padding", [0, 1, (1, 3)])
def test_the_same_as_unfold_and_matmul_and_fold_to_shape(kernel: Tensor, x: Tensor, padding: Any) -> None:
    expected = F.conv2d(x, kernel, padding=padding)
    columns = convtool.unfold(x, Geometry.of((3, 3), padding=padding))
    assert torch.equal(columns, F.unfold(x, 3, padding=padding))
    found = F.fold(kernel.reshape(4, 27) @ columns, expected.shape[2:], 1)
    assert squared_error(found, expected) <= SQUARED_ERROR


# --- im2col


def test_im2col_of_a_batch_of_25_3x32x32_for_16_kernels_of_3x3() -> None:
    x, kernel = real_numbers(5, 25, 3, 32, 32), real_numbers(6, 16, 3, 3, 3)
    columns = convtool.unfold(x, Geometry.of((3, 3)))
    assert columns.shape == (25, 27, 900)
    torch.testing.assert_close((kernel.reshape(16, 27) @ columns).reshape(25, 16, 30, 30), F.conv2d(x, kernel))


@pytest.mark.parametrize(("stride", "padding"), [(2, 1), ((1, 3), (2, 0)), ((3, 2), (0, 1))])
def test_im2col_with_stride_and_padding(stride: Any, padding: Any) -> None:
    x, kernel = real_numbers(5, 25, 3, 32, 32), real_numbers(6, 16, 3, 3, 3)
    columns = convtool.unfold(x, Geometry.of((3, 3), stride=stride, padding=padding))
    assert torch.equal(columns, F.unfold(x, 3, stride=stride, padding=padding))
    expected = F.conv2d(x, kernel, stride=stride, padding=padding)
    torch.testing.assert_close((kernel.reshape(16, 27) @ columns).reshape(expected.shape), expected)


def test_the_channels_last_arithmetic_gives_the_same_numbers() -> None:
    """(batch, HW, 9*C_in) x (9*C_in, C_out): the same table and kernel with their axes the other way round."""
    x, kernel = real_numbers(7, 25, 3, 32, 32), real_numbers(8, 16, 3, 3, 3)
    columns = convtool.unfold(x, Geometry.of((3, 3)))
    rows = columns.reshape(25, 3, 9, 900).permute(0, 3, 2, 1).reshape(25, 900, 27)  # taps first, channels last
    weight = kernel.permute(2, 3, 1, 0).reshape(27, 16)
    found = (rows @ weight).reshape(25, 30, 30, 16)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), F.conv2d(x, kernel))


def test_patch_splitting_with_kernel_and_stride_14_on_3x224x224_images() -> None:
    images = real_numbers(9, 25, 3, 224, 224).float()
    patches = convtool.unfold(images, Geometry.of((14, 14), stride=14))
    assert patches.shape == (25, 588, 256)
    cut = images.reshape(25, 3, 16, 14, 16, 14).permute(0, 1, 3, 5, 2, 4)  # plain reshape and transpose
    assert torch.equal(patches, cut.reshape(25, 588, 256))


# --- two convolutions into one


def pair(
    channels: tuple[int, int, int], kernels: tuple[Any, Any], biases: tuple[bool, bool], **fields: Any
) -> list[Conv]:
    """Two layers of random numbers; `fields` are (first's, second's)."""
    layers = []
    for number in range(2):
        own = {name: values[number] for name, values in fields.items()}
        weight = real_numbers(
            10 + number, channels[number + 1], channels[number] // own.get("groups", 1), *kernels[number]
        )
        bias = real_numbers(20 + number, channels[number + 1]) if biases[number] else None
        layers.append(convtool.conv(weight, bias, **own))
    return layers


def check_fusion(layers: list[Conv], size: tuple[int, int] = (15, 18)) -> Conv:
    """Fused, and against torch's two convolutions one after the other."""
    fused = convtool.fuse(layers)
    x = expected = real_numbers(30, 2, layers[0].in_channels, *size)
    for layer in layers:
        geometry = layer.geometry
        (top, bottom), (left, right) = geometry.padding
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        padded = F.pad(expected, (left, right, top, bottom), mode=mode)
        expected = F.conv2d(padded, layer.weight, layer.bias, geometry.stride, 0, geometry.dilation, geometry.groups)
    torch.testing.assert_close(convtool.forward(fused, x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    return fused


def test_1_to_1_channels_with_a_1x1_second() -> None:
    first, second = pair((1, 1, 1), ((3, 3), (1, 1)), (False, False))
    fused = check_fusion([first, second])
    assert torch.equal(fused.weight, first.weight * second.weight)


@pytest.mark.parametrize("channels", [(2, 3, 1), (2, 3, 5)])
@pytest.mark.parametrize("biases", [(False, False), (False, True), (True, False), (True, True)])
def test_3x3_then_3x5_with_a_bias_on_neither_the_second_the_first_and_both(
    channels: tuple[int, int, int], biases: tuple[bool, bool]
) -> None:
    fused = check_fusion(pair(channels, ((3, 3), (3, 5)), biases))
    assert fused.weight.shape == (channels[2], 2, 5, 7)
    assert (fused.bias is not None) == any(biases)


@pytest.mark.parametrize(
    "fields",
    [
        {"stride": (2, 1)},
        {"stride": (1, 2)},
        {"stride": ((1, 2), (3, 1))},
        {"padding": (2, 0)},
        {"padding": ([(1, 0), (0, 3)], 0)},
        {"dilation": (2, 1)},
        {"dilation": (1, 2)},
        {"dilation": ((1, 3), (2, 1))},
        {"groups": (2, 1)},
        {"groups": (1, 2)},
        {"groups": (2, 3)},
        {"groups": (4, 12)},
        {"stride": ((2, 1), (1, 2)), "padding": ((1, 2), 0), "dilation": ((1, 2), (2, 1)), "groups": (2, 4)},
        {"padding": ((1, 2), 0), "padding_mode": ("circular", "zeros")},
    ],
    ids=str,
)
def test_then_what_those_left_out_stride_padding_dilation_and_groups_on_either(fields: dict[str, Any]) -> None:
    layers = pair((4, 12, 24), ((3, 2), (2, 3)), (True, True), **fields)
    fused = check_fusion(layers)
    assert fused.geometry.groups == math.gcd(*(layer.geometry.groups for layer in layers))


def test_padding_on_the_second_where_the_first_gives_only_zeros_there() -> None:
    """'Full' padding of an unbiased first: beyond its border it reads nothing, and nothing is what the second pads."""
    layers = pair((2, 3, 5), ((3, 2), (3, 5)), (False, True), padding=([(2, 2), (1, 1)], (1, 2)))
    assert check_fusion(layers).geometry.padding == ((3, 3), (3, 3))
