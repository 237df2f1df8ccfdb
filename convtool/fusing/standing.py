"""Layers of another checkpoint that stand for layers of this one: what nobody states of them follows from these."""

from __future__ import annotations

from collections.abc import Sequence

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import field_source
from convtool.core.bound import fused_geometry
from convtool.core.expression import joined
from convtool.core.fields import Fields, geometry_fields
from convtool.core.tree import BASE, Chain, LayerRef, Tree, leaves, map_leaves
from convtool.errors import RefusedError
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree
from convtool.fusing.settle import settle
from convtool.kinds.stated import FieldSource, FieldSources


def standing(
    names: Sequence[str], before: Tree[LoweredLayer], after: Checkpoint, sources: FieldSources
) -> Tree[LoweredLayer]:
    """Return the layers of AFTER that stand for those of BEFORE; what nobody states of them follows from the latter."""
    first = next(leaves(before)).conv
    if len(names) > 1:  # each is what BEFORE's of its name is, as far as nobody says otherwise
        said = sources.with_first(field_source(after))
        alike = {
            leaf.name: {
                key: value
                for key, value in leaf.fields.items()
                if key not in said.fields(leaf.name) and key in after.part(leaf.name).kind.settable
            }
            for leaf in leaves(before)
            if leaf.name in names
        }
        sources = sources.with_first(FieldSource("BEFORE", alike, exact_names=True))
    stands: Tree[LoweredLayer] = lower_tree(
        {BASE: after},
        Chain(tuple(map(LayerRef, names))),
        sources,
        axes=first.spatial_axes,
        channels=first.in_channels,
        channels_from="the chain in BEFORE",
    )
    (settled,) = settle([like_fused(stands, before)], {BASE: after}, sources.assume)
    return settled


def like_fused(stands: Tree[LoweredLayer], before: Tree[LoweredLayer]) -> Tree[LoweredLayer]:
    """Return AFTER's layers, what is open of the one with a geometry being what one layer in place of BEFORE's has."""
    opened = [leaf for leaf in leaves(stands) if leaf.conv.spatial_axes and any(leaf.open.values())]
    if len(opened) != 1:
        return stands
    try:
        fused = fused_geometry(map_leaves(lambda leaf: leaf.conv, joined(before)))
    except RefusedError:
        return stands  # no single layer has that form
    fields = geometry_fields(fused)
    return map_leaves(lambda leaf: _with_fields(leaf, fields) if leaf is opened[0] else leaf, stands)


def _with_fields(leaf: LoweredLayer, fields: Fields) -> LoweredLayer:
    """Return a layer with these fields, as far as they are open."""
    for name in [name for name, values in leaf.open.items() if values and name in fields]:
        leaf = leaf.with_field(name, fields[name])
    return leaf
