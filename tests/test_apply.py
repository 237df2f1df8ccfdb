"""`convtool.apply`: recorded fusions in a live module, whatever the layer's form, or the model as it was."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from live import CLOSE, done, filled, geometry_of, inputs, load, relative_difference, run, save, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import convtool
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.errors import InputError, RefusedError, UsageError
from convtool.live.modules import live_module

SHAPE = (2, 4, 7, 10)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def fuse(model: nn.Module, words: list[str], folder: Path, suffix: str = ".safetensors") -> Path:
    """The checkpoint that fuse makes of the model's, the geometry stated."""
    path, out = save(model, folder / f"before{suffix}"), folder / f"after{suffix}"
    done("fuse", path, *words, *settings(geometry_of(model), folder / "geometry.toml"), "-o", out, "--force")
    return out


@torch.no_grad()
def outputs(model: nn.Module, *shape: int) -> Tensor:
    found: Tensor = model(inputs(*(shape or SHAPE)))
    return found


def assert_unchanged(model: nn.Module, before: nn.Module) -> None:
    """The same modules with the same numbers."""
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.state_dict().items())


CHAINS: dict[str, tuple[nn.Sequential, list[str]]] = {
    "convolution": (
        chain(a=nn.Conv2d(4, 6, (3, 2), 2, (1, 0), groups=2), b=nn.BatchNorm2d(6, eps=1e-2), c=nn.Conv2d(6, 3, 1)),
        ["a", "b", "c"],
    ),
    "circular": (
        chain(a=nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), b=nn.BatchNorm2d(6)),
        ["a", "b"],
    ),
    # Pads unevenly, which torch warns of.
    "same": (chain(a=nn.Conv2d(4, 6, (2, 4), padding="same"), b=nn.BatchNorm2d(6)), ["a", "b"]),
    "same, reflected": (
        chain(a=nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="reflect"), b=nn.BatchNorm2d(6)),
        ["a", "b"],
    ),
    "transposed": (
        chain(a=nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), b=nn.BatchNorm2d(6)),
        ["a", "b"],
    ),
    "convolution and transposed": (
        chain(a=nn.Conv2d(4, 6, (1, 2), bias=False), b=nn.ConvTranspose2d(6, 3, (3, 2), (3, 2), bias=False)),
        ["a", "b"],
    ),
    "linear": (
        chain(p=nn.AdaptiveAvgPool2d(1), f=nn.Flatten(), a=nn.Linear(4, 9), b=nn.Linear(9, 3), c=nn.BatchNorm1d(3)),
        ["a", "b", "c"],
    ),
    "flatten": (
        chain(a=nn.Conv2d(4, 5, 2), f=nn.Flatten(), b=nn.Linear(270, 3)),
        ["a", "flatten(6,9)", "b"],
    ),
    "linear over positions": (
        chain(a=nn.BatchNorm2d(4), f=nn.Flatten(2), b=nn.Linear(70, 9), c=nn.Linear(9, 3)),
        ["b", "c"],
    ),
    "named": (chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6)), ["a", "b", "--name", "b"]),
    "bias map": (
        chain(a=nn.BatchNorm2d(4), b=nn.Conv2d(4, 3, (3, 2), padding=1)),
        ["a", "b", "--bias-map", "--input-size", "7,10"],
    ),
    "normalised": (
        chain(a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(6, 2, 1)),
        ["normalize(mean=0; std=1)", "a", "b"],
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CHAINS)
def test_the_live_model_computes_the_same_with_the_fused_layer(name: str, tmp_path: Path) -> None:
    model, words = CHAINS[name]
    out = fuse(filled(model), words, tmp_path)
    live = copy.deepcopy(model)
    assert convtool.apply(live, out) is live
    assert relative_difference(outputs(model), outputs(live)) < CLOSE
    assert live.state_dict().keys() == load(out).keys()
    # The fused layer survives what people do with models: a copy, a pickle, its own checkpoint.
    again = pickle.loads(pickle.dumps(copy.deepcopy(live)))
    again.load_state_dict(load(out), strict=True)
    assert torch.equal(outputs(live), outputs(again))


