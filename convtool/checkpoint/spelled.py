"""What a layer that convtool fused stands for, fusions of fused layers spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convtool.checkpoint.record import FusionRecord, SourceLayer
from convtool.core.tree import BASE, Chain, Sum, Tree
from convtool.kinds.written import undoing

Path = tuple[int, ...]  # of a tree's part: which part of it, which part of that, and so on


@dataclass(frozen=True, slots=True)
class Spelled:
    """The layers that a fused layer stands for, fusions of fused layers spelled out.

    Attributes:
        tree: those layers.
        sizes: the parts that were fused for one input size only, with that size, of the part's own input.
        dtypes: in which parts of it were stored before they were fused further, one for each of them.
    """

    tree: Tree[SourceLayer]
    sizes: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    dtypes: tuple[str, ...] = ()


def spelled_out(fusions: Sequence[FusionRecord]) -> dict[str, Spelled]:
    """Return what each layer that the fusions left behind stands for."""
    made: dict[str, Spelled] = {}
    stored: dict[str, str] = {}  # by layer, the dtype that it was fused in
    around: dict[str, tuple[str, str]] = {}  # by layer, what gives input and output the form that its sources have
    for fusion in fusions:
        before = {source.name for source in fusion.sources if source.origin == BASE and source.name in made}
        found = _spell_out(fusion.tree, made, around)
        own: tuple[tuple[Path, tuple[int, ...]], ...] = (((), fusion.input_size),) if fusion.input_size else ()
        dtypes = found.dtypes + tuple(stored[name] for name in sorted(before))
        made[fusion.name] = Spelled(found.tree, own + found.sizes, dtypes)
        stored[fusion.name] = fusion.dtype
        around[fusion.name] = (fusion.before, fusion.after)  # of the layer as it is now
    return made


def _spell_out(tree: Tree[SourceLayer], made: dict[str, Spelled], around: dict[str, tuple[str, str]]) -> Spelled:
    if isinstance(tree, Chain):
        # What stands around a fused layer only for the form of its tensors isn't there around its sources; and where it
        # doesn't stand there, what undoes it has to, around them.
        parts: list[Tree[SourceLayer]] = []
        awaited = ""
        for part in tree.parts:
            if awaited and _name(part) == awaited:
                awaited = ""
                continue
            parts += [_undoing(awaited)] if awaited else []
            before, awaited = around.get(_name(part), ("", "")) if _is_base(part, made) else ("", "")
            if before and parts and _name(parts[-1]) == before:
                parts.pop()
            elif before:
                parts.append(_undoing(before))
            parts.append(part)
        parts += [_undoing(awaited)] if awaited else []
        found = [
            _spell_out_leaf(part, made) if isinstance(part, SourceLayer) else _spell_out(part, made, around)
            for part in parts
        ]
        return _together(Chain(tuple(one.tree for one in found)), found)
    if isinstance(tree, Sum):
        found = [_spell_out(part, made, around) for part in tree.parts]
        return _together(Sum(tuple(one.tree for one in found)), found)
    return _spell_out(Chain((tree,)), made, around) if any(around.get(tree.name, ())) else _spell_out_leaf(tree, made)


def _spell_out_leaf(leaf: SourceLayer, made: dict[str, Spelled]) -> Spelled:
    if leaf.origin != BASE or leaf.name not in made:
        return Spelled(leaf)
    spelled = made.pop(leaf.name)
    return replace(spelled, tree=_told(spelled.tree, leaf))


def _told(tree: Tree[SourceLayer], fused: SourceLayer) -> Tree[SourceLayer]:
    """Return the layers that a fused one is made of, with what became known of its geometry later and is theirs too.

    It is where all others of a chain read one position each, and so leave the geometry to one of them.
    """
    if isinstance(tree, Sum):
        return Sum(tuple(_told(part, fused) for part in tree.parts))
    if isinstance(tree, Chain):
        places = [
            part for part in tree.parts if not isinstance(part, SourceLayer) or fused.fields.keys() & part.kind.fields
        ]
        others = [part for part in tree.parts if isinstance(part, SourceLayer) and part not in places]
        if len(places) != 1 or not all(part.kind.tensors or part.kind.neutral for part in others):
            return tree
        return Chain(tuple(_told(part, fused) if part is places[0] else part for part in tree.parts))
    added = {name: value for name, value in fused.fields.items() if name not in tree.fields}
    if not added or not tree.kind.settable.keys() >= added.keys():
        return tree
    assumed = {*tree.assumed, *(name for name in fused.assumed if name in added)}
    return replace(tree, fields={**tree.fields, **added}, assumed=tuple(sorted(assumed)))


def _undoing(text: str) -> SourceLayer:
    layer = undoing(text)
    return SourceLayer(layer.name, layer.kind, {})


def _together(tree: Tree[SourceLayer], parts: Sequence[Spelled]) -> Spelled:
    """Return the tree of these parts."""
    sizes = (((number, *path), size) for number, part in enumerate(parts) for path, size in part.sizes)
    return Spelled(tree, tuple(sizes), tuple(dtype for part in parts for dtype in part.dtypes))


def _is_base(part: Tree[SourceLayer] | None, made: dict[str, Spelled]) -> bool:
    return isinstance(part, SourceLayer) and part.origin == BASE and part.name in made


def _name(part: Tree[SourceLayer] | None) -> str:
    return part.name if isinstance(part, SourceLayer) else ""
