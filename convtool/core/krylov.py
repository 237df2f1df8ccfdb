"""Iterations for the ends of the spectrum of a map, on its shorter side.

Restarted Lanczos keeps the best Ritz vectors (Wu, Simon: Thick-Restart Lanczos, 2000). Golub-Kahan bidiagonalisation is
that of Golub, Van Loan: Matrix Computations, 10.4, with full reorthogonalisation. A descent is the locally optimal
block preconditioned conjugate gradient method (Knyazev, 2001), with the singular values of T on its subspace in place
of the eigenvalues of T* T, which leaves small ones their digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convtool.core.operator import ConvOperator

STEPS = 300  # of Lanczos for both ends unless asked for more; a smallest in a dense end can take thousands
LARGEST_STEPS = 1000  # of restarted Lanczos, for the largest
BASIS_BYTES = 1 << 29  # of Lanczos vectors
BASIS = 40  # vectors between restarts
KEPT = 12  # over a restart
BLOCK = 8  # vectors of a descent


class ShortSide:
    """T, or its adjoint where that has the shorter side to start from."""

    def __init__(self, matrix: ConvOperator) -> None:
        # From the longer side, the vectors that T maps to 0 would show as singular values.
        flip = matrix.shape[0] < matrix.shape[1]
        self._there: Callable[[Tensor], Tensor] = matrix.adjoint if flip else matrix.apply
        self._back: Callable[[Tensor], Tensor] = matrix.apply if flip else matrix.adjoint
        self.size, self.longer = min(matrix.shape), max(matrix.shape)
        self.dtype = matrix.dtype

    def there(self, x: Tensor) -> Tensor:
        """The images of one vector or, as columns, several."""
        return self._there(x) if x.dim() == 2 else self._there(x[:, None])[:, 0]

    def back(self, y: Tensor) -> Tensor:
        """Those of the adjoint."""
        return self._back(y) if y.dim() == 2 else self._back(y[:, None])[:, 0]

    def gram(self, x: Tensor) -> Tensor:
        """The adjoint of the image."""
        return self.back(self.there(x))

    def start(self, seed: int, count: int = 1) -> Tensor:
        """(size, count) random unit vectors."""
        generator = torch.Generator().manual_seed(seed)
        start: Tensor = torch.randn(self.size, count, dtype=torch.float64, generator=generator).to(self.dtype)
        unit: Tensor = start / start.norm(dim=0)
        return unit

    def measured(self, x: Tensor) -> tuple[float, float]:
        """The norm of T on a unit vector, which lies between the ends; how far a singular value is from it at most."""
        x = x / x.norm()
        image = self.there(x)
        value = float(image.norm())
        residual = float((self.back(image) - value**2 * x).norm())  # an eigenvalue of T* T is that close to value^2
        return value, min(residual / value, math.sqrt(residual)) if value > 0 else math.sqrt(residual)


class Krylov:
    """Lanczos for the largest eigenvalue of a Hermitian map, with full orthogonalisation and restarts."""

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor) -> None:
        size = len(start)
        self._apply = apply
        self._room = min(BASIS, size)
        self._basis = torch.zeros(self._room, size, dtype=start.dtype)
        self._projected = torch.zeros(self._room, self._room, dtype=start.dtype)
        self._filled = 0
        self._following = start
        self._rest = 0.0
        self.steps = 0
        self.exhausted = False  # the basis spans a subspace that the map doesn't leave

    @classmethod
    def over(
        cls, apply: Callable[[Tensor], Tensor], vectors: Tensor, values: Sequence[float], following: Tensor
    ) -> Krylov:
        """From Ritz vectors, as rows, with their Ritz values, and the vector that follows."""
        made = cls(apply, following)
        made._restart(vectors, torch.tensor(values, dtype=torch.float64))
        return made

    def step(self) -> None:
        """Take one vector more."""
        if self._filled == self._room:
            values, vectors = torch.linalg.eigh(self._projected)  # ascending
            kept = min(KEPT, self._room - 1)
            self._restart(vectors[:, -kept:].T @ self._basis, values[-kept:])
        place = self._filled
        self._basis[place] = self._following
        basis = self._basis[: place + 1]
        image = self._apply(self._following)
        products = basis.conj() @ image
        self._projected[: place + 1, place] = products
        self._projected[place, : place + 1] = products.conj()
        image = _orthogonal(image, basis)
        self._rest = float(image.norm())
        self._filled += 1
        self.steps += 1
        scale = float(self._projected[: place + 1, : place + 1].abs().max())
        self.exhausted = self._rest <= 1e-13 * scale or self._filled == len(image)
        if not self.exhausted:
            self._following = image / self._rest

    def top(self) -> tuple[float, float, Tensor]:
        """The largest Ritz value, its residual and its vector."""
        part = self._projected[: self._filled, : self._filled]
        values, vectors = torch.linalg.eigh(part)
        residual = 0.0 if self.exhausted else self._rest * float(vectors[-1, -1].abs())
        return float(values[-1]), residual, vectors[:, -1] @ self._basis[: self._filled]

    def _restart(self, vectors: Tensor, values: Tensor) -> None:
        kept = len(vectors)
        self._basis[:kept] = vectors
        self._projected.zero_()
        self._projected[range(kept), range(kept)] = values.to(self._projected.dtype)
        self._filled = kept


def climb(krylov: Krylov, tolerance: float, limit: int) -> None:
    """Step until the root of the largest eigenvalue is known to the tolerance, relative to itself."""
    while krylov.steps < limit:
        krylov.step()
        if krylov.exhausted:
            return
        if krylov.steps % 5 == 0:
            value, residual, _ = krylov.top()
            if residual <= 0.5 * tolerance * value:
                return


class Descent:
    """The smallest singular values of T, several at once, with a solver that is nearly the inverse of T* T.

    Attributes:
        values: the smallest ones that were found, ascending; each is at least as large as T's own.
        vectors: (size, n) unit vectors that have them.
        exhausted: T has no more.
    """

    def __init__(self, side: ShortSide, solve: Callable[[Tensor], Tensor], start: Tensor) -> None:
        self._side, self._solve = side, solve
        self._count = start.shape[1]
        self._before: Tensor | None = None  # directions of the last step
        self.exhausted = 4 * self._count >= side.size
        first = torch.eye(side.size, dtype=start.dtype) if self.exhausted else _orthonormal(solve(start))
        self.vectors, self._images = first, side.there(first)
        self.values, _ = self._take(first, self._images)
        self.steps = 1

    def step(self) -> None:
        """Go on by one step."""
        known = self.vectors
        residual = self._side.back(self._images) - known * self.values.square()
        # Of unit length: their sizes say nothing, and those of what is settled are rounding.
        directions = [_unit(self._solve(residual))] + ([] if self._before is None else [_unit(self._before)])
        fresh = torch.cat(directions, 1)
        for _ in range(2):  # once more, of what the first time left
            fresh = _orthonormal(_orthogonal(fresh, known.T))
        basis = torch.cat([known, fresh], 1)
        self.values, part = self._take(basis, torch.cat([self._images, self._side.there(fresh)], 1))
        self._before = fresh @ part[known.shape[1] :]
        self.steps += 1

    def _take(self, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest singular values on a subspace, and their vectors in its basis."""
        left, values, right = torch.linalg.svd(images, full_matrices=False)  # descending
        count = min(self._count, len(values))
        last = right[-count:].mH.flip(1)
        self.vectors, self._images = basis @ last, (left[:, -count:] * values[-count:]).flip(1)
        return values[-count:].flip(0), last


