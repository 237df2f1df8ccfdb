"""Geometry as people write it: 'stride=2', 'padding=0:1,2:2', tables of fields, and where each field came from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from convtool.core.geometry import LARGEST, PADDING_MODES, Geometry
from convtool.core.names import toml_string, unwrap
from convtool.errors import UsageError, did_you_mean

Fields: TypeAlias = dict[str, Any]

DEFAULT_EPS = 1e-5  # nn.BatchNorm's
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")


def parse_sizes(text: str, what: str = "input size") -> tuple[int, ...]:
    """'3,32,32' as (3, 32, 32); UsageError where it isn't a list of integers from 1 to 2**31 - 1."""
    try:
        sizes = tuple(_integer(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(not 1 <= size <= LARGEST for size in sizes):
        raise UsageError(f"{what}: expected integers from 1 to {LARGEST}, such as 32,32, got {text!r}")
    return sizes


def parse_field(name: str, value: object) -> object:
    """One field, from the text of an option or the value of a TOML or JSON file, as `Geometry.of` takes it.

    Raises:
        UsageError: an unknown field, or a value of the wrong form. Ranges are checked by `Geometry.of`.
    """
    if name not in _PARSERS:
        raise UsageError(
            f"unknown field {name!r}{did_you_mean(name, _PARSERS, '; expected one of ' + ', '.join(_PARSERS))}"
        )
    try:
        return _PARSERS[name](value)
    except (TypeError, ValueError):
        raise UsageError(f"{name}: expected {_EXPECTED[name]}, got {value!r}") from None


def parse_setting(text: str) -> tuple[str, str, object]:
    """'layer1.conv.stride=2' as ('layer1.conv', 'stride', 2)."""
    target, equals, value = text.partition("=")
    layer, _, name = target.rpartition(".")
    if not equals or not name or (not layer and name not in _PARSERS):
        raise UsageError(f"--set: expected LAYER.FIELD=VALUE such as conv1.stride=2, got {text!r}")
    return layer, name, parse_field(name, value)


def geometry_fields(geometry: Geometry) -> Fields:
    """A geometry as plain lists and numbers, for JSON: all that `Geometry.of` takes besides the kernel size."""
    return {
        "stride": list(geometry.stride),
        "padding": [list(pair) for pair in geometry.padding],
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
        "padding_mode": geometry.padding_mode,
        "transposed": geometry.transposed,
        "output_padding": list(geometry.output_padding),
    }


def geometry_toml(fields: Mapping[str, Fields]) -> str:
    """The fields of layers, as JSON has them, as a TOML file that `parse_tables` reads back."""
    return "\n".join(["# Geometry of layers, for --geometry FILE.", *field_tables(fields)]) + "\n"


def field_tables(fields: Mapping[str, Fields]) -> list[str]:
    """A line of TOML for each layer."""
    lines = []
    for name, table in fields.items():
        stated = {key: value for key, value in table.items() if key != "output_padding" or table.get("transposed")}
        entries = ", ".join(f"{key} = {_toml_value(value)}" for key, value in stated.items())
        lines.append(f"{toml_string(name)} = {{ {entries} }}")
    return lines


def _toml_value(value: object) -> str:
    """A value in TOML; that of all axes once where they have the same."""
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

    def fields(self, layer: str) -> Fields:
        """What this place says of a layer; a later table that matches wins."""
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
        """What is known of a layer's fields; what isn't here is nobody's word but torch's default."""
        merged: Fields = {}
        for source in self.sources:
            merged.update(source.fields(layer))
        return merged

    def with_first(self, source: FieldSource) -> FieldSources:
        """The same with one more place that all the others overrule."""
        return FieldSources((source, *self.sources))


def parse_tables(tables: Mapping[str, object], origin: str) -> FieldSource:
    """A TOML document of tables, one per layer or pattern, as a source of fields."""
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


def _integer(value: object) -> int:
    if isinstance(value, str):
        if _WHOLE_NUMBER.fullmatch(value.strip()) is None:  # int() takes 1_000 as well
            raise ValueError
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _integers(value: object) -> int | list[int]:
    if isinstance(value, str):
        value = value.split(",")
        return _integer(value[0]) if len(value) == 1 else [_integer(part) for part in value]
    return [_integer(part) for part in value] if isinstance(value, list | tuple) else _integer(value)


def _padding(value: object) -> object:
    if value in ("same", "half"):
        return value
    if isinstance(value, str):
        parts = [_side(part) for part in value.split(",")]
        return parts[0] if len(parts) == 1 and isinstance(parts[0], int) else parts
    if isinstance(value, list | tuple):
        return [_side(part) for part in value]
    return _integer(value)


def _side(value: object) -> int | tuple[int, int]:
    if isinstance(value, str) and ":" in value:
        value = value.split(":")
    if isinstance(value, list | tuple):
        before, after = value
        return _integer(before), _integer(after)
    return _integer(value)


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "false": False, "0": False}[_text(value).lower()]


def _mode(value: object) -> str:
    mode = _text(value)
    if mode not in PADDING_MODES:
        raise ValueError
    return mode


def _eps(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    eps = float(value)
    if not 0 <= eps < float("inf"):
        raise ValueError
    return eps


def _sizes(value: object) -> list[int]:
    sizes = _integers(value)
    return [sizes] if isinstance(sizes, int) else sizes


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _flag_or_error(value: object) -> bool:
    try:
        return _flag(value)
    except KeyError:
        raise ValueError from None


_PARSERS: dict[str, Callable[[object], object]] = {
    "stride": _integers,
    "padding": _padding,
    "dilation": _integers,
    "groups": _integer,
    "padding_mode": _mode,
    "transposed": _flag_or_error,
    "output_padding": _integers,
    "eps": _eps,
    "flatten": _sizes,
}
_EXPECTED = {
    "stride": "an integer or one per axis, such as 2 or 2,1",
    "padding": "1, one per axis (1,2), before:after (0:1,2:2), 'same' or 'half'",
    "dilation": "an integer or one per axis, such as 2 or 2,1",
    "groups": "an integer",
    "padding_mode": "one of " + ", ".join(PADDING_MODES),
    "transposed": "true or false",
    "output_padding": "an integer or one per axis, such as 1 or 1,0",
    "eps": "a number of at least 0, such as 1e-3",
    "flatten": "the spatial sizes of what is flattened, such as 7,7",
}
FIELDS = tuple(_PARSERS)  # every field that a layer may have
