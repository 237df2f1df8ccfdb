"""The largest and the smallest singular value of a layer's matrix, and with them its condition number.

What is called the smallest is the last of min(rows, columns) singular values. First the matrix falls apart where it can
(`core.blocks`); then each block by itself, equal ones once. A small one has a dense SVD, exact to rounding. Of a large
one ARPACK finds the vectors, with G = T* T or its inverse; the norm of T on a unit vector lies between the ends. That
nothing lies beyond is proved by a factorisation (`core.gram`), and of the largest by the symbol as well, which bounds
it always. So each end is held from both sides; where they are further apart than the tolerance, they are given as the
bounds that they are.

Of the largest alone less will do: no SVD of a block that takes long, one iteration, and then what proves that nothing
lies above for the least work: a factorisation where that takes seconds, else the symbol or sums of absolute values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convtool.core.blocks import Apart, Block
from convtool.core.bound import U64, gamma
from convtool.core.conv import Conv
from convtool.core.expression import Expression, depth, window
from convtool.core.fuse import NamedConv, fuse_tree
from convtool.core.gram import AnyBlock, Gram, Side
from convtool.core.rows import has_scipy
from convtool.core.singular import ROUNDING, Method, SingularValue, Spectrum
from convtool.core.sparse_block import SparseBlock, scale_of
from convtool.core.tree import Chain, Tree, leaves, map_leaves, sole_layer
from convtool.errors import InputError, RefusedError, UsageError

DENSE_WORK = 1 << 36  # short * short * long of all dense SVDs together: some ten seconds
DENSE_ELEMENTS = 1 << 25  # of one
ALONE_WORK = 1 << 28  # of a dense SVD for the largest alone: a quarter of a second
ALONE_FACTOR_WORK = 1 << 37  # flops of a factorisation that proves it: some ten seconds
SMALLEST_SIDE = 16  # of a matrix that is iterated with
PRODUCTS = 1000  # of an iteration with G, at most
ITERATION_WORK = 1 << 40  # multiply-adds of one
GRID_WORK = 3 << 32  # multiply-adds of looking at frequencies
INVERTED = 200  # a factorisation is made for the largest alone where it takes no more than so many products
COARSER = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)  # accuracies of an iteration that may not end


def spectrum(
    layers: Conv | Sequence[Conv] | Expression,
    input_size: Sequence[int],
    *,
    tolerance: float = 1e-6,
    steps: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    largest: bool = False,
) -> Spectrum:
    """The largest and the smallest singular value of the layer's matrix at one input size; the bias has no part in it.

    Args:
        layers: a layer; or several, first to last, with every border as it is.
        tolerance: how far from a singular value each may be, relative to the largest.
        steps: of each iteration, at most; by default what usually does.
        memory: bytes that a factorisation may take, however long it takes then; by default 1.5 GiB, and a few minutes
            for all of them.
        seed: of the random vector that iterations start from.
        largest: only the largest is asked for, which takes much less work for large layers; the smallest is None then.

    Returns:
        Both ends: `largest.value` and `smallest.value`, each with its `error` and whether it is `proved`; `condition`.

    Raises:
        UsageError: the layer cannot run on that input size, or a tolerance that isn't between 0 and 1; or a
            matrix that is too large for a dense SVD, and scipy isn't installed.
        InputError: weights that are not finite.
    """
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance: expected a number between 0 and 1, got {tolerance:g}")
    tree: Expression = Chain(tuple(layers)) if isinstance(layers, Sequence) else layers
    if not all(bool(layer.exact().weight.isfinite().all()) for layer in leaves(tree)):
        raise InputError("a weight holds values that are not finite; its matrix has no singular values")
    size, ends = tuple(input_size), _Ends(tolerance, steps, memory, seed, largest and has_scipy())
    conv, off = _one_layer(tree, size)
    shape, scale = _of_tree(ends, tree, size) if conv is None else _of_layer(ends, conv, size, off)
    high, low = ends.values(scale)
    if math.isinf(high.value):
        raise InputError(f"weights near {scale:.3g} have singular values beyond what float64 holds, 1.8e308")
    methods = tuple(ends.methods) or ("dense",)
    return Spectrum(shape, high, None if largest else low, methods, ends.taken, tolerance, ends.lacking)


def _one_layer(tree: Expression, size: tuple[int, ...]) -> tuple[Conv | None, float]:
    """Return the layer that a tree is at one size, and how far off composing it may be; None where no layer is."""
    if (layer := sole_layer(tree)) is not None:
        return layer, 0.0
    unbiased: Expression = map_leaves(Conv.without_bias, tree)
    dtype = torch.complex128 if any(layer.dtype.is_complex for layer in leaves(unbiased)) else torch.float64

    def fused(one: Expression) -> Conv:
        named: Tree[NamedConv] = map_leaves(lambda conv: NamedConv("a layer", conv), one)
        return fuse_tree(named, input_size=size, allow_border=False, dtype=dtype).conv

    try:
        conv, absolute = fused(unbiased), fused(map_leaves(Conv.absolute, unbiased)).weight.abs()
    except RefusedError:
        return None, 0.0
    # The root of the largest row sum and column sum bounds a norm; padding that copies inputs brings some twice.
    into, out = absolute.flatten(1).sum(1).max(), absolute.sum((0, *range(2, absolute.dim()))).max()
    copies = math.prod(conv.geometry.kernel_size)
    return conv, gamma(4 * depth(tree, window), U64) * math.sqrt(float(into) * float(out) * copies)


@dataclass(slots=True)
class _Ends:
    """What is known of both ends while blocks come in.

    Attributes:
        tolerance: relative to the largest.
        steps, memory, seed: as of `spectrum`.
        alone: the largest is found without the smallest; needs scipy.
        high, low: the largest and the smallest that are the norm of T on some unit vector.
        most, least: what nothing is above and below; that is proved.
        rounding: how far off `high` and `low` may be.
        taken: most steps of an iteration.
        lacking: bytes of the largest factorisation that wasn't made.
        methods: in the order of first use.
    """

    tolerance: float
    steps: int | None
    memory: int | None
    seed: int
    alone: bool = False
    high: float = 0.0
    low: float = math.inf
    most: float = 0.0
    least: float = math.inf
    rounding: float = 0.0
    taken: int = 0
    lacking: int = 0
    methods: dict[Method, None] = field(default_factory=dict)

    def dense(self, sides: tuple[int, int]) -> bool:
        """Return whether a block of these sides may have a dense SVD, if there are few of them."""
        small, large = sorted(sides)
        return small**2 * large <= (ALONE_WORK if self.alone else DENSE_WORK) and small * large <= DENSE_ELEMENTS

    def exact(self, values: torch.Tensor) -> None:
        """Count singular values that are exact to rounding."""
        high, low = float(values.max()), float(values.min())
        self.found(high, high * ROUNDING, 0)
        self.low, self.most, self.least = min(self.low, low), max(self.most, high), min(self.least, low)

    def found(self, value: float, rounding: float, steps: int) -> None:
        """Count the norm of T on a unit vector."""
        self.high, self.low = max(self.high, value), min(self.low, value)
        self.rounding, self.taken = max(self.rounding, rounding), max(self.taken, steps)

    def widen(self, off: float) -> None:
        """Allow for a matrix that is so far off, in norm."""
        self.most, self.least, self.rounding = self.most + off, max(0.0, self.least - off), self.rounding + off

    def values(self, scale: float) -> tuple[SingularValue, SingularValue]:
        """Return the largest and the smallest, times the scale."""
        errors = max(self.most - self.high, self.rounding), max(self.low - self.least, self.rounding)
        known = [error <= self.tolerance * self.high for error in errors]
        largest, smallest = (
            SingularValue(value * scale, error * scale, here)
            for value, error, here in zip((self.high, self.low), errors, known, strict=True)
        )
        return largest, smallest


def _of_tree(ends: _Ends, tree: Expression, size: tuple[int, ...]) -> tuple[tuple[int, int], float]:
    """Find the ends of layers that no single one stands for; return the shape and the scale of their matrix."""
    block = SparseBlock(tree, size)
    small = min(block.shape)
    if ends.dense(block.shape) and small:
        ends.exact(torch.linalg.svdvals(block.dense()))
        ends.methods["dense"] = None
    _find(ends, [] if ends.methods or not small else [block], hollow=not small)
    ends.widen(block.entries_off)
    return block.shape, block.scale


def _of_layer(ends: _Ends, conv: Conv, size: tuple[int, ...], off: float) -> tuple[tuple[int, int], float]:
    """Find the ends of a layer by the blocks that its matrix falls apart into; return its shape and scale.

    Args:
        off: how far off its matrix may be, in norm.
    """
    # Squares are formed on the way, and sums: of numbers near 1, whatever the weights.
    exact = conv.without_bias().exact()
    shape = conv.out_channels * math.prod(conv.output_size(size)), conv.in_channels * math.prod(size)
    scale = scale_of(exact.weight)
    apart = Apart.of(Conv(exact.weight / scale, None, conv.geometry), size)
    parts, budget = {apart.lines: 1}, DENSE_WORK
    if apart.work(apart.lines) > budget or (ends.alone and not ends.dense(apart.shape(apart.lines))):
        parts = apart.parts()
    if any(len(wave.phases(real=True)) > 1 for wave in apart.waves) or (apart.waves and not apart.lines):
        ends.methods["fourier"] = None
    large: list[AnyBlock] = []
    for lines in sorted(parts, key=apart.work):
        budget -= apart.work(lines)
        sides = apart.shape(lines)
        if min(sides) > SMALLEST_SIDE and (budget < 0 or not ends.dense(sides)):
            large += (Block(weight, lines) for batch in apart.batches() for weight in batch)
            continue
        for batch in apart.batches() if min(sides) else ():
            for some in (Block(weight, lines).dense() for weight in batch) if lines else (batch,):
                ends.exact(torch.linalg.svdvals(some))
                ends.methods |= {} if apart.waves and not lines else {"dense": None}
    # A row or a column of zeros, or more of them than the others.
    full = sum(apart.repeats * count * min(apart.shape(lines)) for lines, count in parts.items())
    _find(ends, large, hollow=full < max(1, min(shape)))
    ends.widen(off / scale)
    return shape, scale


def _find(ends: _Ends, large: Sequence[AnyBlock], hollow: bool) -> None:
    """Find the ends of all blocks that no dense SVD was made of.

    Args:
        hollow: whether the smallest is zero, whatever the blocks.
    """
    if not all(block.weight.any() for block in large):
        ends.exact(torch.zeros(1))
    large = [block for block in large if block.weight.any()]
    for block in large:
        (_largest_alone if ends.alone else _largest)(ends, block)
    if ends.alone:
        return
    if hollow:
        ends.low = ends.least = 0.0
    else:
        ends.seed += 1
        for block in large:
            _smallest(ends, block)


def _gram(ends: _Ends, side: Side) -> Gram | None:
    """Return the Gram matrix of a block's shorter side, where it can be factored."""
    gram = Gram(side)
    if gram.fits(ends.memory):
        return gram
    ends.lacking = max(ends.lacking, gram.bytes)
    return None