def _unit(vectors: Tensor) -> Tensor:
    sizes = vectors.norm(dim=0)
    unit: Tensor = vectors / torch.where(sizes > 0, sizes, 1.0)
    return unit


def _orthonormal(vectors: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(vectors).Q
    return orthonormal


def bidiagonalise(side: ShortSide, tolerance: float, steps: int | None, seed: int) -> tuple[Ends, int]:
    """Both ends by bidiagonalisation, the largest taken further by Lanczos where that is needed; and the steps.

    Args:
        steps: at most; by default what usually does.
    """
    short, long = side.size, side.longer
    limit = min(short, STEPS, BASIS_BYTES // (8 * (short + long))) if steps is None else min(short, steps)
    limit = max(1, limit)
    right = torch.empty(limit, short, dtype=side.dtype)  # grows in rows: what isn't reached takes no memory
    left = torch.empty(limit, long, dtype=side.dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    following = side.start(seed)[:, 0]
    ends = Ends.nothing()
    for step in range(limit):
        right[step] = following
        image = _orthogonal(side.there(following), left[:step])
        diagonal.append(float(image.norm()))
        left[step] = image / diagonal[-1] if diagonal[-1] > 0 else image
        source = _orthogonal(side.back(left[step]), right[: step + 1])
        rest = float(source.norm())
        checked = step + 1 == limit or (step + 1) % max(10, step // 8) == 0
        # Where T maps into, or back into, what is there already, the bidiagonal matrix is all that T is on a subspace
        # that it doesn't leave; a random vector lies in none that has not both ends in it.
        negligible = 1e-13 * max(diagonal)
        exhausted = min(rest, diagonal[-1]) <= negligible or step + 1 == short
        if checked or exhausted:
            ends = _ends_of(diagonal, beside, 0.0 if exhausted else rest)
            within = tolerance * ends.high
            if exhausted or (ends.high_error <= within and ends.low_error <= within):
                break
        following = source / rest
        beside.append(rest)
    taken = len(diagonal)
    if ends.high_error > tolerance * ends.high and steps is None:
        del left
        ends, taken = _higher(side, right[:taken], diagonal, beside, following, ends, tolerance)
    return ends, taken


def _higher(
    side: ShortSide,
    right: Tensor,
    diagonal: list[float],
    beside: list[float],
    following: Tensor,
    ends: Ends,
    tolerance: float,
) -> tuple[Ends, int]:
    """The largest taken further from where bidiagonalisation ended, and the steps of both."""
    _, values, vectors = torch.linalg.svd(_bidiagonal(diagonal, beside[: len(diagonal) - 1]))
    kept = min(KEPT, len(values))
    krylov = Krylov.over(side.gram, vectors[:kept].to(right.dtype) @ right, values[:kept].square().tolist(), following)
    climb(krylov, tolerance, LARGEST_STEPS - len(diagonal))
    high, error = side.measured(krylov.top()[2])
    return replace(ends, high=high, high_error=error), len(diagonal) + krylov.steps


@dataclass(frozen=True, slots=True)
class Ends:
    """Singular values near both ends, and how far off a singular value is at most.

    Attributes:
        high, low: the values.
        high_error, low_error: their errors.
    """

    high: float
    high_error: float
    low: float
    low_error: float

    @classmethod
    def nothing(cls) -> Ends:
        return cls(0.0, math.inf, 0.0, math.inf)


def _ends_of(diagonal: list[float], beside: list[float], rest: float) -> Ends:
    """The ends of the bidiagonal matrix's spectrum, with their residuals."""
    left, values, _ = torch.linalg.svd(_bidiagonal(diagonal, beside))  # descending
    residuals = rest * left[-1].abs()
    return Ends(float(values[0]), float(residuals[0]), float(values[-1]), float(residuals[-1]))


def _bidiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    upper = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        upper += torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    return upper


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """The vector less its part in the span of the basis's rows; twice, which is enough (Kahan, Parlett)."""
    for _ in range(2):
        vector = vector - basis.T @ (basis.conj() @ vector)
    return vector
