"""`convtool fuse` on named layers of every linear kind: what it writes against what the modules compute in torch.

Recipes are in test_recipe, whole families in test_families. Checkpoints are in float64, so that equal means equal.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live import (
    CLOSE,
    assert_same_outputs,
    done,
    error,
    filled,
    geometry_of,
    inputs,
    load,
    relative_difference,
    run,
    save,
    settings,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convtool
from convtool.cli.app import run_app

SHAPES = [(2, 4, 7, 10), (1, 4, 8, 9)]


class Up(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(2.0, 3.0))


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.reshape(-1, *(1,) * (x.dim() - 2)) if self.gamma.dim() == 1 else self.gamma
        return gamma * x


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def fused(
    model: nn.Module, words: list[str], folder: Path, *more: object, suffix: str = ".safetensors"
) -> tuple[dict[str, Any], Path, Path]:
    """Fuse the layers of a model, whose geometry is all stated; fuse's document of the one fusion, and both files."""
    before, after = save(filled(model), folder / f"before{suffix}"), folder / f"after{suffix}"
    stated = settings(geometry_of(model), folder / "geometry.toml")
    document = done("fuse", before, *words, "-o", after, *stated, *more)
    (fusion,) = document["fusions"]
    return fusion, before, after


# Every kind of layer before and after another, each with what stands for it on the command line where it has no name.
CHAINS: dict[str, tuple[nn.Sequential, list[str]]] = {
    "convolution and batch norm": (
        chain(a=nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), bias=False), b=nn.BatchNorm2d(6, eps=1e-3)),
        ["a", "b"],
    ),
    "grouped, dilated, with a bias": (
        chain(a=nn.Conv2d(4, 6, (2, 3), padding=(2, 1), dilation=(2, 1), groups=2), b=nn.BatchNorm2d(6, eps=0.1)),
        ["a", "b"],
    ),
    "batch norm without weight and bias": (
        chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6, affine=False, eps=1e-2)),
        ["a", "b"],
    ),
    "batch norm first": (chain(a=nn.BatchNorm2d(4, eps=1e-3), b=nn.Conv2d(4, 6, (3, 2), groups=2)), ["a", "b"]),
    "batch norm twice": (
        chain(a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4, eps=1e-2)),
        ["a", "b", "--input-size", "4,7,10"],
    ),
    "depthwise and pointwise": (
        chain(a=nn.Conv2d(4, 8, (3, 4), (1, 2), 1, groups=4), b=nn.Conv2d(8, 5, 1), c=nn.BatchNorm2d(5)),
        ["a", "b", "c"],
    ),
    "wide and narrow": (
        chain(a=nn.Conv2d(4, 16, 1), b=nn.Conv2d(16, 5, (3, 2), 2), c=nn.Conv2d(5, 3, 2)),
        ["a", "b", "c"],
    ),
    "circular": (
        chain(a=nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), b=nn.BatchNorm2d(6)),
        ["a", "b"],
    ),
    "transposed and batch norm": (
        chain(a=nn.ConvTranspose2d(4, 4, (3, 2), 2, 1, (0, 1)), b=nn.BatchNorm2d(4, eps=1e-3)),
        ["a", "b"],
    ),
    "transposed, grouped, and batch norm": (
        chain(a=nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), groups=2, bias=False), b=nn.BatchNorm2d(6)),
        ["a", "b"],
    ),
    "convolution and transposed": (
        chain(a=nn.Conv2d(4, 6, (1, 2), bias=False), b=nn.ConvTranspose2d(6, 3, 2, 2)),
        ["a", "b"],
    ),
    "transposed and convolution": (
        chain(a=nn.ConvTranspose2d(4, 6, 2, 2, bias=False), b=nn.Conv2d(6, 3, 1)),
        ["a", "b"],
    ),
    "average pooling": (
        chain(a=nn.Conv2d(4, 6, 2), p=nn.AvgPool2d((2, 3), 2), b=nn.BatchNorm2d(6)),
        ["a", "avg_pool(2,3; stride=2)", "b"],
    ),
    "average pooling first": (
        chain(p=nn.AvgPool2d(3, 2, 1), a=nn.Conv2d(4, 6, 1)),
        ["avg_pool(3; stride=2; padding=1)", "a"],
    ),
    "upsampling": (chain(u=Up(), a=nn.Conv2d(4, 6, (3, 2))), ["upsample(2,3)", "a"]),
    "padding": (chain(p=nn.ZeroPad2d((1, 2, 3, 0)), a=nn.Conv2d(4, 6, 3)), ["pad(3:0,1:2)", "a"]),
    "scale": (chain(a=nn.Conv2d(4, 6, (3, 2)), s=Scale(6)), ["a", "s"]),
    "scale with axes": (chain(a=nn.Conv2d(4, 6, (3, 2)), s=Scale(6, 1, 1), n=nn.BatchNorm2d(6)), ["a", "s", "n"]),
    "scale and transposed": (chain(s=Scale(4), a=nn.ConvTranspose2d(4, 3, (3, 2), (2, 1), 1)), ["s", "a"]),
    "scale and transposed, grouped": (
        chain(s=Scale(4, 1, 1), a=nn.ConvTranspose2d(4, 6, (3, 2), 2, groups=2, bias=False), t=Scale(6)),
        ["s.gamma", "a", "t"],
    ),
    "scale by its tensor": (chain(a=nn.Conv2d(4, 6, (3, 2)), s=Scale(6)), ["a", "s.gamma"]),
    "scale by a number": (chain(a=nn.Conv2d(4, 6, (3, 2)), n=nn.BatchNorm2d(6)), ["a", "n", "identity()", "scale(1)"]),
    "pooling, flatten, linear": (
        chain(a=nn.Conv2d(4, 5, (2, 4)), p=nn.AvgPool2d(2), f=nn.Flatten(), b=nn.Linear(45, 3)),
        ["a", "avg_pool(2)", "flatten(3,3)", "b"],
    ),
    "batch norm, flatten, linear, batch norm": (
        chain(a=nn.BatchNorm2d(4), f=nn.Flatten(), b=nn.Linear(280, 3, bias=False), c=nn.BatchNorm1d(3, eps=1e-2)),
        ["a", "flatten(7,10)", "b", "c"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_the_fused_checkpoint_computes_what_the_modules_do(name: str, tmp_path: Path) -> None:
    model, words = CHAINS[name]
    suffix = ".pt" if len(name) % 2 else ".safetensors"  # what is computed doesn't depend on it
    flat = any("flatten" in word for word in words)
    fusion, before, after = fused(model, words, tmp_path, suffix=suffix)
    assert fusion["exact"]
    conv = convtool.open_checkpoint(after).conv(fusion["name"])
    for shape in SHAPES[:1] if flat or "--input-size" in words else SHAPES:
        x = inputs(*shape)
        with torch.no_grad():
            assert relative_difference(model(x), convtool.forward(conv, x).reshape(model(x).shape)) < CLOSE
    assert run("verify", before, after)[0] == 0
    assert set(load(after)) <= {f"{fusion['name']}.weight", f"{fusion['name']}.bias"}


@pytest.mark.parametrize("axes", [1, 3])
def test_convolutions_of_one_and_three_axes(axes: int, tmp_path: Path) -> None:
    conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[axes]
    model = chain(a=conv(4, 6, (3, 2, 4)[:axes], 2, 1, groups=2), b=norm(6, eps=1e-3), c=conv(6, 2, 1))
    after = fused(model, ["a", "b", "c"], tmp_path)[2]
    x = inputs(2, 4, *(5, 6, 7)[:axes])
    found = convtool.forward(convtool.open_checkpoint(after).conv("a"), x)
    with torch.no_grad():
        assert relative_difference(model(x), found) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_is_closer_to_the_truth_than_in_the_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(8, 16, 3, bias=False), b=nn.BatchNorm2d(16, eps=1e-3))).to(dtype)
    path = save(model, tmp_path / "before.safetensors")
    done("fuse", path, "a", "b", "--set", "b.eps=1e-3", "-o", tmp_path / "after.safetensors")
    found = load(tmp_path / "after.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}

    def fold(kind: torch.dtype) -> Tensor:
        a, b = (model.get_submodule(name).to(kind) for name in "ab")
        weight, gain, var = (t for t in (a.weight, b.weight, b.running_var) if isinstance(t, Tensor))
        return (weight * (gain / torch.sqrt(var + 1e-3)).reshape(-1, 1, 1, 1)).detach()

    truth = fold(torch.float64)

    def distance(weight: Tensor) -> float:
        return float((weight.double() - truth).abs().sum())

    # Each number is the truth rounded once: no number of the dtype is closer.
    assert torch.equal(found["a.weight"], truth.to(dtype))
    model.to(dtype)
    assert distance(found["a.weight"]) < 0.8 * distance(fold(dtype))


def test_the_dtype_is_that_of_the_convolution_and_not_of_its_batch_norm(tmp_path: Path) -> None:
    model = chain(n=nn.BatchNorm2d(4), a=nn.Conv2d(4, 3, 1))
    filled(model)
    model.n.float()
    model.a.half()
    path = save(model, tmp_path / "mixed.pt")
    done("fuse", path, "n", "a", "-o", tmp_path / "out.pt", "--eps", "1e-5", "--set", "a.padding=0")
    assert {tensor.dtype for tensor in load(tmp_path / "out.pt").values()} == {torch.float16}


def test_linear_layers_stay_linear_whatever_stands_between_them(tmp_path: Path) -> None:
    model = chain(n=nn.BatchNorm1d(4), m=nn.BatchNorm1d(4, eps=1e-2))
    path = save(filled(model), tmp_path / "net.pt")
    message = "nothing tells how many spatial axes n has; give --input-size with the channels in front"
    assert error("fuse", path, "n", "m", "-o", tmp_path / "out.pt") == (2, message)
    fusion, _, after = fused(model, ["n", "m", "--input-size", "4"], tmp_path)
    gone = "m = nn.Identity()  # but for an activation inside of it, which stays"
    assert fusion["edits"] == ["n = nn.Linear(4, 4)", gone]
    one = nn.Linear(4, 4).double()
    one.load_state_dict({name.removeprefix("n."): tensor for name, tensor in load(after).items()})
    assert_same_outputs(model, one, [(5, 4)])


def test_what_is_flattened_has_the_size_that_was_said(tmp_path: Path) -> None:
    path = save(filled(chain(a=nn.Conv2d(4, 5, (2, 4)), f=nn.Flatten(), b=nn.Linear(60, 3))), tmp_path / "net.pt")
    stated = ["--set", "a.stride=1", "--set", "a.padding=0", "--set", "a.dilation=1", "--set", "a.groups=1"]
    words = ["fuse", path, "a", "flatten(4,3)", "b", "-o", tmp_path / "out.pt", *stated]
    (fusion,) = done(*words, "--input-size", "4,5,6")["fusions"]
    assert fusion["exact"]
    message = "flatten(4,3): reads a feature map of 4,3, and of this input size it is 3,4"
    assert error(*words, "--input-size", "4,4,7", "--force") == (2, message)
    code, message = error("fuse", path, "a", "flatten(4,4)", "b", "-o", tmp_path / "out.pt", *stated, "--force")
    assert code == 2
    assert "b takes 60 channels, and flatten(4,4) gives 80" in message


# --- what can't be fused is refused by name


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 3)
        self.layer_norm = nn.LayerNorm(6)
        self.group_norm = nn.GroupNorm(2, 6)
        self.prelu = nn.PReLU(6)
        self.rms_norm = nn.Module()
        self.rms_norm.gamma = nn.Parameter(torch.ones(6))
        self.attention = nn.MultiheadAttention(6, 2)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a", "layer_norm"], 3, "layer_norm: is not a convolution, linear layer or batch norm (it holds bias"),
        (["a", "group_norm"], 3, "group_norm: is not a convolution, linear layer or batch norm (it holds bias"),
        (["a", "prelu"], 3, "prelu: is not a convolution, linear layer or batch norm (it holds weight)"),
        (["a", "attention"], 3, "attention: is not a convolution"),
        (["a", "rms_norm"], 4, "rms_norm holds nothing but rms_norm.gamma, as an RMS norm does, which isn't linear"),
        (["a", "relu()"], 4, "relu(): relu is not linear; nothing can be fused across it"),
        (["a", "max_pool(2)", "prelu"], 4, "max_pool(2): max_pool is not linear"),
        (["a", "pool(2)"], 2, "pool(2): unknown layer 'pool'"),
        (["a", "flatten(2,2)", "a"], 2, "a is named twice"),
        (["a", "a"], 2, "a is named twice; a fusion runs through each layer once"),
        (["a", "a.weight"], 2, "a is named twice; a fusion runs through each layer once"),
        (["rms_norm.gamma", "rms_norm.gamma"], 2, "rms_norm.gamma is named twice"),
        (["identity()", "scale(2)"], 2, "nothing tells how many spatial axes identity() has"),
        (["a"], 2, "expected two layers or more, first to last, "),
        (["a", "lora:b"], 2, "no layer 'lora:b'"),
    ],
)  # fmt: skip
def test_what_is_not_linear_is_refused(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    path = save(filled(Norms()), tmp_path / "net.safetensors")
    found = error("fuse", path, *words, "-o", tmp_path / "out.safetensors")
    assert found[0] == code
    assert message in found[1]
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (6, 0, 3, 3), (6, 4, 0, 3)])
def test_a_layer_without_numbers_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(shape)}, tmp_path / "net.pt")
    code, message = error("fuse", tmp_path / "net.pt", "a", "scale(2)", "-o", tmp_path / "out.pt")
    assert code == 3
    assert message.endswith(f"a.weight: holds no numbers (shape {shape})")


