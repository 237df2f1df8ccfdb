"""A fusion of named layers as a value: everything that will be written, before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import FusionRecord, SourceLayer, changes_nothing
from convtool.core.compose import compose
from convtool.core.conv import Conv, pointwise
from convtool.core.expression import joined, multiply_adds, work_per_position
from convtool.core.fuse import Fusion, fuse_tree
from convtool.core.names import is_written
from convtool.core.rounding import dtype_name
from convtool.core.tree import BASE, LayerRef, Tree, chains, leaves, map_leaves, tree_text, walk
from convtool.errors import RefusedError, UsageError, about
from convtool.fusing.dependence import fused_fields
from convtool.fusing.leaf import LoweredLayer, spatial_size
from convtool.fusing.lowering import stored_dtype
from convtool.kinds.kind import Layer
from convtool.kinds.shares import unshared, without_places

Per: TypeAlias = Literal["input position", "input", "output position"]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """A fused layer of a new checkpoint.

    Attributes:
        record: what the new checkpoint says of it.
        tree: the layers that it stands for.
        fusion: the layer itself, and where it is exact.
        edit: what changes in the checkpoint.
        blocks: those of its layers that hold other layers of the checkpoint.
        others: the classes of those of its layers that aren't torch's own, where the file tells, by name.
    """

    record: FusionRecord
    tree: Tree[LoweredLayer]
    fusion: Fusion
    edit: Edit
    blocks: frozenset[str] = frozenset()
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return what the fused layer is called."""
        return self.record.name

    @property
    def layers(self) -> list[LoweredLayer]:
        """Return every layer of the tree, in order."""
        return list(leaves(self.tree))

    @property
    def joins(self) -> bool:
        """Return whether convolutions or linear layers that follow each other are one in it."""
        return any(sum(leaf.layer.kind.main for leaf in run) > 1 for run in chains(self.tree))

    @property
    def assumed(self) -> list[str]:
        """Return what nobody stated of the layers and matters, in words."""
        return list(dict.fromkeys(f"{name}: {what}" for leaf in self.layers for name, what in leaf.assumptions()))

    @property
    def settled(self) -> bool:
        """Return whether all of its layers' geometry is known."""
        return not any(len(values) > 1 for leaf in self.layers for values in leaf.open.values())

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers before and after that are stored; of a batch norm, those that it computes with.

        Of an adapter they are those of its own tensors, alpha left out, which is a setting.
        """
        before = sum(_stored(leaf) for leaf in leaves(self._by_itself) if leaf.layer.tensors)
        return before, _parameters(self.fusion.conv)

    @property
    def _by_itself(self) -> Tree[LoweredLayer]:
        """Return the tree as if the channels that it takes of layers were all of these."""
        parts = self.record.shares()

        def part(leaf: LoweredLayer) -> LoweredLayer:
            if leaf.name not in parts or leaf.origin != BASE:
                return leaf
            start, stop, _ = parts[leaf.name]
            bias, geometry = leaf.conv.bias, replace(leaf.conv.geometry, groups=stop - start)
            return replace(
                leaf, conv=Conv(leaf.conv.weight[start:stop], None if bias is None else bias[start:stop], geometry)
            )

        return map_leaves(part, without_places(self.tree, LoweredLayer.owned))

    def multiply_adds(self, input_size: Sequence[int] | None) -> tuple[float, float, Per] | None:
        """Return how many there are before and after, and of what: an input of that size, or a position of a large one.

        It is a position of the output where strides are open; None where that number depends on them, too, and with an
        adapter, whose factors aren't run as the layer that they change.
        """
        if any(leaf.layer.kind.adapts for leaf in self.layers):
            return None
        alone = self._by_itself
        tree: Tree[Conv] = map_leaves(lambda layer: layer.conv, joined(alone))
        conv = self.fusion.conv
        if self.settled and input_size is None:
            return work_per_position(tree), work_per_position(conv), "input position"
        if self.settled and input_size is not None:
            size = spatial_size(self.tree, input_size) or ()
            return multiply_adds(tree, size), multiply_adds(conv, size), "input"
        strided = map_leaves(lambda leaf: leaf.with_field("stride", 2) if leaf.open.get("stride") else leaf, alone)
        here, there = (
            work_per_position(map_leaves(lambda layer: layer.conv, joined(one)), of_output=True)
            for one in (alone, strided)
        )
        return (here, work_per_position(conv, of_output=True), "output position") if here == there else None


def plan_layer(
    base: Checkpoint,
    name: str,
    tree: Tree[LoweredLayer],
    *,
    input_size: Sequence[int] | None = None,
    allow_border: bool = False,
    bias_map: bool = False,
    dtype: torch.dtype | None = None,
) -> PlannedLayer:
    """Fuse the layers of a tree.

    Args:
        base: the checkpoint that is to be changed.
        name: what the fused layer is to be called; the first layer's name where ''.
        input_size: of the tree's input, with or without the channels; decides for that size alone where given.
        allow_border: fuse even where outputs near the border would differ.
        bias_map: where only a bias is lost at the border, store one for each output of `input_size`.
        dtype: of the fused layer; that of the layers by default.

    Raises:
        RefusedError: it wouldn't be exact, or no single layer has that form.
        UsageError: channels that don't fit, or an input size on which a layer cannot run.
        InputError: the result is not finite in that dtype.
    """
    layers, size = list(leaves(tree)), spatial_size(tree, input_size)
    own, dtype = _own(layers), dtype or stored_dtype(layers)
    if size is not None:
        _check_inputs(tree, size)
    fusion = fuse_tree(joined(tree), input_size=size, allow_border=allow_border, bias_map=bias_map, dtype=dtype)
    fusion = replace(fusion, conv=_as_module(fusion.conv))
    record = _record(name or _name_of(own), tree, fusion)
    if changes_nothing(record.tree) and (len(layers) > 1 or record.name == own[0].name):
        raise UsageError(f"{tree_text(record.tree, lambda one: one.name)}: is what {own[0].name} does by itself")
    remove, some = [key for layer in own for key in layer.tensor_names()], record.shares()
    shared = [key for layer in own if layer.name in some for key in layer.tensor_names()]
    edit = Edit.of(remove, conv_tensors(record.name, fusion.conv), remove[0], shared)
    blocks = (layer.name for layer in own if any(other.startswith(f"{layer.name}.") for other in base.layers))
    others = {layer.name: base.other_classes[layer.name] for layer in own if layer.name in base.other_classes}
    return PlannedLayer(record, tree, fusion, edit, frozenset(blocks), others)


def _own(layers: Sequence[LoweredLayer]) -> list[Layer]:
    """Return those of the checkpoint that is changed; raise UsageError where there are none."""
    own = [layer.layer for layer in layers if layer.own]
    if not own:
        raise UsageError("expected at least one layer of the checkpoint in the fusion")
    return own


def _name_of(own: Sequence[Layer]) -> str:
    """Return what the layer in place of these is called where nobody says: as the first of them that is a module."""
    name = next((layer.name for layer in own if not layer.kind.parameter), own[0].name)
    if is_written(name):
        raise UsageError(f"expected --name, as {name} is no module that the fused layer could stand in place of")
    return name


def conv_tensors(name: str, conv: Conv) -> dict[str, Tensor]:
    """Return a layer's tensors by full name, as they go into a file."""
    tensors = {"weight": conv.torch_weight().contiguous()}
    if conv.bias is not None:
        tensors["bias_map" if conv.has_bias_map else "bias"] = conv.bias
    return {f"{name}.{part}" if name else part: tensor for part, tensor in tensors.items()}