def test_a_bias_map_goes_with_its_size_only(tmp_path: Path) -> None:
    model, words = CHAINS["bias map"]
    live = convtool.apply(copy.deepcopy(filled(model)), fuse(model, words, tmp_path))
    with pytest.raises(UsageError, match=r"the output is of size 7,12, and the layer's bias map was made for 7,11"):
        outputs(live, 1, 4, 7, 11)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fusions_of_fusions(suffix: str, tmp_path: Path) -> None:
    model = filled(
        chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6), c=nn.Conv2d(6, 5, 1), r=nn.ReLU(), d=nn.Conv2d(5, 3, 2))
    )
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    files = [save(model, tmp_path / f"0{suffix}"), tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"]
    done("fuse", files[0], "a", "b", *stated, "-o", files[1])
    done("fuse", files[1], "a", "c", "--set", "c.padding=0", "-o", files[2], "--name", "c")
    live = convtool.apply(copy.deepcopy(model), files[2])
    assert [type(module).__name__ for module in live.children()] == ["Identity", "Identity", "Conv2d", "ReLU", "Conv2d"]
    assert relative_difference(outputs(model), outputs(live)) < CLOSE


class Block(nn.Module):
    """A linear layer and a scale of the block's own, and one in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 8), nn.Linear(8, 10)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.ones(8))
        self.scale = nn.Module()
        self.scale.gamma = nn.Parameter(torch.ones(10))
        self.gamma_2: nn.Parameter | None = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = torch.relu(x if self.gamma is None else self.gamma * x)
        y: Tensor = self.fc2(x)
        return y if self.gamma_2 is None else y * self.gamma_2


def test_scales_that_a_block_holds_itself_become_none(tmp_path: Path) -> None:
    model = filled(nn.Sequential(Block(), Block()))
    recipe = tmp_path / "r.toml"
    recipe.write_text("""
        [[fuse]]
        name = "1.fc1"
        chain = ["1.fc1", "1.gamma"]
        [[fuse]]
        name = "1.fc2"
        chain = ["1.fc2", "1.gamma_2"]
    """)
    path, out = save(model, tmp_path / "before.pt"), tmp_path / "after.pt"
    document = done("fuse", path, "1.fc1", "1.gamma", "-o", tmp_path / "half.pt")
    assert document["fusions"][0]["edits"] == ["model[1].gamma = None"]
    done("fuse", tmp_path / "half.pt", "1.fc2", "1.gamma_2", "-o", out)
    live = convtool.apply(copy.deepcopy(model), out)
    block = live.get_submodule("1")
    assert isinstance(block, Block)
    assert block.gamma is None
    assert block.gamma_2 is None
    assert relative_difference(outputs(model), outputs(live)) < CLOSE
    assert run("verify", path, out)[0] == 0


def test_a_scale_that_became_none_comes_back_where_loading_fails(tmp_path: Path) -> None:
    model = filled(nn.Sequential(Block()))
    out = fuse(model, ["0.fc1", "0.gamma"], tmp_path)
    live = copy.deepcopy(model)
    live.add_module("1", nn.Linear(10, 2))
    before = copy.deepcopy(live)
    with pytest.raises(InputError, match=r"the checkpoint lacks 1\.weight, 1\.bias"):
        convtool.apply(live, out)
    assert_unchanged(live, before)
    assert live.state_dict().keys() == before.state_dict().keys()


class Around(nn.Module):
    """A block that scales what a layer inside of another block gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 8))
        self.gamma: nn.Parameter | None = nn.Parameter(torch.ones(8))
        self.beta = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return (x if self.gamma is None else x * self.gamma) + self.beta


