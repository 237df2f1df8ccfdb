"""A kind of layer that this file alone defines is listed, asked about, fused, verified, found, put in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from live import done, error, filled, load, run, save
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import convtool
from convtool.core.conv import Conv, pointwise
from convtool.core.fields import POSITIVE, Fields
from convtool.core.tree import leaves
from convtool.errors import RefusedError
from convtool.kinds import KINDS
from convtool.kinds.kind import Kind, Shapes, TensorInfo, Tensors


class Gain(nn.Module):
    """y = x * gain ** power, channel by channel."""

    def __init__(self, channels: int, power: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain**self.power).reshape(-1, 1, 1)


class GainKind(Kind):
    name = "gain"
    tensors = ("gain",)
    fields = {"power": POSITIVE}  # noqa: RUF012
    defaults = {"power": 1.0}  # noqa: RUF012
    spare = True
    modules = (f"{Gain.__module__}.Gain",)

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        return tensors.keys() == {"gain"}

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        return shapes["gain"][0]

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return shapes["gain"][0]

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        factors = tensors["gain"].to(torch.float64) ** fields.get("power", 1.0)
        return Conv(factors.reshape(-1, 1, *(1,) * axes), None, pointwise(axes, groups=len(factors)))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    KINDS.append(GainKind())
    yield
    KINDS.pop()


def network() -> nn.Sequential:
    return filled(nn.Sequential(nn.Conv2d(3, 4, (3, 2), bias=False), Gain(4, 2.0), nn.ReLU()))


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return save(network(), tmp_path / "net.safetensors")


def test_it_is_listed_with_its_fields(before: Path) -> None:
    layers = {layer["name"]: layer for layer in done("inspect", before, "--set", "1.power=2")["layers"]}
    assert {name: layer["kind"] for name, layer in layers.items()} == {"0": "conv", "1": "gain"}
    assert layers["1"]["geometry"] == {"power": 2.0}
    assert error("inspect", before, "--set", "1.power=low")[1].startswith("--set 1.power=low: power: expected a number")


def test_its_fields_are_asked_for_and_it_is_fused_recorded_and_verified(before: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    code, message = error("fuse", before, "0", "1", "-o", out)
    assert code == 2
    assert message.startswith("nothing states what the result depends on: for the numbers, power of 1; ")
    assert message.endswith("--set 1.power=VALUE")
    assert "1: power 1" in done("fuse", before, "0", "1", "-o", out, "--assume", "power")["fusions"][0]["assumed"]
    (fusion,) = done("fuse", before, "0", "1", "--set", "1.power=2", "-o", out, "--force")["fusions"]
    assert fusion["sources"]["chain"][1] == {
        "name": "1",
        "kind": "gain",
        "fields": {"power": 2.0},
        "assumed": [],
    }
    state = load(before)
    expected = state["0.weight"] * state["1.gain"].reshape(-1, 1, 1, 1) ** 2
    torch.testing.assert_close(load(out)["0.weight"], expected, rtol=1e-14, atol=0)
    assert done("verify", before, out)["equivalent"]
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    state = load(out)
    state["0.weight"][1, 2, 0, 1] *= 1.001
    save_file(state, out, metadata)
    assert not run("verify", before, out)[1]["equivalent"]


def test_a_recipe_can_ask_for_it(before: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "gains.toml"
    recipe.write_text('[[fuse]]\nname = "0"\nchain = ["0", "1@gain"]\n[geometry]\n"1" = { power = 2 }\n')
    assert done("fuse", before, "--recipe", recipe, "-o", tmp_path / "out.safetensors")["fusions"][0]["layers"] == [
        "0",
        "1",
    ]


def test_it_is_found_in_a_live_model_and_put_in(before: Path, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    (found,) = convtool.plan(network(), (3, 6, 7)).fusions
    assert [leaf.name for leaf in leaves(found.tree)] == ["0", "1"]
    fused = convtool.fuse_model(network(), (3, 6, 7))
    assert isinstance(fused.get_submodule("1"), nn.Identity)
    torch.testing.assert_close(fused(x), network()(x), rtol=1e-13, atol=1e-13)
    out = tmp_path / "out.safetensors"
    done("fuse", before, "0", "1", "--set", "1.power=2", "-o", out)
    torch.testing.assert_close(convtool.apply(network(), out)(x), network()(x), rtol=1e-13, atol=1e-13)
    done("fuse", before, "0", "1", "--set", "1.power=3", "-o", out, "--force")
    with pytest.raises(RefusedError, match="1: power 3 was fused, and the model has power 2"):
        convtool.apply(network(), out)


class Negative(Kind):
    """A kind without tensors, which a model's code does by a function."""

    name = "negative"
    written = True
    operations = ("aten.neg.default",)

    def of_operation(
        self, name: str, arguments: Mapping[str, Any], takes: tuple[int, ...], gives: tuple[int, ...]
    ) -> Fields | None:
        return {}

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        ones = torch.ones((channels or 0, 1, *(1,) * axes), dtype=torch.float64)
        return Conv(-ones, None, pointwise(axes, groups=channels or 0))


class Negating(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, 4, (3, 2)), nn.Conv2d(4, 2, (1, 3)), how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.how(self.a(x)))
        return y


def test_an_operation_between_layers_is_a_layer_once_a_kind_says_that_it_is_one(tmp_path: Path) -> None:
    assert convtool.plan(Negating(torch.neg), (3, 6, 7)).fusions == ()
    KINDS.append(Negative())
    try:
        assert convtool.plan(Negating(torch.abs), (3, 6, 7)).fusions == ()
        for everything in (False, True):
            (alone,) = convtool.plan(Negating(torch.neg), (3, 6, 7), everything=everything).left_alone
            assert alone.reason == "negative() in it is done by the model's own code, which goes on to do it"
        net, out = filled(Negating(torch.neg)), tmp_path / "out.safetensors"
        stated = ("--assume-defaults",)
        done("fuse", save(net, tmp_path / "net.safetensors"), "a", "negative()", "b", *stated, "-o", out)
        x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
        fused = convtool.forward(convtool.open_checkpoint(out).conv("a", stride=1, padding=0), x)
        torch.testing.assert_close(fused, net(x), rtol=1e-13, atol=1e-13)
        with pytest.raises(RefusedError, match=r"a was fused with negative\(\), which the model's own code does"):
            convtool.apply(net, out)
    finally:
        KINDS.pop()
