"""The matrix of a chain on the command line: written in every format, and verified."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from live import done, error, run
from torch import nn

import convtool
from convtool.core import extremes

SIZE = (3, 7, 6)
FIELDS = (
    "0.stride=2",
    "0.padding=1",
    "0.dilation=1",
    "0.groups=1",
    "1.eps=1e-3",
    "3.stride=1",
    "3.padding=0:1,1",
    "3.dilation=1",
)
STATED = tuple(word for field in FIELDS for word in ("--set", field))
CHAIN = ("0", "1", "avg_pool(2; stride=1)", "3")


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=1e-3)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    last = nn.Conv2d(4, 2, (2, 3))
    layers = (nn.Conv2d(3, 4, 3, stride=2, padding=1), norm, nn.AvgPool2d(2, 1), nn.ZeroPad2d((1, 1, 0, 1)), last)
    return nn.Sequential(*layers).double().eval()


@pytest.fixture
def net(tmp_path: Path, model: nn.Sequential) -> Path:
    state = {name.replace("4.", "3."): value.float() for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def written(net: Path, name: str, *options: str) -> Path:
    out = net.parent / name
    sizes = ("--input-size", ",".join(map(str, SIZE)))
    done("toeplitz", net, *CHAIN, *STATED, *sizes, *options, "-o", out)
    return out


@pytest.mark.parametrize("name", ["m.npz", "m.npy", "m.safetensors", "m.pt", "m.mtx"])
@pytest.mark.parametrize("options", [(), ("--affine", "--dtype", "float64"), ("--transpose", "--order", "HWC")])
def test_a_chains_matrix_in_every_format(net: Path, model: nn.Sequential, name: str, options: tuple[str, ...]) -> None:
    out = written(net, name, *options)
    matrix = convtool.open_matrix(out)
    x = torch.randn(4, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x) - (0 if "--affine" in options else model(torch.zeros_like(x)))
    if "--order" in options:
        x, wanted = x.movedim(1, -1), wanted.movedim(1, -1)
    flat = x.flatten(1)
    flat = torch.cat([flat, torch.ones(4, 1)], dim=1) if "--affine" in options else flat
    dense = matrix.dense_rows(0, matrix.shape[0]).double()
    made = flat @ (dense if "--transpose" in options else dense.T)
    torch.testing.assert_close(made, wanted.flatten(1), rtol=1e-5, atol=1e-5)
    if name != "m.npy":  # which has no room for a record
        report = done("verify", net, out)
        assert report["equivalent"]
        assert report["matrix"]["of"] == "0 → 1 → avg_pool(2; stride=1) → 3"


def test_rows_and_shards_of_a_chain(net: Path) -> None:
    whole = convtool.open_matrix(written(net, "m.npz"))
    part = written(net, "part.npz", "--rows", "3:11")
    assert torch.equal(convtool.open_matrix(part).dense_rows(0, 8), whole.dense_rows(3, 11))
    assert done("verify", net, part)["equivalent"]
    written(net, "s.safetensors", "--shards", "3")
    index = net.parent / "s.safetensors.index.json"
    assert torch.equal(convtool.open_matrix(index).dense_rows(0, whole.shape[0]), whole.dense_rows(0, whole.shape[0]))
    assert done("verify", net, index)["equivalent"]


def test_a_wrong_entry_or_bias_of_a_chain_is_found(net: Path) -> None:
    out = written(net, "m.npz")
    arrays = dict(np.load(out))
    assert run("verify", net, out)[0] == 0
    for name, at in itertools.product(("data", "bias"), (0, -1)):
        wrong = {key: value.copy() for key, value in arrays.items()}
        wrong[name][at] *= 1 + 2.0**-19
        np.savez(net.parent / "wrong.npz", **wrong)
        assert run("verify", net, net.parent / "wrong.npz")[0] == 1, (name, at)
    # Without its record, the chain is named.
    bare = {name: value for name, value in arrays.items() if "record" not in name and "convtool" not in name}
    np.savez(net.parent / "bare.npz", **bare)
    named = ("--before", ",".join(CHAIN), "--input-size", "3,7,6", *STATED)
    assert run("verify", net, net.parent / "bare.npz", *named)[0] == 0
    assert run("verify", net, net.parent / "bare.npz", "--before", "0,1", "--input-size", "3,7,6", *STATED[:10])[0] == 1


def test_what_a_chain_cannot_have_is_said(net: Path) -> None:
    code, message = error(
        "toeplitz", net, "0", "1", "--stride", "2", "--input-size", "3,7,6", "-o", net.parent / "m.npz"
    )
    assert (code, message) == (
        2,
        "--stride: is for one layer; of one of several, --set 0.stride=... says it",
    )
    code, message = error("toeplitz", net, "0", "1", "-o", net.parent / "m.npz")
    assert code == 2
    assert "toeplitz needs --input-size" in message
    code, message = error(
        "toeplitz", net, "0", "3", "avg_pool(9)", "--input-size", "3,7,6", *STATED, "-o", net.parent / "m.npz"
    )
    assert code == 2


def test_the_singular_values_of_a_chain(net: Path) -> None:
    document = done("spectrum", net, *CHAIN, *STATED, "--input-size", "3,7,6")
    matrix = convtool.open_matrix(written(net, "m.npz", "--dtype", "float64"))
    dense = matrix.dense_rows(0, matrix.shape[0])
    values = torch.linalg.svdvals(dense)
    assert document["largest"]["value"] == pytest.approx(float(values[0]), rel=1e-12)
    assert document["smallest"]["value"] == pytest.approx(float(values[-1]), rel=1e-9)
    assert [one["layer"] for one in document["chain"]] == list(CHAIN)


@pytest.mark.parametrize("shut", [False, True])
def test_several_singular_values_and_their_vectors(net: Path, shut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shut:
        monkeypatch.setattr(extremes, "DENSE_ELEMENTS", 0)
    out = net.parent / "vectors.npz"
    words = ("spectrum", net, *CHAIN[:2], *STATED[:10], "--input-size", "3,7,6", "--count", "3", "--vectors", out)
    document = done(*words)
    matrix = convtool.open_matrix(written_chain(net, CHAIN[:2], STATED[:10]))
    dense = matrix.dense_rows(0, matrix.shape[0]).numpy()
    values = np.linalg.svd(dense, compute_uv=False)
    for name, wanted in (("largest", values[:3]), ("smallest", values[::-1][:3])):
        for found, exact in zip(document["several"][name], wanted, strict=True):
            assert abs(found["value"] - exact) <= found["error"] + 1e-12 * values[0]
            assert found["error"] < 1e-6 * values[0]
    assert document["several"]["complete"] is not shut
    vectors = np.load(out)
    np.testing.assert_allclose(dense @ vectors["right"], vectors["left"] * vectors["values"], atol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(vectors["left"], axis=0), 1, rtol=1e-9)
    assert error(*words)[0] == 5
    assert error(*words, "--force", "--count", "0") == (2, "--count: expected at least 1, got 0")
    assert "expected 1 to 48" in error(*words[:-4], "--count", "49")[1]


def written_chain(net: Path, chain: tuple[str, ...], stated: tuple[str, ...]) -> Path:
    out = net.parent / "chain.npz"
    done("toeplitz", net, *chain, *stated, "--input-size", "3,7,6", "--dtype", "float64", "-o", out)
    return out


def test_the_matrix_of_what_a_recipe_fuses_is_that_of_the_fused_layer(tmp_path: Path) -> None:
    """The branches, their batch norms and the sum, held against the one layer that `fuse` makes of them."""
    net, out, fused = "sample_models/repvgg.safetensors", tmp_path / "block.npz", tmp_path / "fused.safetensors"
    stated = ("--recipe", "repvgg", "--eps", "1e-5", "--set", "*.stride=1")
    done("toeplitz", net, "stage1.rbr_reparam", *stated, "--input-size", "16,5,4", "--dtype", "float64", "-o", out)
    done("fuse", net, *stated, "-o", fused)
    layer = convtool.open_checkpoint(fused).conv("stage1.rbr_reparam", stride=1, padding=1)
    matrix, wanted = convtool.open_matrix(out), convtool.toeplitz(layer, (5, 4), dtype=torch.float64)
    torch.testing.assert_close(matrix.to_torch().to_dense(), wanted.to_dense(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix.bias, wanted.bias, rtol=1e-6, atol=1e-6)
    assert run("verify", net, out)[1]["equivalent"]
    assert run("verify", net, out, "--before", "stage1.rbr_dense.conv,stage1.rbr_dense.bn")[0] == 1
    code, message = error("toeplitz", net, "stage1", *stated, "--input-size", "16,5,4", "-o", out, "-f")
    assert code == 2
    assert "--recipe repvgg: makes no layer 'stage1'; did you mean stage1.rbr_reparam" in message
