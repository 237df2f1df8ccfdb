"""Errors against their bounds, kept while batches of outputs come in: the largest ratio, and where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convtool.core.border import Mask
from convtool.core.inputs import Impulses, Input


@dataclass(frozen=True, slots=True)
class Region:
    """The comparison over some output positions.

    Attributes:
        elements: numbers compared; 0 where the region is empty.
        ratio: largest error / bound; inf for NaN and for what cannot be compared.
        error, bound: the error and the bound where that ratio stands.
        where: (channel, *position) of it, or None where nothing was compared.
        kind: of the input that brought it about: normal, zero, constant, impulse or basis.
        source: for an impulse, (channel, *position) of the input that the output answered to; else None.
        largest_error: the largest error anywhere in the region.
        relative_error: that, relative to the largest output there.
        differing: output positions with an element beyond its bound.
        positions: output positions in the region.
    """

    elements: int = 0
    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    where: tuple[int, ...] | None = None
    kind: str = ""
    source: tuple[int, ...] | None = None
    largest_error: float = 0.0
    relative_error: float = 0.0
    differing: int = 0
    positions: int = 0

    @property
    def equal(self) -> bool:
        """Whether there was something to compare and all of it was within its bound."""
        return self.elements > 0 and self.ratio <= 1


def ratios(expected: Tensor, found: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """(error, error / bound), elementwise; the ratio is inf where one of the three isn't finite.

    NaN compares false with everything, and must not slip through as 'not larger'; an infinite bound allows anything.
    """
    error = (expected - found).abs()
    ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
    comparable = expected.isfinite() & found.isfinite() & bound.isfinite() & ~ratio.isnan()
    return error, torch.where(comparable, ratio, torch.full_like(ratio, math.inf))


class Tallies:
    """Interior and rim, apart.

    Args:
        rim: mask of the output's spatial shape.
        device: where outputs are.
    """

    def __init__(self, rim: Mask, device: torch.device) -> None:
        mask = torch.from_numpy(rim).to(device)  # output_size
        self.interior, self.rim = Tally(~mask), Tally(mask)

    def add(self, kind: str, x: Input, expected: Tensor, found: Tensor, bound: Tensor) -> None:
        """Count outputs (N, C_out, *output_size), those expected, those found, and their bound."""
        error, ratio = ratios(expected, found, bound)
        for part in (self.interior, self.rim):
            part.add(kind, x, error, ratio, bound, expected)


class Tally:
    """One region's count; see `Tallies`."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.positions = int(mask.sum())
        self.everywhere = bool(mask.all())
        self.elements = 0
        self.ratio = self.error = self.bound = self.largest = self.output = 0.0
        self.where: tuple[int, ...] | None = None
        self.kind = ""
        self.source: tuple[int, ...] | None = None
        self.differs = torch.zeros_like(mask)

    def add(self, kind: str, x: Input, error: Tensor, ratio: Tensor, bound: Tensor, expected: Tensor) -> None:
        """Count a batch; see `Tallies.add`."""
        if not self.positions or not error.numel():
            return
        self.elements += error.shape[0] * error.shape[1] * self.positions
        inside = ratio if self.everywhere else torch.where(self.mask, ratio, torch.full_like(ratio, -1.0))
        flat = int(inside.argmax())
        largest = float(inside.reshape(-1)[flat])
        if self.where is None or largest > self.ratio:
            number, *where = (int(i) for i in np.unravel_index(flat, tuple(error.shape)))
            self.where, self.kind, self.ratio = tuple(where), kind, largest
            self.error, self.bound = float(error.reshape(-1)[flat]), float(bound.expand_as(error).reshape(-1)[flat])
            self.source = x.source(number, where[0], error.shape[1]) if isinstance(x, Impulses) else None
        if largest > 1:
            self.differs |= (inside > 1).flatten(0, 1).any(0)
        nothing, size = torch.zeros_like(error), expected.abs()
        worst = torch.where(self.mask, torch.where(error.isnan(), math.inf, error), nothing)
        self.largest = max(self.largest, float(worst.max()))
        self.output = max(self.output, float(torch.where(self.mask & size.isfinite(), size, nothing).max()))

    def region(self) -> Region:
        """What was found."""
        return Region(
            elements=self.elements,
            ratio=self.ratio,
            error=self.error,
            bound=self.bound,
            where=self.where,
            kind=self.kind,
            source=self.source,
            largest_error=self.largest,
            relative_error=self.largest / self.output if self.output else (0.0 if not self.largest else math.inf),
            differing=int(self.differs.sum()),
            positions=self.positions,
        )
