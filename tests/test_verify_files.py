"""`convtool verify` of whole files that other programs fused: by a recipe, by the model, by running both networks.

`python tests/test_verify_files.py COUNT` verifies more of torch's own foldings than the suite does.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import cli
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        norm = (lambda *_, **__: nn.Identity()) if fused else nn.BatchNorm2d
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, 2, 1, bias=fused), norm(8)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            layers = {"conv1": nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=fused), "bn1": norm(16, eps=1e-3)}
            layers |= {"conv2": nn.Conv2d(16, 8, 1, bias=fused), "bn2": norm(8)}
            self.blocks.append(nn.ModuleDict(layers))
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        for block in self.blocks:
            y = block["bn1"](block["conv1"](x)).relu()
            x = x + block["bn2"](block["conv2"](y))
        return self.head(self.last(self.norm(x)).mean((2, 3)))

def fused():
    return Net(True)

def normed():
    net = Net()
    net.head = nn.utils.weight_norm(net.head)  # of which torch makes no copy
    return net

class Asking(Net):
    def forward(self, x):
        assert self.fused or isinstance(self.bn0, nn.BatchNorm2d)
        return super().forward(x)

    def __init__(self, fused=False):
        super().__init__(fused)
        self.fused = fused

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(True)
        self.net.stem = nn.Conv2d(3, 8, 5, 2, 2)

    def forward(self, x):
        return self.net(x)
"""
RECIPE = """
[[fuse]]
name = "stem"
chain = ["stem", "bn0"]
[[fuse]]
name = "{block}.conv1"
chain = ["{block}.conv1", "{block}.bn1"]
[[fuse]]
name = "{block}.conv2"
chain = ["{block}.conv2", "{block}.bn2"]
[geometry]
"stem" = { stride = 2, padding = 1 }
"*.conv1" = { stride = 1, padding = 1, dilation = 1, groups = 8, transposed = false }
"*.conv2" = { stride = 1, padding = 0, groups = 1, transposed = false }
"bn0" = { eps = 1e-5 }
"*.bn1" = { eps = 1e-3 }
"*.bn2" = { eps = 1e-5 }
"""
MODEL = "--model code.py:Net --model-input 3,16,18"
STATE = dict[str, Tensor]


@pytest.fixture(scope="module")
def states() -> tuple[STATE, STATE]:
    """What a model holds, and what it holds with all but one batch norm folded by torch."""
    torch.manual_seed(3)
    space: dict[str, type[nn.Module]] = {}
    exec(CODE, space)
    net, folded = space["Net"]().eval(), space["Net"](True).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.1, 3)  # type: ignore[arg-type]
    before = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    pairs = [("stem", "bn0"), *((f"blocks.{i}.conv{j}", f"blocks.{i}.bn{j}") for i in (0, 1) for j in (1, 2))]
    after = {name: before.get(name, tensor) for name, tensor in folded.state_dict().items()}
    for conv, norm in pairs:
        made: Any = fuse_conv_bn_eval(net.get_submodule(conv), net.get_submodule(norm))  # type: ignore[type-var, arg-type]
        after |= {f"{conv}.weight": made.weight.detach(), f"{conv}.bias": made.bias.detach()}
    return before, after


@pytest.fixture(autouse=True)
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: tuple[STATE, STATE]) -> Callable[..., None]:
    """Write the files, and give what writes AFTER with some of its tensors replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "fold.toml").write_text(RECIPE)
    torch.save(states[0], "net.pt")

    def after(**changed: Callable[[Tensor], Tensor]) -> None:
        names = {name.replace("__", "."): change for name, change in changed.items()}
        torch.save({name: names.get(name, Tensor.clone)(tensor) for name, tensor in states[1].items()}, "after.pt")

    after()
    return after


@pytest.mark.parametrize("how", ["--recipe fold.toml", MODEL])
def test_a_network_that_torch_folded_is_one_call(write: Callable[..., None], how: str) -> None:
    line = f"verify net.pt after.pt {how} --computed-in float32"
    found = cli(f"{line} --json")
    assert found.code == 0
    # The batch norm that is still there is no part of a pair, and is held bit for bit with the rest.
    assert {tuple(one["after"]) for one in found.document["fusions"]} == {
        ("stem",), *((f"blocks.{i}.conv{j}",) for i in (0, 1) for j in (1, 2)),
    }  # fmt: skip
    assert found.document["other_tensors"]["differing"] == {}
    for name in ("stem.bias", "blocks.1.conv1.weight", "last.weight", "norm.running_mean") if "recipe" in how else ():
        write(**{name.replace(".", "__"): lambda tensor: tensor * 1.001})
        assert cli(line).code == 1, name


def test_half_a_fold_and_a_fold_undone_elsewhere_are_told_apart(
    write: Callable[..., None], states: tuple[STATE, STATE]
) -> None:
    """Some layers folded and others left alone is as good a file; a batch norm taken out and folded nowhere isn't."""
    before, after = states
    names = [name for name in before if name.startswith(("blocks.1.conv2", "blocks.1.bn2"))]
    kept = {name: tensor for name, tensor in after.items() if not name.startswith("blocks.1.conv2")}
    torch.save(kept | {name: before[name] for name in names}, "after.pt")
    assert cli(f"verify net.pt after.pt {MODEL} --computed-in float32").code == 0
    torch.save(kept | {name: before[name] for name in names if "bn2" not in name}, "after.pt")
    assert cli("verify net.pt after.pt --recipe fold.toml --computed-in float32").code == 1
    # An identity in the batch norm's place, as some programs leave it, is a part of what stands for the pair.
    one, zero = torch.ones(8), torch.zeros(8)
    norm = {"weight": one, "bias": zero, "running_mean": zero, "running_var": one - 1e-5}
    torch.save(after | {f"bn0.{name}": tensor for name, tensor in norm.items()}, "after.pt")
    found = cli("verify net.pt after.pt --recipe fold.toml --computed-in float32 --json")
    assert found.code == 0
    assert found.document["fusions"][0]["after"] == ["stem", "bn0"]


