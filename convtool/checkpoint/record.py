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
from convtool.errors import InputError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """A layer that went into a fusion: its name, kind, and every field that its checkpoint doesn't hold."""

    name: str
    kind: str
    fields: Fields

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "fields": self.fields}


@dataclass(frozen=True, slots=True)
class FusionRecord:
    """One fusion.

    Attributes:
        name: the layer that stands for the others.
        sources: those, first to last.
        fields: the fused layer's geometry.
        dtype: of its tensors.
        exact: whether it equals the sources (at `input_size`, or at every size where that is None).
        rim: where not: per axis, how many rows at the start and at the end differ.
    """

    name: str
    sources: tuple[SourceLayer, ...]
    fields: Fields
    dtype: str
    exact: bool
    input_size: tuple[int, ...] | None
    rim: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sources": [source.to_json() for source in self.sources],
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


def chains_of(fusions: Sequence[FusionRecord]) -> dict[str, tuple[SourceLayer, ...]]:
    """For each layer that the fusions left behind, the layers it stands for, fusions of fused layers spelled out."""
    made: dict[str, tuple[SourceLayer, ...]] = {}
    for fusion in fusions:
        chain: list[SourceLayer] = []
        for source in fusion.sources:
            chain += made.pop(source.name, (source,))
        made[fusion.name] = tuple(chain)
    return made


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
    sources = tuple(
        SourceLayer(str(source["name"]), str(source["kind"]), _fields(source["fields"])) for source in item["sources"]
    )
    if not sources:
        raise ValueError("a fusion without sources")
    size = item["input_size"]
    return FusionRecord(
        name=str(item["name"]),
        sources=sources,
        fields=_fields(item["fields"]),
        dtype=str(item["dtype"]),
        exact=bool(item["exact"]),
        input_size=None if size is None else tuple(int(n) for n in size),
        rim=tuple((int(start), int(end)) for start, end in item["rim"]),
    )


def _fields(fields: dict[str, Any]) -> Fields:
    return {name: parse_field(name, value) for name, value in fields.items()}
