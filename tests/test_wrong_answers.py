"""Wrong answers that other programs are known to give, each a test that convtool doesn't.

Torch, which runs the layers one after the other, says what is right; all layers, inputs and paddings are non-square.
The machinery behind each has tests of its own; these are the questions, asked from outside.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import real_numbers, whole_numbers
from layers import lower_batch_norm
from safetensors.torch import load_file, save_file
from shell import cli
from torch import Tensor, nn

import convtool
from convtool.cli.app import run_app
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.errors import RefusedError, UsageError


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of a few float64 additions."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and eval mode, with random numbers in everything that a checkpoint would hold."""
    module = module.double().eval()
    for number, (name, tensor) in enumerate(module.state_dict().items()):
        if tensor.is_floating_point():
            random = real_numbers(seed + number, *tensor.shape)
            tensor.copy_(random.square() + 0.3 if name.endswith("running_var") else random)
    return module


def lowered(module: Any) -> Conv:
    """A torch module as a `Conv`, from its tensors and attributes."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        tensors: Any = module.state_dict()
        gain, offset = tensors.get("weight"), tensors.get("bias")
        return lower_batch_norm(tensors["running_mean"], tensors["running_var"], gain, offset, module.eps, 2)
    transposed = isinstance(module, nn.ConvTranspose2d)
    fields = {"stride", "padding", "dilation", "groups", "padding_mode"} | ({"output_padding"} if transposed else set())
    bias = None if module.bias is None else module.bias.detach()
    given = {field: getattr(module, field) for field in fields}
    return convtool.conv(module.weight.detach(), bias, transposed=transposed, **given)


def check_fusion(modules: Sequence[nn.Module], size: tuple[int, int] = (11, 14)) -> Conv:
    """The fused layer gives what torch gives for the modules one after the other."""
    layers = [lowered(randomised(module, 50 * number)) for number, module in enumerate(modules)]
    fused = convtool.fuse(layers)
    x = real_numbers(99, 2, layers[0].in_channels, *size)
    with torch.no_grad():
        close(convtool.forward(fused, x), nn.Sequential(*modules)(x))
    return fused


def run(line: str) -> int:
    return run_app(shlex.split(line))


# --- second conv without a bias drops the first's; the grouped path drops it always


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 3), (2, 2), (2, 6), (6, 6)])
def test_the_first_bias_stays_where_the_second_has_none(groups: tuple[int, int]) -> None:
    first = nn.Conv2d(6, 12, (3, 2), groups=groups[0])
    fused = check_fusion([first, nn.Conv2d(12, 6, (2, 3), groups=groups[1], bias=False)])
    assert fused.has_bias


# --- stride on the first layer ignored in the kernel: right shape, wrong numbers; dilation or padding mode ignored


@pytest.mark.parametrize(
    "fields",
    [{"stride": 2}, {"stride": (1, 3)}, {"dilation": 2}, {"dilation": (3, 1)}, {"stride": (2, 1), "dilation": (1, 2)}],
    ids=str,
)
@pytest.mark.parametrize("position", [0, 1])
def test_stride_and_dilation_count_in_the_kernel(fields: dict[str, Any], position: int) -> None:
    own: list[dict[str, Any]] = [{}, {}]
    own[position] = fields
    check_fusion([nn.Conv2d(2, 3, (3, 2), **own[0]), nn.Conv2d(3, 4, (2, 3), **own[1])])


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_the_padding_mode_counts(mode: Any) -> None:
    first = nn.Conv2d(2, 3, (3, 2), padding=(2, 1), padding_mode=mode)
    fused = check_fusion([first, nn.Conv2d(3, 4, (2, 3))])
    assert fused.geometry.padding_mode == mode
    x = real_numbers(1, 1, 2, 5, 6)
    matrix = convtool.toeplitz(lowered(first), (5, 6)).to_dense()
    with torch.no_grad():
        expected = F.conv2d(F.pad(x, (1, 1, 2, 2), mode=mode), first.weight).reshape(-1)
    close(matrix @ x.reshape(-1), expected)


# --- padding of both layers just added; the rim silently wrong


def test_padding_on_both_is_refused_and_its_rim_is_named() -> None:
    layers = [lowered(randomised(nn.Conv2d(2, 2, (3, 5), padding=(1, 2)), seed)) for seed in (0, 1)]
    with pytest.raises(RefusedError, match="first row, the last row, the first 2 columns and the last 2 columns"):
        convtool.fuse(layers)
    fused = convtool.fuse(layers, allow_border=True)
    report = convtool.verify(layers, [fused], (7, 10))
    assert (report.equivalent, report.interior.equal, report.rim.equal) == (False, True, False)
    assert report.rim.positions == report.rim.differing == 7 * 10 - 5 * 6


# --- H and W swapped for non-square kernels, inputs, paddings


@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
def test_height_is_not_width(padding: tuple[int, int]) -> None:
    module = randomised(nn.Conv2d(2, 3, (4, 2), stride=(1, 2), padding=padding, dilation=(1, 3)))
    conv = lowered(module)
    x = real_numbers(1, 1, 2, 6, 9)
    with torch.no_grad():
        expected = module(x)
    assert conv.output_size((6, 9)) == expected.shape[2:]
    matrix = convtool.toeplitz(conv, (6, 9))
    assert matrix.bias is not None
    close(matrix.to_dense() @ x.reshape(-1) + matrix.bias, expected.reshape(-1))
    weight = conv.weight.reshape(3, -1)
    assert conv.bias is not None
    found = (weight @ convtool.unfold(x, conv.geometry)).reshape(expected.shape) + conv.bias.reshape(-1, 1, 1)
    close(found, expected)
    check_fusion([nn.Conv2d(2, 3, (4, 2), padding=padding), nn.Conv2d(3, 2, (1, 3))], (6, 9))


# --- batch norm eps fixed at 1e-5; affine=False batch norm crashes; a frozen count read as a weight


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_of_any_eps_with_and_without_affine(eps: float, affine: bool) -> None:
    check_fusion([nn.Conv2d(2, 3, (3, 2)), nn.BatchNorm2d(3, eps=eps, affine=affine)])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_in_a_file_its_eps_said_and_its_count_left_alone(
    suffix: str, affine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # One channel: then the count of batches has as many numbers as each of the statistics.
    model = randomised(nn.Sequential(nn.Conv2d(2, 1, (3, 2)), nn.BatchNorm2d(1, eps=1e-3, affine=affine)))
    state = model.state_dict()
    state["1.num_batches_tracked"].fill_(37)
    save(state, tmp_path / f"net.{suffix}")
    assert run(f"fuse net.{suffix} 0 1 -o fused.{suffix} --set 1.eps=1e-3") == 0
    fused = load(tmp_path / f"fused.{suffix}")
    assert fused.keys() == {"0.weight", "0.bias"}
    x = real_numbers(1, 2, 2, 5, 7)
    with torch.no_grad():
        close(F.conv2d(x, fused["0.weight"], fused["0.bias"]), model(x))
    assert run(f"verify net.{suffix} fused.{suffix}") == 0
    assert run(f"verify net.{suffix} fused.{suffix} --set 1.eps=1e-5") == 1


def save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)


def load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
        return loaded
    return load_file(path)


# --- transposed conv + batch norm folded along the wrong weight axis; wrong with groups


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels", [(4, 4), (4, 8), (8, 4)])  # square weights hide the wrong axis, others crash
def test_a_transposed_convolution_and_a_batch_norm(groups: int, channels: tuple[int, int]) -> None:
    first = nn.ConvTranspose2d(*channels, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=groups)
    fused = check_fusion([first, nn.BatchNorm2d(channels[1], eps=1e-3)], (5, 4))
    assert fused.torch_weight().shape == first.weight.shape


# --- one input channel taken for depthwise; depthwise multiplier 2; groups = 2


@pytest.mark.parametrize(
    ("channels", "groups"),
    [((1, 4), 1), ((4, 4), 4), ((4, 8), 4), ((4, 6), 2)],
    ids=["one input channel", "depthwise", "multiplier 2", "groups 2"],
)
def test_groups_are_neither_guessed_nor_mixed_up(channels: tuple[int, int], groups: int) -> None:
    module = randomised(nn.Conv2d(*channels, (3, 2), padding=(1, 0), groups=groups))
    x = real_numbers(1, 1, channels[0], 4, 5)
    matrix = convtool.toeplitz(lowered(module), (4, 5))
    assert matrix.bias is not None
    with torch.no_grad():
        expected = module(x).reshape(-1)
    close(matrix.to_dense() @ x.reshape(-1) + matrix.bias, expected)
    check_fusion([nn.Conv2d(*channels, (3, 2), groups=groups), nn.Conv2d(channels[1], 3, (1, 2))])
    check_fusion([nn.Conv2d(3, channels[0], (1, 2)), nn.Conv2d(*channels, (3, 2), groups=groups)])


def test_a_weight_of_one_input_channel_is_depthwise_only_behind_as_many_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(4, 1, 3, 2) is what both a layer of one input channel and a depthwise one look like; the neighbour tells."""
    monkeypatch.chdir(tmp_path)
    numbers = {"one.weight": (1, 3, 2, 3), "four.weight": (4, 3, 2, 3), "next.weight": (4, 1, 3, 2)}
    save_file({name: real_numbers(7, *shape) for name, shape in numbers.items()}, tmp_path / "net.safetensors")
    x = real_numbers(1, 1, 3, 6, 5)
    weights = load_file(tmp_path / "net.safetensors")
    for first, groups in (("one", 1), ("four", 4)):
        stated = f"--set {first}.stride=1 --set {first}.dilation=1 --set {first}.groups=1"
        stated += " --set next.padding=0 --set next.dilation=1"
        assert run(f"fuse net.safetensors {first} next -o {first}.safetensors {stated}") == 0
        fused = load_file(tmp_path / f"{first}.safetensors")[f"{first}.weight"]
        expected = F.conv2d(F.conv2d(x, weights[f"{first}.weight"]), weights["next.weight"], groups=groups)
        close(F.conv2d(x, fused), expected)


