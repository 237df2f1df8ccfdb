"""T's Gram matrix on its shorter side, as a band that Cholesky factors: for the ends of T's spectrum.

G = T* T, or T T* where T has fewer rows than columns. With the positions in a suitable order and the channels inside
them, G is a band about as wide as two kernels. Factoring G less a multiple of the identity tells whether all
eigenvalues lie above that multiple (Sylvester), and a factor of G serves inverse iteration.

That a factorisation succeeds in floating point is a proof once rounding is allowed for: what was factored is then a
matrix no further from the given one than (b + 2) u |L| |L*|, entry by entry, for a band of b diagonals below the main
one (Higham: Accuracy and Stability of Numerical Algorithms, 10.1; Rump: Verification of Positive Definiteness, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import UsageError

Numbers = npt.NDArray[Any]

FACTOR_ELEMENTS = 1 << 27  # of a band: 1 GiB, and as much again while the smallest is proved
FACTOR_WORK = 1 << 38  # multiply-adds of a factorisation: half a minute on a core or two
GRAM_WORK = 1 << 33  # multiply-adds of the product of T with itself
UNIT = 2.0**-53  # of rounding in float64


class BandedGram:
    """The Gram matrix of one layer at one input size; `banded_gram` makes it where it fits.

    Attributes:
        size: of its sides, min(rows, columns) of T.
        width: of the band, in diagonals below the main one.
        norm: at least its largest eigenvalue.
        rounding: a failed factorisation means that there is an eigenvalue less than this on the right side of 0.
    """

    def __init__(self, conv: Conv, input_size: Sequence[int], order: Numbers, width: int) -> None:
        matrix = ToeplitzMatrix(Conv(conv.weight, None, conv.geometry).exact(), input_size).to_scipy()
        rows_short = matrix.shape[0] < matrix.shape[1]
        short = matrix if rows_short else matrix.conj().T.tocsr()  # (size, longer side)
        channels = conv.out_channels if rows_short else conv.in_channels
        self.size = short.shape[0]
        self.width = width
        self._complex = bool(np.iscomplexobj(short.data))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        # Where each channel's position goes: positions in their order, channels inside them.
        self._place = (place[None, :] * channels + np.arange(channels)[:, None]).reshape(-1)
        product = (short @ short.conj().T).tocoo()
        row, column = self._place[product.coords[0]], self._place[product.coords[1]]
        lower = row >= column
        row, column = row[lower], column[lower]
        self._where = (row - column) + column * (width + 1)  # in a band in Fortran order
        self._values = product.data[lower]
        sizes = abs(short)
        self.norm = float(sizes.sum(axis=0).max(initial=0)) * float(sizes.sum(axis=1).max(initial=0))
        longest = int(np.diff(short.indptr).max(initial=0))
        # An entry is a sum of `longest` products, of numbers that were sums themselves where taps meet.
        self._formed = (longest + 16) * UNIT * self.norm * (4 if self._complex else 1)
        # |L| |L*| has no entry larger than the largest on the diagonal, and 2 * width + 1 of them in a row.
        of_factor = (width + 10) * UNIT * (2 * width + 1) * self.norm * (4 if self._complex else 1)
        self.rounding = 2 * (self._formed + of_factor)

    def factor(self, shift: float, sign: int = 1) -> Factor | None:
        """The Cholesky factor of sign * (G - shift), or None where that isn't positive definite."""
        from scipy.linalg import LinAlgError, cholesky_banded

        band = np.zeros((self.width + 1) * self.size, dtype=self._values.dtype)
        band[self._where] = self._values if sign > 0 else -self._values
        ab = band.reshape((self.width + 1, self.size), order="F")
        ab[0] -= sign * shift
        try:
            factor = cholesky_banded(ab, overwrite_ab=True, lower=True, check_finite=False)
        except LinAlgError:
            return None
        return Factor(factor, self._place, self._formed + UNIT * (self.norm + abs(shift)), self._complex)


class Factor:
    """A Cholesky factor of a `BandedGram` less a multiple of the identity.

    Attributes:
        rounding: an eigenvalue of what was to be factored is at least minus this.
    """

    def __init__(self, band: Numbers, place: Numbers, formed: float, is_complex: bool) -> None:
        self._band = band
        self._place = place
        diagonals, size = band.shape
        down, across = np.zeros(size), np.zeros(size)
        for below in range(diagonals):
            sizes = np.abs(band[below, : size - below])
            down[: size - below] += sizes
            across[below:] += sizes
        product = float(down.max(initial=0)) * float(across.max(initial=0))  # at least the norm of |L| |L*|
        self.rounding = formed + (diagonals + 8) * UNIT * product * (4 if is_complex else 1)

    def solve(self, x: Tensor) -> Tensor:
        """The solution of what was factored against x, both (size,)."""
        from scipy.linalg import cho_solve_banded

        right = np.empty(len(x), dtype=self._band.dtype)
        right[self._place] = x.numpy()
        solution = cho_solve_banded((self._band, True), right, overwrite_b=True, check_finite=False)
        return torch.from_numpy(solution[self._place])


def banded_gram(conv: Conv, input_size: Sequence[int]) -> BandedGram | None:
    """The Gram matrix of a layer without groups, or None where its band is too large to factor; needs scipy."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UsageError("singular values of a layer this large need scipy: pip install 'convtool[scipy]'") from None
    outputs, inputs = math.prod(conv.output_size(input_size)), math.prod(input_size)
    rows_short = conv.out_channels * outputs < conv.in_channels * inputs
    channels, positions = (conv.out_channels, outputs) if rows_short else (conv.in_channels, inputs)
    taps = math.prod(conv.geometry.kernel_size)
    work = conv.out_channels * conv.in_channels * outputs * taps * taps * channels
    if channels * positions > FACTOR_ELEMENTS or work > GRAM_WORK:
        return None
    order, reach = _order(conv, input_size, rows_short)
    width, size = min((reach + 1) * channels, channels * positions) - 1, channels * positions
    if (width + 1) * size > FACTOR_ELEMENTS or size * (width + 1) ** 2 > FACTOR_WORK:
        return None
    return BandedGram(conv, input_size, order, width)


def _order(conv: Conv, input_size: Sequence[int], rows_short: bool) -> tuple[Numbers, int]:
    """Positions in an order in which those that meet in G are close, and how far apart they are at most."""
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    ones = torch.ones(1, 1, *conv.geometry.kernel_size, dtype=torch.float64)
    pattern = ToeplitzMatrix(Conv(ones, None, replace(conv.geometry, groups=1)), input_size).to_scipy()
    meet = (pattern @ pattern.T if rows_short else pattern.T @ pattern).tocsr()
    lengths = conv.output_size(input_size) if rows_short else tuple(input_size)
    places = np.arange(math.prod(lengths)).reshape(lengths)
    longest_first = np.argsort([-length for length in lengths], kind="stable").tolist()
    candidates = [places.transpose(longest_first).reshape(-1), reverse_cuthill_mckee(meet, symmetric_mode=True)]
    found = meet.tocoo()
    reaches = []
    for order in candidates:
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        reaches.append(int(np.abs(place[found.coords[0]] - place[found.coords[1]]).max(initial=0)))
    best = int(np.argmin(reaches))
    return candidates[best], reaches[best]
