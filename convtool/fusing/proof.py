"""Lowered layers as they are held against each other, and the check of a fusion before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from convtool.checkpoint import Checkpoint
from convtool.core.bound import Bound
from convtool.core.coefficients import compare_numbers
from convtool.core.expression import Expression, joined, output_size
from convtool.core.geometry import format_sizes
from convtool.core.sizes import default_sizes
from convtool.core.stored import Stored, stored
from convtool.core.tree import Tree, map_leaves
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
        raise _wrong(layer, f"differs from them in {numbers.differing} numbers, error/bound {numbers.ratio:.3g}")
    progress(1)
    return Proof(numbers.ratio, numbers.elements)


def _wrong(layer: PlannedLayer, what: str) -> AssertionError:
    names = ", ".join(source.name for source in layer.record.sources)
    return AssertionError(f"{layer.name!r}, made of {names}, {what}; nothing was written (--no-verify writes it)")
