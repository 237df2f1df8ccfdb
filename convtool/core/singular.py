"""The ends of a spectrum: singular values, and how well each is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

Method: TypeAlias = Literal["fourier", "dense", "cholesky", "lanczos", "sums"]

ROUNDING = 2.0**-45  # relative to the largest, of what is exact in float64 to rounding: some hundred units


@dataclass(frozen=True, slots=True)
class SingularValue:
    """A singular value and how well it is known.

    Attributes:
        value: of some unit vector. The largest is at least this, and the smallest at most, up to rounding.
        error: it is no further than this from `value`; that is proved.
        proved: whether the error is within the tolerance; else the value is a bound, and the error says how vague.
    """

    value: float
    error: float
    proved: bool


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The ends of the spectrum of a layer's matrix.

    Attributes:
        shape: (rows, columns) of the matrix.
        largest, smallest: of its min(rows, columns) singular values; the smallest is None where it wasn't asked for.
        methods: how it was computed, in the order of first use.
        steps: of iterations, in the group that took most; 0 where there were none.
        tolerance: on errors, relative to the largest singular value.
        lacking: bytes of the largest factorisation that would have proved more and wasn't made; 0 without one.
    """

    shape: tuple[int, int]
    largest: SingularValue
    smallest: SingularValue | None
    methods: tuple[Method, ...]
    steps: int
    tolerance: float
    lacking: int

    @property
    def condition(self) -> float:
        """The largest over the smallest: infinite where that is zero as far as is known, NaN where it wasn't asked."""
        if self.smallest is None:
            return math.nan
        if self.smallest.value <= self.smallest.error:
            return math.inf
        return self.largest.value / self.smallest.value

    @property
    def condition_error(self) -> float:
        """How far off the condition number may be, as both ends may be off by their errors."""
        if self.smallest is None or not math.isfinite(self.condition):
            return self.condition
        most = (self.largest.value + self.largest.error) / (self.smallest.value - self.smallest.error)
        return most - self.condition

    @property
    def condition_at_least(self) -> float:
        """What the condition number is at least: estimates lie between the ends, proved or not; NaN as `condition`."""
        if self.smallest is None:
            return math.nan
        rounding = ROUNDING * self.largest.value
        if self.smallest.value + rounding == 0:
            return math.inf
        return (self.largest.value - rounding) / (self.smallest.value + rounding)
