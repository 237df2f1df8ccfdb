"""What stands for what in a file that another program fused: read off a recipe or a plan, and off what is gone.

Other programs fold a batch norm into the layer before it, in that layer's place, and leave the rest alone. So what a
recipe or a plan has as one fusion may be several of theirs, or none: the layers that AFTER still has tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convtool.checkpoint import Checkpoint
from convtool.core.tree import BASE, Chain, LayerRef, Tree, leaves, tree_text
from convtool.errors import UsageError
from convtool.fusing.compare import Pairing, same_numbers, standing
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree
from convtool.fusing.recipe import PlannedFusion
from convtool.fusing.settle import settle
from convtool.kinds.stated import FieldSources


def claimed_pairings(
    checkpoints: Mapping[str, Checkpoint],
    after: Checkpoint,
    fusions: Sequence[PlannedFusion],
    sources: FieldSources,
    origin: str,
    *,
    skip: bool = False,
) -> list[Pairing]:
    """Return a pairing for each part of each fusion that AFTER has otherwise than BEFORE.

    Args:
        checkpoints: BEFORE and others, by the source that layers name.
        sources: fields of BEFORE's layers.
        origin: who says so, for messages.
        skip: leave out what AFTER has no layer for, or one of another shape.

    Raises:
        UsageError: AFTER lacks the layer that is to stand for others; fields or channels that don't fit.
    """
    found: list[tuple[Tree[LoweredLayer], list[str]]] = []
    for fusion in fusions:
        try:
            for tree, stands in _parts(fusion, checkpoints[BASE], after, origin):
                found.append((lower_tree(checkpoints, tree, sources, fusion.input_size), stands))
        except UsageError:
            if not skip:
                raise
    settled = settle([before for before, _ in found], checkpoints, sources.assume)
    pairings = []
    for before, (_, stands) in zip(settled, found, strict=True):
        try:
            pairings.append(Pairing(",".join(stands), before, standing(stands, before, after, FieldSources())))
        except UsageError:
            if not skip:
                raise
    return pairings


def not_named(fusions: Sequence[PlannedFusion], named: Sequence[Pairing]) -> list[PlannedFusion]:
    """Return the fusions of layers that no pairing by name is about."""
    taken = {leaf.layer.name for pairing in named for leaf in leaves(pairing.before) if leaf.own}
    return [one for one in fusions if taken.isdisjoint(ref.name for ref in leaves(one.tree) if ref.source == BASE)]


def _parts(
    fusion: PlannedFusion, before: Checkpoint, after: Checkpoint, origin: str
) -> list[tuple[Tree[LayerRef], list[str]]]:
    """Return the parts of a fusion that were carried out, each with the layers of AFTER that stand for it."""
    own = [ref for ref in leaves(fusion.tree) if ref.source == BASE and not ref.written]
    others = any(ref.source != BASE for ref in leaves(fusion.tree))
    if not others and all(_is_same(ref, before, after) for ref in own):
        return []  # it wasn't carried out
    kept = [ref.name for ref in own if ref.name in after.layers]
    refs = [part for part in getattr(fusion.tree, "parts", ()) if isinstance(part, LayerRef)]
    plain = isinstance(fusion.tree, Chain) and len(refs) == len(fusion.tree.parts)
    if not plain or not kept:
        name = fusion.name or own[0].name
        if name not in after.layers:
            raise UsageError(
                f"{after.path}: has no layer {name!r}, which by {origin} stands for {tree_text(fusion.tree)}; name what"
                " stands for it: --before a,b --after c"
            )
        return [(fusion.tree, [name])]
    pieces: list[list[LayerRef]] = [[]]
    for ref in refs:
        if ref.name in kept and any(one.name in kept for one in pieces[-1]):
            pieces.append([])
        pieces[-1].append(ref)
    changed = [piece for piece in pieces if not all(_is_same(ref, before, after) for ref in piece)]
    if any(len(piece) == 1 for piece in changed):  # then it isn't each by itself that is the same
        return [(fusion.tree, kept)]
    return [(Chain(tuple(piece)), [ref.name for ref in piece if ref.name in kept]) for piece in changed]


def _is_same(ref: LayerRef, before: Checkpoint, after: Checkpoint) -> bool:
    """Tell whether AFTER has a layer just as BEFORE has it."""
    names = list(before.part(ref.name).tensor_names()) if ref.source == BASE else []
    return all(name in after.infos and same_numbers(before, after, name) for name in names)
