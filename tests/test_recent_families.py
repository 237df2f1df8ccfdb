"""Families of networks whose blocks become one layer: train forms written in plain torch under their authors' names,
fused by the recipe, loaded strictly into the deploy form; both give the same in float64.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live import CLOSE, done, error, filled, load, relative_difference, run, save, settings
from shell import cli
from torch import Tensor, nn


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def conv(inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=bias)


class Sum(nn.Module):
    """The sum of its children, and of the input where `identity`; then what `after` names."""

    def __init__(self, identity: bool = False, after: str = "", **modules: nn.Module) -> None:
        super().__init__()
        self.identity, self.after = identity, after
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch(x) for name, branch in self.named_children() if name != self.after)
        y = y + x if self.identity else y
        made: Tensor = self.get_submodule(self.after)(y) if self.after else y
        return made


def check(
    train: nn.Module,
    deploy: nn.Module,
    recipe: str,
    tmp_path: Path,
    channels: int,
    fields: dict[str, dict[str, object]] | None = None,
    size: tuple[int, ...] = (11, 14),
) -> None:
    before, after = save(filled(train), tmp_path / "train.safetensors"), tmp_path / "deploy.safetensors"
    stated = settings({"*": {}, **(fields or {})}, tmp_path / "geometry.toml")
    done("fuse", before, "--recipe", recipe, "-o", after, *stated)
    deploy.double().eval().load_state_dict(load(after), strict=True)
    x = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_difference(train.double().eval()(x), deploy(x)) < CLOSE
    assert run("verify", before, after)[0] == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_repvit(legacy: bool, tmp_path: Path) -> None:
    def layer(inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
        return named(c=conv(inner, outer, kernel, stride, groups), bn=nn.BatchNorm2d(outer))

    def mixer() -> nn.Module:
        dense = layer(6, 6, 3, groups=6)
        if legacy:
            return Sum(identity=True, conv=dense, conv1=layer(6, 6, groups=6))
        return Sum(True, "bn", conv=dense, conv1=conv(6, 6, groups=6, bias=True), bn=nn.BatchNorm2d(6))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = named(bn=nn.BatchNorm1d(6), l=nn.Linear(6, 3))
            self.head_dist = named(bn=nn.BatchNorm1d(6), l=nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = (self.head(x) + self.head_dist(x)) / 2
            return made

    def network(deploy: bool) -> nn.Module:
        stem = conv(3, 6, 3, 2, bias=True) if deploy else layer(3, 6, 3, 2)
        block = named(token_mixer=conv(6, 6, 3, groups=6, bias=True) if deploy else mixer())
        return named(
            stem=named(conv1=stem, act1=nn.GELU()),
            stages=nn.Sequential(nn.Sequential(block)),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(6, 3) if deploy else Head(),
        )

    check(network(deploy=False), network(deploy=True), "repvit-timm", tmp_path, 3, {"stem.conv1.c": {"stride": 2}})


def test_levit(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        stem = conv(3, 6, 3, 2, bias=True) if deploy else named(linear=conv(3, 6, 3, 2), bn=nn.BatchNorm2d(6))
        flat = nn.Linear(6, 8) if deploy else named(linear=nn.Linear(6, 8, bias=False), bn=nn.BatchNorm1d(8))
        head = nn.Linear(8, 5) if deploy else named(bn=nn.BatchNorm1d(8), drop=nn.Dropout(), linear=nn.Linear(8, 5))
        pool = named(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
        return named(stem=named(conv1=stem), pool=pool, ln=flat, act=nn.Hardswish(), head=head)

    check(network(deploy=False), network(deploy=True), "levit-timm", tmp_path, 3)


def yolo(inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return named(conv=conv(inner, outer, kernel, stride, groups), bn=nn.BatchNorm2d(outer, eps=1e-3), act=nn.SiLU())


def plain(inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return named(conv=conv(inner, outer, kernel, stride, groups), bn=nn.BatchNorm2d(outer, eps=1e-3))


def test_yolov9_and_v10(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        first: nn.Module
        rep: nn.Module
        repbn: nn.Module
        deep: nn.Module
        if deploy:
            first = named(conv=conv(3, 8, 3, 2, bias=True), act=nn.SiLU())
            rep, repbn = named(conv=conv(8, 8, 3, bias=True)), named(conv=conv(8, 8, 3, bias=True))
            deep = named(conv=conv(8, 8, 7, groups=8, bias=True))
        else:
            first = yolo(3, 8, 3, 2)
            rep = Sum(conv1=plain(8, 8, 3), conv2=plain(8, 8, 1))
            repbn = Sum(conv1=plain(8, 8, 3), conv2=plain(8, 8, 1), bn=nn.BatchNorm2d(8, eps=1e-3))
            deep = Sum(conv=plain(8, 8, 7, groups=8), conv1=plain(8, 8, 3, groups=8))
        return named(model=nn.Sequential(first, named(cv1=rep), named(cv1=repbn), named(cv1=nn.Sequential(deep))))

    depthwise: dict[str, dict[str, object]] = {
        "model.0.conv": {"stride": 2, "padding": 1},
        "model.3.cv1.0.conv.conv": {"groups": 8},
        "model.3.cv1.0.conv1.conv": {"groups": 8},
    }
    check(network(deploy=False), network(deploy=True), "yolo-ultralytics", tmp_path, 3, depthwise)


def test_yolov6(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        if deploy:
            blocks: list[nn.Module] = [
                named(rbr_reparam=conv(3, 8, 3, 2, bias=True)),
                named(rbr_reparam=conv(8, 8, 3, bias=True)),
            ]
            return named(stem=blocks[0], stage=blocks[1], neck=named(block=named(conv=conv(8, 4, bias=True))))
        norm = nn.BatchNorm2d(8, eps=1e-3)
        blocks = [
            Sum(rbr_dense=plain(3, 8, 3, 2), rbr_1x1=plain(3, 8, 1, 2)),
            Sum(rbr_dense=plain(8, 8, 3), rbr_1x1=plain(8, 8, 1), rbr_identity=norm),
        ]
        return named(stem=blocks[0], stage=blocks[1], neck=named(block=plain(8, 4, 1)))

    check(network(deploy=False), network(deploy=True), "yolov6", tmp_path, 3, {"stem.rbr_dense.conv": {"stride": 2}})


def test_idetect_of_yolov7(tmp_path: Path) -> None:
    class Implicit(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.implicit = nn.Parameter(torch.rand(1, channels, 1, 1))

    class IDetect(nn.Module):
        def __init__(self, deploy: bool) -> None:
            super().__init__()
            self.m = nn.ModuleList([conv(6, 5, bias=True), conv(6, 5, bias=True)])
            if not deploy:
                self.ia = nn.ModuleList([Implicit(6), Implicit(6)])
                self.im = nn.ModuleList([Implicit(5), Implicit(5)])
            self.deploy = deploy

        def forward(self, x: Tensor) -> Tensor:
            if self.deploy:
                return torch.cat([m(x) for m in self.m], 1)
            made = [
                m(x + ia.get_parameter("implicit")) * im.get_parameter("implicit")
                for m, ia, im in zip(self.m, self.ia, self.im, strict=True)
            ]
            return torch.cat(made, 1)

    def network(deploy: bool) -> nn.Module:
        first = named(conv=conv(3, 6, 3, bias=True), act=nn.SiLU()) if deploy else yolo(3, 6, 3)
        return named(model=nn.Sequential(first, IDetect(deploy)))

    check(network(deploy=False), network(deploy=True), "repconv-yolov7", tmp_path, 3)


def test_unireplknet_has_its_dilations_in_names(tmp_path: Path) -> None:
    def branch(kernel: int, dilation: int) -> nn.Conv2d:
        padding = (dilation * (kernel - 1) + 1) // 2
        return nn.Conv2d(4, 4, kernel, 1, padding, dilation, 4, bias=False)

    class Dilated(nn.Module):
        def __init__(self, deploy: bool) -> None:
            super().__init__()
            self.lk_origin = conv(4, 4, 7, groups=4, bias=deploy)
            self.branches = () if deploy else ((5, 1), (3, 2), (3, 3))
            if not deploy:
                self.origin_bn = nn.BatchNorm2d(4)
            for kernel, dilation in self.branches:
                self.add_module(f"dil_conv_k{kernel}_{dilation}", branch(kernel, dilation))
                self.add_module(f"dil_bn_k{kernel}_{dilation}", nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lk_origin(x)
            if not self.branches:
                return y
            y = self.get_submodule("origin_bn")(y)
            for k, d in self.branches:
                y = y + self.get_submodule(f"dil_bn_k{k}_{d}")(self.get_submodule(f"dil_conv_k{k}_{d}")(x))
            return y

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.rand(1, 1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.beta

    class Block(nn.Module):
        """The block behind its large kernel, without what the recipe leaves as it is."""

        def __init__(self, dwconv: nn.Module, deploy: bool, scaled: bool) -> None:
            super().__init__()
            self.dwconv = dwconv
            self.norm = nn.Identity() if deploy else nn.BatchNorm2d(4)
            self.act = nn.Sequential(nn.Tanh(), *([] if deploy else [Offset()]))
            self.pwconv2 = nn.Sequential(nn.Linear(4, 4, bias=deploy))
            if not deploy:
                self.pwconv2.add_module("2", nn.BatchNorm2d(4))
            if scaled and not deploy:
                self.gamma = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm(self.dwconv(x)).permute(0, 2, 3, 1))
            y = self.pwconv2[0](y).permute(0, 3, 1, 2)
            y = self.pwconv2[1](y) if len(self.pwconv2) > 1 else y
            made: Tensor = x + (y * self.gamma.view(1, -1, 1, 1) if "gamma" in self._parameters else y)
            return made

    def network(deploy: bool) -> nn.Module:
        small = conv(4, 4, 3, groups=4, bias=deploy)
        return named(
            stages=nn.Sequential(Block(Dilated(deploy), deploy, scaled=True), Block(small, deploy, scaled=False))
        )

    groups: dict[str, dict[str, object]] = {"*.lk_origin": {"groups": 4}, "*.dil_conv_k*": {"groups": 4}}
    check(network(deploy=False), network(deploy=True), "unireplknet", tmp_path, 4, groups)


@pytest.mark.parametrize("version", ["", "-v2"])
def test_qarepvgg_adds_its_input_where_it_keeps_channels_at_stride_1(version: str, tmp_path: Path) -> None:
    class Averaged(Sum):
        def forward(self, x: Tensor) -> Tensor:
            y = self.get_submodule("rbr_dense")(x) + self.get_submodule("rbr_1x1")(x)
            y = y + x + (F.avg_pool2d(x, 3, 1, 1) if version else 0) if self.identity else y
            made: Tensor = self.get_submodule("bn")(y)
            return made

    def block(inner: int, stride: int, deploy: bool) -> nn.Module:
        norm = nn.BatchNorm2d(8, eps=1e-3)
        if deploy:
            return named(rbr_reparam=conv(inner, 8, 3, stride, bias=True), bn=norm)
        branches: dict[str, Any] = {"rbr_dense": plain(inner, 8, 3, stride), "rbr_1x1": conv(inner, 8, 1, stride)}
        return Averaged(identity=inner == 8 and stride == 1, bn=norm, **branches)

    def network(deploy: bool) -> nn.Module:
        first = named(conv=conv(3, 3, bias=True)) if deploy else plain(3, 3, 1)
        return named(stem=first, stages=nn.Sequential(block(3, 2, deploy), block(8, 1, deploy), block(8, 2, deploy)))

    strides: dict[str, dict[str, object]] = {
        f"stages.{number}.rbr_dense.conv": {"stride": stride} for number, stride in enumerate((2, 1, 2))
    }
    check(network(deploy=False), network(deploy=True), f"qarepvgg{version}", tmp_path, 3, strides)
    words = ("fuse", tmp_path / "train.safetensors", "-o", tmp_path / "x.safetensors")
    code, message = error(*words, "--recipe", f"qarepvgg{version}")
    assert (code, "stages.1.rbr_dense.conv.stride=VALUE" in message) == (2, True)
    assert "qarepvgg (" in error(*words, "--recipe", "auto", *settings({"*": {}, **strides}, tmp_path / "g.toml"))[1]


def test_sesr(tmp_path: Path) -> None:
    def block(inner: int, outer: int, kernel: int, deploy: bool, identity: bool = False) -> nn.Module:
        if deploy:
            return named(conv_expand=conv(inner, outer, kernel, bias=True))
        layers = named(conv_expand=conv(inner, 9, kernel), conv_squeeze=conv(9, outer, bias=True))
        return Residual(layers) if identity else layers

    class Residual(nn.Sequential):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__(OrderedDict(inner.named_children()))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("conv_squeeze")(self.get_submodule("conv_expand")(x)) + x  # type: ignore[no-any-return]

    def network(deploy: bool) -> nn.Module:
        return named(
            conv_first=block(3, 6, 5, deploy),
            residual_block=nn.Sequential(block(6, 6, 3, deploy, identity=True), nn.Tanh()),
            conv_last=block(6, 4, 5, deploy),
        )

    check(network(deploy=False), network(deploy=True), "sesr", tmp_path, 3)


def test_replknet(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        if deploy:
            return named(large=named(lkb_reparam=conv(4, 4, 9, groups=4, bias=True)))
        parts: dict[str, Any] = {
            name: named(conv=conv(4, 4, kernel, groups=4), bn=nn.BatchNorm2d(4))
            for name, kernel in (("lkb_origin", 9), ("small_conv", 5))
        }
        return named(large=Sum(**parts))

    check(network(deploy=False), network(deploy=True), "replknet", tmp_path, 4, {"*.conv": {"groups": 4}})


def test_repghost(tmp_path: Path) -> None:
    def network(deploy: bool) -> nn.Module:
        norm = nn.BatchNorm2d(4)
        cheap: nn.Module = conv(4, 4, 3, groups=4, bias=True)
        if deploy:
            return named(ghost1=named(cheap_operation=cheap))
        cheap = nn.Sequential(conv(4, 4, 3, groups=4), nn.BatchNorm2d(4))
        return named(ghost1=Sum(fusion_bn=nn.Sequential(norm), cheap_operation=cheap))

    check(network(deploy=False), network(deploy=True), "repghost-timm", tmp_path, 4)


class SeqConv3x3(nn.Module):
    """A 1x1 layer, whose bias is also what stands around it, and a 3x3 one: a learned kernel, or a scaled mask."""

    def __init__(self, inner: int, outer: int, middle: int, mask: list[list[float]] | None) -> None:
        super().__init__()
        first = nn.Conv2d(inner, middle, 1)
        self.k0, self.b0 = first.weight, first.bias
        if mask is None:
            second = nn.Conv2d(middle, outer, 3)
            self.k1, self.b1 = second.weight, second.bias
            return
        self.scale = nn.Parameter(torch.randn(outer, 1, 1, 1))
        self.bias = nn.Parameter(torch.randn(outer))
        self.mask = nn.Parameter(torch.tensor(mask).expand(outer, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.k0, self.b0)
        if "k1" in self._parameters:
            return F.conv2d(y, self.k1, self.b1)
        return F.conv2d(y, self.scale * self.mask, self.bias, groups=len(self.scale))


@pytest.mark.parametrize("identity", [False, True])
def test_ecbsr(identity: bool, tmp_path: Path) -> None:
    sobel = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
    laplace = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]

    def block(inner: int, deploy: bool) -> nn.Module:
        dense = nn.Conv2d(inner, 4, 3, padding=1)
        if deploy:
            return named(conv3x3=dense)
        branches: dict[str, Any] = {
            "conv1x1_3x3": SeqConv3x3(inner, 4, 6, None),
            "conv1x1_sbx": SeqConv3x3(inner, 4, 4, sobel),
            "conv1x1_sby": SeqConv3x3(inner, 4, 4, [list(row) for row in zip(*sobel, strict=True)]),
            "conv1x1_lpl": SeqConv3x3(inner, 4, 4, laplace),
        }
        return Sum(identity=identity and inner == 4, conv3x3=dense, **branches)

    def network(deploy: bool) -> nn.Module:
        return named(backbone=nn.Sequential(block(3, deploy), block(4, deploy)))

    recipe = "ecbsr-identity" if identity else "ecbsr"
    check(network(deploy=False), network(deploy=True), recipe, tmp_path, 3)


def test_the_recipe_that_fits_is_found(tmp_path: Path) -> None:
    """YOLOv10's depthwise block: torchvision's names fit too, and would leave two convolutions."""
    block = Sum(conv=plain(8, 8, 7, groups=8), conv1=plain(8, 8, 3, groups=8))
    before = save(filled(named(model=nn.Sequential(block))), tmp_path / "net.safetensors")
    groups = ["--set", "*.conv.conv.groups=8", "--set", "*.conv1.conv.groups=8", "--set", "*.conv1.conv.padding=1"]
    words = ("fuse", before, "-o", tmp_path / "out.safetensors", "--force", *groups)
    (fusion,) = done(*words, "--recipe", "auto")["fusions"]
    assert fusion["name"] == "model.0.conv"
    assert len(fusion["layers"]) == 4
    (tmp_path / "mine.toml").write_text('[[fuse]]\nname = "{b}.x"\nsum = ["{b}.left", "{b}.right"]\n')
    code, message = error(*words, "--recipe", tmp_path / "mine.toml")
    assert code == 2
    assert message.endswith("of the recipes that ship, yolo-ultralytics (1 fusion, model.0.conv) would fit")
    assert f"{tmp_path / 'mine.toml'}: " in message
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    code, message = error("fuse", tmp_path / "other.pt", "--recipe", "yolo-ultralytics", "-o", tmp_path / "no.pt")
    assert code == 2
    assert message.endswith(f"the recipe yolo-ultralytics fits no layer of {tmp_path / 'other.pt'}")
    code, message = error("fuse", tmp_path / "other.pt", "--recipe", "auto", "-o", tmp_path / "no.pt")
    assert (code, "none of the recipes that ship fits" in message) == (2, True)


def test_what_another_recipe_would_make_fewer_layers_of_is_said(tmp_path: Path) -> None:
    block = Sum(conv=plain(8, 8, 7), conv1=plain(8, 8, 3))
    before = save(filled(named(model=nn.Sequential(block))), tmp_path / "net.safetensors")
    result = cli(f"fuse {before} --recipe conv-bn-torchvision --eps 1e-3 -o {tmp_path / 'out.safetensors'} -q")
    assert result.code == 0
    assert "makes fewer layers of: yolo-ultralytics (1 fusion, model.0.conv)" in result.out
