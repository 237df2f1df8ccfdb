"""Batch norms behind concatenations: each of the layers before one takes in its channels, and none is lost."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from live import assert_same_outputs, filled, run, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convtool
from convtool.core.tree import leaves
from convtool.graph.planned import Plan


class Beside(nn.Module):
    """Branches side by side, and a batch norm of all of them behind: YOLOv5's old BottleneckCSP has it so."""

    def __init__(self, *branches: nn.Module, norm: nn.Module, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.branches, self.norm, self.behind = nn.ModuleList(branches), norm, behind or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        whole: Tensor = self.behind(self.norm(torch.cat([branch(x) for branch in self.branches], 1)))
        return whole


def two(**how: Any) -> Beside:
    """Two branches on 6 channels: one to 4, in groups of two, and one to 6, depthwise."""
    branches = nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=6, bias=False)
    return filled(Beside(*branches, **{"norm": nn.BatchNorm2d(10), **how}))


def planned(model: nn.Module, *size: int) -> Plan:
    """Return the plan of a model that, carried out, computes the same."""
    plan = convtool.plan(model, size)
    assert_same_outputs(model, convtool.fuse_model(copy.deepcopy(model), planned=plan), [(2, *size)])
    return plan


def trees(plan: Plan) -> list[list[str]]:
    return [[leaf.name for leaf in leaves(one.tree)] for one in plan.fusions]


def test_a_batch_norm_goes_into_the_layers_side_by_side_before_it_each_of_which_keeps_its_groups() -> None:
    plan = planned(two(), 6, 5, 7)
    assert trees(plan) == [
        ["branches.0", "place(0:4; of=10)", "norm", "select(0:4)"],
        ["branches.1", "place(4:10; of=10)", "norm", "select(4:10)"],
    ]
    assert [one.fused.geometry.groups for one in plan.fusions] == [2, 6]
    # 5*7 positions of a batch norm of 10 channels are all that is saved.
    assert plan.total.multiply_adds - plan.total_after.multiply_adds == 350
    assert not plan.left_alone


