"""Whether there is room for a file before its first byte is written, and how far it has been written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from convtool.errors import OutputError, human_bytes
from convtool.formats.atomic import Written

Progress: TypeAlias = Callable[[int], None]


def check_space(path: Path, folder: Path, size: int, advice: Callable[[int, int], str] = lambda size, free: "") -> None:
    """Whether the file system of `folder` has `size` bytes left for `path`; one that doesn't tell passes.

    Args:
        folder: where the bytes will go; where it is yet to be made, the nearest one above it counts.
        advice: what to add to the message where `size` bytes don't fit into the `free` ones.

    Raises:
        OutputError: it hasn't, or the folder cannot be looked at.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        usage = shutil.disk_usage(there)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
    if usage.total and size > usage.free:
        needs = f"{path}: needs {human_bytes(size)}, and its file system has {human_bytes(usage.free)} free"
        raise OutputError(needs + advice(size, usage.free))


class Reported:
    """A file that says how far it has been written.

    Args:
        report: called with the number of bytes written since its last call; what is written a second time, after a
            seek back, counts once.
    """

    def __init__(self, file: Written, report: Progress | None) -> None:
        self._file = file
        self._report = report
        self._position = self._reported = 0

    def write(self, data: bytes | memoryview, /) -> int:
        return self._counted(self._file.write(data))

    def send(self, descriptor: int, start: int, count: int, /) -> int:
        """See `Written.send`."""
        return self._counted(self._file.send(descriptor, start, count))

    def seek(self, offset: int, /) -> int:
        self._position = self._file.seek(offset)
        return self._position

    def _counted(self, written: int) -> int:
        self._position += written
        if self._report is not None and self._position > self._reported:
            self._report(self._position - self._reported)
            self._reported = self._position
        return written
