"""The matrix of a chain as a sparse one, where no single layer has its form: what `core.spectrum` asks of a block.

Its Gram matrix is numbered so that what meets is near (reverse Cuthill-McKee), and then it is a band like any other.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convtool.core.blocks import Apart, Block
from convtool.core.bound import U64, fusing_terms, gamma
from convtool.core.conv import Conv
from convtool.core.expression import Expression, depth, with_sizes
from convtool.core.gram import BAND_BYTES, FACTOR_WORK, SLACK, Array, Gram
from convtool.core.order import toeplitz
from convtool.core.tree import Chain, map_leaves
from convtool.errors import UsageError

if TYPE_CHECKING:
    import scipy.sparse

MOST_ENTRIES = 1 << 26  # of the matrix of a chain that is built


class SparseBlock:
    """The matrix of layers in chains and sums, in float64 or complex128.

    Attributes:
        scale: what its numbers were divided by.
        weight: its numbers.
        entries_off: how far off computing them may have brought the matrix, in norm.
    """

    def __init__(self, tree: Expression, input_size: tuple[int, ...]) -> None:
        self._tree, self._size = map_leaves(lambda conv: conv.without_bias().exact(), tree), input_size
        made = toeplitz(self._tree, input_size)
        if made.nnz > MOST_ENTRIES:
            raise UsageError(
                f"the chain's matrix has {made.nnz} entries; its singular values are found of up to {MOST_ENTRIES}"
            )
        self.shape, self.matrix = made.shape, made.to_scipy()
        heaviest = float(np.abs(self.matrix.data).max(initial=0.0))
        self.scale = 2.0 ** max(math.frexp(heaviest)[1] - 1, -1000) if heaviest > 0 else 1.0
        self.matrix.data /= self.scale
        self.weight = torch.from_numpy(self.matrix.data)
        steps = 4 * depth(self._tree, _window) + fusing_terms(self._tree)
        self.entries_off = gamma(steps, U64) * _norm(abs(toeplitz(self._absolute, input_size).to_scipy())) / self.scale

    @property
    def _absolute(self) -> Expression:
        return map_leaves(Conv.absolute, self._tree)

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        return torch.from_numpy(self.matrix.toarray())

    def short_side(self) -> SparseSide:
        """Return the matrix from its shorter side."""
        return SparseSide(self)

    def norm(self) -> float:
        """Return a bound on the norm of the matrix of absolute values."""
        return _norm(abs(self.matrix))

    def bound(self, work: int) -> float:
        """Return a bound on the largest singular value: that of the absolute values, or of the layers, multiplied."""
        found = self.norm()
        if isinstance(self._tree, Chain) and all(isinstance(part, Conv) for part in self._tree.parts):
            layers = math.prod(_layer_bound(conv, size, work) for conv, size in with_sizes(self._tree, self._size))
            found = min(found, layers / self.scale)
        return found + self.entries_off


def _window(conv: Conv) -> int:
    """Return how many numbers an output is added up of, at most."""
    return conv.in_channels * math.prod(conv.geometry.kernel_size) + 2


def _norm(matrix: scipy.sparse.csr_array[Any]) -> float:
    """Return the root of the largest row sum and the largest column sum."""
    row, column = (float(matrix.sum(axis=axis).max(initial=0.0)) for axis in (0, 1))
    return math.sqrt(row) * math.sqrt(column) * (1 + 2.0**-20)


def _layer_bound(conv: Conv, size: tuple[int, ...], work: int) -> float:
    apart = Apart.of(conv, size)
    blocks = (Block(weight, apart.lines) for batch in apart.batches() for weight in batch)
    return max((block.bound(work) for block in blocks if block.weight.any()), default=0.0)


class SparseSide:
    """The matrix or its adjoint, from its shorter side; as `core.blocks.ShortSide`."""

    def __init__(self, block: SparseBlock) -> None:
        (rows, columns), self.block = block.shape, block
        self.size, self.flipped = min(rows, columns), rows < columns
        self.matrix = block.matrix.conj().T.tocsr() if self.flipped else block.matrix
        counts = np.diff(self.matrix.indptr).max(initial=0), np.bincount(self.matrix.indices).max(initial=0)
        self.terms, self.work = int(sum(counts)), 2 * self.matrix.nnz

    @cached_property
    def _back(self) -> scipy.sparse.csr_array[Any]:
        return self.matrix.conj().T.tocsr()

    def gram(self, x: Tensor) -> Tensor:
        """Return T* T x for the rows of x."""
        return torch.from_numpy(np.ascontiguousarray((self._back @ (self.matrix @ x.numpy().T)).T))

    def measured(self, x: Tensor) -> tuple[float, float]:
        """Return |T x| / |x|, which lies between the ends, and how far off that may be."""
        image = self.matrix @ x.numpy().T
        rounding = gamma(4 * self.terms + 64, U64) * self.block.norm() + self.block.entries_off
        return float(np.linalg.norm(image) / np.linalg.norm(x.numpy())), rounding


class SparseGram(Gram):
    """G of such a matrix; `SparseGram.over` makes it where it fits."""

    def __init__(self, side: SparseSide, gram: scipy.sparse.csr_array[Any], order: Array, width: int) -> None:
        self.order, self.side, self._width, self.work = order, side, width, side.size * width**2  # type: ignore[assignment]
        self.norm, self._matrix = side.block.norm() ** 2, gram.tocoo()
        self._complex = 4 if side.block.weight.is_complex() else 1
        self._formed = gamma(side.terms * self._complex + SLACK, U64) * self.norm

    @classmethod
    def over(cls, side: SparseSide) -> SparseGram | None:
        """Return the Gram matrix, or None where it would take too much to factor."""
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        gram = (side.matrix.conj().T @ side.matrix).tocsr()
        order = reverse_cuthill_mckee(gram, symmetric_mode=True)
        gram = gram[order][:, order]
        row, column = gram.nonzero()
        width = int(np.abs(row.astype(np.int64) - column).max(initial=0))
        item = side.block.weight.dtype.itemsize
        if side.size * (width + 1) * item > BAND_BYTES or side.size * width**2 * item > 8 * FACTOR_WORK:
            return None
        return cls(side, gram, order, width)

    def factor(self, sign: int, shift: float) -> Array | None:
        """Return the Cholesky factor of sign * (G - shift) as a band, None where that isn't positive definite."""
        from scipy.linalg import LinAlgError, cholesky_banded

        band = np.zeros((self.side.size, self._width + 1), dtype=self._matrix.dtype)  # (column, below the diagonal)
        lower = self._matrix.row >= self._matrix.col
        row, column = self._matrix.row[lower], self._matrix.col[lower]
        band[column, row - column] = sign * self._matrix.data[lower]
        band[:, 0] -= sign * shift
        try:
            found: Array = cholesky_banded(band.T, overwrite_ab=True, lower=True, check_finite=False)
        except LinAlgError:
            return None
        return found

    def solve(self, factor: Array, right: Tensor) -> Array:
        """Solve a factored system for a vector."""
        from scipy.linalg import cho_solve_banded

        x = cho_solve_banded((factor, True), right.numpy().ravel()[self.order], check_finite=False)
        solved: Array = np.empty_like(x)
        solved[self.order] = x
        return solved