class WithGate(nn.Conv2d):
    """As a layer of code of its own may have it."""

    def __init__(self) -> None:
        super().__init__(4, 6, 3)
        self.gate = nn.Parameter(torch.ones(6))


class FrozenNorm(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(6)
        self.register_buffer("floor", torch.ones(6))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"a": WithGate(), "b": nn.BatchNorm2d(6)},
            "a: holds gate as well, and what a conv does with that isn't known",
        ),
        ({"a": nn.Conv2d(4, 6, 3), "b": FrozenNorm()}, "b: holds floor as well, and what a batch norm does with that"),
    ],
)
def test_a_layer_that_holds_more_than_its_kind_does_is_refused(
    layers: dict[str, nn.Module], message: str, tmp_path: Path
) -> None:
    path = save(filled(chain(**layers)), tmp_path / "net.safetensors")
    code, found = error("fuse", path, "a", "b", "-o", tmp_path / "out.safetensors")
    assert code == 3
    assert message in found


def test_a_lone_gamma_of_a_norm_is_a_scale_where_its_tensor_is_named(tmp_path: Path) -> None:
    path = save(filled(Norms()), tmp_path / "net.safetensors")
    document = done("fuse", path, "a", "rms_norm.gamma", "-o", tmp_path / "out.safetensors")
    assert document["fusions"][0]["edits"] == ["rms_norm.gamma = None"]


