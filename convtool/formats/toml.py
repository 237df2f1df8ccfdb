"""TOML from anyone: what would take tomllib gigabytes or minutes is told before it is read."""

from __future__ import annotations

import re
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from convtool.errors import InputError
from convtool.formats.resources import reason

STREAM = "-"  # in place of a file
LARGEST = 4 << 20  # characters of a file; tomllib reads some 500,000 in a second
_DOTS = 1_000_000  # dots of a line, squared and summed: a key of n parts takes tomllib n**2 / 2 steps, and places
# Strings and comments; what isn't closed counts to the end of its line, so that no character is looked at twice.
_APART = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|\'[^\'\n]*+\'?|#[^\n]*+')


def read_toml(path: Path) -> dict[str, Any]:
    """Return the document in a file, or on stdin for '-'; raise InputError where it is missing or isn't one."""
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == STREAM else path.open("rb") as file:
            data = file.read(4 * LARGEST + 1)
        return parse_toml(data.decode(), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Return the document; InputError, beginning with `where`, where it is none, or larger or deeper than is read."""
    if len(text) > LARGEST:
        raise InputError(f"{where}: {len(text)} characters are too many for a recipe or a geometry file")
    if sum(line.count(".") ** 2 for line in _APART.sub("", text).splitlines()) > _DOTS:
        raise InputError(f"{where}: has keys of too many parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{where}: has too many lists and tables inside of each other") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: is not TOML: {error}") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise InputError(f"{where}: has a number of thousands of digits") from None
