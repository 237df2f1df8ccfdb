"""The Gram matrix of a block on its shorter side, as a band, factored by LAPACK: what is proved of its eigenvalues.

G = T* T, or T T* where T has fewer rows than columns. Positions that meet in a tap are near each other, so with the
channels innermost G is a band, and so it is on each axis: its numbers are the products of two taps' own, added up axis
by axis where they meet. A Cholesky factorisation of G less a multiple of the identity tells whether all eigenvalues lie
above that multiple, and a factor serves inverse iteration.

That a factorisation succeeds in floating point is a proof once rounding is allowed for: with a factor L of width b,
L L* = A + E, |E| <= gamma(b + 1) |L| |L*| (Higham: Accuracy and Stability of Numerical Algorithms, 10.1; Rump:
Verification of Positive Definiteness, 2006), whatever the order of the sums. So A's eigenvalues are at least minus the
largest row sum of that, to which comes what forming A brings with it. Nothing is exchanged in a Cholesky factorisation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.blocks import Block, Line, ShortSide
from convtool.core.bound import U64, gamma
from convtool.core.taps import PADDED

Array: TypeAlias = npt.NDArray[Any]

BAND_BYTES = 3 << 29  # of a factor, and of the numbers that are kept beside it
FACTOR_WORK = 1 << 40  # flops of a factorisation: half a minute or so on two cores, and a few are made
TOGETHER = 1 << 22  # numbers that are added up at a time
SLACK = 16  # roundings besides those that are counted, of divisions by reciprocals for example


class Gram:
    """G of one block; `Gram.of` makes it where it fits.

    Attributes:
        side: of the block, its positions and axes in an order that makes the band narrow.
        work: flops of a factorisation.
        norm: at least the largest eigenvalue.
    """

    def __init__(self, side: ShortSide, reaches: tuple[int, ...], width: int) -> None:
        self.side, self._width, self.work = side, width, side.size * width**2
        self.norm = side.block.norm() ** 2
        self._complex = 4 if side.block.weight.is_complex() else 1  # roundings of a product, in terms of a real one's
        self._formed = gamma(side.terms * self._complex + SLACK, U64) * self.norm
        weight = side.block.weight.movedim((0, 1), (-2, -1)).reshape(-1, *side.block.weight.shape[:2])
        left, right = (weight, weight.mH) if side.flipped else (weight.mH, weight)
        taps = side.block.weight.shape[2:]
        values = (left[:, None] @ right).reshape(*taps, *taps, side.channels, side.channels)
        for number, (line, reach) in enumerate(zip(side.block.lines, reaches, strict=True)):
            values = values.movedim((2 * number, number + len(taps)), (0, 1)).flatten(0, 1)
            values = _meet(values, line, side.flipped, reach, lower=number == 0)
            values = values.movedim((0, 1), (2 * number, 2 * number + 1))
        self._values = values.numpy()  # (positions, offsets) of each axis, channels, channels
        self._reaches = reaches

    @classmethod
    def of(cls, side: ShortSide) -> Gram | None:
        """Return the Gram matrix of a block's shorter side, or None where it would take too much to factor."""
        block, options = side.block, []
        numbered = [_numbered(line, side.flipped) for line in block.lines]
        for order in itertools.permutations(range(len(numbered))):
            reaches, counts = (
                tuple(part[number] for number in order) for part in ([r for _, r in numbered], side.positions)
            )
            width = sum(reach * math.prod(counts[at + 1 :]) for at, reach in enumerate(reaches))
            options.append(((width + 1) * side.channels - 1, order, reaches, counts))
        width, order, reaches, counts = min(options)
        filled = side.channels * math.prod(2 * reach + 1 for reach in reaches)
        products = side.channels**2 * math.prod(block.weight.shape[2:]) ** 2
        item = block.weight.dtype.itemsize
        if (
            side.size * max(width + 1, filled) * item > BAND_BYTES
            or products * item > BAND_BYTES
            or side.size * width**2 * item > 8 * FACTOR_WORK
        ):
            return None
        weight = block.weight.permute(0, 1, *(2 + number for number in order))
        return cls(ShortSide(Block(weight, tuple(numbered[number][0] for number in order))), reaches, width)

    def factor(self, sign: int, shift: float) -> Array | None:
        """Return the Cholesky factor of sign * (G - shift) as a band, None where that isn't positive definite."""
        from scipy.linalg import LinAlgError, cholesky_banded

        channels, counts = self.side.channels, self.side.positions
        steps = [math.prod(counts[number + 1 :]) for number in range(len(counts))]
        band = np.zeros((self.side.size, self._width + 1), dtype=self._values.dtype)  # (column, below the diagonal)
        columns = band.reshape(-1, channels, self._width + 1)
        for place in itertools.product(*map(range, self._values.shape[1:-2:2])):
            least = (0, *(-reach for reach in self._reaches[1:]))
            below = sum((at + first) * step for at, first, step in zip(place, least, steps, strict=False))
            part = self._values[tuple(index for at in place for index in (slice(None), at))]
            part = sign * part.reshape(-1, channels, channels)  # rows' channels, columns' channels
            for channel in range(channels if below >= 0 else 0):
                first = 0 if below else channel  # on or below the diagonal
                start = below * channels - channel
                columns[:, channel, start + first : start + channels] += part[:, first:, channel]
        band[:, 0] -= sign * shift
        try:  # in the order that LAPACK takes, and in place
            found: Array = cholesky_banded(band.T, overwrite_ab=True, lower=True, check_finite=False)
        except LinAlgError:
            return None
        return found

    def proves(self, sign: int, shift: float) -> float | None:
        """Return d such that sign * (G - shift) has no eigenvalue below -d; None where it has, or rounding fails."""
        from scipy.linalg.blas import dtbmv

        factor = self.factor(sign, shift)
        if factor is None:
            return None
        sizes = np.abs(factor, out=None if np.iscomplexobj(factor) else factor)
        ones = np.ones(self.side.size)
        sums = dtbmv(self._width, sizes, dtbmv(self._width, sizes, ones, lower=1, trans=1), lower=1)  # of |L| |L*|
        of_factor = gamma((self._width + SLACK) * self._complex, U64) * float(sums.max())
        return (of_factor + self._formed + 2 * U64 * (self.norm + abs(shift))) * (1 + 2.0**-20)

    def solve(self, factor: Array, right: Tensor) -> Array:
        """Solve a factored system for a vector."""
        from scipy.linalg import cho_solve_banded

        by_position = right.reshape(self.side.channels, -1).T.numpy()
        x = cho_solve_banded((factor, True), by_position.ravel(), check_finite=False)
        solved: Array = x.reshape(by_position.shape).T.ravel()
        return solved


