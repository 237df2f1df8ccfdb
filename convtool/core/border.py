"""Where one layer in place of several is exact, and where not.

Padding on any layer but the first hides what the layers before it would compute outside of their border, and their
biases there; the fused layer has no way to hide them. So the chain's tap tables, composed by indexing, are compared
with the fused layer's own, an axis at a time:

    exact  <=>  both tables agree at every entry, and what each layer makes of the biases before it is the same at every
                position (`convtool.core.carried`)

for generic weights, as far as the tables go: a chain whose weights happen to be zero can be exact where this says it
isn't, never the reverse.

For every input size at once: once an axis is so long that no output reads both of its ends, what happens at its start
is the same for all sizes, and what happens at its end depends only on the size modulo the product of the strides
(s1*...*sn outputs of the layers stand at the same places relative to the end). So all shorter sizes and one full
period of longer ones are a proof for all; they are a few dozen table comparisons.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce

import numpy as np
import numpy.typing as npt

from convtool.core.carried import hidden_biases
from convtool.core.conv import Conv
from convtool.core.geometry import Axis, Geometry, format_sizes
from convtool.core.joint import compose_axis
from convtool.core.taps import PADDED, Table, compose_tables, tap_table
from convtool.errors import RefusedError, UsageError

Mask = npt.NDArray[np.bool_]

# Positions, over all sizes, that a decision for every size may look at: far beyond real layers, and seconds still.
MOST_POSITIONS = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class AxisBorder:
    """One axis at one input size, output row by output row (each mask has one entry per output position).

    Attributes:
        reads, fused_reads: some tap of the chain, or of the fused layer, reads the input.
        misread: a tap of the chain reads where the fused layer's reads something else or nothing.
        fused_misread: the same seen from the fused layer.
        bias_lost: padding hides a bias that the fused layer can't hide.
    """

    reads: Mask
    fused_reads: Mask
    misread: Mask
    fused_misread: Mask
    bias_lost: Mask

    @property
    def differs(self) -> Mask:
        """Rows in which the chain and the fused layer differ, given that the other axes read anything at all."""
        return self.misread | self.fused_misread | self.bias_lost


@dataclass(frozen=True, slots=True, eq=False)
class Border:
    """The comparison at one input size."""

    axes: tuple[AxisBorder, ...]

    def differs(self) -> Mask:
        """Return the mask, of the outputs' shape, of the output positions where chain and fused layer differ."""
        return self.taps_differ() | _outer(np.logical_or, (axis.bias_lost for axis in self.axes))

    def taps_differ(self) -> Mask:
        """Return what the mask would be if no layer had a bias."""
        both, either = partial(_outer, np.logical_and), partial(_outer, np.logical_or)
        chain = both(axis.reads for axis in self.axes) & either(axis.misread for axis in self.axes)
        return chain | both(axis.fused_reads for axis in self.axes) & either(axis.fused_misread for axis in self.axes)

    @property
    def exact(self) -> bool:
        return not self.differs().any()

    @property
    def rims(self) -> tuple[tuple[int, int], ...]:
        """Per axis, how many rows at the start and how many at the end differ."""
        return tuple(_rim(axis.differs) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Say where a fusion is exact: over all input sizes, or at the one asked about.

    Attributes:
        exact: the decision.
        input_size: the one size it was made for, or None for all.
        rim: per axis, rows at the start and at the end that differ; zeros where exact.
        smallest: per axis, the smallest size that both sides run on (all sizes only).
        only_bias: the taps agree everywhere; only a bias is lost at the border.
        multiples: per axis, (period, residues) of the sizes at which it would be exact, where there are any.
        inside: not only the border differs: at no size, or at `input_size`, is there anything that doesn't.
    """

    exact: bool
    input_size: tuple[int, ...] | None
    rim: tuple[tuple[int, int], ...]
    smallest: tuple[int, ...] = ()
    only_bias: bool = False
    multiples: tuple[tuple[int, tuple[int, ...]], ...] = ()
    inside: bool = False

    def describe_rim(self) -> str:
        """'the first row and the last 2 rows along axis 0': what differs, in words."""
        names = _axis_names(len(self.rim))
        parts = []
        for (start, end), name in zip(self.rim, names, strict=True):
            if start:
                parts.append(f"the first {_rows(start, name)}")
            if end:
                parts.append(f"the last {_rows(end, name)}")
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def decide(chain: Sequence[Conv], fused: Geometry, input_size: Sequence[int] | None = None) -> Verdict:
    """Decide whether a layer of geometry `fused` can stand for the chain exactly.

    Args:
        chain: the layers, first to last; of their numbers only what becomes of biases is looked at.
        fused: geometry of their composition.
        input_size: spatial sizes to decide for; every size where None.

    Raises:
        UsageError: the chain cannot run on `input_size`.
        RefusedError: the fused layer cannot, though the chain can.
    """
    if input_size is not None:
        at = border_at(chain, fused, input_size)
        bias_only = not (at.exact or at.taps_differ().any())
        rims = tuple((0, 0) for _ in at.axes) if at.exact else at.rims
        return Verdict(at.exact, tuple(input_size), rims, only_bias=bias_only, inside=bool(at.differs().all()))
    hidden = hidden_biases(chain, None)
    axes = list(zip(zip(*(conv.geometry.axes for conv in chain), strict=True), fused.axes, strict=True))
    verdicts = [_decide_axis(layers, hidden, one) for layers, one in axes]
    inexact = [verdict for verdict in verdicts if not verdict.exact]
    unbiased = (False,) * len(chain)
    return Verdict(
        exact=not inexact,
        input_size=None,
        rim=tuple(itertools.chain.from_iterable(verdict.rim for verdict in verdicts)),
        smallest=tuple(itertools.chain.from_iterable(verdict.smallest for verdict in verdicts)),
        only_bias=bool(inexact) and all(_decide_axis(layers, unbiased, one).exact for layers, one in axes),
        multiples=tuple(itertools.chain.from_iterable(verdict.multiples for verdict in inexact))
        if all(verdict.multiples for verdict in inexact)
        else (),
        inside=any(verdict.inside for verdict in verdicts),
    )


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Combine the verdicts on a sum's branches: exact where all are."""
    axes = range(len(verdicts[0].rim))
    inexact = [verdict for verdict in verdicts if not verdict.exact]
    return Verdict(
        exact=not inexact,
        input_size=verdicts[0].input_size,
        rim=tuple((max(v.rim[a][0] for v in verdicts), max(v.rim[a][1] for v in verdicts)) for a in axes),
        smallest=tuple(max(v.smallest[a] for v in verdicts) for a in axes) if verdicts[0].smallest else (),
        only_bias=bool(inexact) and all(verdict.only_bias for verdict in inexact),
        inside=any(verdict.inside for verdict in inexact),
    )


def border_at(chain: Sequence[Conv], fused: Geometry, input_size: Sequence[int]) -> Border:
    """Compare at one input size, position by position; see `decide`."""
    hidden = hidden_biases(chain, input_size)  # which raises UsageError where the chain cannot run
    try:
        fused.output_size(input_size)
    except UsageError as error:
        raise RefusedError(f"the layers run on this size, but the fused layer would not: {error}") from None
    axes = tuple(
        _compare_axis(tuple(layers), hidden, one, at)
        for layers, one, at in zip(
            zip(*(conv.geometry.axes for conv in chain), strict=True), fused.axes, input_size, strict=True
        )
    )
    return Border(axes)


def _compare_axis(layers: tuple[Axis, ...], hidden: tuple[bool, ...], fused: Axis, size: int) -> AxisBorder:
    composed, offsets, bias_lost = _compose_axis_tables(layers, hidden, size)
    own = tap_table(fused, size)[:, offsets // fused.dilation]  # (O, columns), matched tap by tap
    misses = composed != own
    live, own_live = composed != PADDED, own != PADDED
    return AxisBorder(
        reads=live.any(1),
        fused_reads=own_live.any(1),
        misread=(misses & live).any(1),
        fused_misread=(misses & own_live).any(1),
        bias_lost=bias_lost,
    )


def _compose_axis_tables(
    layers: tuple[Axis, ...], hidden: tuple[bool, ...], size: int
) -> tuple[Table, npt.NDArray[np.int64], Mask]:
    """Return what the chain's taps read: table (O, columns), each column's offset in the fused kernel, lost biases.

    Columns that agree in offset and in every entry are merged, so that the table stays about as wide as the fused
    kernel however long the chain.
    """
    table = tap_table(layers[0], size)
    offsets = np.arange(layers[0].kernel, dtype=np.int64) * layers[0].dilation
    lost: Mask = np.zeros(len(table), dtype=bool)
    prefix, width = layers[0], layers[0].output_size(size)
    for axis, hides in zip(layers[1:], hidden[1:], strict=True):
        second = tap_table(axis, width)  # (O2, k2)
        padded = second == PADDED
        lost = np.any(np.where(padded, hides, lost[second]), axis=1)
        table = compose_tables(table, second).reshape(len(second), -1)
        plan = compose_axis(prefix, axis, "zeros")
        taps = np.arange(axis.kernel, dtype=np.int64) * plan.step2
        offsets = plan.base + np.add.outer(taps, offsets * (plan.step1 // prefix.dilation)).reshape(-1)
        columns = np.vstack([offsets[None], table]).T.copy()
        kept = [*{column.tobytes(): number for number, column in enumerate(columns)}.values()]
        offsets, table = offsets[kept], table[:, kept]
        prefix, width = plan.axis, axis.output_size(width)
    return table, offsets, lost


@lru_cache(maxsize=4096)
def _decide_axis(layers: tuple[Axis, ...], hidden: tuple[bool, ...], fused: Axis) -> Verdict:
    """Return the verdict on one axis over all input sizes; `only_bias` is left open."""
    smallest = (_smallest(layers, fused),)
    if not any(axis.before or axis.after or axis.transposed for axis in layers[1:]):
        return Verdict(True, None, ((0, 0),), smallest)

    def differs(size: int) -> Mask:
        return _compare_axis(layers, hidden, fused, size).differs

    # A transposed layer's output size is linear in its input's, without rounding, so it adds no period.
    period = math.prod(axis.stride for axis in layers if not axis.transposed)
    # Both ends are out of each other's sight once the axis is longer than twice what one output can see, plus what
    # padding (mirrored or wrapped) can bring in, plus a stride for the rounding.
    sight = fused.reach + fused.before + fused.after + period + 1
    if fused.transposed:  # paddings of plain and transposed layers cancel in the fused one, and count by themselves
        sight += sum(axis.reach + axis.before + axis.after for axis in layers)
    long = 2 * sight
    if long * (long + period) > MOST_POSITIONS:
        raise RefusedError(
            f"strides of {period} and a reach of {sight} positions are too large to decide for every input size;"
            " give --input-size, which decides for one"
        )
    steady = {size: differs(size) for size in range(long, long + period)}
    rims = [_rim(mask) for mask in steady.values()]
    rim = ((max(start for start, _ in rims), max(end for _, end in rims)),)
    good = [size for size, mask in steady.items() if not mask.any()]
    if len(good) == period:
        short = (size for size in range(smallest[0], long) if _both_run(layers, fused, size))
        return Verdict(not any(differs(size).any() for size in short), None, rim, smallest)
    # Nothing at an end reaches the middle quarter of an axis of twice that length.
    longest = differs(2 * long)
    inside = bool(longest[len(longest) * 3 // 8 : len(longest) * 5 // 8].any())
    return Verdict(False, None, rim, smallest, multiples=_multiples(good, period), inside=inside)


def _multiples(good: Sequence[int], period: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return the coarsest (divisor, residues) that says which sizes of one period are `good`; () where none is."""
    for divisor in (q for q in range(1, period + 1) if period % q == 0):
        residues = {size % divisor for size in good}
        if good and len(good) * divisor == len(residues) * period:
            return ((divisor, tuple(sorted(residues))),)
    return ()


def _smallest(layers: tuple[Axis, ...], fused: Axis) -> int:
    """Return the smallest size that both the chain and the fused layer run on; running is monotone in the size."""
    high = 1
    while not _both_run(layers, fused, high):
        high *= 2
    return bisect.bisect_left(range(high), True, key=lambda size: _both_run(layers, fused, size))


def _both_run(layers: tuple[Axis, ...], fused: Axis, size: int) -> bool:
    if not fused.runs_on(size):
        return False
    for axis in layers:
        if not axis.runs_on(size):
            return False
        size = axis.output_size(size)
    return True


def _rim(mask: Mask) -> tuple[int, int]:
    """Return the length of the mask's leading part and of its trailing part that hold all its True entries."""
    where = np.flatnonzero(mask)
    if not len(where):
        return 0, 0
    gaps = np.diff(np.concatenate([[-1], where, [len(mask)]]))  # the widest run of False between them is the interior
    widest = int(gaps.argmax())
    start = int(where[widest - 1]) + 1 if widest else 0
    end = len(mask) - int(where[widest]) if widest < len(where) else 0
    return start, end


def _outer(operation: np.ufunc, masks: Iterable[Mask]) -> Mask:
    """Return (size of each mask's axis, ...) the masks of several axes combined at every position."""
    return reduce(operation.outer, masks, np.array(operation.identity))


def _axis_names(axes: int) -> tuple[str, ...]:
    if axes == 2:
        return ("row", "column")
    return tuple(f"position along axis {axis}" if axes > 1 else "position" for axis in range(axes))


def _rows(count: int, name: str) -> str:
    if count == 1:
        return name
    first, _, rest = name.partition(" ")
    return f"{count} {first}s{' ' + rest if rest else ''}"


def describe_sizes(verdict: Verdict) -> str:
    """'sizes divisible by 4': the input sizes at which a fusion would be exact, or '' where there are none."""
    parts = []
    for period, residues in verdict.multiples:
        if residues == (0,):
            parts.append(f"sizes divisible by {period}")
        else:
            parts.append(f"sizes that leave {format_sizes(residues)} when divided by {period}")
    return " and ".join(dict.fromkeys(parts))
