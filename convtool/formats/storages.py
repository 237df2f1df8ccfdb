"""Where the bytes of tensors stand: in a file, in a pickle, or in pieces that are put together when asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from convtool.formats.pieces import Chunk
from convtool.formats.source import Source
from convtool.formats.stored_zip import combine_crc

MOST_TEXT = 1 << 28  # bytes of a member that is unpacked, or read as text


class Storage(Protocol):
    """Bytes of known number by position."""

    @property
    def nbytes(self) -> int: ...

    def view(self, start: int, stop: int, /) -> memoryview:
        """Return bytes start to stop, in memory that may be written to without reaching a file."""

    def chunks(self, start: int, stop: int, /) -> Iterator[memoryview]:
        """Yield bytes start to stop in pieces, each valid until the next is asked for."""

    def checked(self, what: str, /) -> Iterator[Chunk]:
        """Yield all bytes, compared with their checksum as they go by.

        Args:
            what: they are, for messages.

        Raises:
            InputError: they are other bytes than were written.
        """


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes that stand in a file.

    Attributes:
        crc: their CRC-32, where the file has one.
        packed: the bytes that they take there, where they are deflated: only `text` can be asked for.
    """

    source: Source
    start: int
    nbytes: int
    crc: int | None = None
    packed: int | None = None

    def view(self, start: int, stop: int) -> memoryview:
        return self.source.view(self.start + start, self.start + stop)

    def chunks(self, start: int, stop: int) -> Iterator[memoryview]:
        return self.source.chunks(self.start + start, self.start + stop)

    def checked(self, what: str) -> Iterator[Chunk]:
        crc = 0
        for data in self.chunks(0, self.nbytes):
            chunk = Chunk(data)
            crc = combine_crc(crc, chunk.crc, len(data))
            yield chunk
        if self.crc not in (None, crc):
            raise self.source.damaged(
                f"the checksum of {what} is {crc:08x}, and was {self.crc:08x} when it was written"
            )

    def text(self, what: str) -> bytes:
        """Return all bytes of a small member of an archive, unpacked; see `checked`."""
        if self.nbytes > MOST_TEXT:
            raise self.source.error(f"{what} is of {self.nbytes} bytes, which is larger than any")
        if self.packed is None:
            return b"".join(bytes(chunk.data) for chunk in self.checked(what))
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unpacker.decompress(self.source.view(self.start, self.start + self.packed), self.nbytes + 1)
        except zlib.error:
            data = b""
        if len(data) != self.nbytes or (self.crc is not None and zlib.crc32(data) != self.crc):
            raise self.source.damaged(f"{what} can't be unpacked")
        return data


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that are in memory already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def view(self, start: int, stop: int) -> memoryview:
        return memoryview(bytearray(self.data[start:stop]))

    def chunks(self, start: int, stop: int) -> Iterator[memoryview]:
        yield memoryview(self.data)[start:stop]

    def checked(self, _: str) -> Iterator[Chunk]:
        yield Chunk(self.data)
