"""Zip archives of stored members: written from front to back, and read with all of their bookkeeping checked.

The standard library's zipfile makes the headers and the directory. It can't align members, and it checksums every byte
anew: here a matrix's repeated chunks are checksummed once (`combine_crc`), and a member's data can be mapped into
memory as it stands.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from convtool.formats.atomic import FilePlan
from convtool.formats.pieces import Piece
from convtool.formats.source import Part, Source, combine_crc

ALIGNMENT = 64  # of each member's data: what torch and numpy map
LONGEST_NAME = 0xFFFF  # of a member, in bytes

_PADDING_ID = 0x4246  # "FB": torch's own, for the same purpose
_LOCAL, _WIDE, _FIELD = 30, 20, 4  # bytes of a local header, of its sizes where they are large, and before any extra
_WRITABLE = 1 << 63  # bytes of an archive; larger ones are planned, to say their size, and never written
ZIP_MAGIC = b"PK\x03\x04"
SAVE_AGAIN = "load it with torch and save it again"
_PACKED = re.compile(r"(^|/)code/.*\.(py|debug_pkl)$")  # what torch.jit deflates
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


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


def plan_archive(members: Sequence[Piece], check: Callable[[Path], None]) -> FilePlan:
    """Plan the archive of these members."""
    return FilePlan(archive_size(members), lambda file: write_archive(file, members), check)


def archive_size(members: Sequence[Piece]) -> int:
    """Return the size in bytes of the archive of these members; none of their chunks is made."""
    total = sum(member.nbytes for member in members)
    if total >= _WRITABLE:
        return total
    file = _Counted()
    write_archive(file, members, filled=False)
    return file.end


def write_archive(file: Any, members: Sequence[Piece], *, filled: bool = True) -> None:
    """Write an archive from the start of a file, or all of it but what its members hold.

    Raises:
        RuntimeError: a member's chunks don't add up to its size.
    """
    archive = zipfile.ZipFile(file, "w")
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


# Reading


def read_members(source: Source) -> dict[str, Part]:
    """Return every member's place, all of the archive's bookkeeping checked.

    Raises:
        InputError: it is damaged, or a member is compressed that torch doesn't compress.
    """
    listed, start = _directory(source)
    directory = bytes(source.view(start, source.size))
    end = directory.rfind(b"PK\x05\x06")
    if end < 0 or len(directory) != end + 22 + int.from_bytes(directory[end + 20 : end + 22], "little"):
        raise source.damaged("bytes follow the end of its zip archive")
    if listed and all(info.header_offset for info in listed):
        raise source.damaged("bytes stand before its zip archive")
    checked = any(info.CRC for info in listed)  # torch can be told to write none
    placed: dict[str, Part] = {}
    taken = 0
    for info in sorted(listed, key=lambda info: info.header_offset):
        name, size = info.filename, info.file_size
        if name in placed:
            raise source.damaged(f"its archive has the member {name!r} twice")
        packed = info.compress_type == zipfile.ZIP_DEFLATED and _PACKED.search(name) is not None
        if (info.compress_type != zipfile.ZIP_STORED and not packed) or info.flag_bits & 1:
            what = what_else(info.filename for info in listed)
            raise source.error(f"was compressed or encrypted by another program ({name}); {what}")
        data_start = _data_start(source, info, taken)
        taken = data_start + info.compress_size
        if (info.compress_size != size and not packed) or taken > start:
            raise source.damaged(f"the member {name!r} is declared to take {size} bytes, which aren't there")
        crc = info.CRC if checked else None
        placed[name] = Part(source, data_start, info.compress_size, crc, size if packed else None)
    return placed


def what_else(names: Iterable[str]) -> str:
    """Say what to do with an archive that torch didn't write, by its members' names."""
    arrays = list(names)
    if arrays and all(name.endswith(".npy") for name in arrays):
        return "it is an .npz of numpy's: load it and save its arrays as tensors with torch.save"
    inner = next((name for name in arrays if name.endswith(_CHECKPOINTS)), None)
    return SAVE_AGAIN if inner is None else f"it holds {inner}; unpack that first"


def _directory(source: Source) -> tuple[list[zipfile.ZipInfo], int]:
    """Return what an archive's directory says of its members, and where it stands."""
    try:
        with source.opened() as file, zipfile.ZipFile(file) as archive:
            return archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, EOFError, OverflowError, OSError):
        raise source.error(
            "is truncated or damaged: it begins like a zip archive, and has no readable directory at its end"
        ) from None


def _data_start(source: Source, info: zipfile.ZipInfo, taken: int) -> int:
    """Return where a member's data begin, by its own header, which must say what the directory says."""
    offset = info.header_offset
    if offset < taken or offset + _LOCAL_HEADER.size > source.size:
        raise source.damaged(f"the member {info.filename!r} overlaps another")
    magic, _, _, _, _, _, crc, _, size, name_length, extra = _LOCAL_HEADER.unpack(
        source.view(offset, offset + _LOCAL_HEADER.size)
    )
    name_start = offset + _LOCAL_HEADER.size
    data_start: int = name_start + name_length + extra
    if magic != ZIP_MAGIC or data_start > source.size:
        raise source.damaged(f"the member {info.filename!r} isn't where the directory says")
    names = (info.filename.encode(), info.filename.encode("cp437", "replace"))
    sizes = {0, 0xFFFFFFFF, info.file_size}  # none (it follows the data), in the zip64 field, or here
    same_name = bytes(source.view(name_start, name_start + name_length)) in names
    if not same_name or size not in sizes or crc not in (0, info.CRC):
        raise source.damaged(f"the directory and the member {info.filename!r} disagree")
    return data_start