def _largest(ends: _Ends, block: AnyBlock) -> None:
    """Take the largest of a block into account."""
    bound, above = block.bound(GRID_WORK), 1 + 0.5 * ends.tolerance
    if bound > ends.high * above:
        side = Side(block)
        gram = _gram(ends, side)
        factor = gram.factor(-1, bound**2 * above) if gram and gram.work < INVERTED * block.work else None
        if gram is None or factor is None:
            _iterate(ends, side, side.gram, (1e-2, 1e-4, ends.tolerance))
        else:
            _iterate(ends, side, partial(gram.solve, factor), (1e-3, 1e-6))
        del factor
        proved: Method = "lanczos" if gram is None or bound <= ends.high * above else "cholesky"
        if gram is not None and bound > ends.high * above:
            rounding = gram.proves(-1, (ends.high * above) ** 2)
            bound = bound if rounding is None else min(bound, math.sqrt((ends.high * above) ** 2 + rounding))
        ends.methods[proved] = None
    ends.most = max(ends.most, bound)


def _largest_alone(ends: _Ends, block: AnyBlock) -> None:
    """Take the largest of a block into account by one iteration, and what bounds it for the least work."""
    bound, above = block.norm * (1 + 2.0**-30), 1 + 0.5 * ends.tolerance
    if bound > ends.high * above:
        side = Side(block)
        gram = Gram(side)
        _iterate(ends, side, side.gram, (1e-2, 1e-4, ends.tolerance))
        target, rounding = (ends.high * above) ** 2, None
        shown: Method = "cholesky"
        if gram.fits(ends.memory) and (ends.memory is not None or gram.work <= ALONE_FACTOR_WORK):
            rounding = gram.proves(-1, target)
        elif bound > ends.high * above:
            ends.lacking = max(ends.lacking, gram.bytes)
        if rounding is not None:
            proved = math.sqrt(target + rounding)
        else:
            proved = block.bound(GRID_WORK) if _is_quick(block) else math.inf
            shown = "lanczos" if proved < bound else "sums"
        ends.methods[shown], bound = None, min(bound, proved)
    ends.most = max(ends.most, bound)


