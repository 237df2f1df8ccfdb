"""What nobody states: asked for where a result depends on it, left out where not, and never taken for known."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live import done, error, filled, load, run, save
from shell import cli
from torch import Tensor, nn

import convtool
from convtool.core.fields import field_text
from convtool.errors import UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(*layers: nn.Module, name: str = "net.pt") -> nn.Sequential:
    model = filled(nn.Sequential(*layers))
    save(model, Path(name))
    return model


# --- eps


def test_eps_is_asked_for_with_what_hangs_on_it_and_never_taken_from_torch() -> None:
    model = saved(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4, eps=1e-3))
    model.get_buffer("1.running_var").fill_(0.004)
    save(model, Path("net.pt"))
    code, message = error("fuse", "net.pt", "0", "1", "-o", "out.pt")
    apart = 100 * (((0.004 + 1e-3) / (0.004 + 1e-5)) ** 0.5 - 1)
    assert code == 2
    assert f"eps of 1 (1e-05 or 0.001: weights up to {apart:.2g}% apart)" in message
    assert message.endswith(" --eps VALUE")
    assert not Path("out.pt").exists()
    done("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-3")
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    state = load(Path("out.pt"))
    with torch.no_grad():
        torch.testing.assert_close(nn.functional.conv2d(x, state["0.weight"], state["0.bias"], 2, 1), model(x))


def test_a_recipe_that_names_no_eps_asks_for_it_with_quiet_too() -> None:
    saved(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3))
    quiet = cli("fuse net.pt --recipe conv-bn-torchvision -o out.pt -q")
    assert (quiet.code, quiet.out) == (2, "")
    assert "eps of 1" in quiet.message


def test_eps_overrules_nothing() -> None:
    saved(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    code, message = error("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-5", "--set", "1.eps=1e-3")
    assert code == 2
    assert "1: eps is 0.001 by --set, and 1e-05 by --eps" in message


def test_a_recipe_that_asks_for_a_stride_gets_no_made_up_one() -> None:
    saved(nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 4, 1))
    Path("r.toml").write_text('[[fuse]]\nname = "1"\nchain = ["avg_pool(2; stride=stride(0))", "1"]\n')
    code, message = error("fuse", "net.pt", "--recipe", "r.toml", "-o", "out.pt", "--assume-defaults")
    assert (code, message.endswith("--set 0.stride=VALUE")) == (2, True)


def test_what_is_to_be_stated_holds_no_value_that_could_be_pasted() -> None:
    saved(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3))
    assert error("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "VALUE")[0] == 2
    assert error("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-3", "--set", "0.padding=VALUE")[0] == 2


def test_a_matrix_of_a_layer_of_which_nothing_is_stated_says_so() -> None:
    saved(nn.Conv2d(4, 4, 3, 2, 1))
    lines = cli("toeplitz net.pt 0 --input-size 5,6 -o m.npz").out.splitlines()
    assert "  by default: padding 0, stride 1, dilation 1, not transposed, groups 1" in lines


# --- an assumption stays one


def test_what_was_assumed_is_said_by_every_later_command() -> None:
    saved(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    made = cli("fuse net.pt 0 1 -o one.pt --assume eps -q")
    assert made.code == 0
    assert made.out.splitlines()[0] == "assumed: 1: eps 1e-05"
    said = "1: eps 1e-05 (when 0 was made)"
    stated = "--set 0.stride=1 --set 0.padding=0 --set 0.dilation=1 --set 0.groups=1 --set 2.padding=0"
    for line in (
        f"fuse one.pt 0 2 -o two.pt {stated}",
        f"toeplitz one.pt 0 --input-size 5,6 -o t.npz {stated}",
        f"spectrum one.pt 0 --input-size 5,6 {stated}",
        "unfold one.pt 0 -o u.npz --set 0.groups=1",
        "inspect one.pt",
    ):
        assert "1: eps 1e-05" in cli(line.replace("--set 2.padding=0", "") if "fuse" not in line else line).out, line
    assert said in done("toeplitz", "one.pt", "0", "--input-size", "5,6", "-o", "v.npz", *stated.split()[:8])["assumed"]
    assert "assumed: 1: eps 1e-05" in cli("verify net.pt one.pt").out
    assert "assumed: 1: eps 1e-05" in cli(f"verify one.pt t.npz {stated.replace('--set 2.padding=0', '')}").out
    assert "\n  1: assumed eps 1e-05\n" in cli("verify net.pt one.pt").out
    assert "1: eps 1e-05" in cli("verify net.pt two.pt").out
    assert "1: eps 1e-05" in cli("inspect two.pt").out  # which was made of what was made with it


def test_a_fused_layer_of_unknown_padding_is_no_layer_without_padding() -> None:
    saved(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
    (fusion,) = done("fuse", "net.pt", "0", "1", "-o", "one.pt", "--eps", "1e-5")["fusions"]
    assert not {"stride", "padding", "dilation"} & fusion["fields"].keys()
    code, message = error("toeplitz", "one.pt", "0", "--input-size", "32,32", "-o", "t.npz")
    assert code == 2
    assert "depends on: for the matrix, padding of 0, stride of 0" in message


# --- where nothing depends on it


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 6, (3, 1), padding=(2, 0), bias=False)]
)
def test_a_convolution_and_its_batch_norm_are_fused_and_the_edit_says_only_what_changes(layer: nn.Conv2d) -> None:
    saved(layer, nn.BatchNorm2d(layer.out_channels))
    (fusion,) = done("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-5")["fusions"]
    assert fusion["edits"] == ([] if layer.bias is not None else ["0: add a bias"]) + [
        "model[1] = nn.Identity()  # but for an activation inside of it, which stays"
    ]
    assert run("verify", "net.pt", "out.pt")[0] == 0


def test_nothing_is_recorded_of_a_layer_of_which_nothing_is_known() -> None:
    saved(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12))  # which may be depthwise, and transposed
    (fusion,) = done("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-5")["fusions"]
    assert (fusion["fields"], fusion["fields_assumed"], fusion["assumed"]) == ({}, [], [])


def test_where_geometry_is_stated_in_full_so_is_the_edit() -> None:
    layer = nn.Conv2d(4, 4, 13, 2, 6, groups=4, bias=False)
    saved(layer, nn.BatchNorm2d(4))
    stated = [word for field in ("stride=2", "padding=6", "dilation=1", "groups=4") for word in ("--set", f"0.{field}")]
    stated += ["--set", "0.padding_mode=zeros", "--set", "0.transposed=false"]
    (fusion,) = done("fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-5", *stated)["fusions"]
    assert fusion["edits"][0] == "model[0] = nn.Conv2d(4, 4, 13, stride=2, padding=6, groups=4)"


def test_branches_share_their_stride_and_an_identity_makes_it_1() -> None:
    model = filled(nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)}))
    save(model, Path("net.pt"))
    geometry = '\n[geometry]\n"a" = { padding = 1, dilation = 1 }\n"b" = { padding = 0 }\n'
    Path("two.toml").write_text('[[fuse]]\nname = "c"\nsum = ["a", "b"]' + geometry)
    Path("three.toml").write_text('[[fuse]]\nname = "c"\nsum = ["a", "b", "identity()"]' + geometry)
    (two,) = done("fuse", "net.pt", "--recipe", "two.toml", "-o", "two.pt")["fusions"]
    (three,) = done("fuse", "net.pt", "--recipe", "three.toml", "-o", "three.pt")["fusions"]
    assert "stride" not in two["fields"]
    assert three["fields"]["stride"] == [1, 1]
    assert all(run("verify", "net.pt", f"{name}.pt")[0] == 0 for name in ("two", "three"))


# --- sources that contradict each other


def test_two_patterns_of_one_source_are_an_error_and_a_name_is_more_than_a_pattern() -> None:
    saved(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    words = ["fuse", "net.pt", "0", "1", "-o", "out.pt", "--eps", "1e-5", "--set", "*.stride=1"]
    code, message = error(*words, "--set", "[0].stride=2")
    assert (code, "'*' and '[0]' both fit 0, and say stride 1 and 2" in message) == (2, True)
    (fusion,) = done(*words, "--set", "0.stride=2")["fusions"]
    assert fusion["fields"]["stride"] == [2, 2]


def test_what_is_recorded_as_stated_is_overruled_by_set_alone_and_that_is_said() -> None:
    saved(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    done("fuse", "net.pt", "0", "1", "-o", "one.pt", "--eps", "1e-5", "--set", "0.stride=2")
    Path("r.toml").write_text('[[fuse]]\nname = "0"\nchain = ["0", "2"]\n[geometry]\n"0" = { stride = 1 }\n')
    code, message = error("fuse", "one.pt", "--recipe", "r.toml", "-o", "two.pt")
    assert (code, "0: stride is 2 by the record of one.pt, and 1 by " in message) == (2, True)
    words = [
        "fuse",
        "one.pt",
        "0",
        "2",
        "-o",
        "two.pt",
        "--set",
        "0.stride=1",
        "--set",
        "2.padding=0",
        "--set",
        "0.groups=1",
    ]
    (fusion,) = done(*words)["fusions"]
    assert fusion["overruled"] == ["0: stride 1, and not 2 as the record of one.pt has it"]


# --- the order of a chain


def test_a_chain_against_the_order_of_the_file_is_remarked() -> None:
    saved(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), *(nn.Linear(1, 1) for _ in range(9)))
    order = "0 comes before 1 in the file or the model's code, and so perhaps in its run"
    assert order in cli("fuse net.pt 1 0 -o out.pt --eps 1e-5 --set 0.padding=0").err
    assert order not in cli("fuse net.pt 0 1 -o out.pt --eps 1e-5 -f").err


NETWORK = """
import torch.nn as nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.c = nn.Conv2d(3, 3, 1)
    def forward(self, x):
        return self.c(self.b((self.n(self.a(x)) + x).relu()))
