"""The largest and the smallest singular value of a layer's matrix, and with them its condition number.

What is called the smallest is the last of min(rows, columns) singular values. The matrix of a layer in groups is
block diagonal; of groups with equal weights, one is looked at. Then, in this order:

- circular padding at stride 1: a Fourier transform makes the matrix block diagonal, with a C_out x C_in block for each
  frequency (Sedghi, Gupta, Long: The Singular Values of Convolutional Layers, 2019); exact to rounding;
- a small matrix: a dense SVD of each group; exact to rounding;
- a matrix whose Gram matrix can be factored by nested dissection (`core.gram`): restarted Lanczos for the largest, for
  the smallest a descent with that factor, which may be one in float32. Each is the norm of T on some unit vector, so
  neither lies outside the spectrum; and a factorisation in float64 of the Gram matrix, shifted to just outside of it,
  proves that nothing lies beyond;
- else Golub-Kahan-Lanczos bidiagonalisation: the singular values of the bidiagonal matrix approach those of T from
  inside, and the residual of each is a bound on its distance to a singular value of T. What the largest still lacks,
  restarted Lanczos adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.flat import tensor_bits
from convtool.core.gram import Factor, Gram, gram
from convtool.core.krylov import BLOCK, LARGEST_STEPS, Descent, Krylov, ShortSide, bidiagonalise, climb
from convtool.core.operator import ConvOperator
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import InputError, UsageError

Method: TypeAlias = Literal["fourier", "dense", "cholesky", "lanczos"]

DENSE_SIDE = 4096  # the smaller side of a matrix whose dense SVD takes some ten seconds
DENSE_ELEMENTS = 1 << 25
DESCENT_STEPS = 150  # of a descent: it takes three to ten with a factor in float64, some tens with one in float32
LARGEST_WORK = 1 << 39  # multiply-adds of a factorisation that is made for no more than to prove the largest
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
    distinct = _distinct(conv)
    found = _ends(distinct, tuple(input_size), tolerance, steps, seed)
    return replace(found, shape=ConvOperator(conv, input_size).shape)


def _distinct(conv: Conv) -> Conv:
    """The layer without those groups that have the same weights as an earlier one."""
    groups = conv.geometry.groups
    parts = conv.weight.chunk(groups)
    weights = parts if groups == 1 else tuple({tensor_bits(part).numpy().tobytes(): part for part in parts}.values())
    if len(weights) == groups:
        return Conv(conv.weight, None, conv.geometry)
    return Conv(torch.cat(weights), None, replace(conv.geometry, groups=len(weights)))


def _ends(conv: Conv, size: tuple[int, ...], tolerance: float, steps: int | None, seed: int) -> Spectrum:
    # Squares are formed on the way, and sums: of numbers near 1, whatever the weights.
    exact = conv.exact().weight
    most = float(exact.abs().max())
    scale = 2.0 ** max(math.frexp(most)[1] - 1, -1000) if most > 0 else 1.0
    found = _ends_near_one(Conv(exact / scale, None, conv.geometry), size, tolerance, steps, seed)
    largest, smallest = _times(found.largest, scale), _times(found.smallest, scale)
    if math.isinf(largest.value):
        raise InputError(f"weights as large as {most:.3g} have singular values beyond what float64 holds, 1.8e308")
    return replace(found, largest=largest, smallest=smallest)


def _ends_near_one(conv: Conv, size: tuple[int, ...], tolerance: float, steps: int | None, seed: int) -> Spectrum:
    shape, groups = ConvOperator(conv, size).shape, conv.geometry.groups
    if _is_circulant(conv, size):
        return _known(_by_frequency(conv, size), shape, "fourier", tolerance)
    rows, columns = (side // groups for side in shape)
    # All groups together take no longer than one matrix of DENSE_SIDE.
    if min(rows, columns) <= int(DENSE_SIDE / groups ** (1 / 3)) and rows * columns <= DENSE_ELEMENTS:
        values = [torch.linalg.svdvals(ToeplitzMatrix(part, size).to_dense()) for part in _parts(conv)]
        return _known(torch.cat(values), shape, "dense", tolerance)
    matrix, product = ConvOperator(conv, size), gram(conv, size)
    if product is not None:
        return _by_cholesky(matrix, product, tolerance, steps, seed)
    return _by_lanczos(matrix, tolerance, steps, seed)


def _parts(conv: Conv) -> Iterator[Conv]:
    """Each group as a layer of its own."""
    geometry = replace(conv.geometry, groups=1)
    yield from (Conv(part, None, geometry) for part in conv.exact().weight.chunk(conv.geometry.groups))


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
    # A transposed layer can have taken from one end what it added at the other.
    pointwise = geometry.kernel_size == (1,) * len(size) and not geometry.padded
    return bool(size) and whole and (geometry.padding_mode == "circular" or pointwise)


def _by_frequency(conv: Conv, size: tuple[int, ...]) -> Tensor:
    """All singular values of a layer that wraps around: those of its frequency response, one block per frequency."""
    groups = conv.geometry.groups
    exact = conv.exact().weight.reshape(groups, conv.out_channels // groups, conv.in_channels // groups, -1)
    if conv.geometry.kernel_size == (1,) * len(size):  # the same block at every frequency
        same: Tensor = torch.linalg.svdvals(exact[..., 0])
        return same
    place = torch.zeros((), dtype=torch.int64)  # of each tap in the whole input, wrapped around
    for axis, length in zip(conv.geometry.axes, size, strict=True):
        place = place[..., None] * length + torch.arange(axis.kernel) * axis.dilation % length
    kernel = torch.zeros(*exact.shape[:3], math.prod(size), dtype=exact.dtype)
    kernel.index_add_(3, place.flatten(), exact)  # taps may meet
    response = torch.fft.fftn(kernel.unflatten(3, size), dim=tuple(range(3, 3 + len(size))))
    values: Tensor = torch.linalg.svdvals(response.flatten(3).permute(0, 3, 1, 2))
    return values


def _by_cholesky(matrix: ConvOperator, product: Gram, tolerance: float, steps: int | None, seed: int) -> Spectrum:
    side = ShortSide(matrix)
    krylov = Krylov(side.gram, side.start(seed)[:, 0])
    climb(krylov, tolerance, LARGEST_STEPS if steps is None else steps)
    value, error = side.measured(krylov.top()[2])
    rounding = ROUNDING * value
    high = SingularValue(value, error + rounding, error + rounding <= tolerance * value)
    if value == 0:  # of a random vector: T is zero
        high = low = SingularValue(0.0, 0.0, True, product.norm == 0)
        return Spectrum(matrix.shape, high, low, ("cholesky",), krylov.steps, tolerance)
    if high.converged and product.work <= LARGEST_WORK:
        high = _nothing_above(product, high, tolerance)
    low, taken = _smallest(side, product, high.value, tolerance, DESCENT_STEPS if steps is None else steps, seed)
    return Spectrum(matrix.shape, high, low, ("cholesky",), max(krylov.steps, taken), tolerance)


def _nothing_above(product: Gram, high: SingularValue, tolerance: float) -> SingularValue:
    """The same, proved where the matrix less everything up to just above it is negative definite."""
    above = (high.value * (1 + 0.5 * tolerance) + ROUNDING * high.value) ** 2
    factor = product.factor(above, -1)
    if factor is None:
        # There is more above, unless it is rounding that fails.
        return replace(high, converged=above - high.value**2 <= product.rounding)
    error = math.sqrt(above + factor.rounding) - high.value
    if error > tolerance * high.value:
        return high
    return SingularValue(high.value, max(error, high.error), True, True)


def _smallest(
    side: ShortSide, product: Gram, high: float, tolerance: float, limit: int, seed: int
) -> tuple[SingularValue, int]:
    """The smallest singular value, and in how many steps of a descent."""
    factor = _near_inverse(product, high)
    if factor is None:
        return SingularValue(high, math.inf, False), 0
    within, rounding = tolerance * high, ROUNDING * high
    descent = Descent(side, factor.solve, side.start(seed + 1, min(BLOCK, side.size)))
    tried = math.inf
    while True:
        value, error = side.measured(descent.vectors[:, 0])
        best = SingularValue(value, error + rounding, False)
        if value + rounding <= 0.01 * within:
            break
        if best.error <= 0.5 * min(within, value) and value < tried - 0.1 * within:
            below, tried = _nothing_below(product, best, within, factor.rounding), value
            if below is not None:
                best = below
                break
        if descent.exhausted or descent.steps >= limit:
            break
        descent.step()
    if not best.proved and best.value + rounding <= within:  # then it is somewhere from 0 to there
        best = SingularValue(best.value, best.value + rounding, True, True)
    return best, descent.steps


def _near_inverse(product: Gram, high: float) -> Factor | None:
    """A factor of the Gram matrix, as near to it as rounding leaves it positive definite even if it is singular."""
    shift = 2.0**-46 * product.norm if product.kept_dtype.to_real().itemsize == 8 else 2.0**-21 * high**2
    while (factor := product.factor(-shift, keep=product.kept_dtype)) is None:
        shift *= 16
        if shift > product.norm:
            return None
    return factor


def _nothing_below(product: Gram, low: SingularValue, within: float, rounding: float) -> SingularValue | None:
    """The same, proved if rounding allows for it; None if the matrix has something below."""
    # First just below it: where the smallest is small, an error of the whole tolerance makes its condition vague.
    for gap in (min(2 * low.error, 0.5 * within), 0.5 * within):
        floor = max(low.value - gap, 0.0)
        below = min(floor**2, low.value**2 - 2 * rounding)
        if below <= rounding:
            return replace(low, converged=True)
        if (factor := product.factor(below)) is None:
            continue
        error = low.value - math.sqrt(max(below - factor.rounding, 0.0))
        if error > within:
            return replace(low, converged=True)
        return SingularValue(low.value, max(error, low.error), True, True)
    return None


def _by_lanczos(matrix: ConvOperator, tolerance: float, steps: int | None, seed: int) -> Spectrum:
    ends, taken = bidiagonalise(ShortSide(matrix), tolerance, steps, seed)
    within = tolerance * ends.high
    return Spectrum(
        matrix.shape,
        SingularValue(ends.high, max(ends.high_error, ends.high * ROUNDING), ends.high_error <= within),
        SingularValue(ends.low, max(ends.low_error, ends.high * ROUNDING), ends.low_error <= within),
        ("lanczos",),
        taken,
        tolerance,
    )
