"""Holding what `--json` printed against the schema that ships for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from convtool.cli.app import COMMANDS
from convtool.cli.schemas import schema


@cache
def _validator(command: str) -> Draft202012Validator:
    return Draft202012Validator(schema(command))


def forget() -> None:
    """Forget the schemas, as of a command that a test has defined for itself."""
    _validator.cache_clear()


def validate(document: dict[str, Any]) -> None:
    """Raise where a document isn't as its command's schema says; an unknown command can only fail."""
    command = document.get("command")
    known = command in COMMANDS
    assert known or document["ok"] is False
    errors = list(_validator(str(command) if known else next(iter(COMMANDS))).iter_errors(document))
    if errors:  # of the alternatives the one that was meant
        meant = [error for error in errors[0].context or () if error.schema_path[0] == 0] or errors
        raise AssertionError(f"{command}: {meant[0].json_path}: {meant[0].message}")
