"""Layers in another form: a matrix gives its kernel back, patches are a linear layer, and verify knows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, make_conv, make_inputs, real_numbers, whole_numbers
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from schemas import validate
from shell import cli
from strategies import layers_with_sizes
from torch import nn

from convtool.cli.app import run_app
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.recover import matrix_to_conv, patches_to_linear
from convtool.core.toeplitz import toeplitz
from convtool.errors import RefusedError, UsageError
from convtool.kinds.written import make_written

# --- a matrix gives its kernel again


def check(conv: Conv, size: tuple[int, ...]) -> None:
    matrix = toeplitz(conv, size)
    found, residual = matrix_to_conv(matrix.to_dense(), matrix.bias, conv.geometry, size)
    # Where padding always adds the same taps up, several kernels have one matrix; where it doesn't, there is one.
    again = toeplitz(found, size).to_dense()
    torch.testing.assert_close(again, matrix.to_dense(), rtol=0, atol=1e-12)
    assert residual.largest <= 1e-12
    if conv.geometry.padding_mode == "zeros":
        assert residual.largest == 0
        met = found.weight != 0
        assert torch.equal(found.weight, torch.where(met, conv.weight, 0))  # weights of the table are never 0
        assert residual.unmet == int((~met).sum())
    if conv.bias is None:
        assert found.bias is None
    else:
        assert found.bias is not None
        assert torch.equal(found.bias, conv.bias)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_matrix_gives_its_kernel_back(case: Case) -> None:
    check(case.conv(), case.input_size)


@settings(max_examples=200)
@given(layer=layers_with_sizes())
def test_random_matrices_give_their_kernels_back(layer: tuple[Conv, tuple[int, ...]]) -> None:
    check(*layer)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_complex_matrix_gives_its_kernel_back(mode: str) -> None:
    geometry = Geometry.of((3, 2), padding=(1, 1), padding_mode=mode)
    weight, bias = (torch.complex(real_numbers(1, *shape), real_numbers(2, *shape)) for shape in ((2, 3, 3, 2), (2,)))
    check(Conv(weight, bias, geometry), (4, 5))


def test_the_nearest_kernel_of_what_is_no_matrix_of_one() -> None:
    conv = make_conv(Geometry.of((2, 3), padding=(1, 0)), 2, 3)
    dense = toeplitz(conv, (4, 5)).to_dense()
    dense[7, 11] += 0.5
    dense[20, 3] -= 0.25
    found, residual = matrix_to_conv(dense, None, conv.geometry, (4, 5))
    # Least squares: no small change of any kernel entry comes nearer.
    best = (toeplitz(found, (4, 5)).to_dense() - dense).square().sum()
    for place in range(0, found.weight.numel(), 5):
        for step in (0.001, -0.001):
            weight = found.weight.clone()
            weight.view(-1)[place] += step
            moved = toeplitz(Conv(weight, None, conv.geometry), (4, 5)).to_dense()
            assert (moved - dense).square().sum() > best
    assert residual.where == (7, 11)
    assert 0.4 < residual.largest <= 0.5
    assert residual.relative == residual.largest / float(dense.abs().max())


def test_a_bias_that_differs_over_a_channel_becomes_a_map() -> None:
    conv = make_conv(Geometry.of(2), 1, 2)
    bias = whole_numbers(3, 2 * 4)
    found, _ = matrix_to_conv(toeplitz(conv, (5,)).to_dense(), bias, conv.geometry, (5,))
    assert found.has_bias_map
    assert found.bias is not None
    assert torch.equal(found.bias, bias.reshape(2, 4))


@pytest.mark.parametrize("shape", [(25, 40), (24, 41), (24,), (2, 24, 40), (0, 40)])
def test_shapes_that_no_matrix_has(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="isn't the matrix of a convolution"):
        matrix_to_conv(torch.ones(shape), None, Geometry.of((2, 2)), (4, 5))


# --- patches


@pytest.mark.parametrize(("kernel", "size"), [((2, 3), (6, 9)), ((2, 3, 2), (4, 3, 6)), ((4,), (12,))])
def test_a_patch_convolution_is_a_linear_layer_on_each_patch(kernel: tuple[int, ...], size: tuple[int, ...]) -> None:
    conv = make_conv(Geometry.of(kernel, stride=kernel), 3, 5)
    x = make_inputs(conv, size)
    for axis, step in enumerate(kernel):  # (N, C, *patches, *kernel) in the end
        x = x.unfold(2 + axis, step, step)
    axes = len(kernel)
    patches = x.movedim(1, 1 + axes).flatten(1 + axes)  # (N, *patches, C * kernel)
    found = nn.functional.linear(patches, patches_to_linear(conv), conv.bias)
    assert torch.equal(found.movedim(-1, 1), forward(conv, make_inputs(conv, size)))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (Geometry.of((2, 3), stride=(2, 2)), "kernel = stride, no padding"),
        (Geometry.of((2, 3), stride=(2, 3), padding=(0, 1)), "whose windows are no patches"),
        (Geometry.of((2, 3), stride=(2, 3), dilation=2), "whose windows are no patches"),
        (Geometry.of((2, 3), stride=(2, 3), groups=2), "groups 2: as a linear layer it would be mostly zeros"),
        (Geometry.of((2, 3), stride=(2, 3), transposed=True), "a plain one with kernel = stride"),
        (Geometry.of(()), "a plain one with kernel = stride"),
    ],
)
def test_what_is_no_patch_convolution(geometry: Geometry, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        patches_to_linear(make_conv(geometry, 4, 6))


def test_unflatten_is_torchs() -> None:
    x = whole_numbers(0, 2, 3 * 4 * 5, 1, 1)
    expected = nn.Unflatten(1, (3, 4, 5))(x.flatten(1))
    assert torch.equal(forward(make_written("unflatten(4,5)", 60, 2), x), expected)
    with pytest.raises(UsageError, match=r"unflatten\(4,5\): 61 numbers don't make channels of that size"):
        make_written("unflatten(4,5)", 61, 2)


# --- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A convolution with everything to it, a patch embedding, a linear layer."""
    path = tmp_path / "net.safetensors"
    save_file(
        {
            "conv.weight": real_numbers(0, 4, 2, 3, 2).float(),
            "conv.bias": real_numbers(1, 4).float(),
            "embed.weight": real_numbers(2, 5, 3, 2, 3).float(),
            "embed.bias": real_numbers(3, 5).float(),
            "head.weight": real_numbers(4, 6, 40).float(),
        },
        path,
    )
    return path


