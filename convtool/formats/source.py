"""The bytes of a file that is read, block by block.

It isn't mapped into memory: a file that another program cuts short meanwhile would kill the process, without a word.
Who asks for a matrix's arrays as they stand in the file gets them mapped all the same (`convtool.load_matrix`).
"""

from __future__ import annotations

import io
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from convtool.errors import InputError, human_bytes
from convtool.formats.account import Seen, account, version_of
from convtool.formats.resources import reason

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
        seen: the file as it was then.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._file)
            status = os.fstat(self._file)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {reason(error)}") from None
        self.size = status.st_size
        self.seen = Seen(path.absolute(), version_of(status))
        account().reads(self.seen)

    def error(self, what: str) -> InputError:
        """Return the error that says something of the file."""
        return InputError(f"{self.path}: {what}")

    def damaged(self, how: str) -> InputError:
        """Return the error that says how the file is damaged."""
        return self.error(f"is damaged: {how}")

    def opened(self) -> io.BufferedReader:
        """Open the same file once more, to be read from its beginning, whatever has its name by now."""
        return _Opened(_Stream(self))

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes start to stop, in memory of their own, which may be written to.

        Raises:
            InputError: they can't be read, aren't there, or don't fit into memory.
        """
        if not 0 <= start <= stop <= self.size:  # before any memory is taken for them
            raise self.error(f"is truncated: bytes {start} to {stop} are asked for, and it has {self.size}")
        try:
            data = bytearray(stop - start)
        except MemoryError:
            raise self.error(f"a part of it takes {human_bytes(stop - start)} of memory, which aren't free") from None
        self.read_into(memoryview(data), start)
        return memoryview(data)

    def chunks(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield bytes start to stop in pieces, each valid until the next is asked for."""
        buffer = memoryview(bytearray(min(CHUNK, stop - start)))
        for position in range(start, stop, CHUNK):
            piece = buffer[: min(CHUNK, stop - position)]
            self.read_into(piece, position)
            yield piece

    def mapped(self, start: int, stop: int) -> memoryview:
        """Return bytes start to stop over the file itself, where its file system can map; see the module's docstring.

        The memory is writable, which torch asks for, though nothing written to it reaches the file.
        """
        try:
            # None of it will be written to, so that no memory need be set aside for that.
            flags = getattr(mmap, "MAP_PRIVATE", 0) | MAP_NORESERVE
            made = mmap.mmap(self._file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, AttributeError):  # AttributeError: Windows
            return self.view(start, stop)
        return memoryview(made)[start:stop]

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

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with the bytes from `start` on; InputError where they can't be read or are gone."""
        done = 0
        while done < len(buffer):
            try:
                count = _read_at(self._file, buffer[done:], start + done)
            except OSError as error:
                raise self.error(f"cannot be read: {reason(error)}") from None
            if not count:
                raise self.error("became shorter while it was read")
            done += count


def _read_at(descriptor: int, buffer: memoryview, start: int) -> int:
    """Read into a buffer from a position, and return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], start)
    os.lseek(descriptor, start, os.SEEK_SET)  # Windows has nothing better; nobody else uses this descriptor's position
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


class _Opened(io.BufferedReader):
    """Asks for no more than there is, since room is made for all that is asked for: lengths in a file are anybody's."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > CHUNK:
            size = min(size, max(0, cast(_Stream, self.raw).left(self.tell())))
        return super().read(size)


class _Stream(io.RawIOBase):
    """A source as a file that is read from one end to the other, as the readers of other packages want it."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def left(self, position: int) -> int:
        """Return how many bytes stand behind a position."""
        return self._source.size - position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._source.size - self._position))
        self._source.read_into(view[:count], self._position)
        self._position += count
        return count
