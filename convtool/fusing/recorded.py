"""What stands for what in AFTER: read off its record, or off a recipe or a plan and what is gone.

Other programs keep no record. They fold a batch norm into the layer before it, in that layer's place, and leave the
rest alone. So what a recipe or a plan has as one fusion may be several of theirs, or none: the layers that AFTER still
has tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import FusionRecord, SourceLayer, full_name
from convtool.checkpoint.spelled import Spelled, spelled_out
from convtool.core.conv import Conv
from convtool.core.expression import fused_geometry, joined
from convtool.core.fields import Fields, geometry_fields
from convtool.core.rounding import dtype_name
from convtool.core.tree import BASE, Chain, LayerRef, Tree, first_leaves, leaves, map_leaves, tree_text
from convtool.errors import ConvtoolError, InputError, UsageError
from convtool.fusing.compare import Pairing, like_fused, same_numbers, standing
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree, stored_dtype
from convtool.fusing.recipe import PlannedFusion
from convtool.fusing.settle import settle
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.kinds.written import read_layer


def recorded_pairings(
    before: Checkpoint,
    after: Checkpoint,
    sources: FieldSources,
    others: Mapping[str, Checkpoint] | None = None,
    named: Sequence[Pairing] = (),
) -> list[Pairing]:
    """Return a pairing for each fusion that AFTER records and BEFORE doesn't.

    Geometry is as recorded, `sources` overruling it.

    Args:
        others: the other checkpoints that layers came from, by the names they were given.
        named: what stands in place of the record for the layers in it.

    Raises:
        InputError: the record doesn't fit the tensors.
    """
    if after.record is None:
        return []
    replaced = {leaf.layer.name for pairing in named for leaf in leaves(pairing.after)}
    taken = {leaf.layer.name for pairing in named for leaf in leaves(pairing.before) if leaf.own}
    history = _History(after, after.record.since(before.record), {BASE: before, **(others or {})}, sources)
    return [
        history.pairing(name, spelled)
        for name, spelled in spelled_out(history.fusions).items()
        if name not in replaced and taken.isdisjoint(one.name for one in leaves(spelled.tree) if one.origin == BASE)
    ]


@dataclass(frozen=True, slots=True)
class _History:
    """What AFTER's record has beyond BEFORE's.

    Attributes:
        checkpoints: BEFORE and others, by the origin that recorded layers name.
        sources: what else is said of BEFORE's layers.
    """

    after: Checkpoint
    fusions: Sequence[FusionRecord]
    checkpoints: Mapping[str, Checkpoint]
    sources: FieldSources

    def pairing(self, name: str, spelled: Spelled) -> Pairing:
        """Return what a layer of AFTER stands for."""
        self._check_layers(name, spelled.tree)
        last = next(fusion for fusion in reversed(self.fusions) if fusion.name == name)
        # The layer stands between what gives and takes the form of its tensors.
        around = Chain(tuple(LayerRef(one) for one in (last.before, name, last.after) if one))
        try:
            fused = lower_tree({BASE: self.after}, around, FieldSources())
        except UsageError as error:
            raise self._does_not_fit(error) from None
        stands = next(leaves(fused)).conv
        layers = self._lowered(spelled.tree, stands)
        # Batch norms by themselves don't tell how many axes there are.
        if next(leaves(layers)).conv.spatial_axes != stands.spatial_axes:  # a matrix fused further in its flat form
            raise InputError(
                f"{self.after.path}: its record can't say how {name!r}, which takes flat numbers, stands for layers"
                " over feature maps; name them: --before a,b --after c"
            )
        (layers,) = settle([layers], self.checkpoints, self.sources.assume)
        return Pairing(
            name,
            layers,
            like_fused(fused, layers),
            spelled.sizes,
            spelled.dtypes,
            str(self.after.path),
            last.dtype,
            (*_claims(layers, self.sources), *_fused_claims(last, layers, fused)),
            self._taken(),
            last.gives,
        )

    def _check_layers(self, name: str, tree: Tree[SourceLayer]) -> None:
        """Raise InputError where the record names a layer that isn't there, or takes one for what it isn't."""
        if name not in self.after.layers:
            raise self._lacks(self.after, name)
        for source in leaves(tree):
            if not source.written and source.origin not in self.checkpoints:
                continue  # which is said where it is read
            opened = self.checkpoints[BASE if source.written else source.origin]
            if source.origin == BASE and not source.written and not _has_layer(opened, source.name):
                raise self._lacks(opened, source.name)
            found = (read_layer(source.name) if source.written else opened.part(source.name)).kind
            if source.kind is not found:
                raise InputError(
                    f"{self.after.path}: its convtool record is damaged: it calls {source.name!r} a"
                    f" {source.kind.label}, and it is a {found.label}"
                )

    def _lacks(self, opened: Checkpoint, name: str) -> InputError:
        made = f"; {self.after.path} was made of another file" if opened is not self.after else ""
        return InputError(f"{opened.path}: has no layer {name!r}, which the record of {self.after.path} names{made}")

    def _lowered(self, tree: Tree[SourceLayer], stands: Conv) -> Tree[LoweredLayer]:
        """Return the layers of BEFORE; an error is the record's, unless what else is said of them may be the cause."""
        fields: dict[str, dict[str, object]] = {}
        assumed: dict[str, set[str]] = {}
        for source in leaves(tree):
            name = full_name(source.name, source.origin)
            fields.setdefault(name, {}).update(source.fields)
            assumed.setdefault(name, set()).update(source.assumed)
        known = FieldSource(f"the record of {self.after.path}", fields, exact_names=True, assumed=assumed)
        refs = map_leaves(lambda one: LayerRef(one.name, one.origin, one.like, one.unplaced), tree)
        # What is written in front doesn't tell its channels.
        channels = stands.in_channels if any(source.written for source in first_leaves(tree)) else None
        axes = stands.spatial_axes
        try:
            return lower_tree(self.checkpoints, refs, self.sources.with_first(known), axes=axes, channels=channels)
        except UsageError as error:
            lacking = any(not one.written and one.origin not in self.checkpoints for one in leaves(tree))
            if lacking or any(map(self.sources.fields, fields)):
                raise
            raise self._does_not_fit(error) from None

    def _does_not_fit(self, error: UsageError) -> InputError:
        what = str(error).removeprefix(f"{self.after.path}: ")
        return InputError(f"{self.after.path}: its convtool record doesn't fit the tensors: {what}")

    def _taken(self) -> dict[str, str]:
        """Return the digests of the tensors that the first of the fusions found, and none of them made."""
        taken: dict[str, str] = {}
        made: set[str] = set()
        for fusion in self.fusions:
            taken |= {name: digest for name, digest in fusion.takes.items() if name not in made}
            made |= fusion.gives.keys()
        return taken


