"""The layers that a checkpoint records as fused, with what it doesn't know of their geometry from the live model."""

from __future__ import annotations

from torch import nn

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import SourceLayer
from convtool.checkpoint.spelled import spelled_out
from convtool.core.conv import Conv
from convtool.core.expression import fused_geometry
from convtool.core.fields import Fields, geometry_fields
from convtool.core.tree import BASE, LayerRef, Tree, leaves, map_leaves
from convtool.errors import ConvtoolError, InputError
from convtool.fusing.lowering import lower_tree
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.live.inside import fields_inside
from convtool.live.layers import geometry_of, module_layers
from convtool.live.state import StateCheckpoint


def fused_layers(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Conv]:
    """Return the fused layers that a checkpoint holds, by name.

    Args:
        model: as before the fusions; strides and paddings that nobody stated when fusing are its modules'.

    Raises:
        UsageError: a field that neither the record nor the model tells.
        InputError: the record contradicts itself.
    """
    record = checkpoint.record
    assert record is not None
    trees = {name: spelled.tree for name, spelled in spelled_out(record.fusions).items()}
    made = {}
    for name in dict.fromkeys(fusion.name for fusion in record.fusions):
        if f"{name}.weight" in checkpoint.infos:
            layer = checkpoint.layer(name)
            known = record.fields().get(name)
            if known is None:
                damage = f"it says that {name} went into another layer, and it is there"
                raise InputError(f"{checkpoint.path}: its convtool record is damaged: {damage}")
            lacking = layer.kind.defaults.keys() - known.keys() if layer.axes() else set()
            of_model = _geometry(model, trees[name]) if lacking and name in trees else {}
            made[name] = checkpoint.conv(name, **{field: of_model[field] for field in lacking if field in of_model})
    return made


def _geometry(model: nn.Module, tree: Tree[SourceLayer]) -> Fields:
    """Return the geometry of one layer in place of a model's; nothing where its modules don't tell."""
    try:
        own = geometry_of(model) | fields_inside(model, module_layers(model))
        sources = FieldSources((FieldSource("the model", own),))
        # Of layers of other checkpoints, nothing is known here but that they are like one of the model's.
        refs: Tree[LayerRef] = map_leaves(lambda one: LayerRef(one.name), tree)
        if any(one.origin != BASE for one in leaves(tree)):
            refs = next(LayerRef(one.name) for one in leaves(tree) if one.origin == BASE and not one.written)
        lowered = lower_tree({BASE: StateCheckpoint.of(model)}, refs, sources)
        return geometry_fields(fused_geometry(map_leaves(lambda leaf: leaf.conv, lowered)))
    except ConvtoolError:
        return {}
