"""By what an adapter's change is multiplied: alpha over the rank, as trainers have it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scaling:
    """By what an adapter's change is multiplied, besides its strength.

    Attributes:
        alpha, rank: null where there is none.
        factor: alpha / rank, or alpha / √rank; 1 without either.
    """

    alpha: float | None
    rank: int | None
    factor: float

    def __str__(self) -> str:
        if self.alpha is None or self.rank is None:
            return ", ".join([f"rank {self.rank}"] * (self.rank is not None) + ["no alpha in the file"])
        root = "" if self.factor == self.alpha / self.rank else "√"
        return f"alpha {self.alpha:g} / {root}rank {self.rank} = {self.factor:.4g}"
