"""`fuse --loader`: a module of plain torch that loads a fused checkpoint into the model as it was."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import convtool
from convtool.cli.app import run_app

BN = nn.BatchNorm2d


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1 * ("var" in name))
    return model.eval()


def sequence(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class Branches(nn.Module):
    """RepVGG's block, by its authors' names, before and after."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.rbr_dense = sequence(conv=nn.Conv2d(4, 6, 3, stride, 1, bias=False), bn=BN(6))
        self.rbr_1x1 = sequence(conv=nn.Conv2d(4, 6, 1, stride, bias=False), bn=BN(6))

    def forward(self, x: Tensor) -> Tensor:
        fused = dict(self.named_children()).get("rbr_reparam")
        whole: Tensor = self.rbr_dense(x) + self.rbr_1x1(x) if fused is None else fused(x)
        return whole


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class Listed(nn.Module):
    """timm's RepGhostModule: its code goes through what is in `bns`."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap_operation = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), BN(4))
        self.fusion_bn = nn.Sequential(BN(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum((bn(x) for bn in self.fusion_bn), self.cheap_operation(x))
        return y


class Scale(nn.Module):
    """A layer scale in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def strided() -> nn.Module:
    return sequence(
        conv1=nn.Conv2d(4, 6, 3, 2, (1, 2), 2, groups=2, bias=False, padding_mode="circular"), bn1=BN(6), relu=nn.ReLU()
    )


