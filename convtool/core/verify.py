"""Whether two chains of layers compute the same, up to the rounding that storing one of them must bring.

Both are run in float64 on inputs that find faults (`convtool.core.inputs`), and every output element is held against a
bound of its own (`convtool.core.bound`). There is no tolerance to choose: a ratio of error to bound of at most 1 is
what rounding alone can do, and more is a difference.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from convtool.core.border import Mask, border_at
from convtool.core.bound import Allowance, Bound, Stored, Tolerance, fused_geometry, sole_layer, stored
from convtool.core.coefficients import Numbers, compare_numbers
from convtool.core.compose import add, compose_chain
from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels, multiply_adds, out_channels, output_size, run
from convtool.core.geometry import Geometry, format_sizes
from convtool.core.inputs import (
    Input,
    apply,
    dense_count,
    dense_inputs,
    impulse_inputs,
    plan_impulses,
    taps_read,
    widest_layer,
)
from convtool.core.joint import compose_geometry
from convtool.core.sizes import split_input_size
from convtool.core.tally import Region, Tallies, check_trials
from convtool.core.taps import PADDED, tap_table
from convtool.core.tree import Chain, Sum, Tree, flat_parts, fold, leaves, map_leaves
from convtool.errors import ConvtoolError, UsageError

WORK = 40_000_000_000  # multiply-adds that may be spent on impulses at one size: some seconds
LARGEST_INPUT = 1 << 27  # numbers of one input in the widest layer: 1 GiB in float64, several times over
STORED_WORK = 200_000_000  # multiply-adds that running the layers once in their own dtype may take


Progress: TypeAlias = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class StoredError:
    """What a user sees who runs both sides in the dtype that the layers are stored in; no part of the verdict.

    Attributes:
        dtype: that one.
        difference: the largest between the two outputs, relative to the largest output.
        before, after: of either side from what float64 gives for BEFORE, likewise: which of the two is nearer.
    """

    dtype: str
    difference: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class EquivalenceReport:
    """The result of `verify` at one input size.

    Attributes:
        input_size, output_size: with the channels in front, of BEFORE.
        mismatch: why the two cannot be compared number by number, such as outputs of different sizes; else ''.
        numbers: AFTER's, each held against the impulse response of BEFORE, where it is one layer that has such; those
            in taps that an output reads. None where impulses were run instead.
        inputs: how many inputs were run, by kind.
        seed: of the random ones.
        exhaustive: every basis vector was run: no input of this size can bring an error beyond the bound.
        met: of how many input channels (of each group) an impulse met every kernel entry by itself, and of how many
            there are.
        taps: of how many taps of AFTER's kernel anything can be said at this size, and of how many there are: what no
            output reads may hold anything. For one layer; (0, 0) for several.
        interior, rim: the comparison apart from and at the border, where a fused layer without the padding of the
            layers in between may differ; `rim` has no elements where the chain has no such border.
        dtype: that AFTER is stored in.
        stored_error: what running both in that dtype gives; None where it would take long or torch can't.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    mismatch: str = ""
    numbers: Numbers | None = None
    inputs: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    exhaustive: bool = False
    met: tuple[int, int] = (0, 0)
    taps: tuple[int, int] = (0, 0)
    interior: Region = field(default_factory=Region)
    rim: Region = field(default_factory=Region)
    dtype: str = "float64"
    stored_error: StoredError | None = None

    @property
    def equivalent(self) -> bool:
        """Equal everywhere, and something was compared."""
        regions = [region for region in (self.interior, self.rim) if region.positions]
        equal = self.numbers is None or self.numbers.equal
        return not self.mismatch and bool(regions) and equal and all(region.equal for region in regions)

    @property
    def complete(self) -> bool:
        """Whether every kernel entry that an input of this size can meet was met by itself."""
        return not self.mismatch and self.met[0] == self.met[1]

    @property
    def ratio(self) -> float:
        """The largest error / bound of all; inf where nothing could be compared."""
        numbers = 0.0 if self.numbers is None else self.numbers.ratio
        return math.inf if self.mismatch else max(self.interior.ratio, self.rim.ratio, numbers)