def _record(name: str, tree: Tree[LoweredLayer], fusion: Fusion) -> FusionRecord:
    """Return what the new checkpoint says of a fusion."""
    conv, verdict = fusion.conv, fusion.verdict
    fields, assumed = fused_fields(tree, conv.geometry) if conv.spatial_axes else ({}, ())
    return FusionRecord(
        name=name,
        tree=map_leaves(LoweredLayer.source, tree),
        fields=fields,
        dtype=dtype_name(conv.dtype),
        exact=verdict.exact,
        input_size=verdict.input_size,
        rim=verdict.rim,
        assumed=assumed,
    )


def _check_inputs(tree: Tree[LoweredLayer], size: tuple[int, ...]) -> None:
    """Raise UsageError where a layer doesn't get inputs of the size that its own fields say."""

    def step(leaf: LoweredLayer, at: tuple[int, ...]) -> tuple[int, ...]:
        with about(leaf.name):
            leaf.layer.kind.check_input(leaf.layer.fields, at)
        return leaf.conv.output_size(at)

    walk(tree, size, step, lambda _, sizes: sizes[-1])


def _as_module(conv: Conv) -> Conv:
    """Return the layer as a module of torch's can have it: nn.Linear knows no groups; its numbers are the same."""
    if conv.geometry.padded and conv.geometry.padding_mode == "symmetric":
        raise RefusedError("the fused layer would pad symmetrically, with the edge repeated, which no nn.Conv does")
    if conv.spatial_axes or conv.geometry.groups == 1:
        return conv
    everything = Conv(torch.eye(conv.in_channels).reshape(conv.in_channels, -1), None, pointwise(0))
    return compose(everything, conv).to(conv.dtype)


def check_nothing_missed(checkpoints: Mapping[str, Checkpoint], trees: Sequence[Tree[LayerRef]]) -> None:
    """Refuse to take layers of another checkpoint and not the tensors right beside them, which say how they are meant.

    Raises:
        RefusedError: there is such a tensor, as a DoRA's magnitudes are.
    """
    used = {(ref.source, ref.name) for tree in trees for ref in leaves(tree) if ref.source in checkpoints}
    beside = {(source, name.rpartition(".")[0]) for source, name in used if source != BASE} - used
    for source, path in sorted(beside):
        layer = checkpoints[source].layers.get(path)
        missed = list(layer.tensor_names()) if layer else []
        if missed:
            raise RefusedError(
                f"{source}:{missed[0]} stands beside layers that would be merged, and the recipe has no use for it;"
                " without it they mean something else"
            )


def check_whole(base: Checkpoint, planned: Sequence[PlannedLayer]) -> None:
    """Refuse to take out a part of a layer alone, or a tensor that is one with another, unless that goes as well.

    Raises:
        RefusedError: names what would be lost.
    """
    for name in unshared((layer.record.tree for layer in planned), SourceLayer.owned):
        raise RefusedError(
            f"the fusions would take out {name}, and not each of its channels goes into exactly one of them; fuse the"
            " others too, or leave it out"
        )
    owners = {name: number for number, layer in enumerate(planned) for name in layer.edit.remove}
    for one, other in base.sharing(owners):
        if owners.get(one) != owners.get(other):
            raise RefusedError(
                f"{one} is one tensor with {other} (tied weights), and the fusion would change it in one place only;"
                " leave the layer out, or untie the two before saving, with tensor.clone()"
            )


def _stored(leaf: LoweredLayer) -> int:
    if not leaf.layer.kind.adapts:
        return _parameters(leaf.conv)
    return sum(prod(shape) for part, shape in leaf.layer.shapes.items() if part != "alpha")


def _parameters(conv: Conv) -> int:
    return conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())
