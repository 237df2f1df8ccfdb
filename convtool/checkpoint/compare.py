"""Two checkpoints held against each other: which fusions part them, and whether all the rest is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.chain import LoweredLayer, find_named, full_name, lower_tree
from convtool.checkpoint.info import FUNCTION
from convtool.checkpoint.record import FusionRecord, SourceLayer, trees_of
from convtool.core.fields import FieldSource, FieldSources
from convtool.core.geometry import format_sizes
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import InputError, UsageError

CHUNK = 1 << 24  # bytes compared at a time


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """A chain of BEFORE and the chain of AFTER that stands for it.

    Attributes:
        name: of the fused layer.
        before, after: the lowered layers, in chains and sums.
        fusion: the last recorded fusion of that name, or None where the user named the layers.
    """

    name: str
    before: Tree[LoweredLayer]
    after: Tree[LoweredLayer]
    fusion: FusionRecord | None


def recorded_pairings(
    before: Checkpoint, after: Checkpoint, sources: FieldSources, others: Mapping[str, Checkpoint] | None = None
) -> list[Pairing]:
    """A pairing for each fusion that AFTER records and BEFORE doesn't; geometry as recorded, `sources` overruling it.

    Args:
        others: the other checkpoints that layers came from, by the names they were given.

    Raises:
        InputError: AFTER has no record of a fusion that BEFORE lacks, or the record doesn't fit the tensors.
    """
    if after.record is None:
        raise InputError(f"{after.path}: holds no record of what was fused; name the layers: --before a,b --after c")
    fusions = after.record.since(before.record)
    last = {fusion.name: fusion for fusion in fusions}
    pairings = []
    for name, tree in trees_of(fusions).items():
        chain = [source for source in leaves(tree) if source.kind != FUNCTION and source.origin == BASE]
        missing = [source.name for source in chain if not _has_layer(before, source.name)]
        if missing or name not in after.layers:
            where, which = (before.path, missing[0]) if missing else (after.path, name)
            raise InputError(f"{where}: has no layer {which!r}, which the record of {after.path} names")
        fields = {full_name(source.name, source.origin): source.fields for source in leaves(tree)}
        known = FieldSource("record", fields, exact_names=True)
        fused = lower_tree({BASE: after}, _stands(last[name]), FieldSources())
        axes = next(leaves(fused)).conv.spatial_axes  # which batch norms by themselves don't tell
        checkpoints = {BASE: before, **(others or {})}
        layers = lower_tree(checkpoints, _names(tree), sources.with_first(known), spatial_axes=axes)
        pairings.append(Pairing(name, layers, fused, last[name]))
    return pairings


def _stands(fusion: FusionRecord) -> Tree[LayerRef]:
    """What stands in AFTER: the layer, between a flatten and an unflatten where it is linear and its sources aren't."""
    around = [(name, size) for name, size in (("flatten", fusion.flatten), ("unflatten", fusion.unflatten)) if size]
    if not around:
        return LayerRef(fusion.name)
    before, after = (
        [LayerRef(f"{name}({format_sizes(size)})") for name, size in around if name == wanted]
        for wanted in ("flatten", "unflatten")
    )
    return Chain((*before, LayerRef(fusion.name), *after))


def _has_layer(checkpoint: Checkpoint, name: str) -> bool:
    """Whether there is a layer of exactly that name, or a tensor of it that went into a fusion as a scale."""
    try:
        return find_named(checkpoint, name).name == name
    except UsageError:
        return False


def _names(tree: Tree[SourceLayer]) -> Tree[LayerRef]:
    """The names of recorded layers, a flatten put back before the linear layer that it was recorded with."""
    if isinstance(tree, Chain):
        return Chain(tuple(part for item in tree.parts for part in _names_in_chain(item)))
    if isinstance(tree, Sum):
        return Sum(tuple(_names(part) for part in tree.parts))
    return LayerRef(tree.name, tree.origin)


def _names_in_chain(item: Tree[SourceLayer]) -> Iterator[Tree[LayerRef]]:
    if isinstance(item, SourceLayer) and "flatten" in item.fields:
        yield LayerRef(f"flatten({format_sizes(item.fields['flatten'])})")
    yield _names(item)


def differing_tensors(before: Checkpoint, after: Checkpoint, pairings: Sequence[Pairing]) -> dict[str, str]:
    """Tensors that no pairing accounts for and that aren't the same: name -> 'changed', 'missing' or 'new'."""
    used = {
        key
        for pairing in pairings
        for lowered in leaves(pairing.before)
        if lowered.origin == BASE
        for key in lowered.layer.tensor_names()
    }
    made = {key for pairing in pairings for lowered in leaves(pairing.after) for key in lowered.layer.tensor_names()}
    differing = {}
    for name in before.infos.keys() - used:
        if name not in after.infos:
            differing[name] = "missing"
        elif not same_bits(before, after, name):
            differing[name] = "changed"
    for name in after.infos.keys() - made - (before.infos.keys() - used):
        differing[name] = "new"
    return dict(sorted(differing.items()))


def same_bits(before: Checkpoint, after: Checkpoint, name: str) -> bool:
    """Whether the tensor is the same in both: dtype, shape, and every bit (so that NaN equals the same NaN)."""
    one, other = before.infos[name], after.infos[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = before.bits(name), after.bits(name)
    pieces = range(0, max(len(a), len(b)), CHUNK)
    return len(a) == len(b) and all(torch.equal(a[i : i + CHUNK], b[i : i + CHUNK]) for i in pieces)
