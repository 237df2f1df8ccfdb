"""Whether two chains of layers compute the same, up to the rounding that storing one of them must bring.

Their numbers are compared (`convtool.core.coefficients`), which settles it for all inputs of a size. As a second
opinion that owes nothing to tap tables, both are run through torch in float64 (`convtool.core.tally`), and every
output element is held against a bound of its own (`convtool.core.bound`). There is no tolerance to choose: a ratio of
error to bound of at most 1 is what rounding alone can do, and more is a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from convtool.core.border import Mask, border_at
from convtool.core.bound import Bound, Tolerance
from convtool.core.coefficients import compare_numbers
from convtool.core.compose import add, compose_chain
from convtool.core.conv import Conv
from convtool.core.expression import (
    Expression,
    exact_type,
    fused_geometry,
    in_channels,
    multiply_adds,
    out_channels,
    output_size,
    run,
    split_input_size,
    widest_layer,
    with_sizes,
)
from convtool.core.geometry import format_sizes
from convtool.core.joint import compose_geometry
from convtool.core.rounding import dtype_name, exact_dtype
from convtool.core.stored import Stored, stored
from convtool.core.tally import Region, Tally, check_trials, dense_count, dense_inputs
from convtool.core.taps import taps_read
from convtool.core.tree import Chain, Sum, Tree, flat_parts, fold, leaves, map_leaves, sole_layer
from convtool.errors import ConvtoolError, UsageError

LARGEST_INPUT = 1 << 27  # numbers of one input in the widest layer: 1 GiB in float64, several times over
STORED_WORK = 200_000_000  # multiply-adds that running the layers once in their own dtype may take


Progress: TypeAlias = Callable[[float], None]
Bounding: TypeAlias = Callable[[Expression, Tree[Stored]], Bound | Tolerance]


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
        numbers: AFTER's, each held against BEFORE's; those that outputs read the input with.
        inputs: how many inputs were run, by kind.
        seed: of the random ones.
        exhaustive: every basis vector was run as well.
        taps: of how many taps of AFTER's layers anything can be said at this size, and of how many there are: what no
            output reads may hold anything.
        interior, rim: the comparison apart from and at the border, where a fused layer without the padding of the
            layers in between may differ; `rim` has no elements where the chain has no such border.
        dtype: that AFTER is stored in.
        stored_error: what running both in that dtype gives; None where it would take long or torch can't.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    mismatch: str = ""
    numbers: Region = field(default_factory=Region)
    inputs: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    exhaustive: bool = False
    taps: tuple[int, int] = (0, 0)
    interior: Region = field(default_factory=Region)
    rim: Region = field(default_factory=Region)
    dtype: str = "float64"
    stored_error: StoredError | None = None

    @property
    def equivalent(self) -> bool:
        """Equal everywhere, and something was compared."""
        regions = [region for region in (self.interior, self.rim) if region.positions]
        return not self.mismatch and bool(regions) and not self.numbers.differing and all(one.equal for one in regions)

    @property
    def ratio(self) -> float:
        """The largest error / bound of all; inf where nothing could be compared."""
        return math.inf if self.mismatch else max(self.interior.ratio, self.rim.ratio, self.numbers.ratio)


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
    device: torch.device | str = "cpu",
    progress: Progress = lambda share: None,
) -> EquivalenceReport:
    """Hold all numbers of two chains at one input size against each other, and both chains' outputs for some inputs.

    Args:
        before: layers, first to last, or a tree of chains and sums; their numbers are taken as exact.
        after: the same; what storing can have moved its numbers by follows from their dtype, or is given as `Stored`.
        input_size: spatial sizes of the input, with or without the channels in front.
        trials, seed: how many random inputs: signed normals, scaled by several powers of two; and which.
        exhaustive: run every basis vector through torch's convolutions as well.
        dtype: that `after` is stored in; each tensor's own by default.
        computed_in: the precision in which another program computed `after` before storing it.
        stored_between: dtypes in which parts of `after` were stored before they were fused further, one for each time.
        rtol, atol: instead of the derived bound, |error| <= atol + rtol * |output|, as numpy's allclose.
        progress: called with the share of the inputs that were run since the last call.

    Raises:
        UsageError: `before` cannot run on that size; a tolerance or a seed that isn't one; nothing to run.
    """
    check_trials(trials, seed, exhaustive)
    first: Expression = Chain(tuple(before)) if isinstance(before, Sequence) else before
    given: Tree[Any] = Chain(tuple(after)) if isinstance(after, Sequence) else after
    second = map_leaves(lambda leaf: leaf if isinstance(leaf, Stored) else stored(leaf, dtype), given)
    sides = _Sides(first, second, map_leaves(lambda leaf: leaf.conv, second))
    report = sides.begin(input_size, seed, dtype)
    derived = partial(Bound, computed_in=computed_in, between=stored_between)
    bound: Bounding = derived if rtol is None and atol is None else lambda *_: Tolerance(rtol or 0.0, atol or 0.0)
    how = torch.device(device), trials, exhaustive, progress
    return report if report.mismatch else sides.compare(report, bound, *how)


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
        kind = dtype_name(dtype or next(leaves(self.kept)).dtype)
        mismatch = _mismatch(self.kept, channels, size, shape)
        return EquivalenceReport((channels, *size), shape, mismatch, seed=seed, dtype=kind)

    def compare(
        self,
        report: EquivalenceReport,
        bound: Bounding,
        device: torch.device,
        trials: int,
        exhaustive: bool,
        progress: Progress,
    ) -> EquivalenceReport:
        """Run the inputs, compare the numbers and complete the report."""
        (channels, *spatial), both = report.input_size, (self.before, self.kept)
        size = tuple(spatial)
        rim, taps = rim_of(self.before, size), _taps(self.kept, size)
        mask = torch.zeros(report.output_size[1:], dtype=torch.bool) if rim is None else torch.from_numpy(rim)
        interior, border = (Tally(one.to(device)) for one in (~mask, mask))
        counts, total = dict[str, int](), dense_count(channels, size, trials, basis=exhaustive)
        widest, outputs = max(widest_layer(tree, size) for tree in both), self.outputs(bound, device)
        # cuDNN may sum by other means than adding products up, which the bound isn't about.
        with torch.backends.cudnn.flags(enabled=False):
            for name, x in dense_inputs(channels, size, trials, report.seed, widest, basis=exhaustive):
                counts[name] = counts.get(name, 0) + len(x)
                compared = outputs(x)
                interior.add(name, *compared)
                border.add(name, *compared)
                progress(len(x) / total)
        # Where the tables don't say that the border is the same, each kind of output is looked at, unless it is known
        # by now that it isn't.
        alike = rim is not None and taps[0] == taps[1] and self.of_one_geometry()
        everywhere = not alike or bool(mask.any() and border.region().ratio <= 1)
        numbers = compare_numbers(self.before, self.after, bound(self.before, self.after), size, everywhere=everywhere)
        return replace(
            report,
            numbers=numbers,
            inputs=counts,
            exhaustive=exhaustive,
            taps=taps,
            interior=interior.region(),
            rim=border.region(),
            stored_error=_stored_error(*both, channels, size, getattr(torch, report.dtype), report.seed),
        )

    def of_one_geometry(self) -> bool:
        """Return whether AFTER is one layer that reads where the one that stands for BEFORE does."""
        layer = sole_layer(self.kept)
        with suppress(ConvtoolError):  # no layer stands for BEFORE
            if layer is not None:
                return replace(fused_geometry(self.before), groups=layer.geometry.groups) == layer.geometry
        return False

    def outputs(self, bound: Bounding, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Return what gives the outputs before and after, and the bound, each (N, C_out, *output_size).

        They are computed in float64 (complex128, both, where one is complex), on the device.
        """
        exact = torch.promote_types(exact_type(self.before), exact_type(self.kept))
        before = map_leaves(lambda conv: conv.to(exact, device), self.before)
        after = map_leaves(lambda leaf: leaf.to(exact, device), self.after)
        kept = map_leaves(lambda leaf: leaf.conv, after)
        most = bound(before, after)

        def run_both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = x.to(exact).to(device)
            expected, found = run(before, x), run(kept, x)
            return expected, found, most.of(lambda tree: run(tree, x.abs()), expected, found)

        return run_both


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


