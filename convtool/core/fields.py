"""Values of a layer's fields as people write them: 'stride=2', 'padding=0:1,2:2', from options, TOML and JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from json import loads
from typing import Any, TypeAlias

from convtool.core.geometry import LARGEST, PADDING_MODES, Geometry, PaddingMode
from convtool.errors import UsageError

Fields: TypeAlias = dict[str, Any]

SMALLEST = 2.0**-1022  # normal number of float64
BETWEEN_SIZES = "[,x]"  # '8,8' is '8x8'
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class FieldType:
    """The values that a field takes.

    Attributes:
        parse: makes one of an option's text or of what a TOML or JSON file holds; TypeError or ValueError else.
        expected: what it takes, in words.
        recorded: the type of its values in records and documents.
        names_tensors: whether a text that it takes is the full name of a tensor.
        between: what stands between the entries of a list.
    """

    parse: Callable[[object], object]
    expected: str
    recorded: Any = Any
    names_tensors: bool = False
    between: str = ","

    def read(self, name: str, value: object) -> object:
        """Return the value of a field of that name; UsageError where it isn't of this type. Ranges aren't checked."""
        try:
            return self.parse(value)
        except (TypeError, ValueError):
            raise UsageError(f"{name}: expected {self.expected}, got {value!r}") from None


def geometry_fields(geometry: Geometry) -> Fields:
    """Return a geometry as plain lists and numbers, for JSON: all that `Geometry.of` takes besides the kernel size."""
    return {
        "stride": list(geometry.stride),
        "padding": [list(pair) for pair in geometry.padding],
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
        "padding_mode": geometry.padding_mode,
        "transposed": geometry.transposed,
        "output_padding": list(geometry.output_padding),
    }


def field_text(value: object) -> str:
    """Return a field's value as options take it: '1e-05', '1', '0:1,2:2', 'true'."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, list | tuple):
        return str(value)
    sides = [one if isinstance(one, list | tuple) else (one,) for one in value]
    entries = [":".join(map(str, dict.fromkeys(one) if len(set(one)) == 1 else one)) for one in sides]
    return entries[0] if len(set(entries)) == 1 else ",".join(entries)


def parse_sizes(text: str, what: str = "input size") -> tuple[int, ...]:
    """Return '3,32,32' or '3x32x32' as (3, 32, 32); UsageError where these aren't integers from 1 to 2**31 - 1."""
    try:
        sizes = tuple(_integer(part) for part in re.split(BETWEEN_SIZES, text))
    except ValueError:
        sizes = ()
    if not sizes or any(not 1 <= size <= LARGEST for size in sizes):
        raise UsageError(f"{what}: expected integers from 1 to {LARGEST}, such as 32,32, got {text!r}")
    return sizes


def _integer(value: object) -> int:
    if isinstance(value, str):
        if _WHOLE_NUMBER.fullmatch(value.strip()) is None:  # int() takes 1_000 as well
            raise ValueError
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _several(parse: Callable[[object], Any], between: str = ",") -> Callable[[object], list[Any]]:
    """Return what makes a list of values: of one, of several with a comma (a pattern) between them, or of a list."""

    def parsed(value: object) -> list[Any]:
        parts = re.split(between, value) if isinstance(value, str) else value
        return [parse(part) for part in (parts if isinstance(parts, list | tuple) else [parts])]

    return parsed