@pytest.mark.parametrize("words", [["a", "identity()"], ["scale(1)", "a"], ["a", "pad(0)", "avg_pool(1)"]])
def test_what_would_change_nothing_is_no_fusion(words: list[str], tmp_path: Path) -> None:
    before = save(filled(chain(a=nn.Conv2d(4, 6, (3, 2)))), tmp_path / "before.pt")
    for name in ([], ["--name", "b"]):
        code, message = error("fuse", before, *words, "-o", tmp_path / "after.pt", *name)
        assert (code, "is what a does by itself" in message) == (2, True)


# 6 channels are 2 groups of 3 to a plain layer; a transposed one has its output channels there.
@pytest.mark.parametrize("scale", ["s", "s.gamma", "scale(0.5)"])
def test_a_scale_before_a_transposed_layer_says_nothing_of_its_groups(scale: str, tmp_path: Path) -> None:
    model = filled(chain(s=Scale(6), a=nn.ConvTranspose2d(6, 3, (3, 2), (2, 1))))
    before, after = save(model, tmp_path / "before.pt"), tmp_path / "after.pt"
    done("fuse", before, scale, "a", "-o", after, "--name", "b", "--set", "a.transposed=true", "--set", "a.stride=2,1")
    x = inputs(2, 6, 5, 4)
    factors = torch.tensor(0.5) if scale == "scale(0.5)" else model.get_parameter("s.gamma")
    with torch.no_grad():
        expected = model.get_submodule("a")(x * factors.reshape(-1, 1, 1))
    conv = convtool.open_checkpoint(after).conv("b", padding=0, dilation=1, groups=1)
    assert relative_difference(expected, convtool.forward(conv, x)) < CLOSE
    assert run("verify", before, after)[0] == 0


def test_a_transposed_layer_that_nobody_called_so(tmp_path: Path) -> None:
    def told(model: nn.Module, *words: str) -> tuple[int, str]:
        return error("fuse", save(filled(model), tmp_path / "net.pt"), *words, "-o", tmp_path / "out.pt")

    hint = "they would if a is a transposed convolution: --set a.transposed=true"
    after = told(chain(a=nn.ConvTranspose2d(4, 6, 3, bias=False), b=nn.BatchNorm2d(6)), "a", "b")
    assert after == (2, f"channels don't fit: b takes 6 channels, and a gives 4; {hint}")
    before = told(chain(n=nn.BatchNorm2d(4), a=nn.ConvTranspose2d(4, 6, 3, bias=False)), "n", "a")
    assert before == (2, f"channels don't fit: a takes 6 channels, and n gives 4; {hint}")
    code, message = told(chain(a=nn.ConvTranspose2d(4, 6, 3), b=nn.BatchNorm2d(6)), "a", "b")
    assert code == 2
    assert message.endswith("a: its bias of 6 numbers is that of a transposed convolution; say so: transposed=true")
    # As many channels out as in: nothing tells, so it is said what was assumed.
    path = save(filled(chain(a=nn.ConvTranspose2d(4, 4, 3), b=nn.BatchNorm2d(4))), tmp_path / "net.pt")
    words = ["fuse", path, "a", "b", "-o", tmp_path / "out.pt", "--eps", "1e-5"]
    (fusion,) = done(*words)["fusions"]
    assert fusion["assumed"] == ["a: not transposed"]
    (fusion,) = done(*words, "--set", "a.transposed=true", "--force")["fusions"]
    assert fusion["assumed"] == []


