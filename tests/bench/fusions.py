"""Fusions: the forward pass before and after, for the sample models and real architectures; and composing itself."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Iterator
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
        ("--recipe conv-bn-torchvision --set conv[123].padding=1 --set conv2.stride=2 --set bn2.eps=1e-3",),
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


def comparisons(short: bool) -> Iterator[Comparison]:
    """The rows about fusions."""
    yield composing(64 if short else 512)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:
        for sample in SAMPLE_MODELS:
            yield forward_of_sample(sample, Path(folder))
        for architecture in ARCHITECTURES:
            yield forward_of_architecture(architecture, short, Path(folder))


def fuse(before: Path, words: list[str], after: Path) -> dict[str, Any]:
    """Run the program; its JSON document."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        run_app(["fuse", str(before), *words, "-o", str(after), "--force", "--no-verify", "--json"])
    document: dict[str, Any] = json.loads(out.getvalue())
    if not document["ok"]:
        raise SystemExit(document["error"]["message"])
    return document


# --- forward passes


def forward_of_sample(sample: Sample, folder: Path) -> Comparison:
    """A trained sample model on a batch of digits."""
    path = SAMPLES / f"{sample.name}.safetensors"
    model = NETWORKS[sample.name]()
    model.load_state_dict(load_file(path))
    documents = []
    for number, words in enumerate(sample.fusions):
        after = folder / f"{sample.name}{number}.safetensors"
        documents.append(fuse(path, words.split(), after))
        path = after
    images = load_file(SAMPLES / "digits.safetensors")["images"][:IMAGES]
    fused = convtool.apply(copy.deepcopy(model), path)
    title = f"forward pass of {sample.name}: {sample.what}"
    return _forward(title, model.eval(), fused.eval(), images, documents, times=10)


def forward_of_architecture(architecture: Architecture, short: bool, folder: Path) -> Comparison:
    """An architecture in its usual size (in a small one for `short`), on one image."""
    import transformers

    config = getattr(transformers, f"{architecture.name}Config")(**(architecture.short if short else {}))
    model = filled(getattr(transformers, f"{architecture.name}ForImageClassification")(config)).float()
    path, after = save(model, folder / "model.safetensors"), folder / "fused.safetensors"
    stated = settings(geometry_of(model), folder / "geometry.toml")
    document = fuse(path, ["--recipe", architecture.recipe, *stated], after)
    fused = convtool.apply(copy.deepcopy(model), after)
    images = torch.randn(1, 3, architecture.size, architecture.size, generator=torch.Generator().manual_seed(0))
    title = f"forward pass of {architecture.name} from transformers"
    return _forward(title, model, fused, images, [document], times=1)


def _forward(
    title: str, before: nn.Module, after: nn.Module, images: Tensor, documents: list[dict[str, Any]], times: int
) -> Comparison:
    def job(model: nn.Module) -> Any:
        def forward() -> None:
            with torch.inference_mode():
                for _ in range(times):
                    model(images)

        forward()  # the first pass allocates
        return timed(forward)

    fusions = [fusion for document in documents for fusion in document["fusions"]]
    numbers = [sum(fusion["parameters"][key] for fusion in fusions) for key in ("before", "after")]
    note = f"{len(fusions)} fusions, {numbers[0]} -> {numbers[1]} parameters in them; {len(images)} images"
    candidates = (Candidate("unfused", job(before)), Candidate("fused", job(after)))
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
