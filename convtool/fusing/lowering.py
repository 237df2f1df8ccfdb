"""Trees of named layers, lowered: fields gathered from every source, the rest settled, or assumed and said so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Computed
from convtool.core.expression import Expression, joined
from convtool.core.fields import Fields
from convtool.core.fuse import NamedConv
from convtool.core.names import is_written
from convtool.core.tree import BASE, Chain, LayerRef, Stack, Sum, Tree, leaves, map_leaves
from convtool.errors import RefusedError, UsageError
from convtool.kinds.kind import Base, Layer
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.kinds.written import make_written, read_layer

MOST_NAMES = 3  # layers named one by one before the rest is only counted
SHARED_FIELDS = ("stride", "padding", "dilation", "padding_mode")  # what a layer takes from the one that it is like


@dataclass(frozen=True, slots=True, eq=False)
class LoweredLayer(NamedConv):
    """One layer of a tree, its name with the checkpoint in front where that isn't the one that is changed.

    Attributes:
        layer: as found in the checkpoint, or written.
        fields: all of its fields, the assumed ones too.
        assumed: what nobody stated, in words; '' where everything was stated.
        origin: the checkpoint that it is from, BASE for the one that is changed.
    """

    layer: Layer
    fields: Fields
    assumed: str
    origin: str = BASE

    @property
    def own(self) -> bool:
        """Return whether it is a layer of the checkpoint that is changed."""
        return bool(self.layer.tensors) and self.origin == BASE

    def source(self) -> SourceLayer:
        """Return what a record says of it."""
        fields = {} if is_written(self.layer.name) else self.fields
        return SourceLayer(self.layer.name, self.layer.kind, fields, self.origin)


def full_name(name: str, origin: str) -> str:
    """Return a layer's name as fields and messages call it: that of another checkpoint with NAME: in front."""
    return str(LayerRef(name, origin))