@pytest.mark.parametrize(
    ("channels", "layer", "groups"),
    [
        (1, nn.Conv2d(1, 4, (3, 2)), 1),  # one input channel isn't depthwise
        (4, nn.Conv2d(4, 4, (3, 2), groups=4), 4),
        (4, nn.Conv2d(4, 8, (3, 2), groups=4), 4),  # two output channels for each
        (4, nn.Conv2d(4, 6, (3, 2), groups=2), 2),
    ],
)
def test_groups_follow_from_the_layer_before(channels: int, layer: nn.Module, groups: int, tmp_path: Path) -> None:
    model = filled(chain(n=nn.BatchNorm2d(channels), a=layer))
    path = save(model, tmp_path / "net.pt")
    words = ["--eps", "1e-5", "--set", "a.padding=0"]
    (fusion,) = done("fuse", path, "n", "a", "-o", tmp_path / "out.pt", *words)["fusions"]
    assert fusion["fields"]["groups"] == groups
    said = f"groups {groups} ({channels} channels from n, {channels // groups} per group)"
    assert fusion["inferred"] == ([f"a: {said}"] if groups > 1 else [])
    x = inputs(2, channels, 5, 6)
    with torch.no_grad():
        conv = convtool.open_checkpoint(tmp_path / "out.pt").conv("n", stride=1, dilation=1)
        found = convtool.forward(conv, x)
        assert relative_difference(model(x), found) < CLOSE


# --- input normalisation and bias maps


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZE = f"normalize(mean={','.join(map(str, MEAN))}; std={','.join(map(str, STD))}; scale=1/255)"


