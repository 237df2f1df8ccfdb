"""What convtool did to a checkpoint, as the JSON that travels with it.

In .safetensors it is the value of `__metadata__["convtool"]`; in a torch zip it is the member ROOT/convtool.json, which
torch.load passes over. It holds no time and no path, so that equal inputs give equal files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from convtool.core.fields import Fields, geometry_fields
from convtool.core.geometry import LARGEST, Geometry, format_sizes
from convtool.core.names import is_written
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves, map_leaves
from convtool.errors import ConvtoolError, InputError, UsageError
from convtool.formats.strict_json import parse_json
from convtool.kinds import kind_named, parse_field
from convtool.kinds.kind import Kind
from convtool.kinds.shares import Share, shares, unshared
from convtool.kinds.stated import FieldSource

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint

SCHEMA = 2
# What is assumed of a layer that is unplaced.
PLACE = "the model runs it right after the layer before it in the fusion (--model with --model-input would tell)"


class UnknownRecordError(InputError):
    """A record may be sound, and says what this version doesn't know."""


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """A layer that went into a fusion.

    Attributes:
        name: its module path; of a layer without tensors, what was written in its place ('avg_pool(2)').
        fields: what was known of those that its checkpoint doesn't hold; of a layer without tensors, its text says all.
        origin: the other checkpoint that it came from, by the name it was given; BASE for the one that was changed.
        assumed: the fields that nobody stated.
        like: the layer whose stride, padding, dilation and padding mode it has, which aren't all known.
        unplaced: nobody stated that it runs right behind the layer before it.
    """

    name: str
    kind: Kind
    fields: Fields
    origin: str = BASE
    assumed: tuple[str, ...] = ()
    like: str = ""
    unplaced: bool = False

    @property
    def written(self) -> bool:
        """Return whether it is a layer without tensors."""
        return is_written(self.name)

    def owned(self) -> tuple[str, Kind] | None:
        """Return name and kind of a layer of the checkpoint that was changed; None of any other."""
        return (self.name, self.kind) if self.origin == BASE and not self.written else None

    def assumptions(self) -> Iterator[tuple[str, str]]:
        """Yield the layer's name and each thing that was assumed of it, in words."""
        name = full_name(self.name, self.origin)
        yield from ((name, self.kind.say(field, self.fields[field])) for field in self.assumed)
        yield from [(name, PLACE)] if self.unplaced else []


