"""How long layers take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.fuse import NamedConv
from convtool.core.geometry import Geometry
from convtool.core.tree import Chain, Sum, Tree
from convtool.kinds.kind import Kind

LEAST_SECONDS = 0.03  # of measuring each layer, so that one interruption doesn't decide
LEAST_RUNS = 5

_Key: TypeAlias = tuple[Kind | None, tuple[int, ...], bool, Geometry, tuple[int, ...], int]


class Stopwatch:
    """Measures layers, each once: layers of one shape on one size of input count as one.

    Args:
        kinds: of layers by name; None for what only a convolution computes.
        dtype: to run in.
    """

    def __init__(self, kinds: Callable[[str], Kind | None], dtype: torch.dtype) -> None:
        self.kinds, self.dtype = kinds, dtype
        self.known: dict[_Key, float] = {}

    def seconds(self, tree: Tree[NamedConv], size: tuple[int, ...], positions: int) -> float:
        """Of the layers one after the other; adding up branches is not counted."""
        return self._run(tree, size, positions)[0]

    def _run(self, tree: Tree[NamedConv], size: tuple[int, ...], positions: int) -> tuple[float, tuple[int, ...]]:
        """Seconds, and the size of the output."""
        if isinstance(tree, Chain):
            total = 0.0
            for part in tree.parts:
                seconds, size = self._run(part, size, positions)
                total += seconds
            return total, size
        if isinstance(tree, Sum):
            each = [self._run(part, size, positions) for part in tree.parts]
            return sum(seconds for seconds, _ in each), each[0][1]
        return self.layer(self.kinds(tree.name), tree.conv, size, positions), tree.conv.output_size(size)

    def layer(self, kind: Kind | None, conv: Conv, size: tuple[int, ...], positions: int) -> float:
        """Seconds of one run of a layer: the shortest of several, as whatever else the machine does only adds."""
        key = (kind, tuple(conv.weight.shape), conv.bias is not None, conv.geometry, size, positions)
        if key not in self.known:
            self.known[key] = _shortest(_runner(kind, conv, size, positions, self.dtype))
        return self.known[key]


def _shortest(run: Callable[[], Tensor]) -> float:
    with torch.inference_mode():
        run()
        best, spent, runs = float("inf"), 0.0, 0
        while runs < LEAST_RUNS or spent < LEAST_SECONDS:
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
            best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def _runner(
    kind: Kind | None, conv: Conv, size: tuple[int, ...], positions: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    real = Conv(noise(*conv.weight.shape), None if conv.bias is None else noise(conv.out_channels), conv.geometry)
    if conv.spatial_axes == 0:
        x = noise(positions, conv.in_channels)
        weight = real.weight if conv.geometry.groups == 1 else None
        if weight is None:
            return lambda: x * real.weight[:, 0]
        return lambda: F.linear(x, weight, real.bias)
    x = noise(1, conv.in_channels, *size)
    return (kind or Kind()).timed(real, x)