class Normalized(nn.Module):
    """Images of 0 to 255, normalised, through a first convolution and its batch norm."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, (3, 4), 2, padding)
        self.bn1 = nn.BatchNorm2d(5, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1) for values in (MEAN, STD))
        y: Tensor = self.bn1(self.conv1((x / 255 - mean) / std))
        return y


def test_input_normalisation(tmp_path: Path) -> None:
    model = filled(Normalized(padding=0))
    fusion, before, after = fused(model, [NORMALIZE, "conv1", "bn1"], tmp_path)
    assert fusion["layers"] == [NORMALIZE, "conv1", "bn1"]
    assert f"give conv1 its input as it was before {NORMALIZE}" in fusion["edits"]
    conv = convtool.open_checkpoint(after).conv("conv1")
    x = inputs(2, 3, 9, 12).abs() * 100
    with torch.no_grad():
        assert relative_difference(model(x), convtool.forward(conv, x)) < CLOSE
    assert run("verify", before, after)[0] == 0


def test_a_normalisation_behind_a_layer_is_the_models_own(tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(6, 3, 1))
    fusion, before, after = fused(model, ["a", "normalize(mean=1)", "b"], tmp_path)
    assert [line for line in fusion["edits"] if "normalize" in line] == [
        "take normalize(mean=1) out of the model's code, as a does it"
    ]
    assert run("verify", before, after)[0] == 0
    for branch, expected in (
        ('"normalize(mean=1)", "b"', "give f its input as it was before normalize(mean=1)"),
        ('"b"', "take normalize(mean=1) out of the model's code, as f does it"),
    ):
        model = chain(a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 6, 3))
        words = by_recipe(model, f'sum = [["normalize(mean=1)", "a"], [{branch}]]', tmp_path)
        (fusion,) = done(*words)["fusions"]
        assert [line for line in fusion["edits"] if "normalize" in line] == [expected]


@pytest.mark.parametrize(
    ("between", "layer", "last", "said"),
    [
        (
            "avg_pool(2)",
            nn.AvgPool2d(2),
            nn.Conv2d(6, 3, 1),
            ["take avg_pool(2) out of the model's code, as a does it"],
        ),
        ("flatten(6,9)", nn.Flatten(), nn.Linear(324, 3), []),  # of one position it changes nothing
    ],
)
def test_what_the_models_code_does_between_layers_is_among_the_edits(
    between: str, layer: nn.Module, last: nn.Module, said: list[str], tmp_path: Path
) -> None:
    fusion, _, _ = fused(chain(a=nn.Conv2d(4, 6, 2), p=layer, b=last), ["a", between, "b"], tmp_path)
    assert [line for line in fusion["edits"] if "code" in line] == said


@pytest.mark.parametrize("name", ["b", "c"])
def test_the_addition_of_its_input_to_a_layer_that_stays_is_among_the_edits(name: str, tmp_path: Path) -> None:
    model, recipe = chain(b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1)), tmp_path / "r.toml"
    behind = ', "c"' if name == "c" else ""
    tree = f'[{{ sum = ["b", "identity()"] }}{behind}]'
    recipe.write_text(f'[[fuse]]\nname = "{name}"\nchain = {tree}\n')
    words = ["fuse", save(model, tmp_path / "net.pt"), "--recipe", recipe, "-o", tmp_path / "o.pt", "--assume-defaults"]
    (fusion,) = done(*words)["fusions"]
    assert f"take the addition of its input out of the model's code, as {name} does it" in fusion["edits"]
    # By a name of its own, the model's code has to call it, in place of the sum.
    recipe.write_text(recipe.read_text().replace(f'name = "{name}"', 'name = "f"'))
    (fusion,) = done(*words, "--force")["fusions"]
    assert not [line for line in fusion["edits"] if "addition" in line]


def test_input_normalisation_before_padding_needs_a_bias_map(tmp_path: Path) -> None:
    model = filled(Normalized(padding=1))
    before, after = save(model, tmp_path / "before.pt"), tmp_path / "after.pt"
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    words = ["fuse", before, NORMALIZE, "conv1", *stated, "-o", after]
    code, message = error(*words)
    assert code == 4
    assert "the padding of conv1 hides the bias of normalize(" in message
    assert "--bias-map with --input-size makes it exact at one size" in message
    (fusion,) = done(*words, "--bias-map", "--input-size", "9,12")["fusions"]
    assert (fusion["exact"], fusion["bias_map"], fusion["input_size"]) == (True, True, [9, 12])
    state = load(after)
    assert state["conv1.bias_map"].shape == (5, 5, 6)
    assert "conv1.bias" not in state
    x = inputs(2, 3, 9, 12).abs() * 100
    with torch.no_grad():
        expected = model.conv1((x / 255 - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1))
        found = F.conv2d(x, state["conv1.weight"], None, 2, 1) + state["conv1.bias_map"]
    assert relative_difference(expected, found) < 1e-6  # the mean in float32 on the one side
    assert run("verify", before, after)[0] == 0
    assert run("verify", before, after, "--input-size", "9,12", "--exhaustive")[0] == 0
    assert run("verify", before, after, "--input-size", "9,14")[0] == 1  # it was made for another size


BIASED: dict[str, tuple[nn.Sequential, list[str], tuple[int, int]]] = {
    "1x1 with bias": (chain(a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(6, 5, (3, 2), 2, (1, 0))), ["a", "b"], (7, 8)),
    "batch norm": (chain(a=nn.BatchNorm2d(4), b=nn.Conv2d(4, 6, (3, 4), padding=(2, 1), groups=2)), ["a", "b"], (5, 9)),
    "three, two of them padded": (
        chain(a=nn.BatchNorm2d(4), b=nn.Conv2d(4, 3, (3, 2), padding=1), c=nn.Conv2d(3, 2, 1)), ["a", "b", "c"], (4, 6),
    ),
    "reflected": (
        chain(a=nn.BatchNorm2d(4), p=nn.ZeroPad2d(1), b=nn.Conv2d(4, 3, 2)), ["a", "pad(1)", "b"], (4, 6),
    ),
    "transposed": (chain(a=nn.BatchNorm2d(4), b=nn.ConvTranspose2d(4, 3, 3, 2, 1)), ["a", "b"], (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_map_is_exact_at_its_size(name: str, tmp_path: Path) -> None:
    model, words, size = BIASED[name]
    before, after = save(filled(model), tmp_path / "before.safetensors"), tmp_path / "after.safetensors"
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    at = ["--input-size", ",".join(map(str, size))]
    assert error("fuse", before, *words, *stated, *at, "-o", after)[0] == 4
    (fusion,) = done("fuse", before, *words, *stated, *at, "--bias-map", "-o", after)["fusions"]
    assert fusion["bias_map"]
    conv = convtool.open_checkpoint(after).conv(fusion["name"])
    x = inputs(2, 4, *size)
    with torch.no_grad():
        assert relative_difference(model(x), convtool.forward(conv, x)) < CLOSE
    assert run("verify", before, after, "--exhaustive")[0] == 0


def test_a_bias_map_is_made_only_where_a_bias_does_not_do(tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3, padding=1), b=nn.BatchNorm2d(6))
    fusion, _, after = fused(model, ["a", "b", "--bias-map", "--input-size", "5,6"], tmp_path)
    assert not fusion["bias_map"]
    assert set(load(after)) == {"a.weight", "a.bias"}


def test_a_bias_map_does_not_help_where_more_than_a_bias_is_lost(tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3, padding=1), b=nn.Conv2d(6, 3, 3, padding=1))
    path = save(filled(model), tmp_path / "net.pt")
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    words = ["fuse", path, "a", "b", *stated, "-o", tmp_path / "out.pt"]
    code, message = error(*words, "--bias-map", "--input-size", "5,6")
    assert code == 4
    assert "b pads what the layers before compute" in message
    assert error(*words, "--bias-map")[0] == 2
    assert error(*words, "--bias-map", "--input-size", "5,6", "--allow-border")[0] == 2


def test_a_layer_with_a_bias_map_is_not_fused_further(tmp_path: Path) -> None:
    model = chain(a=nn.BatchNorm2d(4), b=nn.Conv2d(4, 5, 3, padding=1), c=nn.Conv2d(5, 2, 1))
    _, _, after = fused(model, ["a", "b", "--name", "b", "--bias-map", "--input-size", "5,6"], tmp_path)
    code, message = error("fuse", after, "b", "c", "-o", tmp_path / "more.safetensors", "--set", "c.padding=0")
    assert code == 4
    assert "a layer with a bias map cannot be fused further" in message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("normalize(mean=1,2; std=1)", "channels don't fit: conv1 takes 3 channels, and normalize(mean=1,2"),
        ("normalize(mean=0; std=0)", "normalize(mean=0; std=0): std: expected numbers above 0"),
        ("normalize(scale=x)", "scale: expected a finite number, got 'x'"),
    ],
)
def test_mistakes_in_normalisation(word: str, message: str, tmp_path: Path) -> None:
    path = save(filled(Normalized(padding=0)), tmp_path / "net.pt")
    code, found = error("fuse", path, word, "conv1", "-o", tmp_path / "out.pt")
    assert code == 2
    assert message in found


# --- cost


def test_what_it_costs_is_counted_and_what_gets_slower_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convtool.cli.app import run_app

    model = chain(a=nn.Conv2d(4, 2, (3, 2)), b=nn.Conv2d(2, 6, 3), head=nn.Linear(3, 3))
    fusion, before, after = fused(model, ["a", "b"], tmp_path, "--input-size", "9,8")
    apart, together = 2 * 4 * 6 * (7 * 7) + 6 * 2 * 9 * (5 * 5), 6 * 4 * (5 * 4) * (5 * 5)
    assert fusion["multiply_adds"] == {"before": apart, "after": together, "per": "input"}
    assert fusion["parameters"] == {"before": 48 + 2 + 108 + 6, "after": 6 * 4 * 20 + 6}
    stated = ["--geometry", tmp_path / "geometry.toml"]
    (per_position,) = done("fuse", before, "a", "b", "-o", after, "--force", *stated)["fusions"]
    assert per_position["multiply_adds"] == {"before": 48 + 108, "after": 480, "per": "input position"}
    assert run_app(["fuse", str(before), "a", "b", "-o", str(tmp_path / "out.pt"), *map(str, stated)]) == 0
    assert "slower: a → b: fused it takes 3.08 times the multiply-adds" in capsys.readouterr().err


# --- shared layers and tied tensors


def test_tied_tensors_are_not_torn_apart(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 4, 1), b=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1), d=nn.BatchNorm2d(4)))
    a, c = model.get_submodule("a"), model.get_submodule("c")
    c.weight = a.weight
    path = save(model, tmp_path / "tied.pt")
    out = tmp_path / "out.pt"
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    for layers, taken, other in ((["a", "b"], "a", "c"), (["c", "d"], "c", "a")):
        code, message = error("fuse", path, *layers, "-o", out, *stated)
        assert code == 4
        assert f"{taken}.weight is one tensor with {other}.weight (tied weights)" in message
    recipe = tmp_path / "r.toml"
    recipe.write_text('fuse = [{ name = "a", chain = ["a", "b"] }, { name = "c", chain = ["c", "d"] }]')
    assert error("fuse", path, "--recipe", recipe, "-o", out, *stated)[0] == 4
    # Both in one fusion: the layer runs twice, and one stands for both.
    done("fuse", path, "a", "b", "c", "d", "-o", out, *stated)
    x = inputs(2, 4, 3, 5)
    with torch.no_grad():
        found = convtool.forward(convtool.open_checkpoint(out).conv("a"), x)
        assert relative_difference(model(x), found) < CLOSE


def test_parts_of_one_buffer_are_not_tied(tmp_path: Path) -> None:
    flat = torch.arange(1.0, 41.0)
    state = {
        "a.weight": flat[:16].view(4, 4, 1, 1),
        "b.weight": flat[16:32].view(4, 4, 1, 1),
        "c.weight": flat[24:40].view(4, 4),
    }
    torch.save(state, tmp_path / "flat.pt")
    words = ["fuse", tmp_path / "flat.pt", "a", "b", "-o", tmp_path / "o.pt", "--set", "a.groups=1"]
    assert "b.weight is one tensor with c.weight" in error(*words)[1]
    state["c.weight"] = flat[32:40].view(2, 4)
    torch.save(state, tmp_path / "flat.pt")
    done(*words)


# --- chains and sums inside of each other


def border_model(first: int = 1) -> nn.ModuleDict:
    """Layers whose fusions lose a bias, and with a first kernel of 3 taps as well, at the border."""
    layers = {"a": nn.Conv2d(2, 2, first, padding=first // 2), "b": nn.Conv2d(2, 2, (3, 5), padding=(1, 2))}
    return nn.ModuleDict(layers | {"c": nn.Conv2d(2, 2, (3, 5), padding=(1, 2)), "d": nn.Conv2d(2, 2, 1)})


def by_recipe(model: nn.Module, rule: str, folder: Path) -> list[object]:
    """The words of `fuse` for a recipe of one fusion, f."""
    (folder / "r.toml").write_text(f'[[fuse]]\nname = "f"\n{rule}\n')
    before = save(filled(model), folder / "before.safetensors")
    stated = settings(geometry_of(model), folder / "geometry.toml")
    return ["fuse", before, "--recipe", folder / "r.toml", "-o", folder / "after.safetensors", "--force", *stated]


@pytest.mark.parametrize(
    "rule",
    [
        'sum = [["a", "b"], ["c"]]',
        'sum = [{ chain = ["a", "b"], scale = 0.5 }, ["c"]]',
        'chain = [["a", "b"], "scale(0.5)"]',
        'chain = [[["a"], ["b"]], ["identity()"], "d"]',
        'chain = [{ sum = [["a", "b"], "c"] }]',
        'chain = ["a", { sum = [["b"], ["c"]] }]',
    ],
)
def test_a_border_that_was_allowed_is_apart_however_chains_are_nested(rule: str, tmp_path: Path) -> None:
    for first in (1, 3):
        words = by_recipe(border_model(first), rule, tmp_path)
        assert error(*words)[0] == 4
        done(*words, "--allow-border")
        code, document = run("verify", words[1], tmp_path / "after.safetensors")
        (found,) = document["fusions"]
        assert (code, found["interior"]["equal"], found["rim"]["equal"]) == (1, True, False)


def test_no_border_is_allowed_inside_of_a_chain_and_nobody_is_told_to_allow_it(tmp_path: Path) -> None:
    words = by_recipe(border_model(), 'chain = ["d", { sum = [["a", "b"], ["identity()"]] }]', tmp_path)
    for more in ([], ["--allow-border"]):
        code, message = error(*words, *more)
        assert code == 4
        assert "cannot fuse a, b exactly: the padding of b hides the bias of a" in message
        assert "of this branch's output would differ" in message
        assert "accept that" not in message
        assert "leave this branch out" in message
    assert "--bias-map with --input-size makes it exact at one size" in message
    done(*words, "--bias-map", "--input-size", "7,8")
    assert run("verify", words[1], tmp_path / "after.safetensors")[0] == 0


# --- records


def test_fusing_what_was_fused_is_verified_against_the_beginning(tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3, 2, 1), b=nn.BatchNorm2d(6, eps=1e-2), c=nn.Conv2d(6, 3, 1), d=nn.BatchNorm2d(3))
    _, before, after = fused(model, ["a", "b"], tmp_path)
    last = tmp_path / "last.safetensors"
    stated = ["--eps", "1e-5", "--set", "c.padding=0", "--set", "c.stride=1"]
    (fusion,) = done("fuse", after, "a", "c", "scale(0.5)", "d", "-o", last, *stated)["fusions"]
    assert fusion["fields"]["stride"] == [2, 2]  # known from the record
    assert [assumed for assumed in fusion["assumed"] if assumed.startswith("a")] == []
    document = done("verify", before, last)
    assert document["fusions"][0]["before"] == ["a", "b", "c", "scale(0.5)", "d"]
    assert run("verify", after, last)[0] == 0


def test_a_fusion_for_one_size_stays_so_when_it_is_fused_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the size is odd, b leaves out the last row or column, in place of which c pads."""
    model = chain(
        a=nn.Conv2d(4, 6, 1, 2, bias=False), b=nn.Conv2d(6, 5, 2, 2, bias=False), c=nn.Conv2d(5, 3, 3, 2, 1, bias=False)
    )
    model.append(nn.Conv2d(3, 2, 1))
    size = ["--input-size", "12,20"]
    stated = settings(geometry_of(filled(model)), tmp_path / "geometry.toml")
    one, two, three, four = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "three", "four"))
    save(model, one)
    assert error("fuse", one, "b", "c", "-o", two, *stated)[0] == 4
    done("fuse", one, "b", "c", "-o", two, *stated, *size)
    done("fuse", two, "b", "3", "-o", three, "--set", "3.padding=0", "--set", "3.stride=1")
    document = done("verify", one, three)
    assert [found["input_size"] for found in document["fusions"]] == [[6, 12, 20]]
    assert document["statement"].endswith("; at input size 12,20 only, as the record says")
    assert (
        run("verify", two, three)[1]["statement"] == "each number compared, and random inputs run"
    )  # exact at every size
    large = tmp_path / "large.safetensors"
    done("fuse", one, "b", "c", "-o", large, *stated, "--input-size", "1200,2002")
    document = done("verify", one, large)
    ((channels, *smaller),) = (found["input_size"] for found in document["fusions"])
    assert (channels, [n % 4 for n in smaller]) == (6, [0, 2])
    assert max(smaller) < 40  # with the same borders, and not in minutes
    assert document["statement"].endswith(
        f"at input size 1200,2002 only, as the record says, run at {smaller[0]},{smaller[1]}, where the borders are the"
        " same"
    )
    assert run_app(["verify", str(one), str(three), "--input-size", "15,20"]) == 1
    assert "b: by the record it was fused for input size 12,20 only" in capsys.readouterr().err
    # Behind a layer of stride 2, the size is that of its input.
    done("fuse", three, "a", "b", "-o", four, "--set", "a.stride=2", "--set", "a.groups=1")
    document = done("verify", one, four)
    assert [found["input_size"] for found in document["fusions"]] == [[4, 23, 39]]
    assert document["statement"].endswith("; at input size 23,39 only, as the record says")
    stated = ["--set", "a.stride=2", "--set", "a.groups=1", "--set", "a.padding=0"]
    done("fuse", three, "a", "b", "-o", four, *stated, "--input-size", "22,40", "--force")
    code, message = error("verify", one, four)
    assert code == 3
    assert "a was fused for input size 22,40 and 12,20, one of them a part of it, and at no one input size" in message
    done("verify", one, four, "--input-size", "24,40")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_fused_in_steps_was_rounded_in_between_which_is_allowed_for(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6), c=nn.BatchNorm2d(6), d=nn.Conv2d(6, 5, (2, 1)))
    _, before, after = fused(model, ["a", "b", "--dtype", dtype], tmp_path)
    further, last = tmp_path / "further.safetensors", tmp_path / "last.safetensors"
    done("fuse", after, "a", "c", "-o", further, "--eps", "1e-5")
    done("fuse", further, "a", "d", "-o", last, "--set", "d.padding=0", "--set", "d.dilation=1")
    ratio = max(found["ratio"] for found in done("verify", before, last)["fusions"])
    assert 0.01 < ratio <= 1
    # A fault is one all the same.
    with safe_open(last, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(last)
    tensors["a.weight"][2, 1, 0, 2] += tensors["a.weight"].abs().max() / 8
    save_file(tensors, last, metadata)
    assert run_app(["verify", str(before), str(last)]) == 1
    assert f"a: was fused in steps and stored in {dtype} in between" in capsys.readouterr().err


DAMAGED: dict[
    str, tuple[str, Any, str]
] = {  # a key of the recorded fusion or of its first source, what it says, why not
    "kind": ("kind", "batch_norm", "a batch norm has no dilation"),
    "function": ("kind", "identity", "a identity has no dilation"),
    "transposed": (
        "fields",
        {"transposed": True},
        "doesn't fit the tensors: a: expected a bias of shape (4,), got (5,)",
    ),
    "groups of a source": ("source fields", {"groups": 4}, "doesn't fit the tensors"),
    "input size": (
        "input_size",
        [10**9, 10**9],
        "input size 1000000000,1000000000, which is too large to run",  # as no smaller one has the same borders
    ),
    "an input too small": ("input_size", [1, 1], "fused for input size 1,1, which doesn't fit its layers"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_record_that_does_not_fit_its_tensors_is_said_to_be_wrong(name: str, tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, (2, 3)), b=nn.Conv2d(6, 5, 1))
    _, before, after = fused(model, ["a", "b"], tmp_path)
    with safe_open(after, "pt") as opened:
        record = json.loads(opened.metadata()["convtool"])
    key, value, message = DAMAGED[name]
    (fusion,) = record["fusions"]
    source = fusion["sources"]["chain"][0]
    if key == "kind":
        source[key] = value
    elif isinstance(value, dict):
        (source if key == "source fields" else fusion)["fields"] |= value
    else:
        fusion[key] = value
        source["fields"]["dilation"] = [10**8, 10**8] if value == [10**9, 10**9] else [1, 1]
    save_file(load(after), after, {"convtool": json.dumps(record)})
    code, found = error("verify", before, after)
    assert (code, message in found, str(after) in found) == (3, True, True), found


def test_what_was_fused_for_an_input_too_large_to_run_is_verified_at_a_small_one(tmp_path: Path) -> None:
    padding: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    model = chain(a=nn.Conv2d(3, 4, 3, 2, **padding), b=nn.Conv2d(4, 5, (3, 1), **padding))
    _, before, after = fused(model, ["a", "b", "--input-size", "3,9000,8998"], tmp_path)
    (found,) = done("verify", before, after)["fusions"]
    assert found["equivalent"]
    tensors = load_file(after)
    tensors["a.weight"][2, 1, 0, 2] *= 1.01
    with safe_open(after, "pt") as opened:
        save_file(tensors, after, opened.metadata())
    assert run("verify", before, after)[0] == 1


def test_files_without_a_record_that_hold_the_same_are_the_same(tmp_path: Path) -> None:
    before = save(filled(chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6))), tmp_path / "before.pt")
    after = tmp_path / "after.safetensors"
    done("convert", before, after)
    document = done("verify", before, after)
    assert (document["fusions"], document["other_tensors"]["differing"]) == ([], {})
    state = load(after)
    state["b.bias"][3] += 1
    save_file(state, after)
    code, document = run("verify", before, after)
    assert (code, document["other_tensors"]["differing"]) == (1, {"b.bias": "changed"})
    del state["b.bias"]
    save_file(state, after)
    code, message = error("verify", before, after)
    assert code == 2
    assert "holds no record of what was fused" in message


