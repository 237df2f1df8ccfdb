"""The public functions take what people have, and say in Python's words what is wrong with what they are given."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convtool
from convtool.core.conv import Conv
from convtool.core.expression import run
from convtool.core.tree import Chain
from convtool.errors import ConvtoolError, InputError, RefusedError, UsageError

CONV, NORM, NEXT = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 4, (1, 2), stride=2)
X = torch.randn(2, 2, 5, 4)

# Of each function arguments that it takes, modules wherever there are layers.
GOOD: dict[str, tuple[Any, ...]] = {
    "add": (CONV, CONV),
    "apply": (CONV, "missing.safetensors"),
    "compose": (CONV, NEXT),
    "conv": (CONV,),
    "forward": (CONV, X),
    "fuse": ([CONV, NORM],),
    "fuse_model": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 6, 5)),
    "geometry_of": (CONV,),
    "load_matrix": ("missing.npz",),
    "open_checkpoint": ("missing.pt",),
    "open_matrix": ("missing.npy",),
    "operator": (CONV, (4, 5)),
    "plan": (nn.Sequential(CONV, NORM), (2, 6, 5)),
    "spectrum": (CONV, (4, 5)),
    "stack": ([CONV, CONV],),
    "toeplitz": ([CONV, NORM, NEXT], (4, 5)),
    "unfold": (X, CONV),
    "verify": (nn.Sequential(CONV, NORM), [convtool.fuse([CONV, NORM])], (6, 5)),
}
WRONG: tuple[Any, ...] = (
    *(None, 5, "x", object(), 1.5, True, -1, 2**70, [], [None], {}, (1, 2, 3, 4, 5)),
    *(torch.ones(3), np.ones((2, 2)), torch.ones(2, 2, 3, 3, dtype=torch.int64), torch.ones(3, 2, 3, device="meta")),
    *(nn.ReLU(), nn.Sequential(CONV, nn.ReLU()), nn.Conv2d(2, 3, 3, device="meta"), nn.AvgPool2d(2)),
)
RUNS_ON = ("trials", "work", "steps", "exhaustive")  # a large number there is no mistake


def test_every_public_function_is_tried() -> None:
    assert sorted(GOOD) == [name for name in convtool.__all__ if inspect.isfunction(getattr(convtool, name))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GOOD)
def test_whatever_a_function_is_given_it_answers_or_says_what_is_wrong(name: str) -> None:
    """No AttributeError, TypeError or MemoryError: what isn't an answer is one of convtool's own errors."""
    function, good = getattr(convtool, name), GOOD[name]
    names = list(inspect.signature(function).parameters)
    tried: list[dict[str, Any]] = [{}, dict(zip(names, good, strict=False)) | {"strid": 2}]
    for wrong in WRONG[:: 4 if name in ("plan", "fuse_model") else 1]:  # these trace a model each time
        given = dict(zip(names, good, strict=False))
        tried += [given | {one: wrong} for one in names if one not in RUNS_ON]
    said = []
    for arguments in tried:
        try:
            function(**arguments)
        except ConvtoolError as error:
            said.append(str(error))
    assert len(said) > len(tried) / 3
    assert [message for message in said if "--" in message] == []
    with pytest.raises(UsageError):
        function(*good, *[None] * 20)


def test_modules_are_the_layers_that_they_are() -> None:
    NORM.running_mean, NORM.running_var = torch.rand(3), torch.rand(3) + 0.5
    with torch.no_grad():
        wanted = NEXT(NORM(CONV(X)))
    matrix = convtool.toeplitz(nn.Sequential(CONV, nn.Sequential(NORM, NEXT)), (2, 5, 4))
    assert matrix.dtype == torch.float32
    assert matrix.bias is not None
    assert torch.allclose((matrix @ X.flatten(1).T).T + matrix.bias, wanted.flatten(1), atol=1e-5)
    found = run(Chain((convtool.conv(CONV), convtool.conv(NORM).to(torch.float32))), X)
    assert torch.allclose(found, NORM(CONV(X)), atol=1e-5)  # float32, summed in another order
    assert convtool.fuse([CONV, NORM]).weight.dtype == torch.float32
    assert convtool.verify([CONV, NORM], [convtool.fuse([CONV, NORM])], 6).equivalent
    linear, flat = nn.Linear(24, 5), convtool.toeplitz([nn.Conv2d(2, 3, 2), "flatten(2,4)", nn.Linear(24, 5)], (3, 5))
    assert flat.shape == (5, 30)
    assert convtool.toeplitz(linear, ()).shape == (5, 24)
    assert convtool.conv(nn.ConvTranspose1d(2, 3, 2, stride=2)).geometry.transposed
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    assert torch.allclose(convtool.conv(normed).weight, normed.weight, atol=1e-6)
    assert convtool.spectrum(CONV, 4) == convtool.spectrum(convtool.conv(CONV), (4, 4))
    assert convtool.operator(CONV, 4).shape == (48, 32)
    assert convtool.unfold(X, CONV).shape == (2, 18, 20)
    assert convtool.conv(np.ones((2, 1, 3))).weight.dtype == torch.float64


class Doubled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return 2 * super().forward(input)


BARE: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
    (nn.AvgPool2d(3, 2, 1), (3, 8, 6)),
    (nn.AvgPool1d(3), (2, 9)),
    (nn.AvgPool2d(2, divisor_override=3), (2, 4, 6)),
    (nn.AdaptiveAvgPool2d((3, 2)), (2, 6, 4)),
    (nn.AdaptiveAvgPool2d((None, 2)), (2, 6, 4)),
    (nn.Identity(), (3, 4, 4)),
    (nn.Flatten(), (3, 4, 5)),
    (nn.PixelShuffle(2), (8, 3, 4)),
    (nn.PixelUnshuffle(2), (2, 4, 6)),
    (nn.ChannelShuffle(2), (4, 3, 3)),
    (nn.ZeroPad2d((1, 2, 0, 3)), (2, 4, 5)),  # of the last axis first
    (nn.Upsample(scale_factor=2), (2, 3, 4)),
    (nn.Sequential(CONV, nn.Identity(), NORM, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)), (2, 8, 4)),
    (nn.Sequential(NEXT, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), (3, 7, 8)),
)


@pytest.mark.parametrize(("module", "size"), BARE)
def test_modules_without_tensors_are_layers_as_well(module: nn.Module, size: tuple[int, ...]) -> None:
    matrix = convtool.toeplitz(module, size, dtype=torch.float64)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    bias = 0 if matrix.bias is None else matrix.bias
    with torch.no_grad():
        torch.testing.assert_close((matrix @ x.double().flatten() + bias).float(), module(x[None]).flatten())
    values = torch.linalg.svdvals(matrix.to_dense())
    assert convtool.spectrum(module, size).largest.value == pytest.approx(float(values[0]), rel=1e-9)


@pytest.mark.parametrize(
    ("module", "size", "message"),
    [
        (nn.AvgPool2d(2), (5, 5), "the number of channels isn't known here"),  # not of one axis, with channels
        (nn.AvgPool2d(2, ceil_mode=True), (3, 5, 5), "AvgPool2d: with ceil_mode"),
        (nn.AdaptiveAvgPool2d(3), (3, 5, 6), "makes a map of 3,3 of 5,6, which it doesn't divide"),
        (nn.Upsample(scale_factor=1.5), (3, 5, 5), "by whole factors"),
        (nn.Flatten(2), (3, 5, 5), "it flattens other axes"),
    ],
)
def test_what_modules_without_tensors_have_to_say(module: nn.Module, size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConvtoolError, match=message):
        convtool.toeplitz(module, size)
    with pytest.raises(UsageError, match=r"Flatten: how large a map it reads isn't known here; write it as 'flatten"):
        convtool.fuse([CONV, nn.Flatten()])


def test_modules_that_compute_something_else_are_refused() -> None:
    hooked = nn.Conv2d(2, 3, 3)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    for wrong in (Doubled(2, 3, 3), hooked):
        with pytest.raises(RefusedError, match="layer 1"):
            convtool.toeplitz(wrong, 8)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    with pytest.raises(ConvtoolError):
        convtool.toeplitz(spectral, 8)


def test_messages_are_in_pythons_words() -> None:
    pair = [nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)]
    with pytest.raises(RefusedError, match=r"or accept that: allow_border=True$"):
        convtool.fuse(pair)
    with pytest.raises(UsageError, match=r"give input_size=\.\.\."):
        convtool.fuse(pair, bias_map=True)
    with pytest.raises(UsageError, match="fuse: has no argument 'alow_border'; did you mean allow_border"):
        convtool.fuse(pair, alow_border=True)
    checkpoint = convtool.open_checkpoint("sample_models/chains.safetensors")
    with pytest.raises(UsageError, match="no field 'strid'; did you mean stride"):
        checkpoint.conv("widen", strid=2)
    assert repr(checkpoint) == "Checkpoint('sample_models/chains.safetensors', safetensors, 16 tensors)"


def test_matrices_are_used_like_matrices() -> None:
    matrix = convtool.toeplitz(CONV, (4, 5))
    assert repr(matrix) == "ToeplitzMatrix(60 x 40, 780 entries, float32)"
    dense = matrix.to_dense()
    assert torch.equal(matrix.T.to_dense(), dense.T)
    assert torch.equal(matrix.T.T.to_dense(), dense)
    assert torch.equal(matrix.to_sparse_coo().to_dense(), dense)
    assert matrix.to_sparse_coo().is_coalesced()
    x = torch.randn(40, 3, dtype=torch.float64)
    assert torch.allclose(matrix @ x, dense.double() @ x)
    assert (matrix @ x[:, 0].numpy()).shape == (60,)
    last = convtool.toeplitz(CONV, (4, 5), order="HWC")
    assert torch.equal(last.to_dense()[:3, :2], dense[::20, ::20])
    wrong: Any = 1.5
    for asked in ((lambda: matrix @ x[1:]), (lambda: matrix.rows(0, 99)), (lambda: matrix.rows(wrong, 2))):
        with pytest.raises(UsageError):
            asked()
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = matrix @ "x"
    with pytest.raises(UsageError, match="order: expected CHW or HWC"):
        convtool.toeplitz(CONV, 4, order="WHC")
    with pytest.raises(RefusedError, match="scipy has no sparse matrices of bfloat16; pass dtype"):
        convtool.toeplitz(nn.Conv2d(2, 3, 3).to(torch.bfloat16), 4).to_scipy()
    with pytest.raises(InputError, match="not enough memory"):
        convtool.toeplitz(nn.Conv2d(64, 64, 3), 900).to_dense()
    assert repr(convtool.conv(CONV)) == "Conv(2 -> 3 channels, kernel 3,3, padding 1, float32, bias)"


@pytest.mark.parametrize("channels", [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_channels_are_channels(channels: tuple[int, int], transposed: bool) -> None:
    outputs, inputs = channels
    layer = convtool.conv(torch.ones(*channels[:: -1 if transposed else 1], 3), transposed=transposed)
    assert isinstance(layer, Conv)
    (size,) = layer.geometry.output_size((5,))
    for transpose in (False, True):
        matrix = convtool.toeplitz(layer, 5, transpose=transpose)
        assert sorted(matrix.to_dense().shape) == sorted((outputs * size, inputs * 5))
        assert matrix.to_sparse_csr().shape == matrix.shape
    assert convtool.forward(layer, torch.ones(1, inputs, 5)).shape == (1, outputs, size)
    assert convtool.spectrum(layer, 5).largest.value == 0
    with pytest.raises(UsageError, match="without channels"):
        convtool.verify([layer], [layer], 5)
