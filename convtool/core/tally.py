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
    ratio = torch.where(error == 0, 0.0, error / bound)
    return error, torch.where((error + bound).isfinite(), ratio, math.inf)


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
        rows = x.rows if isinstance(x, Impulses) else None
        mask, everywhere, positions = self.mask, self.everywhere, self.positions
        if rows:
            mask = mask[torch.meshgrid(*rows, indexing="ij")]
            positions = int(mask.sum())
            everywhere = positions == mask.numel()
        if not positions or not error.numel():
            return
        self.elements += error.shape[0] * error.shape[1] * positions
        inside = ratio if everywhere else torch.where(mask, ratio, -1.0)
        flat = int(inside.argmax())
        largest = float(inside.reshape(-1)[flat])
        if self.where is None or largest > self.ratio:
            number, channel, *place = (int(i) for i in np.unravel_index(flat, tuple(error.shape)))
            if rows:
                place = [int(row[at]) for row, at in zip(rows, place, strict=True)]
            self.where, self.kind, self.ratio = (channel, *place), kind, largest
            self.error, self.bound = float(error.reshape(-1)[flat]), float(bound.expand_as(error).reshape(-1)[flat])
            self.source = x.source(number, channel, error.shape[1]) if isinstance(x, Impulses) else None
        if largest > 1:
            beyond = (inside > 1).flatten(0, 1).any(0)
            if rows:
                self.differs[torch.meshgrid(*rows, indexing="ij")] |= beyond
            else:
                self.differs |= beyond
        size = expected.abs()
        if not everywhere:
            error, size = torch.where(mask, error, 0.0), torch.where(mask, size, 0.0)
        self.largest = max(self.largest, _or_infinity(float(error.max())))
        output = float(size.max())
        if not math.isfinite(output):
            output = float(torch.where(size.isfinite(), size, 0.0).max())
        self.output = max(self.output, output)

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


def _or_infinity(number: float) -> float:
    return math.inf if math.isnan(number) else number