def test_layers_of_another_checkpoint_of_the_same_names(tmp_path: Path) -> None:
    one, other = filled(chain(a=nn.Conv2d(4, 6, 3, 2)), 1), filled(chain(a=nn.Conv2d(6, 3, 2)), 2)
    before, more = save(one, tmp_path / "one.pt"), save(other, tmp_path / "other.pt")
    out, source = tmp_path / "out.safetensors", ["--with", f"next={tmp_path / 'other.pt'}"]
    geometry = tmp_path / "geometry.toml"
    geometry.write_text('"*a" = { padding = 0, dilation = 1, groups = 1 }')
    words = ["fuse", before, "a", "next:a", "-o", out, *source, "--geometry", geometry, "--set", "a.stride=2"]
    (fusion,) = done(*words, "--set", "next:a.stride=1")["fusions"]
    assert fusion["fields"]["stride"] == [2, 2]  # a.stride is not next:a.stride
    x = inputs(2, 4, 9, 11)
    with torch.no_grad():
        found = convtool.forward(convtool.open_checkpoint(out).conv("a"), x)
        assert relative_difference(other(one(x)), found) < CLOSE
    assert run("verify", before, out, *source)[0] == 0
    (fusion,) = done(*words, "--set", "next:a.stride=3", "--force")["fusions"]
    assert fusion["fields"]["stride"] == [6, 6]
    assert run("verify", before, out, *source)[0] == 0
    assert error("fuse", before, "a", "next:a", "-o", out, "--force", *source, "--set", "more:a.stride=3")[0] == 2
    assert more.exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6))
    path, out = save(filled(model), tmp_path / "net.pt"), tmp_path / "out.pt"
    document = done("fuse", path, "a", "b", "-o", out, "--dry-run", "--eps", "1e-5")
    assert not document["written"]
    assert document["fusions"][0]["tensors"]["written"] == {"a.weight": [6, 4, 3, 3], "a.bias": [6]}
    assert not out.exists()


