"""Small versions of eight architectures, saved in every form that torch has."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn


class Residual(nn.Module):
    """A block of a ResNet behind a stem, nothing square."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, (5, 3), stride=2, padding=(2, 1), bias=False)
        self.bn = nn.BatchNorm2d(4, eps=2e-5)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + torch.relu(self.conv(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Mobile(nn.Module):
    """An inverted residual of a MobileNetV2: expansion, depthwise with a dilation, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 1, bias=False),
            nn.BatchNorm2d(6, eps=1e-3),
            nn.ReLU6(),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False),
            nn.BatchNorm2d(6, eps=1e-3),
            nn.ReLU6(),
            nn.Conv2d(6, 3, 1),
            nn.BatchNorm2d(3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class Video(nn.Module):
    """Three spatial axes, each with its own geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 2))
        self.bn = nn.BatchNorm3d(4, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x.unsqueeze(2)))
        return out


class Decoder(nn.Module):
    """Transposed layers, with output padding and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.bn(self.up(x))))
        return out


class Half(Residual):
    """All in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.half()


class Tied(nn.Module):
    """One weight under two names, and one module under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.bn = nn.BatchNorm2d(3)
        self.again = self.bn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(torch.relu(self.second(torch.relu(self.bn(self.first(x))))))
        return out


class Same(nn.Conv2d):
    """A subclass with a forward of its own, which pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(nn.functional.pad(x, (0, 1, 0, 2)), self.weight, self.bias)
        return out


class Passing(nn.Module):
    """Buffers that aren't saved, a module that has a `stride` and is no convolution, and the other padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.stride = torch.tensor([8.0, 16.0])
        self.register_buffer("grid", torch.ones(3, 1, 1), persistent=False)
        self.register_buffer("kept", torch.full((3, 1, 1), 2.0))
        self.same = Same(3, 3, (3, 2))
        self.bn = nn.BatchNorm2d(3)
        self.reflect = nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect")
        self.circular = nn.Conv2d(3, 3, (3, 1), padding=(1, 0), padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.same(x)) * self.grid + self.kept
        out: Tensor = self.circular(torch.relu(self.reflect(x)))
        return out


class Sound(nn.Module):
    """One spatial axis; a batch norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 4, stride=2, padding=3, groups=3)
        self.bn = nn.BatchNorm1d(6, affine=False, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x.flatten(2)))
        return out


NETS: tuple[type[nn.Module], ...] = (Residual, Mobile, Video, Decoder, Half, Tied, Passing, Sound)
# Layers that follow each other, for a fusion.
CHAINS: dict[type[nn.Module], str] = {
    Residual: "stem bn",
    Half: "stem bn",
    Mobile: "layers.0 layers.1",
    Video: "conv bn",
    Decoder: "up bn",
    Tied: "first bn",
    Passing: "",
    Sound: "conv bn",
}


def made(cls: type[nn.Module]) -> nn.Module:
    """A network with statistics that aren't the first ones, in eval mode."""
    torch.manual_seed(1)
    net = cls()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean)
    return net.eval()


def geometry_of(module: nn.Module) -> dict[str, Any] | None:
    """What torch's classes say of themselves, written down here once more."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {"eps": module.eps}
    if type(module).__module__ != "torch.nn.modules.conv":
        return None
    assert isinstance(module, nn.modules.conv._ConvNd)
    padding = module.padding
    if isinstance(padding, str):
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [[total // 2, total - total // 2] for total in totals]
    else:
        sides = [[p, p] for p in padding]
    return {
        "stride": list(module.stride),
        "padding": sides,
        "dilation": list(module.dilation),
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "transposed": module.transposed,
        "output_padding": list(module.output_padding),
    }


def example(net: nn.Module) -> Tensor:
    return torch.rand(2, 3, 9, 7).to(next(net.parameters()).dtype)


def _script(net: nn.Module, path: Path) -> None:
    torch.jit.script(net).save(str(path))


def _traced(net: nn.Module, path: Path) -> None:
    torch.jit.trace(net, example(net)).save(str(path))


def _folder(net: nn.Module, path: Path) -> None:
    dcp.save(net.state_dict(), checkpoint_id=path)  # type: ignore[attr-defined]


def _exported(net: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(net, (example(net),)), path)


FORMS: dict[str, tuple[str, Callable[[nn.Module, Path], Any]]] = {
    "module": ("net.pt", torch.save),
    "legacy": ("old.pt", lambda net, path: torch.save(net, path, _use_new_zipfile_serialization=False)),
    "exported": ("net.pt2", _exported),
    "folder": ("folder", _folder),
    "scripted": ("script.pt", _script),
    "traced": ("trace.pt", _traced),
}


def save_as(form: str, net: nn.Module, folder: Path) -> Path:
    """Save a network in a form."""
    name, save = FORMS[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(net, folder / name)
    return folder / name
