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
from convtool.core.compose import add, compose_chain, compose_geometry
from convtool.core.conv import Conv
from convtool.core.expression import (
    Expression,
    depth,
    in_channels,
    multiply_adds,
    out_channels,
    output_size,
    run,
)
from convtool.core.forward import forward
from convtool.core.geometry import format_sizes
from convtool.core.tree import Chain, Sum, fold, leaves, map_leaves
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
    before: Sequence[Conv] | Expression,
    after: Sequence[Conv] | Expression,
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
        before: layers, first to last, or a tree of chains and sums; their numbers are taken as exact.
        after: the same, with numbers that were rounded to `dtype` once.
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
    before, after = _as_expression(before), _as_expression(after)
    channels, size = _input_size(before, after, input_size)
    shape = (out_channels(before), *output_size(before, size))
    if (found := (out_channels(after), *output_size(after, size))) != shape:
        raise UsageError(f"the outputs differ in shape: {format_sizes(shape)} before, {format_sizes(found)} after")
    stored = next(leaves(after)).weight.dtype if dtype is None else dtype
    tolerance = None if rtol is None and atol is None else _Tolerance(rtol or 0.0, atol or 0.0)
    affine = _Pair(before, after, stored, computed_in, tolerance)
    # Impulses meet the layers without their biases, so that each kernel entry is held against its own rounding and not
    # against that of a large bias; the biases by themselves are what the zero input shows.
    linear = _Pair(map_leaves(_linear, before), map_leaves(_linear, after), stored, computed_in, tolerance)
    tallies = _Tallies(_rim_mask(before, size))
    work = max(1, multiply_adds(before, size) + multiply_adds(after, size))
    most = max(LEAST_IMPULSES, min(MOST_IMPULSES, WORK // work))
    counts: dict[str, int] = {}
    for kind, batch in _inputs(channels, size, trials, seed, exhaustive, math.prod(shape), most):
        counts[kind] = counts.get(kind, 0) + len(batch)
        pair = linear if kind in ("impulse", "basis") else affine
        tallies.add(*pair.run(batch))
    return EquivalenceReport(
        input_size=(channels, *size),
        output_size=shape,
        inputs=counts,
        seed=seed,
        exhaustive=exhaustive,
        interior=tallies.interior(),
        rim=tallies.rim(),
        dtype=str(stored).removeprefix("torch."),
    )


class _Pair:
    """Both sides in float64, with the bound on their difference."""

    def __init__(
        self,
        before: Expression,
        after: Expression,
        stored: torch.dtype,
        computed_in: torch.dtype,
        tolerance: _Tolerance | None,
    ) -> None:
        self.before = map_leaves(Conv.exact, before)
        self.after = map_leaves(Conv.exact, after)
        self.bound = tolerance or _Bound(self.before, self.after, stored, computed_in)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs before, outputs after, and the bound, each (N, C_out, *output_size)."""
        expected, found = run(self.before, x), run(self.after, x)
        return expected, found, self.bound.of(x, expected)


class _Bound:
    """The derived bound, elementwise; see the module's docstring."""

    def __init__(self, before: Expression, after: Expression, stored: torch.dtype, computed_in: torch.dtype) -> None:
        self.before = map_leaves(_absolute, before)
        self.after = map_leaves(_absolute, after)
        terms = max(depth(before, _terms), depth(after, _terms))
        info = torch.finfo(stored)
        self.gamma = _gamma(terms, U64)
        # Half an ulp; storing in float64 what was computed in float64 rounds no more than the computation did.
        self.rounding = math.expm1(depth(after, lambda conv: 1) * math.log1p(info.eps / 2))
        self.computing = _gamma(terms, torch.finfo(computed_in).eps / 2)
        self.underflow = info.smallest_normal * info.eps / 2

    def of(self, x: Tensor, expected: Tensor) -> Tensor:
        """(N, C_out, *output_size) the most that rounding can do to each output."""
        size = x.abs()
        before, (after, lost) = run(self.before, size), self._underflow(self.after, size, torch.zeros_like(size))
        return self.rounding * after + self.computing * before + self.gamma * (before + after) + lost

    def _underflow(self, tree: Expression, x: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
        """The absolute output, and eta: stored numbers off by half a subnormal each, carried through later layers.

        Args:
            x: the absolute input.
            lost: the eta that the input brings along.
        """
        if isinstance(tree, Chain):
            for part in tree.parts:
                x, lost = self._underflow(part, x, lost)
            return x, lost
        if isinstance(tree, Sum):
            parts = [self._underflow(part, x, lost) for part in tree.parts]
            return _total([one for one, _ in parts]), _total([eta for _, eta in parts])
        ones = Conv(torch.ones_like(tree.weight), _ones(tree), tree.geometry)
        return forward(tree, x), forward(_linear(tree), lost) + forward(ones, x) * self.underflow


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


def _as_expression(layers: Sequence[Conv] | Expression) -> Expression:
    return Chain(tuple(layers)) if isinstance(layers, Sequence) else layers


def _input_size(before: Expression, after: Expression, input_size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    channels, axes = in_channels(before), next(leaves(before)).spatial_axes
    if in_channels(after) != channels:
        raise UsageError(f"the inputs differ: {channels} channels before, {in_channels(after)} after")
    if (other := next(leaves(after)).spatial_axes) != axes:
        raise UsageError(f"the inputs differ: {axes} spatial axes before, {other} after")
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


def _rim_mask(before: Expression, size: tuple[int, ...]) -> Mask:
    """Where one layer for the whole tree would differ; nothing where there is no such layer or no difference."""
    nothing = np.zeros(output_size(before, size), dtype=bool)
    if isinstance(before, Conv):
        return nothing
    if isinstance(before, Sum):
        return reduce(np.logical_or, (_rim_mask(part, size) for part in before.parts))
    try:
        # Sums inside of a chain count as the layers that they are; each has been fused exactly where there is a fusion.
        parts = [fold(part, Conv.exact, compose_chain, _add_all) for part in before.parts]
        return border_at(parts, reduce(compose_geometry, (conv.geometry for conv in parts)), size).differs()
    except ConvtoolError:
        return nothing


def _add_all(convs: list[Conv]) -> Conv:
    return reduce(add, convs)


def _total(tensors: list[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _linear(conv: Conv) -> Conv:
    return Conv(conv.weight, None, conv.geometry)


def _absolute(conv: Conv) -> Conv:
    return Conv(conv.weight.abs(), None if conv.bias is None else conv.bias.abs(), conv.geometry)


def _ones(conv: Conv) -> Tensor | None:
    return None if conv.bias is None else torch.ones_like(conv.bias)


def _terms(conv: Conv) -> int:
    """Longest accumulation in a layer: products and the bias, and what lowering it took."""
    return conv.weight[0].numel() + 1 + BATCH_NORM_STEPS


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


def default_sizes(tree: Sequence[Conv] | Expression) -> list[tuple[int, ...]]:
    """Input sizes at which a tree shows its border on every side and an interior, one per remainder of its stride.

    The first is the smallest comfortable one; the axes differ, so that height and width cannot be mixed up; at most
    four sizes.
    """
    tree = _as_expression(tree)
    axes = next(leaves(tree)).spatial_axes
    if axes == 0:
        return [()]
    reach, stride = _reach(tree, axes)
    smallest = [1 + r + 2 * s + number for number, (r, s) in enumerate(zip(reach, stride, strict=True))]
    return [tuple(n + step for n in smallest) for step in range(min(4, max(stride)))]


def _reach(tree: Expression, axes: int) -> tuple[list[int], list[int]]:
    """Per axis, how far one output sees including padding, in input positions at most, and the stride."""
    if isinstance(tree, Sum):
        parts = [_reach(part, axes) for part in tree.parts]
        return [max(reach[a] for reach, _ in parts) for a in range(axes)], parts[0][1]
    if isinstance(tree, Chain):
        reach, stride = [0] * axes, [1] * axes
        for part in tree.parts:
            inner, step = _reach(part, axes)
            reach = [r + s * i for r, s, i in zip(reach, stride, inner, strict=True)]
            stride = [s * t for s, t in zip(stride, step, strict=True)]
        return reach, stride
    return (
        [
            (math.ceil(axis.reach / axis.stride) if axis.transposed else axis.reach) + axis.before + axis.after
            for axis in tree.geometry.axes
        ],
        [1 if axis.transposed else axis.stride for axis in tree.geometry.axes],
    )