def test_one_input_size_for_many_fusions_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('fuse = [{ name = "{p}.a", chain = ["{p}.a", "{p}.b"] }]')
    blocks = {name: chain(a=nn.Conv2d(4, 4, 3), b=nn.BatchNorm2d(4)) for name in "xy"}
    path = save(filled(nn.ModuleDict(blocks)), tmp_path / "net.pt")
    code, message = error("fuse", path, "--recipe", recipe, "--input-size", "5,5", "-o", tmp_path / "out.pt")
    assert code == 2
    assert "--input-size: is the size of one input, and the recipe makes 2 fusions" in message


def test_geometry_of_a_users_recipe_that_fits_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convtool.cli.app import run_app

    path = save(filled(chain(conv1=nn.Conv2d(4, 4, 3), bn1=nn.BatchNorm2d(4))), tmp_path / "net.pt")
    recipe = tmp_path / "r.toml"
    recipe.write_text("""
        fuse = [{ name = "conv1", chain = ["conv1", "bn1"] }]
        geometry = { "conv*" = { stride = 2 }, "convv1" = { padding = 1 } }
    """)
    assert (
        run_app(
            ["fuse", str(path), "--recipe", str(recipe), "--eps", "1e-5", "--dry-run", "-o", str(tmp_path / "out.pt")]
        )
        == 0
    )
    assert f"{recipe}: geometry: 'convv1' fits no layer" in capsys.readouterr().err
    words = ["--recipe", "repvgg-timm", "--dry-run", "-o", str(tmp_path / "out.pt")]
    assert run_app(["fuse", str(path), *words]) == 2
    assert "geometry:" not in capsys.readouterr().err


