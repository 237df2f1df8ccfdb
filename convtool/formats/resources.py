"""What a machine can run out of: told apart from bugs, with what was wanted and what helps."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from convtool.errors import ConvtoolError, human_bytes

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# What libraries say in place of a MemoryError: torch, its C++ runtime, the loader of shared objects, Python's threads.
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|failed to map segment|cannot allocate memory|Cannot allocate|"
    r"can't start new thread|Unable to allocate|OutOfMemory|out of memory|failed to allocate|unable to mmap"
)
_WANTED = re.compile(r"tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ [KMGTPE]?i?B)")


def ran_out(error: BaseException, size: int | None = None) -> str | None:
    """Say what ran out, how much was wanted, and what would help; None for an error of another kind.

    Args:
        size: in bytes, of what was being written.
    """
    number = error.errno if isinstance(error, OSError) else None
    takes = "" if size is None else f"; it takes {human_bytes(size)}"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):  # torch's own, or safetensors'
        return f"too many open files{_limit('RLIMIT_NOFILE', str)}; allow more with `ulimit -n`"
    if number == errno.ENOSPC:
        return f"No space left on device{takes}"
    if number == errno.EDQUOT:
        return f"Disk quota exceeded{takes}"
    if number == errno.EFBIG:
        return f"File too large{_limit('RLIMIT_FSIZE', human_bytes)}{takes}; allow larger ones with `ulimit -f`"
    if number == errno.ENOMEM or isinstance(error, MemoryError) or _MEMORY.search(str(error)):
        found = _WANTED.search(str(error))
        wanted = "" if found is None else f": {human_bytes(int(found[1])) if found[1] else found[2]} were wanted"
        limit = _limit("RLIMIT_AS", human_bytes)
        return f"not enough memory{wanted}{limit}" + ("; allow more with `ulimit -v`" if limit else "")
    return None


def reason(error: Exception, size: int | None = None) -> str:
    """Say why the system refused, as `ran_out` does where that tells."""
    return ran_out(error, size) or str(getattr(error, "strerror", None) or error)


@contextlib.contextmanager
def asked(path: Path, how: str, kind: type[ConvtoolError]) -> Iterator[None]:
    """Ask the system for something; where it refuses, raise an error of that kind: PATH: cannot be HOW: REASON."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # the last two of links in a circle, and of null characters
        raise kind(f"{path}: cannot be {how}: {reason(error)}") from None


def _limit(name: str, form: object) -> str:
    """Return what this process is limited to, in brackets; nothing where it isn't."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY and callable(form):
            return f" (the limit here is {form(soft)})"
    return ""
