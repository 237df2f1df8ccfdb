"""Layers held against those that they stand for: before a fusion is written, and in files; and what that covers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from convtool.checkpoint import Checkpoint
from convtool.core.bound import Bound
from convtool.core.coefficients import compare_numbers
from convtool.core.expression import (
    Expression,
    alike_size,
    default_sizes,
    in_channels,
    joined,
    output_size,
    split_input_size,
)
from convtool.core.geometry import format_sizes
from convtool.core.names import grouped, is_written, some_of
from convtool.core.stored import Stored, stored
from convtool.core.tree import BASE, Tree, chains, has_sum, leaves, map_leaves
from convtool.core.verify import EquivalenceReport, verify
from convtool.errors import InputError, UsageError, of_bound
from convtool.formats.dtypes import FLOATS
from convtool.fusing.compare import Pairing
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer
from convtool.kinds.kind import Tensors

PLAN_SIZES = 2  # at which outputs have to be as large: one, and one that the stride doesn't divide


def exact_tree(tree: Tree[LoweredLayer], checkpoints: Mapping[str, Checkpoint]) -> Expression:
    """Return the layers of BEFORE, their numbers as they are in the file.

    Args:
        checkpoints: by the origin that the layers name.
    """
    return map_leaves(
        lambda leaf: leaf.layer.kind.parts(leaf.conv, _tensors(leaf, checkpoints), leaf.fields), joined(tree)
    )


def stored_tree(tree: Tree[LoweredLayer], checkpoints: Mapping[str, Checkpoint]) -> Tree[Stored]:
    """Return the layers of AFTER, each number with what rounding it when it was stored can have moved it by."""
    return map_leaves(
        lambda leaf: leaf.layer.kind.stored(leaf.conv, _tensors(leaf, checkpoints), leaf.fields), joined(tree)
    )


def _tensors(leaf: LoweredLayer, checkpoints: Mapping[str, Checkpoint]) -> Tensors:
    return checkpoints[leaf.origin].tensors_of(leaf.layer) if leaf.layer.tensors else {}


@dataclass(frozen=True, slots=True)
class Proof:
    """How a planned layer did against the layers that it stands for.

    Attributes:
        ratio: the largest error by its bound.
        numbers: of the layer, how many were held each against what its layers give.
    """

    ratio: float
    numbers: int


def check_planned(
    layer: PlannedLayer,
    checkpoints: Mapping[str, Checkpoint],
    progress: Callable[[float], None] = lambda share: None,
) -> Proof:
    """Hold a planned layer, as it will be in the file, against the layers that it stands for.

    Args:
        checkpoints: by the origin that the layers name.
        progress: called with the share of the work done since the last call.

    Raises:
        AssertionError: it differs, and not only where it was said to: a mistake in convtool.
    """
    before, conv = exact_tree(layer.tree, checkpoints), layer.fusion.conv
    fixed, kept = layer.fusion.verdict.input_size, stored(conv)
    for size in default_sizes(before)[:PLAN_SIZES] if fixed is None else (fixed,):
        if output_size(before, size) != output_size(conv, size):
            raise _wrong(layer, f"gives outputs of another size at input size {format_sizes(size)}")
    numbers = compare_numbers(before, kept, Bound(before, kept), fixed)
    if numbers.differing:
        worst = of_bound(numbers.ratio)
        raise _wrong(layer, f"differs from them in {numbers.differing} numbers, the largest error {worst}")
    progress(1)
    return Proof(numbers.ratio, numbers.elements)


def _wrong(layer: PlannedLayer, what: str) -> AssertionError:
    names = ", ".join(source.name for source in layer.record.sources)
    return AssertionError(f"{layer.name!r}, made of {names}, {what}; nothing was written (--no-verify writes it)")


@dataclass(frozen=True, slots=True)
class Trial:
    """A pairing at one input size.

    Attributes:
        before, after: the layers' numbers; those of AFTER with what storing them can have moved them by.
        size: spatial sizes of the input.
    """

    pairing: Pairing
    before: Expression
    after: Tree[Stored]
    size: tuple[int, ...]

    def run(self, **options: Any) -> EquivalenceReport:
        """Return what `convtool.core.verify.verify` finds; `options` are its own."""
        between = [_dtype(name, self.pairing) for name in self.pairing.dtypes]
        return verify(self.before, self.after, self.size, stored_between=between, **options)


@dataclass(frozen=True, slots=True)
class Explained:
    """What differs by no more than computing in a lower precision than float64 explains.

    Attributes:
        said: a line for each precision.
        dtype: the lowest of them; '' where nothing differs so.
        all: nothing differs by more.
    """

    said: tuple[str, ...] = ()
    dtype: str = ""
    all: bool = False


def explanations(trials: Iterable[tuple[Trial, EquivalenceReport]], options: dict[str, Any]) -> Explained:
    """Say in which precision AFTER may have been computed, where it differs by no more than that explains.

    Args:
        options: as of `Trial.run`; the precision in them is replaced.
    """
    found: dict[str, list[tuple[str, float, float]]] = {}
    differing = [(trial, report) for trial, report in trials if not report.equivalent]
    for trial, report in differing:
        # What is stored in a dtype may have been computed in these, the higher first.
        lower = ("float32", *({"float16", "bfloat16"} & {report.dtype}))
        for dtype in () if report.mismatch else lower:
            with contextlib.suppress(UsageError):  # sums so long that it bounds nothing
                again = trial.run(**{**options, "computed_in": getattr(torch, dtype)})
                if again.equivalent:
                    found.setdefault(dtype, []).append((trial.pairing.name, report.ratio, again.ratio))
                    break
    said = tuple(
        f"{some_of(list(dict.fromkeys(name for name, _, _ in each)))}: an error of up to"
        f" {of_bound(max(ratio for _, ratio, _ in each))} is beyond what storing can do; with --computed-in {dtype} it"
        f" is up to {of_bound(max(ratio for _, _, ratio in each))}, which passes"
        for dtype, each in found.items()
    )
    lowest = max(found, key=lambda dtype: torch.finfo(getattr(torch, dtype)).eps, default="")
    return Explained(said, lowest, len(differing) == sum(map(len, found.values())))


def _dtype(name: str, pairing: Pairing) -> torch.dtype:
    """Return what a record says that a layer was stored in."""
    if name not in FLOATS | {"complex64", "complex128"}:
        raise InputError(
            f"{pairing.path}: its convtool record is damaged: a part of {pairing.name} was stored in {name!r}"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def trials(
    pairing: Pairing, before: Mapping[str, Checkpoint], after: Checkpoint, sizes: Sequence[tuple[int, ...]]
) -> Iterator[Trial]:
    """Yield a pairing at each size; where none is given, at the one that it was fused for or those that show most.

    Args:
        before: by the origin that the layers name.
        sizes: of the input, with or without the channels in front.

    Raises:
        UsageError: a size doesn't fit the layers.
        InputError: they were fused for sizes that don't go together.
    """
    chain = exact_tree(pairing.before, before)
    fused = stored_tree(pairing.after, {BASE: after})
    axes = next(leaves(chain)).spatial_axes
    chosen = [split_input_size(size, in_channels(chain), axes) for size in sizes]
    if not chosen:
        fixed = pairing.input_size()
        kept = map_leaves(lambda leaf: leaf.conv, fused)
        chosen = default_sizes(chain, kept) if fixed is None else [alike_size((chain, kept), fixed)]
    for size in chosen:
        yield Trial(pairing, chain, fused, size)


Results = Sequence[tuple[Pairing, EquivalenceReport]]


def assumed(pairings: Sequence[Pairing]) -> tuple[str, ...]:
    """Return what the layers rest on that nobody stated."""
    layers = [leaf for pairing in pairings for leaf in leaves(pairing.before)]
    # A recorded layer rests on what is said of those that it is made of.
    layers += [leaf for pairing in pairings if not pairing.path for leaf in leaves(pairing.after)]
    return tuple(grouped(one for leaf in layers for one in leaf.assumptions()))


def statement(results: Results, exhaustive: bool, sizes: bool, only: bool) -> str:
    """Return what was shown, apart from the verdict.

    Args:
        sizes: input sizes were given.
        only: nothing but the named layers was compared.
    """
    reports = [report for _, report in results]
    run = "every basis vector run: this holds for all inputs of these sizes"
    shown = "" if not reports else run if exhaustive else "each number compared, and random inputs run"
    shown += _unread(reports) + ("" if sizes else _narrowed(results)) + _allowed(results)
    return f"{shown}; of the layers named alone" if only else shown


def _unread(reports: list[EquivalenceReport]) -> str:
    """Return what is said of taps that no output reads at the sizes that were run."""
    taps = [report.taps for report in reports]
    read, of = sum(read for read, _ in taps), sum(of for _, of in taps)
    return "" if read == of else f"; {read} of {of} taps are read at these sizes, and nothing is said of the others"


def _allowed(results: Results) -> str:
    """Return the roundings in between that the record claims, and that the bound makes room for."""
    counts = Counter(dtype for pairing, _ in results for dtype in pairing.dtypes)
    said = [f"{count} to {dtype}" for dtype, count in sorted(counts.items()) if dtype != "float64"]
    return f"; allowing for roundings in between, as AFTER records: {', '.join(said)}" if said else ""


def claims(results: Results, run: bool) -> tuple[tuple[str, str], ...]:
    """Return what AFTER's record says of BEFORE's layers that BEFORE's tensors don't, as (layer, what).

    Args:
        run: the whole network was run, which shows what stands between its layers.
    """
    found = [claim for pairing, _ in results for claim in pairing.claims]
    for pairing in [] if run else [pairing for pairing, _ in results if pairing.path]:
        said, layers = [], list(leaves(pairing.before))
        if any(sum(not is_written(one.name) for one in chain) > 1 for chain in chains(pairing.before)):
            said.append("nothing stands between the layers that follow each other in it")
        if has_sum(pairing.before) and not any(one.layer.kind.adapts for one in layers):
            said.append("its branches read one value")
        found += [(f"the fused {pairing.name}", what) for what in said]
    return tuple(dict.fromkeys(found))


def _narrowed(results: Results) -> str:
    """Return what is said of one input size only, since the record knows of no other."""
    said = {pairing.name: size for pairing, _ in results if (size := pairing.input_size()) is not None}
    if not said:
        return ""
    which = "" if len(said) == len({pairing.name for pairing, _ in results}) else f"{', '.join(said)} "
    at = " or ".join(dict.fromkeys(map(format_sizes, said.values())))
    run = [report.input_size[1:] for pairing, report in results if pairing.name in said]
    smaller = dict.fromkeys(format_sizes(size) for size in run if size not in said.values())
    alike = f", run at {' or '.join(smaller)}, where the borders are the same" if smaller else ""
    return f"; {which}at input size {at} only, as the record says{alike}"


def hints(results: Results, sizes: bool, computed_in: bool) -> list[str]:
    """Return what the record knows of a layer that differs: that it was made for other sizes, or rounded in between.

    Args:
        sizes, computed_in: that these were given.
    """
    lines = []
    for pairing in {id(pairing): pairing for pairing, report in results if not report.equivalent}.values():
        said = " and ".join(dict.fromkeys(format_sizes(size) for _, size in pairing.sizes))
        if sizes and said:
            lines.append(f"{pairing.name}: by the record it was fused for input size {said} only")
        between = sorted(set(pairing.dtypes) - {"float64"})
        if between and not computed_in:
            lines.append(
                f"{pairing.name}: was fused in steps and stored in {' and '.join(between)} in between, for which one"
                " rounding each is allowed, and no underflow: verify each step by itself"
            )
    return lines
