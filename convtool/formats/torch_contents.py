"""Where a torch file keeps its pickle and its storages: a zip archive, or the older row of pickles and bytes."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from convtool.formats.dtypes import ITEMSIZE
from convtool.formats.pickle_reader import PickleError, PickleFile, StorageRef, TensorRef, loads, storage_ref
from convtool.formats.pieces import Chunk
from convtool.formats.source import Source
from convtool.formats.stored_zip import combine_crc

ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_SAVE_AGAIN = "load it with torch and save it again"
# Members that every writer makes anew.
_OWN_MEMBERS = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a storage's bytes stand in the file, and their CRC-32 where the file has one."""

    start: int
    nbytes: int
    crc: int | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a torch file holds.

    Attributes:
        value: what was pickled, as `pickle_reader` reads it.
        storages: by key.
        extras: other members of the archive, by name.
    """

    value: Any
    storages: Mapping[str, Placed]
    extras: Mapping[str, Placed]


def read_contents(source: Source) -> Contents:
    """Return the table of contents of a torch file; no storage is read.

    Raises:
        InputError: it is damaged, or of a kind that holds no state dict.
        RefusedError: its pickle asks for code.
    """
    try:
        zipped = bytes(source.view(0, min(4, source.size))) == ZIP_MAGIC
        contents = _read_zip(source) if zipped else _read_legacy(source)
    except PickleError as error:
        raise source.error(f"is damaged, or not a torch file: {error}") from None
    return contents


def _read_zip(source: Source) -> Contents:
    members = _members(source)
    roots = [name.removesuffix("data.pkl") for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        what = "no data.pkl" if not roots else "several data.pkl"
        raise source.error(f"is a zip archive that torch.save didn't write: it has {what}")
    own = {name.removeprefix(roots[0]): placed for name, placed in members.items() if name.startswith(roots[0])}
    order = own.get("byteorder")
    if order is not None and checked_bytes(source, "byteorder", order) != b"little":
        raise source.error(f"was written on a big-endian machine; {_SAVE_AGAIN} on a little-endian one")
    pickled = checked_bytes(source, "data.pkl", own["data.pkl"])
    file = io.BytesIO(pickled)
    value, tensors = loads(file, str(source.path), storage_ref)
    if file.tell() != len(pickled):
        raise source.damaged("bytes follow the end of its pickle")
    storages = {name.removeprefix("data/"): placed for name, placed in own.items() if name.startswith("data/")}
    _check_tensors(source, tensors, storages)
    extras = {name: placed for name, placed in own.items() if name not in _OWN_MEMBERS and not name.startswith("data/")}
    return Contents(value, storages, extras)


def checked_chunks(source: Source, what: str, placed: Placed) -> Iterator[Chunk]:
    """Yield all bytes of a member of the file, compared with its checksum as they go by.

    Args:
        what: it is, for messages.

    Raises:
        InputError: they are other bytes than were written.
    """
    crc = 0
    for data in source.chunks(placed.start, placed.start + placed.nbytes):
        chunk = Chunk(data)
        crc = combine_crc(crc, chunk.crc, len(data))
        yield chunk
    if placed.crc is not None and placed.crc != crc:
        raise source.damaged(f"the checksum of {what} is {crc:08x}, and was {placed.crc:08x} when it was written")


def checked_bytes(source: Source, what: str, placed: Placed) -> bytes:
    """Return all bytes of a small member; see `checked_chunks`."""
    return b"".join(bytes(chunk.data) for chunk in checked_chunks(source, what, placed))


def _members(source: Source) -> dict[str, Placed]:
    """Return every member's place, all of the archive's bookkeeping checked."""
    listed, start = _directory(source)
    if any(info.filename.rpartition("/")[2] == "constants.pkl" for info in listed):
        raise source.error("is TorchScript; save its weights: torch.save(torch.jit.load(PATH).state_dict(), NEW)")
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
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise source.error(f"was compressed or encrypted by another program ({name}); {_SAVE_AGAIN}")
        data_start = _data_start(source, info, taken)
        taken = data_start + size
        if info.compress_size != size or taken > start:
            raise source.damaged(f"the member {name!r} is declared to take {size} bytes, which aren't there")
        placed[name] = Placed(data_start, size, info.CRC if checked else None)
    return placed


def _directory(source: Source) -> tuple[list[zipfile.ZipInfo], int]:
    """Return what an archive's directory says of its members, and where it stands."""
    try:
        with source.opened() as file, zipfile.ZipFile(file) as archive:
            return archive.infolist(), archive.start_dir
    except OSError as error:
        raise source.error(f"cannot be read: {error.strerror or error}") from None
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


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def _read_legacy(source: Source) -> Contents:
    """Read a row of pickles (magic number, version, machine, object, keys of storages), then each storage."""
    where = str(source.path)
    refs: dict[str, StorageRef] = {}

    def persistent(pid: Any) -> StorageRef:
        ref = storage_ref(pid)
        known = refs.setdefault(ref.key, ref)
        if (known.dtype, known.count) != (ref.dtype, ref.count):
            raise PickleError(f"its pickle describes the storage {ref.key!r} in two ways")
        return ref

    with source.opened() as opened:
        file = _Bounded(opened, source.size)
        magic = _plain(file, where)
        if magic != LEGACY_MAGIC:
            raise source.error(f"is a pickle that torch.save didn't write; {_SAVE_AGAIN}")
        version, machine = _plain(file, where), _plain(file, where)
        if version != LEGACY_PROTOCOL or not isinstance(machine, dict):
            raise source.error("is of a version of torch's older format that isn't known")
        if machine.get("little_endian") is not True:
            raise source.error(f"was written on a big-endian machine; {_SAVE_AGAIN} on a little-endian one")
        value, tensors = loads(file, where, persistent)
        keys = _plain(file, where)
        named = isinstance(keys, list) and all(isinstance(key, str) and key in refs for key in keys)
        if not named or len(set(keys)) != len(keys):
            raise source.damaged("its list of storages isn't that of its tensors")
        position = file.tell()
    storages = _legacy_storages(source, [refs[key] for key in keys], position)
    _check_tensors(source, tensors, storages)
    return Contents(value, storages, {})


