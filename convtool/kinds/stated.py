"""What is said of layers: tables of fields, by name or pattern, and the places that they are from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from convtool.core.fields import Fields, field_text
from convtool.core.names import toml_string, unwrap
from convtool.errors import UsageError, about, did_you_mean
from convtool.kinds import field_types, parse_field
from convtool.kinds.kind import Kind, Layer, Shapes

_PATTERN = frozenset("*?[")  # what makes a name a pattern


def parse_setting(text: str) -> tuple[str, str, object]:
    """Return 'layer1.conv.stride=2' as ('layer1.conv', 'stride', 2)."""
    target, equals, value = text.partition("=")
    layer, _, name = target.rpartition(".")
    if not equals or not name or (not layer and name not in field_types()):
        raise UsageError(f"--set: expected LAYER.FIELD=VALUE such as conv1.stride=2, got {text!r}")
    return layer, name, parse_field(name, value)


def parse_settings(texts: Iterable[str]) -> FieldSource:
    """Return what each --set says of a layer, as one source of fields; raise UsageError, with the text, for none."""
    tables: dict[str, Fields] = {}
    for text in texts:
        try:
            layer, name, value = parse_setting(text)
        except UsageError as error:
            raise UsageError(str(error) if str(error).startswith("--set") else f"--set {text}: {error}") from None
        if tables.setdefault(layer, {}).setdefault(name, value) != value:
            raise UsageError(f"--set {text}: {name} of {layer} is given another value as well")
    return FieldSource("--set", tables, overrules=True)


def geometry_toml(fields: Mapping[str, Fields]) -> str:
    """Return the fields of layers, as JSON has them, as a TOML file that `parse_tables` reads back."""
    return "\n".join(["# Geometry of layers, for --geometry FILE.", *field_tables(fields)]) + "\n"


def field_tables(fields: Mapping[str, Fields]) -> list[str]:
    """Return a line of TOML for each layer."""
    lines = []
    for name, table in fields.items():
        stated = {key: value for key, value in table.items() if key != "output_padding" or table.get("transposed")}
        entries = ", ".join(f"{key} = {_toml_value(value)}" for key, value in stated.items())
        lines.append(f"{toml_string(name)} = {{ {entries} }}")
    return lines


def _toml_value(value: object) -> str:
    """Return a value in TOML; that of all axes once where they have the same."""
    if isinstance(value, list | tuple) and value and all(entry == value[0] for entry in value):
        entry = value[0]
        if not isinstance(entry, list | tuple):
            return json.dumps(entry)
        if entry[0] == entry[1]:
            return json.dumps(entry[0])
    return json.dumps(value)


@dataclass(frozen=True, slots=True)
class FieldSource:
    """Fields from one place, by layer name or pattern (fnmatch: * stands for anything, dots included).

    Unless `exact_names`, wrappers' prefixes may be left out, as everywhere that people name layers.

    Attributes:
        overrules: whether it may say otherwise than the places before it.
        assumed: by layer name, the fields that nobody stated and that were assumed when they were written down.
    """

    origin: str
    tables: Mapping[str, Fields]
    exact_names: bool = False
    overrules: bool = False
    assumed: Mapping[str, Collection[str]] = field(default_factory=dict)

    def matches(self, pattern: str, layer: str) -> bool:
        if self.exact_names:
            return pattern == layer
        return any(pattern == name or fnmatchcase(name, pattern) for name in (layer, unwrap(layer)))

    def check_used(self, layers: Sequence[str]) -> None:
        """Raise UsageError where a table fits none of the layers; a misspelt one would be silently without effect."""
        for pattern in self.tables:
            if not any(self.matches(pattern, layer) for layer in layers):
                hint = did_you_mean(pattern, layers, "; `convtool inspect` lists the layers")
                raise UsageError(f"{self.origin}: {pattern!r} fits no layer of the checkpoint{hint}")

    def fields(self, layer: str, settable: Collection[str] | None = None) -> Fields:
        """Return what this place says of a layer; what it says of its very name is more than what it says of others.

        Args:
            settable: the fields that it can have; patterns pass over it where they are about others.

        Raises:
            UsageError: two tables that fit it give one field different values.
        """
        own = self.tables.get(layer, {})
        said: dict[str, tuple[str, object]] = {name: (layer, value) for name, value in own.items()}
        for pattern, fields in self.tables.items():
            if pattern == layer or not self.matches(pattern, layer):
                continue
            passes = settable is not None and not self.exact_names and _PATTERN.intersection(pattern)
            for name, value in fields.items():
                if passes and name not in (settable or ()):
                    continue
                before, known = said.setdefault(name, (pattern, value))
                if known != value and name not in own:
                    raise UsageError(
                        f"{self.origin}: {before!r} and {pattern!r} both fit {layer}, and say {name}"
                        f" {field_text(known)} and {field_text(value)}"
                    )
        return {name: value for name, (_, value) in said.items()}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a layer's fields.

    Attributes:
        fields: their values.
        origins: by field, who says so.
        assumed: those that were assumed when convtool wrote them down.
        overruled: what was said otherwise and doesn't hold, in words.
    """

    fields: Fields
    origins: Mapping[str, str]
    assumed: frozenset[str] = frozenset()
    overruled: tuple[str, ...] = ()

    def only(self, fields: Collection[str]) -> Known:
        """Return what is known of these fields alone."""
        return replace(
            self,
            fields={name: value for name, value in self.fields.items() if name in fields},
            assumed=self.assumed & frozenset(fields),
        )