def test_a_difference_that_lower_precision_explains_is_said_with_its_figure(write: Callable[..., None]) -> None:
    found = cli("verify net.pt after.pt --recipe fold.toml")
    assert found.code == 1
    line = next(text for text in found.out.splitlines() if "--computed-in float32" in text)
    assert line.startswith("stem, blocks.0.conv1, blocks.0.conv2 and 2 more: an error of up to 9.09 times the bound ")
    write(stem__weight=lambda tensor: tensor * 1.01)
    found = cli("verify net.pt after.pt --recipe fold.toml --json")
    assert all("stem" not in text for text in found.document["explained"])
    assert cli("verify net.pt after.pt --recipe fold.toml --computed-in float32 --json").document["explained"] == []


def test_running_both_networks_covers_what_no_pair_does(
    write: Callable[..., None], states: tuple[STATE, STATE]
) -> None:
    """A 3x3 kernel embedded in a 5x5 one, under other names: no chain of layers stands for another."""
    state = {f"net.{name}": tensor for name, tensor in states[1].items()}
    state["net.stem.weight"] = nn.functional.pad(state["net.stem.weight"], (1, 1, 1, 1))
    torch.save(state, "after.pt")
    line = f"verify net.pt after.pt {MODEL} --model-after code.py:Renamed"
    found = cli(line)
    assert found.code == 0
    assert "by random inputs" in found.out.splitlines()[-1]
    assert cli("verify net.pt after.pt --recipe fold.toml").code == 2  # whose layers aren't there
    torch.save(state | {"net.last.weight": state["net.last.weight"] * 1.001}, "after.pt")
    assert cli(line).code == 1
    torch.save(state | {"net.more.weight": torch.ones(2, 2)}, "after.pt")
    found = cli(line)
    assert (found.code, "no place for 'net.more.weight'" in found.err) == (2, True)


def test_a_network_that_no_longer_runs_once_it_is_edited_has_code_of_its_own() -> None:
    stated = "--set stem.stride=2 --set stem.padding=1 --eps 1e-5"
    assert cli(f"fuse net.pt stem bn0 {stated} -o f.pt").code == 0
    line = f"verify net.pt f.pt {MODEL.replace('Net', 'Asking')}"
    found = cli(line)
    assert found.code == 2
    assert found.message.endswith("; AFTER's own code goes by --model-after CODE")
    # ... which here is another form of the same class. A run of BEFORE that fails has another cause.
    after = "--model-after code.py:Asking --model-after-args"
    run = cli(f"""{line.replace("f.pt", "after.pt")} {after} '{{"fused": true}}' --computed-in float32""")
    assert (run.code, "the whole model, on inputs of 3,16,18: outputs are the same" in run.out) == (0, True)
    assert cli(f"""{line.replace("f.pt", "after.pt")} {after} '{{"fused": false}}'""").code == 2
    assert "--model-after" not in cli(line.replace("3,16,18", "4,16,18")).message


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_cannot_be_copied_is_built_twice(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(CODE, space)
    torch.save(space["normed"]().state_dict(), "old.pt")
    line = "--model code.py:normed --model-input 3,16,18"
    assert cli(f"fuse old.pt --auto {line} -o f.pt").code == 0
    assert cli(f"verify old.pt f.pt {line}").code == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_rounded_once_count_as_the_same(states: tuple[STATE, STATE], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    rounded = {key: value.to(dtype) if value.is_floating_point() else value for key, value in states[1].items()}
    torch.save(rounded, "after.pt")
    line = "verify net.pt after.pt --recipe fold.toml --computed-in float32"
    assert cli(line).code == 1
    found = cli(f"{line} --rounded-to {name}")
    assert found.code == 0
    assert f"rounded once to {name}" in found.out
    step = torch.tensor([1], dtype=torch.int16)
    one = rounded["last.weight"].clone()
    one.view(torch.int16).view(-1)[:1] += step
    torch.save(rounded | {"last.weight": one}, "after.pt")
    assert cli(f"{line} --rounded-to {name}").code == 1
    other = {torch.bfloat16: "float16", torch.float16: "bfloat16"}[dtype]
    assert cli(f"{line} --rounded-to {other}").code == 1


def test_what_is_claimed_on_the_command_line_replaces_the_record(states: tuple[STATE, STATE]) -> None:
    """A record that says that stem and bn0 were fused with another eps is not asked where a recipe says otherwise."""
    lines = "stem bn0 --set stem.stride=2 --set stem.padding=1 --set bn0.eps=0.5"
    assert cli(f"fuse net.pt {lines} -o f.pt").code == 0
    assert cli("verify net.pt f.pt").code == 0
    assert cli("verify net.pt f.pt --recipe fold.toml").code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model-after code.py:fused", "--model-after: goes with --model and --model-input"),
        (f"{MODEL} --model-after code.py:fused --only --before stem --after stem", "not with --only"),
        (f"{MODEL} --model-after-args 1", "--model-after-args: goes with --model-after"),
        ("--recipe nothing", "no recipe 'nothing'"),
        ("--rounded-to int8", "--rounded-to: expected one of"),
    ],
)
def test_options_that_go_with_nothing_are_usage_errors(options: str, message: str) -> None:
    found = cli(f"verify net.pt after.pt {options}")
    assert (found.code, message in found.err) == (2, True)


