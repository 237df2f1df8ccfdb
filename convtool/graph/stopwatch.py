"""How long layers take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.kinds.kind import Kind

LEAST_SECONDS = 0.03  # of measuring each layer, so that one interruption doesn't decide
LEAST_RUNS = 5

_Key: TypeAlias = tuple[Kind, tuple[int, ...], bool, Geometry, tuple[int, ...], int]


class Stopwatch:
    """Measures layers, each once: layers of one shape on one size of input count as one.

    Args:
        dtype: to run in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.known: dict[_Key, float] = {}

    def seconds(self, kind: Kind, conv: Conv, size: tuple[int, ...], positions: int) -> float:
        """Return the seconds of one run of a layer: of the shortest of several, as all else on the machine only adds.

        Args:
            positions: how often it runs beside itself, where it has no spatial axes.
        """
        key = (kind, conv.shape, conv.bias is not None, conv.geometry, size, positions)
        if key not in self.known:
            self.known[key] = _shortest(self._run(kind, conv, size, positions))
        return self.known[key]

    def _run(self, kind: Kind, conv: Conv, size: tuple[int, ...], positions: int) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        weight, bias = noise(*conv.shape), None if conv.bias is None else noise(conv.out_channels)
        if conv.spatial_axes:
            return kind.timed(Conv(weight, bias, conv.geometry), noise(1, conv.in_channels, *size))
        x = noise(positions, conv.in_channels)
        return (lambda: F.linear(x, weight, bias)) if conv.geometry.groups == 1 else (lambda: x * weight[:, 0])


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
