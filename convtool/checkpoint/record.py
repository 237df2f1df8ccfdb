"""What convtool did to a checkpoint, as the JSON that travels with it.

In .safetensors it is the value of `__metadata__["convtool"]`; beside a .pt it is the file OUT.convtool.json. It holds
no time and no path, so that equal inputs give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from convtool.core.fields import Fields, parse_field
from convtool.core.tree import BASE, Chain, Sum, Tree, leaves
from convtool.errors import InputError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """A layer that went into a fusion.

    Attributes:
        name: its module path; of a layer without tensors, what was written in its place ('avg_pool(2)').
        kind: as in `convtool.checkpoint.info`.
        fields: every field that its checkpoint doesn't hold.
        origin: the other checkpoint that it came from, by the name it was given; BASE for the one that was changed.
    """

    name: str
    kind: str
    fields: Fields
    origin: str = BASE

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"name": self.name, "kind": self.kind, "fields": self.fields}
        return document | ({"origin": self.origin} if self.origin else {})


@dataclass(frozen=True, slots=True)
class FusionRecord:
    """One fusion.

    Attributes:
        name: the layer that stands for the others.
        tree: those, in chains and sums.
        fields: the fused layer's geometry.
        dtype: of its tensors.
        exact: whether it equals the sources (at `input_size`, or at every size where that is None).
        rim: where not: per axis, how many rows at the start and at the end differ.
    """

    name: str
    tree: Tree[SourceLayer]
    fields: Fields
    dtype: str
    exact: bool
    input_size: tuple[int, ...] | None
    rim: tuple[tuple[int, int], ...]

    @property
    def sources(self) -> tuple[SourceLayer, ...]:
        """Every layer of the tree, in order."""
        return tuple(leaves(self.tree))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sources": _tree_to_json(self.tree),
            "fields": self.fields,
            "dtype": self.dtype,
            "exact": self.exact,
            "input_size": None if self.input_size is None else list(self.input_size),
            "rim": [list(sides) for sides in self.rim],
        }


@dataclass(frozen=True, slots=True)
class Record:
    """All fusions of a checkpoint's history, oldest first."""

    version: str
    fusions: tuple[FusionRecord, ...] = field(default=())

    def appended(self, version: str, fusions: Sequence[FusionRecord]) -> Record:
        return replace(self, version=version, fusions=(*self.fusions, *fusions))

    def fields(self) -> dict[str, Fields]:
        """Geometry of the layers that convtool itself made, by name; the last fusion of a name counts."""
        known: dict[str, Fields] = {}
        for fusion in self.fusions:
            for source in fusion.sources:
                if source.origin == BASE:
                    known.pop(source.name, None)
            known[fusion.name] = fusion.fields
        return known

    def since(self, earlier: Record | None) -> tuple[FusionRecord, ...]:
        """The fusions that came after `earlier`, whose history must be the beginning of this one."""
        done = () if earlier is None else earlier.fusions
        if self.fusions[: len(done)] != done:
            raise InputError("the record in AFTER doesn't continue the one in BEFORE; they are of different histories")
        return self.fusions[len(done) :]

    def dumps(self) -> str:
        document = {
            "schema": SCHEMA,
            "version": self.version,
            "fusions": [fusion.to_json() for fusion in self.fusions],
        }
        return json.dumps(document, separators=(",", ":"))


def trees_of(fusions: Sequence[FusionRecord]) -> dict[str, Tree[SourceLayer]]:
    """For each layer that the fusions left behind, the layers it stands for, fusions of fused layers spelled out."""
    made: dict[str, Tree[SourceLayer]] = {}
    for fusion in fusions:
        made[fusion.name] = _spell_out(fusion.tree, made)
    return made


def _spell_out(tree: Tree[SourceLayer], made: dict[str, Tree[SourceLayer]]) -> Tree[SourceLayer]:
    if isinstance(tree, Chain):
        return Chain(tuple(_spell_out(part, made) for part in tree.parts))
    if isinstance(tree, Sum):
        return Sum(tuple(_spell_out(part, made) for part in tree.parts))
    return made.pop(tree.name, tree) if tree.origin == BASE else tree


def _tree_to_json(tree: Tree[SourceLayer]) -> dict[str, Any]:
    if isinstance(tree, Chain):
        return {"chain": [_tree_to_json(part) for part in tree.parts]}
    if isinstance(tree, Sum):
        return {"sum": [_tree_to_json(part) for part in tree.parts]}
    return tree.to_json()


def _tree_from_json(item: dict[str, Any]) -> Tree[SourceLayer]:
    if "chain" in item:
        return Chain(tuple(_tree_from_json(part) for part in item["chain"]))
    if "sum" in item:
        return Sum(tuple(_tree_from_json(part) for part in item["sum"]))
    return SourceLayer(str(item["name"]), str(item["kind"]), _fields(item["fields"]), str(item.get("origin", BASE)))


def loads(text: str, where: str) -> Record:
    """The record in `text`; InputError where it is not one."""
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise InputError(
                f"{where}: holds a convtool record of schema {document['schema']!r}, this version reads {SCHEMA};"
                " use the version that wrote it"
            )
        return Record(str(document["version"]), tuple(_fusion(item) for item in document["fusions"]))
    except InputError:
        raise
    except Exception as error:  # anything at all may stand in a damaged record
        raise InputError(f"{where}: its convtool record is damaged ({type(error).__name__}: {error})") from None


def _fusion(item: dict[str, Any]) -> FusionRecord:
    size = item["input_size"]
    return FusionRecord(
        name=str(item["name"]),
        tree=_tree_from_json(item["sources"]),
        fields=_fields(item["fields"]),
        dtype=str(item["dtype"]),
        exact=bool(item["exact"]),
        input_size=None if size is None else tuple(int(n) for n in size),
        rim=tuple((int(start), int(end)) for start, end in item["rim"]),
    )


def _fields(fields: dict[str, Any]) -> Fields:
    return {name: parse_field(name, value) for name, value in fields.items()}
