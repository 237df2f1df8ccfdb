"""A zip archive of stored, aligned members of known sizes, written from front to back.

The standard library's zipfile makes the headers and the directory. It can't align members, and it checksums every byte
anew: here a matrix's repeated chunks are checksummed once (`combine_crc`), and a member's data can be mapped into
memory as it stands.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from typing import IO, Any, cast

from convtool.formats.pieces import Piece

ALIGNMENT = 64  # of each member's data: what torch and numpy map
LONGEST_NAME = 0xFFFF  # of a member, in bytes

_PADDING_ID = 0x4246  # "FB": torch's own, for the same purpose
_LOCAL, _WIDE, _FIELD = 30, 20, 4  # bytes of a local header, of its sizes where they are large, and before any extra
_WRITABLE = 1 << 63  # bytes of an archive; larger ones are planned, to say their size, and never written
_CRC_POLYNOMIAL = 0xEDB88320


class _Counted:
    """A file that nothing is kept of but where its end is."""

    def __init__(self) -> None:
        self.position = self.end = 0

    def write(self, data: bytes) -> None:
        self.seek(len(data), os.SEEK_CUR)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset if whence == os.SEEK_SET else self.position + offset
        self.end = max(self.end, self.position)
        return self.position

    def tell(self) -> int:
        return self.position

    def flush(self) -> None: ...


def archive_size(members: Sequence[Piece]) -> int:
    """Return the size in bytes of the archive of these members; none of their chunks is made."""
    total = sum(member.nbytes for member in members)
    if total >= _WRITABLE:
        return total
    file = _Counted()
    _write(file, members, filled=False)
    return file.end


def write_archive(file: IO[bytes], members: Sequence[Piece]) -> None:
    """Write an archive from the start of a file.

    Raises:
        RuntimeError: a member's chunks don't add up to its size.
    """
    _write(file, members, filled=True)


def _write(file: Any, members: Sequence[Piece], *, filled: bool) -> None:
    archive = zipfile.ZipFile(cast(IO[bytes], file), "w")
    try:
        for member in members:
            info = _header(member, file.tell())
            file.write(info.FileHeader())
            end = file.tell() + member.nbytes
            if filled:
                info.CRC = _fill(file, member)
                # The checksum stands before the data that it is of, and is known after them.
                file.seek(info.header_offset)
                file.write(info.FileHeader())
            archive.start_dir = file.seek(end)
            info.extra = b""  # in the directory
            archive.filelist.append(info)
    except BaseException:
        archive.fp = None  # or it would end the archive all the same
        raise
    archive.close()


def _header(member: Piece, offset: int) -> zipfile.ZipInfo:
    """Return what an archive says of a member whose header begins at `offset`; its date is the format's first day."""
    info = zipfile.ZipInfo(member.name)
    info.header_offset, info.CRC, info.file_size, info.compress_size = offset, 0, member.nbytes, member.nbytes
    wide = _WIDE if member.nbytes > zipfile.ZIP64_LIMIT else 0
    padding = -(offset + _LOCAL + len(member.name.encode()) + wide + _FIELD) % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    return info


def _fill(file: Any, member: Piece) -> int:
    """Write a member's data, and return its checksum."""
    crc = 0
    for chunk in member.counted():
        file.write(chunk.data)
        crc = combine_crc(crc, chunk.crc, chunk.data.nbytes)
    return crc


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
