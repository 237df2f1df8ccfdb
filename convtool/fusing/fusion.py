"""A fusion of named layers as a value: everything that will be written, before anything is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import FusionRecord
from convtool.core.compose import compose
from convtool.core.conv import Conv, pointwise
from convtool.core.expression import joined, multiply_adds, work_per_position
from convtool.core.fuse import Fusion, fuse_tree
from convtool.core.names import is_written
from convtool.core.sizes import split_input_size
from convtool.core.tree import BASE, LayerRef, Tree, leaves, map_leaves, walk
from convtool.errors import RefusedError, UsageError
from convtool.fusing.dependence import fused_fields
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import stored_dtype

Per: TypeAlias = Literal["input position", "input", "output position"]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """A fused layer of a new checkpoint.

    Attributes:
        name: of the fused layer.
        tree: the layers that it stands for.
        fusion: the layer itself, and where it is exact.
        edit: what changes in the checkpoint.
        blocks: those of its layers that hold other layers of the checkpoint.
    """

    name: str
    tree: Tree[LoweredLayer]
    fusion: Fusion
    edit: Edit
    blocks: frozenset[str] = frozenset()

    @property
    def layers(self) -> list[LoweredLayer]:
        """Return every layer of the tree, in order."""
        return list(leaves(self.tree))

    @property
    def assumed(self) -> list[str]:
        """Return what nobody stated of the layers and matters, in words."""
        return assumptions(self.tree)

    @property
    def settled(self) -> bool:
        """Return whether all of its layers' geometry is known."""
        return not any(len(values) > 1 for leaf in self.layers for values in leaf.open.values())

    @property
    def record(self) -> FusionRecord:
        """Return what the new checkpoint says of it."""
        conv, verdict = self.fusion.conv, self.fusion.verdict
        fields, assumed = fused_fields(self.tree, conv.geometry) if conv.spatial_axes else ({}, ())
        return FusionRecord(
            name=self.name,
            tree=map_leaves(LoweredLayer.source, self.tree),
            fields=fields,
            dtype=str(conv.weight.dtype).removeprefix("torch."),
            exact=verdict.exact,
            input_size=verdict.input_size,
            rim=verdict.rim,
            assumed=assumed,
        )

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers before and after that are stored; of a batch norm, those that it computes with."""
        stored = (layer.conv for layer in self.layers if layer.layer.tensors)
        return sum(map(_parameters, stored)), _parameters(self.fusion.conv)

    def multiply_adds(self, input_size: Sequence[int] | None) -> tuple[float, float, Per] | None:
        """Return how many there are before and after, and of what: an input of that size, or a position of a large one.

        It is a position of the output where strides are open; None where that number depends on them, too.
        """
        tree: Tree[Conv] = map_leaves(lambda layer: layer.conv, joined(self.tree))
        conv = self.fusion.conv
        if self.settled and input_size is None:
            return work_per_position(tree), work_per_position(conv), "input position"
        if self.settled and input_size is not None:
            size = split_input_size(input_size, self.layers[0].conv.in_channels, conv.spatial_axes)
            return multiply_adds(tree, size), multiply_adds(conv, size), "input"
        strided = map_leaves(_with_stride_of_two, self.tree)
        here, there = (
            work_per_position(map_leaves(lambda layer: layer.conv, joined(one)), of_output=True)
            for one in (self.tree, strided)
        )
        return (here, work_per_position(conv, of_output=True), "output position") if here == there else None


def _with_stride_of_two(leaf: LoweredLayer) -> LoweredLayer:
    return leaf.with_field("stride", 2) if leaf.open.get("stride") else leaf


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
    layers = list(leaves(tree))
    first = layers[0].conv
    size = None if input_size is None else split_input_size(input_size, first.in_channels, first.spatial_axes)
    own = [layer.layer for layer in layers if layer.own]
    if not own:
        raise UsageError("expected at least one layer of the checkpoint in the fusion")
    if size is not None:
        _check_inputs(tree, size)
    fusion = fuse_tree(
        joined(tree),
        input_size=size,
        allow_border=allow_border,
        bias_map=bias_map,
        dtype=dtype or stored_dtype(layers),
    )
    if fusion.conv.geometry.padded and fusion.conv.geometry.padding_mode == "symmetric":
        raise RefusedError("the fused layer would pad symmetrically, with the edge repeated, which no nn.Conv does")
    if not fusion.conv.spatial_axes and fusion.conv.geometry.groups > 1:
        fusion = replace(fusion, conv=_without_groups(fusion.conv))
    fused_name = name or next((layer.name for layer in own if not layer.kind.parameter), own[0].name)
    if is_written(fused_name):
        raise UsageError(f"expected --name, as {fused_name} is no module that the fused layer could stand in place of")
    prefix = f"{fused_name}." if fused_name else ""
    insert = {f"{prefix}weight": fusion.conv.torch_weight().contiguous()}
    if fusion.conv.bias is not None:
        insert[f"{prefix}{'bias_map' if fusion.conv.has_bias_map else 'bias'}"] = fusion.conv.bias
    remove = [key for layer in own for key in layer.tensor_names()]
    blocks = (layer.name for layer in own if any(other.startswith(f"{layer.name}.") for other in base.layers))
    return PlannedLayer(fused_name, tree, fusion, Edit.of(remove, insert, remove[0]), frozenset(blocks))


def _check_inputs(tree: Tree[LoweredLayer], size: tuple[int, ...]) -> None:
    """Raise UsageError where a layer doesn't get inputs of the size that its own fields say."""

    def step(leaf: LoweredLayer, at: tuple[int, ...]) -> tuple[int, ...]:
        try:
            leaf.layer.kind.check_input(leaf.layer.fields, at)
        except UsageError as error:
            raise UsageError(f"{leaf.name}: {error}") from None
        return leaf.conv.output_size(at)

    walk(tree, size, step, lambda _, sizes: sizes[-1])


