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
        flatten, unflatten: where a linear layer stands for layers with spatial axes: the sizes of the feature map that
            it takes flattened, and of the one that it gives flattened; None where there is none.
    """

    name: str
    tree: Tree[SourceLayer]
    fields: Fields
    dtype: str
    exact: bool
    input_size: tuple[int, ...] | None
    rim: tuple[tuple[int, int], ...]
    flatten: tuple[int, ...] | None = None
    unflatten: tuple[int, ...] | None = None

    @property
    def sources(self) -> tuple[SourceLayer, ...]:
        """Every layer of the tree, in order."""
        return tuple(leaves(self.tree))

    def to_json(self) -> dict[str, Any]:
        around = {"flatten": self.flatten, "unflatten": self.unflatten}
        return {
            "name": self.name,
            "sources": _tree_to_json(self.tree),
            "fields": self.fields,
            "dtype": self.dtype,
            "exact": self.exact,
            "input_size": None if self.input_size is None else list(self.input_size),
            "rim": [list(sides) for sides in self.rim],
        } | {name: list(size) for name, size in around.items() if size is not None}


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
    unflattens: dict[str, str] = {}  # by layer, what puts its output into the form that its sources give
    for fusion in fusions:
        made[fusion.name] = _spell_out(fusion.tree, made, unflattens)
        unflattens[fusion.name] = f"unflatten({','.join(map(str, fusion.unflatten))})" if fusion.unflatten else ""
    return made


def _spell_out(
    tree: Tree[SourceLayer], made: dict[str, Tree[SourceLayer]], unflattens: dict[str, str]
) -> Tree[SourceLayer]:
    if isinstance(tree, Chain):
        parts = [
            part
            for before, part in zip((None, *tree.parts), tree.parts, strict=False)
            if not (_is_base(before, made) and _name(part) == unflattens.get(_name(before)))
        ]
        return Chain(tuple(_spell_out(part, made, unflattens) for part in parts))
    if isinstance(tree, Sum):
        return Sum(tuple(_spell_out(part, made, unflattens) for part in tree.parts))
    return made.pop(tree.name, tree) if tree.origin == BASE else tree


def _is_base(part: Tree[SourceLayer] | None, made: dict[str, Tree[SourceLayer]]) -> bool:
    return isinstance(part, SourceLayer) and part.origin == BASE and part.name in made


def _name(part: Tree[SourceLayer] | None) -> str:
    return part.name if isinstance(part, SourceLayer) else ""


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
        input_size=_sizes(size),
        rim=tuple((int(start), int(end)) for start, end in item["rim"]),
        flatten=_sizes(item.get("flatten")),
        unflatten=_sizes(item.get("unflatten")),
    )


def _sizes(value: list[Any] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(n) for n in value)


def _fields(fields: dict[str, Any]) -> Fields:
    return {name: parse_field(name, value) for name, value in fields.items()}
