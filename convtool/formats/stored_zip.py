"""A zip archive of stored, aligned members of known sizes, written from front to back.

The stdlib's zipfile can't align members and checksums every byte anew; here a matrix's repeated chunks are
checksummed once (`combine_crc`), and a member's data can be mapped into memory as it stands. What is written is read
back with zipfile.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from convtool.formats.pieces import Piece

ALIGNMENT = 64  # of each member's data: what torch and numpy map

LONGEST_NAME = 0xFFFF  # of a member, in bytes
LIMIT = 0xFFFFFFFF  # sizes and offsets from here on take the zip64 fields

_FULL = 0xFFFFFFFF  # in a short field: look in the zip64 one
_FULL_COUNT = 0xFFFF
_UTF8 = 1 << 11  # a flag: how the name is encoded
_WIDEST = (1 << 64) - 1  # what a zip64 field holds; archives beyond are planned, to say their size, and never written
_DATE = (1 << 5) | 1  # 1 January 1980, the format's first day, so that equal contents give equal files
_PADDING_ID = 0x4246  # "FB": torch's own, for the same purpose
_ZIP64_ID = 1
_LOCAL, _CENTRAL, _END = 0x04034B50, 0x02014B50, 0x06054B50
_END64, _LOCATOR64 = 0x06064B50, 0x07064B50
_CRC_POLYNOMIAL = 0xEDB88320


class Output(Protocol):
    """What an archive needs of the file that it is written to."""

    def write(self, data: bytes | memoryview, /) -> int: ...

    def seek(self, offset: int, /) -> int: ...


class _Placed(NamedTuple):
    name: bytes
    size: int
    offset: int  # of the local header

    @property
    def big(self) -> bool:
        return self.size >= LIMIT

    @property
    def extra(self) -> bytes:
        """The local header's extra field less its padding."""
        size = min(self.size, _WIDEST)
        return struct.pack("<HHQQ", _ZIP64_ID, 16, size, size) if self.big else b""

    @property
    def padding(self) -> bytes:
        unpadded = self.offset + 30 + len(self.name) + len(self.extra) + 4
        return struct.pack("<HH", _PADDING_ID, -unpadded % ALIGNMENT) + b"\0" * (-unpadded % ALIGNMENT)

    @property
    def data_offset(self) -> int:
        return self.offset + 30 + len(self.name) + len(self.extra) + len(self.padding)

    def local(self, crc: int) -> bytes:
        size = _FULL if self.big else self.size
        extra = self.extra + self.padding
        fixed = (_LOCAL, self.version, self.flags, 0, 0, _DATE, crc, size, size, len(self.name), len(extra))
        return struct.pack("<L5H3L2H", *fixed) + self.name + extra

    def central(self, crc: int) -> bytes:
        wide = [min(self.size, _WIDEST)] * 2 if self.big else []
        wide += [min(self.offset, _WIDEST)] if self.offset >= LIMIT else []
        extra = struct.pack(f"<HH{len(wide)}Q", _ZIP64_ID, 8 * len(wide), *wide) if wide else b""
        size, offset = (_FULL if number >= LIMIT else number for number in (self.size, self.offset))
        version = 45 if wide else 20
        lengths = (crc, size, size, len(self.name), len(extra))
        fixed = (_CENTRAL, version, version, self.flags, 0, 0, _DATE, *lengths, 0, 0, 0, 0, offset)
        return struct.pack("<L6H3L5H2L", *fixed) + self.name + extra

    @property
    def flags(self) -> int:
        return 0 if self.name.isascii() else _UTF8

    @property
    def version(self) -> int:
        return 45 if self.big else 20


def archive_size(members: Sequence[Piece]) -> int:
    """Return the size in bytes of the archive of these members; none of their chunks is made."""
    placed = _place(members)
    end = placed[-1].data_offset + placed[-1].size if placed else 0
    central = b"".join(one.central(0) for one in placed)
    return end + len(central) + len(_end(len(placed), end, len(central)))


def write_archive(file: Output, members: Sequence[Piece]) -> None:
    """Write an archive from the start of a file.

    Raises:
        RuntimeError: a member's chunks don't add up to its size.
    """
    central: list[bytes] = []
    end = 0
    for member, place in zip(members, _place(members), strict=True):
        file.write(place.local(0))
        crc = size = 0
        for chunk in member.chunks():
            file.write(chunk.data)
            crc = combine_crc(crc, chunk.crc, chunk.data.nbytes)
            size += chunk.data.nbytes
        if size != member.nbytes:
            raise RuntimeError(f"{member.name}: {size} bytes came, {member.nbytes} were announced")
        # The checksum stands before the data that it is of, and is known after them.
        end = place.data_offset + size
        file.seek(place.offset)
        file.write(place.local(crc))
        file.seek(end)
        central.append(place.central(crc))
    directory = b"".join(central)
    file.write(directory)
    file.write(_end(len(members), end, len(directory)))


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


def _place(members: Sequence[Piece]) -> list[_Placed]:
    placed: list[_Placed] = []
    offset = 0
    for member in members:
        placed.append(_Placed(member.name.encode(), member.nbytes, offset))
        offset = placed[-1].data_offset + member.nbytes
    return placed


def _end(count: int, offset: int, size: int) -> bytes:
    """Return the end of the archive, after a central directory of this size at this offset."""
    if offset < LIMIT and size < LIMIT and count < _FULL_COUNT:
        return struct.pack("<L4H2LH", _END, 0, 0, count, count, size, offset, 0)
    offset, end = min(offset, _WIDEST), min(offset + size, _WIDEST)
    wide = struct.pack("<LQ2H2L4Q", _END64, 44, 45, 45, 0, 0, count, count, size, offset)
    wide += struct.pack("<LLQL", _LOCATOR64, 0, end, 1)
    return wide + struct.pack("<L4H2LH", _END, 0, 0, _FULL_COUNT, _FULL_COUNT, _FULL, _FULL, 0)