def test_what_is_printed_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convtool.cli.app import run_app

    blocks = {str(n): chain(conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)) for n in range(5)}
    path = save(filled(nn.ModuleDict({**blocks, "up": chain(bn=nn.BatchNorm2d(3))})), tmp_path / "net.pt")
    recipe = ["--recipe", "conv-bn-torchvision", "--assume", "eps"]
    assert run_app(["fuse", str(path), *recipe, "-o", str(tmp_path / "out.pt")]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("to load it: convtool.apply(model, ")
    said = shown.out.splitlines()
    assert said[:3] == [
        "assumed: 0.conv, 1.conv, 2.conv and 2 more: not transposed",
        "assumed: 0.bn, 1.bn, 2.bn and 2 more: eps 1e-05",
        "left alone: 1 batch norm: up.bn",
    ]
    assert said[3].split() == ["layers", "become", "exact", "parameters", "multiply-adds"]
    assert [line.partition("  ")[0] for line in said[4:9]] == [f"{n}: conv → bn" for n in range(5)]
    rest = ["conv", "at every input size", "156 → 148", "148 → 144"]
    assert [re.split("  +", line)[1:] for line in said[4:9]] == [rest] * 5
    assert re.fullmatch(r"proved number by number: none of 740 is further off than rounding can put it", said[-3])
    assert (
        said[-2]
        == "5 fusions, 780 → 740 parameters; multiply-adds are per output position; --details lists the edits of each"
    )
    assert said[-1].startswith(f"wrote {tmp_path / 'out.pt'}")
    assert run_app(["fuse", str(path), *recipe, "-o", str(tmp_path / "out3.pt"), "--no-verify"]) == 0
    assert "\nnot proved, as --no-verify was given\n" in capsys.readouterr().out
    assert run_app(["fuse", str(path), *recipe, "-o", str(tmp_path / "out2.pt"), "--details"]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines()[3:] if not line.startswith("  proved number by number")
    ]
    assert lines[:4] == [
        "0.conv → 0.bn becomes 0.conv",
        "  model[0].bn = nn.Identity()  # but for an activation inside of it, which stays",
        "  exact at every input size",
        "  156 → 148 parameters, 148 → 144 multiply-adds per output position, float64",
    ]
