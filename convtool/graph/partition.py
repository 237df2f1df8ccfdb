"""The cheapest way to cut a sequence into pieces: dynamic programming over where the last piece begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Cost: TypeAlias = tuple[float, ...]  # compared from the first number on, and added number by number


def partition(count: int, cost: Callable[[int, int], Cost | None]) -> tuple[Cost, list[tuple[int, int]]]:
    """The cheapest partition of positions 0 ... count-1 into consecutive pieces.

    Args:
        count: of positions, at least 1.
        cost: of the piece from `start` up to but without `stop`; None where there can be no such piece. A piece of one
            position always has a cost.

    Returns:
        The total and the pieces (start, stop) in order. Of equally cheap partitions the one with the longest last
        pieces.
    """
    best: list[tuple[Cost, list[tuple[int, int]]] | None] = [((), [])]
    for stop in range(1, count + 1):
        options = []
        for start in range(stop):
            before, price = best[start], cost(start, stop)
            if before is not None and price is not None:
                options.append((_plus(before[0], price), start, [*before[1], (start, stop)]))
        cheapest = min(options, key=lambda option: (option[0], option[1]), default=None)
        best.append(None if cheapest is None else (cheapest[0], cheapest[2]))
    found = best[count]
    assert found is not None, "a piece of one position always has a cost"
    return found


def _plus(a: Cost, b: Cost) -> Cost:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a else b