# --- no false alarm


FLOATS = ("float64", "float32", "bfloat16", "float16")


def folds(count: int, seed: int = 0) -> Iterator[tuple[str, nn.Module, nn.Module, Any, str]]:
    """Yield convolutions of every kind with a batch norm, what torch makes of the two, and the settings that say so."""
    chance = random.Random(seed)
    for number in range(count):
        torch.manual_seed(seed * 10**6 + number)
        name, by_hand = FLOATS[number % 4], chance.random() < 0.5
        kind = chance.choice(("plain", "grouped", "depthwise", "transposed", "wide", "line"))
        # torch's own function knows no groups of a transposed layer
        groups = {"grouped": 4, "depthwise": 8, "transposed": 2 if by_hand else 1}.get(kind, 1)
        inner, outer = (8, 2048) if kind == "wide" else (8, 16)
        make = {"transposed": nn.ConvTranspose2d, "line": nn.Conv1d}.get(kind, nn.Conv2d)
        conv: Any = make(inner, outer, chance.choice((1, 3)), groups=groups, bias=chance.random() < 0.5)
        norm: Any = (nn.BatchNorm1d if kind == "line" else nn.BatchNorm2d)(outer, eps=chance.choice((1e-5, 1e-3)))
        spread = chance.choice((1.0, 1e4, 1e-4))
        with torch.no_grad():
            norm.running_mean.normal_(0, spread**0.5)
            norm.running_var.copy_(torch.rand(outer) * spread).mul_(torch.rand(outer) > 0.05)  # some are 0
            norm.weight.normal_()
            norm.bias.normal_()
        dtype = getattr(torch, name)
        conv, norm = conv.to(dtype).eval(), norm.to(dtype).eval()
        if not by_hand:
            made = fuse_conv_bn_eval(conv, norm, transpose=kind == "transposed")
        else:  # by hand, as many scripts have it
            made = copy.deepcopy(conv)
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            shape = (1, -1, 1, 1) if kind == "transposed" else (-1, *(1,) * (conv.weight.dim() - 1))
            each = scale.reshape(groups, -1).repeat_interleave(inner // groups, 0) if kind == "transposed" else scale
            each = each.reshape(inner, -1, 1, 1) if kind == "transposed" else each.reshape(shape)
            made.weight = nn.Parameter(conv.weight * each)
            bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
            made.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
        if all(bool(tensor.isfinite().all()) for tensor in made.state_dict().values()):
            said = f"--set conv.groups={groups} --set bn.eps={norm.eps} --set conv.transposed={kind == 'transposed'}"
            yield name, conv, norm, made, f"{said.lower()} --set conv.stride=1 --set conv.padding=0"


def false_alarms(folder: Path, count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Verify what torch folded; return how many were, and what was said of those that aren't equivalent."""
    number, alarms = 0, []
    for dtype, conv, norm, made, said in folds(count, seed):
        state = {f"conv.{name}": tensor for name, tensor in conv.state_dict().items()}
        torch.save(state | {f"bn.{name}": tensor for name, tensor in norm.state_dict().items()}, folder / "a.pt")
        torch.save({f"conv.{name}": tensor for name, tensor in made.state_dict().items()}, folder / "b.pt")
        files = f"{folder / 'a.pt'} {folder / 'b.pt'}"
        found = cli(f"verify {files} --before conv,bn --after conv {said} --trials 1 --computed-in {dtype}")
        number += 1
        alarms += [f"{dtype} {said} {found.out}{found.err}"] * bool(found.code)
    return number, alarms


def test_what_torch_folds_is_no_false_alarm(tmp_path: Path) -> None:
    number, alarms = false_alarms(tmp_path, 24)
    assert alarms == []
    assert number > 18


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        tried, wrong = false_alarms(Path(place), int(sys.argv[1]), seed=1)
        print(f"{len(wrong)} false alarms of {tried}", *wrong[:5], sep="\n")
