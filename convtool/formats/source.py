"""The bytes of a file that is read, or of a part of one, block by block, and the arrays that they are.

A file isn't mapped into memory: one that another program cuts short meanwhile would kill the process, without a word.
Who asks for a matrix's arrays as they stand in the file gets them mapped all the same (`convtool.load_matrix`).
"""

from __future__ import annotations

import abc
import io
import math
import mmap
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from convtool.errors import InputError, human_bytes
from convtool.formats.account import account
from convtool.formats.resources import asked, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from convtool.formats.atomic import Written

Array: TypeAlias = "Tensor | StoredArray"  # what a matrix is made of

MOST_TEXT = 1 << 28  # bytes of a member that is unpacked, or read as text
CHUNK = 1 << 22  # bytes that stand in memory at a time while a file is copied
SENT = 1 << 24  # bytes that the kernel copies at a time; a signal is heard between two of these
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # <asm-generic/mman.h>; the mmap module lacks it until 3.13
_CRC_POLYNOMIAL = 0xEDB88320


class Chunk:
    """Bytes, and their CRC-32 for the formats that want it, computed once however often they are written."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)

    @cached_property
    def crc(self) -> int:
        return zlib.crc32(self.data)


class Source(abc.ABC):
    """Bytes by position: a file's, those of a part of it, or some that are made of it.

    Attributes:
        path: of the file.
        size: in bytes.
    """

    path: Path
    size: int

    @abc.abstractmethod
    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with the bytes from `start` on; InputError where they can't be read or are gone."""

    def error(self, what: str) -> InputError:
        """Return the error that says something of the file."""
        return InputError(f"{self.path}: {what}")

    def damaged(self, how: str) -> InputError:
        """Return the error that says how the file is damaged."""
        return self.error(f"is damaged: {how}")

    def opened(self) -> io.BufferedReader:
        """Return them as a file, to be read from its beginning."""
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

    def checked(self, what: str) -> Iterator[Chunk]:
        """Yield all bytes, compared with their checksum as they go by, where there is one.

        Args:
            what: they are, for messages.

        Raises:
            InputError: they are other bytes than were written.
        """
        return map(Chunk, self.chunks(0, self.size))

    def mapped(self, start: int, stop: int) -> memoryview:
        """Return bytes start to stop over the file itself, where its file system can map; see the module's docstring.

        The memory is writable, which torch asks for, though nothing written to it reaches the file.
        """
        return self.view(start, stop)

    def copy_to(self, file: Written, start: int, stop: int) -> None:
        """Write bytes start to stop to a file, past this process's memory where the systems of both files can.

        Raises:
            InputError: they can't be read, or the file became shorter.
        """
        for piece in self.chunks(start, stop):
            file.write(piece)


