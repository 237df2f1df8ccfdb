"""Batch norms behind channel shuffles that a model's code writes out: they go into the layer before these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from live import assert_same_outputs, done, filled, save
from torch import Tensor, nn

import convtool
from convtool.checkpoint import open_checkpoint
from convtool.core.tree import leaves
from convtool.graph.exported import plan_exported
from convtool.graph.planned import Plan

SHUFFLES: dict[str, Callable[[Tensor, int, int, int, int], Tensor]] = {  # of x (B, C, H, W), in 3 groups
    "transpose": lambda x, b, c, h, w: x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w),
    "contiguous": lambda x, b, c, h, w: x.reshape(b, 3, -1, h, w).transpose(1, 2).contiguous().view(b, c, h, w),
    "positions in one": lambda x, b, c, h, w: x.reshape(b, 3, -1, h * w).permute(0, 2, 1, 3).reshape(b, c, h, w),
    "swapaxes": lambda x, b, c, h, w: x.unflatten(1, (3, c // 3)).swapaxes(1, 2).flatten(1, 2),
    "movedim": lambda x, b, c, h, w: x.view(b, 3, -1, h, w).movedim(2, 1).reshape(b, c, h, w),
    "torch's": lambda x, b, c, h, w: F.channel_shuffle(x, 3),
}
MIXED: dict[str, Callable[[Tensor, int, int, int, int], Tensor]] = {
    "other axes": lambda x, b, c, h, w: x.view(b, 3, c // 3, h, w).transpose(1, 3).reshape(b, c, h, w),
    "parts of rows": lambda x, b, c, h, w: x.view(b, c * h, w).transpose(1, 2).reshape(b, c, h, w),
    "of the batch": lambda x, b, c, h, w: x.view(b * 3, c // 3, h, w).transpose(0, 1).reshape(b, c, h, w),
    "three axes": lambda x, b, c, h, w: x.view(b, 3, c // 3, h, w).permute(0, 2, 1, 4, 3).reshape(b, c, h, w),
    "another view back": lambda x, b, c, h, w: x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, w, h),
}


class Shuffled(nn.Module):
    """A convolution, a shuffle of its channels, and a batch norm."""

    def __init__(self, shuffle: Callable[..., Tensor] = SHUFFLES["transpose"], groups: int = 3) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.conv, self.norm = nn.Conv2d(6, 12, 3, padding=1, groups=groups), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.tanh(self.norm(self.shuffle(x, *x.shape)))


def trees(plan: Plan) -> list[list[str]]:
    return [[leaf.name for leaf in leaves(one.tree)] for one in plan.fusions]


CHAIN = ["conv", "channel_shuffle(3)", "norm", "channel_unshuffle(3)"]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("name", SHUFFLES)
def test_a_batch_norm_goes_through_a_shuffle_into_the_convolution_which_keeps_its_groups(
    name: str, groups: int
) -> None:
    model = filled(Shuffled(SHUFFLES[name], groups)).eval().double()
    plan = convtool.plan(model, (6, 5, 7))
    assert trees(plan) == [CHAIN]
    assert plan.fusions[0].fused.geometry.groups == groups
    assert not plan.left_alone
    assert plan.total.multiply_adds - plan.total_after.multiply_adds == 12 * 5 * 7  # the batch norm's
    fused = convtool.fuse_model(copy.deepcopy(model), planned=plan)
    assert fused.get_submodule("conv").groups == groups
    assert_same_outputs(model, fused, [(2, 6, 5, 7)])


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_channels_with_other_axes_stands_between(name: str) -> None:
    model = filled(Shuffled(MIXED[name])).eval().double()
    plan = convtool.plan(model, inputs=[torch.zeros(3, 6, 4, 6, dtype=torch.float64)])
    assert not plan.fusions
    (reason,) = {one.reason for one in plan.left_alone if "norm" in one.layers}
    assert reason.endswith("that mixes channels with other axes stands between"), reason


class Twice(Shuffled):
    """A shuffle whose parts are read besides."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        parts = self.conv(x).view(b, 3, 4, h, w)
        both: Tensor = self.norm(parts.transpose(1, 2).reshape(b, -1, h, w)) + parts.reshape(b, -1, h, w)
        return both


def test_a_shuffle_whose_parts_are_read_besides_is_none() -> None:
    assert not convtool.plan(filled(Twice()).eval(), (6, 5, 7)).fusions


def test_a_program_a_file_and_a_live_model_agree(tmp_path: Path) -> None:
    model, out = filled(Shuffled()).float().eval().requires_grad_(False), tmp_path / "fused.safetensors"
    x = torch.randn(2, 6, 5, 7)
    expected = model(x)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
    assert plan_exported(open_checkpoint(tmp_path / "net.pt2")).recipe() == convtool.plan(model, (6, 5, 7)).recipe()
    path = save(model, tmp_path / "net.safetensors")
    stated = ("--set", "conv.padding=1", "--set", "conv.groups=3", "--eps", "1e-5", "--assume-defaults")
    done("fuse", path, *CHAIN, *stated, "-o", out)
    assert done("verify", path, out)["equivalent"]
    assert torch.allclose(convtool.apply(model, out)(x), expected, rtol=1e-5, atol=1e-6)
