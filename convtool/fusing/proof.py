"""Lowered layers as they are held against each other, and the check of a fusion before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from convtool.checkpoint import Checkpoint
from convtool.core.bound import Stored
from convtool.core.expression import Expression, joined
from convtool.core.sizes import alike_size, default_sizes
from convtool.core.tree import Chain, Sum, Tree, fold, map_leaves
from convtool.core.verify import EquivalenceReport, verify
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.lowering import LoweredLayer

PLAN_TRIALS = 2  # random inputs for each fusion that is checked before it is written
PLAN_SIZES = 2  # and input sizes: one, and one that the stride doesn't divide
PLAN_WORK = 4_000_000_000  # multiply-adds for impulses: about a second


def exact_tree(tree: Tree[LoweredLayer], checkpoints: Mapping[str, Checkpoint]) -> Expression:
    """Return the layers of BEFORE, their numbers as they are in the file.

    Args:
        checkpoints: by the origin that the layers name.
    """
    return map_leaves(lambda leaf: leaf.conv, stored_tree(tree, checkpoints))


def stored_tree(tree: Tree[LoweredLayer], checkpoints: Mapping[str, Checkpoint]) -> Tree[Stored]:
    """Return the layers of AFTER, each number with what rounding it when it was stored can have moved it by."""

    def one(leaf: LoweredLayer) -> Tree[Stored]:
        tensors = checkpoints[leaf.origin].tensors_of(leaf.layer) if leaf.layer.tensors else {}
        return leaf.layer.kind.stored(leaf.conv, tensors, leaf.fields)

    def chain(parts: list[Tree[Stored]]) -> Tree[Stored]:
        return Chain(tuple(parts))

    def total(parts: list[Tree[Stored]]) -> Tree[Stored]:
        return Sum(tuple(parts))

    return fold(joined(tree), one, chain, total)


def check_planned(
    layer: PlannedLayer,
    checkpoints: Mapping[str, Checkpoint],
    progress: Callable[[float], None] = lambda share: None,
) -> list[EquivalenceReport]:
    """Run a planned layer, as it will be in the file, against the layers that it stands for.

    Args:
        checkpoints: by the origin that the layers name.
        progress: called with the share of the work done since the last call.

    Returns:
        A report for each input size that it was run on.

    Raises:
        AssertionError: it differs, and not only where it was said to: a mistake in convtool.
    """
    before, verdict = exact_tree(layer.tree, checkpoints), layer.fusion.verdict
    if verdict.input_size is None:
        sizes = default_sizes(before)[:PLAN_SIZES]
    else:
        sizes = [alike_size((before, layer.fusion.conv), verdict.input_size)]

    def advance(share: float) -> None:
        progress(share / len(sizes))

    reports = [
        verify(before, [layer.fusion.conv], size, trials=PLAN_TRIALS, work=PLAN_WORK, progress=advance)
        for size in sizes
    ]
    for report in reports:
        if not (report.equivalent if verdict.exact else _equal_inside(report)):
            names = ", ".join(source.name for source in layer.record.sources)
            raise AssertionError(
                f"{layer.name!r}, made of {names}, differs from them at input size {report.input_size}:"
                f" {report.mismatch or f'error/bound {report.ratio:.3g}'}; nothing was written (--no-verify writes it)"
            )
    return reports


def _equal_inside(report: EquivalenceReport) -> bool:
    return not report.mismatch and (report.interior.equal or not report.interior.positions)
