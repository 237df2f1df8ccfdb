"""The largest and the smallest singular value of a layer's matrix, and with them its condition number.

What is called the smallest is the last of min(rows, columns) singular values. The matrix of a layer in groups is
block diagonal, so each group is taken by itself. Then, in this order:

- circular padding at stride 1: a Fourier transform makes the matrix block diagonal, with a C_out x C_in block for each
  frequency (Sedghi, Gupta, Long: The Singular Values of Convolutional Layers, 2019); exact to rounding;
- a small matrix: a dense SVD; exact to rounding;
- a matrix whose Gram matrix fits as a band: restarted Lanczos for the largest, inverse iteration with a Cholesky
  factor for the smallest. Each is the norm of T on some unit vector, so neither lies outside the spectrum; and a
  factorisation of the Gram matrix, shifted to just outside of it, proves that nothing lies beyond (`core.gram`);
- else Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation (Golub, Van Loan: Matrix Computations, 10.4):
  the singular values of the bidiagonal matrix approach those of T from inside, and the residual of each is a bound on
  its distance to a singular value of T. What the largest still lacks, restarted Lanczos adds.

Restarted Lanczos keeps the best Ritz vectors (Wu, Simon: Thick-Restart Lanczos, 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.gram import BandedGram, banded_gram
from convtool.core.operator import ConvOperator
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import InputError, UsageError

Method: TypeAlias = Literal["fourier", "dense", "cholesky", "lanczos"]

DENSE_SIDE = 4096  # the smaller side of a matrix whose dense SVD takes some ten seconds
DENSE_ELEMENTS = 1 << 25
BASIS_BYTES = 1 << 29  # of Lanczos vectors
STEPS = 300  # of Lanczos for both ends unless asked for more; a smallest in a dense end can take thousands
LARGEST_STEPS = 1000  # of restarted Lanczos, for the largest
INVERSE_STEPS = 100  # of inverse iteration: it takes ten to thirty
BASIS = 40  # vectors between restarts
KEPT = 12  # over a restart
ROUNDING = 2.0**-45  # relative to the largest, of what is exact in float64 to rounding: some hundred units


@dataclass(frozen=True, slots=True)
class SingularValue:
    """A singular value and how well it is known.

    Attributes:
        value: the estimate. Not converged, the largest is at least this, and the smallest at most.
        error: there is a singular value no further than this from `value`.
        converged: whether the error is within the tolerance.
        proved: whether it is certain that the singular value within the error is the last at its end. Lanczos from a
            random vector misses that one with a probability that is as good as zero, but not zero.
    """

    value: float
    error: float
    converged: bool
    proved: bool = False


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The ends of the spectrum of a layer's matrix.

    Attributes:
        shape: (rows, columns) of the matrix.
        largest, smallest: of its min(rows, columns) singular values.
        methods: how it was computed, in the order of first use.
        steps: of iterations, in the group that took most; 0 where there were none.
        tolerance: on errors, relative to the largest singular value.
    """

    shape: tuple[int, int]
    largest: SingularValue
    smallest: SingularValue
    methods: tuple[Method, ...]
    steps: int
    tolerance: float

    @property
    def condition(self) -> float:
        """The largest over the smallest; infinite where the smallest is zero as far as it is known."""
        if self.smallest.value <= self.smallest.error:
            return math.inf
        return self.largest.value / self.smallest.value

    @property
    def condition_error(self) -> float:
        """How far off the condition number may be, as both ends may be off by their errors."""
        if math.isinf(self.condition):
            return math.inf
        most = (self.largest.value + self.largest.error) / (self.smallest.value - self.smallest.error)
        return most - self.condition

    @property
    def condition_at_least(self) -> float:
        """What the condition number is at least: estimates lie between the two ends, converged or not."""
        rounding = ROUNDING * self.largest.value
        if self.smallest.value + rounding == 0:
            return math.inf
        return (self.largest.value - rounding) / (self.smallest.value + rounding)


