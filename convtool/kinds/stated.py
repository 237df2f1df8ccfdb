"""What is said of layers: tables of fields, by name or pattern, and the places that they are from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from convtool.core.fields import Fields
from convtool.core.names import toml_string, unwrap
from convtool.errors import UsageError, did_you_mean
from convtool.kinds import field_types, parse_field


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
        tables.setdefault(layer, {})[name] = value
    return FieldSource("--set", tables)


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
    """

    origin: str
    tables: Mapping[str, Fields]
    exact_names: bool = False

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

    def fields(self, layer: str) -> Fields:
        """Return what this place says of a layer; a later table that matches wins."""
        merged: Fields = {}
        for pattern, fields in self.tables.items():
            if self.matches(pattern, layer):
                merged.update(fields)
        return merged


@dataclass(frozen=True, slots=True)
class FieldSources:
    """Every place that geometry may come from, later ones winning."""

    sources: tuple[FieldSource, ...] = field(default=())

    def fields(self, layer: str) -> Fields:
        """Return what is known of a layer's fields; what isn't here is nobody's word but torch's default."""
        merged: Fields = {}
        for source in self.sources:
            merged.update(source.fields(layer))
        return merged

    def with_first(self, source: FieldSource) -> FieldSources:
        """Return these and one more place, which all the others overrule."""
        return FieldSources((source, *self.sources))


def parse_tables(tables: Mapping[str, object], origin: str) -> FieldSource:
    """Return a TOML document of tables, one per layer or pattern, as a source of fields."""
    parsed: dict[str, Fields] = {}
    for pattern, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f'{origin}: expected a table of fields for each layer, such as "conv1" = {{ stride = 2 }},'
                f" got {pattern} = {table!r}"
            )
        try:
            parsed[pattern] = {name: parse_field(name, value) for name, value in table.items()}
        except UsageError as error:
            raise UsageError(f"{origin}: {pattern}: {error}") from None
    return FieldSource(origin, parsed)