def _is_quick(block: AnyBlock) -> bool:
    """Return whether the symbol's norm at one frequency is little work."""
    rows, columns = block.weight.shape[:2] if isinstance(block, Block) else (0, 0)
    return rows * columns * min(rows, columns) <= ALONE_WORK


def _smallest(ends: _Ends, block: AnyBlock) -> None:
    """Take the smallest of a block into account."""
    side = Side(block)
    gram = _gram(ends, side)
    ends.methods["cholesky" if gram else "lanczos"] = None
    if gram is None:
        over = ends.most**2
        _iterate(ends, side, lambda x: over * x - side.gram(x), COARSER)
        ends.least = 0.0
        return
    floor = _floor(gram, ends) if ends.least < math.inf else 0.0
    if floor < ends.low - ends.tolerance * ends.high:  # something of this block may lie below what is known
        if (factor := gram.nearly()) is not None:
            _iterate(ends, side, partial(gram.solve, factor), (1e-3, 1e-8))
        del factor
        floor = _floor(gram, ends)
    ends.least = min(ends.least, floor)


def _floor(gram: Gram, ends: _Ends) -> float:
    """Return what a block has no singular value below, near under what is known already; 0 where that isn't proved."""
    within = 0.5 * ends.tolerance * ends.high
    # First just below it: where the smallest is small, an error of the whole tolerance makes its condition vague.
    for gap in sorted({min(0.5 * ends.tolerance * ends.low + ends.rounding, within), within}):
        floor = ends.low - gap
        if floor > 0 and (rounding := gram.proves(1, floor**2)) is not None:
            return math.sqrt(max(floor**2 - rounding, 0.0))
    return 0.0