def spectrum(
    conv: Conv, input_size: Sequence[int], *, tolerance: float = 1e-6, steps: int | None = None, seed: int = 0
) -> Spectrum:
    """The largest and the smallest singular value of the layer's matrix at one input size; the bias has no part in it.

    Args:
        tolerance: how far from a singular value each may be, relative to the largest.
        steps: of each iteration, at most; by default what usually does, within half a GiB of vectors.
        seed: of the random vector that iterations start from.

    Raises:
        UsageError: the layer cannot run on that input size, or a tolerance that isn't between 0 and 1; or a
            matrix that is too large for a dense SVD, and scipy isn't installed.
        InputError: weights that are not finite.
    """
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance: expected a number between 0 and 1, got {tolerance:g}")
    if not bool(conv.weight.isfinite().all()):
        raise InputError("the weight holds values that are not finite; its matrix has no singular values")
    conv.output_size(input_size)
    groups = _groups(conv)
    dense_side = int(DENSE_SIDE / len(groups) ** (1 / 3))  # all of them take no longer than one of DENSE_SIDE
    parts = [_ends(group, tuple(input_size), tolerance, steps, seed, dense_side) for group in groups]
    largest = max((part.largest for part in parts), key=lambda one: one.value)
    smallest = min((part.smallest for part in parts), key=lambda one: one.value)
    within = tolerance * largest.value
    # The union over the groups: a group whose own smallest isn't known well may hold the smallest of all.
    largest_error = max(part.largest.error for part in parts)
    smallest_error = max(part.smallest.error for part in parts)
    whole = ConvOperator(conv, input_size).shape
    return Spectrum(
        whole,
        SingularValue(
            largest.value, largest_error, largest_error <= within, all(part.largest.proved for part in parts)
        ),
        SingularValue(
            smallest.value, smallest_error, smallest_error <= within, all(part.smallest.proved for part in parts)
        ),
        tuple(dict.fromkeys(part.methods[0] for part in parts)),
        max(part.steps for part in parts),
        tolerance,
    )


def _groups(conv: Conv) -> list[Conv]:
    """Each group as a layer of its own; of groups with equal weights, one."""
    if conv.geometry.groups == 1:
        return [conv]
    geometry = replace(conv.geometry, groups=1)
    weights = {tuple(part.flatten().tolist()): part for part in conv.weight.chunk(conv.geometry.groups)}
    return [Conv(weight, None, geometry) for weight in weights.values()]


def _ends(
    conv: Conv, size: tuple[int, ...], tolerance: float, steps: int | None, seed: int, dense_side: int
) -> Spectrum:
    shape = ConvOperator(conv, size).shape
    if _is_circulant(conv, size):
        return _known(_by_frequency(conv, size), shape, "fourier", tolerance)
    if min(shape) <= dense_side and shape[0] * shape[1] <= DENSE_ELEMENTS:
        dense = ToeplitzMatrix(conv.exact(), size).to_dense()
        return _known(torch.linalg.svdvals(dense), shape, "dense", tolerance)
    # Squares are formed from here on: of numbers near 1, whatever the weights.
    exact = conv.exact().weight
    most = float(exact.abs().max())
    scale = 2.0 ** max(math.frexp(most)[1] - 1, -1000) if most > 0 else 1.0
    near_one = Conv(exact / scale, None, conv.geometry)
    matrix, gram = ConvOperator(near_one, size), banded_gram(near_one, size)
    if gram is not None:
        found = _by_cholesky(matrix, gram, tolerance, steps, seed)
    else:
        found = _by_lanczos(matrix, tolerance, steps, seed)
    return replace(found, largest=_times(found.largest, scale), smallest=_times(found.smallest, scale))


def _times(one: SingularValue, scale: float) -> SingularValue:
    return replace(one, value=one.value * scale, error=one.error * scale)


def _known(values: Tensor, shape: tuple[int, int], method: Method, tolerance: float) -> Spectrum:
    high, low = float(values.max()), float(values.min())
    error = high * ROUNDING
    largest, smallest = SingularValue(high, error, True, True), SingularValue(low, error, True, True)
    return Spectrum(shape, largest, smallest, (method,), 0, tolerance)


def _is_circulant(conv: Conv, size: tuple[int, ...]) -> bool:
    geometry = conv.geometry
    whole = conv.output_size(size) == size and all(stride == 1 for stride in geometry.stride)
    return bool(size) and whole and (geometry.padding_mode == "circular" or geometry.kernel_size == (1,) * len(size))