def _has_layer(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether there is a layer of exactly that name, or a tensor of it that went into a fusion as a scale."""
    try:
        return checkpoint.part(name).name == name
    except UsageError:
        return False


def _claims(tree: Tree[LoweredLayer], sources: FieldSources) -> Iterator[tuple[str, str]]:
    """Yield the fields of recorded layers that nobody else states, and that nothing in BEFORE shows."""
    whole = {leaf.name for leaf in leaves(tree)}
    for leaf in leaves(tree):
        kind, stated = leaf.layer.kind, sources.fields(leaf.name)
        shown = {"of"} if leaf.fields.get("of") in whole else set()  # that an adapter changes what it is added to
        shown |= stated.keys() | leaf.implied
        claimed = {name: value for name, value in leaf.known.items() if name not in shown}
        for assumed in (False, True) if kind.settable else ():
            some = {name: value for name, value in claimed.items() if (name in leaf.assumed) == assumed}
            if said := kind.claim(some, leaf.layer.shapes):
                yield leaf.name, f"assumed {said.replace(', ', ', assumed ')}" if assumed else said
        if leaf.like and leaf.fields.get("of") not in whole:
            yield leaf.name, f"all that nobody states is as {leaf.like} has it"


def _fused_claims(
    fusion: FusionRecord, tree: Tree[LoweredLayer], fused: Tree[LoweredLayer]
) -> Iterator[tuple[str, str]]:
    """Yield what is recorded of the fused layer and isn't what its sources make it: another dtype or geometry."""
    if fusion.dtype != dtype_name(stored_dtype(list(leaves(tree)))):
        yield f"the fused {fusion.name}", f"stored in {fusion.dtype}"
    layer = next(leaf for leaf in leaves(fused) if leaf.own)
    expected: Fields = {}
    with contextlib.suppress(ConvtoolError):  # no single layer stands for it, and all of the fields are claimed
        expected = geometry_fields(fused_geometry(map_leaves(lambda leaf: leaf.conv, joined(tree))))
    recorded = {name: value for name, value in layer.fields.items() if name in fusion.fields}
    kind = layer.layer.kind
    as_expected = {
        name
        for name in recorded.keys() & expected.keys()
        if kind.say(name, recorded[name]) == kind.say(name, expected[name])
    }
    if kind.settable and as_expected != recorded.keys():
        yield f"the fused {fusion.name}", kind.claim(recorded, layer.layer.shapes)


def claimed_pairings(
    checkpoints: Mapping[str, Checkpoint],
    after: Checkpoint,
    fusions: Sequence[PlannedFusion],
    sources: FieldSources,
    origin: str,
    *,
    skip: bool = False,
) -> list[Pairing]:
    """Return a pairing for each part of each fusion that AFTER has otherwise than BEFORE.

    Args:
        checkpoints: BEFORE and others, by the source that layers name.
        sources: fields of BEFORE's layers.
        origin: who says so, for messages.
        skip: leave out what AFTER has no layer for, or one of another shape.

    Raises:
        UsageError: AFTER lacks the layer that is to stand for others; fields or channels that don't fit.
    """
    found: list[tuple[Tree[LoweredLayer], list[str]]] = []
    for fusion in fusions:
        try:
            for tree, stands in _parts(fusion, checkpoints[BASE], after, origin):
                found.append((lower_tree(checkpoints, tree, sources, fusion.input_size), stands))
        except UsageError:
            if not skip:
                raise
    settled = settle([before for before, _ in found], checkpoints, sources.assume)
    pairings = []
    for before, (_, stands) in zip(settled, found, strict=True):
        try:
            pairings.append(Pairing(",".join(stands), before, standing(stands, before, after, FieldSources())))
        except UsageError:
            if not skip:
                raise
    return pairings


def not_named(fusions: Sequence[PlannedFusion], named: Sequence[Pairing]) -> list[PlannedFusion]:
    """Return the fusions of layers that no pairing by name is about."""
    taken = {leaf.layer.name for pairing in named for leaf in leaves(pairing.before) if leaf.own}
    return [one for one in fusions if taken.isdisjoint(ref.name for ref in leaves(one.tree) if ref.source == BASE)]


def _parts(
    fusion: PlannedFusion, before: Checkpoint, after: Checkpoint, origin: str
) -> list[tuple[Tree[LayerRef], list[str]]]:
    """Return the parts of a fusion that were carried out, each with the layers of AFTER that stand for it."""
    own = [ref for ref in leaves(fusion.tree) if ref.source == BASE and not ref.written]
    others = any(ref.source != BASE for ref in leaves(fusion.tree))
    if not others and all(_is_same(ref, before, after) for ref in own):
        return []  # it wasn't carried out
    kept = [ref.name for ref in own if ref.name in after.layers]
    refs = [part for part in getattr(fusion.tree, "parts", ()) if isinstance(part, LayerRef)]
    plain = isinstance(fusion.tree, Chain) and len(refs) == len(fusion.tree.parts)
    if not plain or not kept:
        name = fusion.name or own[0].name
        if name not in after.layers:
            raise UsageError(
                f"{after.path}: has no layer {name!r}, which by {origin} stands for {tree_text(fusion.tree)}; name what"
                " stands for it: --before a,b --after c"
            )
        return [(fusion.tree, [name])]
    pieces: list[list[LayerRef]] = [[]]
    for ref in refs:
        if ref.name in kept and any(one.name in kept for one in pieces[-1]):
            pieces.append([])
        pieces[-1].append(ref)
    changed = [piece for piece in pieces if not all(_is_same(ref, before, after) for ref in piece)]
    if any(len(piece) == 1 for piece in changed):  # then it isn't each by itself that is the same
        return [(fusion.tree, kept)]
    return [(Chain(tuple(piece)), [ref.name for ref in piece if ref.name in kept]) for piece in changed]


def _is_same(ref: LayerRef, before: Checkpoint, after: Checkpoint) -> bool:
    """Tell whether AFTER has a layer just as BEFORE has it."""
    names = list(before.part(ref.name).tensor_names()) if ref.source == BASE else []
    return all(name in after.infos and same_numbers(before, after, name) for name in names)
