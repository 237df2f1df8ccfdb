"""Families of networks that train with more layers than they run with: their train form and their deploy form, written
in plain torch under the names that their authors' checkpoints have. A recipe has to turn the one's checkpoint into one
that the other loads strictly, and both have to give the same.

All statistics, scales and biases are random, eps isn't the default, kernels are odd and even, inputs non-square.
"""

from __future__ import annotations

import copy
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
from shell import cli
from torch import Tensor, nn

import convtool

EPS = 3e-3


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS)


def converted(
    train: nn.Module,
    deploy: nn.Module,
    recipe: str | Path,
    folder: Path,
    fields: dict[str, dict[str, object]] | None = None,
    *more: object,
) -> dict[str, Any]:
    """Fuse the train form by a recipe and load the result into the deploy form; the document that fuse printed."""
    before, after = save(filled(train), folder / "train.safetensors"), folder / "deploy.safetensors"
    stated = settings({"*": {}, **(fields or {})}, folder / "geometry.toml")
    document = done("fuse", before, "--recipe", recipe, "-o", after, *stated, *more)
    assert all(fusion["exact"] for fusion in document["fusions"])
    deploy.double().load_state_dict(load(after), strict=True)
    assert run("verify", before, after, *(more if "--with" in more else ()))[0] == 0
    return document


# --- RepVGG


class RepVGG(nn.Module):
    """A block under the names of its authors or of timm."""

    def __init__(
        self,
        names: tuple[str, str, str, str],
        inner: int,
        outer: int,
        stride: int,
        groups: int,
        deploy: bool,
        parts: tuple[str, str] = ("conv", "bn"),
    ) -> None:
        super().__init__()
        dense, point, identity, fused = names
        if deploy:
            self.add_module(fused, nn.Conv2d(inner, outer, 3, stride, 1, groups=groups))
            return
        for name, kernel in ((dense, 3), (point, 1)):
            conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
            self.add_module(name, nn.Sequential(OrderedDict(zip(parts, (conv, norm(outer)), strict=True))))
        if inner == outer and stride == 1:
            self.add_module(identity, norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum(branch(x) for branch in self.children())
        return F.relu(y)


REPVGG = {
    "repvgg": ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam"),
    "repvgg-timm": ("conv_kxk", "conv_1x1", "identity", "reparam_conv"),
    "repconv-yolov7": ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam"),
}


@pytest.mark.parametrize("recipe", REPVGG)
def test_repvgg(recipe: str, tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        blocks = [(3, 8, 2, 1), (8, 8, 1, 1), (8, 8, 1, 2), (8, 12, 2, 4)]
        named = ((f"stage{n}", RepVGG(REPVGG[recipe], *block, deploy, (conv, bn))) for n, block in enumerate(blocks))
        return nn.Sequential(OrderedDict(named))

    conv, bn = ("0", "1") if recipe == "repconv-yolov7" else ("conv", "bn")
    dense = REPVGG[recipe][0]
    fields: dict[str, dict[str, object]] = {
        f"*.{bn}": {"eps": EPS},
        "stage[12].*identity": {"eps": EPS},
        f"stage[03].{dense}.{conv}": {"stride": 2},  # the other branch has it too, without being told
        f"stage3.{dense}.{conv}": {"stride": 2, "groups": 4},
    }
    train, deploy = network(deploy=False), network(deploy=True)
    document = converted(train, deploy, recipe, tmp_path, fields)
    assert [fusion["fields"]["stride"][0] for fusion in document["fusions"]] == [2, 1, 1, 2]
    # What goes into the first block, nobody says, and nothing depends on it.
    assert [fusion["fields"].get("groups") for fusion in document["fusions"]] == [None, 1, 2, 4]
    assert_same_outputs(train, deploy, [(2, 3, 17, 20), (1, 3, 18, 15)])


def test_repconv_of_yolov7_has_the_eps_that_its_model_gives_it(tmp_path: Path) -> None:
    block = RepVGG(REPVGG["repconv-yolov7"], 5, 5, 1, 1, deploy=False, parts=("0", "1"))
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    train, deploy = nn.Sequential(block), nn.Sequential(RepVGG(REPVGG["repconv-yolov7"], 5, 5, 1, 1, deploy=True))
    document = converted(train, deploy, "repconv-yolov7", tmp_path)
    assert not [text for fusion in document["fusions"] for text in fusion["assumed"] if "eps" in text]
    assert_same_outputs(train, deploy, [(2, 5, 7, 10)])


def test_repvgg_with_a_branch_that_lost_its_batch_norm(tmp_path: Path) -> None:
    train = filled(RepVGG(REPVGG["repvgg"], 4, 6, 1, 1, deploy=False))
    state = {f"block.{name}": tensor for name, tensor in train.state_dict().items() if "1x1.bn" not in name}
    torch.save(state, tmp_path / "train.pt")
    code, message = error("fuse", tmp_path / "train.pt", "--recipe", "repvgg", "-o", tmp_path / "out.pt")
    assert code == 2
    assert message.endswith("(block = 'block') is only partly there: {block}.rbr_1x1.bn is not")
    assert not (tmp_path / "out.pt").exists()


# --- MobileOne


class MobileOne(nn.Module):
    """A block with several convolutions side by side, under the names of its authors or of timm."""

    def __init__(
        self,
        names: tuple[str, str, str, str],
        channels: tuple[int, int],
        kernel: int,
        stride: int,
        groups: int,
        branches: int,
        deploy: bool,
    ) -> None:
        super().__init__()
        inner, outer = channels
        many, scale, skip, fused = names
        self.act: nn.Module = nn.ReLU()
        if deploy:
            self.add_module(fused, nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups))
            return

        def conv_bn(kernel: int) -> nn.Module:
            conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(OrderedDict(conv=conv, bn=norm(outer)))

        self.add_module(many, nn.ModuleList(conv_bn(kernel) for _ in range(branches)))
        if kernel > 1:
            self.add_module(scale, conv_bn(1))
        if inner == outer and stride == 1:
            self.add_module(skip, norm(inner))

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch for branch in self.children() if branch is not self.act]
        flat = [one for branch in branches for one in (branch if isinstance(branch, nn.ModuleList) else [branch])]
        y: Tensor = self.act(sum(one(x) for one in flat))
        return y