def verify(
    before: Sequence[Conv] | Expression,
    after: Sequence[Conv] | Expression | Tree[Stored],
    input_size: Sequence[int],
    *,
    trials: int = 8,
    seed: int = 0,
    exhaustive: bool = False,
    dtype: torch.dtype | None = None,
    computed_in: torch.dtype = torch.float64,
    stored_between: Sequence[torch.dtype] = (),
    rtol: float | None = None,
    atol: float | None = None,
    work: int = WORK,
    device: torch.device | str = "cpu",
    progress: Progress = lambda share: None,
) -> EquivalenceReport:
    """Run both chains on the same inputs and hold every output element against the bound of `convtool.core.bound`.

    Args:
        before: layers, first to last, or a tree of chains and sums; their numbers are taken as exact.
        after: the same; what storing can have moved its numbers by follows from their dtype, or is given as `Stored`.
        input_size: spatial sizes of the input, with or without the channels in front.
        trials, seed: how many random inputs: signed normals, scaled by several powers of two; and which.
        exhaustive: run every basis vector (and zero, for the bias): equality for these is equality for all inputs.
        dtype: that `after` is stored in; each tensor's own by default.
        computed_in: the precision in which another program computed `after` before storing it.
        stored_between: dtypes in which parts of `after` were stored before they were fused further, one for each time.
        rtol, atol: instead of the derived bound, |error| <= atol + rtol * |output|, as numpy's allclose.
        work: multiply-adds to spend on impulses at most; `report.met` says how far that went.
        progress: called with the share of the inputs that were run since the last call.

    Raises:
        UsageError: `before` cannot run on that size; a tolerance or a seed that isn't one; nothing to run.
    """
    check_trials(trials, seed, exhaustive)
    sides = _sides(before, after, dtype)
    report = sides.begin(input_size, seed, dtype)
    rules = _Rules(computed_in, tuple(stored_between), rtol, atol, torch.device(device))
    return report if report.mismatch else sides.compare(report, rules, trials, exhaustive, work, progress)


