"""Inputs on which layers are run, and what comes of them: the largest error by its bound, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from convtool.core.rounding import exact_dtype
from convtool.errors import UsageError

Index: TypeAlias = tuple[int, ...]

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


@dataclass(frozen=True, slots=True)
class Region:
    """The comparison over some output positions.

    Attributes:
        elements: numbers compared; 0 where the region is empty.
        ratio: largest error / bound, 1 where that is all that was asked; inf for NaN and for what cannot be compared.
        error, bound: the error and the bound where that ratio stands.
        where: (channel, *position) of it, or None where nothing was compared.
        kind: of the input that brought it about: normal, zero, constant or basis; 'number' where none did.
        largest_error: the largest error anywhere in the region.
        relative_error: that, relative to the largest output there.
        differing: output positions with an element beyond its bound.
        positions: output positions in the region.
        equal: whether there was something to compare and all of it was within its bound.
    """

    elements: int = 0
    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    where: tuple[int, ...] | None = None
    kind: str = ""
    largest_error: float = 0.0
    relative_error: float = 0.0
    differing: int = 0
    positions: int = 0
    equal: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "equal", self.elements > 0 and self.ratio <= 1)


def ratios(expected: Tensor, found: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return (error, error / bound), elementwise; the ratio is inf where one of the three isn't finite.

    NaN compares false with everything, and must not slip through as 'not larger'; an infinite bound allows anything.
    """
    error = (expected - found).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return error, torch.where((error + bound).isfinite(), ratio, math.inf)


def check_trials(trials: int, seed: int, exhaustive: bool = False) -> None:
    """Raise UsageError where nothing would be compared, or no generator takes the seed."""
    if trials < 1 and not exhaustive:
        raise UsageError(f"trials: expected at least 1, got {trials}; no comparison is no proof")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed}")


class Worst:
    """What numbers come to that are held against bounds, kept as a `Region` while they come in."""

    def __init__(self, kind: str = "") -> None:
        self.region = Region(kind=kind)
        self._output = 0.0

    def count(self, elements: int) -> None:
        """Count numbers that are within their bounds."""
        now = self.region
        elements, positions = now.elements + elements, now.positions + elements
        self.region = replace(now, elements=elements, positions=positions, ratio=max(now.ratio, 1.0))

    def hold(
        self, expected: Tensor, found: Tensor, bound: Tensor, where: Callable[[Index], Index] = tuple, kind: str = ""
    ) -> Tensor:
        """Count numbers that are held against bounds, and return the ratio of error to bound of each.

        Args:
            where: says what stands at an index of theirs.
            kind: of what brought them about, where that isn't the same for all.
        """
        error, ratio = ratios(expected, found.to(exact_dtype(found.dtype)), bound * (1 + 2.0**-50))
        if not error.numel():
            return ratio
        at, size, now = int(ratio.argmax()), expected.abs(), self.region
        worst = float(ratio.reshape(-1)[at])
        self._output = max(self._output, float(torch.where(size.isfinite(), size, 0.0).max()))
        largest = max(now.largest_error, float(error.nan_to_num(nan=math.inf, posinf=math.inf).max()))
        differing = int((ratio > 1).sum()) if worst > 1 else 0
        now = replace(
            now,
            elements=now.elements + error.numel(),
            positions=now.positions + error.numel(),
            differing=now.differing + differing,
            largest_error=largest,
            relative_error=largest / self._output if self._output else (math.inf if largest else 0.0),
        )
        if worst > now.ratio or not self.region.elements:
            off, most = (float(part.expand_as(ratio).reshape(-1)[at]) for part in (error, bound))
            place = where(tuple(int(i) for i in np.unravel_index(at, tuple(ratio.shape))))
            now = replace(now, ratio=worst, error=off, bound=most, where=place, kind=kind or now.kind)
        self.region = now
        return ratio


class Tally:
    """The count of some output positions.

    Args:
        mask: of the output's spatial shape.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask, self._places, self._worst = mask, mask.nonzero(), Worst()
        self._differs = mask.new_zeros(len(self._places))

    def add(self, kind: str, expected: Tensor, found: Tensor, bound: Tensor) -> None:
        """Count outputs (N, C_out, *output_size), those expected, those found, and their bound."""
        if not len(self._places):
            return
        each = expected, found, bound.expand_as(expected)
        expected, found, bound = (one[..., self._mask] for one in each)  # (N, C_out, positions)
        ratio = self._worst.hold(expected, found, bound, lambda at: (at[1], *self._places[at[2]].tolist()), kind)
        self._differs |= (ratio > 1).flatten(0, 1).any(0)

    def region(self) -> Region:
        """Return what was found, counted by positions."""
        return replace(self._worst.region, differing=int(self._differs.sum()), positions=len(self._places))
