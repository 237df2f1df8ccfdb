"""Where a torch file keeps its pickle and its storages: a zip archive, or the older row of pickles and bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convtool.formats.pickle_reader import Pickled, loads
from convtool.formats.pickle_values import Global, PickleError, StorageRef, storage_ref
from convtool.formats.pieces import Piece
from convtool.formats.source import Held, Part, Source
from convtool.formats.stored_tensors import check_storages, check_tensors
from convtool.formats.stored_zip import SAVE_AGAIN, ZIP_MAGIC, read_members, what_else

# Members that every writer makes anew.
_OWN_MEMBERS = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a torch file holds.

    Attributes:
        value: what was pickled, as `pickle_reader` reads it.
        storages: by key, those of numpy's arrays too.
        extras: other members of the archive, by name.
        foreign: classes and functions that the pickle names and no state dict is made of.
    """

    value: Any
    storages: Mapping[str, Source]
    extras: Mapping[str, Part]
    foreign: tuple[Global, ...]

    def text(self, name: str) -> str | None:
        """Return a member of the archive as text; None where there is none."""
        placed = self.extras.get(name)
        return None if placed is None else placed.text(name).decode("utf-8", "replace")


def text_member(name: str, text: str | None) -> list[Piece]:
    """Return the member of an archive that holds a text, if there is one."""
    return [] if text is None else [Piece.of(name, text.encode())]


def read_contents(source: Source) -> Contents:
    """Return the table of contents of a torch file; no storage is read.

    Raises:
        InputError: it is damaged, or of a kind that holds no state dict.
    """
    if bytes(source.view(0, min(4, source.size))) == ZIP_MAGIC:
        return read_archive(source, read_members(source))
    try:
        return _read_legacy(source)
    except PickleError as error:
        raise source.error(f"is damaged, or not a torch file: {error}") from None


def read_archive(source: Source, members: Mapping[str, Part]) -> Contents:
    """Return the table of contents of torch's zip archive of these members."""
    roots = [name.removesuffix("data.pkl") for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        what = "no data.pkl" if not roots else "several data.pkl"
        raise source.error(f"is a zip archive that torch.save didn't write: it has {what}; {what_else(members)}")
    own = {name.removeprefix(roots[0]): placed for name, placed in members.items() if name.startswith(roots[0])}
    order = own.get("byteorder")
    if order is not None and order.text("byteorder") != b"little":
        raise source.error(f"was written on a big-endian machine; {SAVE_AGAIN} on a little-endian one")
    pickled = own["data.pkl"].text("data.pkl")
    file, refs = io.BytesIO(pickled), list[StorageRef]()

    def persistent(pid: Any) -> StorageRef:
        refs.append(storage_ref(pid))
        return refs[-1]

    try:
        read = loads(file, str(source.path), persistent)
    except PickleError as error:
        raise source.error(f"is damaged, or not a torch file: {error}") from None
    if file.tell() != len(pickled):
        raise source.damaged("bytes follow the end of its pickle")
    storages = {name.removeprefix("data/"): placed for name, placed in own.items() if name.startswith("data/")}
    extras = {name: placed for name, placed in own.items() if name not in _OWN_MEMBERS and not name.startswith("data/")}
    return _contents(source, read, refs, storages, extras)


def _contents(
    source: Source,
    read: Pickled,
    refs: Iterable[StorageRef],
    storages: Mapping[str, Part],
    extras: Mapping[str, Part] | None = None,
) -> Contents:
    everywhere: dict[str, Source] = {**storages, **{key: Held(source, data) for key, data in read.arrays.items()}}
    check_storages(source, refs, everywhere)
    check_tensors(source, read.tensors)
    return Contents(read.value, everywhere, extras or {}, tuple(read.foreign))


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def _read_legacy(source: Source) -> Contents:
    """Read a row of pickles (magic number, version, machine, object, keys of storages), then each storage."""
    where = str(source.path)
    refs: dict[str, StorageRef] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
            return pid[1]  # a class of modules, with its source code beside it
        ref = storage_ref(pid)
        known = refs.setdefault(ref.key, ref)
        if (known.dtype, known.count) != (ref.dtype, ref.count):
            raise PickleError(f"its pickle describes the storage {ref.key!r} in two ways")
        return ref

    with source.opened() as file:
        first = loads(file, where, no_storage)
        if first.value != LEGACY_MAGIC:
            if file.tell() != source.size:
                raise source.error(f"is a pickle that torch.save didn't write, and more; {SAVE_AGAIN}")
            return _contents(source, first, (), {})  # such as detectron's: arrays in dicts
        version, machine = (loads(file, where, no_storage).value for _ in range(2))
        if version != LEGACY_PROTOCOL or not isinstance(machine, dict):
            raise source.error("is of a version of torch's older format that isn't known")
        if machine.get("little_endian") is not True:
            raise source.error(f"was written on a big-endian machine; {SAVE_AGAIN} on a little-endian one")
        read = loads(file, where, persistent)
        keys = loads(file, where, no_storage).value
        named = isinstance(keys, list) and all(isinstance(key, str) and key in refs for key in keys)
        if not named or len(set(keys)) != len(keys):
            raise source.damaged("its list of storages isn't that of its tensors")
        position = file.tell()
    storages = _legacy_storages(source, [refs[key] for key in keys], position)
    return _contents(source, read, refs.values(), storages)


def _legacy_storages(source: Source, refs: Iterable[StorageRef], position: int) -> dict[str, Part]:
    """Return the places of the storages that follow the pickles, each behind the count of its elements."""
    storages: dict[str, Part] = {}
    for ref in refs:
        count = source.view(position, position + 8) if position + 8 <= source.size else b""
        if int.from_bytes(count, "little") != ref.count or position + 8 + ref.nbytes > source.size:
            raise source.error(
                f"is truncated or damaged: storage {ref.key} of {ref.nbytes} bytes is not where it should be"
            )
        storages[ref.key] = Part(source, position + 8, ref.nbytes)
        position += 8 + ref.nbytes
    if position != source.size:
        raise source.damaged(f"{source.size - position} bytes follow the last storage")
    return storages


def no_storage(_: Any) -> Any:
    raise PickleError("its pickle has a storage where none belongs")