MOBILEONE = {
    "mobileone": ("rbr_conv", "rbr_scale", "rbr_skip", "reparam_conv"),
    "mobileone-timm": ("conv_kxk", "conv_scale", "identity", "reparam_conv"),
}


@pytest.mark.parametrize("recipe", MOBILEONE)
def test_mobileone(recipe: str, tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        blocks: list[tuple[tuple[int, int], int, int, int, int]] = [
            ((3, 8), 3, 2, 1, 1),
            ((8, 8), 3, 1, 8, 11),  # depthwise; more branches than one digit counts
            ((8, 8), 1, 1, 1, 2),  # pointwise: nothing to scale
            ((8, 8), 5, 2, 8, 3),  # depthwise and strided: no skip
            ((8, 6), 1, 1, 2, 1),
        ]
        return nn.Sequential(*(MobileOne(MOBILEONE[recipe], *block, deploy) for block in blocks))

    many, _, skip, _ = MOBILEONE[recipe]
    fields: dict[str, dict[str, object]] = {
        "*.bn": {"eps": EPS},
        f"*.{skip}": {"eps": EPS},
        f"0.{many}.0.conv": {"stride": 2},
        f"3.{many}.0.conv": {"stride": 2},
        f"3.{many}.*.conv": {"groups": 8},
        f"4.{many}.*.conv": {"groups": 2},
    }
    train, deploy = network(deploy=False), network(deploy=True)
    document = converted(train, deploy, recipe, tmp_path, fields)
    assert [len(fusion["layers"]) for fusion in document["fusions"]] == [4, 25, 5, 8, 2]
    assert_same_outputs(train, deploy, [(2, 3, 13, 16), (1, 3, 12, 19)])


# --- FastViT


def reparam(inner: int, outer: int, kernel: int, stride: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups)


def conv_norm(inner: int, outer: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm(outer)))