class File(Source):
    """A file's bytes; its size is what it was when the file was opened.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with asked(path, "read", InputError):
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._file)
            status = os.fstat(self._file)
        self.size = status.st_size
        account().reads(path, status)

    def mapped(self, start: int, stop: int) -> memoryview:
        try:
            # None of it will be written to, so that no memory need be set aside for that.
            flags = getattr(mmap, "MAP_PRIVATE", 0) | MAP_NORESERVE
            made = mmap.mmap(self._file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, AttributeError):  # AttributeError: Windows
            return self.view(start, stop)
        return memoryview(made)[start:stop]

    def copy_to(self, file: Written, start: int, stop: int) -> None:
        position = start
        while position < stop and (sent := file.send(self._file, position, min(SENT, stop - position))):
            position += sent
        super().copy_to(file, position, stop)  # says what is wrong, where something is

    def read_into(self, buffer: memoryview, start: int) -> None:
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


class Part(Source):
    """Bytes that stand in a file, read as if they were a file by themselves.

    Attributes:
        start: of the part in the file.
        crc: their CRC-32, where the file has one; once they are unpacked.
        unpacked: how many bytes they are then, where they are deflated: only `text` can be asked for.
    """

    def __init__(
        self, whole: Source, start: int, size: int, crc: int | None = None, unpacked: int | None = None
    ) -> None:
        self.path, self.whole, self.start, self.size = whole.path, whole, start, size
        self.crc, self.unpacked = crc, unpacked

    def read_into(self, buffer: memoryview, start: int) -> None:
        self.whole.read_into(buffer, self.start + start)

    def checked(self, what: str) -> Iterator[Chunk]:
        crc = 0
        for chunk in super().checked(what):
            crc = combine_crc(crc, chunk.crc, len(chunk.data))
            yield chunk
        if self.crc not in (None, crc):
            raise self.damaged(f"the checksum of {what} is {crc:08x}, and was {self.crc:08x} when it was written")

    def text(self, what: str) -> bytes:
        """Return all bytes of a small member of an archive, unpacked; see `checked`."""
        size = self.size if self.unpacked is None else self.unpacked
        if size > MOST_TEXT:
            raise self.error(f"{what} is of {size} bytes, which is larger than any")
        if self.unpacked is None:
            return b"".join(bytes(chunk.data) for chunk in self.checked(what))
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unpacker.decompress(self.view(0, self.size), size + 1)
        except zlib.error:
            data = b""
        if len(data) != size or (self.crc is not None and zlib.crc32(data) != self.crc):
            raise self.damaged(f"{what} can't be unpacked")
        return data


class Held(Source):
    """Bytes that are in memory already."""

    def __init__(self, of: Source, data: bytes) -> None:
        self.path, self.size, self.data = of.path, len(data), data

    def read_into(self, buffer: memoryview, start: int) -> None:
        buffer[:] = self.data[start : start + len(buffer)]


class StoredArray:
    """An array that stands in a file as it is: row-major, in this machine's byte order.

    Attributes:
        start: where its first byte stands.
    """

    def __init__(self, source: Source, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.source, self.start, self.dtype, self.shape = source, start, dtype, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice, /) -> Tensor:
        """Return rows of it, read from the file."""
        first, last, _ = part.indices(len(self))
        inner = self.shape[1:]
        start = self.start + first * math.prod(inner) * self.dtype.itemsize
        return StoredArray(self.source, start, self.dtype, (max(0, last - first), *inner)).read()

    def read(self) -> Tensor:
        """Return all of it, read from the file."""
        return self._over(self.source.view)

    def numel(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)

    def unbind(self) -> tuple[StoredArray, ...]:
        """Return its rows, each an array by itself."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        starts = range(self.start, self.start + size * len(self), size or 1)
        return tuple(StoredArray(self.source, start, self.dtype, self.shape[1:]) for start in starts)

    def mapped(self) -> Tensor:
        """Return it as a tensor over the file, mapped into memory; the file has to stay as it is meanwhile."""
        aligned = self.start % self.dtype.itemsize == 0  # as torch wants it
        return self._over(self.source.mapped if aligned else self.source.view)

    def _over(self, bytes_of: Callable[[int, int], memoryview]) -> Tensor:
        import torch

        if not self.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        view = bytes_of(self.start, self.start + self.numel() * self.dtype.itemsize)
        made: Tensor = torch.frombuffer(view, dtype=self.dtype).reshape(self.shape)
        return made


def mapped(array: Array) -> Tensor:
    """Return an array as a tensor; over the file where it stands in one."""
    return array.mapped() if isinstance(array, StoredArray) else array[:]


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


# Checksums


def combine_crc(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two byte strings joined, from that of each and the length in bytes of the second.

    A CRC is the remainder of a polynomial over GF(2); appending `length` bytes multiplies it by x**(8*length).
    """
    return _multiply(_power(length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Return the product of two polynomials modulo CRC-32's, coefficients from the highest bit down."""
    product = 0
    while a:
        if a & 1 << 31:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_CRC_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _power(length: int) -> int:
    """Return x**(8*length) modulo CRC-32's polynomial."""
    result, square = 1 << 31, 1 << 23  # 1 and x**8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result
