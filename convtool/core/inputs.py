"""Inputs on which layers are run: signed normals, zero, a constant, and every basis vector where all are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BATCH_ELEMENTS = 1 << 20  # numbers in flight, of the widest layer: 8 MiB in float64
SCALES = (0, 3, -3, 10, -10)  # of the normals, as powers of two, so that neither bias nor weights always dominate


def dense_inputs(
    channels: int, size: tuple[int, ...], trials: int, seed: int, widest: int, *, basis: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield batches of inputs (N, C, *size) in float64, each with the name of its kind.

    Args:
        widest: numbers for one input in the widest layer; sets the batches' size.
        basis: every basis vector as well.
    """
    shape = (channels, *size)
    batch = max(1, BATCH_ELEMENTS // max(1, widest))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, trials, batch):
        count = min(batch, trials - start)
        scales = torch.tensor([2.0 ** SCALES[(start + i) % len(SCALES)] for i in range(count)], dtype=torch.float64)
        # One at a time: what torch draws for several at once depends on how many, and so on how batches are cut.
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
        normal = torch.stack(drawn)
        yield "normal", normal * scales.reshape(-1, *(1,) * len(shape))
    yield "zero", torch.zeros(1, *shape, dtype=torch.float64)
    yield "constant", torch.ones(1, *shape, dtype=torch.float64)
    for places in torch.arange(math.prod(shape) if basis else 0).split(batch):
        x = torch.zeros(len(places), math.prod(shape), dtype=torch.float64)
        yield "basis", x.scatter_(1, places[:, None], 1.0).reshape(len(places), *shape)


def dense_count(channels: int, size: tuple[int, ...], trials: int, *, basis: bool = False) -> int:
    """Return how many inputs `dense_inputs` makes."""
    return trials + 2 + (channels * math.prod(size) if basis else 0)
