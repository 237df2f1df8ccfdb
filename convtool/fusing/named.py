"""Which layers of a checkpoint are to be fused: as they are named, or as a recipe's patterns find them in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import full_name
from convtool.core.names import some_of, unwrap
from convtool.core.tree import BASE, Chain, LayerRef, leaves
from convtool.errors import ConvtoolError, UsageError
from convtool.fusing.adapters import check_complete
from convtool.fusing.fusion import check_nothing_missed
from convtool.fusing.recipe import Known, Names, NothingFitsError, PlannedFusion, Recipe, resolve
from convtool.fusing.shipped import find_recipe, shipped
from convtool.kinds.stated import FieldSources
from convtool.kinds.written import check_closed

# What a file of adapters calls the networks that it has modules for: 'lora_unet', 'lora_te1', 'unet', 'text_encoder'.
_COMPONENT = re.compile(r"lora_[a-z0-9]+|[^.]+")


def named_chain(layers: Sequence[str], name: str, checkpoints: Mapping[str, Checkpoint]) -> PlannedFusion:
    """Return one chain of layers by name, first to last; SOURCE:LAYER for those of another checkpoint.

    Args:
        name: of the fused layer, written as the checkpoint writes names; '' for that of the first one.
        checkpoints: by what their layers are called after.

    Raises:
        UsageError: a layer without tensors that isn't written to its end.
    """
    for layer in layers:
        if layer not in checkpoints[BASE].layers:
            check_closed(layer)
    refs = tuple(_layer_ref(layer, checkpoints) for layer in layers)
    if name:
        bare = {unwrap(ref.name) for ref in refs if ref.source == BASE}
        near = (layer for layer in checkpoints[BASE].layers if unwrap(layer) in bare)
        name = Names(checkpoints[BASE].layers).write(name, near)
    return PlannedFusion(name, Chain(refs))


def in_order(checkpoint: Checkpoint, model: Sequence[str] | None) -> list[str] | None:
    """Return the layers in the order of the model's code, or of the file where that keeps it; None where neither tells.

    Args:
        model: the layers in the order of the model's code.
    """
    if model is not None:
        return [*model, *(name for name in checkpoint.layers if name not in set(model))]
    return list(checkpoint.layers) if _keeps_order(checkpoint) else None


def against_order(fusion: PlannedFusion, order: Sequence[str] | None) -> list[str]:
    """Return, in words, where a chain runs against the order of the layers, or skips some, if that is known."""
    places = {name: number for number, name in enumerate(order or ())}
    own = [ref.name for ref in leaves(fusion.tree) if ref.source == BASE and ref.name in places]
    where, said = "in the file or the model's code, and so perhaps in its run", []
    for first, second in pairwise(own):
        if places[second] < places[first]:
            said.append(f"{second} comes before {first} {where}: a chain is named first to last")
        elif skipped := [name for name in (order or ())[places[first] + 1 : places[second]] if name not in own]:
            between = f"{some_of(skipped)} come between {first} and {second}"
            said.append(f"{between} {where}: the fused layer leaves them out")
    return said


def by_name(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    fields: FieldSources,
    leave: Sequence[str] = (),
    order: Sequence[str] | None = None,
    *,
    suggest: bool = True,
) -> tuple[list[PlannedFusion], FieldSources]:
    """Return the fusions that a recipe means for these checkpoints, and where fields come from then.

    Args:
        fields: what else is stated of the layers.
        leave: patterns of modules of the other checkpoints that are to be left out.
        order: the layers of the one that is changed in the model's order, where that is known.
        suggest: where the recipe fits nothing, say which of those that ship would.

    Raises:
        UsageError: the recipe doesn't fit the layers.
        RefusedError: it would take layers apart from tensors that say how they are meant, or a part of another
            checkpoint without the rest of that part.
    """
    stated = fields.with_first(recipe.stated(_full_names(checkpoints)))
    layers = {source: opened.layers for source, opened in checkpoints.items()}
    if order is not None:
        layers[BASE] = {name: layers[BASE][name] for name in order}
    try:
        planned = resolve(recipe, Known(layers, stated.fields, ordered=order is not None))
    except NothingFitsError as error:
        paths = " or ".join(str(opened.path) for opened in checkpoints.values())
        fit = fitting(checkpoints, fields) if suggest else []
        others = f"; of the recipes that ship, {in_words(fit)} would fit" if fit else _fused_already(checkpoints)
        raise UsageError(f"{error} of {paths}{others}") from None
    check_nothing_missed(checkpoints, [one.tree for one in planned])
    used = {(ref.source, ref.name) for one in planned for ref in leaves(one.tree) if ref.source != BASE}
    for source, opened in checkpoints.items():
        if source != BASE:
            merged = {name for other, name in used if other == source}
            check_complete(source, opened, merged, leave, lambda name: (_COMPONENT.match(name) or [""])[0])
    return planned, stated


def without_effect(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Patterns of a recipe that state geometry of no layer."""
    layers, stated = _full_names(checkpoints), recipe.geometry
    return [text for text in stated.tables if not any(stated.matches(text, name) for name in layers)]


