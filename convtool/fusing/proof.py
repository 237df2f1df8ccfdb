"""Lowered layers as they are held against each other, and the check of a fusion before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from convtool.checkpoint import Checkpoint
from convtool.core.bound import Allowance, Stored
from convtool.core.coefficients import compare_numbers
from convtool.core.expression import Expression, joined, output_size
from convtool.core.geometry import format_sizes
from convtool.core.sizes import alike_size, default_sizes
from convtool.core.tree import Tree, map_leaves
from convtool.core.verify import EquivalenceReport, verify
from convtool.errors import ConvtoolError
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer
from convtool.kinds.kind import Tensors

PLAN_TRIALS = 2  # random inputs for each fusion that is checked before it is written
PLAN_SIZES = 2  # and input sizes: one, and one that the stride doesn't divide
PLAN_WORK = 4_000_000_000  # multiply-adds for impulses: about a second


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
        numbers: of the layer, how many were held each against what an impulse gives; 0 where it was run instead.
        input_sizes: that it was run on, the channels in front.
    """

    ratio: float
    numbers: int
    input_sizes: tuple[tuple[int, ...], ...]


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
    sizes = default_sizes(before)[:PLAN_SIZES]
    try:
        numbers = compare_numbers(before, conv, Allowance(before, conv), conv.weight.dtype)
    except ConvtoolError:  # what has no response of that kind is run
        return _run(layer, before, progress)
    for size in sizes:
        if output_size(before, size) != output_size(conv, size):
            raise _wrong(layer, f"gives outputs of another size at input size {format_sizes(size)}")
    if numbers.differing:
        raise _wrong(layer, f"differs from them in {numbers.differing} numbers, error/bound {numbers.ratio:.3g}")
    progress(1)
    return Proof(numbers.ratio, numbers.compared, ())


def _run(layer: PlannedLayer, before: Expression, progress: Callable[[float], None]) -> Proof:
    """Run both sides on impulses and a few more inputs."""
    verdict, conv = layer.fusion.verdict, layer.fusion.conv
    if verdict.input_size is None:
        sizes = default_sizes(before)[:PLAN_SIZES]
    else:
        sizes = [alike_size((before, conv), verdict.input_size)]

    def advance(share: float) -> None:
        progress(share / len(sizes))

    reports = [verify(before, [conv], size, trials=PLAN_TRIALS, work=PLAN_WORK, progress=advance) for size in sizes]
    for report in reports:
        if not (report.equivalent if verdict.exact else _equal_inside(report)):
            what = report.mismatch or f"error/bound {report.ratio:.3g}"
            raise _wrong(layer, f"differs from them at input size {report.input_size}: {what}")
    return Proof(max(one.interior.ratio for one in reports), 0, tuple(one.input_size for one in reports))


def _wrong(layer: PlannedLayer, what: str) -> AssertionError:
    names = ", ".join(source.name for source in layer.record.sources)
    return AssertionError(f"{layer.name!r}, made of {names}, {what}; nothing was written (--no-verify writes it)")


def _equal_inside(report: EquivalenceReport) -> bool:
    return not report.mismatch and (report.interior.equal or not report.interior.positions)
