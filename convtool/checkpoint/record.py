"""What convtool did to a checkpoint, as the JSON that travels with it.

In .safetensors it is the value of `__metadata__["convtool"]`; in a torch zip it is the member ROOT/convtool.json, which
torch.load passes over. It holds no time and no path, so that equal inputs give equal files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from convtool.core.fields import Fields, geometry_fields
from convtool.core.geometry import LARGEST, Geometry
from convtool.core.names import is_written
from convtool.core.tree import BASE, Chain, Sum, Tree, leaves
from convtool.errors import ConvtoolError, InputError, UsageError
from convtool.kinds import kind_named, parse_field
from convtool.kinds.kind import Kind
from convtool.kinds.written import undoing

SCHEMA = 2
Path = tuple[int, ...]  # of a tree's part: which part of it, which part of that, and so on


class UnknownRecordError(InputError):
    """A record may be sound, and says what this version doesn't know."""


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """A layer that went into a fusion.

    Attributes:
        name: its module path; of a layer without tensors, what was written in its place ('avg_pool(2)').
        fields: every field that its checkpoint doesn't hold; of a layer without tensors, its text says all.
        origin: the other checkpoint that it came from, by the name it was given; BASE for the one that was changed.
    """

    name: str
    kind: Kind
    fields: Fields
    origin: str = BASE

    @property
    def written(self) -> bool:
        """Return whether it is a layer without tensors."""
        return is_written(self.name)

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"name": self.name, "kind": self.kind.name, "fields": self.fields}
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
        before, after: the layers without tensors that stand before and behind the fused one for it to equal its
            sources: a flatten and an unflatten around a linear layer that stands for a convolution; '' for none.
        takes, gives: the digests of its sources' tensors and of its own, by their full names; NAME: in front of one of
            another checkpoint.
    """

    name: str
    tree: Tree[SourceLayer]
    fields: Fields
    dtype: str
    exact: bool
    input_size: tuple[int, ...] | None
    rim: tuple[tuple[int, int], ...]
    before: str = ""
    after: str = ""
    takes: Mapping[str, str] = field(default_factory=dict)
    gives: Mapping[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[SourceLayer, ...]:
        """Return every layer of the tree, in order."""
        return tuple(leaves(self.tree))

    def to_json(self) -> dict[str, Any]:
        around = {"before": self.before, "after": self.after}
        return {
            "name": self.name,
            "sources": _tree_to_json(self.tree),
            "fields": self.fields,
            "dtype": self.dtype,
            "exact": self.exact,
            "input_size": None if self.input_size is None else list(self.input_size),
            "rim": [list(sides) for sides in self.rim],
            "takes": dict(self.takes),
            "gives": dict(self.gives),
        } | {key: name for key, name in around.items() if name}


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
        """Return the fusions that came after `earlier`, whose history must be the beginning of this one."""
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


@dataclass(frozen=True, slots=True)
class Spelled:
    """The layers that a fused layer stands for, fusions of fused layers spelled out.

    Attributes:
        tree: those layers.
        sizes: the parts that were fused for one input size only, with that size, of the part's own input.
        dtypes: in which parts of it were stored before they were fused further, one for each of them.
    """

    tree: Tree[SourceLayer]
    sizes: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    dtypes: tuple[str, ...] = ()


def spelled_out(fusions: Sequence[FusionRecord]) -> dict[str, Spelled]:
    """Return what each layer that the fusions left behind stands for."""
    made: dict[str, Spelled] = {}
    stored: dict[str, str] = {}  # by layer, the dtype that it was fused in
    around: dict[str, tuple[str, str]] = {}  # by layer, what gives input and output the form that its sources have
    for fusion in fusions:
        before = {source.name for source in fusion.sources if source.origin == BASE and source.name in made}
        found = _spell_out(fusion.tree, made, around)
        own: tuple[tuple[Path, tuple[int, ...]], ...] = (((), fusion.input_size),) if fusion.input_size else ()
        dtypes = found.dtypes + tuple(stored[name] for name in sorted(before))
        made[fusion.name] = Spelled(found.tree, own + found.sizes, dtypes)
        stored[fusion.name] = fusion.dtype
        around[fusion.name] = (fusion.before, fusion.after)  # of the layer as it is now
    return made


def _spell_out(tree: Tree[SourceLayer], made: dict[str, Spelled], around: dict[str, tuple[str, str]]) -> Spelled:
    if isinstance(tree, Chain):
        # What stands around a fused layer only for the form of its tensors isn't there around its sources; and where it
        # doesn't stand there, what undoes it has to, around them.
        parts: list[Tree[SourceLayer]] = []
        awaited = ""
        for part in tree.parts:
            if awaited and _name(part) == awaited:
                awaited = ""
                continue
            parts += [_undoing(awaited)] if awaited else []
            before, awaited = around.get(_name(part), ("", "")) if _is_base(part, made) else ("", "")
            if before and parts and _name(parts[-1]) == before:
                parts.pop()
            elif before:
                parts.append(_undoing(before))
            parts.append(part)
        parts += [_undoing(awaited)] if awaited else []
        found = [
            _spell_out_leaf(part, made) if isinstance(part, SourceLayer) else _spell_out(part, made, around)
            for part in parts
        ]
        return _together(Chain(tuple(one.tree for one in found)), found)
    if isinstance(tree, Sum):
        found = [_spell_out(part, made, around) for part in tree.parts]
        return _together(Sum(tuple(one.tree for one in found)), found)
    return _spell_out(Chain((tree,)), made, around) if any(around.get(tree.name, ())) else _spell_out_leaf(tree, made)


def _spell_out_leaf(leaf: SourceLayer, made: dict[str, Spelled]) -> Spelled:
    return made.pop(leaf.name, Spelled(leaf)) if leaf.origin == BASE else Spelled(leaf)


def _undoing(text: str) -> SourceLayer:
    layer = undoing(text)
    return SourceLayer(layer.name, layer.kind, {})


def _together(tree: Tree[SourceLayer], parts: Sequence[Spelled]) -> Spelled:
    """Return the tree of these parts."""
    sizes = (((number, *path), size) for number, part in enumerate(parts) for path, size in part.sizes)
    return Spelled(tree, tuple(sizes), tuple(dtype for part in parts for dtype in part.dtypes))


def _is_base(part: Tree[SourceLayer] | None, made: dict[str, Spelled]) -> bool:
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
    kind = kind_named(item["kind"])
    if kind is None:
        raise UsageError(f"{item['name']}: unknown kind {item['kind']!r}")
    fields = _fields(item["fields"])
    kind.check_fields(fields)
    return SourceLayer(str(item["name"]), kind, fields, str(item.get("origin", BASE)))


def loads(text: str, where: str) -> Record:
    """Return the record in `text`.

    Raises:
        UnknownRecordError: of a schema, or with a key, that this version doesn't know.
        InputError: it isn't one.
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_repetition)
        if document["schema"] != SCHEMA:
            raise UnknownRecordError(
                f"{where}: holds a convtool record of schema {document['schema']!r}, this version reads {SCHEMA};"
                " use the version that wrote it"
            )
        for key in _unknown_keys(document):
            raise UnknownRecordError(
                f"{where}: its convtool record has the key {key!r}, which this version doesn't know"
            )
        fusions = tuple(_fusion(item) for item in document["fusions"])
        _check_history(fusions)
        return Record(str(document["version"]), fusions)
    except InputError:
        raise
    except Exception as error:  # anything at all may stand in a damaged record
        what = str(error) if isinstance(error, ConvtoolError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: its convtool record is damaged ({what})") from None


# The keys of the record, of a fusion in it, of a layer and of a sum or chain.
_KEYS = {"schema", "version", "fusions"}
_FUSION = {"name", "sources", "fields", "dtype", "exact", "input_size", "rim", "before", "after", "takes", "gives"}
_LAYER = {"name", "kind", "fields", "origin"}


def _unknown_keys(document: dict[str, Any]) -> Iterator[str]:
    """Yield keys that this version doesn't know; what holds them may mean what it can't judge."""
    yield from document.keys() - _KEYS
    for fusion in document["fusions"]:
        yield from fusion.keys() - _FUSION
        yield from _unknown_in_tree(fusion["sources"])


def _unknown_in_tree(item: dict[str, Any]) -> Iterator[str]:
    for key in ("chain", "sum"):
        if key in item:
            yield from item.keys() - {key}
            for part in item[key]:
                yield from _unknown_in_tree(part)
            return
    yield from item.keys() - _LAYER


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UsageError("it has a key twice")
    return found


def _digests(what: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(one)) for one in value.values()):
        raise UsageError(f"{what}: expected a SHA-256 for each tensor")
    return value


