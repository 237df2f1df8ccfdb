"""Several singular values at both ends of a matrix, with their vectors: those of `core.spectrum`, and their neighbours.

A small matrix has a dense SVD. Of a larger one ARPACK finds the values, at the lower end with a factor of the Gram
matrix. Each is near a singular value, as its residual proves; that ARPACK missed none in between is not proved, other
than of the outermost, which `core.spectrum` looks at by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convtool.core.expression import Expression
from convtool.core.gram import Gram, Side
from convtool.core.singular import ROUNDING
from convtool.core.sparse_block import SparseBlock
from convtool.errors import UsageError

Array = npt.NDArray[Any]

DENSE_ELEMENTS = 1 << 23  # of a matrix whose SVD is computed whole
DENSE_WORK = 1 << 34  # short * short * long of that
TOLERANCE = 1e-9  # of ARPACK


@dataclass(frozen=True, slots=True)
class Extremes:
    """Singular values at both ends of a matrix.

    Attributes:
        largest, smallest: (count,) the largest ones in falling order, and the smallest ones in rising order.
        largest_errors, smallest_errors: how far from a singular value each is, at most.
        left: (rows, 2 * count) their left vectors, those of the largest first. Of a value that is zero but for
            rounding, one of both vectors is zero too.
        right: (columns, 2 * count)
        complete: whether none is missing in between.
    """

    largest: Array
    smallest: Array
    largest_errors: Array
    smallest_errors: Array
    left: Array
    right: Array
    complete: bool


def extremes(layers: Expression, input_size: tuple[int, ...], count: int, seed: int = 0) -> Extremes:
    """Return the largest and the smallest singular values of the matrix of layers, so many of each.

    Raises:
        UsageError: more than the matrix has, or a matrix that is too large.
    """
    block = SparseBlock(layers, input_size)
    most = min(block.shape)
    if not 1 <= count <= most:
        raise UsageError(f"count: expected 1 to {most}, the number of singular values, got {count}")
    if block.shape[0] * block.shape[1] <= DENSE_ELEMENTS and most**2 * max(block.shape) <= DENSE_WORK:
        return _dense(block, count)
    if count >= most - 1:
        raise UsageError(f"count: of a matrix this large, at most {most - 2} values are found at either end")
    return _sparse(block, count, seed)


def _dense(block: SparseBlock, count: int) -> Extremes:
    left, values, right = (one.numpy() for one in torch.linalg.svd(block.dense(), full_matrices=False))
    chosen = [*range(count), *range(len(values) - 1, len(values) - 1 - count, -1)]
    errors = np.full(count, (values[0] * ROUNDING + block.entries_off) * block.scale)
    found = values[chosen] * block.scale
    vectors = left[:, chosen], right.conj().T[:, chosen]
    return Extremes(found[:count], found[count:], errors, errors, *vectors, complete=True)


def _sparse(block: SparseBlock, count: int, seed: int) -> Extremes:
    from scipy.sparse.linalg import LinearOperator, eigsh

    side = Side(block)
    gram = Gram(side)
    factor = gram.nearly() if gram.fits(None) else None
    if factor is None:
        raise UsageError(
            "count: the smallest values of this matrix would take a factorisation beyond what is made; without it,"
            " both ends are enclosed"
        )
    start = np.random.default_rng(seed).standard_normal(side.size).astype(block.matrix.dtype)

    def ends(apply: Callable[[Array], Array]) -> Array:
        matrix = LinearOperator((side.size, side.size), matvec=apply, dtype=start.dtype)
        values, vectors = eigsh(
            matrix, k=count, which="LA", v0=start, tol=TOLERANCE, ncv=min(side.size, 4 * count + 20)
        )
        found: Array = vectors[:, np.argsort(-values)]
        return found

    high = ends(lambda x: side.gram(torch.from_numpy(x.reshape(1, -1))).numpy().ravel())
    low = ends(lambda x: gram.solve(factor, torch.from_numpy(x.reshape(1, -1))))
    return _measured(block, high, low)


def _measured(block: SparseBlock, high: Array, low: Array) -> Extremes:
    """Return what vectors on the shorter side are the singular vectors of, and how nearly."""
    side, vectors = Side(block), np.concatenate([high, low], axis=1)
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    there, back = (block.adjoint, block.matrix) if side.flipped else (block.matrix, block.adjoint)
    images = there @ vectors
    values = np.linalg.norm(images, axis=0)
    # What is zero but for rounding has no image, and so none that it is the image of.
    others = np.where(values > ROUNDING * values.max(initial=0.0), images / np.where(values > 0, values, 1.0), 0.0)
    # T v = s u, so s is within |T* u - s v| of a singular value; and there is one that is at most |T v|.
    residuals = np.linalg.norm(back @ others - values * vectors, axis=0)
    residuals = np.minimum(residuals, values)
    rounding = side.measured(torch.from_numpy(np.ascontiguousarray(vectors[:, :1].T)))[1] + block.entries_off
    errors = (residuals + rounding) * block.scale
    left, right = (vectors, others) if side.flipped else (others, vectors)
    count, values = high.shape[1], values * block.scale
    first = np.argsort(-values[:count])
    last = count + np.argsort(values[count:])
    order = np.concatenate([first, last])
    return Extremes(values[first], values[last], errors[first], errors[last], left[:, order], right[:, order], False)
