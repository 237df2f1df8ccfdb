"""The 53 batch norms of a ResNet-50 folded, beside torch.load, folding by hand and torch.save; and what proofs cost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import OUTPUT, Candidate, Comparison, timed
from convtool.core.bound import Bound
from convtool.core.coefficients import compare_numbers
from convtool.core.conv import Conv
from convtool.core.fuse import fuse
from convtool.core.geometry import Geometry
from convtool.core.stored import stored
from convtool.core.tree import Chain

BY_HAND = """
import os, sys
import torch

state = torch.load(sys.argv[1], weights_only=True)
norms = {name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")}
folded = {}
for name, tensor in state.items():
    layer, _, parameter = name.rpartition(".")
    norm = layer.replace("conv", "bn") if "conv" in layer else layer.replace("downsample.0", "downsample.1")
    if layer in norms:
        continue
    if norm in norms:
        scale = state[norm + ".weight"] / torch.sqrt(state[norm + ".running_var"] + 1e-5)
        folded[name] = tensor * scale.reshape(-1, 1, 1, 1)
        folded[layer + ".bias"] = state[norm + ".bias"] - state[norm + ".running_mean"] * scale
    else:
        folded[name] = tensor
torch.save(folded, sys.argv[2])
with open(sys.argv[2], "rb") as file:
    os.fsync(file.fileno())
"""
RECIPE = "".join(
    f'[[fuse]]\nname = "{conv}"\nchain = ["{conv}", "{norm}"]\n'
    for conv, norm in (
        ("conv1", "bn1"),
        *((f"{{block}}.conv{n}", f"{{block}}.bn{n}") for n in (1, 2, 3)),
        ("{block}.downsample.0", "{block}.downsample.1"),
    )
)
RECIPE += '[geometry]\n"*bn*" = { eps = 1e-5 }\n"*downsample.1" = { eps = 1e-5 }\n'
OURS, HAND = "convtool fuse, proof included", "torch.load, by hand, torch.save"


def comparisons(short: bool) -> Iterator[Comparison]:
    """The rows about folding and proving."""
    with tempfile.TemporaryDirectory(dir=OUTPUT) as name:
        folder = Path(name)
        torch.save(resnet50(), folder / "net.pth")
        (folder / "fold.toml").write_text(RECIPE)
        yield folding(folder, "wall time", wall)
        yield folding(folder, "CPU time", processor)
    yield proof("a batch norm folded into 512 to 512 3x3", elementwise(), 2)
    yield proof(
        "3x3 after 3x3, 128 channels" if short else "3x3 after 3x3, 512 channels", pair(128 if short else 512), 3
    )


def resnet50() -> dict[str, Tensor]:
    """A state dict of torchvision's names and shapes, 98 MB of random numbers."""
    state: dict[str, Tensor] = {}

    def layers(conv: str, norm: str, outer: int, inner: int, kernel: int) -> None:
        state[f"{conv}.weight"] = torch.randn(outer, inner, kernel, kernel) * (2 / inner) ** 0.5 / kernel
        names = (f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
        state.update({name: torch.rand(outer) + 0.5 for name in names})
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    torch.manual_seed(0)
    layers("conv1", "bn1", 64, 3, 7)
    inner = 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for number in range(count):
            block = f"layer{stage}.{number}"
            for n, shape in enumerate(((width, inner, 1), (width, width, 3), (4 * width, width, 1)), 1):
                layers(f"{block}.conv{n}", f"{block}.bn{n}", *shape)
            if not number:
                layers(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, inner, 1)
            inner = 4 * width
    return state | {"fc.weight": torch.randn(1000, 2048), "fc.bias": torch.randn(1000)}


def folding(folder: Path, what: str, measured: Callable[[list[str]], Callable[[], float]]) -> Comparison:
    """Whole processes, their imports included, until the file is on the disk."""
    net, out, hand = (str(folder / name) for name in ("net.pth", "out.pt", "hand.pt"))
    ours = ["-m", "convtool", "fuse", net, "--recipe", str(folder / "fold.toml"), "-o", out, "--force", "--quiet"]
    return Comparison(
        f"folding the 53 batch norms of a ResNet-50 of 98 MB, with fsync: {what} of the process",
        [Candidate(HAND, measured(["-c", BY_HAND, net, hand])), Candidate(OURS, measured(ours))],
        OURS,
        1.3,
    )


def wall(arguments: list[str]) -> Callable[[], float]:
    """Return what measures a Python process by the clock."""
    return timed(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True), os.sync)


def processor(arguments: list[str]) -> Callable[[], float]:
    """Return what measures the processor's time of a Python process."""

    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return measure


def elementwise() -> list[Conv]:
    """A layer and a factor for each channel."""
    return [
        Conv(torch.randn(512, 512, 3, 3), None, Geometry.of((3, 3), padding=1)),
        Conv(torch.randn(512, 1, 1, 1, dtype=torch.float64), torch.randn(512), Geometry.of((1, 1), groups=512)),
    ]


def pair(channels: int) -> list[Conv]:
    """Two dense layers."""
    return [Conv(torch.randn(channels, channels, 3, 3), None, Geometry.of((3, 3))) for _ in range(2)]


def proof(what: str, chain: list[Conv], target: float) -> Comparison:
    """Number by number, beside making the layer."""
    tree, fused = Chain(tuple(chain)), fuse(chain, dtype=torch.float32)

    def prove() -> None:
        kept = stored(fused)
        assert compare_numbers(tree, kept, Bound(tree, kept)).equal

    return Comparison(
        f"proof of {what}, float32",
        [
            Candidate("fusing it", timed(lambda: fuse(chain, dtype=torch.float32))),
            Candidate("proving it", timed(prove)),
        ],
        "proving it",
        target,
    )
