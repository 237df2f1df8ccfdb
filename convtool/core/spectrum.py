"""The largest and the smallest singular value of a layer's matrix, and with them its condition number.

What is called the smallest is the last of min(rows, columns) singular values. The matrix of a layer in groups is
block diagonal, so each group is taken by itself. Then, in this order:

- circular padding at stride 1: a Fourier transform makes the matrix block diagonal, with a C_out x C_in block for each
  frequency (Sedghi, Gupta, Long: The Singular Values of Convolutional Layers, 2019); exact to rounding;
- a small matrix: a dense SVD; exact to rounding;
- else Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation (Golub, Van Loan: Matrix Computations, 10.4):
  the singular values of the bidiagonal matrix approach those of T from inside, and the residual of each is a bound on
  its distance to a singular value of T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.operator import ConvOperator
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import InputError, UsageError

Method: TypeAlias = Literal["fourier", "dense", "lanczos"]

DENSE_SIDE = 4096  # the smaller side of a matrix whose dense SVD takes some ten seconds
DENSE_ELEMENTS = 1 << 25
BASIS_BYTES = 1 << 29  # of Lanczos vectors
STEPS = 300  # of Lanczos unless asked for more: enough for the largest; a smallest in a dense end can take thousands
ROUNDING = 2.0**-45  # relative to the largest, of what is exact in float64 to rounding: some hundred units


@dataclass(frozen=True, slots=True)
class SingularValue:
    """A singular value and how well it is known.

    Attributes:
        value: the estimate. Not converged, the largest is at least this, and the smallest at most.
        error: there is a singular value no further than this from `value`.
        converged: whether the error is within the tolerance.
    """

    value: float
    error: float
    converged: bool


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The ends of the spectrum of a layer's matrix.

    Attributes:
        shape: (rows, columns) of the matrix.
        largest, smallest: of its min(rows, columns) singular values.
        methods: how it was computed, in the order of first use.
        steps: of Lanczos, in the group that took most; 0 where there were none.
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
        steps: of Lanczos, at most; by default `STEPS`, or fewer where half a GiB of vectors doesn't hold them.
        seed: of the random vector that Lanczos starts from.

    Raises:
        UsageError: the layer cannot run on that input size, or a tolerance that isn't between 0 and 1.
        InputError: weights that are not finite.
    """
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance: expected a number between 0 and 1, got {tolerance:g}")
    if not bool(conv.weight.isfinite().all()):
        raise InputError("the weight holds values that are not finite; its matrix has no singular values")
    conv.output_size(input_size)
    parts = [_ends(group, tuple(input_size), tolerance, steps, seed) for group in _groups(conv)]
    largest = max((part.largest for part in parts), key=lambda one: one.value)
    smallest = min((part.smallest for part in parts), key=lambda one: one.value)
    within = tolerance * largest.value
    # The union over the groups: a group whose own smallest isn't known well may hold the smallest of all.
    smallest = SingularValue(smallest.value, max(part.smallest.error for part in parts), False)
    largest = SingularValue(largest.value, max(part.largest.error for part in parts), False)
    whole = ConvOperator(conv, input_size).shape
    return Spectrum(
        whole,
        SingularValue(largest.value, largest.error, largest.error <= within),
        SingularValue(smallest.value, smallest.error, smallest.error <= within),
        tuple(dict.fromkeys(part.methods[0] for part in parts)),
        max(part.steps for part in parts),
        tolerance,
    )


def _groups(conv: Conv) -> list[Conv]:
    """Each group as a layer of its own; of groups with equal weights, one."""
    if conv.geometry.groups == 1:
        return [conv]
    from dataclasses import replace

    geometry = replace(conv.geometry, groups=1)
    weights = {tuple(part.flatten().tolist()): part for part in conv.weight.chunk(conv.geometry.groups)}
    return [Conv(weight, None, geometry) for weight in weights.values()]


def _ends(conv: Conv, size: tuple[int, ...], tolerance: float, steps: int | None, seed: int) -> Spectrum:
    shape = ConvOperator(conv, size).shape
    if _is_circulant(conv, size):
        return _known(_by_frequency(conv, size), shape, "fourier", tolerance)
    if min(shape) <= DENSE_SIDE and shape[0] * shape[1] <= DENSE_ELEMENTS:
        dense = ToeplitzMatrix(conv.exact(), size).to_dense()
        return _known(torch.linalg.svdvals(dense), shape, "dense", tolerance)
    return _by_lanczos(ConvOperator(conv, size), tolerance, steps, seed)


def _known(values: Tensor, shape: tuple[int, int], method: Method, tolerance: float) -> Spectrum:
    high, low = float(values.max()), float(values.min())
    error = high * ROUNDING
    return Spectrum(shape, SingularValue(high, error, True), SingularValue(low, error, True), (method,), 0, tolerance)


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


def _by_lanczos(matrix: ConvOperator, tolerance: float, steps: int | None, seed: int) -> Spectrum:
    # From the shorter side: from the longer one, the vectors that T maps to 0 would show as singular values.
    flip = matrix.shape[0] < matrix.shape[1]
    there, back = (matrix.adjoint, matrix.apply) if flip else (matrix.apply, matrix.adjoint)
    short, long = min(matrix.shape), max(matrix.shape)
    limit = min(short, STEPS, BASIS_BYTES // (8 * (short + long))) if steps is None else min(short, steps)
    limit = max(1, limit)
    generator = torch.Generator().manual_seed(seed)
    right = torch.empty(limit, short, dtype=matrix.dtype)  # grows in rows: what isn't reached takes no memory
    left = torch.empty(limit, long, dtype=matrix.dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    following = torch.randn(short, dtype=torch.float64, generator=generator).to(matrix.dtype)
    following /= following.norm()
    ends = _Ends.nothing()
    for step in range(limit):
        right[step] = following
        image = there(following[:, None])[:, 0]
        image = _orthogonal(image, left[:step])
        diagonal.append(float(image.norm()))
        left[step] = image / diagonal[-1] if diagonal[-1] > 0 else image
        source = back(left[step][:, None])[:, 0]
        source = _orthogonal(source, right[: step + 1])
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
        beside.append(rest)
        following = source / rest
    within = tolerance * ends.high
    return Spectrum(
        matrix.shape,
        SingularValue(ends.high, max(ends.high_error, ends.high * ROUNDING), ends.high_error <= within),
        SingularValue(ends.low, max(ends.low_error, ends.high * ROUNDING), ends.low_error <= within),
        ("lanczos",),
        len(diagonal),
        tolerance,
    )


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
    upper = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        upper += torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    left, values, _ = torch.linalg.svd(upper)  # descending
    residuals = rest * left[-1].abs()
    return _Ends(float(values[0]), float(residuals[0]), float(values[-1]), float(residuals[-1]))


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """The vector less its part in the span of the basis's rows; twice, which is enough (Kahan, Parlett)."""
    for _ in range(2):
        vector = vector - basis.T @ (basis.conj() @ vector)
    return vector