# --- a module used twice folded twice; layers paired by registration order


# What a fusion of a and the layer behind it depends on.
STATED = "--set a.stride=1 --set a.groups=1 --set *.dilation=1 --set *.padding=0"


def test_a_layer_is_not_fused_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    conv = real_numbers(1, 3, 3, 3, 2)
    torch.save({"a.weight": conv, "b.weight": conv, "c.weight": real_numbers(2, 3, 3, 2, 1)}, "net.pt")
    assert run("fuse net.pt a a -o out.pt") == 2
    assert (
        run(f"fuse net.pt a c -o out.pt {STATED}") == 4
    )  # a is b's tensor as well: changing one changes the other's meaning
    assert not Path("out.pt").exists()


def test_layers_are_paired_by_name_and_not_by_their_order_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convs, norms = [nn.Conv2d(2, 2, (3, 2)) for _ in range(2)], [nn.BatchNorm2d(2) for _ in range(2)]
    # Registered as norms before convolutions, and in the opposite order.
    model = randomised(nn.ModuleDict({"norm2": norms[1], "norm1": norms[0], "conv1": convs[0], "conv2": convs[1]}))
    torch.save(model.state_dict(), "net.pt")
    x = real_numbers(1, 1, 2, 6, 7)
    for number in (1, 2):
        assert run(f"fuse net.pt conv{number} norm{number} -o out.pt --force --eps 1e-5") == 0
        fused = load(tmp_path / "out.pt")
        with torch.no_grad():
            expected = norms[number - 1](convs[number - 1](x))
        found = F.conv2d(x, fused[f"conv{number}.weight"], fused[f"conv{number}.bias"])
        close(found, expected)


