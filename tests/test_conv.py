"""`Conv` and how each kind of linear layer is lowered into it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, IDS, Case, make_inputs, real_numbers, whole_numbers
from hypothesis import given
from hypothesis import strategies as st
from layers import average_pool, identity, lower_batch_norm, lower_linear, make, scale
from oracles import Array, batch_norm
from torch import Tensor

import convtool
from convtool.core.compose import compose
from convtool.core.conv import Conv, lower_conv, pointwise
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.errors import InputError, RefusedError, UsageError
from convtool.kinds.written import make_written

# --- the value


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_channels_and_sizes(case: Case) -> None:
    conv = case.conv()
    assert (conv.in_channels, conv.out_channels) == case.channels
    assert conv.spatial_axes == len(case.input_size)
    assert conv.output_size(case.input_size) == case.geometry.output_size(case.input_size)
    assert conv.has_bias == case.bias


def test_a_zero_bias_is_none() -> None:
    weight = whole_numbers(0, 2, 3, 2)
    geometry = Geometry.of(2)
    assert not Conv(weight, None, geometry).has_bias
    assert not Conv(weight, torch.zeros(2, dtype=torch.float64), geometry).has_bias
    assert Conv(weight, torch.tensor([0.0, 1e-300], dtype=torch.float64), geometry).has_bias


def test_nan_in_a_bias_is_not_zero() -> None:
    assert Conv(whole_numbers(0, 1, 1, 2), torch.tensor([float("nan")]), Geometry.of(2)).has_bias


@pytest.mark.parametrize(
    ("weight", "bias", "geometry", "message"),
    [
        ((2, 3, 3), None, Geometry.of(2), r"expected a kernel of 2, got a weight of shape \(2, 3, 3\)"),
        ((2, 3, 3, 2), None, Geometry.of((2, 3)), r"expected a kernel of 2,3, got a weight of shape \(2, 3, 3, 2\)"),
        ((2, 3, 2), None, Geometry.of((2, 3)), "expected a kernel of 2,3"),
        ((3, 1, 2), None, Geometry.of(2, groups=2), "groups: expected a divisor of the 3 output channels, got 2"),
        ((2, 3, 2), (3,), Geometry.of(2), r"expected a bias of shape \(2,\), got \(3,\)"),
        ((2, 3, 2), (), Geometry.of(2), r"expected a bias of shape \(2,\), got \(\)"),
        ((2, 3, 2, 2), (2, 1), Geometry.of((2, 2)), r"expected a bias of shape \(2,\), got \(2, 1\)"),
    ],
)
def test_tensors_that_do_not_fit(
    weight: tuple[int, ...], bias: tuple[int, ...] | None, geometry: Geometry, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Conv(torch.zeros(weight), None if bias is None else torch.zeros(bias), geometry)


def test_to_rounds_and_exact_widens() -> None:
    conv = Conv(real_numbers(0, 2, 3, 2), real_numbers(1, 2), Geometry.of(2))
    half = conv.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert half.bias is not None
    assert half.bias.dtype == torch.bfloat16
    assert half.geometry == conv.geometry
    wide = half.exact()
    assert wide.weight.dtype == torch.float64
    assert torch.equal(wide.weight, half.weight.double())
    imaginary = Conv(torch.zeros(1, 1, 2, dtype=torch.complex64), None, Geometry.of(2)).exact()
    assert imaginary.weight.dtype == torch.complex128


# --- nn.Conv and nn.ConvTranspose

MODULES = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2}, (9,)),
        ({"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "groups": 4}, (7, 5)),
        ({"kernel_size": (3, 2), "padding": "same", "dilation": (1, 3)}, (7, 5)),
        ({"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "circular"}, (4, 5)),
        ({"kernel_size": (3, 2), "padding": (3, 1), "padding_mode": "reflect", "bias": False}, (4, 5)),
        ({"kernel_size": (2, 3, 1), "padding": (1, 0, 2), "padding_mode": "replicate", "stride": (1, 1, 2)}, (3, 4, 2)),
    ],
)
def test_lowering_an_nn_conv(fields: dict[str, Any], size: tuple[int, ...]) -> None:
    module: Any = MODULES[len(size) - 1](4, 8, **fields, dtype=torch.float64)
    known = {key: value for key, value in fields.items() if key not in ("kernel_size", "bias")}
    conv = convtool.conv(module.weight.detach(), None if module.bias is None else module.bias.detach(), **known)
    x = real_numbers(0, 2, 4, *size)
    torch.testing.assert_close(forward(conv, x), module(x).detach(), rtol=0, atol=1e-14)
    assert conv.torch_weight() is conv.weight


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "output_padding": 1}, (5,)),
        ({"kernel_size": 3, "dilation": 2, "output_padding": 1}, (4,)),
        ({"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1), "groups": 4}, (3, 4)),
        ({"kernel_size": (4, 2), "stride": 2, "padding": (3, 1), "groups": 2, "bias": False}, (5, 4)),
        ({"kernel_size": (2, 3, 1), "stride": (1, 2, 2), "output_padding": (0, 1, 1)}, (2, 3, 4)),
    ],
)
def test_lowering_an_nn_conv_transpose(fields: dict[str, Any], size: tuple[int, ...]) -> None:
    module: Any = TRANSPOSED[len(size) - 1](4, 12, **fields, dtype=torch.float64)
    known = {key: value for key, value in fields.items() if key not in ("kernel_size", "bias")}
    bias = None if module.bias is None else module.bias.detach()
    conv = convtool.conv(module.weight.detach(), bias, transposed=True, **known)
    assert (conv.in_channels, conv.out_channels) == (4, 12)
    x = real_numbers(0, 2, 4, *size)
    torch.testing.assert_close(forward(conv, x), module(x).detach(), rtol=0, atol=1e-14)
    assert torch.equal(conv.torch_weight(), module.weight)


@given(groups=st.integers(1, 3), inner=st.integers(1, 3), outer=st.integers(1, 3), seed=st.integers(0, 99))
def test_torch_weight_undoes_the_lowering(groups: int, inner: int, outer: int, seed: int) -> None:
    weight = whole_numbers(seed, groups * inner, outer, 2, 3)
    conv = lower_conv(weight, None, Geometry.of((2, 3), groups=groups, transposed=True))
    assert conv.weight.shape == (groups * outer, inner, 2, 3)
    assert torch.equal(conv.torch_weight(), weight)
    for group in range(groups):  # output channel a of a group, input channel b of it
        block = weight[group * inner : (group + 1) * inner]
        own = conv.weight[group * outer : (group + 1) * outer]
        assert torch.equal(own, block.transpose(0, 1))


def test_lowering_refuses_what_is_no_convolution() -> None:
    with pytest.raises(UsageError, match=r"at least 2 axes, got shape \(3,\)"):
        lower_conv(torch.zeros(3), None, Geometry.of(()))
    with pytest.raises(UsageError, match="groups: expected a divisor of the 3 input channels, got 2"):
        lower_conv(torch.zeros(3, 1, 2), None, Geometry.of(2, groups=2, transposed=True))


# --- linear layers


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_lowering_a_linear_layer(axes: int) -> None:
    weight, bias = real_numbers(0, 3, 5), real_numbers(1, 3)
    conv = lower_linear(weight, bias, axes)
    x = real_numbers(2, 2, 5, *(2, 3, 4)[:axes])
    expected = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)  # channels last for torch
    torch.testing.assert_close(forward(conv, x), expected, rtol=0, atol=1e-14)
    with pytest.raises(UsageError, match="linear layer's weight of 2 axes"):
        lower_linear(torch.zeros(2, 3, 1), None)


@pytest.mark.parametrize("size", [(4,), (3, 4), (2, 3, 4)])
def test_lowering_a_linear_layer_behind_a_flatten(size: tuple[int, ...]) -> None:
    x = real_numbers(2, 2, 5, *size)
    weight, bias = real_numbers(0, 3, x[0].numel()), real_numbers(1, 3)
    flatten = make_written(f"flatten({','.join(map(str, size))})", 5, len(size))
    conv = compose(flatten, lower_linear(weight, bias, len(size)))
    assert conv.in_channels == 5
    assert torch.equal(conv.weight.flatten(), weight.flatten())  # nothing is computed, only read another way
    expected = F.linear(x.flatten(1), weight, bias)
    torch.testing.assert_close(forward(conv, x).flatten(1), expected, rtol=0, atol=1e-13)


# --- batch norm


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("size", [(), (5,), (4, 3), (2, 3, 4)])
def test_lowering_a_batch_norm(affine: str, eps: float, size: tuple[int, ...]) -> None:
    mean, variance = real_numbers(0, 3), real_numbers(1, 3).abs() + 0.1
    weight = real_numbers(2, 3) if "weight" in affine else None
    bias = real_numbers(3, 3) if "bias" in affine else None
    conv = lower_batch_norm(mean, variance, weight, bias, eps, len(size))
    assert conv.geometry == pointwise(len(size), groups=3)
    x = real_numbers(4, 2, 3, *size)
    found = forward(conv, x)
    torch.testing.assert_close(found, F.batch_norm(x, mean, variance, weight, bias, eps=eps), rtol=1e-14, atol=1e-14)
    for item in range(2):
        expected = batch_norm(x[item].numpy(), mean.numpy(), variance.numpy(), _array(weight), _array(bias), eps)
        np.testing.assert_allclose(found[item].numpy(), expected, rtol=1e-14, atol=1e-14)


def _array(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_batch_norm_is_lowered_in_float64(dtype: torch.dtype) -> None:
    stored = [(real_numbers(seed, 3).abs() + 0.1).to(dtype) for seed in range(4)]
    conv = lower_batch_norm(stored[0], stored[1], stored[2], stored[3], eps=1e-5, axes=2)
    mean, variance, weight, bias = (tensor.double() for tensor in stored)
    gain = weight / torch.sqrt(variance + 1e-5)
    assert conv.weight.dtype == torch.float64
    assert torch.equal(conv.weight.flatten(), gain)
    assert conv.bias is not None
    torch.testing.assert_close(conv.bias, bias - mean * gain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("variance", [-1.0, -2e-5, float("nan"), float("-inf")])
def test_a_batch_norm_with_damaged_statistics(variance: float) -> None:
    spread = torch.tensor([1.0, variance])
    with pytest.raises(InputError, match=r"running_var \+ eps above 0"):
        lower_batch_norm(torch.zeros(2), spread, None, None, 1e-5, 2)


def test_a_batch_norm_of_no_variance_and_no_eps() -> None:
    with pytest.raises(InputError, match="damaged"):
        lower_batch_norm(torch.zeros(1), torch.zeros(1), None, None, 0.0, 2)
    assert lower_batch_norm(torch.zeros(1), torch.zeros(1), None, None, 4.0, 2).weight.item() == 0.5


# --- layers without tensors


@pytest.mark.parametrize("size", [(), (4,), (3, 4), (2, 3, 4), (2, 1, 2, 3)])
def test_identity_and_scale(size: tuple[int, ...]) -> None:
    x = whole_numbers(0, 2, 3, *size)
    assert torch.equal(forward(identity(3, len(size)), x), x)
    factors, offsets = whole_numbers(1, 3), whole_numbers(2, 3)
    shape = (3, *(1,) * len(size))
    expected = x * factors.reshape(shape)
    assert torch.equal(forward(scale(factors, len(size)), x), expected)
    assert torch.equal(forward(scale(factors, len(size), offsets), x), expected + offsets.reshape(shape))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((2, 3), None, 0), ((3, 2), (1, 2), (1, 0)), ((3, 3), 2, 1), ((1, 4), 1, 0)]
)
def test_average_pooling(kernel: tuple[int, int], stride: Any, padding: Any) -> None:
    x = real_numbers(0, 2, 3, 7, 8)
    conv = average_pool(3, 2, kernel, stride=stride, padding=padding)
    expected = F.avg_pool2d(x, kernel, stride, padding)
    torch.testing.assert_close(forward(conv, x), expected, rtol=0, atol=1e-14)


def test_average_pooling_along_one_and_three_axes() -> None:
    x = real_numbers(0, 2, 3, 7)
    torch.testing.assert_close(forward(average_pool(3, 1, 2), x), F.avg_pool1d(x, 2), rtol=0, atol=1e-14)
    x = real_numbers(0, 2, 3, 4, 5, 6)
    expected = F.avg_pool3d(x, (2, 1, 3), 1)
    torch.testing.assert_close(forward(average_pool(3, 3, (2, 1, 3), stride=1), x), expected, rtol=0, atol=1e-14)


def test_average_pooling_that_does_not_count_its_padding() -> None:
    with pytest.raises(RefusedError, match="count_include_pad=False"):
        average_pool(3, 2, 3, padding=1, count_include_pad=False)
    assert average_pool(3, 2, 3, count_include_pad=False).geometry.kernel_size == (3, 3)  # nothing is padded


@pytest.mark.parametrize(("factor", "size"), [(2, (3,)), ((2, 3), (3, 4)), ((1, 3, 2), (2, 3, 2))])
def test_nearest_upsampling(factor: Any, size: tuple[int, ...]) -> None:
    x = whole_numbers(0, 2, 3, *size)
    expected = F.interpolate(x, scale_factor=factor, mode="nearest")
    assert torch.equal(forward(make("upsample", 3, len(size), factor=factor), x), expected)


def test_zero_padding() -> None:
    x = whole_numbers(0, 2, 3, 4, 5)
    assert torch.equal(forward(make("pad", 3, 2, padding=[(1, 2), (3, 0)]), x), F.pad(x, (3, 0, 1, 2)))


# --- convtool.conv


def test_conv_takes_the_fields_of_torch() -> None:
    case = next(case for case in CASES if case.name == "2d-everything")
    made = case.conv()
    conv = convtool.conv(made.weight, made.bias, stride=(2, 1), padding=[(1, 2), (0, 3)], dilation=(1, 3), groups=2)
    assert conv.geometry == case.geometry
    x = make_inputs(conv, case.input_size)
    assert torch.equal(forward(conv, x), forward(made, x))
