"""Running a layer: torch's convolutions, where there are any, against the definition."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, Case, make_conv, make_inputs, real_numbers, whole_numbers
from hypothesis import given, settings
from oracles import convolve, run_layers
from strategies import chains, layers_with_sizes, sizes_that_run

from convtool.core.conv import Conv
from convtool.core.expression import run
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.tree import Chain
from convtool.errors import UsageError


def check(conv: Conv, size: tuple[int, ...]) -> None:
    x = make_inputs(conv, size)  # (2, C_in, *size)
    found = forward(conv, x)
    assert found.dtype == torch.float64
    expected = torch.from_numpy(convolve(conv, x.movedim(0, -1).numpy())).movedim(-1, 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_is_the_definition(case: Case) -> None:
    check(case.conv(), case.input_size)


@settings(max_examples=600)
@given(layer=layers_with_sizes())
def test_forward_of_random_layers(layer: tuple[Conv, tuple[int, ...]]) -> None:
    check(*layer)


@settings(max_examples=50)
@given(convs=chains(number=1))
def test_a_chain_is_one_layer_after_the_other(convs: list[Conv]) -> None:
    x = make_inputs(convs[0], sizes_that_run(convs, (3,)), batch=1)
    assert torch.equal(run(Chain(tuple(convs)), x)[0], torch.from_numpy(run_layers(convs, x[0].numpy())))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_it_is_linear(case: Case) -> None:
    conv = Conv(case.conv().weight, None, case.geometry)
    x, y = make_inputs(conv, case.input_size, seed=1), make_inputs(conv, case.input_size, seed=2)
    assert torch.equal(forward(conv, 3 * x - y), 3 * forward(conv, x) - forward(conv, y))


@pytest.mark.parametrize("name", ["1d-plain", "2d-everything", "2d-transposed-groups", "4d-plain", "linear"])
def test_it_computes_in_the_dtype_of_its_input(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    conv = case.conv()
    x = make_inputs(conv, case.input_size)
    for dtype in (torch.float32, torch.float64):
        found = forward(conv, x.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found.double(), forward(conv, x))  # whole numbers, exact in float32 too


@pytest.mark.parametrize("name", ["1d-plain", "2d-transposed-groups"])
def test_complex_layers(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    real, imaginary = case.conv(seed=1), case.conv(seed=2)
    conv = Conv(torch.complex(real.weight, imaginary.weight), None, case.geometry)
    x = make_inputs(conv, case.input_size)
    found = forward(conv, x.to(torch.complex128))
    for part, layer in ((found.real, real), (found.imag, imaginary)):
        assert torch.equal(part, forward(Conv(layer.weight, None, case.geometry), x))
    assert torch.equal(found, forward(conv, x))


@pytest.mark.parametrize("name", ["linear", "1d-plain", "2d-plain", "2d-transposed", "4d-plain"])
def test_a_batch_of_none(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    conv = case.conv()
    found = forward(conv, torch.zeros(0, conv.in_channels, *case.input_size))
    assert found.shape == (0, conv.out_channels, *conv.output_size(case.input_size))


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (1, 2, 5), (2, 5, 7), (1, 2, 5, 7, 1)])
def test_inputs_that_do_not_fit(shape: tuple[int, ...]) -> None:
    conv = make_conv(Geometry.of((3, 2)), 2, 1)
    with pytest.raises(UsageError, match=r"expected an input of shape \(N, 2, 2 spatial sizes\), got "):
        forward(conv, torch.zeros(shape))


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_an_input_that_is_too_small(axes: int, mode: str) -> None:
    conv = make_conv(Geometry.of((4,) * axes, padding_mode=mode, padding=[(1, 0)] * axes), 1, 1)
    with pytest.raises(UsageError, match="an input size of 2 with padding 1\\+0 is smaller than the kernel"):
        forward(conv, torch.zeros(1, 1, *(2,) * axes))


@pytest.mark.parametrize("name", ["1d-circular-full", "2d-stride", "2d-transposed", "4d-reflect", "linear"])
def test_a_bias_map_is_added_position_by_position(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    plain = case.conv()
    bias = whole_numbers(5, plain.out_channels, *plain.output_size(case.input_size))
    conv = Conv(plain.weight, bias, case.geometry)
    x = make_inputs(conv, case.input_size)
    assert torch.equal(forward(conv, x), forward(Conv(plain.weight, None, case.geometry), x) + bias)


def test_a_bias_map_fits_one_output_size_only() -> None:
    conv = Conv(real_numbers(0, 2, 1, 3), real_numbers(1, 2, 4), Geometry.of(3))
    assert conv.output_size((6,)) == (4,)
    with pytest.raises(UsageError, match="input size 7 gives outputs of 5, and the layer's bias map was made for 4"):
        forward(conv, torch.zeros(1, 1, 7))
