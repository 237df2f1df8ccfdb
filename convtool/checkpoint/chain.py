"""A chain of named layers, lowered: fields gathered from every source, the rest settled, or assumed and said so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.info import FUNCTION, Layer
from convtool.checkpoint.lower import lower_layer
from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.fields import DEFAULT_EPS, Fields, FieldSource, FieldSources, geometry_fields
from convtool.core.functions import flatten_size, function_channels, is_function, make_function
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import RefusedError, UsageError

SHARED_FIELDS = ("stride", "padding", "dilation", "padding_mode")  # what a layer takes from the one that it is like


@dataclass(frozen=True, slots=True, eq=False)
class LoweredLayer:
    """One layer of a chain.

    Attributes:
        layer: as found in the checkpoint.
        conv: what it was lowered to.
        fields: all of its fields, the assumed ones too.
        assumed: what nobody stated, in words; '' where everything was stated.
        origin: the checkpoint that it is from, BASE for the one that is changed.
    """

    layer: Layer
    conv: Conv
    fields: Fields
    assumed: str
    origin: str = BASE

    @property
    def full_name(self) -> str:
        """The name, with the checkpoint in front where it isn't the one that is changed."""
        return full_name(self.layer.name, self.origin)

    def source(self) -> SourceLayer:
        return SourceLayer(self.layer.name, self.layer.kind, self.fields, self.origin)


def full_name(name: str, origin: str) -> str:
    """A layer's name as fields and messages call it: that of another checkpoint with NAME: in front."""
    return str(LayerRef(name, origin))


def find_named(checkpoint: Checkpoint, name: str) -> Layer:
    """The layer of that name; of a tensor's full name, where it can be a scale per channel, that scale alone.

    Raises:
        UsageError: there is none.
        RefusedError: it may be a norm that only looks like a scale.
    """
    layer = checkpoint.layer(name)
    parameter = name.rpartition(".")[2]
    whole = layer.kind in ("conv", "linear", "batch_norm")  # a full key of these means the layer
    if parameter in layer.tensors and name != layer.name and parameter not in _OWN_NAMES and not whole:
        info = layer.tensors[parameter]
        if info.shape and all(size == 1 for size in info.shape[1:]):
            return Layer(name, "scale", {parameter: info})
    elif layer.kind == "scale" and "norm" in layer.name.rpartition(".")[2].lower():
        tensor = next(layer.tensor_names())
        raise RefusedError(
            f"{layer.name} holds nothing but {tensor}, as an RMS norm does, which isn't linear; if it is a plain scale,"
            f" name the tensor: {tensor}"
        )
    return layer


_OWN_NAMES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "bias_map"})


def recorded(checkpoint: Checkpoint, origin: str = BASE) -> FieldSource:
    """What convtool wrote down about the layers of a checkpoint that it made itself."""
    record = checkpoint.record
    tables = {full_name(name, origin): fields for name, fields in record.fields().items()} if record else {}
    return FieldSource("record", tables, exact_names=True)


def lower_chain(
    checkpoint: Checkpoint,
    names: Sequence[str],
    sources: FieldSources,
    input_channels: int | None = None,
    spatial_axes: int | None = None,
    channels_from: str = "--input-size",
) -> list[LoweredLayer]:
    """The named layers of one checkpoint, first to last; see `lower_tree`."""
    tree = Chain(tuple(LayerRef(name) for name in names))
    return list(leaves(lower_tree({BASE: checkpoint}, tree, sources, input_channels, spatial_axes, channels_from)))


def lower_tree(
    checkpoints: Mapping[str, Checkpoint],
    tree: Tree[LayerRef],
    sources: FieldSources,
    input_channels: int | None = None,
    spatial_axes: int | None = None,
    channels_from: str = "--input-size",
) -> Tree[LoweredLayer]:
    """A tree of names, lowered, with the fields from `sources` (the checkpoint's record comes before them).

    Args:
        checkpoints: by the source that the names give; BASE is the one that is changed.
        input_channels: of the tree's input, where the user gave them; settles groups that nobody stated.
        spatial_axes: of the tree's input, for one without a convolution or a linear layer.
        channels_from: what says so of the channels, for messages.

    Raises:
        UsageError: an unknown layer, one named twice, fields or channels that don't fit.
        InputError: a layer that isn't linear, or holds inf or NaN.
        RefusedError: layers that cannot be chained here.
    """
    return _TreeLowering(checkpoints, tree, sources, spatial_axes).lower(input_channels, channels_from)


