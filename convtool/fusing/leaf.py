"""A layer of a tree, lowered, with what is known of its fields and what isn't; and what there is to say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from convtool.checkpoint.record import PLACE, SourceLayer
from convtool.core.expression import split_input_size
from convtool.core.fields import Fields
from convtool.core.fuse import NamedConv
from convtool.core.names import grouped, is_written
from convtool.core.tree import BASE, Tree, leaves
from convtool.kinds.kind import Kind, Layer

SHARED_FIELDS = ("stride", "padding", "dilation", "padding_mode")  # what a layer takes from the one that it is like


@dataclass(frozen=True, slots=True, eq=False)
class LoweredLayer(NamedConv):
    """One layer of a tree, its name with the checkpoint in front where that isn't the one that is changed.

    Attributes:
        layer: as found in the checkpoint, or written.
        fields: those that are known: stated, inferred or assumed.
        assumed: which of them nobody stated.
        open: those that nobody knows, with values to try for those that only geometry hangs on; `conv` has torch's
            default of each.
        implied: those that its tensors and its neighbours fix, whoever else states them.
        inferred, overruled: what else there is to say of its fields, in words.
        rests_on: what was assumed when it was made, (layer, what).
        like: the layer that it shares `SHARED_FIELDS` with, known or not.
        form: the layer that it is computed as, where that is another: an adapter's change is one like its base.
        unplaced: nobody states that it runs right behind the layer before it.
        unsaid: what else nobody says of it, in words.
        origin: the checkpoint that it is from, BASE for the one that is changed.
    """

    layer: Layer
    fields: Fields
    assumed: frozenset[str] = frozenset()
    open: Mapping[str, Sequence[object]] = field(default_factory=dict)
    implied: frozenset[str] = frozenset()
    inferred: tuple[str, ...] = ()
    overruled: tuple[str, ...] = ()
    rests_on: tuple[tuple[str, str], ...] = ()
    origin: str = BASE
    like: str = ""
    form: Layer | None = None
    unplaced: bool = False
    unsaid: tuple[str, ...] = ()

    @property
    def computed(self) -> Layer:
        """Return the layer that it is computed as, whose kind says what its geometry's fields are."""
        return self.form or self.layer

    @property
    def own(self) -> bool:
        """Return whether it is a layer of the checkpoint that is changed."""
        return bool(self.layer.tensors) and self.origin == BASE

    def owned(self) -> tuple[str, Kind] | None:
        """Return name and kind of a layer of the checkpoint that is changed; None of any other."""
        return (self.name, self.layer.kind) if self.own else None

    @property
    def own_fields(self) -> Fields:
        """Return the fields that the kind has that it is computed as."""
        return {name: value for name, value in self.fields.items() if name in self.computed.kind.fields}

    @property
    def known(self) -> Fields:
        """Return the fields in the form that records have."""
        if is_written(self.layer.name):
            return {}
        form = self.computed
        return {**self.fields, **form.kind.written_out(self.own_fields, form.shapes)}

    def assumptions(self) -> list[tuple[str, str]]:
        """Return what it rests on that nobody stated, (layer, what)."""
        kind = self.computed.kind
        said = [*self.unsaid, *(kind.say(name, value) for name, value in self.known.items() if name in self.assumed)]
        recorded = [(name, f"{what} (when {self.name} was made)") for name, what in self.rests_on]
        placed = [(self.name, PLACE)] if self.unplaced else []
        return [*([(self.name, ", ".join(said))] if said else []), *placed, *recorded]

    def source(self) -> SourceLayer:
        """Return what a record says of it."""
        like = self.like if any(name in SHARED_FIELDS for name in self.open) else ""
        assumed = tuple(sorted(self.assumed))
        return SourceLayer(self.layer.name, self.layer.kind, self.known, self.origin, assumed, like, self.unplaced)

    def variable(self, name: str) -> str:
        """Return what an open field is called that layers may share."""
        return f"{self.like if self.like and name in SHARED_FIELDS else self.name}.{name}"

    def with_field(self, name: str, value: object, *, assumed: bool = False, said: str = "") -> LoweredLayer:
        """Return the layer with a field of its geometry known that was open.

        Args:
            said: what there is to say of it.
        """
        fields = {**self.fields, name: value}
        still_open = {field: values for field, values in self.open.items() if field != name}
        geometry = self.computed.kind.with_fields(self.conv.geometry, {**self.own_fields, name: value})
        return replace(
            self,
            conv=self.conv if geometry == self.conv.geometry else self.conv.with_geometry(geometry),
            fields=fields,
            open=still_open,
            assumed=self.assumed | {name} if assumed else self.assumed,
            inferred=(*self.inferred, said) if said else self.inferred,
        )


def spatial_size(tree: Tree[LoweredLayer], input_size: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the spatial sizes of a tree's input, of those with or without the channels in front."""
    first = next(leaves(tree)).conv
    return None if input_size is None else split_input_size(input_size, first.in_channels, first.spatial_axes)


def said_of(layers: Iterable[LoweredLayer]) -> list[str]:
    """Return what there is to say of where the fields of layers are from: assumed, inferred, or against a source."""
    found = list(layers)
    said = {
        "assumed": [one for leaf in found for one in leaf.assumptions()],
        "inferred": [(leaf.name, what) for leaf in found for what in leaf.inferred],
        "overruled": [(leaf.name, what) for leaf in found for what in leaf.overruled],
    }
    return [f"{how}: {line}" for how, each in said.items() for line in grouped(each)]