def _meet(products: Tensor, line: Line, flipped: bool, reach: int, *, lower: bool) -> Tensor:
    """Add up the products of pairs of taps, (taps * taps, ...), where these meet.

    Args:
        lower: leave out what stands above the diagonal.

    Returns:
        (positions, offsets, ...) by the second position, and how far behind it the first is, from -reach (or 0) on.
    """
    count, taps, first = len(line.table) if flipped else line.size, line.table.shape[1], 0 if lower else reach
    who, how = line.table, np.broadcast_to(np.arange(taps), line.table.shape)
    if flipped:  # for each input the outputs that read it
        output, tap = np.nonzero(line.table != PADDED)
        by_source = np.argsort(line.table[output, tap], kind="stable")
        source, output, tap = line.table[output, tap][by_source], output[by_source], tap[by_source]
        counts = np.bincount(source, minlength=line.size)
        rank = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
        who = np.full((line.size, int(counts.max(initial=0))), PADDED)
        how = np.zeros_like(who)
        who[source, rank], how[source, rank] = output, tap
    offsets = reach + first + 1
    out = products.new_zeros(count * offsets, *products.shape[1:])
    pieces = max(1, who.size * who.shape[1] * max(1, products[0].numel()) // TOGETHER)
    for some, by in zip(np.array_split(who, pieces), np.array_split(how, pieces), strict=True):
        behind = some[:, :, None] - some[:, None, :] + first
        live = (some[:, :, None] != PADDED) & (some[:, None, :] != PADDED) & (behind >= 0)
        where, which = some[:, None, :] * offsets + behind, by[:, :, None] * taps + by[:, None, :]
        out.index_add_(0, torch.from_numpy(where[live]), products[torch.from_numpy(which[live])])
    return out.reshape(count, offsets, *products.shape[1:])


def _numbered(line: Line, flipped: bool) -> tuple[Line, int]:
    """Number an axis's positions on the shorter side so that those that meet are near, and return how near.

    As they are, or, where they wrap around, folded: 0, n-1, 1, n-2, ...
    """
    table, count = line.table, len(line.table) if flipped else line.size
    natural = np.arange(count)
    folded = np.minimum(2 * natural, 2 * (count - 1 - natural) + 1)
    found = []
    for number, place in enumerate((natural, folded)):
        if flipped:  # outputs that read the same input
            here, where = np.broadcast_to(place[:, None], table.shape), table
        else:  # inputs that the same output reads
            here, where = place[table], np.broadcast_to(np.arange(len(table))[:, None], table.shape)
        live = table != PADDED
        lowest, highest = (
            np.full(max(line.size, len(table)), count),
            np.zeros(max(line.size, len(table)), dtype=np.int64),
        )
        np.minimum.at(lowest, where[live], here[live])
        np.maximum.at(highest, where[live], here[live])
        found.append((int((highest - lowest).max(initial=0)), number, place))
    reach, _, place = min(found)
    moved = table[np.argsort(place)] if flipped else np.where(table == PADDED, PADDED, place[table])
    return replace(line, table=moved), reach