def _by_frequency(conv: Conv, size: tuple[int, ...]) -> Tensor:
    """All singular values of a layer that wraps around: those of its frequency response, one block per frequency."""
    if conv.geometry.kernel_size == (1,) * len(size):  # the same block at every frequency
        same: Tensor = torch.linalg.svdvals(conv.exact().weight.flatten(1))
        return same
    exact = conv.exact().weight
    place = torch.zeros((), dtype=torch.int64)  # of each tap in the whole input, wrapped around
    for axis, length in zip(conv.geometry.axes, size, strict=True):
        place = place[..., None] * length + torch.arange(axis.kernel) * axis.dilation % length
    kernel = torch.zeros(*exact.shape[:2], math.prod(size), dtype=exact.dtype)
    kernel.index_add_(2, place.flatten(), exact.flatten(2))  # taps may meet
    response = torch.fft.fftn(kernel.unflatten(2, size), dim=tuple(range(2, 2 + len(size))))  # (C_out, C_in, *size)
    values: Tensor = torch.linalg.svdvals(response.flatten(2).permute(2, 0, 1))
    return values


class _ShortSide:
    """T, or its adjoint where that has the shorter side to start from."""

    def __init__(self, matrix: ConvOperator) -> None:
        # From the longer side, the vectors that T maps to 0 would show as singular values.
        flip = matrix.shape[0] < matrix.shape[1]
        self._there: Callable[[Tensor], Tensor] = matrix.adjoint if flip else matrix.apply
        self._back: Callable[[Tensor], Tensor] = matrix.apply if flip else matrix.adjoint
        self.size = min(matrix.shape)
        self.dtype = matrix.dtype

    def there(self, x: Tensor) -> Tensor:
        return self._there(x[:, None])[:, 0]

    def back(self, y: Tensor) -> Tensor:
        return self._back(y[:, None])[:, 0]

    def gram(self, x: Tensor) -> Tensor:
        return self.back(self.there(x))

    def start(self, seed: int) -> Tensor:
        """A random unit vector."""
        generator = torch.Generator().manual_seed(seed)
        start: Tensor = torch.randn(self.size, dtype=torch.float64, generator=generator).to(self.dtype)
        unit: Tensor = start / start.norm()
        return unit

    def measured(self, x: Tensor) -> tuple[float, float]:
        """The norm of T on a unit vector, which lies between the ends; how far a singular value is from it at most."""
        x = x / x.norm()
        image = self.there(x)
        value = float(image.norm())
        residual = float((self.back(image) - value**2 * x).norm())  # an eigenvalue of T* T is that close to value^2
        return value, min(residual / value, math.sqrt(residual)) if value > 0 else math.sqrt(residual)


class _Krylov:
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
    ) -> _Krylov:
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


def _climb(krylov: _Krylov, tolerance: float, limit: int) -> None:
    """Step until the root of the largest eigenvalue is known to the tolerance, relative to itself."""
    while krylov.steps < limit:
        krylov.step()
        if krylov.exhausted:
            return
        if krylov.steps % 5 == 0:
            value, residual, _ = krylov.top()
            if residual <= 0.5 * tolerance * value:
                return


def _by_cholesky(matrix: ConvOperator, gram: BandedGram, tolerance: float, steps: int | None, seed: int) -> Spectrum:
    side = _ShortSide(matrix)
    krylov = _Krylov(side.gram, side.start(seed))
    _climb(krylov, tolerance, LARGEST_STEPS if steps is None else steps)
    value, error = side.measured(krylov.top()[2])
    rounding = ROUNDING * value
    high = SingularValue(value, error + rounding, error + rounding <= tolerance * value)
    if value == 0:  # of a random vector: T is zero
        high = low = SingularValue(0.0, 0.0, True, gram.norm == 0)
        return Spectrum(matrix.shape, high, low, ("cholesky",), krylov.steps, tolerance)
    if high.converged:
        high = _nothing_above(gram, high, tolerance)
    low, taken = _smallest(side, gram, high.value, tolerance, INVERSE_STEPS if steps is None else steps, seed)
    return Spectrum(matrix.shape, high, low, ("cholesky",), max(krylov.steps, taken), tolerance)


def _nothing_above(gram: BandedGram, high: SingularValue, tolerance: float) -> SingularValue:
    """The same, proved where the matrix less everything up to just above it is negative definite."""
    above = (high.value * (1 + 0.5 * tolerance) + ROUNDING * high.value) ** 2
    factor = gram.factor(above, -1)
    if factor is None:
        # There is more above, unless it is rounding that fails.
        return replace(high, converged=above - high.value**2 <= gram.rounding)
    error = math.sqrt(above + factor.rounding) - high.value
    if error > tolerance * high.value:
        return high
    return SingularValue(high.value, max(error, high.error), True, True)


