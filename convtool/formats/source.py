"""The bytes of a file that is read: mapped into memory, or read piece by piece where the file system can't map."""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from convtool.errors import InputError

if TYPE_CHECKING:
    from convtool.formats.atomic import Written

CHUNK = 1 << 22  # bytes that stand in memory at a time while a file is copied
SENT = 1 << 24  # bytes that the kernel copies at a time; a signal is heard between two of these
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # <asm-generic/mman.h>; the mmap module lacks it until 3.13


class Source:
    """A file's bytes by position.

    Attributes:
        path: of the file.
        size: in bytes, as it was when the file was opened.

    Args:
        mapped: map the file into memory; where False, or where the file system can't, what is asked for is read.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path, *, mapped: bool = True) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self.size = os.fstat(self._file).st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._map = self._mapped() if mapped and self.size else None

    def error(self, what: str) -> InputError:
        """Return the error that says something of the file."""
        return InputError(f"{self.path}: {what}")

    def damaged(self, how: str) -> InputError:
        """Return the error that says how the file is damaged."""
        return self.error(f"is damaged: {how}")

    def opened(self) -> BinaryIO:
        """Open the same file once more, to be read from its beginning, whatever has its name by now."""
        file = os.fdopen(os.dup(self._file), "rb")
        file.seek(0)
        return file

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes start to stop, in writable memory, though nothing written to it reaches the file."""
        if self._map is not None:
            return memoryview(self._map)[start:stop]
        data = bytearray(stop - start)
        self._read_into(memoryview(data), start)
        return memoryview(data)

    def chunks(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield bytes start to stop in pieces, each valid until the next is asked for.

        They are read rather than mapped, so that a file that another program cuts short meanwhile is an error here
        and not the end of the process.
        """
        buffer = memoryview(bytearray(min(CHUNK, stop - start)))
        for position in range(start, stop, CHUNK):
            piece = buffer[: min(CHUNK, stop - position)]
            self._read_into(piece, position)
            yield piece

    def copy_to(self, file: Written, start: int, stop: int) -> None:
        """Write bytes start to stop to a file, past this process's memory where the systems of both files can.

        Raises:
            InputError: they can't be read, or the file became shorter.
        """
        position = start
        while position < stop and (sent := file.send(self._file, position, min(SENT, stop - position))):
            position += sent
        for piece in self.chunks(position, stop):  # says what is wrong, where something is
            file.write(piece)

    def _mapped(self) -> mmap.mmap | None:
        try:
            # A private mapping: torch asks for writable memory, and nothing written could reach the file. None of it
            # will be written to, so that no memory need be set aside for that (a file may be larger than all there is).
            flags = mmap.MAP_PRIVATE | MAP_NORESERVE
            return mmap.mmap(self._file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError):
            return None

    def _read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file, [buffer[done:]], start + done)
            except OSError as error:
                raise self.error(f"cannot be read: {error.strerror or error}") from None
            if not count:
                raise self.error("became shorter while it was read")
            done += count
