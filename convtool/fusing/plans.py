"""Fusions planned together: carried out as values, and what is worth saying of them before they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import full_name
from convtool.core.names import grouped, some_of
from convtool.core.tree import BASE, LayerRef, Tree, leaves, tree_text
from convtool.fusing.fusion import PlannedLayer, check_whole, plan_layer
from convtool.fusing.leaf import LoweredLayer, said_of
from convtool.fusing.lowering import lower_tree
from convtool.fusing.recipe import PlannedFusion
from convtool.fusing.settle import settle
from convtool.kinds.stated import FieldSources


def plan_all(
    checkpoints: Mapping[str, Checkpoint],
    fusions: Sequence[PlannedFusion],
    sources: FieldSources,
    remark: Callable[[str], None],
    note: Callable[[str], None],
    *,
    input_size: tuple[int, ...] | None,
    surveyed: bool,
    **how: Any,
) -> tuple[list[PlannedLayer], list[str]]:
    """Return every fusion as a value, before anything is written; and what is left alone, in words.

    Args:
        checkpoints: by the source that layers name.
        remark: is called with what is worth saying.
        note: is called with what was assumed, and what is left undone.
        input_size: of those fusions that haven't one of their own.
        surveyed: the whole checkpoint was looked through, so that what stays is worth saying.
        how: allow_border, bias_map and dtype, as of `plan_layer`.

    Raises:
        RefusedError, UsageError, InputError: as of `lower_tree` and `plan_layer`.
    """
    sizes = [one.input_size or input_size for one in fusions]
    trees = [lower_tree(checkpoints, one.tree, sources, size) for one, size in zip(fusions, sizes, strict=True)]
    border = bool(how.get("allow_border"))
    trees = settle(trees, checkpoints, sources.assume, sizes=sizes, border=border)
    _tell(trees, remark, note)
    alone = _left_alone(checkpoints, [one.tree for one in fusions]) if surveyed else []
    for text in alone:
        note(f"left alone: {text}")
    planned = [
        plan_layer(checkpoints[BASE], one.name, tree, input_size=size, **how)
        for one, tree, size in zip(fusions, trees, sizes, strict=True)
    ]
    check_whole(checkpoints[BASE], planned)
    for text in _dearer(planned, input_size):
        remark(f"slower: {text}")
    return planned, alone


def _tell(trees: Iterable[Tree[LoweredLayer]], remark: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Say where the layers' fields are from, and what they look like that may be meant otherwise."""
    found = [leaf for tree in trees for leaf in leaves(tree)]
    for text in said_of(found):
        note(text)
    doubts = ((leaf.name, leaf.layer.kind.doubt(leaf.layer, leaf.conv)) for leaf in found)
    for line in grouped((name, doubt) for name, doubt in doubts if doubt):
        remark(line)


def _left_alone(checkpoints: Mapping[str, Checkpoint], trees: Sequence[Tree[LayerRef]]) -> list[str]:
    """What a recipe might have been expected to take and didn't: batch norms, and layers of the other checkpoints."""
    used = {(ref.source, ref.name) for tree in trees for ref in leaves(tree)}
    lines = []
    for source, opened in checkpoints.items():
        names = [
            full_name(layer.name, source)
            for layer in opened.layers.values()
            if (layer.kind.spare or source != BASE) and (source, layer.name) not in used
        ]
        one, many = ("batch norm", "batch norms") if source == BASE else (f"layer of {source}", f"layers of {source}")
        if names:
            lines.append(f"{len(names)} {one if len(names) == 1 else many}: {some_of(names)}")
    return lines


def _dearer(planned: Iterable[PlannedLayer], size: tuple[int, ...] | None) -> Iterator[str]:
    """Yield the fusions that take more multiply-adds than their layers apart, and how many times as many.

    Args:
        size: of the input, with or without the channels, for those that are exact at every size; None: large inputs.
    """
    for layer in planned:
        before, after, _ = layer.multiply_adds(layer.fusion.verdict.input_size or size) or (0, 0, "")
        if after > before:
            times = f"{after / before:.3g} times the multiply-adds" if before else "multiply-adds, and apart none"
            yield f"{tree_text(layer.tree, lambda leaf: leaf.name)}: fused it takes {times}"