def rim_of(before: Expression, size: tuple[int, ...]) -> Mask | None:
    """Return where one layer for the whole tree would differ; None where no layer stands for it."""
    if isinstance(before, Conv) or not size:  # without spatial axes there is no border
        return np.zeros(output_size(before, size), dtype=bool)
    layers, at, parts = list(flat_parts(before)) if isinstance(before, Chain) else [], size, list[Conv]()
    if len(layers) == 1:
        return rim_of(layers[0], size)
    if isinstance(before, Sum):
        rims = [rim for part in before.parts if (rim := rim_of(part, size)) is not None]
        return reduce(np.logical_or, rims) if len(rims) == len(before.parts) else None
    with suppress(ConvtoolError):
        for part in layers:
            inner = rim_of(part, at)
            if inner is None or inner.any():  # what a branch got wrong would spread
                return None
            parts.append(fold(part, Conv.exact, compose_chain, lambda convs: reduce(add, convs)))
            at = output_size(part, at)
        return border_at(parts, reduce(compose_geometry, (conv.geometry for conv in parts)), size).differs()
    return None


def _taps(after: Expression, size: tuple[int, ...]) -> tuple[int, int]:
    """Return how many taps of all its layers some output reads the input with, and of how many."""
    read, every = zip(*(taps_read(conv.geometry, at) for conv, at in with_sizes(after, size)), strict=True)
    return sum(read), sum(every)


def _stored_error(
    before: Expression, after: Expression, channels: int, size: tuple[int, ...], dtype: torch.dtype, seed: int
) -> StoredError | None:
    """Run both sides in the dtype that they are stored in, on one normal input."""
    if multiply_adds(before, size) + multiply_adds(after, size) > STORED_WORK or dtype.itemsize < 2:
        return None
    exact = exact_dtype(dtype)
    if torch.promote_types(exact_type(before), exact_type(after)) != exact:
        return None
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

    return StoredError(dtype_name(dtype), relative(one, other), relative(one, truth), relative(other, truth))