@dataclass(frozen=True, slots=True)
class FieldSources:
    """Every place that geometry may come from; those that may overrule others come after them.

    Attributes:
        assume: the fields for which torch's default is accepted where nobody states them.
    """

    sources: tuple[FieldSource, ...] = field(default=())
    assume: frozenset[str] = frozenset()

    def fields(self, layer: str) -> Fields:
        """Return what is said of a layer's fields, whatever its kind."""
        merged: Fields = {}
        for source in self.sources:
            merged.update(source.fields(layer))
        return merged

    def known(self, name: str, layer: Layer) -> Known:
        """Return what is known of the fields of a layer that is called by that name.

        Raises:
            UsageError: two sources state different values, and neither may overrule the other.
        """
        kind = layer.kind
        said = [(source, source.fields(name, kind.settable)) for source in self.sources]
        merged = {key: value for _, fields in said for key, value in fields.items()}
        found: dict[str, tuple[FieldSource, object]] = {}
        overruled: list[str] = []
        for source, key, value in ((source, *item) for source, fields in said for item in fields.items()):
            earlier, before = found.get(key, (source, value))
            guessed = key in earlier.assumed.get(name, ())
            if _same(kind, layer.shapes, merged, key, before, value):
                if earlier is not source and not guessed:
                    continue  # it is said again
            elif source.overrules or guessed:
                overruled.append(f"{key} {field_text(value)}, and not {field_text(before)} as {earlier.origin} has it")
            else:
                raise UsageError(
                    f"{name}: {key} is {field_text(before)} by {earlier.origin}, and {field_text(value)} by"
                    f" {source.origin}; one of them is wrong, and --set {name}.{key}=VALUE overrules both"
                )
            found[key] = (source, value)
        return Known(
            {key: value for key, (_, value) in found.items()},
            {key: source.origin for key, (source, _) in found.items()},
            frozenset(key for key, (source, _) in found.items() if key in source.assumed.get(name, ())),
            tuple(overruled),
        )

    def with_first(self, source: FieldSource) -> FieldSources:
        """Return these and one more place, before the others."""
        return replace(self, sources=(source, *self.sources))


def _same(kind: Kind, shapes: Shapes, merged: Fields, name: str, one: object, other: object) -> bool:
    """Return whether two values of a field mean the same for a layer of which all that is known."""
    if one == other:
        return True
    try:
        first, second = (kind.written_out({**merged, name: value}, shapes) for value in (one, other))
    except UsageError:  # what doesn't fit the layer is said where it is lowered
        return False
    return bool(first.get(name) == second.get(name))


def parse_tables(tables: Mapping[str, object], origin: str) -> FieldSource:
    """Return a TOML document of tables, one per layer or pattern, as a source of fields.

    A name with dots that isn't in quotes, as in [layer1.0.conv1], is tables inside of each other.
    """
    parsed: dict[str, Fields] = {}
    pending = list(tables.items())
    while pending:
        pattern, table = pending.pop(0)
        if not isinstance(table, dict):
            raise UsageError(
                f'{origin}: expected a table of fields for each layer, such as "conv1" = {{ stride = 2 }},'
                f" got {pattern} = {table!r}"
            )
        inner = [key for key, value in table.items() if isinstance(value, dict)]
        pending[:0] = [(f"{pattern}.{key}", table[key]) for key in inner]
        if len(inner) == len(table) > 0:
            continue
        with about(f"{origin}: {pattern}"):
            fields = {name: parse_field(name, value) for name, value in table.items() if name not in inner}
        parsed[pattern] = {**parsed.get(pattern, {}), **fields}
    return FieldSource(origin, parsed)
