"""The Gram matrix of a block on its shorter side, as a band, factored by LAPACK: what is proved of its eigenvalues.

Positions that meet in a tap are near each other, so with the channels innermost G is a band (`core.meeting`). A
Cholesky factorisation of G less a multiple of the identity tells whether all eigenvalues lie above that multiple, and a
factor serves inverse iteration.

That a factorisation succeeds in floating point is a proof once rounding is allowed for: with a factor L of width b,
L L* = A + E, |E| <= gamma(b + 1) |L| |L*| (Higham: Accuracy and Stability of Numerical Algorithms, 10.1; Rump:
Verification of Positive Definiteness, 2006), whatever the order of the sums. So A's eigenvalues are at least minus the
largest row sum of that, to which comes what forming A brings with it. Nothing is exchanged in a Cholesky factorisation.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TypeAlias

import numpy as np
from torch import Tensor

from convtool.core.blocks import Block
from convtool.core.bound import U64, gamma
from convtool.core.meeting import Array
from convtool.core.sparse_block import SparseBlock

BAND_BYTES = 3 << 29  # of a factor, and of the numbers that are kept beside it
FACTOR_WORK = 1 << 40  # flops of a factorisation: half a minute or so on two cores, and a few are made
SLACK = 16  # roundings besides those that are counted, of divisions by reciprocals for example


AnyBlock: TypeAlias = Block | SparseBlock


class Side:
    """A block, or its adjoint where that starts from the shorter side: from the longer one, T has zeros of its own.

    Attributes:
        flipped: whether it is the adjoint.
        size: of the shorter side.
    """

    def __init__(self, block: AnyBlock) -> None:
        (rows, columns), self.block = block.shape, block
        self.size, self.flipped = min(rows, columns), rows < columns

    def gram(self, x: Tensor) -> Tensor:
        """Return T* T x for the rows of x."""
        return self.block.times(self.block.times(x, self.flipped), not self.flipped)

    def measured(self, x: Tensor) -> tuple[float, float]:
        """Return |T x| / |x|, which lies between the ends, and how far off that may be."""
        image, rounding = self.block.times(x, self.flipped), gamma(4 * self.block.terms + 64, U64) * self.block.norm
        sums = (float(np.square(np.abs(part.numpy())).sum()) for part in (image, x))  # numpy adds up pair by pair
        return math.sqrt(next(sums) / next(sums)), rounding


class Gram:
    """G of one block; its numbers are made when it is first factored.

    Attributes:
        side: the block's shorter one.
        work: flops of a factorisation.
        bytes: of a factor, or of the matrix itself where that is more.
        norm: at least the largest eigenvalue.
    """

    def __init__(self, side: Side) -> None:
        block = side.block
        self.side, self._meeting, self.norm = side, block.meeting(side.flipped), block.norm**2
        self._width = (self._meeting.width + 1) * self._meeting.channels - 1  # of the band, below the diagonal
        self.work = side.size * self._width**2
        self.bytes = max(side.size * (self._width + 1), self._meeting.held) * block.weight.dtype.itemsize
        self._complex = 4 if block.weight.is_complex() else 1  # roundings of a product, in terms of a real one's
        self._formed = gamma(block.terms * self._complex + SLACK, U64) * self.norm

    def fits(self, memory: int | None) -> bool:
        """Return whether it is to be factored: in so many bytes, or in what is no matter."""
        if memory is not None:
            return self.bytes <= memory
        return self.bytes <= BAND_BYTES and self.work * self.side.block.weight.dtype.itemsize <= 8 * FACTOR_WORK

    @cached_property
    def _numbers(self) -> tuple[Array, Array, Array]:
        return self._meeting.make()

    def factor(self, sign: int, shift: float) -> Array | None:
        """Return the Cholesky factor of sign * (G - shift) as a band, None where that isn't positive definite."""
        from scipy.linalg import LinAlgError, cholesky_banded

        (values, place, behind), channels = self._numbers, self._meeting.channels
        band = np.zeros((self.side.size, self._width + 1), dtype=values.dtype)  # (column, below the diagonal)
        for channel in range(channels):  # of the columns
            below = behind[:, None] * channels + np.arange(channels) - channel
            column = np.broadcast_to(place[:, None] * channels + channel, below.shape)
            live = below >= 0
            band[column[live], below[live]] = sign * values[:, :, channel][live]
        band[:, 0] -= sign * shift
        try:  # in the order that LAPACK takes, and in place
            found: Array = cholesky_banded(band.T, overwrite_ab=True, lower=True, check_finite=False)
        except LinAlgError:
            return None
        return found

    def nearly(self) -> Array | None:
        """Return the factor of G and as little on its diagonal as a singular matrix needs to have one."""
        shifts = (-self.norm * 2.0**-power for power in range(46, 0, -4))
        return next((factor for shift in shifts if (factor := self.factor(1, shift)) is not None), None)

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

        given = right.reshape(self._meeting.channels, -1).numpy()  # (channels, positions)
        ordered = np.empty((given.shape[1], given.shape[0]), dtype=given.dtype)
        ordered[self._meeting.place] = given.T
        x = cho_solve_banded((factor, True), ordered.ravel(), check_finite=False)
        solved: Array = x.reshape(ordered.shape)[self._meeting.place].T.ravel()
        return solved