@dataclass(frozen=True, slots=True)
class _Rules:
    """How two sides are compared; see `verify`."""

    computed_in: torch.dtype
    between: tuple[torch.dtype, ...]
    rtol: float | None
    atol: float | None
    device: torch.device

    def bound(self, before: Expression, after: Tree[Stored]) -> Bound | Tolerance:
        """Return what errors are held against."""
        if self.rtol is None and self.atol is None:
            return Bound(before, after, self.computed_in, self.between)
        return Tolerance(self.rtol or 0.0, self.atol or 0.0)


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both sides; `kept` are the layers of `after`."""

    before: Expression
    after: Tree[Stored]
    kept: Expression

    def begin(self, input_size: Sequence[int], seed: int, dtype: torch.dtype | None) -> EquivalenceReport:
        """Return what can be said before anything is run."""
        channels, axes = in_channels(self.before), next(leaves(self.before)).spatial_axes
        if (other := next(leaves(self.kept)).spatial_axes) != axes:
            raise UsageError(f"the inputs differ: {axes} spatial axes before, {other} after")
        size = split_input_size(input_size, channels, axes)
        if not channels or not all(conv.out_channels for conv in leaves(self.before)):
            raise UsageError("a layer without channels computes nothing that could be compared")
        shape = (out_channels(self.before), *output_size(self.before, size))
        if (widest := widest_layer(self.before, size)) > LARGEST_INPUT:
            raise UsageError(
                f"input size {format_sizes(input_size)}: {widest} numbers for one input are too many to run here; what"
                " a fusion does shows at small sizes as well"
            )
        kind = str(dtype or next(leaves(self.kept)).weight.dtype).removeprefix("torch.")
        mismatch = _mismatch(self.kept, channels, size, shape)
        return EquivalenceReport((channels, *size), shape, mismatch, seed=seed, dtype=kind)

    def compare(
        self, report: EquivalenceReport, rules: _Rules, trials: int, exhaustive: bool, work: int, progress: Progress
    ) -> EquivalenceReport:
        """Run the inputs and complete the report."""
        (channels, *spatial), both = report.input_size, (self.before, self.kept)
        size = tuple(spatial)
        numbers = None if exhaustive else self.numbers(rules, size, getattr(torch, report.dtype))
        plan = plan_impulses(both, _geometries(both), channels, size, work, report.seed, exhaustive)
        plan = plan if numbers is None else plan.at_the_border()
        widest = max(widest_layer(tree, size) for tree in both)
        tallies, counts = Tallies(_rim_mask(self.before, size), rules.device), dict[str, int]()
        total = dense_count(trials) + len(plan)
        impulses = (("basis" if exhaustive else "impulse", x) for x in impulse_inputs(plan, size, widest))
        # Impulses meet the layers without their biases, so that each kernel entry is held against its own rounding and
        # not against that of a large bias; the biases by themselves are what the zero input shows.
        runs: tuple[tuple[Iterator[tuple[str, Input]], _Sides], ...] = (
            (dense_inputs(channels, size, trials, report.seed, widest), self),
            (impulses, self.without_biases()),
        )
        # cuDNN may sum by other means than adding products up, which the bound isn't about.
        with torch.backends.cudnn.flags(enabled=False):
            for inputs, sides in runs:
                outputs = sides.outputs(rules)
                for name, x in inputs:
                    counts[name] = counts.get(name, 0) + len(x)
                    tallies.add(name, x, *outputs(x))
                    progress(len(x) / total)
        return replace(
            report,
            numbers=numbers,
            inputs=counts,
            exhaustive=exhaustive,
            met=(len(plan.chosen), plan.channels),
            taps=_taps(self.kept, size),
            interior=tallies.interior.region(),
            rim=tallies.rim.region(),
            stored_error=_stored_error(*both, channels, size, getattr(torch, report.dtype), report.seed),
        )

    def numbers(self, rules: _Rules, size: tuple[int, ...], dtype: torch.dtype) -> Numbers | None:
        """Hold each number of AFTER against BEFORE's impulse response; None where it has none, or isn't one layer."""
        layer = sole_layer(self.kept)
        if layer is None or rules.rtol is not None or rules.atol is not None:
            return None
        tables = (tap_table(axis, n) for axis, n in zip(layer.geometry.axes, size, strict=True))
        read = [np.flatnonzero((table != PADDED).any(axis=0)).tolist() for table in tables]
        allowance = Allowance(self.before, self.kept, rules.computed_in, rules.between)
        try:
            return compare_numbers(self.before, layer, allowance, dtype, read)
        except ConvtoolError:  # no such response, or one of too many numbers: impulses are run instead
            return None

    def without_biases(self) -> _Sides:
        """Return the linear parts of both sides."""
        after = map_leaves(Stored.without_bias, self.after)
        return _Sides(map_leaves(Conv.without_bias, self.before), after, map_leaves(Conv.without_bias, self.kept))

    def outputs(self, rules: _Rules) -> Callable[[Input], tuple[Tensor, Tensor, Tensor]]:
        """Return what gives the outputs before and after, and the bound, each (N, C_out, *output_size).

        They are computed in float64 (complex128, both, where one is complex), on the device.
        """
        convs = (*leaves(self.before), *leaves(self.kept))
        exact = torch.complex128 if any(conv.weight.is_complex() for conv in convs) else torch.float64
        before = map_leaves(lambda conv: conv.to(exact, rules.device), self.before)
        after = map_leaves(lambda leaf: leaf.to(exact, rules.device), self.after)
        kept = map_leaves(lambda leaf: leaf.conv, after)
        bound = rules.bound(before, after)

        def run_both(x: Input) -> tuple[Tensor, Tensor, Tensor]:
            x = x.to(rules.device)
            given = x.to(exact) if isinstance(x, Tensor) else x
            expected, found = apply(before, given), apply(kept, given)
            return expected, found, bound.of(x, expected, found)

        return run_both


def _sides(
    before: Sequence[Conv] | Expression, after: Sequence[Conv] | Expression | Tree[Stored], dtype: torch.dtype | None
) -> _Sides:
    first: Expression = Chain(tuple(before)) if isinstance(before, Sequence) else before
    tree: Tree[Any] = Chain(tuple(after)) if isinstance(after, Sequence) else after
    second = map_leaves(lambda leaf: leaf if isinstance(leaf, Stored) else stored(leaf, dtype), tree)
    return _Sides(first, second, map_leaves(lambda leaf: leaf.conv, second))


def _mismatch(after: Expression, channels: int, size: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Say why AFTER cannot be compared with something of these channels, input size and output shape, or ''."""
    if (found := in_channels(after)) != channels:
        return f"the inputs differ: {channels} channels before, {found} after"
    try:
        there = (out_channels(after), *output_size(after, size))
    except UsageError as error:
        return f"what stands after doesn't run on this input: {error}"
    one, other = ("x".join(map(str, sizes)) for sizes in (shape, there))
    return "" if there == shape else f"the outputs differ: {one} before, {other} after"


