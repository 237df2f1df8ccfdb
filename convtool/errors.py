"""The errors that convtool raises on purpose; everything else that escapes is a bug.

Each message says what is wrong, where, what was expected, what was found, and what to do about it. The command
line maps each class to one exit code (`convtool.cli.exit_codes`); the classes themselves know nothing of that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator


class ConvtoolError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        paste: how the message ends: options that are the way out; the command line shows them in the whole command.
    """

    def __init__(self, message: str, paste: str = "") -> None:
        super().__init__(message)
        self.paste = paste


class UsageError(ConvtoolError):
    """The request itself is wrong: an unknown layer, a size that doesn't fit, options that contradict each other."""


class InputError(ConvtoolError):
    """An input file is missing, damaged, of an unsupported kind, or holds values that are not finite."""


class RefusedError(ConvtoolError):
    """The request is understood, and carrying it out would not be exact or not be safe."""


class OutputError(ConvtoolError):
    """The output exists already, or could not be written."""


_NO_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)  # in torch's RuntimeErrors


@contextlib.contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raise InputError, with what it was for, where memory doesn't suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise InputError(f"{what}: not enough memory for that") from None


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Say at the beginning of an error that is raised on purpose what it is about."""
    try:
        yield
    except ConvtoolError as error:
        raise type(error)(f"{what}: {error}", error.paste) from None


def a_or_an(name: str) -> str:
    """Return a name with its article, by its first letter."""
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def did_you_mean(given: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.5) -> str:
    """What to append to a message about an unknown name: the nearest known ones, or `otherwise` where none is near."""
    import difflib

    near = difflib.get_close_matches(given, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise


def of_bound(ratio: float) -> str:
    """Return the largest error by its bound in words: up to 100% of it passes, and only the bound itself is 100%.

    >>> [of_bound(ratio) for ratio in (0.0, 2e-9, 0.9996, 1.0, 1.0001, 12.34)]
    ['0', '<1% of bound', '99% of bound', '100% of bound', '1.01 times the bound', '12.3 times the bound']
    """
    if not ratio:
        return "0"
    if ratio <= 1:
        return "<1% of bound" if ratio < 0.01 else f"{int(100 * ratio)}% of bound"
    return f"{max(ratio, 1.01):.3g} times the bound"


def human_bytes(count: float) -> str:
    """1536 as '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