def _fusion(item: dict[str, Any]) -> FusionRecord:
    fusion = FusionRecord(
        name=str(item["name"]),
        tree=_tree_from_json(item["sources"]),
        fields=_fields(item["fields"]),
        dtype=str(item["dtype"]),
        exact=bool(item["exact"]),
        input_size=_sizes("input_size", item["input_size"]),
        rim=tuple((_integer("rim", start, 0), _integer("rim", end, 0)) for start, end in item["rim"]),
        before=_written("before", item.get("before", "")),
        after=_written("after", item.get("after", "")),
        takes=_digests("takes", item["takes"]),
        gives=_digests("gives", item["gives"]),
    )
    axes = len(fusion.rim)
    if others := fusion.fields.keys() - geometry_fields(Geometry.of((1,))).keys():
        raise UsageError(f"a fused layer has no {', '.join(sorted(others))}")
    counts = (len(value) for value in fusion.fields.values() if isinstance(value, list | tuple))
    Geometry.of((1,) * (axes or next(counts, 1)), **fusion.fields)
    # What was converted has no rim, and its size has the channels in front.
    if fusion.rim and fusion.input_size is not None and len(fusion.input_size) != axes:
        raise UsageError(f"input_size: expected {axes} sizes, got {list(fusion.input_size)}")
    return fusion