def _rim_mask(before: Expression, size: tuple[int, ...]) -> Mask:
    """Return where one layer for the whole tree would differ; nowhere if there is no such layer."""
    nothing = np.zeros(output_size(before, size), dtype=bool)
    if isinstance(before, Conv) or not size:  # without spatial axes there is no border
        return nothing
    if isinstance(before, Sum):
        return reduce(np.logical_or, (_rim_mask(part, size) for part in before.parts))
    layers = list(flat_parts(before))
    if len(layers) == 1:
        return _rim_mask(layers[0], size)
    try:
        # Sums inside of a chain count as the layers that they are; each has been fused exactly where there is a fusion.
        parts = [fold(part, Conv.exact, compose_chain, lambda convs: reduce(add, convs)) for part in layers]
        return border_at(parts, reduce(compose_geometry, (conv.geometry for conv in parts)), size).differs()
    except ConvtoolError:
        return nothing


def _taps(after: Expression, size: tuple[int, ...]) -> tuple[int, int]:
    layer = sole_layer(after)
    return (0, 0) if layer is None else taps_read(layer.geometry, size)


def _geometries(trees: Sequence[Expression]) -> list[Geometry]:
    """Return the geometry of the one layer that stands for each tree, where there is one."""
    found = []
    for tree in trees:
        with contextlib.suppress(ConvtoolError):
            found.append(fused_geometry(tree))
    return found


def _stored_error(
    before: Expression, after: Expression, channels: int, size: tuple[int, ...], dtype: torch.dtype, seed: int
) -> StoredError | None:
    """Run both sides in the dtype that they are stored in, on one normal input."""
    if multiply_adds(before, size) + multiply_adds(after, size) > STORED_WORK or dtype.itemsize < 2:
        return None
    convs = (*leaves(before), *leaves(after))
    if not dtype.is_complex and any(conv.weight.is_complex() for conv in convs):
        return None
    exact = torch.complex128 if dtype.is_complex else torch.float64
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    try:
        truth = run(before, x.to(exact))
        one, other = (run(tree, x).to(exact) for tree in (before, after))
    except RuntimeError:  # torch has no such layer in that dtype
        return None
    largest = float(truth.abs().max())

    def relative(a: Tensor, b: Tensor) -> float:
        error = float((a - b).abs().max())
        return error / largest if largest else (0.0 if error == 0 else math.inf)

    name = str(dtype).removeprefix("torch.")
    return StoredError(name, relative(one, other), relative(one, truth), relative(other, truth))