class _TreeLowering:
    """The layers of one tree, found and lowered; channels are passed along from layer to layer."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        tree: Tree[LayerRef],
        sources: FieldSources,
        spatial_axes: int | None,
    ) -> None:
        self.checkpoints = checkpoints
        self.tree = tree
        self.sources = sources
        self.layers: dict[LayerRef, Layer] = {}
        used: set[str] = set()
        for ref in leaves(tree):
            layer = self.layers[ref] = self._find(ref)
            if layer.kind == FUNCTION:
                continue
            twice = used.intersection(full_name(name, ref.source) for name in layer.tensor_names())
            if twice:
                raise UsageError(f"{layer.name} is named twice; a fusion runs through each layer once")
            used.update(full_name(name, ref.source) for name in layer.tensor_names())
        flattened = next((len(size) for ref in self.layers if (size := flatten_size(ref.name)) is not None), None)
        self.axes = _spatial_axes(list(self.layers.values()), flattened, spatial_axes)

    def lower(self, channels: int | None, known_from: str) -> Tree[LoweredLayer]:
        return self._lower(self.tree, channels, known_from)[0]

    def _find(self, ref: LayerRef) -> Layer:
        if is_function(ref.name):
            return Layer(ref.name, FUNCTION, {})
        if ref.source not in self.checkpoints:
            raise UsageError(f"{ref}: no checkpoint is called {ref.source!r}; give it with --with {ref.source}=FILE")
        return find_named(self.checkpoints[ref.source], ref.name)

    def _fields(self, ref: LayerRef) -> Fields:
        """What is stated of a layer, by itself or by the one that it is like."""
        sources = self.sources.with_first(recorded(self.checkpoints[ref.source], ref.source))
        own = sources.fields(full_name(self.layers[ref].name, ref.source))
        if not ref.like:
            return own
        like = self.sources.with_first(recorded(self.checkpoints[BASE])).fields(ref.like)
        return {field: like[field] for field in SHARED_FIELDS if field in like} | own

    def _lower(
        self, tree: Tree[LayerRef], channels: int | None, known_from: str
    ) -> tuple[Tree[LoweredLayer], int | None, str]:
        """The lowered tree, the channels of its output, and whose word these are."""
        if isinstance(tree, Chain):
            return self._lower_chain(tree, channels, known_from)
        if isinstance(tree, Sum):
            if channels is None:
                channels, known_from = self._settled(tree)
            # For layers without tensors beside ones that don't settle it either; those go on to assume one group.
            guess = self._channels_into(tree.parts) if channels is None else channels
            lowered = [
                self._lower(part, guess if self._is_function(part) else channels, known_from) for part in tree.parts
            ]
            return Sum(tuple(part for part, _, _ in lowered)), lowered[0][1], lowered[0][2]
        lowered_leaf = self._lower_leaf(tree, channels, known_from, None)
        return lowered_leaf, lowered_leaf.conv.out_channels, lowered_leaf.layer.name

    def _lower_chain(
        self, chain: Chain[LayerRef], channels: int | None, known_from: str
    ) -> tuple[Tree[LoweredLayer], int | None, str]:
        parts: list[Tree[LoweredLayer]] = []
        flattened: tuple[int, ...] | None = None
        for number, part in enumerate(chain.parts):
            if isinstance(part, LayerRef) and flatten_size(part.name) is not None:
                flattened = flatten_size(part.name)
            elif isinstance(part, LayerRef) and channels is None and self._is_function(part):
                parts.append(self._lower_leaf(part, self._channels_into(chain.parts[number:]), known_from, None))
                channels = function_channels(part.name)
                known_from = part.name
            elif isinstance(part, LayerRef) and flattened is not None:
                lowered = self._lower_leaf(part, channels, known_from, flattened)
                parts.append(lowered)
                channels, known_from, flattened = lowered.conv.out_channels, lowered.layer.name, None
            else:
                tree, channels, known_from = self._lower(part, channels, known_from)
                parts.append(tree)
        if flattened is not None:
            raise UsageError("flatten(...) stands before the linear layer that reads what it flattens")
        return Chain(tuple(parts)), channels, known_from

    def _lower_leaf(
        self, ref: LayerRef, channels: int | None, known_from: str, flattened: tuple[int, ...] | None
    ) -> LoweredLayer:
        layer = self.layers[ref]
        if layer.kind == FUNCTION:
            if channels is None:
                raise UsageError(
                    f"{ref}: the number of channels isn't known here; give --input-size with the channels in front"
                )
            return LoweredLayer(layer, make_function(ref.name, channels, self.axes), {}, "")
        if flattened is not None and layer.kind != "linear":
            raise UsageError(f"{layer.name} is a {layer.kind}, not the linear layer that flatten(...) stands before")
        fields = self._fields(ref)
        assumed: list[str] = []
        if layer.kind == "conv":
            fields, assumed = _settle_conv(layer, fields, channels, known_from)
        elif layer.kind == "batch_norm" and "eps" not in fields:
            assumed = [f"eps {DEFAULT_EPS:g}"]
        if flattened is not None:
            fields = fields | {"flatten": flattened}
        conv = lower_layer(self.checkpoints[ref.source], layer, fields, self.axes)
        if channels is not None and conv.in_channels != channels:
            raise UsageError(
                f"channels don't fit: {layer.name} takes {conv.in_channels} channels, and {known_from} gives {channels}"
                f"{self._maybe_transposed(layer, channels, known_from, conv.in_channels)}"
            )
        full = geometry_fields(conv.geometry) if layer.kind == "conv" else dict(fields)
        if layer.kind == "batch_norm":
            full.setdefault("eps", DEFAULT_EPS)
        said = f"{full_name(layer.name, ref.source)}: {', '.join(assumed)}" if assumed else ""
        return LoweredLayer(layer, conv, full, said, ref.source)

    def _maybe_transposed(self, layer: Layer, given: int, known_from: str, taken: int) -> str:
        """A hint for channels that would fit, were one of the two layers a transposed convolution."""
        before = [found for found in self.layers.values() if found.name == known_from and found.kind == "conv"]
        if layer.kind == "conv" and layer.tensors["weight"].shape[0] == given:
            suspect = layer.name
        elif before and before[0].tensors["weight"].shape[1] == taken:
            suspect = known_from
        else:
            return ""
        return f"; they would if {suspect} is a transposed convolution: --set {suspect}.transposed=true"

    def _settled(self, tree: Tree[LayerRef]) -> tuple[int | None, str]:
        """Channels of a tree's input where one of its first layers settles them, and that layer's name."""
        if isinstance(tree, Chain):
            for part in tree.parts:
                found = self._settled(part)
                if found[0] is not None or not self._is_function(part):
                    return found
                if "flatten(" in str(part):  # the others give as many channels as they take
                    break
            return None, ""
        if isinstance(tree, Sum):
            found = next((found for part in tree.parts if (found := self._settled(part))[0] is not None), (None, ""))
            if found[0] is None and any(str(part).startswith("identity(") for part in tree.parts):
                return self._given(tree)  # what is added to its own input has as many channels
            return found
        layer = self.layers[tree]
        if layer.kind == FUNCTION:
            return function_channels(tree.name), tree.name
        if layer.kind == "batch_norm":
            return layer.tensors["running_mean"].shape[0], layer.name
        if layer.kind == "scale":
            return next(iter(layer.tensors.values())).shape[0], layer.name
        if layer.kind == "linear":
            return layer.tensors["weight"].shape[1], layer.name
        fields = self._fields(tree)
        groups = fields.get("groups")
        if layer.kind == "conv" and fields.get("transposed"):
            return layer.tensors["weight"].shape[0], layer.name
        if layer.kind == "conv" and groups is not None:
            return layer.tensors["weight"].shape[1] * groups, layer.name
        return None, ""

    def _given(self, tree: Tree[LayerRef]) -> tuple[int | None, str]:
        """Channels of a tree's output where its last layer settles them, and that layer's name."""
        if isinstance(tree, Chain):
            return self._given(tree.parts[-1])
        if isinstance(tree, Sum):
            return next((found for part in tree.parts if (found := self._given(part))[0] is not None), (None, ""))
        layer = self.layers[tree]
        if layer.kind in ("conv", "linear") and not self._fields(tree).get("transposed"):
            return layer.tensors["weight"].shape[0], layer.name
        return (None, "") if layer.kind in ("conv", "linear") else self._settled(tree)

    def _is_function(self, tree: Tree[LayerRef]) -> bool:
        return isinstance(tree, LayerRef) and self.layers[tree].kind == FUNCTION

    def _channels_into(self, parts: Sequence[Tree[LayerRef]]) -> int | None:
        """Channels of the input of a chain's rest or of a sum's branches, for a layer without tensors in front.

        Where nothing settles them, those that the next convolution takes with the one group it will be assumed to have.
        """
        channels = self._settled(Chain(tuple(parts)))[0]
        if channels is not None:
            return channels
        convs = (self.layers[ref] for part in parts for ref in leaves(part) if self.layers[ref].kind == "conv")
        following = next(convs, None)
        return None if following is None else following.tensors["weight"].shape[1]


def stored_dtype(chain: Sequence[LoweredLayer]) -> torch.dtype:
    """The dtype that the layers are stored in: that of the checkpoint's first convolution or linear layer, if any."""
    layers = [lowered.layer for lowered in chain if lowered.layer.tensors and lowered.origin == BASE]
    layers = layers or [lowered.layer for lowered in chain if lowered.layer.tensors]
    if not layers:
        raise UsageError("expected at least one layer with tensors")
    layer = next((layer for layer in layers if layer.kind in ("conv", "linear")), layers[0])
    numbers = [layer.tensors[name] for name in ("weight", "running_mean") if name in layer.tensors]
    dtype: torch.dtype = getattr(torch, (numbers or list(layer.tensors.values()))[0].dtype)
    return dtype


