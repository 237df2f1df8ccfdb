"""Results as JSON: a command's frozen dataclass is all that is said of its document, here and in its schema.

A field of it is a property of the document by the same name, unless its metadata are HIDDEN, OPTIONAL or INLINE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from convtool.cli import exit_codes
from convtool.core.tree import Chain, Sum

SCHEMA = 1
Result = TypeVar("Result")
HIDDEN = {"document": "hidden"}  # for the screen alone
OPTIONAL = {"document": "optional"}  # left out where it is None, false or an empty text
INLINE = {"document": "inline"}  # its own fields stand in its place

Count: TypeAlias = Annotated[int, ("minimum", 0)]
Sizes: TypeAlias = tuple[Count, ...]
Dtype: TypeAlias = Annotated[str, ("description", "torch's name without the 'torch.'")]
LayerKind: TypeAlias = Annotated[str, ("description", "conv, linear, batch_norm, ...: as far as names and shapes tell")]
LayerFields: TypeAlias = Annotated[dict[str, Any], "fields"]  # those of kinds of layers


@dataclass(frozen=True, slots=True)
class Error:
    """Why a command failed.

    Attributes:
        message: the line on stderr.
    """

    kind: Annotated[str, ("enum", tuple(exit_codes.FAILURES))]
    exit_code: Annotated[int, ("enum", tuple(exit_codes.FAILURES.values()))]
    message: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Any command that failed; with exit code 1 of `verify` the document is a result, not this."""

    error: Error


def fill(result: type[Result], *sources: object, **values: Any) -> Result:
    """Make a result of these values, and for the rest of what the first source with an attribute of that name has."""
    for name in (field.name for field in fields(result) if field.name not in values):  # type: ignore[arg-type]
        values[name] = next(getattr(source, name) for source in sources if hasattr(source, name))
    return result(**values)


def whole_document(command: str | None, result: Any, exit_code: int) -> dict[str, Any]:
    """Return the document of a command's result, or of its failure, with what every document begins with.

    `ok` is true exactly where the exit code is 0, so not of two checkpoints that differ.
    """
    return {"schema": SCHEMA, "command": command, "ok": exit_code == 0} | _object(result)


def to_json(value: Any) -> Any:
    """Return a value as JSON has it; what JSON has no number for is the string 'inf', '-inf' or 'nan'."""
    if isinstance(value, Chain | Sum):
        return {type(value).__name__.lower(): to_json(value.parts)}
    if is_dataclass(value):
        return _object(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _object(value: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if field.metadata == INLINE:
            made |= _object(item)
        elif field.metadata != HIDDEN and not (field.metadata == OPTIONAL and item in (None, False, "")):
            made[field.name] = to_json(item)
    return made
