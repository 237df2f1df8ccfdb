"""Fusions: the forward pass before and after, for the sample models and real architectures; and composing itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from live import filled, geometry_of, save, settings
from networks import NETWORKS
from safetensors.torch import load_file
from torch import Tensor, nn

import convtool
from bench.harness import OUTPUT, Candidate, Comparison, timed
from convtool.cli.app import run_app

SAMPLES = Path(__file__).resolve().parent.parent.parent / "sample_models"
IMAGES = 256


@dataclass(frozen=True)
class Sample:
    """A sample model, the words of each `convtool fuse`, one after the other, and what they put together."""

    name: str
    fusions: tuple[str, ...]
    what: str


SAMPLE_MODELS = (
    Sample(
        "chains",
        ("reduce spread gather --set gather.stride=2", "widen narrow --set widen.padding=1,2"),
        "1x1 + 3x3 + 5x5, and 3x5 + 1x1",
    ),
    Sample(
        "conv_bn",
        ("--recipe conv-bn-torchvision --geometry {folder}/conv_bn.toml",),
        "four convolutions, each with its batch norm",
    ),
    Sample("repvgg", ("--recipe repvgg --set stage2.rbr_dense.conv.stride=2",), "three blocks of parallel branches"),
    Sample(
        "separable1d",
        (
            "block0.depthwise block0.pointwise --set block0.depthwise.groups=8",
            "block1.depthwise block1.pointwise --set block1.depthwise.groups=16",
            "block2.depthwise block2.pointwise --set block2.depthwise.groups=24 --set block2.depthwise.stride=2",
        ),
        "depthwise + pointwise, which is dense when fused",
    ),
)


@dataclass(frozen=True)
class Architecture:
    """A model of transformers with random numbers in it."""

    name: str
    recipe: str
    short: dict[str, Any]
    size: int = 224


ARCHITECTURES = (
    Architecture("ResNet", "conv-bn-transformers", {"hidden_sizes": [32, 64, 64, 96], "depths": [1, 1, 1, 1]}),
    Architecture("MobileNetV2", "conv-bn-transformers", {"depth_multiplier": 0.35}),
    Architecture(
        "RegNet",
        "conv-bn-transformers",
        {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "groups_width": 16},
    ),
    Architecture("ConvNext", "layer-scale", {"hidden_sizes": [24, 48, 96, 192], "depths": [1, 1, 2, 1]}),
)


CONV_BN = """
"conv[123]" = { padding = 1 }
conv2 = { padding = 1, stride = 2 }
conv3 = { padding = 1, groups = 2 }
bn2 = { eps = 1e-3 }
"""


def comparisons(short: bool) -> Iterator[Comparison]:
    """The rows about fusions."""
    yield composing(256 if short else 512)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as name:
        folder = Path(name)
        (folder / "conv_bn.toml").write_text(CONV_BN)
        for sample in SAMPLE_MODELS:
            pair = functools.cache(functools.partial(sample_pair, sample, folder))
            yield _forward(f"forward pass of {sample.name}, {IMAGES} images", sample.what, pair, times=10)
        for architecture in ARCHITECTURES:
            pair = functools.cache(functools.partial(architecture_pair, architecture, short, folder))
            title = f"forward pass of {architecture.name} from transformers, 1 image"
            yield _forward(title, f"recipe {architecture.recipe}", pair, times=1)


def fuse(before: Path, words: list[str], after: Path) -> None:
    """Run the program."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        how = ["--assume-defaults", "--force", "--no-verify", "--json"]
        run_app(["fuse", str(before), *words, "-o", str(after), *how])
    document: dict[str, Any] = json.loads(out.getvalue())
    if not document["ok"]:
        raise SystemExit(document["error"]["message"])


# --- forward passes


@dataclass(frozen=True)
class Pair:
    """A model, the same with its fused layers, and images to run them on."""

    unfused: nn.Module
    fused: nn.Module
    images: Tensor


def sample_pair(sample: Sample, folder: Path) -> Pair:
    """A trained sample model, on digits."""
    path = SAMPLES / f"{sample.name}.safetensors"
    model = NETWORKS[sample.name]().eval()
    model.load_state_dict(load_file(path))
    for number, words in enumerate(sample.fusions):
        after = folder / f"{sample.name}{number}.safetensors"
        fuse(path, words.format(folder=folder).split(), after)
        path = after
    fused = convtool.apply(copy.deepcopy(model), path).eval()
    return Pair(model, fused, load_file(SAMPLES / "digits.safetensors")["images"][:IMAGES])


def architecture_pair(architecture: Architecture, short: bool, folder: Path) -> Pair:
    """An architecture in its usual size (in a small one for `short`)."""
    import transformers

    config = getattr(transformers, f"{architecture.name}Config")(**(architecture.short if short else {}))
    model = filled(getattr(transformers, f"{architecture.name}ForImageClassification")(config)).float()
    path, after = save(model, folder / "model.safetensors"), folder / "fused.safetensors"
    fuse(path, ["--recipe", architecture.recipe, *settings(geometry_of(model), folder / "geometry.toml")], after)
    images = torch.randn(1, 3, architecture.size, architecture.size, generator=torch.Generator().manual_seed(0))
    return Pair(model, convtool.apply(copy.deepcopy(model), after), images)


def _forward(title: str, note: str, pair: Callable[[], Pair], times: int) -> Comparison:
    def forward(name: str) -> None:
        made = pair()
        model: nn.Module = getattr(made, name)
        with torch.inference_mode():
            for _ in range(times):
                model(made.images)

    def job(name: str) -> Callable[[], float]:
        return timed(lambda: forward(name), prepare=lambda: forward(name))  # the first pass makes and allocates

    candidates = (Candidate("unfused", job("unfused")), Candidate("fused", job("fused")))
    return Comparison(title, candidates, ours="fused", note=note)


# --- composing


def composing(channels: int) -> Comparison:
    """A 3x3 after a 3x3, in float64, beside a matrix product of as many multiply-adds."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    wide = first.reshape(channels, -1)  # (C, 9 C)
    out = torch.empty(channels, wide.shape[1], dtype=torch.float64)
    rows = second.permute(2, 3, 0, 1).reshape(9, channels, channels).contiguous()

    def matmul() -> None:
        for row in rows:
            torch.mm(row, wide, out=out)

    def conv2d() -> Tensor:
        return F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2)

    layers = convtool.conv(first), convtool.conv(second)
    candidates = (
        Candidate("matrix product of as many multiply-adds", timed(matmul)),
        Candidate("convtool.compose", timed(lambda: convtool.compose(*layers))),
        Candidate("conv2d of the kernels", timed(conv2d), most=2),
    )
    title = f"composing {channels} -> {channels} -> {channels}, 3x3 after 3x3, float64"
    return Comparison(title, candidates, ours="convtool.compose", target=1.2)