def _full_names(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    return [full_name(layer, one) for one, opened in checkpoints.items() for layer in opened.layers]


def _layer_ref(text: str, checkpoints: Mapping[str, Checkpoint]) -> LayerRef:
    source, colon, layer = text.partition(":")
    return LayerRef(layer, source) if colon and source in checkpoints and "(" not in source else LayerRef(text)


def _keeps_order(checkpoint: Checkpoint) -> bool:
    """Return whether a file has its tensors in the model's order, and not sorted, as safetensors files have them."""
    weights: dict[str, list[str]] = {}
    for info in checkpoint.infos.values():
        if info.name.endswith("weight"):
            weights.setdefault(info.dtype, []).append(info.name)
    return checkpoint.format.startswith("torch") and any(names != sorted(names) for names in weights.values())


@dataclass(frozen=True, slots=True)
class Fit:
    """What a recipe would fuse.

    Attributes:
        names: of the recipe, and of others that fuse the same and state the same.
        sources: where the fields come from then.
    """

    names: tuple[str, ...]
    fusions: list[PlannedFusion]
    sources: FieldSources


def fitting(checkpoints: Mapping[str, Checkpoint], fields: FieldSources) -> list[Fit]:
    """Return the recipes that fit, but for those of which another does more without stating anything else."""
    fits: list[Fit] = []
    for name, recipe in shipped().items():
        with suppress(ConvtoolError):
            made, sources = by_name(recipe, checkpoints, fields, suggest=False)
            stated = sources.sources[0].tables
            alike = [one for one in fits if (one.sources.sources[0].tables, one.fusions) == (stated, made)]
            fits = [one for one in fits if one not in alike]
            fits.append(Fit((*(other for one in alike for other in one.names), name), made, sources))
    more = {fit.names: [one for one in fits if _does_more(one.fusions, fit.fusions)] for fit in fits}

    def counts(fit: Fit) -> bool:
        most = [one for one in more[fit.names] if not more[one.names]]
        return not (more[fit.names] and all(_agree(one, fit) for one in most))

    return [fit for fit in fits if counts(fit)]


def _agree(one: Fit, other: Fit) -> bool:
    """Return whether two recipes state nothing different of a layer that both take; a padding in words is no number."""
    mine, its = ({ref.name for fusion in fit.fusions for ref in leaves(fusion.tree)} for fit in (one, other))
    both = ((one.sources.fields(name), other.sources.fields(name)) for name in mine & its)
    said = ((a[field], b[field]) for a, b in both for field in a.keys() & b.keys())
    return all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in said)


def the_one(checkpoints: Mapping[str, Checkpoint], fields: FieldSources) -> tuple[Recipe, str]:
    """Return the recipe that fits, and which it is in words; UsageError, with the list, where several or none do."""
    found = fitting(checkpoints, fields)
    if not found:
        listed = _fused_already(checkpoints) or "; `convtool fuse --list-recipes` lists them"
        raise UsageError(f"--recipe auto: none of the recipes that ship fits{listed}")
    if len(found) > 1:
        raise UsageError(
            f"--recipe auto: several recipes fit: {in_words(found)}; name the one of the library or the authors whose"
            " code builds the network, or give --auto with --model, which needs no recipe"
        )
    (fit,) = found
    recipe = shipped()[fit.names[0]]
    same = f"{' and '.join(fit.names)}, which fuse the same layers of this file in the same way"
    return recipe, same if len(fit.names) > 1 else f"{fit.names[0]}, {recipe.about}"


def chosen(name: str, checkpoints: Mapping[str, Checkpoint], fields: FieldSources) -> tuple[Recipe, str]:
    """Return the recipe of a name or of a file, and ''; of 'auto', the one that fits, and which it is in words."""
    named = find_recipe(name)
    return the_one(checkpoints, fields) if named is None else (named, "")


def _fused_already(checkpoints: Mapping[str, Checkpoint]) -> str:
    record = checkpoints[BASE].record
    return "" if record is None else f"; {checkpoints[BASE].path} holds what convtool fused already"


def doing_more(
    chosen: Sequence[PlannedFusion], checkpoints: Mapping[str, Checkpoint], fields: FieldSources
) -> list[Fit]:
    """Return the recipes that would make fewer layers of what another one takes."""
    return [fit for fit in fitting(checkpoints, fields) if _does_more(fit.fusions, chosen)]


def in_words(fits: Sequence[Fit]) -> str:
    """Return recipes and what each would fuse."""
    several = (f"{' or '.join(fit.names)} ({len(fit.fusions)} fusions, such as {fit.fusions[0].name})" for fit in fits)
    return ", ".join(several).replace("(1 fusions, such as", "(1 fusion,")


def _does_more(one: Sequence[PlannedFusion], other: Sequence[PlannedFusion]) -> bool:
    """Return whether one takes more layers than another, or makes fewer of as many."""
    mine, its = ({ref.name for fusion in fusions for ref in leaves(fusion.tree)} for fusions in (one, other))
    written = {name for name in mine | its if "(" in name}
    mine, its = mine - written, its - written
    return mine > its or (mine == its and len(one) < len(other))