def _smallest(
    side: _ShortSide, gram: BandedGram, high: float, tolerance: float, limit: int, seed: int
) -> tuple[SingularValue, int]:
    """The smallest singular value, and in how many steps of inverse iteration."""
    shift = 2.0**-46 * gram.norm  # so that rounding leaves even a singular matrix positive definite
    while (factor := gram.factor(-shift)) is None:
        shift *= 16
        if shift > gram.norm:
            return SingularValue(high, math.inf, False), 0
    within, rounding = tolerance * high, ROUNDING * high
    krylov = _Krylov(factor.solve, side.start(seed + 1))
    best, tried = SingularValue(high, math.inf, False), math.inf
    while krylov.steps < limit:
        krylov.step()
        if krylov.steps % 3 and not krylov.exhausted and krylov.steps < limit:
            continue
        value, error = side.measured(krylov.top()[2])
        best = SingularValue(value, error + rounding, False)
        if value + rounding <= 0.01 * within:
            break
        if best.error <= 0.5 * min(within, value) and value < tried - 0.1 * within:
            below, tried = _nothing_below(gram, best, within, factor.rounding), value
            if below is not None:
                best = below
                break
        if krylov.exhausted:
            break
    if not best.proved and best.value + rounding <= within:  # then it is somewhere from 0 to there
        best = SingularValue(best.value, best.value + rounding, True, True)
    return best, krylov.steps


def _nothing_below(gram: BandedGram, low: SingularValue, within: float, rounding: float) -> SingularValue | None:
    """The same, proved if rounding allows for it; None if the matrix has something below."""
    # First just below it: where the smallest is small, an error of the whole tolerance makes its condition vague.
    for gap in (min(2 * low.error, 0.5 * within), 0.5 * within):
        floor = max(low.value - gap, 0.0)
        below = min(floor**2, low.value**2 - 2 * rounding)
        if below <= rounding:
            return replace(low, converged=True)
        if (factor := gram.factor(below)) is None:
            continue
        error = low.value - math.sqrt(max(below - factor.rounding, 0.0))
        if error > within:
            return replace(low, converged=True)
        return SingularValue(low.value, max(error, low.error), True, True)
    return None


def _by_lanczos(matrix: ConvOperator, tolerance: float, steps: int | None, seed: int) -> Spectrum:
    side = _ShortSide(matrix)
    short, long = min(matrix.shape), max(matrix.shape)
    limit = min(short, STEPS, BASIS_BYTES // (8 * (short + long))) if steps is None else min(short, steps)
    limit = max(1, limit)
    right = torch.empty(limit, short, dtype=matrix.dtype)  # grows in rows: what isn't reached takes no memory
    left = torch.empty(limit, long, dtype=matrix.dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    following = side.start(seed)
    ends = _Ends.nothing()
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
    within = tolerance * ends.high
    return Spectrum(
        matrix.shape,
        SingularValue(ends.high, max(ends.high_error, ends.high * ROUNDING), ends.high_error <= within),
        SingularValue(ends.low, max(ends.low_error, ends.high * ROUNDING), ends.low_error <= within),
        ("lanczos",),
        taken,
        tolerance,
    )


def _higher(
    side: _ShortSide,
    right: Tensor,
    diagonal: list[float],
    beside: list[float],
    following: Tensor,
    ends: _Ends,
    tolerance: float,
) -> tuple[_Ends, int]:
    """The largest taken further from where bidiagonalisation ended, and the steps of both."""
    _, values, vectors = torch.linalg.svd(_bidiagonal(diagonal, beside[: len(diagonal) - 1]))
    kept = min(KEPT, len(values))
    krylov = _Krylov.over(side.gram, vectors[:kept].to(right.dtype) @ right, values[:kept].square().tolist(), following)
    _climb(krylov, tolerance, LARGEST_STEPS - len(diagonal))
    high, error = side.measured(krylov.top()[2])
    return replace(ends, high=high, high_error=error), len(diagonal) + krylov.steps


@dataclass(frozen=True, slots=True)
class _Ends:
    high: float
    high_error: float
    low: float
    low_error: float

    @classmethod
    def nothing(cls) -> _Ends:
        return cls(0.0, math.inf, 0.0, math.inf)


def _ends_of(diagonal: list[float], beside: list[float], rest: float) -> _Ends:
    """The ends of the bidiagonal matrix's spectrum, with their residuals."""
    left, values, _ = torch.linalg.svd(_bidiagonal(diagonal, beside))  # descending
    residuals = rest * left[-1].abs()
    return _Ends(float(values[0]), float(residuals[0]), float(values[-1]), float(residuals[-1]))


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
