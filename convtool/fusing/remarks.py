"""What is worth saying of fusions before they are written: what was assumed, what stays, what takes more work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from convtool.checkpoint import Checkpoint
from convtool.core.tree import BASE, LayerRef, Tree, leaves
from convtool.fusing.fusion import PlannedLayer, assumptions
from convtool.fusing.lowering import LoweredLayer, full_name

MOST_NAMES = 3  # layers named one by one before the rest is only counted


def assumed(trees: Iterable[Tree[LoweredLayer]]) -> list[str]:
    """What nobody stated, in words; said once where it is the same of many layers."""
    layers: dict[str, list[str]] = {}
    for text in dict.fromkeys(text for tree in trees for text in assumptions(tree)):
        layer, _, what = text.rpartition(": ")
        layers.setdefault(what, []).append(layer)
    return [line for what, names in layers.items() for line in _one_or_many(names, what)]


def _one_or_many(names: list[str], what: str) -> list[str]:
    if len(names) <= MOST_NAMES:
        return [f"{name}: {what}" for name in names]
    return [f"{_some(names)}: {what}"]


def left_alone(checkpoints: Mapping[str, Checkpoint], trees: Sequence[Tree[LayerRef]]) -> list[str]:
    """What a recipe might have been expected to take and didn't: batch norms, and layers of the other checkpoints."""
    used = {(ref.source, ref.name) for tree in trees for ref in leaves(tree)}
    around = {(source, name.rpartition(".")[0]) for source, name in used if source}  # hold an alpha, say
    lines = []
    for source, opened in checkpoints.items():
        names = [
            full_name(layer.name, source)
            for layer in opened.layers.values()
            if (layer.kind.spare or source != BASE) and (source, layer.name) not in used | around
        ]
        one, many = ("batch norm", "batch norms") if source == BASE else (f"layer of {source}", f"layers of {source}")
        if names:
            lines.append(f"{len(names)} {one if len(names) == 1 else many}: {_some(names)}")
    return lines


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def dearer(planned: Iterable[PlannedLayer], size: tuple[int, ...] | None) -> list[tuple[PlannedLayer, str]]:
    """The fusions that take more multiply-adds than their layers apart, and how many times as many.

    Args:
        size: of the input, with or without the channels, for those that are exact at every size; None: large inputs.
    """
    found = []
    for layer in planned:
        before, after = layer.multiply_adds(layer.fusion.verdict.input_size or size)
        if after > before:
            found.append((layer, _times(after, before)))
    return found


def _times(after: float, before: float) -> str:
    return f"{after / before:.3g} times the multiply-adds" if before else "multiply-adds, and apart none"