RELU = nn.ReLU()
STATED = ("--eps", "1e-5", "--assume-defaults")
MODELS: dict[str, tuple[Any, list[str]]] = {
    "what nobody states is the live layer's": (strided, ["conv1", "bn1", "--eps", "1e-5"]),
    "all is stated": (
        lambda: sequence(a=nn.Conv2d(4, 5, 1), b=nn.Conv2d(5, 3, (3, 2), 2)),
        ["a", "b", "--set", "a.stride=1", "--set", "b.stride=2", "--assume-defaults"],
    ),
    "transposed": (
        lambda: sequence(up=nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False), bn=BN(6)),
        ["up", "bn", "--eps", "1e-5", "--set", "up.transposed=true"],
    ),
    "timm's batch norms": (
        lambda: sequence(a=nn.Conv2d(4, 5, 1), m=BatchNormAct2d(5), b=nn.Conv2d(5, 4, 1), n=BatchNormAct2d(4, RELU)),
        ["a", "m", "b", "n", *STATED, "--set", "a.stride=1", "--set", "b.stride=1"],
    ),
    "a list of branches": (lambda: sequence(block=Listed()), ["--recipe", "repghost-timm", "--assume-defaults"]),
    "a scale": (lambda: sequence(fc=nn.Linear(8, 8), ls=Scale()), ["fc", "ls", "--assume-defaults"]),
    "branches": (lambda: sequence(block=Branches()), ["--recipe", "repvgg"]),
    "wrapped": (lambda: sequence(module=strided()), ["conv1", "bn1", "--eps", "1e-5"]),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loader_gives_the_model_that_apply_gives(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = MODELS[name]
    model = filled(make()).double()
    state = model.state_dict()
    save_file(state, "net.safetensors") if suffix == "safetensors" else torch.save({"state_dict": state}, "net.pt")
    x = torch.rand(2, 4, 9, 8, dtype=torch.float64)
    before = model(x)
    (tmp_path / "code").mkdir()
    command = ["fuse", f"net.{suffix}", *words, "-o", f"fused.{suffix}", "--loader", "code/load_net.py"]
    assert run_app(command) == 0
    load = runpy.run_path("code/load_net.py")["load"]
    fresh = make().double().eval()
    loaded = load(fresh.module if name == "wrapped" else fresh)
    assert sum(isinstance(one, BN) for one in loaded.modules()) == 0
    torch.testing.assert_close(loaded(x), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convtool.apply(make().double().eval(), f"fused.{suffix}")(x), loaded(x))


def test_branches_that_the_code_goes_on_to_call_arent_silently_their_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An nn.Sequential that lost its layers would pass its input on."""

    class Called(Branches):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
            return y

    monkeypatch.chdir(tmp_path)
    torch.save(filled(sequence(block=Called())).state_dict(), "net.pt")
    assert run_app(["fuse", "net.pt", "--recipe", "repvgg", "-o", "f.pt", "--loader", "load_net.py"]) == 0
    x = torch.rand(1, 4, 5, 5)
    for loaded in (
        runpy.run_path("load_net.py")["load"](sequence(block=Called())),
        convtool.apply(sequence(block=Called()), "f.pt"),
    ):
        with pytest.raises(NotImplementedError):
            loaded(x)


def test_the_loader_needs_no_convtool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(filled(strided()).state_dict(), "net.pt")
    assert run_app(["fuse", "net.pt", "conv1", "bn1", "--eps", "1e-5", "-o", "f.pt", "--loader", "load_net.py"]) == 0
    code = "import load_net, sys; assert not [name for name in sys.modules if name.partition('.')[0] == 'convtool']"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("bn1", "error", "said"),
    [
        (BatchNormAct(6), TypeError, r"bn1 is a BatchNormAct, which may do more .* convtool\.apply\(model, 'f\.pt'\)"),
        (BatchNormAct2d(6, RELU), TypeError, "bn1 is a BatchNormAct2d, which may do more than its weights say"),
        (None, ValueError, "the model has no layer bn1: it isn't the one whose checkpoint was fused"),
        (nn.Identity(), ValueError, "bn1 has eps None, and 1e-05 was stated"),
    ],
)
def test_another_model_is_left_as_it_was(
    bn1: nn.Module | None, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(bn1: nn.Module | None) -> nn.Module:
        layers = {"conv1": nn.Conv2d(4, 6, 3), "bn1": bn1, "conv2": nn.Conv2d(6, 2, 1), "bn2": BN(2)}
        return filled(sequence(**{name: layer for name, layer in layers.items() if layer is not None}))

    monkeypatch.chdir(tmp_path)
    torch.save(network(BN(6)).state_dict(), "net.pt")
    words = ["conv1", "bn1", "conv2", "bn2", *STATED, "--set", "conv1.stride=1", "--set", "conv2.stride=1"]
    assert run_app(["fuse", "net.pt", *words, "-o", "f.pt", "--loader", "load_net.py"]) == 0
    model = network(bn1)
    before = dict(model.named_modules())
    with pytest.raises(error, match=said):
        runpy.run_path("load_net.py")["load"](model)
    assert dict(model.named_modules()) == before
    with pytest.raises(convtool.ConvtoolError):
        convtool.apply(model, "f.pt")
    assert dict(model.named_modules()) == before


def test_a_layer_that_isnt_as_stated_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(filled(strided()).state_dict(), "net.pt")
    assert run_app(["fuse", "net.pt", "conv1", "bn1", "--eps", "1e-3", "-o", "f.pt", "--loader", "load_net.py"]) == 0
    with pytest.raises(ValueError, match=r"bn1 has eps 1e-05, and 0\.001 was stated or assumed when it was fused"):
        runpy.run_path("load_net.py")["load"](strided())


def test_what_was_assumed_is_held_against_the_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = filled(sequence(conv=nn.ConvTranspose2d(6, 6, 3), bn=BN(6)))
    torch.save(model.state_dict(), "net.pt")
    words = ["conv", "bn", "--eps", "1e-5", "-o", "f.pt", "--loader", "load_net.py"]
    assert run_app(["fuse", "net.pt", *words]) == 0  # assumed: not transposed
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="conv has transposed True, and False was stated or assumed"):
        runpy.run_path("load_net.py")["load"](model)
    assert dict(model.named_modules()) == before


def test_a_fused_layer_of_another_name_is_loaded_into_the_network_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(filled(strided()).state_dict(), "net.pt")
    assert run_app(["fuse", "net.pt", "conv1", "bn1", "--eps", "1e-3", "--name", "new", "-o", "f.pt"]) == 0
    assert "to load it: load_state_dict of a network that has new; convtool.apply(" in capsys.readouterr().err


@pytest.mark.parametrize(("padding", "fits"), [("same", True), (1, True), ("valid", False), (0, False), (2, False)])
def test_padding_is_held_against_what_was_stated(
    padding: int | str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(padding: int | str) -> nn.Module:
        return filled(sequence(conv=nn.Conv2d(4, 6, 3, padding=padding, bias=False), bn=BN(6)))

    monkeypatch.chdir(tmp_path)
    torch.save(network(1).state_dict(), "net.pt")
    words = ["conv", "bn", "--eps", "1e-5", "--set", "conv.padding=1"]
    assert run_app(["fuse", "net.pt", *words, "-o", "f.pt", "--loader", "load_net.py"]) == 0
    load = runpy.run_path("load_net.py")["load"]
    if fits:
        load(network(padding))
    else:
        with pytest.raises(ValueError, match=r"conv has padding .* was stated or assumed when it was fused"):
            load(network(padding))


def test_a_layer_under_two_names_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(filled(strided()).state_dict(), "net.pt")
    assert run_app(["fuse", "net.pt", "conv1", "bn1", "--eps", "1e-5", "-o", "f.pt", "--loader", "load_net.py"]) == 0
    model = strided()
    model.again = model.bn1
    with pytest.raises(ValueError, match="bn1 is in the model under two names"):
        runpy.run_path("load_net.py")["load"](model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("conv1 bn1 --eps 1e-5 -o f.pt --loader load.txt", "expected a name that ends in .py"),
        ("conv1 bn1 --eps 1e-5 -o f.pt --loader there.py", "there.py: exists"),
    ],
)
def test_what_no_loader_is_written_for(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(filled(strided()).state_dict(), "net.pt")
    Path("there.py").write_text("")
    assert run_app(["fuse", "net.pt", *words.split()]) in (2, 5)
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "there.py"]


def test_a_name_writes_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = 'a"""\nraise SystemExit("run")\n#'
    state = filled(sequence(conv=nn.Conv2d(4, 6, 3, bias=False), bn=BN(6))).state_dict()
    torch.save({f"{evil}{key}": tensor for key, tensor in state.items()}, "net.pt")
    words = [f"{evil}conv", f"{evil}bn", "--eps", "1e-5"]
    assert run_app(["fuse", "net.pt", *words, "-o", f"f{evil[:4]}.pt", "--loader", "load_net.py"]) == 0
    assert "load" in runpy.run_path("load_net.py")
