"""Whole models, fused by their plan: the forward pass of each against itself."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from live import filled
from torch import Tensor, nn

import convtool
from bench.harness import Candidate, Comparison, timed


@dataclass(frozen=True)
class Architecture:
    """A model of transformers with random numbers in it, and the size of its input."""

    name: str
    head: str
    size: tuple[int, ...]
    short: dict[str, Any]


ARCHITECTURES = (
    Architecture("ResNet", "Model", (3, 224, 224), {"hidden_sizes": [32, 64, 64, 96], "depths": [1, 1, 1, 1]}),
    Architecture(
        "RegNet",
        "Model",
        (3, 224, 224),
        {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "groups_width": 16},
    ),
    Architecture("MobileNetV1", "Model", (3, 224, 224), {"depth_multiplier": 0.25}),
    Architecture("MobileNetV2", "Model", (3, 224, 224), {"depth_multiplier": 0.35}),
    Architecture("ConvNext", "Model", (3, 224, 224), {"hidden_sizes": [24, 48, 96, 192], "depths": [1, 1, 2, 1]}),
    Architecture("Segformer", "ForSemanticSegmentation", (3, 256, 256), {"depths": [1, 1, 1, 1]}),
)


@dataclass(frozen=True)
class Pair:
    """A model, the same with its fused layers, and an input."""

    unfused: nn.Module
    fused: nn.Module
    x: Tensor


def comparisons(short: bool) -> Iterator[Comparison]:
    """A row for each architecture; those without anything to fuse have none."""
    for architecture in ARCHITECTURES:
        pair = functools.cache(functools.partial(_pair, architecture, short))
        size = ",".join(map(str, architecture.size))
        yield _forward(f"planned and fused: {architecture.name} from transformers, one input of {size}", pair)


def _pair(architecture: Architecture, short: bool) -> Pair:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{architecture.name}Config")(**(architecture.short if short else {}))
        model = filled(getattr(transformers, f"{architecture.name}{architecture.head}")(config)).float()
        fused = convtool.fuse_model(copy.deepcopy(model), architecture.size)
    x = torch.randn(1, *architecture.size, generator=torch.Generator().manual_seed(0))
    return Pair(model, fused, x)


def _forward(title: str, pair: Callable[[], Pair]) -> Comparison:
    def forward(name: str) -> None:
        made = pair()
        model: nn.Module = getattr(made, name)
        with torch.inference_mode():
            model(made.x)

    def job(name: str) -> Callable[[], float]:
        return timed(lambda: forward(name), prepare=lambda: forward(name))  # the first pass makes and allocates

    candidates = (Candidate("unfused", job("unfused")), Candidate("fused", job("fused")))
    return Comparison(title, candidates, ours="fused", note="by convtool.fuse_model")