def _per_axis(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """Return what makes a list as `_several` does, and one number of a single one that is no list."""

    def parsed(value: object) -> Any:
        found = _several(parse, BETWEEN_SIZES)(value)
        alone = len(found) == 1 and not isinstance(value, list | tuple) and isinstance(found[0], int)
        return found[0] if alone else found

    return parsed


def _padding(value: object) -> object:
    return value if value in ("same", "valid", "half") else _per_axis(_side)(value)


def _side(value: object) -> int | tuple[int, int]:
    if isinstance(value, str) and ":" in value:
        value = value.split(":")
    if isinstance(value, list | tuple):
        before, after = value
        return _integer(before), _integer(after)
    return _integer(value)


def _such(parse: Callable[[object], Any], holds: Callable[[Any], bool]) -> Callable[[object], Any]:
    """Return what makes a value and sees that it is such a one; ValueError else."""

    def parsed(value: object) -> Any:
        found = parse(value)
        if not holds(found):
            raise ValueError
        return found

    return parsed


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if (text := _text(value).lower()) not in _FLAGS:
        raise ValueError
    return _FLAGS[text]


def _eps(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: object) -> float:
    """Return a number, perhaps given as a fraction: '0.5', '1/255'."""
    over, slash, under = _text(value).partition("/")
    try:
        number = float(over) / float(under) if slash else float(over)
    except ZeroDivisionError:
        raise ValueError from None
    if not math.isfinite(number) or 0 < abs(number) < SMALLEST:  # what is subnormal has lost digits
        raise ValueError
    return number


def _range(value: object) -> list[int | None]:
    """Return '2:5' as [2, 5], and '2:' as [2, None]."""
    if isinstance(value, str):
        value = value.split(":")
    if not isinstance(value, list | tuple):
        raise TypeError
    first, last = value
    start, stop = _integer(first or 0), None if last in ("", None) else _integer(last)
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError
    return [start, stop]


def _kernel(value: object) -> object:
    """Return a tensor's name, or numbers in lists in lists, all of one length on each axis."""
    if not _text(value).startswith("["):
        return value

    def checked(part: Any) -> Any:
        if isinstance(part, list):
            if len({len(one) if isinstance(one, list) else 0 for one in part}) != 1:
                raise ValueError
            return [checked(one) for one in part]
        return _number(str(part)) if type(part) in (int, float) else _number(part)

    return checked(loads(_text(value)))


def _offset(value: object) -> object:
    """Return numbers, or a tensor's name."""
    text = _text(value)
    if text.startswith("["):
        return [_number(str(part)) for part in loads(text)]
    return _several(_number)(text) if _is_number(text) else text


def _is_number(value: object) -> bool:
    """Return whether a text is meant as a number, not as a name: 'nan' and 'inf' too, which are none after all."""
    return re.match(r"[-+.0-9]|(nan|inf|infinity)$", _text(value).lower()) is not None


INTEGER = FieldType(_integer, "an integer", int)
INTEGERS = FieldType(_per_axis(_integer), "an integer or one per axis, such as 2 or 2,1", list[int])
PADDING = FieldType(
    _padding, "1, one per axis (1,2), before:after (0:1,2:2), 'same', 'valid' or 'half'", list[tuple[int, int]]
)
MODE = FieldType(_such(_text, PADDING_MODES.__contains__), "one of " + ", ".join(PADDING_MODES), PaddingMode)
FLAG = FieldType(_flag, "true or false", bool)
POSITIVE = FieldType(_such(_eps, lambda eps: 0 <= eps < math.inf), "a number of at least 0, such as 1e-3", float)
SIZES = FieldType(
    _such(_several(_integer, BETWEEN_SIZES), lambda sizes: min(sizes, default=0) >= 1),
    "spatial sizes, such as 7,7",
    list[int],
)
NUMBER = FieldType(_number, "a finite number", float)
NUMBERS = FieldType(_several(_number), "finite numbers, such as 0.5,0.4", list[float])
TEXT = FieldType(_text, "a name", str)
RANGE = FieldType(_range, "channels A:B, from A up to B, which is left out", list[int], between=":")
LIST = FieldType(_several(_integer), "channels, such as 2,1,0", list[int])
TENSOR = FieldType(_kernel, "a tensor's full name, or numbers in a JSON list", names_tensors=True)
NUMBER_OR_TENSOR = FieldType(
    lambda value: _number(value) if _is_number(value) else _text(value),
    "a finite number, or a tensor's full name",
    float,
    True,
)
NUMBERS_OR_TENSOR = FieldType(_offset, "numbers such as 0.5,0.4, or a tensor's full name", names_tensors=True)

# What a convolution's fields take, and what they are in torch where they aren't said.
GEOMETRY = {"stride": INTEGERS, "padding": PADDING, "dilation": INTEGERS, "groups": INTEGER, "padding_mode": MODE}
GEOMETRY_DEFAULTS: Fields = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