def test_a_scale_of_a_block_of_which_nothing_else_goes_comes_back_as_well(tmp_path: Path) -> None:
    model = filled(nn.Sequential(Around()))
    out = fuse(model, ["0.body.0", "0.gamma"], tmp_path)
    assert relative_difference(outputs(model), outputs(convtool.apply(copy.deepcopy(model), out))) < CLOSE
    live = copy.deepcopy(model).append(nn.Linear(8, 2))
    before = copy.deepcopy(live)
    with pytest.raises(InputError, match=r"the checkpoint lacks 1\.weight, 1\.bias"):
        convtool.apply(live, out)
    assert live.state_dict().keys() == before.state_dict().keys()


class Branching(nn.Module):
    """A block with a place for the layer that its others become, as timm's blocks have one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fused = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x)) if self.fused is None else self.fused(x)
        return y


def test_a_place_that_a_block_keeps_open_takes_the_fused_layer(tmp_path: Path) -> None:
    model, out = filled(nn.Sequential(Branching())), tmp_path / "after.pt"
    done("fuse", save(model, tmp_path / "before.pt"), "0.a", "0.b", "--eps=1e-5", "--name=0.fused", "-o", out)
    live = convtool.apply(copy.deepcopy(model), out)
    assert set(live.state_dict()) == {"0.fused.weight", "0.fused.bias"}
    assert relative_difference(outputs(model), outputs(live)) < CLOSE
    larger = copy.deepcopy(model).append(nn.Linear(2, 2))
    with pytest.raises(InputError, match="lacks"):
        convtool.apply(larger, out)
    block = larger[0]
    assert isinstance(block, Branching)
    assert block.fused is None


class Calling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Sequential(OrderedDict(act=nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(self.a(x)))
        return y


def test_a_forward_that_calls_what_was_fused_under_another_name_does_not_run(tmp_path: Path) -> None:
    live = filled(Calling())
    convtool.apply(live, fuse(live, ["a", "b", "--name", "new"], tmp_path))
    with pytest.raises(AttributeError, match=r"no attribute '[ab]'"):
        outputs(live)


def test_a_new_name_in_a_sequential_runs_where_its_layers_ran(tmp_path: Path) -> None:
    model = filled(chain(z=nn.ReLU(), a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6), act=nn.Sigmoid()))
    live = convtool.apply(copy.deepcopy(model), fuse(model, ["a", "b", "--name", "new"], tmp_path))
    assert [name for name, _ in live.named_children()] == ["z", "new", "act"]
    assert relative_difference(outputs(model), outputs(live)) < CLOSE
    other = filled(Calling())
    before = copy.deepcopy(other)
    with pytest.raises(RefusedError, match=r"head\.new: would be the last module of an nn\.Sequential"):
        convtool.apply(other, fuse(other, ["a", "b", "--name", "head.new"], tmp_path))
    assert_unchanged(other, before)


def test_a_scale_that_is_a_module_becomes_an_identity(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x * self.gamma
            return y

    model = filled(chain(a=nn.Conv2d(4, 6, 3), s=Scale(), b=nn.BatchNorm2d(6)))
    live = convtool.apply(copy.deepcopy(model), fuse(model, ["a", "s", "b"], tmp_path))
    assert [type(module).__name__ for module in live.children()] == ["Conv2d", "Identity", "Identity"]
    assert relative_difference(outputs(model), outputs(live)) < CLOSE


def test_wrappers_are_seen_through(tmp_path: Path) -> None:
    model, words = CHAINS["convolution"]
    out = fuse(filled(model), words, tmp_path)
    wrapped = nn.ModuleDict({"module": copy.deepcopy(model)})
    convtool.apply(wrapped, out)
    assert relative_difference(outputs(model), outputs(wrapped["module"])) < CLOSE


@pytest.mark.parametrize("name", ["b", "new", "module.b", "_orig_mod.new"])
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", ""])
def test_a_name_is_written_as_the_checkpoint_writes_names(name: str, wrapper: str, tmp_path: Path) -> None:
    model = chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6))
    wrapped = nn.Sequential(OrderedDict({wrapper: model})) if wrapper else model
    out = fuse(filled(wrapped), ["a", "b", "--name", name], tmp_path)
    parts = (wrapper, name.removeprefix("module.").removeprefix("_orig_mod."))
    assert set(load(out)) == {".".join(filter(None, (*parts, what))) for what in ("weight", "bias")}
    live = convtool.apply(copy.deepcopy(wrapped), out)
    assert relative_difference(outputs(wrapped), outputs(live)) < CLOSE


def test_a_state_dict_among_several(tmp_path: Path) -> None:
    model, words = CHAINS["convolution"]
    state = filled(model).state_dict()
    torch.save({"model": {name: tensor * 2 for name, tensor in state.items()}, "ema": state}, tmp_path / "nested.pt")
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    done("fuse", tmp_path / "nested.pt", *words, "--root", "ema", *stated, "-o", tmp_path / "fused.pt")
    live = copy.deepcopy(model)
    with pytest.raises(UsageError, match=r"holds several state dicts \(model, ema\)"):
        convtool.apply(live, tmp_path / "fused.pt")
    convtool.apply(live, tmp_path / "fused.pt", root="ema")
    assert relative_difference(outputs(model), outputs(live)) < CLOSE


def test_dtype_and_mode_are_kept(tmp_path: Path) -> None:
    model, words = CHAINS["convolution"]
    out = fuse(filled(model), words, tmp_path)
    live = copy.deepcopy(model).train()
    convtool.apply(live, out)
    assert all(module.training for module in live.modules())
    assert {parameter.dtype for parameter in live.parameters()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_runs_on(dtype: torch.dtype, tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6), c=nn.Conv2d(6, 2, 1))).float().eval()
    live = convtool.apply(copy.deepcopy(model).to(dtype), fuse(model, ["a", "b"], tmp_path))
    assert {parameter.dtype for parameter in live.parameters()} == {dtype}
    x = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    assert live(x.to(dtype)).dtype == dtype


def test_layers_with_a_weight_norm_are_replaced_whole(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6)))
    weight_norm(model.get_submodule("a"))
    live = convtool.apply(copy.deepcopy(model), fuse(model, ["a", "b"], tmp_path))
    assert relative_difference(outputs(model), outputs(live)) < CLOSE
    assert set(live.state_dict()) == {"a.weight", "a.bias"}


# --- what isn't the layer that was fused


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * super().forward(x)
        return y


class DoubledInside(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = 2 * super()._conv_forward(x, weight, bias)
        return y


class DoublingItsWeight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * 2, self.bias)


class WithoutItsBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


class Norm(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(super().forward(x))
        return found


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


def replaced() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    vars(conv)["forward"] = lambda x: conv._conv_forward(x, conv.weight, conv.bias) * 2
    return conv


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    register_parametrization(conv, "weight", Twice())
    return conv


WRONG: dict[str, tuple[dict[str, nn.Module], str]] = {
    "stride": ({"a": nn.Conv2d(4, 6, 3, 2)}, "a: kernel 3,3 was fused, and the model has kernel 3,3, str"),
    "padding": ({"a": nn.Conv2d(4, 6, 3, padding=1)}, "the model has kernel 3,3, padding 1"),
    "padding mode": ({"a": nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular")}, "padding 1, circular"),
    "kernel": ({"a": nn.Conv2d(4, 6, 3, dilation=2)}, "the model has kernel 3,3, dilation 2"),
    "transposed": ({"a": nn.ConvTranspose2d(4, 6, 3)}, "the model has kernel 3,3, transposed"),
    "eps": ({"b": nn.BatchNorm2d(6, eps=1e-3)}, "b: eps 1e-05 was fused, and the model has eps 0.001"),
    "kind": ({"b": nn.GroupNorm(2, 6)}, "b: the model has a GroupNorm there, and a batch norm was fused"),
    "forward": ({"a": Doubled(4, 6, 3)}, "a: the model has a Doubled there, whose code isn't that of nn.Conv2d"),
    "inner forward": ({"a": DoubledInside(4, 6, 3)}, "a: the model has a DoubledInside there, whose code isn't"),
    "computed weight": ({"a": DoublingItsWeight(4, 6, 3)}, "a: the model has a DoublingItsWeight there, whose code"),
    "bias left out": ({"a": WithoutItsBias(4, 6, 3)}, "a: the model has a WithoutItsBias there, whose code isn't"),
    "forward of its own": ({"a": replaced()}, "a: the model has a Conv2d there, whose code isn't that of nn.Conv2d"),
    "activation": ({"b": Activated(6)}, "b: an Activated, whose code does more than the layer: the rest isn't"),
    "batch statistics": ({"b": nn.BatchNorm2d(6, track_running_stats=False)}, "that keeps no statistics and goes by"),
    "parametrized": ({"a": parametrized()}, "with a parametrization of its weight, which would be lost"),
    "hooks": ({"a": hooked()}, "a: the model has a Conv2d there with forward hooks, which would be lost"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_that_is_not_what_was_fused_is_refused_and_the_model_left_alone(name: str, tmp_path: Path) -> None:
    layers: dict[str, nn.Module] = {"a": nn.Conv2d(4, 6, 3), "b": nn.BatchNorm2d(6)}
    changed, message = WRONG[name]
    out = fuse(filled(chain(**layers)), ["a", "b"], tmp_path)
    live = filled(chain(**{**layers, **changed}))
    before = copy.deepcopy(live)
    with pytest.raises(RefusedError) as caught:
        convtool.apply(live, out)
    assert message in str(caught.value)
    assert_unchanged(live, before)
    convtool.apply(live, out, check=False)
    assert set(live.state_dict()) == {"a.weight", "a.bias"}


def test_an_activation_in_the_midst_of_a_chain_is_refused_with_the_way_out(tmp_path: Path) -> None:
    layers: dict[str, nn.Module] = {"a": nn.Conv2d(4, 6, 3), "b": nn.BatchNorm2d(6), "c": nn.Conv2d(6, 5, 1)}
    model = filled(chain(**layers))
    live = filled(chain(**{**layers, "b": Norm(6, nn.ReLU())}))
    with pytest.raises(RefusedError, match=r"b: .* did\. Fuse a chain that ends with it$"):
        convtool.apply(copy.deepcopy(live), fuse(model, ["a", "b", "c"], tmp_path))
    expected = outputs(live)
    convtool.apply(live, fuse(live, ["a", "b"], tmp_path))
    assert relative_difference(expected, outputs(live)) < CLOSE
    live = filled(chain(**{**layers, "a": Doubled(4, 6, 3)}))
    with pytest.raises(RefusedError, match=r"a: .* did\. Leave the layer out when fusing$"):
        convtool.apply(live, fuse(model, ["a", "b"], tmp_path))


def test_a_layer_whose_border_differs_says_so(tmp_path: Path) -> None:
    model = filled(chain(a=nn.BatchNorm2d(4), b=nn.Conv2d(4, 3, 3, padding=(0, 1)), c=nn.ReLU()))
    with pytest.warns(UserWarning, match="^a differs from the layers that it was fused from in the first column and"):
        convtool.apply(copy.deepcopy(model), fuse(model, ["a", "b", "--allow-border"], tmp_path))
    patches = filled(chain(a=nn.Conv2d(4, 3, 2, stride=2, bias=False), b=nn.Conv2d(3, 4, 2, padding=1)))
    with pytest.warns(UserWarning, match="^a stands for the layers that it was fused from at input size 2,2 only"):
        convtool.apply(copy.deepcopy(patches), fuse(patches, ["a", "b", "--input-size", "2,2"], tmp_path))


def test_what_the_model_does_itself_would_be_done_twice(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 2), p=nn.AvgPool2d(2), b=nn.BatchNorm2d(6)))
    out = fuse(model, ["a", "avg_pool(2)", "b"], tmp_path)
    live = copy.deepcopy(model)
    with pytest.raises(RefusedError, match=r"a was fused with avg_pool\(2\), which the model's own code does"):
        convtool.apply(live, out)
    live.p = nn.Identity()
    convtool.apply(live, out, check=False)
    assert relative_difference(outputs(model), outputs(live)) < CLOSE


@pytest.mark.parametrize("between", [["scale(0.5)"], ["avg_pool(2)", "avg_pool(2)"]])
def test_what_the_models_code_does_is_named_as_it_was_written(between: list[str], tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 2), b=nn.BatchNorm2d(6)))
    out = fuse(model, ["a", *between, "b"], tmp_path)
    with pytest.raises(RefusedError, match=rf"^a was fused with {re.escape(between[0])}, which the model's own code"):
        convtool.apply(copy.deepcopy(model), out)


def test_a_tensor_that_the_models_code_multiplies_by_would_be_taken_twice(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 2), b=nn.BatchNorm2d(6)))
    model.register_parameter("s", nn.Parameter(torch.rand(6, dtype=torch.float64)))
    out = fuse(model, ["a", "scale(s)", "b"], tmp_path)
    with pytest.raises(RefusedError, match=r"a was fused with scale\(s\), which the model's own code does"):
        convtool.apply(copy.deepcopy(model), out)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(x) + x)
        return y


@pytest.mark.parametrize("name", ["b", "c"])
def test_a_value_that_the_model_adds_in_front_of_the_fused_layer_would_be_added_twice(
    name: str, tmp_path: Path
) -> None:
    model, recipe = filled(Skipping()), tmp_path / "r.toml"
    recipe.write_text(f'[[fuse]]\nname = "{name}"\nchain = [{{ sum = [["b"], ["identity()"]] }}, "c"]\n')
    before, out = save(model, tmp_path / "before.pt"), tmp_path / "after.pt"
    done("fuse", before, "--recipe", recipe, "-o", out, "--assume-defaults")
    with pytest.raises(RefusedError, match="was fused with the addition of its input, which the model's own code does"):
        convtool.apply(copy.deepcopy(model), out)


@pytest.mark.parametrize("options", [{}, {"everything": True}, {"batch_norms_only": True}])
def test_a_layer_behind_a_sum_with_what_it_reads_computes_the_same(options: dict[str, bool]) -> None:
    model = filled(Skipping())
    live = convtool.fuse_model(copy.deepcopy(model), (4, 5, 5), **options)
    assert relative_difference(outputs(model), outputs(live)) < CLOSE


def test_a_normalisation_behind_a_layer_is_the_models_own(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 2), b=nn.BatchNorm2d(6)))
    out = fuse(model, ["a", "normalize(mean=1)", "b"], tmp_path)
    with pytest.raises(RefusedError, match=r"a was fused with normalize\(mean=1\), which the model's own code does"):
        convtool.apply(copy.deepcopy(model), out)


def test_a_module_under_two_names_is_refused(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 4, 1), b=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1)))
    out = fuse(model, ["a", "b"], tmp_path)
    live = copy.deepcopy(model)
    live.c = live.a
    for check in (True, False):
        with pytest.raises(RefusedError, match="a and c are one module of the model; replacing it in one place would"):
            convtool.apply(live, out, check=check)
    assert live.get_submodule("a") is live.get_submodule("c")


def test_tensors_that_do_not_load_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6), c=nn.Conv2d(6, 2, 1)))
    out = fuse(model, ["a", "b"], tmp_path)
    others: list[tuple[dict[str, nn.Module], str]] = [
        ({"c": nn.Conv2d(6, 3, 1)}, r"c.bias is of shape \(2,\), expected \(3,\)"),
        ({"c": nn.Conv2d(6, 2, 1, bias=False)}, "the model has no c.bias"),
        ({"d": nn.Linear(2, 2)}, "the checkpoint lacks d.weight, d.bias"),
    ]
    for changed, message in others:
        live = filled(chain(**{**dict(copy.deepcopy(model).named_children()), **changed}))
        before = copy.deepcopy(live)
        with pytest.raises(InputError, match=f"does not load into the model: {message}"):
            convtool.apply(live, out)
        assert_unchanged(live, before)


def test_a_layer_that_the_model_does_not_have(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6)))
    out = fuse(model, ["a", "b"], tmp_path)
    with pytest.raises(UsageError, match="the model has no layer 'b', which the checkpoint's record names"):
        convtool.apply(chain(a=nn.Conv2d(4, 6, 3)), out)
    named = fuse(model, ["a", "b", "--name", "x.y"], tmp_path)
    live = copy.deepcopy(model)
    with pytest.raises(UsageError, match=r"the model has no module 'x', in which 'x\.y' is to stand"):
        convtool.apply(live, named)
    assert_unchanged(live, model)
    with pytest.raises(InputError, match="holds no convtool record; there is nothing to apply"):
        convtool.apply(live, tmp_path / "before.safetensors")


# --- the modules by themselves


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_size": (3,), "stride": 2, "padding": [(1, 2)]},
        {"kernel_size": (3, 2), "padding": [(0, 1), (2, 0)], "padding_mode": "replicate", "groups": 2},
        {"kernel_size": (2, 3, 2), "dilation": (1, 2, 1), "padding": 1},
        {"kernel_size": (3,), "stride": 3, "padding": [(2, 0)], "output_padding": 2, "transposed": True},
        {"kernel_size": (3, 4), "stride": (2, 3), "padding": [(0, 1), (2, 2)], "transposed": True, "groups": 2},
        {"kernel_size": (3, 2, 2), "stride": 2, "padding": (1, 0, 1), "output_padding": (1, 0, 1), "transposed": True},
    ],
)
def test_a_live_module_computes_what_the_layer_does(fields: dict[str, Any]) -> None:
    geometry = Geometry.of(**fields)
    weight = inputs(6, 4 // geometry.groups, *geometry.kernel_size)
    conv = Conv(weight, inputs(6, seed=1), geometry)
    x = inputs(2, 4, *(5, 7, 6)[: conv.spatial_axes])
    module = live_module(conv, conv.weight.dtype)
    module.load_state_dict({"weight": conv.torch_weight(), "bias": conv.bias})
    with torch.no_grad():
        assert relative_difference(forward(conv, x), module(x)) < CLOSE


def test_layers_that_torch_has_no_module_for() -> None:
    with pytest.raises(RefusedError, match="cannot make a live module of a layer of 4 spatial axes"):
        live_module(Conv(inputs(2, 2, 1, 1, 1, 1), None, Geometry.of((1, 1, 1, 1))), torch.float32)


def test_a_record_whose_fusions_have_each_others_names_is_damaged(tmp_path: Path) -> None:
    model = filled(chain(a=nn.Conv2d(4, 6, 1), b=nn.BatchNorm2d(6), c=nn.Conv2d(6, 5, 1), d=nn.BatchNorm2d(5)))
    out = fuse(model, ["a", "b"], tmp_path)
    with safe_open(out, "pt") as opened:
        record = json.loads(opened.metadata()["convtool"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    (one,) = record["fusions"]
    chained = {"chain": [{**one["sources"]["chain"][0], "name": "a"}, {**one["sources"]["chain"][1], "name": "d"}]}
    record["fusions"].append({**one, "name": "c", "sources": chained})
    save_file(tensors, out, {"convtool": json.dumps(record)})
    with pytest.raises(InputError, match="record is damaged"):
        convtool.apply(copy.deepcopy(model), out)
