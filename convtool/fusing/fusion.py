"""A fusion of named layers as a value: everything that will be written, before anything is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import FusionRecord
from convtool.core.compose import compose
from convtool.core.conv import Conv, pointwise
from convtool.core.expression import joined, multiply_adds, work_per_position
from convtool.core.fields import geometry_fields
from convtool.core.fuse import Fusion, fuse_tree
from convtool.core.names import is_written
from convtool.core.sizes import split_input_size
from convtool.core.tree import BASE, LayerRef, Tree, first_leaves, has_sum, leaves, map_leaves, walk
from convtool.errors import RefusedError, UsageError
from convtool.fusing.lowering import LoweredLayer, stored_dtype


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
        """Return what nobody stated of the layers, in words."""
        return assumptions(self.tree)

    @property
    def record(self) -> FusionRecord:
        """Return what the new checkpoint says of it."""
        conv, verdict = self.fusion.conv, self.fusion.verdict
        return FusionRecord(
            name=self.name,
            tree=map_leaves(LoweredLayer.source, self.tree),
            fields=geometry_fields(conv.geometry) if conv.spatial_axes else {},
            dtype=str(conv.weight.dtype).removeprefix("torch."),
            exact=verdict.exact,
            input_size=verdict.input_size,
            rim=verdict.rim,
        )

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers before and after that are stored; of a batch norm, those that it computes with."""
        stored = (layer.conv for layer in self.layers if layer.layer.tensors)
        return sum(map(_parameters, stored)), _parameters(self.fusion.conv)

    def multiply_adds(self, input_size: Sequence[int] | None) -> tuple[float, float]:
        """Before and after: for one input of that size, or where None for each position of a large input."""
        tree: Tree[Conv] = map_leaves(lambda layer: layer.conv, joined(self.tree))
        conv = self.fusion.conv
        if input_size is None:
            return work_per_position(tree), work_per_position(conv)
        size = split_input_size(input_size, self.layers[0].conv.in_channels, conv.spatial_axes)
        return multiply_adds(tree, size), multiply_adds(conv, size)

    @property
    def module_edits(self) -> list[str]:
        """Return the lines that make a model's code fit the new checkpoint."""
        lines = [f"{self.name} = {module_text(self.fusion.conv)}"]
        if self.fusion.conv.has_bias_map:
            lines.append(f"y = {self.name}(x) + bias_map  # that of the checkpoint, in place of {self.name}(x)")
        lines += self._normalizations()
        gone = [layer.layer for layer in self.layers if layer.own]
        stays = any(layer.name == self.name for layer in gone)  # then the model goes on to call all of the branches
        silent = []
        for layer in gone:
            if is_written(layer.name):
                lines.append(f"take {layer.name} out of the model's code, as {self.name} does it")
            elif layer.kind.parameter and (layer.name in self.blocks or layer.name in layer.tensor_names()):
                lines += [f"{name} = None" for name in layer.tensor_names()]
            elif layer.name != self.name and stays and has_sum(self.tree):
                silent.append(layer.name)
            elif layer.name != self.name:
                # an identity in place of a branch would add its input to the sum
                lines.append(f"del {layer.name}" if has_sum(self.tree) else f"{layer.name} = nn.Identity()")
        if silent:
            lines.append(f"{', '.join(silent)}: nn.Identity(), and zeros from each branch, as convtool.apply has it")
        return lines

    def _normalizations(self) -> list[str]:
        """Return what becomes of normalisations: that of the input is in front of the model, others in its own code."""
        first = list(first_leaves(self.tree))
        in_front = first if len({layer.layer.name for layer in first}) == 1 else []
        lines = [
            f"give {self.name} its input as it was before {layer.layer.name}"
            if any(layer is one for one in in_front)
            else f"take {layer.layer.name} out of the model's code, as {self.name} does it"
            for layer in self.layers
            if layer.layer.kind.code == "input"
        ]
        return list(dict.fromkeys(lines))


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
    """Return what nobody stated of the layers, in words."""
    return [layer.assumed for layer in leaves(tree) if layer.assumed]


def torch_module(conv: Conv) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return the name of torch's class for a layer, its shape as that takes it, and its other arguments.

    Those at torch's defaults are left out. Padding that the class cannot say, as its sides differ, isn't among them.
    """
    geometry, axes = conv.geometry, conv.spatial_axes
    sides = [before if before == after else 0 for before, after in geometry.padding]
    even = all(before == after for before, after in geometry.padding)
    fields = {
        "stride": (geometry.stride, 1),
        "padding": (tuple(sides) if even else (0,), 0),
        "output_padding": (geometry.output_padding, 0),
        "dilation": (geometry.dilation, 1),
        "groups": (geometry.groups, 1),
        "bias": (conv.bias is not None and not conv.has_bias_map, True),
        "padding_mode": (geometry.padding_mode if even and geometry.padded else "zeros", "zeros"),
    }
    others = {
        name: value
        for name, (value, default) in fields.items()
        if (set(value) - {default} if isinstance(value, tuple) else value != default)
    }
    shape = (conv.in_channels, conv.out_channels)
    if not axes:
        return "Linear", shape, others
    return f"Conv{'Transpose' if geometry.transposed else ''}{axes}d", (*shape, geometry.kernel_size), others


def module_text(conv: Conv) -> str:
    """Return the layer as a line of torch code: 'nn.Conv2d(3, 16, (5, 7), stride=2)'."""
    name, shape, others = torch_module(conv)
    arguments = [*map(_argument, shape), *(f"{key}={_argument(value)}" for key, value in others.items())]
    text, geometry = f"nn.{name}({', '.join(arguments)})", conv.geometry
    if all(before == after for before, after in geometry.padding):
        return text
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    if geometry.transposed:
        return f"{text}  # then F.pad(y, {[-side for side in sides]})"
    mode = "" if geometry.padding_mode == "zeros" else f", mode={geometry.padding_mode!r}"
    return f"{text}  # after F.pad(x, {sides}{mode})"


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


def _argument(value: object) -> str:
    return str(value[0]) if isinstance(value, tuple) and len(set(value)) == 1 else repr(value)
