"""JSON as files that may be damaged have it: a key given twice, or a number that isn't one, is not passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convtool.errors import InputError


class _TwiceError(Exception):
    pass


def parse_json(
    data: bytes | str, path: Path | str, what: str, small: Callable[[dict[str, Any]], Any] = lambda pairs: None
) -> Any:
    """Return the document that a file, or a part of it, holds.

    Args:
        what: of the file, for messages: "its header".
        small: makes another value of an object, in which a document of a million of them takes less memory; None where
            it is to stay a dict.

    Raises:
        InputError: it is not JSON, or has a key twice in one object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return small(found) or found

    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is damaged: {what} is not JSON, since it is not UTF-8") from None
    except _TwiceError as error:
        raise InputError(f"{path}: is damaged: {what} has the key {error.args[0]!r:.100} twice") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is damaged: {what} is not JSON") from None


def _no_constant(text: str) -> None:
    raise ValueError(text)  # NaN and Infinity, which JSON doesn't have and Python reads


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8; half a surrogate pair, which JSON can name, can't."""
    return re.search("[\ud800-\udfff]", text) is None
