"""Whether two chains of layers compute the same, up to the rounding that storing one of them must bring.

Both are run in float64 on inputs that find faults, and every output element is held against a bound of its own. For
an input x, chains B (before) and A (after), let |A|(|x|) be the absolute chain: the same layers with the absolute
values of all weights and biases. Then, elementwise,

    |B(x) - A(x)|  <=  ((1+u)^m - 1) |A|(|x|)  +  gamma_n(v) |B|(|x|)  +  gamma_n(w) (|B|(|x|) + |A|(|x|))  +  eta

    u      unit roundoff of the dtype that A is stored in; each of its m layers is rounded once: |fl(a) - a| <= u|fl(a)|
    gamma  n*w / (1 - n*w), n the longest accumulation through a chain; w = 2^-53 for the float64 of this comparison
    v      unit roundoff of the precision that A was computed in before it was stored; float64 for convtool's own
    eta    what underflow adds: half the smallest subnormal of A's dtype for every stored number

The terms are those of the running error analysis of inner products (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 3.1), each layer being one. There is no tolerance to choose: a ratio of error to bound of
at most 1 is what rounding alone can do, and more is a difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from convtool.core.border import Mask, border_at
from convtool.core.compose import compose_geometry
from convtool.core.conv import Conv
from convtool.core.forward import forward, run_chain
from convtool.core.geometry import format_sizes
from convtool.errors import ConvtoolError, UsageError

U64 = 2.0**-53
BATCH_ELEMENTS = 1 << 22  # numbers in flight per batch of inputs: 32 MiB in float64
BATCH_NORM_STEPS = 4  # roundings that lowering a batch norm adds: +eps, sqrt, divide, multiply-subtract


@dataclass(frozen=True, slots=True)
class Region:
    """The comparison over some output positions.

    Attributes:
        elements: numbers compared; 0 where the region is empty.
        ratio: largest error / bound; inf for NaN.
        error, bound: the error and the bound where that ratio stands.
        where: (channel, *position) of it, or None where nothing was compared.
        largest_error: the largest error anywhere in the region.
        relative_error: that, relative to the largest output there.
        differing: output positions with an element beyond its bound.
        positions: output positions in the region.
    """

    elements: int
    ratio: float
    error: float
    bound: float
    where: tuple[int, ...] | None
    largest_error: float
    relative_error: float
    differing: int
    positions: int

    @property
    def equal(self) -> bool:
        """Whether there was something to compare and all of it was within its bound."""
        return self.elements > 0 and self.ratio <= 1


@dataclass(frozen=True, slots=True)
class EquivalenceReport:
    """The result of `verify` at one input size.

    Attributes:
        input_size, output_size: with the channels in front.
        inputs: how many inputs were run, by kind.
        seed: of the random ones.
        exhaustive: every basis vector was run, which settles equality for all inputs.
        interior, rim: the comparison apart from and at the border, where a fused layer without the padding of the
            layers in between may differ; `rim` has no elements where the chain has no such border.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    inputs: dict[str, int]
    seed: int
    exhaustive: bool
    interior: Region
    rim: Region
    dtype: str = field(default="float64")

    @property
    def equivalent(self) -> bool:
        """Equal everywhere, and something was compared."""
        regions = [region for region in (self.interior, self.rim) if region.positions]
        return bool(regions) and all(region.equal for region in regions)

    @property
    def ratio(self) -> float:
        """The largest error / bound of all."""
        return max(self.interior.ratio, self.rim.ratio)