def _legacy_storages(source: Source, refs: Iterable[StorageRef], position: int) -> dict[str, Placed]:
    """Return the places of the storages that follow the pickles, each behind the count of its elements."""
    storages: dict[str, Placed] = {}
    for ref in refs:
        count = source.view(position, position + 8) if position + 8 <= source.size else b""
        if int.from_bytes(count, "little") != ref.count or position + 8 + ref.nbytes > source.size:
            raise source.error(
                f"is truncated or damaged: storage {ref.key} of {ref.nbytes} bytes is not where it should be"
            )
        storages[ref.key] = Placed(position + 8, ref.nbytes, None)
        position += 8 + ref.nbytes
    if position != source.size:
        raise source.damaged(f"{source.size - position} bytes follow the last storage")
    return storages


class _Bounded:
    """A file of pickles, of which no more is asked than there is: lengths in it are anybody's."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, count: int) -> bytes:
        data = self._file.read(min(count, self._left))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(LONGEST_LINE)
        self._left -= len(data)
        return data

    def tell(self) -> int:
        return self._file.tell()


LONGEST_LINE = 1 << 16  # of a pickle: names and numbers


def _plain(file: PickleFile, where: str) -> Any:
    """Read a pickle without storages."""

    def none(pid: Any) -> Any:
        raise PickleError("its pickle has a storage where none belongs")

    return loads(file, where, none)[0]


def _check_tensors(source: Source, tensors: list[TensorRef], storages: Mapping[str, Placed]) -> None:
    """Check that every tensor's storage is there, as long as declared, and holds all that the tensor reads.

    Raises:
        InputError: a storage is missing or of another length, a tensor reads beyond it, or claims absurdly more
            elements than the file has bytes (a stride of 0 repeats elements).
    """
    for tensor in tensors:
        ref = tensor.storage
        placed = storages.get(ref.key)
        if placed is None:
            raise source.damaged(f"the storage {ref.key!r} of a tensor is not in the file")
        if placed.nbytes != ref.nbytes:
            raise source.damaged(
                f"the storage {ref.key!r} has {placed.nbytes} bytes, and is declared to have {ref.nbytes}"
            )
        itemsize = ITEMSIZE[tensor.dtype]
        if tensor.reach and (tensor.offset + tensor.reach) * itemsize > placed.nbytes:
            raise source.damaged(
                f"a tensor of shape {list(tensor.shape)} reads beyond its storage {ref.key!r} of {placed.nbytes} bytes"
            )
        if tensor.nbytes > REPEATED * source.size + ROOM:
            raise source.error(
                f"a tensor of shape {list(tensor.shape)} repeats the {placed.nbytes} bytes of its"
                f" storage to {tensor.nbytes}; save it after .contiguous() if that is meant"
            )


# How much larger than the file a tensor of repeated elements may be, so that no small file fills the memory.
REPEATED = 16
ROOM = 1 << 24