# --- transposed matrix as 'transpose of the associated conv': wrong size at stride 1, dilation 2, output_padding 1


@pytest.mark.parametrize(
    "fields",
    [
        {"dilation": 2, "output_padding": 1},
        {"stride": (2, 1), "dilation": (1, 3), "output_padding": (1, 2)},
        {"stride": (3, 2), "padding": (1, 0), "output_padding": (2, 1), "groups": 2},
    ],
    ids=str,
)
def test_the_matrix_of_a_transposed_convolution(fields: dict[str, Any]) -> None:
    module = randomised(nn.ConvTranspose2d(2, 4, (3, 2), **fields))
    x = real_numbers(1, 1, 2, 4, 5)
    with torch.no_grad():
        expected = module(x)
    matrix = convtool.toeplitz(lowered(module), (4, 5))
    assert matrix.shape == (expected.numel(), x.numel())
    assert matrix.bias is not None
    close(matrix.to_dense() @ x.reshape(-1) + matrix.bias, expected.reshape(-1))


# --- reflect and replicate: duplicate columns not summed


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_taps_that_share_a_column_are_summed(mode: str) -> None:
    conv = convtool.conv(whole_numbers(1, 2, 1, 3, 4), padding=[(2, 1), (2, 3)], padding_mode=mode)
    matrix = convtool.toeplitz(conv, (3, 4))
    pointer, columns = matrix.indptr(), matrix.rows(0, matrix.shape[0]).indices
    for start, stop in zip(pointer[:-1].tolist(), pointer[1:].tolist(), strict=True):
        assert bool((columns[start:stop].diff() > 0).all()), "columns of a row ascend, none twice"
    x = whole_numbers(2, 1, 1, 3, 4)
    expected = F.conv2d(F.pad(x, (2, 3, 2, 1), mode=mode), conv.weight)
    assert torch.equal(matrix.to_sparse_csr().to_dense() @ x.reshape(-1), expected.reshape(-1))


# --- strided or transposed views saved with wrong values; tied tensors refused or duplicated