def verify(
    before: Sequence[Conv],
    after: Sequence[Conv],
    input_size: Sequence[int],
    *,
    trials: int = 8,
    seed: int = 0,
    exhaustive: bool = False,
    dtype: torch.dtype | None = None,
    computed_in: torch.dtype = torch.float64,
    rtol: float | None = None,
    atol: float | None = None,
) -> EquivalenceReport:
    """Run both chains on the same inputs and hold every output element against the bound of this module's docstring.

    Args:
        before: layers, first to last, whose numbers are taken as exact.
        after: layers whose numbers were rounded to `dtype` once.
        input_size: spatial sizes of the input, with or without the channels in front.
        trials: random inputs: signed normals, each scaled by another power of two.
        seed: of the random inputs.
        exhaustive: run every basis vector (and zero, for the bias): equality for these is equality for all inputs.
        dtype: that `after` is stored in; its own by default.
        computed_in: the precision in which another program computed `after` before storing it.
        rtol, atol: instead of the derived bound, |error| <= atol + rtol * |output|, as numpy's allclose.

    Raises:
        UsageError: the chains don't take the same input or don't give the same output size.
    """
    if trials < 1 and not exhaustive:
        raise UsageError(f"trials: expected at least 1, got {trials}; no comparison is no proof")
    if not before or not after:
        raise UsageError("expected at least one layer on each side")
    channels, size = _input_size(before, after, input_size)
    before_size, after_size = _output_size(before, size), _output_size(after, size)
    if (before[-1].out_channels, *before_size) != (after[-1].out_channels, *after_size):
        raise UsageError(
            f"the outputs differ in shape: {format_sizes((before[-1].out_channels, *before_size))} before,"
            f" {format_sizes((after[-1].out_channels, *after_size))} after"
        )
    stored = after[0].weight.dtype if dtype is None else dtype
    tolerance = None if rtol is None and atol is None else _Tolerance(rtol or 0.0, atol or 0.0)
    affine = _Pair(before, after, stored, computed_in, tolerance)
    # Impulses meet the layers without their biases, so that each kernel entry is held against its own rounding and not
    # against that of a large bias; the biases by themselves are what the zero input shows.
    linear = _Pair(
        [_linear(conv) for conv in before], [_linear(conv) for conv in after], stored, computed_in, tolerance
    )
    tallies = _Tallies(_rim_mask(before, size, before_size))
    work = max(1, sum(_work(chain, size) for chain in (before, after)))
    most = max(LEAST_IMPULSES, min(MOST_IMPULSES, WORK // work))
    outputs = before[-1].out_channels * math.prod(before_size)
    counts: dict[str, int] = {}
    for kind, batch in _inputs(channels, size, trials, seed, exhaustive, outputs, most):
        counts[kind] = counts.get(kind, 0) + len(batch)
        pair = linear if kind in ("impulse", "basis") else affine
        tallies.add(*pair.run(batch))
    return EquivalenceReport(
        input_size=(channels, *size),
        output_size=(before[-1].out_channels, *before_size),
        inputs=counts,
        seed=seed,
        exhaustive=exhaustive,
        interior=tallies.interior(),
        rim=tallies.rim(),
        dtype=str(stored).removeprefix("torch."),
    )


class _Pair:
    """Both chains in float64, with the bound on their difference."""

    def __init__(
        self,
        before: Sequence[Conv],
        after: Sequence[Conv],
        stored: torch.dtype,
        computed_in: torch.dtype,
        tolerance: _Tolerance | None,
    ) -> None:
        self.before = [conv.exact() for conv in before]
        self.after = [conv.exact() for conv in after]
        self.bound = tolerance or _Bound(self.before, self.after, stored, computed_in)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs before, outputs after, and the bound, each (N, C_out, *output_size)."""
        expected, found = run_chain(self.before, x), run_chain(self.after, x)
        return expected, found, self.bound.of(x, expected)


class _Bound:
    """The derived bound, elementwise; see the module's docstring."""

    def __init__(
        self, before: Sequence[Conv], after: Sequence[Conv], stored: torch.dtype, computed_in: torch.dtype
    ) -> None:
        self.before = [_absolute(conv) for conv in before]
        self.after = [_absolute(conv) for conv in after]
        depth = max(_depth(before), _depth(after))
        info = torch.finfo(stored)
        self.gamma = _gamma(depth, U64)
        # Half an ulp; storing in float64 what was computed in float64 rounds no more than the computation did.
        self.rounding = math.expm1(len(after) * math.log1p(info.eps / 2))
        self.computing = _gamma(depth, torch.finfo(computed_in).eps / 2)
        self.underflow = info.smallest_normal * info.eps / 2
        self.ones = [Conv(torch.ones_like(conv.weight), _ones(conv), conv.geometry) for conv in after]

    def of(self, x: Tensor, expected: Tensor) -> Tensor:
        """(N, C_out, *output_size) the most that rounding can do to each output."""
        size = x.abs()
        before, after = run_chain(self.before, size), run_chain(self.after, size)
        return self.rounding * after + self.computing * before + self.gamma * (before + after) + self._underflow(size)

    def _underflow(self, x: Tensor) -> Tensor:
        """eta: each layer's stored numbers off by half a subnormal, carried through the layers after it."""
        total: Tensor | None = None
        for ones, absolute in zip(self.ones, self.after, strict=True):
            carried = None if total is None else forward(Conv(absolute.weight, None, absolute.geometry), total)
            fresh = forward(ones, x) * self.underflow
            total = fresh if carried is None else carried + fresh
            x = forward(absolute, x)
        assert total is not None
        return total


class _Tolerance:
    """The bound of those who insist on choosing one."""

    def __init__(self, rtol: float, atol: float) -> None:
        self.rtol, self.atol = rtol, atol

    def of(self, x: Tensor, expected: Tensor) -> Tensor:
        return self.atol + self.rtol * expected.abs()


class _Tallies:
    """The largest ratio in the interior and on the rim, kept while batches come in."""

    def __init__(self, rim: Mask) -> None:
        self.mask = torch.from_numpy(rim)  # output_size
        self.parts = {"interior": _Tally(~self.mask), "rim": _Tally(self.mask)}

    def add(self, expected: Tensor, found: Tensor, bound: Tensor) -> None:
        error = (expected - found).abs()
        ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
        # NaN compares false with everything: it must not slip through as 'not larger'. Infinities cannot be compared.
        comparable = expected.isfinite() & found.isfinite()
        ratio = torch.where(comparable, ratio, torch.full_like(ratio, math.inf))
        for part in self.parts.values():
            part.add(error, ratio, bound, expected)

    def interior(self) -> Region:
        return self.parts["interior"].region()

    def rim(self) -> Region:
        return self.parts["rim"].region()


class _Tally:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.elements = 0
        self.ratio = self.error = self.bound = self.largest = self.output = 0.0
        self.where: tuple[int, ...] | None = None
        self.differs = torch.zeros_like(mask)

    def add(self, error: Tensor, ratio: Tensor, bound: Tensor, expected: Tensor) -> None:
        positions = int(self.mask.sum())
        if not positions:
            return
        self.elements += error.shape[0] * error.shape[1] * positions
        inside = torch.where(self.mask, ratio, torch.full_like(ratio, -1.0))
        flat = int(inside.argmax())
        if self.where is None or float(inside.reshape(-1)[flat]) > self.ratio:
            self.where = tuple(int(i) for i in np.unravel_index(flat, tuple(error.shape)))[1:]
            self.ratio = float(inside.reshape(-1)[flat])
            self.error, self.bound = float(error.reshape(-1)[flat]), float(bound.reshape(-1)[flat])
        nothing = torch.zeros_like(error)
        worst = torch.where(self.mask, error.nan_to_num(nan=math.inf), nothing).max()
        self.largest = max(self.largest, float(worst))
        self.output = max(self.output, float(torch.where(self.mask, expected.abs().nan_to_num(), nothing).max()))
        self.differs |= (inside > 1).flatten(0, 1).any(0)

    def region(self) -> Region:
        return Region(
            elements=self.elements,
            ratio=self.ratio,
            error=self.error,
            bound=self.bound,
            where=self.where,
            largest_error=self.largest,
            relative_error=self.largest / self.output if self.output else (0.0 if not self.largest else math.inf),
            differing=int(self.differs.sum()),
            positions=int(self.mask.sum()),
        )


def _input_size(
    before: Sequence[Conv], after: Sequence[Conv], input_size: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    channels, axes = before[0].in_channels, before[0].spatial_axes
    if after[0].in_channels != channels:
        raise UsageError(f"the inputs differ: {channels} channels before, {after[0].in_channels} after")
    if after[0].spatial_axes != axes:
        raise UsageError(f"the inputs differ: {axes} spatial axes before, {after[0].spatial_axes} after")
    return channels, split_input_size(input_size, channels, axes)


def split_input_size(input_size: Sequence[int], channels: int, axes: int) -> tuple[int, ...]:
    """The spatial part of an input size given with or without the channels in front.

    Raises:
        UsageError: a wrong number of sizes, or other channels than the layer takes.
    """
    if len(input_size) == axes:
        return tuple(input_size)
    if len(input_size) == axes + 1:
        if input_size[0] != channels:
            raise UsageError(
                f"input size {format_sizes(input_size)}: the layer takes {channels} channels, not {input_size[0]}"
            )
        return tuple(input_size[1:])
    raise UsageError(
        f"input size {format_sizes(input_size)}: expected {axes} spatial sizes, with or without the {channels}"
        " channels in front"
    )


def _output_size(chain: Sequence[Conv], size: tuple[int, ...]) -> tuple[int, ...]:
    for conv in chain:
        size = conv.output_size(size)
    return size


def _rim_mask(before: Sequence[Conv], size: tuple[int, ...], output_size: tuple[int, ...]) -> Mask:
    """Where one layer for the whole chain would differ; nothing where there is no such layer or no difference."""
    try:
        fused = reduce(compose_geometry, (conv.geometry for conv in before))
        return border_at(before, fused, size).differs()
    except ConvtoolError:
        return np.zeros(output_size, dtype=bool)


def _linear(conv: Conv) -> Conv:
    return Conv(conv.weight, None, conv.geometry)


def _work(chain: Sequence[Conv], size: tuple[int, ...]) -> int:
    """Multiply-adds of one input."""
    total = 0
    for conv in chain:
        size = conv.output_size(size)
        total += conv.weight.numel() * math.prod(size)
    return total


def _absolute(conv: Conv) -> Conv:
    return Conv(conv.weight.abs(), None if conv.bias is None else conv.bias.abs(), conv.geometry)


def _ones(conv: Conv) -> Tensor | None:
    return None if conv.bias is None else torch.ones_like(conv.bias)


def _depth(chain: Sequence[Conv]) -> int:
    """Longest accumulation through the chain: per layer, products and the bias, and what lowering it took."""
    return sum(conv.weight[0].numel() + 1 + BATCH_NORM_STEPS for conv in chain)


def _gamma(n: int, u: float) -> float:
    if n * u >= 1:
        raise UsageError(f"sums of {n} terms in that precision have no error bound; compute in a higher precision")
    return n * u / (1 - n * u)


def _inputs(
    channels: int, size: tuple[int, ...], trials: int, seed: int, exhaustive: bool, outputs: int, most: int
) -> Iterator[tuple[str, Tensor]]:
    """Batches of inputs (N, C, *size) in float64, each with the name of its kind."""
    shape = (channels, *size)
    elements = math.prod(shape)
    batch = max(1, BATCH_ELEMENTS // max(elements, outputs))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, trials, batch):
        count = min(batch, trials - start)
        scales = torch.tensor([2.0 ** _SCALES[(start + i) % len(_SCALES)] for i in range(count)], dtype=torch.float64)
        normal = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        yield "normal", normal * scales.reshape(-1, *(1,) * len(shape))
    yield "zero", torch.zeros(1, *shape, dtype=torch.float64)
    yield "constant", torch.ones(1, *shape, dtype=torch.float64)
    kind = "basis" if exhaustive else "impulse"
    places = range(elements) if exhaustive else sorted(_impulse_places(channels, size, most))
    for start in range(0, len(places), batch):
        chosen = torch.tensor(places[start : start + batch])
        vectors = torch.zeros(len(chosen), elements, dtype=torch.float64)
        vectors[torch.arange(len(chosen)), chosen] = 1.0
        yield kind, vectors.reshape(-1, *shape)


_SCALES = (0, 3, -3, 10, -10)
MOST_IMPULSES = 4096
LEAST_IMPULSES = 64
WORK = 10_000_000_000  # multiply-adds that the impulses may cost: seconds


def _impulse_places(channels: int, size: tuple[int, ...], most: int) -> set[int]:
    """Flat indices of impulses: corners, edges' middles and centre, next to each, in every channel while they fit."""
    coordinates = [sorted({0, 1, n // 2, n // 2 + 1, n - 2, n - 1} & set(range(n))) for n in size]
    points = list(itertools.product(*coordinates))
    spatial = math.prod(size)
    flat = [int(np.ravel_multi_index(point, size)) if size else 0 for point in points]
    if channels * len(flat) <= most:
        return {channel * spatial + place for channel in range(channels) for place in flat}
    # Too many for all pairs: walk through channels and points side by side, so that each comes up as early as it can.
    steps = ((i % channels, flat[(i + i // math.lcm(channels, len(flat))) % len(flat)]) for i in range(most))
    return {channel * spatial + place for channel, place in steps}


def default_sizes(chain: Sequence[Conv]) -> list[tuple[int, ...]]:
    """Input sizes at which a chain shows its border on every side and an interior, one per remainder of its stride.

    The first is the smallest comfortable one; the axes differ, so that height and width cannot be mixed up; at most
    four sizes.
    """
    axes = chain[0].spatial_axes
    if axes == 0:
        return [()]
    reach, stride = [1] * axes, [1] * axes
    for conv in chain:
        for number, axis in enumerate(conv.geometry.axes):
            inner = axis.reach if not axis.transposed else math.ceil(axis.reach / axis.stride)
            reach[number] += stride[number] * (inner + axis.before + axis.after)
            stride[number] *= 1 if axis.transposed else axis.stride
    smallest = [r + 2 * s + number for number, (r, s) in enumerate(zip(reach, stride, strict=True))]
    return [tuple(n + step for n in smallest) for step in range(min(4, max(stride)))]
