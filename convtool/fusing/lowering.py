"""Trees of named layers, lowered: fields gathered from every source; what nobody states stays open."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import field_source, full_name
from convtool.core.conv import Computed
from convtool.core.fields import Fields
from convtool.core.tree import BASE, Chain, LayerRef, Stack, Sum, Tree, leaves
from convtool.errors import RefusedError, UsageError
from convtool.fusing.leaf import SHARED_FIELDS, LoweredLayer
from convtool.kinds.kind import Base, Channels, Layer
from convtool.kinds.stated import FieldSources, Known
from convtool.kinds.written import make_written, read_layer


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
    return lowering.lower(tree, Channels(channels, channels_from))[0]


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
        self.known: dict[LayerRef, Known] = {}
        used: set[str] = set()
        for ref in leaves(tree):
            layer = self.layers[ref] = self._find(ref)
            names = {full_name(name, ref.source) for name in layer.tensor_names()}
            if names & used and ref.source == BASE:  # another checkpoint keeps its tensors, whatever is made of them
                alone = f"; a tensor of it by itself is written kernel({ref.name}), or offset"
                raise UsageError(
                    f"{layer.name} is named twice; a fusion runs through each layer once"
                    f"{'' if ref.name == layer.name else alone}"
                )
            used |= names
            if layer.kind.adapts:
                self.layers[ref] = self._applied(ref, layer)
        self.axes = _spatial_axes(list(self.layers.values()), axes, input_size)
        for ref, layer in self.layers.items():
            if ref.written:
                self.layers[ref] = replace(layer, fields=layer.kind.over(layer.fields, self.axes))

    def _applied(self, ref: LayerRef, layer: Layer) -> Layer:
        """Return the change of a layer as a layer like that one."""
        fields = {name: value for name, value in self._known(ref).fields.items() if name in layer.kind.fields}
        del self.known[ref]  # what is known of it hangs on its kind
        of = ref.like or fields.get("of")
        if not of:
            raise UsageError(
                f"{ref}: changes another layer; a recipe says which: {{ layer = {str(ref)!r}, like = ... }}"
            )
        checkpoint = self.checkpoints[BASE]
        base = checkpoint.part(of)
        self.adapters[ref] = layer, {**fields, "of": of}
        return layer.kind.applied(layer, Base(base, lambda: checkpoint.tensor(base.tensors["weight"].name)), fields)

    def lower(
        self, tree: Tree[LayerRef], into: Channels, gives: int | None = None
    ) -> tuple[Tree[LoweredLayer], Channels]:
        """Return the lowered tree, and the channels of its output.

        Args:
            gives: the channels that its output has to have, where that is known.
        """
        if isinstance(tree, Chain):
            return self._lower_chain(tree, into, gives)
        if isinstance(tree, Sum):
            if into.channels is None:
                into = self._takes(tree, Channels(None))
            # For layers without tensors beside ones that don't settle it either; those go on to assume one group.
            guess = self._takes(tree, Channels(None), guess=True) if into.channels is None else into
            if isinstance(tree, Stack):
                return self._side_by_side(
                    [self.lower(part, guess if _is_written(part) else into) for part in tree.parts]
                )
            # What is added up has as many channels everywhere.
            known = gives if gives is not None else self._first(map(self._surely_gives, tree.parts)).channels
            lowered = [self.lower(part, guess if _is_written(part) else into, known) for part in tree.parts]
            return Sum(tuple(part for part, _ in lowered)), lowered[0][1]
        leaf = self._lower_leaf(tree, into, gives)
        return leaf, Channels(leaf.conv.out_channels, leaf.layer.name)

    def _side_by_side(
        self, branches: Sequence[tuple[Tree[LoweredLayer], Channels]]
    ) -> tuple[Tree[LoweredLayer], Channels]:
        """Return the sum of the branches, each placed behind the channels of those before it."""
        counts = [known.channels or 0 for _, known in branches]
        parts, first, total = list[Tree[LoweredLayer]](), 0, sum(counts)
        for (branch, _), count in zip(branches, counts, strict=True):
            layer = read_layer(f"place({first}:{first + count}; of={total})")
            conv = make_written(layer.name, count, self.axes)
            parts.append(Chain((branch, LoweredLayer(layer.name, conv, layer, layer.fields))))
            first += count
        return Sum(tuple(parts)), Channels(total, "the stack")

    def _find(self, ref: LayerRef) -> Layer:
        if ref.source not in self.checkpoints:
            paste = f"--with {shlex.quote(ref.source)}=FILE"
            raise UsageError(f"{ref}: no checkpoint is called {ref.source!r}; give its file: {paste}", paste)
        return self.checkpoints[ref.source].part(ref.name)

    def _known(self, ref: LayerRef) -> Known:
        """Return what is stated of a layer, by itself or by the one that it is like, and by whom."""
        layer = self.layers[ref]
        if ref.written:
            return Known(layer.fields, {})
        if ref in self.known:
            return self.known[ref]
        sources = self.sources.with_first(field_source(self.checkpoints[ref.source], ref.source))
        own = sources.known(full_name(layer.name, ref.source), layer)
        adapts = ref in self.adapters
        like = ref.like or (self.adapters[ref][1]["of"] if adapts else "")
        if adapts:
            own = own.only(layer.kind.fields)
        if like:
            base = self.checkpoints[BASE]
            liked = self.sources.with_first(field_source(base)).known(like, base.part(like))
            shared = layer.kind.fields if adapts else SHARED_FIELDS
            taken = {name: liked.fields[name] for name in shared if name in liked.fields} | own.fields
            own = replace(own, fields=taken, assumed=own.assumed | (liked.assumed & taken.keys() - own.fields.keys()))
        self.known[ref] = own
        return own

    def _lower_chain(
        self, chain: Chain[LayerRef], into: Channels, gives: int | None
    ) -> tuple[Tree[LoweredLayer], Channels]:
        parts: list[Tree[LoweredLayer]] = []
        for number, part in enumerate(chain.parts):
            guessed = into.channels is None and _is_written(part)
            if guessed:
                # What is only guessed for a layer without tensors is nothing for the next one to infer groups from.
                rest: Chain[LayerRef] = Chain(chain.parts[number:])
                known = self._takes(rest, Channels(None))
                guess = known if known.channels is not None else self._takes(rest, Channels(None), guess=True)
                parts.append(self.lower(part, guess)[0])
                into = self._gives(part, Channels(None))
            else:
                behind = chain.parts[number + 1 :]
                needed = self._takes(Chain(behind), Channels(gives)).channels if behind else gives
                lowered, into = self.lower(part, into, needed)
                parts.append(lowered)
        return Chain(tuple(parts)), into

    def _lower_leaf(self, ref: LayerRef, into: Channels, gives: int | None) -> LoweredLayer:
        layer, known, checkpoint, axes = self.layers[ref], self._known(ref), self.checkpoints[ref.source], self.axes
        if ref.written:
            return self._lower_written(ref, layer, into)
        kind, shapes = layer.kind, layer.shapes
        found, said = kind.infer(shapes, known.fields, into, gives)
        fields = {**known.fields, **found}
        conv = checkpoint.lower(layer, fields, axes)
        if into.channels not in (None, conv.in_channels):
            raise UsageError(
                f"channels don't fit: {layer.name} takes {conv.in_channels} channels, and {into.origin} gives"
                f" {into.channels}{self._other_reading(layer, into, conv.in_channels)}"
            )
        tried = kind.trials(shapes, fields, gives)
        bare = {name: value for name, value in fields.items() if name not in kind.by_rule}
        implied = kind.infer(shapes, bare, into, gives)[0].keys() & kind.by_rule
        adapter, scaling = self.adapters.get(ref, (layer, {}))
        if ref in self.adapters:
            conv = Computed(conv, lambda: checkpoint.lower(layer, fields, axes).weight)
        return LoweredLayer(
            full_name(layer.name, ref.source),
            conv,
            adapter,
            {**fields, **scaling},
            known.assumed,
            {name: tried.get(name, ()) for name in kind.defaults if name not in fields and name in kind.settable},
            frozenset(implied),
            tuple(said),
            known.overruled,
            checkpoint.record.rests_on().get(layer.name, ()) if checkpoint.record else (),
            ref.source,
            scaling.get("of", ref.like),
            layer,
            ref.unplaced,
            tuple(adapter.kind.assumed(adapter, scaling)),
        )

    def _lower_written(self, ref: LayerRef, layer: Layer, into: Channels) -> LoweredLayer:
        if layer.tensors:
            conv = self.checkpoints[ref.source].lower(layer, {}, self.axes, into.channels)
        elif into.channels is not None:
            conv = make_written(ref.name, into.channels, self.axes)
        else:
            raise UsageError(
                f"{ref}: the number of channels isn't known here; give --input-size with the channels in front"
            )
        return LoweredLayer(str(ref), conv, layer, layer.fields, origin=ref.source)

    def _other_reading(self, layer: Layer, into: Channels, takes: int) -> str:
        """Return a hint for channels that would fit, were one of the two layers read in another way; else ''."""
        for reading in layer.kind.other_readings(layer.shapes):
            if reading.takes == into.channels:
                return f"; they would if {layer.name} is {reading.what}: --set {layer.name}.{reading.setting}"
        for before in self.layers.values():
            for reading in before.kind.other_readings(before.shapes) if before.name == into.origin else ():
                if reading.gives == takes:
                    return f"; they would if {before.name} is {reading.what}: --set {before.name}.{reading.setting}"
        return ""

    def _takes(self, tree: Tree[LayerRef], gives: Channels, guess: bool = False) -> Channels:
        """Return the channels of a tree's input, as far as its layers or the output's channels settle them.

        Args:
            guess: take one group for convolutions of which nobody states any, which is what they are then assumed to
                have.
        """
        if isinstance(tree, Chain):
            return reduce(lambda known, part: self._takes(part, known, guess), reversed(tree.parts), gives)
        if isinstance(tree, Sum):
            if isinstance(tree, Stack):
                gives = Channels(None)
            elif gives.channels is None:  # what is added to something has as many channels
                gives = self._first(self._gives(part, Channels(None)) for part in tree.parts)
            return self._first(self._takes(part, gives, guess) for part in tree.parts)
        layer = self.layers[tree]
        fields = {**layer.kind.defaults, **self._known(tree).fields} if guess else self._known(tree).fields
        count = layer.kind.takes(layer.shapes, fields, gives.channels)
        return Channels(count, gives.origin if count == gives.channels and not layer.tensors else layer.name)

    def _surely_gives(self, tree: Tree[LayerRef]) -> Channels:
        """Return the channels of a tree's output, where its last layers leave no doubt of them."""
        last = tree
        while isinstance(last, Chain):
            last = last.parts[-1]
        if isinstance(last, Stack):
            return Channels(None)
        if isinstance(last, Sum):
            return self._first(map(self._surely_gives, last.parts))
        sure = self.layers[last].kind.trials(self.layers[last].shapes, {}, None) == {}
        return self._gives(last, Channels(None)) if sure and self.layers[last].tensors else Channels(None)

    def _gives(self, tree: Tree[LayerRef], takes: Channels) -> Channels:
        """Return the channels of a tree's output, as far as its layers or the input's channels settle them."""
        if isinstance(tree, Chain):
            return reduce(lambda known, part: self._gives(part, known), tree.parts, takes)
        if isinstance(tree, Sum):
            branches = [self._gives(part, takes) for part in tree.parts]
            if not isinstance(tree, Stack):
                return self._first(branches)
            counts = [one.channels for one in branches if one.channels is not None]
            return Channels(sum(counts) if len(counts) == len(branches) else None, "the stack")
        layer = self.layers[tree]
        return Channels(layer.kind.gives(layer.shapes, self._known(tree).fields, takes.channels), layer.name)

    @staticmethod
    def _first(found: Iterable[Channels]) -> Channels:
        return next((one for one in found if one.channels is not None), Channels(None))


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
            f"nothing tells how many spatial axes {layers[0].name or 'the bare module'} has; give --input-size with the"
            " channels in front"
        )
    return axes or 0
