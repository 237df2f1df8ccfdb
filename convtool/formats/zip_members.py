"""The members of a zip archive that torch wrote, their places in the file, and all of its bookkeeping checked."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterable

from convtool.formats.resources import reason
from convtool.formats.source import Source
from convtool.formats.storages import Placed

ZIP_MAGIC = b"PK\x03\x04"
SAVE_AGAIN = "load it with torch and save it again"
_PACKED = re.compile(r"(^|/)code/.*\.(py|debug_pkl)$")  # what torch.jit deflates
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def read_members(source: Source) -> dict[str, Placed]:
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
    placed: dict[str, Placed] = {}
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
        placed[name] = Placed(source, data_start, size, crc, info.compress_size if packed else None)
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
    except OSError as error:
        raise source.error(f"cannot be read: {reason(error)}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, RuntimeError, OverflowError):
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