def _spatial_axes(layers: Sequence[Layer], flattened: int | None, given: int | None) -> int:
    """The spatial axes of a tree's input, as its convolutions tell, the feature map that it flattens, or `given`."""
    counts = {layer.name: layer.spatial_axes for layer in layers if layer.spatial_axes is not None}
    if flattened is not None:
        counts["flatten"] = flattened
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} has {axes}" for name, axes in counts.items())
        raise UsageError(f"layers of different numbers of spatial axes cannot be chained: {each}")
    axes = next(iter(counts.values()), given)
    linear = [layer.name for layer in layers if layer.kind == "linear"]
    if axes and linear and flattened is None:
        raise RefusedError(
            f"{linear[0]} is a linear layer: between it and a convolution there is a flatten or a pooling that the"
            f" checkpoint doesn't show; name it in the chain, such as flatten(7,7) before {linear[0]}"
        )
    if axes is None and not linear:
        raise UsageError(
            f"nothing tells how many spatial axes {layers[0].name} has; give --input-size with the channels in front"
        )
    return axes or 0


def _settle_conv(layer: Layer, fields: Fields, channels: int | None, known_from: str) -> tuple[Fields, list[str]]:
    """Groups inferred where the channels settle them, and the list of what was assumed."""
    assumed = []
    weight = layer.tensors["weight"].shape
    if "stride" not in fields:
        assumed.append("stride 1")
    if "padding" not in fields:
        assumed.append("padding 0")
    elif "padding_mode" not in fields and fields["padding"] != 0:
        assumed.append("padding_mode zeros")
    if "dilation" not in fields and any(k > 1 for k in weight[2:]):
        assumed.append("dilation 1")
    if "groups" not in fields:
        per_group = weight[1]
        if channels is not None and not fields.get("transposed") and per_group and channels % per_group == 0:
            groups = channels // per_group
            fields = fields | {"groups": groups}
            if groups != 1:
                assumed.append(f"groups {groups} ({channels} channels from {known_from}, {per_group} per group)")
        else:
            assumed.append("groups 1")
    # Its tensors tell a transposed layer by their shapes, unless it has as many output as input channels.
    if (
        "transposed" not in fields
        and weight[0] == weight[1] * fields.get("groups", 1)
        and any(k > 1 for k in weight[2:])
    ):
        assumed.append("not transposed")
    return fields, assumed