"""


def test_a_chain_is_held_against_the_models_data_flow() -> None:
    Path("net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    save(filled(space["Net"]()), Path("net.pt"))
    words = ["--model", "net.py:Net", "--model-input", "3,6,5", "-o", "out.pt", "--force"]
    code, message = error("fuse", "net.pt", "a", "b", *words)
    assert code == 4
    assert "between a and b it has n, an addition, aten.relu" in message
    assert error("fuse", "net.pt", "b", "a", *words)[0] == 4
    done("fuse", "net.pt", "a", "n", *words)
    done("fuse", "net.pt", "b", "c", *words)


# --- Python


def test_python_takes_the_same_fields_and_asks_for_the_same() -> None:
    model = saved(nn.Conv2d(3, 4, 3, padding="valid"), nn.BatchNorm2d(4))
    opened = convtool.open_checkpoint("net.pt")
    with pytest.raises(UsageError, match=r"nobody states its eps; pass eps=\.\.\."):
        opened.conv("1")
    assert opened.conv("0", padding="valid").geometry.padding == ((0, 0), (0, 0))
    assert opened.conv("0", padding=((0, 1), (2, 2)), stride=(2, 1)).geometry.padding == ((0, 1), (2, 2))
    done("fuse", "net.pt", "0", "1", "-o", "one.pt", "--eps", "1e-5")
    with pytest.raises(UsageError, match="nobody states its stride, padding, dilation, groups"):
        convtool.open_checkpoint("one.pt").conv("0")
    made = convtool.open_checkpoint("one.pt").conv("0", stride=1, padding=0, dilation=1, groups=1)
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(convtool.forward(made, x), model(x))


@pytest.mark.parametrize("fields", [{"stride": (2, 1), "dilation": 1}, {"stride": 1, "dilation": (2, 1)}])
def test_an_output_padding_that_one_axis_alone_has_room_for_is_not_taken_for_known(fields: dict[str, Any]) -> None:
    saved(nn.Conv2d(2, 2, (1, 2), bias=False), nn.ConvTranspose2d(2, 3, (1, 1), output_padding=(1, 0), **fields))
    said: dict[str, Any] = {"0.stride": 1, "0.padding": 0, "0.dilation": 1, "0.groups": 1}
    said |= {"1.transposed": "true", "1.padding": 0, "1.groups": 1}
    said |= {f"1.{name}": field_text(value) for name, value in fields.items()}
    words = (word for name, value in said.items() for word in ("--set", f"{name}={value}"))
    (fusion,) = done("fuse", "net.pt", "0", "1", "-o", "out.pt", *words)["fusions"]
    # Where the axis strides, the fused layer has the same output padding; where it doesn't, a larger kernel.
    assert "output_padding" not in fusion["fields"] or fusion["fields_assumed"] == ["output_padding"]
    assert any("output_padding" in text for text in fusion["assumed"]) == (fields["stride"] == 1)


def test_a_stated_padding_mode_is_kept_where_nobody_states_the_padding() -> None:
    model = saved(nn.Conv2d(2, 3, (1, 2), padding=(0, 1), padding_mode="circular"), nn.BatchNorm2d(3))
    said = ("--set", "0.padding_mode=circular", "--set", "0.groups=1", "--eps", "1e-5")
    assert done("fuse", "net.pt", "0", "1", "-o", "out.pt", *said)["fusions"][0]["fields"]["padding_mode"] == "circular"
    live = convtool.apply(copy.deepcopy(model), "out.pt")
    assert close(live, model, 2)


def test_a_padding_mode_that_comes_of_a_later_layer_is_an_edit() -> None:
    saved(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular", bias=False))
    said = ("0.stride=1", "0.padding=0", "0.groups=1", "1.padding=1", "1.padding_mode=circular", "1.groups=1")
    made = done("fuse", "net.pt", "0", "1", "-o", "out.pt", *(word for text in said for word in ("--set", text)))
    assert "padding 1, padding_mode circular" in made["fusions"][0]["edits"][0]


# --- random chains of which little is stated


def a_layer(dice: random.Random, channels: int) -> tuple[nn.Module, int]:
    """A layer for that many channels, of any geometry, and how many it gives."""
    kind = dice.choice(["conv", "conv", "depthwise", "grouped", "transposed", "norm", "norm"])
    if kind == "norm":
        return nn.BatchNorm2d(channels, eps=dice.choice([1e-5, 1e-3, 0.1])), channels
    kernel = (dice.choice([1, 1, 2, 3]), dice.choice([1, 2, 3]))
    values = {"stride": (1, 1, 2), "padding": (0, 0, 1), "dilation": (1, 1, 2)}
    how: dict[str, Any] = {name: (dice.choice(some), dice.choice(some)) for name, some in values.items()}
    how["bias"] = dice.random() < 0.5
    if kind == "transposed":
        how["output_padding"] = tuple(map(dice.randrange, map(max, how["stride"], how["dilation"])))
        return nn.ConvTranspose2d(channels, 4, kernel, **how), 4
    if kind == "depthwise":
        return nn.Conv2d(channels, channels, kernel, groups=channels, **how), channels
    mode: Any = dice.choice(["zeros", "zeros", "zeros", "circular"])
    groups = 2 if kind == "grouped" and channels % 2 == 0 else 1
    return nn.Conv2d(channels, 4, kernel, groups=groups, padding_mode=mode, **how), 4


def some_fields(dice: random.Random, name: str, layer: nn.Module) -> list[str]:
    """Options that state some of a layer's fields as they are, and eps always."""
    often, known = dice.choice([0.0, 0.6, 0.9, 1.0]), convtool.geometry_of(nn.Sequential(layer))["0"]
    said = {key: value for key, value in known.items() if key == "eps" or dice.random() < often}
    return [word for key, value in said.items() for word in ("--set", f"{name}.{key}={field_text(value)}")]


def close(live: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], channels: int) -> bool:
    for size in ((12, 13), (15, 11)):
        x = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            one, other = live(x), expected(x)
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-9, atol=1e-9):
            return False
    return True


@pytest.mark.parametrize("seed", range(60))
def test_no_wrong_number_comes_of_what_nobody_stated(seed: int) -> None:
    """Whatever is fused with some fields stated, and eps, is what the modules compute, or says what it assumed."""
    dice = random.Random(seed)
    channels = first = dice.choice([2, 4])
    layers: list[nn.Module] = []
    for _ in range(dice.choice([2, 2, 3])):
        layer, channels = a_layer(dice, channels)
        layers.append(layer)
    model = saved(*layers)
    names = [str(n) for n in range(len(layers))]
    stated = [word for name, layer in zip(names, layers, strict=True) for word in some_fields(dice, name, layer)]
    code, document = run("fuse", "net.pt", *names, "-o", "out.pt", *stated)
    if code or document["fusions"][0]["assumed"]:
        return
    live = saved(*layers)
    assert run("verify", "net.pt", "out.pt")[0] == 0
    try:
        convtool.apply(live, "out.pt")
    except convtool.RefusedError:
        return  # torch has no module of that form
    assert close(live, model, first), (layers, document)