def _check_history(fusions: Sequence[FusionRecord]) -> None:
    """UsageError where one fusion takes what an earlier one took, as no checkpoint has it any more."""
    gone: set[str] = set()
    made: set[str] = set()
    for fusion in fusions:
        own = [source.name for source in fusion.sources if source.origin == BASE and not source.written]
        if not own:
            raise UsageError(f"no layer of the checkpoint went into {fusion.name!r}")
        if len(fusion.sources) == 1 and own == [fusion.name] and not fusion.before:
            raise UsageError(f"{fusion.name!r} is said to be fused from itself alone, which changes nothing")
        again = [name for number, name in enumerate(own) if name in gone or name in own[:number]]
        if again:
            raise UsageError(f"{again[0]!r} goes into {fusion.name!r} after it went into a fusion already")
        if fusion.name in made.difference(own):
            raise UsageError(f"two fusions are called {fusion.name!r}")
        gone = gone.union(own) - {fusion.name}
        made = made.difference(own) | {fusion.name}


def _written(what: str, value: object) -> str:
    if not isinstance(value, str) or (value and not is_written(value)):
        raise UsageError(f"{what}: expected a layer without tensors, got {value!r}")
    return value


def _sizes(what: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise UsageError(f"{what}: expected a list of sizes, got {value!r}")
    return tuple(_integer(what, n, 1) for n in value)


def _integer(what: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise UsageError(f"{what}: expected integers of at least {least}, got {value!r}")
    return value


def _fields(fields: dict[str, Any]) -> Fields:
    return {name: parse_field(name, value) for name, value in fields.items()}