def _without_groups(conv: Conv) -> Conv:
    """Return the layer with one group, which is all that nn.Linear knows; its numbers are the same."""
    everything = Conv(torch.eye(conv.in_channels).reshape(conv.in_channels, -1), None, pointwise(0))
    return compose(everything, conv).to(conv.weight.dtype)


def assumptions(tree: Tree[LoweredLayer]) -> list[str]:
    """Return what nobody stated of the layers and they rest on, in words."""
    return list(dict.fromkeys(f"{name}: {what}" for leaf in leaves(tree) for name, what in leaf.assumptions()))


def check_nothing_missed(
    checkpoints: Mapping[str, Checkpoint], trees: Sequence[Tree[LayerRef]], read: Collection[tuple[str, str]]
) -> None:
    """Refuse to take layers of another checkpoint and not the tensors right beside them, which say how they are meant.

    Args:
        read: tensors (source, full name) whose numbers went into the trees.

    Raises:
        RefusedError: there is such a tensor, as a DoRA's magnitudes are.
    """
    used = {(ref.source, ref.name) for tree in trees for ref in leaves(tree) if ref.source in checkpoints}
    beside = {(source, name.rpartition(".")[0]) for source, name in used if source != BASE} - used
    for source, path in sorted(beside):
        layer = checkpoints[source].layers.get(path)
        missed = [name for name in layer.tensor_names() if (source, name) not in read] if layer else []
        if missed:
            raise RefusedError(
                f"{source}:{missed[0]} stands beside layers that would be merged, and the recipe has no use for it;"
                " without it they mean something else"
            )


def check_ties(base: Checkpoint, edits: Sequence[Edit]) -> None:
    """Refuse to take out a tensor that is one with another, unless that goes into the same fusion.

    Raises:
        RefusedError: names the two.
    """
    owners = {name: number for number, edit in enumerate(edits) for name in edit.remove}
    for one, other in base.sharing(owners):
        if owners.get(one) != owners.get(other):
            raise RefusedError(
                f"{one} is one tensor with {other} (tied weights), and the fusion would change it in one place only;"
                " leave the layer out, or untie the two before saving, with tensor.clone()"
            )


def _parameters(conv: Conv) -> int:
    return conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())