@pytest.mark.parametrize("seed", range(8))
def test_any_layers_side_by_side_take_a_batch_norm_in(seed: int) -> None:
    generator = random.Random(seed)
    axes = seed % 3 + 1
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    branches, count = list[nn.Module](), 0
    for _ in range(generator.randint(2, 4)):
        groups, width = generator.choice((1, 2, 4)), generator.randint(1, 3)
        kernel = tuple(generator.choice((1, 3)) for _ in range(axes))
        last = conv(4, width * groups, kernel, padding=[k // 2 for k in kernel], groups=groups, bias=bool(width % 2))
        # Two layers that are one anyway, and one behind something that isn't linear.
        first = generator.choice((nn.Identity(), norm(4), nn.Sequential(conv(4, 4, 1), nn.ReLU())))
        branches.append(nn.Sequential(first, last))
        count += width * groups
    model = filled(Beside(*branches, norm=norm(count), behind=nn.Sequential(nn.Dropout(), norm(count), nn.Tanh())))
    plan = planned(model, 4, *(5, 3, 4)[:axes])
    assert not any("norm" in one.layers or "behind.1" in one.layers for one in plan.left_alone)
    assert sum("behind.1" in names for names in trees(plan)) == len(branches)


def test_what_cannot_be_shared_by_all_is_shared_by_none() -> None:
    plan = planned(two(norm=nn.Sequential(nn.Identity(), nn.BatchNorm2d(10))), 6, 5, 7)  # copies change nothing
    assert len(plan.fusions) == 2
    relu = two()
    relu.branches[1] = nn.Sequential(relu.branches[1], nn.ReLU())
    other = two()
    other.branches[1] = filled(nn.BatchNorm2d(6))  # no layer that could take the other in
    for model in (relu, other):
        plan = planned(model, 6, 5, 7)
        assert not plan.fusions
        assert {name for one in plan.left_alone for name in one.layers} >= {"norm"}


class Nested(nn.Module):
    """Three branches, two of which are put side by side first, and a batch norm of all."""

    def __init__(self, *, first: bool = False, axis: int = 1, read: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1)
        self.norm, self.inner = nn.BatchNorm2d(7 if axis == 2 else 11), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.first, self.axis, self.read = first, axis, read

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        pair = self.inner(torch.cat([self.a(x), self.b(x)], self.axis))
        last = self.c(torch.cat([x, x], 2) if self.axis == 2 else x)
        whole: Tensor = self.norm(torch.cat([last, pair] if self.first else [pair, last], 1)).relu()
        return whole + pair.sum() if self.read else whole


@pytest.mark.parametrize("first", [False, True])
def test_a_concatenation_in_another_is_one_of_all(first: bool) -> None:
    plan = planned(filled(Nested(first=first)), 6, 5, 7)
    starts = {"a": 3, "b": 7, "c": 0} if first else {"a": 0, "b": 4, "c": 8}
    counts = {"a": 4, "b": 4, "c": 3}
    assert trees(plan) == [
        [name, f"place({start}:{start + counts[name]}; of=11)", "norm", f"select({start}:{start + counts[name]})"]
        for name, start in starts.items()
    ]
    assert not plan.left_alone


@pytest.mark.parametrize("how", [{"axis": 2}, {"read": True}, {"norm": True}])
def test_of_a_concatenation_that_is_something_else_as_well_nothing_is_shared(how: dict[str, Any]) -> None:
    plan = planned(filled(Nested(**how)), 6, 5, 7)
    assert not any("norm" in tree for tree in trees(plan))
    (reason,) = {one.reason for one in plan.left_alone if "norm" in one.layers}
    inner = "not everything that is put side by side before norm could take it in"
    assert reason == (inner if "norm" in how else "what it reads is made by cat")


def test_where_not_all_can_share_it_a_layer_behind_takes_it_in() -> None:
    model = two(behind=nn.Conv2d(10, 3, 1))
    assert trees(planned(filled(model), 6, 5, 7))[0] == ["branches.0", "place(0:4; of=10)", "norm", "select(0:4)"]
    model.branches[1] = nn.Sequential(model.branches[1], nn.ReLU())
    assert trees(planned(filled(model), 6, 5, 7)) == [["norm", "behind"]]


def fused(folder: Path, *words: object) -> tuple[int, dict[str, Any]]:
    model = two()
    path = save(model.float(), folder / "net.safetensors")
    (folder / "plan.toml").write_text(convtool.plan(model, (6, 5, 7)).recipe())
    return run("fuse", path, *(words or ("--recipe", folder / "plan.toml")), "-o", folder / "fused.safetensors")


def test_fused_verified_loaded(tmp_path: Path) -> None:
    code, document = fused(tmp_path, "--recipe", tmp_path / "plan.toml", "--loader", tmp_path / "load.py")
    assert code == 0, document
    code, document = run("verify", tmp_path / "net.safetensors", tmp_path / "fused.safetensors")
    assert (code, document["other_tensors"]["differing"]) == (0, {})
    x = torch.randn(2, 6, 5, 7)
    expected = two().float()(x)
    scope: dict[str, Any] = {"__file__": str(tmp_path / "load.py")}
    exec((tmp_path / "load.py").read_text(), scope)
    for model in (scope["load"](two().float()), convtool.apply(two().float(), tmp_path / "fused.safetensors")):
        assert torch.allclose(model.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_one_part_alone_is_refused_and_no_verdict_passes_it(tmp_path: Path) -> None:
    chain = ["branches.0", "place(0:4; of=10)", "norm", "select(0:4)"]
    said = ["--eps", "1e-5", "--set", "branches.0.padding=1", "--set", "branches.0.groups=2", "--assume-defaults"]
    code, document = fused(tmp_path, *chain, *said)
    assert code == 4
    assert "not each of its channels goes into exactly one" in document["error"]["message"]
    assert fused(tmp_path)[0] == 0
    pair = ["--before", ",".join(chain), "--after", "branches.0", "--eps", "1e-5", *said[2:]]
    code, document = run("verify", tmp_path / "net.safetensors", tmp_path / "fused.safetensors", *pair)
    assert code == 1
    assert document["other_tensors"]["differing"]["norm.weight"] == "missing"


def test_a_record_of_one_part_alone_is_damaged(tmp_path: Path) -> None:
    assert fused(tmp_path)[0] == 0
    path = tmp_path / "fused.safetensors"
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["convtool"])
    record["fusions"].pop()
    save_file(load_file(path), path, {"convtool": json.dumps(record)})
    code, document = run("verify", tmp_path / "net.safetensors", path)
    assert code == 3
    assert "not each channel of 'norm' goes into one fusion" in document["error"]["message"]


def test_an_exported_program_says_the_same(tmp_path: Path) -> None:
    program = torch.export.export(two().float(), (torch.zeros(1, 6, 5, 7),))
    torch.export.save(program, tmp_path / "net.pt2")
    code, document = run("plan", tmp_path / "net.pt2")
    assert code == 0
    assert [one["layers"] for one in document["fusions"]] == trees(convtool.plan(two(), (6, 5, 7)))