class _EnoughError(Exception):
    """An iteration has taken all of its steps."""


def _iterate(ends: _Ends, side: Side, apply: Callable[[Any], Any], tolerances: Sequence[float]) -> None:
    """Count the norm of T on nearly an eigenvector of the largest eigenvalue of a Hermitian map.

    It is found more accurately each time, from where the last one ended: what ARPACK doesn't finish it doesn't give.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    limit = max(40, min(PRODUCTS, ITERATION_WORK // max(1, side.block.work))) if ends.steps is None else ends.steps
    taken = 0

    def counted(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        nonlocal taken
        if taken >= limit:
            raise _EnoughError
        taken += 1
        return np.asarray(apply(torch.from_numpy(x.reshape(1, -1)))).reshape(-1)

    random = torch.randn(side.size, dtype=torch.float64, generator=torch.Generator().manual_seed(ends.seed))
    vector = random.to(side.block.weight.dtype).numpy()
    matrix = LinearOperator((side.size, side.size), matvec=counted, dtype=vector.dtype)
    with suppress(_EnoughError, ArpackError):
        for tolerance in tolerances:
            vector = eigsh(matrix, k=1, which="LA", v0=vector, tol=tolerance)[1][:, 0]
            if side.measured(torch.from_numpy(vector[None]))[0] <= 0.5 * ends.tolerance * ends.high:
                break  # the smallest is zero, as far as was asked
    ends.found(*side.measured(torch.from_numpy(vector[None])), taken)
