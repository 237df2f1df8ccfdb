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
from convtool.core.expression import Expression, depth, window, with_sizes
from convtool.core.meeting import Meeting
from convtool.core.toeplitz import toeplitz
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
        self.scale = scale_of(torch.from_numpy(self.matrix.data))
        self.matrix.data /= self.scale
        self.weight = torch.from_numpy(self.matrix.data)
        steps = 4 * depth(self._tree, window) + fusing_terms(self._tree)
        absolute = toeplitz(map_leaves(Conv.absolute, self._tree), input_size).to_scipy()
        self.entries_off = gamma(steps, U64) * _norm(abs(absolute)) / self.scale

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        return torch.from_numpy(self.matrix.toarray())

    @cached_property
    def adjoint(self) -> scipy.sparse.csr_array[Any]:
        """The matrix's adjoint."""
        return self.matrix.conj().T.tocsr()

    @property
    def terms(self) -> int:
        """Of the sums that a product with T* T takes."""
        return sum(int(np.diff(one.indptr).max(initial=0)) for one in (self.matrix, self.adjoint))

    @property
    def work(self) -> int:
        """Multiply-adds of such a product."""
        return 2 * int(self.matrix.nnz)

    def times(self, x: Tensor, adjoint: bool) -> Tensor:
        """Return T x, or T* x, for the rows of x."""
        return torch.from_numpy(np.ascontiguousarray(((self.adjoint if adjoint else self.matrix) @ x.numpy().T).T))

    @cached_property
    def norm(self) -> float:
        """A bound on the norm of the matrix of absolute values."""
        return _norm(abs(self.matrix))

    def meeting(self, flipped: bool) -> Meeting:
        """Return which rows or columns, those of its shorter side, meet; each is a position."""
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        gram = (self.matrix @ self.adjoint if flipped else self.adjoint @ self.matrix).tocoo()
        place = np.argsort(reverse_cuthill_mckee(gram.tocsr(), symmetric_mode=True)).astype(np.int64)
        row, column = place[gram.row], place[gram.col]
        lower = row >= column
        numbers = gram.data[lower].reshape(-1, 1, 1), column[lower], (row - column)[lower]
        return Meeting(place, int(np.abs(row - column).max(initial=0)), 1, int(gram.nnz), lambda: numbers)

    def bound(self, work: int) -> float:
        """Return a bound on the largest singular value: that of the absolute values, or of the layers, multiplied."""
        found = self.norm
        if isinstance(self._tree, Chain) and all(isinstance(part, Conv) for part in self._tree.parts):
            layers = math.prod(_layer_bound(conv, size, work) for conv, size in with_sizes(self._tree, self._size))
            found = min(found, layers / self.scale)
        return found


def scale_of(numbers: Tensor) -> float:
    """Return the power of two by which numbers are brought near 1."""
    heaviest = float(numbers.abs().max()) if numbers.numel() else 0.0
    return 2.0 ** max(math.frexp(heaviest)[1] - 1, -1000) if heaviest > 0 else 1.0


def _norm(matrix: scipy.sparse.csr_array[Any]) -> float:
    """Return the root of the largest row sum and the largest column sum."""
    row, column = (float(matrix.sum(axis=axis).max(initial=0.0)) for axis in (0, 1))
    return math.sqrt(row) * math.sqrt(column) * (1 + 2.0**-20)


def _layer_bound(conv: Conv, size: tuple[int, ...], work: int) -> float:
    apart = Apart.of(conv, size)
    blocks = (Block(weight, apart.lines) for batch in apart.batches() for weight in batch)
    return max((block.bound(work) for block in blocks if block.weight.any()), default=0.0)