@dataclass(frozen=True, slots=True)
class FusionRecord:
    """One fusion.

    Attributes:
        name: the layer that stands for the others.
        tree: those, in chains and sums.
        fields: the fused layer's geometry, as far as it is known.
        dtype: of its tensors.
        exact: whether it equals the sources (at `input_size`, or at every size where that is None).
        rim: where not: per axis, how many rows at the start and at the end differ.
        before, after: the layers without tensors that stand before and behind the fused one for it to equal its
            sources: a flatten and an unflatten around a linear layer that stands for a convolution; '' for none.
        takes, gives: the digests of its sources' tensors and of its own, by their full names; NAME: in front of one of
            another checkpoint.
        assumed: those of the fields that follow from what nobody stated.
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
    assumed: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[SourceLayer, ...]:
        """Return every layer of the tree, in order."""
        return tuple(leaves(self.tree))

    @property
    def limit(self) -> str:
        """Where it isn't its sources, in words; '' where it is at every size that it takes, which may be one."""
        if not self.exact:
            from convtool.core.border import Verdict

            rim = Verdict(self.exact, self.input_size, self.rim).describe_rim()
            return f"differs from the layers that it was fused from in {rim} of its output (--allow-border)"
        if self.input_size is None or self.before or f"{self.name}.bias_map" in self.gives:
            return ""
        return f"stands for the layers that it was fused from at input size {format_sizes(self.input_size)} only"

    def shares(self) -> dict[str, Share]:
        """Return which channels it takes of the layers that it doesn't take whole."""
        return shares(self.tree, SourceLayer.owned)


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

    def assumed(self) -> dict[str, tuple[str, ...]]:
        """Return the fields of the layers that convtool itself made that follow from what nobody stated, by name."""
        return {fusion.name: fusion.assumed for fusion in self.fusions}

    def rests_on(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """Return what was assumed when a layer was made, and when those were made that it is made of, by its name."""
        found: dict[str, tuple[tuple[str, str], ...]] = {}
        for fusion in self.fusions:
            said = [one for source in fusion.sources for one in source.assumptions()]
            for source in fusion.sources:
                said += found.pop(source.name, ()) if source.origin == BASE else ()
            found[fusion.name] = tuple(dict.fromkeys(said))
        return {name: said for name, said in found.items() if said}

    def since(self, earlier: Record | None) -> tuple[FusionRecord, ...]:
        """Return the fusions that came after `earlier`, whose history must be the beginning of this one."""
        done = () if earlier is None else earlier.fusions
        if self.fusions[: len(done)] != done:
            raise InputError("the record in AFTER doesn't continue the one in BEFORE; they are of different histories")
        return self.fusions[len(done) :]

    def dumps(self) -> str:
        fusions = [_fusion_to_json(fusion) for fusion in self.fusions]
        return json.dumps({"schema": SCHEMA, "version": self.version, "fusions": fusions}, separators=(",", ":"))


def full_name(name: str, origin: str) -> str:
    """Return a layer's name as fields and messages call it: that of another checkpoint with NAME: in front."""
    return str(LayerRef(name, origin))


def field_source(checkpoint: Checkpoint, origin: str = BASE) -> FieldSource:
    """Return what a checkpoint says of its own layers: as convtool wrote it down, or as its format has it."""
    record = checkpoint.record
    fields, assumed = (record.fields(), record.assumed()) if record else (checkpoint.stated, {})
    return FieldSource(
        f"the record of {checkpoint.path}" if record else str(checkpoint.path),
        {full_name(name, origin): one for name, one in fields.items()},
        exact_names=True,
        assumed={full_name(name, origin): one for name, one in assumed.items()},
    )


def _stated(item: SourceLayer | FusionRecord) -> dict[str, Any]:
    """Return what isn't as it is by default."""
    own = {one.name: (getattr(item, one.name), one.default) for one in dataclasses.fields(item)}
    return {name: value for name, (value, default) in own.items() if value != default}


def _fusion_to_json(fusion: FusionRecord) -> dict[str, Any]:
    document = _stated(fusion)
    document["sources"] = _tree_to_json(document.pop("tree"))
    return document


def _tree_to_json(tree: Tree[SourceLayer]) -> dict[str, Any]:
    if isinstance(tree, SourceLayer):
        return _stated(tree) | {"kind": tree.kind.name}
    return {"chain" if isinstance(tree, Chain) else "sum": [_tree_to_json(part) for part in tree.parts]}


def _tree_from_json(item: dict[str, Any]) -> Tree[SourceLayer]:
    for key, tree in (("chain", Chain), ("sum", Sum)):
        if key in item:
            return tree(tuple(map(_tree_from_json, _only(item, {key})[key])))
    _only(item, _LAYER)
    kind = kind_named(item["kind"])
    if kind is None:
        raise UsageError(f"{item['name']}: unknown kind {item['kind']!r}")
    fields = _fields(item["fields"])
    kind.check_fields(fields)
    assumed = _assumed(item, fields)
    origin, like, unplaced = str(item.get("origin", BASE)), str(item.get("like", "")), item.get("unplaced", False)
    if not isinstance(unplaced, bool):
        raise UsageError(f"unplaced: expected true or false, got {unplaced!r}")
    return SourceLayer(str(item["name"]), kind, fields, origin, assumed, like, unplaced)


def _assumed(item: dict[str, Any], fields: Fields) -> tuple[str, ...]:
    assumed = tuple(map(str, item.get("assumed", ())))
    if others := set(assumed) - fields.keys():
        raise UsageError(f"assumed: {', '.join(sorted(others))} isn't among the fields")
    return assumed


def loads(text: str, where: str) -> Record:
    """Return the record in `text`.

    Raises:
        UnknownRecordError: of a schema, or with a key, that this version doesn't know.
        InputError: it isn't one.
    """
    document = parse_json(text, where, "its convtool record")
    try:
        if document["schema"] != SCHEMA:
            raise UnknownRecordError(
                f"holds a convtool record of schema {document['schema']!r}, this version reads {SCHEMA};"
                " use the version that wrote it"
            )
        fusions = tuple(_fusion(item) for item in _only(document, _KEYS)["fusions"])
        _check_history(fusions)
        return Record(str(document["version"]), fusions)
    except UnknownRecordError as error:
        raise UnknownRecordError(f"{where}: {error}") from None
    except Exception as error:  # anything at all may stand in a damaged record
        what = str(error) if isinstance(error, ConvtoolError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: its convtool record is damaged ({what})") from None


# The keys of the record, of a fusion in it, of a layer and of a sum or chain.
_KEYS = {"schema", "version", "fusions"}
_FUSION = {one.name for one in dataclasses.fields(FusionRecord)} - {"tree"} | {"sources"}
_LAYER = {one.name for one in dataclasses.fields(SourceLayer)}


def _only(item: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return what a record holds; with a key that this version doesn't know, it may mean what that can't judge."""
    for key in item.keys() - known:
        raise UnknownRecordError(f"its convtool record has the key {key!r}, which this version doesn't know")
    return item


def _digests(what: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(one)) for one in value.values()):
        raise UsageError(f"{what}: expected a SHA-256 for each tensor")
    return value


def _fusion(item: dict[str, Any]) -> FusionRecord:
    _only(item, _FUSION)
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
        assumed=_assumed(item, item["fields"]),
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
    dtypes: dict[str, str] = {}
    for fusion in fusions:
        own = [source.name for source in fusion.sources if source.origin == BASE and not source.written]
        if not own:
            raise UsageError(f"no layer of the checkpoint went into {fusion.name!r}")
        if not fusion.before and changes_nothing(fusion.tree):
            # One layer under another name is what a recipe makes of a sum of one branch; nothing is rounded then.
            kept = len(fusion.sources) == 1 and own != [fusion.name]
            if not kept or dtypes.get(own[0], fusion.dtype) != fusion.dtype:
                raise UsageError(f"{fusion.name!r} is said to be fused from itself alone, which changes nothing")
        dtypes[fusion.name] = fusion.dtype
        shared = fusion.shares().keys()
        again = [name for number, name in enumerate(own) if name in gone - shared or name in own[:number]]
        if again:
            raise UsageError(f"{again[0]!r} goes into {fusion.name!r} after it went into a fusion already")
        if fusion.name in made.difference(own):
            raise UsageError(f"two fusions are called {fusion.name!r}")
        gone = gone.union(own) - {fusion.name}
        made = made.difference(own) | {fusion.name}
    for name in unshared((fusion.tree for fusion in fusions), SourceLayer.owned):
        raise UsageError(f"not each channel of {name!r} goes into one fusion")


def changes_nothing(tree: Tree[SourceLayer]) -> bool:
    """Return whether a tree computes what the one layer with tensors in it does, whatever that is."""
    parts = list(leaves(tree))
    if sum(not part.written for part in parts) != 1 or any(part.kind.reshapes for part in parts):
        return False
    return len(parts) == 1 or all(_is_identity(tree, channels) for channels in (1, 2))


def _is_identity(tree: Tree[SourceLayer], channels: int) -> bool:
    """Return whether the layers that are written compute their input, of so many channels, and so nothing."""
    import torch

    from convtool.core.compose import in_groups
    from convtool.core.conv import pointwise
    from convtool.core.fuse import NamedConv, fuse_tree
    from convtool.kinds.written import make_written

    def lowered(part: SourceLayer) -> NamedConv:
        return NamedConv(part.name, make_written(part.name if part.written else "identity()", channels, axes=2))

    try:
        made = fuse_tree(map_leaves(lowered, tree), input_size=None, allow_border=True, dtype=torch.float64).conv
    except (ConvtoolError, KeyError):  # a number of channels or a tensor that it goes with
        return False
    weight = in_groups(made, 1).flatten(1)
    same = made.geometry == pointwise(2, made.geometry.groups) and torch.equal(weight, torch.eye(channels).double())
    return same and not made.has_bias


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