def grouped(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return what is said of layers, (layer, what), as lines; once where it is the same of many."""
    layers: dict[str, list[str]] = {}
    for layer, what in dict.fromkeys(said):
        layers.setdefault(what, []).append(layer)
    return [
        f"{name}: {what}"
        for what, names in layers.items()
        for name in (names if len(names) <= MOST_NAMES else [some_of(names)])
    ]


def some_of(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def recorded(checkpoint: Checkpoint, origin: str = BASE) -> FieldSource:
    """Return what a checkpoint says about its own layers: as convtool wrote it down, or as its format has it."""
    record = checkpoint.record
    known = record.fields() if record else checkpoint.stated
    tables = {full_name(name, origin): fields for name, fields in known.items()}
    return FieldSource("record" if record else str(checkpoint.path), tables, exact_names=True)


def lower_chain(
    checkpoint: Checkpoint,
    names: Sequence[str],
    sources: FieldSources,
    input_size: Sequence[int] | None = None,
) -> list[LoweredLayer]:
    """Lower the named layers of one checkpoint, first to last; see `lower_tree`."""
    tree = Chain(tuple(LayerRef(name) for name in names))
    return list(leaves(lower_tree({BASE: checkpoint}, tree, sources, input_size)))


def lower_tree(
    checkpoints: Mapping[str, Checkpoint],
    tree: Tree[LayerRef],
    sources: FieldSources,
    input_size: Sequence[int] | None = None,
    *,
    axes: int | None = None,
    channels: int | None = None,
    channels_from: str = "--input-size",
) -> Tree[LoweredLayer]:
    """Lower a tree of names, with the fields from `sources` (the checkpoint's record comes before them).

    Args:
        checkpoints: by the source that the names give; BASE is the one that is changed.
        input_size: of the tree's input, with or without the channels in front. With them it settles groups that nobody
            stated, and tells the spatial axes of layers that don't.
        axes, channels: of the tree's input, where something else than its size tells.
        channels_from: what says so of the channels, for messages.

    Raises:
        UsageError: an unknown layer, one named twice, fields or channels that don't fit.
        InputError: a layer that isn't linear, or holds inf or NaN.
        RefusedError: layers that cannot be chained here.
    """
    lowering = _TreeLowering(checkpoints, tree, sources, axes, input_size)
    if input_size is not None and len(input_size) == lowering.axes + 1:
        channels = input_size[0]
    return lowering.lower(tree, _Channels(channels, channels_from))[0]


class _Channels(NamedTuple):
    """A number of channels, where it is known, and the layer that says so."""

    channels: int | None
    origin: str = ""


class _TreeLowering:
    """The layers of one tree, found and lowered; channels are passed along from layer to layer."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        tree: Tree[LayerRef],
        sources: FieldSources,
        axes: int | None,
        input_size: Sequence[int] | None,
    ) -> None:
        self.checkpoints = checkpoints
        self.sources = sources
        self.layers: dict[LayerRef, Layer] = {}
        self.adapters: dict[LayerRef, tuple[Layer, Fields]] = {}
        used: set[str] = set()
        for ref in leaves(tree):
            layer = self.layers[ref] = self._find(ref)
            names = {full_name(name, ref.source) for name in layer.tensor_names()}
            if names & used:
                raise UsageError(f"{layer.name} is named twice; a fusion runs through each layer once")
            used |= names
            if layer.kind.adapts:
                self.layers[ref] = self._applied(ref, layer)
        self.axes = _spatial_axes(list(self.layers.values()), axes, input_size)
        for ref, layer in self.layers.items():
            if ref.written:
                self.layers[ref] = replace(layer, fields=layer.kind.over(layer.fields, self.axes))

    def _applied(self, ref: LayerRef, layer: Layer) -> Layer:
        """Return the change of a layer as a layer like that one."""
        fields = {name: value for name, value in self._fields(ref).items() if name in layer.kind.fields}
        of = ref.like or fields.get("of")
        if not of:
            raise UsageError(
                f"{ref}: changes another layer; a recipe says which: {{ layer = {str(ref)!r}, like = ... }}"
            )
        checkpoint = self.checkpoints[BASE]
        base = checkpoint.part(of)
        self.adapters[ref] = layer, {**fields, "of": of}
        return layer.kind.applied(layer, Base(base, lambda: checkpoint.tensor(base.tensors["weight"].name)), fields)

    def lower(self, tree: Tree[LayerRef], into: _Channels) -> tuple[Tree[LoweredLayer], _Channels]:
        """Return the lowered tree, and the channels of its output."""
        if isinstance(tree, Chain):
            return self._lower_chain(tree, into)
        if isinstance(tree, Sum):
            if into.channels is None:
                into = self._takes(tree, _Channels(None))
            # For layers without tensors beside ones that don't settle it either; those go on to assume one group.
            guess = self._takes(tree, _Channels(None), guess=True) if into.channels is None else into
            lowered = [self.lower(part, guess if _is_written(part) else into) for part in tree.parts]
            if isinstance(tree, Stack):
                return self._side_by_side(lowered)
            return Sum(tuple(part for part, _ in lowered)), lowered[0][1]
        leaf = self._lower_leaf(tree, into)
        return leaf, _Channels(leaf.conv.out_channels, leaf.layer.name)

    def _side_by_side(
        self, branches: Sequence[tuple[Tree[LoweredLayer], _Channels]]
    ) -> tuple[Tree[LoweredLayer], _Channels]:
        """Return the sum of the branches, each placed behind the channels of those before it."""
        counts = [known.channels or 0 for _, known in branches]
        parts, first, total = list[Tree[LoweredLayer]](), 0, sum(counts)
        for (branch, _), count in zip(branches, counts, strict=True):
            layer = read_layer(f"place({first}:{first + count}; of={total})")
            conv = make_written(layer.name, count, self.axes)
            parts.append(Chain((branch, LoweredLayer(layer.name, conv, layer, layer.fields, ""))))
            first += count
        return Sum(tuple(parts)), _Channels(total, "the stack")

    def _find(self, ref: LayerRef) -> Layer:
        if ref.source not in self.checkpoints:
            raise UsageError(f"{ref}: no checkpoint is called {ref.source!r}; give it with --with {ref.source}=FILE")
        return self.checkpoints[ref.source].part(ref.name)

    def _fields(self, ref: LayerRef) -> Fields:
        """Return what is stated of a layer, by itself or by the one that it is like."""
        layer = self.layers[ref]
        if ref.written:
            return layer.fields
        sources = self.sources.with_first(recorded(self.checkpoints[ref.source], ref.source))
        own = sources.fields(full_name(layer.name, ref.source))
        adapts = ref in self.adapters
        if adapts:
            own = {field: value for field, value in own.items() if field in layer.kind.fields}
        if not ref.like:
            return own
        like = self.sources.with_first(recorded(self.checkpoints[BASE])).fields(ref.like)
        return {field: like[field] for field in (layer.kind.fields if adapts else SHARED_FIELDS) if field in like} | own

    def _lower_chain(self, chain: Chain[LayerRef], into: _Channels) -> tuple[Tree[LoweredLayer], _Channels]:
        parts: list[Tree[LoweredLayer]] = []
        for number, part in enumerate(chain.parts):
            guessed = into.channels is None and _is_written(part)
            if guessed:
                # What is only guessed for a layer without tensors is nothing for the next one to infer groups from.
                rest: Chain[LayerRef] = Chain(chain.parts[number:])
                known = self._takes(rest, _Channels(None))
                guess = known if known.channels is not None else self._takes(rest, _Channels(None), guess=True)
                parts.append(self.lower(part, guess)[0])
                into = self._gives(part, _Channels(None))
            else:
                lowered, into = self.lower(part, into)
                parts.append(lowered)
        return Chain(tuple(parts)), into

    def _lower_leaf(self, ref: LayerRef, into: _Channels) -> LoweredLayer:
        layer = self.layers[ref]
        if not layer.tensors:
            if into.channels is None:
                raise UsageError(
                    f"{ref}: the number of channels isn't known here; give --input-size with the channels in front"
                )
            return LoweredLayer(ref.name, make_written(ref.name, into.channels, self.axes), layer, layer.fields, "")
        if ref.written:
            conv = self.checkpoints[ref.source].lower(layer, {}, self.axes, into.channels)
            return LoweredLayer(str(ref), conv, layer, layer.fields, "", ref.source)
        fields, assumed = layer.kind.settle(layer.shapes, self._fields(ref), into.channels, into.origin)
        conv = self.checkpoints[ref.source].lower(layer, fields, self.axes)
        if into.channels is not None and conv.in_channels != into.channels:
            raise UsageError(
                f"channels don't fit: {layer.name} takes {conv.in_channels} channels, and {into.origin} gives"
                f" {into.channels}{self._other_reading(layer, into, conv.in_channels)}"
            )
        full = layer.kind.full_fields(conv, fields)
        name = full_name(layer.name, ref.source)
        if ref in self.adapters:  # its base says the same of the geometry
            checkpoint, applied, axes = self.checkpoints[ref.source], layer, self.axes
            conv = Computed(conv, lambda: checkpoint.lower(applied, fields, axes).weight)
            layer, scaling = self.adapters[ref]
            full, assumed = {**full, **scaling}, layer.kind.assumed(layer, scaling)
        said = f"{name}: {', '.join(assumed)}" if assumed else ""
        return LoweredLayer(name, conv, layer, full, said, ref.source)

    def _other_reading(self, layer: Layer, into: _Channels, takes: int) -> str:
        """Return a hint for channels that would fit, were one of the two layers read in another way; else ''."""
        for reading in layer.kind.other_readings(layer.shapes):
            if reading.takes == into.channels:
                return f"; they would if {layer.name} is {reading.what}: --set {layer.name}.{reading.setting}"
        for before in self.layers.values():
            for reading in before.kind.other_readings(before.shapes) if before.name == into.origin else ():
                if reading.gives == takes:
                    return f"; they would if {before.name} is {reading.what}: --set {before.name}.{reading.setting}"
        return ""

    def _takes(self, tree: Tree[LayerRef], gives: _Channels, guess: bool = False) -> _Channels:
        """Return the channels of a tree's input, as far as its layers or the output's channels settle them.

        Args:
            guess: take one group for convolutions of which nobody states any, which is what they are then assumed to
                have.
        """
        if isinstance(tree, Chain):
            return reduce(lambda known, part: self._takes(part, known, guess), reversed(tree.parts), gives)
        if isinstance(tree, Sum):
            if isinstance(tree, Stack):
                gives = _Channels(None)
            elif gives.channels is None:  # what is added to something has as many channels
                gives = self._first(self._gives(part, _Channels(None)) for part in tree.parts)
            return self._first(self._takes(part, gives, guess) for part in tree.parts)
        layer = self.layers[tree]
        fields = {**layer.kind.defaults, **self._fields(tree)} if guess else self._fields(tree)
        count = layer.kind.takes(layer.shapes, fields, gives.channels)
        return _Channels(count, gives.origin if count == gives.channels and not layer.tensors else layer.name)

    def _gives(self, tree: Tree[LayerRef], takes: _Channels) -> _Channels:
        """Return the channels of a tree's output, as far as its layers or the input's channels settle them."""
        if isinstance(tree, Chain):
            return reduce(lambda known, part: self._gives(part, known), tree.parts, takes)
        if isinstance(tree, Sum):
            branches = [self._gives(part, takes) for part in tree.parts]
            if not isinstance(tree, Stack):
                return self._first(branches)
            counts = [one.channels for one in branches if one.channels is not None]
            return _Channels(sum(counts) if len(counts) == len(branches) else None, "the stack")
        layer = self.layers[tree]
        return _Channels(layer.kind.gives(layer.shapes, self._fields(tree), takes.channels), layer.name)

    @staticmethod
    def _first(found: Iterable[_Channels]) -> _Channels:
        return next((one for one in found if one.channels is not None), _Channels(None))


def as_computed(chain: Sequence[LoweredLayer]) -> Expression:
    """Return a chain's layers as they are computed with, what only moves numbers read through by the layer behind."""
    tree: Tree[LoweredLayer] = Chain(tuple(chain))
    return map_leaves(lambda leaf: leaf.conv, joined(tree))


def stored_dtype(layers: Sequence[LoweredLayer]) -> torch.dtype:
    """Return the dtype that the layers are stored in: that of the checkpoint's first main layer, if it has one."""
    stored = [lowered.layer for lowered in layers if lowered.own]
    stored = stored or [lowered.layer for lowered in layers if lowered.layer.tensors]
    if not stored:
        raise UsageError("expected at least one layer with tensors")
    layer = next((layer for layer in stored if layer.kind.main), stored[0])
    name = next(name for name in layer.kind.tensors if name in layer.tensors)
    dtype: torch.dtype = getattr(torch, layer.tensors[name].dtype)
    return dtype


def _is_written(tree: Tree[LayerRef]) -> bool:
    return all(leaf.written for leaf in leaves(tree))


def _spatial_axes(layers: Sequence[Layer], given: int | None, size: Sequence[int] | None) -> int:
    """Return the spatial axes of a tree's input: as its layers tell, or as given, or those of a size with channels."""
    counts = {layer.name: axes for layer in layers if (axes := layer.axes()) is not None}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} has {axes}" for name, axes in counts.items())
        raise UsageError(f"layers of different numbers of spatial axes cannot be chained: {each}")
    axes = next(iter(counts.values()), given)
    last = [layer.name for layer in layers if layer.kind.channels_last]
    if axes and last and not any(layer.kind.reshapes for layer in layers):
        raise RefusedError(
            f"{last[0]} is a linear layer: between it and a convolution there is a flatten or a pooling that the"
            f" checkpoint doesn't show; name it in the chain, such as flatten(7,7) before {last[0]}"
        )
    if axes is None and not last:
        if size is not None:
            return len(size) - 1
        raise UsageError(
            f"nothing tells how many spatial axes {layers[0].name} has; give --input-size with the channels in front"
        )
    return axes or 0