CONV = ["--set", "conv.padding=1,0", "--set", "conv.stride=1,2", "--set", "conv.groups=2", "--set", "conv.dilation=1"]
PLAIN = ["--set", "embed.padding=0", "--set", "embed.dilation=1", "--set", "embed.groups=1"]
EMBED = ["--set", "embed.stride=2,3", *PLAIN]


def convert(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = run_app(["convert", *arguments, "--json"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    validate(document)
    assert isinstance(document, dict)
    assert code == (0 if document["ok"] else document["error"]["exit_code"]), captured.err
    return document


def equivalent(capsys: pytest.CaptureFixture[str], before: Path, after: Path) -> bool:
    code = run_app(["verify", str(before), str(after), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0), document
    assert document["equivalent"] == (code == 0)
    return code == 0


def test_there_and_back_by_the_matrix(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "fc.safetensors", tmp_path / "back.safetensors"
    document = convert(capsys, str(checkpoint), str(there), "--as-toeplitz", "conv=4,5,7", *CONV)
    (change,) = document["reexpressed"]
    assert (change["module"], change["input_size"], change["residual"]) == ("nn.Linear(140, 60)", [4, 5, 7], None)
    before, made = load_file(checkpoint), load_file(there)
    conv = nn.Conv2d(4, 4, (3, 2), padding=(1, 0), stride=(1, 2), groups=2)
    conv.load_state_dict({"weight": before["conv.weight"], "bias": before["conv.bias"]})
    linear = nn.Linear(140, 60)
    linear.load_state_dict({"weight": made["conv.weight"], "bias": made["conv.bias"]})
    x = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x.flatten(1)), conv(x).flatten(1))
    assert all(torch.equal(before[name], made[name]) for name in before if not name.startswith("conv."))
    assert equivalent(capsys, checkpoint, there)
    document = convert(capsys, str(there), str(back), "--as-conv", "conv=4,5,7/3,2", *CONV)
    residual = document["reexpressed"][0]["residual"]
    assert (residual["largest"], residual["relative"], residual["unmet"]) == (0, 0, 0)
    assert document["reexpressed"][0]["module"] == "nn.Conv2d(4, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2)"
    again = load_file(back)
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert equivalent(capsys, there, back)
    assert equivalent(capsys, checkpoint, back)


def test_patches_there_and_back_by_the_record(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "linear.safetensors", tmp_path / "back.safetensors"
    convert(capsys, str(checkpoint), str(there), "--as-linear", "embed", *EMBED)
    before, made = load_file(checkpoint), load_file(there)
    assert torch.equal(made["embed.weight"], before["embed.weight"].flatten(1))
    assert equivalent(capsys, checkpoint, there)
    document = convert(capsys, str(there), str(back), "--as-conv", "embed")
    assert document["reexpressed"][0]["module"] == "nn.Conv2d(3, 5, (2, 3), stride=(2, 3))"
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(back).items())
    assert equivalent(capsys, there, back)
    assert equivalent(capsys, checkpoint, back)


# name: weight, input size, kernel, fields
FORMS: dict[str, tuple[tuple[int, ...], str, str, tuple[str, ...]]] = {
    "1-D": ((4, 3, 3), "3,9", "3", ("stride=2", "padding=2:1", "dilation=2")),
    "strided": ((4, 2, 3, 2), "2,7,8", "3,2", ("stride=2,3",)),
    "padded": ((3, 2, 2, 3), "2,4,5", "2,3", ("padding=1:0,2:1",)),
    "grouped": ((6, 2, 3, 2), "4,5,4", "3,2", ("groups=2", "padding=1")),
    "depthwise": ((8, 1, 3, 3), "4,6,5", "3,3", ("groups=4", "padding=1", "stride=2,1")),
    "dilated": ((2, 3, 2, 3), "3,6,7", "2,3", ("dilation=3,2", "padding=1,2")),
    "wrapped": ((2, 2, 4, 3), "2,6,5", "4,3", ("padding=2:1,0:2", "padding_mode=circular")),
    "3-D": ((2, 2, 2, 3, 2), "2,4,5,3", "2,3,2", ("padding=1,0,1", "stride=1,2,1")),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", FORMS)
def test_every_kind_of_layer_goes_there_and_back(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, size, kernel, fields = FORMS[name]
    tensors = {"layer.weight": real_numbers(0, *shape).float(), "layer.bias": real_numbers(1, shape[0]).float()}
    start, there, back = (tmp_path / f"{stem}{suffix}" for stem in ("start", "there", "back"))
    (save_file if suffix == ".safetensors" else torch.save)(tensors, start)
    said = {field.partition("=")[0] for field in fields}
    others = [
        field for field in ("stride=1", "padding=0", "dilation=1", "groups=1") if field.partition("=")[0] not in said
    ]
    options = [word for field in (*fields, *others) for word in ("--set", f"layer.{field}")]
    convert(capsys, str(start), str(there), "--as-toeplitz", f"layer={size}", *options)
    document = convert(capsys, str(there), str(back), "--as-conv", f"layer={size}/{kernel}", *options)
    assert document["reexpressed"][0]["residual"]["largest"] == 0
    found = load_file(back) if suffix == ".safetensors" else torch.load(back)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert equivalent(capsys, start, there)
    assert equivalent(capsys, there, back)
    assert equivalent(capsys, start, back)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_layer_of_one_output_channel_gets_its_bias_back(suffix: str, tmp_path: Path) -> None:
    first, matrix, again = (str(tmp_path / name) + suffix for name in ("first", "matrix", "again"))
    apart = real_numbers(2, 6)[::5][:1]  # one number, and a stride that isn't 1
    torch.save({"c.weight": real_numbers(1, 1, 2, 3, 2), "c.bias": apart}, tmp_path / "m.pt")
    assert run_app(["convert", str(tmp_path / "m.pt"), first]) == 0
    assert run_app(["convert", str(tmp_path / "m.pt"), matrix, "--as-toeplitz", "c=5,4", "--assume-defaults"]) == 0
    assert run_app(["convert", matrix, again, "--as-conv", "c=2,5,4/3,2", "--set", "c.stride=1"]) == 0
    assert run_app(["verify", first, again]) == 0
    assert run_app(["verify", str(tmp_path / "m.pt"), first]) == 0
    assert run_app(["unfold", first, "c", "-o", str(tmp_path / "w.npz")]) == 0
    assert run_app(["unfold", str(tmp_path / "m.pt"), "c", "-o", str(tmp_path / "v.npz")]) == 0


def test_a_matrix_is_fused_with_the_linear_layers_behind_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(checkpoint)
    tensors |= {"fc.weight": real_numbers(5, 7, 60).float(), "fc.bias": real_numbers(6, 7).float()}
    tensors |= {"last.weight": real_numbers(7, 3, 7).float()}
    save_file(tensors, checkpoint)
    there, fused, back = (tmp_path / f"{stem}.safetensors" for stem in ("fc", "fused", "back"))
    convert(capsys, str(checkpoint), str(there), "--as-toeplitz", "conv=4,5,7", *CONV)
    assert run_app(["fuse", str(there), "conv", "fc", "last", "-o", str(fused)]) == 0
    assert load_file(fused)["conv.weight"].shape == (3, 140)
    x = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    conv = nn.functional.conv2d(x, exact["conv.weight"], exact["conv.bias"], (1, 2), (1, 0), groups=2)
    expected = nn.functional.linear(conv.flatten(1), exact["fc.weight"], exact["fc.bias"]) @ exact["last.weight"].T
    made = load_file(fused)
    torch.testing.assert_close(
        x.flatten(1) @ made["conv.weight"].double().T + made["conv.bias"], expected, rtol=0, atol=1e-5
    )
    capsys.readouterr()
    convert(capsys, str(fused), str(back), "--as-conv", "conv=4,5,7")
    # Against the original: the flatten isn't in the checkpoint, so it is named.
    chain = ["--before", "conv,flatten(5,3),fc,last", "--input-size", "4,5,7"]
    fields = [word.replace("conv.", "before:conv.") for word in CONV]
    for after, layer in ((fused, ["flatten(5,7),conv"]), (back, ["conv", "--set", "after:conv.stride=5,7"])):
        command = ["verify", str(checkpoint), str(after), *chain, "--after", *layer, *fields, "--exhaustive"]
        assert run_app(command) == 0, capsys.readouterr()
        wrong = [word.replace("stride=1,2", "padding=0,0") for word in command]
        assert run_app(wrong) != 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 3, 4)])
def test_patches_of_any_rank_come_back_to_the_bit(
    kernel: tuple[int, ...], suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"embed.weight": real_numbers(0, 5, 3, *kernel).half(), "embed.bias": real_numbers(1, 5).half()}
    start, there, back = (tmp_path / f"{stem}{suffix}" for stem in ("start", "there", "back"))
    (save_file if suffix == ".safetensors" else torch.save)(tensors, start)
    convert(
        capsys,
        str(start),
        str(there),
        *("--as-linear", "embed", "--set", f"embed.stride={','.join(map(str, kernel))}", *PLAIN),
    )
    convert(capsys, str(there), str(back), "--as-conv", "embed")
    for file, shape in ((there, (5, -1)), (back, (5, 3, *kernel))):
        found = load_file(file) if suffix == ".safetensors" else torch.load(file)
        assert list(found) == list(tensors)
        assert torch.equal(found["embed.weight"], tensors["embed.weight"].reshape(shape))
        assert torch.equal(found["embed.bias"], tensors["embed.bias"])
        assert found["embed.weight"].dtype == torch.float16
    assert equivalent(capsys, start, there)
    assert equivalent(capsys, start, back)


def test_verify_sees_a_matrix_that_is_not_the_layers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "fc.safetensors"
    convert(capsys, str(checkpoint), str(there), "--as-toeplitz", "conv=5,7", *CONV)
    tensors = load_file(there)
    header = json.loads(there.read_bytes()[8 : 8 + int.from_bytes(there.read_bytes()[:8], "little")])
    for row, column in ((0, 0), (59, 139)):  # a number that belongs there, and one that ought to be zero
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["conv.weight"][row, column] += 1e-3
        save_file(changed, tmp_path / "wrong.safetensors", metadata=header["__metadata__"])
        assert not equivalent(capsys, checkpoint, tmp_path / "wrong.safetensors")


def test_a_weight_that_is_no_convolution_is_refused_with_the_residual(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    document = convert(capsys, str(checkpoint), str(out), "--as-conv", "head=2,4,5/3,4")
    assert document["error"]["exit_code"] == 2
    assert "head: a weight of shape (6, 40) isn't the matrix" in document["error"]["message"]
    document = convert(capsys, str(checkpoint), str(out), "--as-conv", "head=2,4,5/3,3", "--set", "head.padding=0")
    assert document["error"]["exit_code"] == 4
    assert (
        "head: its weight isn't the matrix of a convolution (kernel 3,3) on 2,4,5: the nearest"
        in document["error"]["message"]
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--as-linear", "conv", *CONV], 4, "conv: expected kernel = stride"),
        (["--as-linear", "head"], 2, "head: is a linear, not a convolution"),
        (["--as-toeplitz", "conv", *CONV], 2, "--as-toeplitz: expected LAYER=[C,]H,W, got 'conv'"),
        (["--as-toeplitz", "conv=1,1", *CONV], 2, "smaller than the kernel"),
        (["--as-toeplitz", "con=4,5"], 2, "did you mean conv?"),
        (["--as-conv", "head"], 2, "--as-conv head: expected LAYER=C,H,W/KH,KW"),
        (["--as-conv", "head=40"], 2, "--as-conv head=40: expected C,H,W/KH,KW"),
        (["--as-conv", "head=2,4,4"], 2, "head: takes 40 numbers, and an input of 2,4,4 has 32"),
        (["--as-conv", "embed=3,2,3"], 2, "embed: is a conv, not a linear layer"),
        (["--set", "conv.padding=1"], 2, "--set: is for layers that are re-expressed"),
        (
            ["--as-toeplitz", "conv=9999,9999", *CONV],
            4,
            "more than the memory free; `convtool toeplitz` writes it sparse",
        ),
    ],
)
def test_what_convert_refuses(
    arguments: list[str],
    code: int,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.safetensors"
    document = convert(capsys, str(checkpoint), str(out), *arguments)
    assert document["error"]["exit_code"] == code
    assert message in document["error"]["message"]
    assert not out.exists()


def test_a_matrix_of_which_only_one_side_is_fused_is_verified_in_the_form_that_it_has(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.safetensors"
    convert(capsys, str(checkpoint), str(there), "--as-toeplitz", "conv=4,5,7", *CONV)
    fused = tmp_path / "fused.safetensors"
    assert run_app(["fuse", str(there), "flatten(5,7)", "conv", "--name", "conv", "-o", str(fused)]) == 0
    assert run_app(["verify", str(checkpoint), str(fused)]) == 0, capsys.readouterr()
    start = fused.read_bytes()
    tensors, header = load_file(fused), json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
    tensors["conv.weight"].view(-1)[5] += 1e-2
    save_file(tensors, fused, metadata=header["__metadata__"])
    assert run_app(["verify", str(checkpoint), str(fused)]) == 1
    # Where no form goes over into the other the record can't be gone by, and that is said.
    flat = tmp_path / "flat.safetensors"
    assert run_app(["fuse", str(there), "conv", "scale(2)", "-o", str(flat)]) == 0
    assert run_app(["verify", str(checkpoint), str(flat)]) == 3
    assert "its record can't say how 'conv', which takes flat numbers" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_matrix_that_is_none_of_a_convolution_is_refused_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = toeplitz(Conv(torch.tensor([[[0.375, -0.5]]]), None, Geometry.of((2,), transposed=True)), (6,))
    weight = torch.from_numpy(matrix.to_scipy().toarray()).to(dtype)
    for off, code in ((0.0, 0), (0.5, 4)):
        changed = weight.clone()
        changed[0, 0] += off
        torch.save({"L.weight": changed}, tmp_path / "fc.pt")
        line = f"convert {tmp_path}/fc.pt {tmp_path}/c.pt --force --as-conv L=1,6/2 --set L.transposed=true"
        assert cli(line).code == code