def test_views_and_tied_tensors_come_through_a_fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, tied = real_numbers(3, 7, 5), real_numbers(4, 6)
    state = {
        # The layers to fuse are views as well: one with its channels last, one cut out of something larger.
        "a.weight": real_numbers(1, 3, 2, 3, 2).contiguous(memory_format=torch.channels_last),
        "b.weight": real_numbers(2, 8, 3, 4, 3)[::2, :, ::2, 1:],
        "transposed": base.T,
        "strided": base[1::2, ::3],
        "tied": tied,
        "tied_too": tied,
        "part_of_it": tied[2:5],
    }
    torch.save(state, "net.pt")
    assert run(f"fuse net.pt a b -o out.pt {STATED}") == 0
    found = load(tmp_path / "out.pt")
    for name in state.keys() - {"a.weight", "b.weight"}:
        assert torch.equal(found[name], state[name]), name
    assert found["tied"].data_ptr() == found["tied_too"].data_ptr() == found["part_of_it"].data_ptr() - 2 * 8
    x = real_numbers(5, 1, 2, 6, 7)
    expected = F.conv2d(F.conv2d(x, state["a.weight"]), state["b.weight"])
    close(F.conv2d(x, found["a.weight"]), expected)


# --- equality judged by a signed sum, or by `a.all() == b.all()`; a verifier that passes with zero checks


def layer_of(weight: Tensor, bias: Tensor | None = None, **fields: Any) -> list[Conv]:
    return [convtool.conv(weight, bias, **fields)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_errors_that_cancel_in_a_sum_are_differences(dtype: torch.dtype) -> None:
    weight = real_numbers(1, 3, 2, 3, 2).to(dtype)
    for first, second in (((0, 0, 0, 0), (0, 0, 2, 1)), ((0, 0, 1, 1), (0, 1, 1, 1)), ((1, 0, 0, 1), (2, 0, 0, 1))):
        other = weight.clone()
        other[first] += 0.125
        other[second] -= 0.125
        assert not convtool.verify(layer_of(weight), layer_of(other), (5, 6)).equivalent


def test_truth_values_that_agree_are_no_equality() -> None:
    one, other = real_numbers(1, 3, 2, 3, 2), real_numbers(2, 3, 2, 3, 2)
    assert one.all() == other.all()
    report = convtool.verify(layer_of(one), layer_of(other), (5, 6))
    assert not report.equivalent
    assert report.interior.differing == report.interior.positions == 3 * 5


def test_a_comparison_of_nothing_is_an_error() -> None:
    weight = real_numbers(1, 3, 2, 3, 2)
    with pytest.raises(UsageError, match="no comparison is no proof"):
        convtool.verify(layer_of(weight), layer_of(weight), (5, 6), trials=0)
    with pytest.raises(UsageError):  # an input too small for a single output
        convtool.verify(layer_of(weight), layer_of(weight), (2, 6))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["before", "after", "both"])
def test_nan_and_infinity_are_not_equivalent_to_anything(value: float, side: str) -> None:
    weight = real_numbers(1, 3, 2, 3, 2)
    bad = weight.clone()
    bad[1, 1, 2, 0] = value
    before, after = (bad if side in (which, "both") else weight for which in ("before", "after"))
    assert not convtool.verify(layer_of(before), layer_of(after), (5, 6)).equivalent


def test_not_a_guess_from_a_few_numbers() -> None:
    """A single wrong entry of a padded kernel that only one corner of the output reads."""
    weight = real_numbers(1, 1, 1, 4, 5)
    geometry = Geometry.of((4, 5), padding=[(3, 0), (4, 0)], stride=(5, 6))
    other = weight.clone()
    other[0, 0, 0, 0] = 0.0
    size = (4, 5)
    assert np.prod(geometry.output_size(size)) == 1  # the last tap alone reads the input here
    assert convtool.verify([Conv(weight, None, geometry)], [Conv(other, None, geometry)], size).equivalent
    assert not convtool.verify([Conv(weight, None, geometry)], [Conv(other, None, geometry)], (9, 11)).equivalent


# --- a batch norm with an activation inside, which its tensors don't tell


@pytest.mark.parametrize(("counter", "sign", "said"), [(False, -1, True), (True, -1, False), (False, 1, False)])
def test_a_batch_norm_that_may_have_an_activation_inside_is_remarked(
    tmp_path: Path, counter: bool, sign: int, said: bool
) -> None:
    numbers = {name: torch.ones(2) for name in ("weight", "bias", "running_mean", "running_var")}
    state = {"c.weight": torch.ones(2, 1, 3, 3), **{f"bn.{name}": tensor for name, tensor in numbers.items()}}
    state["bn.weight"] = torch.tensor([1.0, sign])
    if counter:
        state["bn.num_batches_tracked"] = torch.tensor(3)
    torch.save(state, tmp_path / "net.pt")
    result = cli(f"fuse {tmp_path / 'net.pt'} c bn --set bn.eps=0 -o {tmp_path / 'out.pt'}")
    assert result.code == 0  # frozen, with an eps of 0
    assert ("as a batch norm with an activation inside has; --model tells" in result.err) is said