class RepMixer(nn.Module):
    """x + layer_scale(mixer(x) - norm(x))."""

    def __init__(self, channels: int, kernel: int, scaled: bool, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.reparam_conv = reparam(channels, channels, kernel, 1, channels)
            return
        names = MOBILEONE["mobileone-timm"]
        self.mixer = MobileOne(names, (channels, channels), kernel, 1, channels, 1, deploy=False)
        self.mixer.act = nn.Identity()
        self.norm = nn.Module()
        self.norm.identity = norm(channels)
        self.layer_scale = LayerScale2d(channels) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            y: Tensor = self.reparam_conv(x)
            return y
        mixed: Tensor = self.layer_scale(self.mixer(x) - self.norm.get_submodule("identity")(x))
        return x + mixed


class LayerScale2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LargeKernel(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int, small: int, stride: int, groups: int, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.reparam_conv = reparam(inner, outer, kernel, stride, groups)
        else:
            self.large_conv = conv_norm(inner, outer, kernel, stride, groups)
            self.small_conv = conv_norm(inner, outer, small, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum(branch(x) for branch in self.children())
        return F.gelu(y)


class PositionalEncoding(nn.Module):
    """x + pos_enc(x), depthwise, which the weight alone doesn't tell but the sum does."""

    def __init__(self, channels: int, deploy: bool) -> None:
        super().__init__()
        self.add_module("reparam_conv" if deploy else "pos_enc", reparam(channels, channels, 7, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        (conv,) = self.children()
        y: Tensor = conv(x)
        return y if hasattr(self, "reparam_conv") else y + x


def test_fastvit(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        names = MOBILEONE["mobileone-timm"]

        def block(inner: int, outer: int, kernel: int, stride: int, groups: int) -> nn.Module:
            return MobileOne(names, (inner, outer), kernel, stride, groups, 1, deploy)

        layers: dict[str, nn.Module] = {
            "stem": nn.Sequential(block(3, 4, 3, 2, 1), block(4, 4, 3, 1, 4), block(4, 4, 1, 1, 1)),
            "mixers": nn.Sequential(RepMixer(4, 3, True, deploy), RepMixer(4, 5, False, deploy)),
            "proj": nn.Sequential(LargeKernel(4, 8, 7, 3, 2, 4, deploy), block(8, 8, 1, 1, 1)),
            "pos_emb": PositionalEncoding(8, deploy),
            "final_conv": block(8, 16, 3, 1, 8),
        }
        return nn.Sequential(OrderedDict(layers))

    fields: dict[str, dict[str, object]] = {
        "*.bn": {"eps": EPS},
        "*.identity": {"eps": EPS},
        "stem.0.conv_kxk.0.conv": {"stride": 2},
        "stem.1.conv_*.conv": {"groups": 4},
        "proj.0.large_conv.conv": {"stride": 2, "groups": 4},
        "proj.0.small_conv.conv": {"groups": 4},
        "mixers.*.conv": {"groups": 4},
        "final_conv.conv_*.conv": {"groups": 8},
    }
    train, deploy = network(deploy=False), network(deploy=True)
    document = converted(train, deploy, "fastvit-timm", tmp_path, fields)
    assert len(document["fusions"]) == 9
    assert_same_outputs(train, deploy, [(2, 3, 21, 26), (1, 3, 18, 31)])


# --- ACNet


class ACBlock(nn.Module):
    """A square, a vertical and a horizontal convolution."""

    def __init__(
        self, inner: int, outer: int, kernel: int, stride: int, groups: int, affine: bool, deploy: bool
    ) -> None:
        super().__init__()
        half = kernel // 2
        if deploy:
            self.fused_conv = nn.Conv2d(inner, outer, kernel, stride, half, groups=groups)
            return
        shapes = {"square": (kernel, kernel), "ver": (kernel, 1), "hor": (1, kernel)}
        for name, (height, width) in shapes.items():
            padding = (half if height > 1 else 0, half if width > 1 else 0)
            conv = nn.Conv2d(inner, outer, (height, width), stride, padding, groups=groups, bias=False)
            self.add_module(f"{name}_conv", conv)
            self.add_module(f"{name}_bn", nn.BatchNorm2d(outer, eps=EPS, affine=affine))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "fused_conv"):
            fused: Tensor = self.fused_conv(x)
            return fused
        y: Tensor = sum(
            self.get_submodule(f"{name}_bn")(self.get_submodule(f"{name}_conv")(x)) for name in ("square", "ver", "hor")
        )
        return y


def test_acnet(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        return nn.Sequential(
            ACBlock(3, 6, 3, 1, 1, True, deploy),
            nn.ReLU(),
            ACBlock(6, 8, 5, 2, 2, False, deploy),  # batch norms without weight and bias
        )

    fields: dict[str, dict[str, object]] = {
        "*_bn": {"eps": EPS},
        "2.square_conv": {"stride": 2},
        "2.*_conv": {"groups": 2},
    }
    train, deploy = network(deploy=False), network(deploy=True)
    converted(train, deploy, "acnet", tmp_path, fields)
    assert_same_outputs(train, deploy, [(2, 3, 9, 12), (1, 3, 10, 7)])


# --- Diverse Branch Block


class PaddedNorm(nn.Module):
    """A batch norm that pads with what it makes of zero."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.bn = norm(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        nothing = self.bn(torch.zeros_like(x[:1, :, :1, :1]))
        y: Tensor = nothing + F.pad(self.bn(x) - nothing, [self.padding] * 4)
        return y


class PlusIdentity(nn.Conv2d):
    """A 1x1 convolution whose weight is stored less the identity."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y + x


class DiverseBranchBlock(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int, stride: int, groups: int, deploy: bool) -> None:
        super().__init__()
        padding = kernel // 2
        if deploy:
            self.dbb_reparam = nn.Conv2d(inner, outer, kernel, stride, padding, groups=groups)
            return

        def conv(inner: int, outer: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
            return nn.Conv2d(inner, outer, kernel, stride, padding, groups=groups, bias=False)

        origin = OrderedDict(conv=conv(inner, outer, kernel, stride, padding), bn=norm(outer))
        self.dbb_origin = nn.Sequential(origin)
        self.dbb_avg = nn.Sequential()
        self.dbb_1x1_kxk = nn.Sequential()
        if groups < outer:
            self.dbb_1x1 = nn.Sequential(OrderedDict(conv=conv(inner, outer, 1, stride), bn=norm(outer)))
            self.dbb_avg.add_module("conv", conv(inner, outer, 1))
            self.dbb_avg.add_module("bn", PaddedNorm(outer, padding))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(kernel, stride))
            internal = inner
            self.dbb_1x1_kxk.add_module("idconv1", PlusIdentity(inner, inner, 1, groups=groups, bias=False))
        else:
            self.dbb_avg.add_module("avg", nn.AvgPool2d(kernel, stride, padding))
            internal = 2 * inner
            self.dbb_1x1_kxk.add_module("conv1", conv(inner, internal, 1))
        self.dbb_avg.add_module("avgbn", norm(outer))
        self.dbb_1x1_kxk.add_module("bn1", PaddedNorm(internal, padding))
        self.dbb_1x1_kxk.add_module("conv2", conv(internal, outer, kernel, stride))
        self.dbb_1x1_kxk.add_module("bn2", norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum(branch(x) for branch in self.children())
        return F.relu(y)


def test_diverse_branch_blocks(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        blocks = [(4, 6, 3, 1, 1), (6, 6, 5, 2, 2), (6, 6, 3, 2, 6), (6, 6, 3, 1, 6)]
        return nn.Sequential(*(DiverseBranchBlock(*block, deploy=deploy) for block in blocks))

    fields: dict[str, dict[str, object]] = {
        **{pattern: {"eps": EPS} for pattern in ("*.bn", "*.bn2", "*.avgbn")},
        "[03].dbb_origin.conv": {"stride": 1},
        "[12].dbb_origin.conv": {"stride": 2},
        "1.dbb_origin.conv": {"groups": 2, "stride": 2},
    }
    train, deploy = network(deploy=False), network(deploy=True)
    document = converted(train, deploy, "dbb", tmp_path, fields)
    assert [fusion["fields"]["groups"] for fusion in document["fusions"]] == [1, 2, 6, 6]
    assert_same_outputs(train, deploy, [(2, 4, 13, 16), (1, 4, 12, 11)])


# --- ExpandNets


class Expanded(nn.Module):
    def __init__(self, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.conv1: nn.Module = nn.Conv2d(3, 5, (3, 4), (2, 1))
            self.conv2: nn.Module = nn.Conv2d(5, 4, 7)
            self.fc1: nn.Module = nn.Linear(4, 3)
        else:
            self.conv1 = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, (3, 4), (2, 1)), nn.Conv2d(8, 5, 1))
            self.conv2 = nn.Sequential(nn.Conv2d(5, 9, 3), nn.Conv2d(9, 9, 3), nn.Conv2d(9, 4, 3))
            self.fc1 = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc1(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))
        return y


PLAIN = {"padding": 0, "dilation": 1, "groups": 1}
EXPANDED: dict[str, dict[str, object]] = {
    **{name: {"stride": 1, **PLAIN} for name in ("conv1.0", "conv1.2", "conv2.*")},
    "conv1.1": {"stride": [2, 1], **PLAIN},
}


def test_expandnet(tmp_path: Path) -> None:
    train, deploy = Expanded(deploy=False), Expanded(deploy=True)
    document = converted(train, deploy, "expandnet", tmp_path, EXPANDED)
    assert [fusion["name"] for fusion in document["fusions"]] == ["conv1", "conv2", "fc1"]
    assert_same_outputs(train, deploy, [(2, 3, 19, 14), (1, 3, 20, 11)])


# --- layers that are added to a checkpoint: LoRA


class Base(nn.Module):
    """Convolutions and linear layers under names with dots and underscores, as U-Nets have them."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Conv2d(4, 6, (3, 2), 2, (1, 0)), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)]
        self.down_blocks = nn.ModuleList(
            nn.ModuleDict({"resnets": nn.ModuleList([nn.ModuleDict({"conv_in": one})])}) for one in blocks
        )
        self.out = nn.Linear(5, 3)

    def layers(self) -> dict[str, nn.Module]:
        names = [f"down_blocks.{number}.resnets.0.conv_in" for number in range(len(self.down_blocks))]
        return {name: self.get_submodule(name) for name in names}

    def forward(self, x: Tensor, extra: dict[str, Any] | None = None) -> Tensor:
        for name, layer in self.layers().items():
            if isinstance(layer, nn.Linear):
                x = x.mean((2, 3))
            y = layer(x)
            x = F.relu(y if extra is None or name not in extra else y + extra[name](x))
        scores: Tensor = self.out(x)
        return scores


RANK = 2


def adapters(middle: bool) -> dict[str, nn.Sequential]:
    """What is added to each of the first layers: down to RANK channels, perhaps a kernel between, and up again."""
    kernel: dict[str, Any] = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "bias": False}
    down = (
        [nn.Conv2d(4, RANK, 1, bias=False), nn.Conv2d(RANK, RANK, **kernel)]
        if middle
        else [nn.Conv2d(4, RANK, **kernel)]
    )
    return {
        "down_blocks.0.resnets.0.conv_in": nn.Sequential(*down, nn.Conv2d(RANK, 6, 1, bias=False)).double(),
        "down_blocks.2.resnets.0.conv_in": nn.Sequential(
            nn.Linear(6, RANK, bias=False), nn.Linear(RANK, 5, bias=False)
        ).double(),
    }


@pytest.mark.parametrize(("alpha", "strength"), [(None, None), (1.0, None), (1.0, 0.75), (None, -0.5)])
@pytest.mark.parametrize(
    ("prefix", "base", "middle"),
    [
        ("lora_unet_", "", False),
        ("lora_unet_", "", True),
        ("lora_te_", "", False),
        ("lora_unet_", "model.diffusion_model.", False),
    ],
)
def test_lora(
    prefix: str,
    base: str,
    middle: bool,
    alpha: float | None,
    strength: float | None,
    tmp_path: Path,
) -> None:
    model, added = filled(Base()), adapters(middle)
    state = {f"{base}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "base.pt")
    lora: dict[str, Tensor] = {}
    for name, layers in added.items():
        path = prefix + name.replace(".", "_")
        parts = ("lora_down", "lora_mid", "lora_up") if len(layers) == 3 else ("lora_down", "lora_up")
        for part, weight in zip(parts, layers.parameters(), strict=True):
            lora[f"{path}.{part}.weight"] = weight.detach()
        if alpha is not None:
            lora[f"{path}.alpha"] = torch.tensor(alpha)
    lora["lora_other_x.lora_down.weight"] = torch.zeros(1, 1)
    lora["lora_unet_y.hada_w1_a"] = torch.zeros(1, 1)  # of another kind of adapter
    torch.save(lora, tmp_path / "lora.pt")
    fields = settings(
        {f"{base}down_blocks.0.resnets.0.conv_in": {"stride": 2, "padding": [1, 0]}}, tmp_path / "geometry.toml"
    )
    source = ["--with", f"lora={tmp_path / 'lora.pt'}"]
    words = [*source, *fields, *([] if strength is None else ["--strength", strength])]
    if base_unit := prefix == "lora_unet_":
        incomplete = ("fuse", tmp_path / "base.pt", *words, "-o", tmp_path / "merged.safetensors")
        code, message = error(*incomplete)
        assert (code, "lora: 1 of its modules fit no layer, or are of a form" in message) == (4, True)
        assert "lora_unet_y" in message
    words += ["--leave", "lora_unet_*y"] if base_unit else []
    document = done("fuse", tmp_path / "base.pt", *words, "-o", tmp_path / "merged.safetensors")
    assert [fusion["name"].removeprefix(base) for fusion in document["fusions"]] == list(added)
    assert document["left_alone"] == ["2 layers of lora: lora:lora_other_x, lora:lora_unet_y"]
    merged = Base().double()
    merged.load_state_dict(
        {name.removeprefix(base): tensor for name, tensor in load(tmp_path / "merged.safetensors").items()}
    )
    x = inputs(2, 4, 7, 10)
    scale = (1.0 if alpha is None else alpha / RANK) * (1.0 if strength is None else strength)
    with torch.no_grad():
        expected = model(x, {name: lambda y, layers=layers: scale * layers(y) for name, layers in added.items()})
        assert relative_difference(expected, merged(x)) < CLOSE
        if not base:
            live = convtool.apply(copy.deepcopy(model), tmp_path / "merged.safetensors")
            assert relative_difference(expected, live(x)) < CLOSE
    if strength is None:
        assert run("verify", tmp_path / "base.pt", tmp_path / "merged.safetensors", *source)[0] == 0


def test_a_strength_needs_something_to_go_with(tmp_path: Path) -> None:
    path = save(filled(RepVGG(REPVGG["repvgg"], 4, 6, 1, 1, deploy=False)), tmp_path / "net.pt")
    words = ["fuse", path, "-o", tmp_path / "out.pt", "--strength", "0.5"]
    assert error(*words, "rbr_dense.conv", "rbr_dense.bn")[0] == 2
    code, message = error(*words, "--recipe", "expandnet")
    assert (code, message[:22]) == (2, "--strength: goes with ")


def test_a_lora_for_a_layer_that_is_not_there(tmp_path: Path) -> None:
    torch.save(Base().state_dict(), tmp_path / "base.pt")
    up, down = torch.ones(5, 2), torch.ones(2, 6)
    weights = {"lora_unet_up_blocks_0.lora_down.weight": down, "lora_unet_up_blocks_0.lora_up.weight": up}
    torch.save(weights, tmp_path / "lora.pt")
    words = ["fuse", tmp_path / "base.pt", "-o", tmp_path / "out.pt", "--with", f"lora={tmp_path / 'lora.pt'}"]
    holds = "it holds lora_unet_up_blocks_0 (down, up)"
    assert error(*words) == (2, f"lora: nothing in it changes a layer of the checkpoint; {holds}")
    swapped = ["fuse", tmp_path / "lora.pt", "-o", tmp_path / "out.pt", "--with", f"lora={tmp_path / 'base.pt'}"]
    code, message = error(*swapped)
    assert code == 2
    assert message.endswith(f"give the base first, and the adapters as --with lora={tmp_path / 'lora.pt'}")


def test_recipes_that_do_the_same_are_no_choice(tmp_path: Path) -> None:
    """A ResNet's names fit timm's recipe and torchvision's, which fuse the same layers of it and state the same."""
    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4)})
    path = save(filled(model), tmp_path / "net.pt")
    said = cli(f"fuse {path} --recipe auto --eps 1e-5 -o {tmp_path / 'out.pt'}").out
    assert "recipe: conv-bn-timm and conv-bn-torchvision, which fuse the same layers of this file" in said
    assert "conv1 → bn1 becomes conv1" in said


def test_recipes_that_state_another_eps_are_a_choice(tmp_path: Path) -> None:
    """RepVGG's blocks beside other layers: YOLOv6's recipe takes more, with another eps than their authors'."""

    def conv_bn(inputs: int, kernel: int) -> nn.Module:
        return nn.ModuleDict({"conv": nn.Conv2d(inputs, 4, kernel, bias=False), "bn": nn.BatchNorm2d(4)})

    block = nn.ModuleDict({"rbr_dense": conv_bn(3, 3), "rbr_1x1": conv_bn(3, 1)})
    model = nn.ModuleDict({"block": block, "head": nn.ModuleDict({"conv": conv_bn(4, 3)})})
    path = save(filled(model), tmp_path / "net.pt")
    words = ("fuse", path, "--recipe", "auto", "--assume-defaults", "-o", tmp_path / "out.pt")
    code, message = error(*words)
    assert (code, "several recipes fit" in message) == (2, True)
    assert "repvgg (1 fusion, block.rbr_reparam)" in message
    done(*words, "--set", "*.bn.eps=1e-3")


def test_an_alpha_that_is_not_a_number(tmp_path: Path) -> None:
    torch.save(Base().state_dict(), tmp_path / "base.pt")
    path = "lora_unet_down_blocks_2_resnets_0_conv_in"
    weights = {f"{path}.lora_down.weight": torch.ones(2, 6), f"{path}.lora_up.weight": torch.ones(5, 2)}
    torch.save(weights | {f"{path}.alpha": torch.tensor(float("nan"))}, tmp_path / "lora.pt")
    source = ["--with", f"lora={tmp_path / 'lora.pt'}"]
    code, message = error("fuse", tmp_path / "base.pt", *source, "-o", tmp_path / "out.pt")
    assert code == 3
    assert message.endswith(f"{path}: alpha: holds nan; nothing exact can be said of it")


def test_a_lora_with_more_to_it_than_is_known(tmp_path: Path) -> None:
    torch.save(Base().state_dict(), tmp_path / "base.pt")
    path = "lora_unet_down_blocks_2_resnets_0_conv_in"
    weights = {f"{path}.lora_down.weight": torch.ones(2, 6), f"{path}.lora_up.weight": torch.ones(5, 2)}
    others = {f"{path}.alpha": torch.tensor(1.0), f"{path}.scalar": torch.ones(5, 1)}
    torch.save(weights | others, tmp_path / "lora.pt")
    source = ["--with", f"lora={tmp_path / 'lora.pt'}"]
    code, message = error("fuse", tmp_path / "base.pt", *source, "-o", tmp_path / "out.pt")
    assert code == 2
    assert f"nothing in it changes a layer of the checkpoint; it holds {path} (down, up, alpha, scalar)" in message


# --- families without a shipped recipe: written by a user


class Collapsible(nn.Module):
    """SESR's block: expand, project, and the input itself."""

    def __init__(self, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
        else:
            self.conv_expand = nn.Conv2d(4, 16, 3, padding=1, bias=False)
            self.conv_squeeze = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            y: Tensor = self.conv(x)
            return y
        z: Tensor = self.conv_squeeze(self.conv_expand(x))
        return z + x


def test_a_residual_around_a_chain(tmp_path: Path) -> None:
    recipe = tmp_path / "sesr.toml"
    recipe.write_text("""
        [[fuse]]
        name = "{block}.conv"
        sum = [["{block}.conv_expand", "{block}.conv_squeeze"], "identity()"]
        [geometry]
        "*.conv_expand" = { padding = "half", groups = 1 }
        "*.conv_squeeze" = { padding = 0 }
    """)
    train = nn.Sequential(Collapsible(False), nn.PReLU(4), Collapsible(False))
    deploy = nn.Sequential(Collapsible(True), nn.PReLU(4), Collapsible(True))
    converted(train, deploy, recipe, tmp_path)
    assert_same_outputs(train, deploy, [(2, 4, 5, 8)])


class Mixer(nn.Module):
    """FastViT's token mixer: x + scale * (branches(x) - norm(x)), the scale of shape (C, 1, 1)."""

    def __init__(self, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.reparam_conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            return
        self.mixer = MobileOne(MOBILEONE["mobileone-timm"], (6, 6), 3, 1, 6, 1, deploy=False)
        self.mixer.act = nn.Identity()
        self.norm = nn.Module()
        self.norm.identity = norm(6)
        self.layer_scale = nn.Module()
        self.layer_scale.gamma = nn.Parameter(torch.empty(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            y: Tensor = self.reparam_conv(x)
            return y
        gamma, identity = self.layer_scale.gamma, self.norm.identity
        assert isinstance(gamma, Tensor)
        assert isinstance(identity, nn.BatchNorm2d)
        z: Tensor = x + gamma * (self.mixer(x) - identity(x))
        return z


def test_a_difference_of_branches_and_a_scale_per_channel(tmp_path: Path) -> None:
    recipe = tmp_path / "fastvit.toml"
    recipe.write_text("""
        [[fuse]]
        name = "{m}.reparam_conv"
        sum = [
          "identity()",
          [
            { sum = [
              ["{m}.mixer.conv_kxk.*.conv", "{m}.mixer.conv_kxk.*.bn"],
              ["{m}.mixer.conv_scale.conv", "{m}.mixer.conv_scale.bn"],
              "{m}.mixer.identity",
              { chain = ["{m}.norm.identity"], scale = -1 },
            ] },
            "{m}.layer_scale@scale",
          ],
        ]
        [geometry]
        "*.conv_kxk.*.conv" = { padding = "half" }
        "*.conv_scale.conv" = { padding = 0 }
    """)
    train, deploy = nn.Sequential(Mixer(False)), nn.Sequential(Mixer(True))
    names = ("*.bn", "*.identity")
    converted(train, deploy, recipe, tmp_path, {name: {"eps": EPS} for name in names})
    assert_same_outputs(train, deploy, [(2, 6, 5, 8)])


# --- what the recipes leave alone they say


def test_batch_norms_that_no_convolution_comes_before_are_left_alone_and_said(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(conv1=nn.Conv2d(2, 3, 3), bn1=norm(3), act=nn.ReLU(), bn2=norm(3)))
    path = save(filled(model), tmp_path / "net.safetensors")
    document = done(
        "fuse", path, "--recipe", "conv-bn-torchvision", "--eps", "1e-5", "-o", tmp_path / "out.safetensors"
    )
    assert document["left_alone"] == ["1 batch norm: bn2"]


# --- convolution + batch norm under the names of torchvision and timm


def block(*layers: nn.Module, **named: nn.Module) -> nn.Sequential:
    """Layers one after the other, numbered or named."""
    return nn.Sequential(OrderedDict(named)) if named else nn.Sequential(*layers)


def conv(inner: int, outer: int, kernel: int | tuple[int, int] = 1, stride: int = 1, **fields: Any) -> nn.Conv2d:
    halves = [k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel))]
    padding = (halves[0], halves[1])
    return nn.Conv2d(inner, outer, kernel, stride, padding, **{"bias": False, **fields})


class Residual(nn.Module):
    """torchvision's basic block."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inner, outer, 3, stride), norm(outer)
        self.conv2, self.bn2 = conv(outer, outer, 3), norm(outer)
        self.downsample = block(conv(inner, outer, 1, stride), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class Dense(nn.Module):
    """DenseNet's layer: norm1 before conv1, norm2 between conv1 and conv2."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inner), conv(inner, inner)
        self.norm2, self.conv2 = norm(inner), conv(inner, outer, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class Ordered(nn.Module):
    """Layers that run one after the other in the order of their names as given, a ReLU after each batch norm."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x)
            if name.startswith("bn") or name == "norm0":
                x = F.relu(x)
        return x


TORCHVISION: dict[str, tuple[nn.Module, int]] = {
    # its number of batch norms that go; one of DenseNet's stays
    "ResNet": (Ordered(conv1=conv(3, 6, 7, 2), bn1=norm(6), layer1=block(Residual(6, 8, 2), Residual(8, 8, 1))), 7),
    "VGG": (
        Ordered(features=block(conv(3, 5, 3), norm(5), nn.ReLU(), nn.MaxPool2d(2), conv(5, 4, 3, bias=True), norm(4))),
        2,
    ),
    "MobileNetV2": (
        Ordered(
            features=block(
                block(conv(3, 4, 3, 2), norm(4), nn.ReLU6()),
                block(conv=block(block(conv(4, 4, 3, groups=4), norm(4), nn.ReLU6()), conv(4, 5), norm(5))),
            )
        ),
        3,
    ),
    "GoogLeNet": (
        block(
            conv1=Ordered(conv=conv(3, 4, (1, 7)), bn=norm(4)),
            branch2=block(Ordered(conv=conv(4, 5, (5, 3)), bn=norm(5))),
        ),
        2,
    ),
    "DenseNet": (
        block(features=Ordered(conv0=conv(3, 4, 7, 2), norm0=norm(4), denseblock1=block(denselayer1=Dense(4, 3)))),
        2,
    ),
}


class TimmBlock(nn.Module):
    """timm's inverted, edge and depthwise separable blocks: a ReLU after each batch norm but the last."""

    def __init__(self, *pairs: tuple[str, nn.Conv2d]) -> None:
        super().__init__()
        for number, (name, layer) in enumerate(pairs, 1):
            self.add_module(name, layer)
            self.add_module(f"bn{number}", norm(layer.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for number, layer in enumerate(layers, 1):
            x = layer(x)
            x = F.relu(x) if number % 2 == 0 and number < len(layers) else x
        return x


TIMM: dict[str, tuple[nn.Module, int]] = {
    "EfficientNet": (
        Ordered(
            conv_stem=conv(3, 4, 3, 2),
            bn1=norm(4),
            blocks=block(
                block(TimmBlock(("conv_dw", conv(4, 4, 3, groups=4)), ("conv_pw", conv(4, 6)))),
                block(
                    TimmBlock(
                        ("conv_pw", conv(6, 8)), ("conv_dw", conv(8, 8, 5, 2, groups=8)), ("conv_pwl", conv(8, 6))
                    ),
                    TimmBlock(("conv_exp", conv(6, 10, 3)), ("conv_pwl", conv(10, 6))),
                    TimmBlock(("conv", conv(6, 6, 3))),
                ),
            ),
            conv_head=conv(6, 9),
            bn2=norm(9),
        ),
        10,
    ),
    "ResNet-D": (
        Ordered(
            conv1=block(conv(3, 4, 3, 2), norm(4), nn.ReLU(), conv(4, 4, 3), norm(4), nn.ReLU(), conv(4, 6, 3)),
            bn1=norm(6),
            layer1=block(
                block(
                    conv1=conv(6, 8), bn1=norm(8), act=nn.ReLU(), downsample=block(nn.AvgPool2d(2), conv(8, 8), norm(8))
                )
            ),
        ),
        5,
    ),
    "ConvNormAct": (
        block(stem=Ordered(conv=conv(3, 4, 3), bn=norm(4)), dw_start=Ordered(conv=conv(4, 4, 5, groups=4), bn=norm(4))),
        2,
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("recipe", "name"),
    [("conv-bn-torchvision", name) for name in TORCHVISION] + [("conv-bn-timm", name) for name in TIMM],
)
def test_convolutions_and_batch_norms(recipe: str, name: str, suffix: str, tmp_path: Path) -> None:
    model, pairs = (TORCHVISION if recipe == "conv-bn-torchvision" else TIMM)[name]
    before, after = save(filled(model), tmp_path / f"model{suffix}"), tmp_path / f"fused{suffix}"
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    document = done("fuse", before, "--recipe", recipe, "-o", after, *settings(geometry_of(model), tmp_path / "g.toml"))
    assert len(document["fusions"]) == pairs
    assert len(document["left_alone"]) == (pairs < norms)
    deploy = convtool.apply(copy.deepcopy(model), after)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in deploy.modules()) == norms - pairs
    assert_same_outputs(model, deploy, [(2, 3, 17, 20)])


def test_a_network_that_normalises_before_it_convolves_is_not_taken_for_one_that_does_after(tmp_path: Path) -> None:
    layers = {"bn1": norm(4), "conv1": conv(4, 4, 3), "bn2": norm(4), "conv2": conv(4, 4, 3)}
    path = save(filled(block(layer1=Ordered(**layers))), tmp_path / "preact.pt")
    code, message = error("fuse", path, "--recipe", "conv-bn-torchvision", "-o", tmp_path / "out.pt")
    assert code == 2
    assert "layer1.bn1 stands before layer1.conv1 in the checkpoint or the model's code" in message


def test_a_file_of_sorted_tensors_says_nothing_of_the_models_order(tmp_path: Path) -> None:
    layers = {"conv1": conv(4, 4, 3), "bn1": norm(4), "conv2": conv(4, 4, 3), "bn2": norm(4)}
    state = filled(block(layer1=Ordered(**layers))).state_dict()
    torch.save(dict(sorted(state.items())), tmp_path / "sorted.pt")
    words = ["fuse", tmp_path / "sorted.pt", "--recipe", "conv-bn-torchvision", "-o", tmp_path / "out.pt", "--eps", "1"]
    assert [fusion["name"] for fusion in done(*words)["fusions"]] == ["layer1.conv1", "layer1.conv2"]


def test_a_network_that_normalises_first_is_told_by_its_code_or_said_to_be_assumed_not_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All channels are equal, and .safetensors sorts the tensors: only the code tells what runs first."""
    from safetensors.torch import save_file

    from convtool.cli.app import run_app

    monkeypatch.chdir(tmp_path)
    Path("pre.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "def Pre():\n"
        "    layers = dict(bn1=nn.BatchNorm2d(4), relu=nn.ReLU(), conv1=nn.Conv2d(4, 4, 3, bias=False))\n"
        "    return nn.Sequential(OrderedDict(layers))\n"
    )
    layers = {"bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(), "conv1": nn.Conv2d(4, 4, 3, bias=False)}
    save_file(nn.Sequential(OrderedDict(layers)).state_dict(), "pre.safetensors")
    words = ["fuse", "pre.safetensors", "--recipe", "conv-bn-torchvision", "-o", "out.safetensors", "-q"]
    assert run_app([*words, "--model", "pre.py:Pre"]) == 2
    assert "bn1 stands before conv1 in the checkpoint or the model's code" in capsys.readouterr().err
    assert run_app([*words, "--eps", "1e-5"]) == 0
    assumed = "assumed: bn1: the model runs it right after the layer before it in the fusion (--model with"
    assert assumed in capsys.readouterr().out
    assert run_app(["verify", "pre.safetensors", "out.safetensors"]) == 0
    assert assumed in capsys.readouterr().out
    matrix = ["toeplitz", "out.safetensors", "conv1", "--input-size", "5,5", "-o", "m.npz", "--assume-defaults"]
    assert run_app(matrix) == 0
    assert "bn1: the model runs it right after" in capsys.readouterr().out
    assert run_app(["fuse", "out.safetensors", "conv1", "scale(2)", "-o", "next.safetensors"]) == 0
    assert run_app(["verify", "pre.safetensors", "next.safetensors", "--json"]) == 0
    assert "bn1: the model runs it right after" in capsys.readouterr().out
    chain = ["fuse", "pre.safetensors", "conv1", "bn1", "--model", "pre.py:Pre", "--model-input", "4,8,8"]
    assert run_app([*chain, "-o", "chain.safetensors"]) == 4
    assert "bn1 reads nothing that conv1 gives" in capsys.readouterr().err
