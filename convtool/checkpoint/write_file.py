"""Writing an edited checkpoint as one file: what the edit doesn't touch stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from convtool.checkpoint import safetensors_file, torch_writer
from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.cast import cast_chunks
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.safetensors_file import Entry, SafetensorsCheckpoint
from convtool.checkpoint.sharded import ShardedCheckpoint
from convtool.checkpoint.tensor_bytes import tensor_chunks
from convtool.checkpoint.torch_file import TorchCheckpoint
from convtool.checkpoint.torch_record import RecordBeside, record_path, record_size
from convtool.checkpoint.torch_writer import NewTensor, castable
from convtool.errors import RefusedError, UsageError
from convtool.formats.atomic import replacing
from convtool.formats.dtypes import FLOATS, ITEMSIZE
from convtool.formats.pickle_reader import OrderedItems
from convtool.formats.room import Progress, Reported
from convtool.formats.stored_zip import Member, archive_size, write_archive


@dataclass(frozen=True, slots=True)
class Options:
    """How an edited checkpoint is written.

    Attributes:
        force: overwrite what is there.
        dtype: of every floating-point tensor of 16 bits and more; None for what it has.
        state_only: leave out what a torch file holds beside its state dict, where the format has no room for it.
        shard_size: bytes of tensors in a file of a folder; None for the files that the source has.
    """

    force: bool = False
    dtype: str | None = None
    state_only: bool = False
    shard_size: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to be written.

    Attributes:
        size: in bytes, exactly, with what is written beside it.
        write: writes it at a path, wholly and checked or not at all, and reports the bytes as they are written.
        beside: the files that are written beside it, by name, and their bytes.
    """

    size: int
    write: Callable[[Path, Progress], None]
    beside: Mapping[str, int] = field(default_factory=dict)


def _plan_safetensors(
    source: Checkpoint, edit: Edit, path: Path, record: Record | None, options: Options
) -> PlannedFile:
    check_flat(source, path, options)
    entries = entries_of(source, edit, options.dtype)
    return plan_flat(entries, metadata_of(source, record), edit.insert, force=options.force)


def plan_flat(entries: list[Entry], metadata: dict[str, str], new: dict[str, Tensor], *, force: bool) -> PlannedFile:
    """A .safetensors file of these tensors, of which those in `new` are read back bit for bit."""
    head, stored = safetensors_file.plan_safetensors(entries, metadata)
    shapes = {entry.name: entry.shape for entry in stored}
    check = {name: tensor for name, tensor in new.items() if name in shapes}

    def write(path: Path, progress: Progress) -> None:
        with replacing(path, force=force, check=lambda at: safetensors_file.check_written(at, shapes, check)) as file:
            safetensors_file.write_safetensors(Reported(file, progress), head, stored)

    return PlannedFile(len(head) + sum(entry.nbytes for entry in stored), write)


def metadata_of(source: Checkpoint, record: Record | None = None) -> dict[str, str]:
    """The metadata of a .safetensors file made of `source`, less the names of tied tensors, which are given anew."""
    metadata = {"format": "pt"}
    files = list(source.shards.values()) if isinstance(source, ShardedCheckpoint) else [source]
    if all(isinstance(file, SafetensorsCheckpoint) for file in files):
        metadata = {}
    for file in files:
        if isinstance(file, SafetensorsCheckpoint):
            metadata |= {key: text for key, text in file.metadata.items() if key not in file.aliases}
    metadata.pop(safetensors_file.RECORD_KEY, None)
    return metadata if record is None else metadata | {safetensors_file.RECORD_KEY: record.dumps()}


def entries_of(source: Checkpoint, edit: Edit, dtype: str | None) -> list[Entry]:
    """The tensors to write, in order."""
    order = edit.order(source.infos)
    places = _places(source, edit)
    return [
        _kept_entry(source, name, dtype, places[name]) if tensor is None else _new_entry(name, tensor, places[name])
        for name, tensor in order
    ]


def _places(source: Checkpoint, edit: Edit) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes come: in the source's order of bytes, which need not be that of its names."""
    names = list(source.infos)
    if isinstance(source, SafetensorsCheckpoint):
        names.sort(key=lambda name: source.spans[name][1:])
    return {name: (number, 0) for number, (name, _) in enumerate(edit.order(names))}


def _kept_entry(source: Checkpoint, name: str, dtype: str | None, place: tuple[int, int]) -> Entry:
    info = source.infos[name]
    if dtype is None or info.dtype not in FLOATS - {dtype}:
        chunks, copy = lambda: source.chunks(name), lambda file: source.copy_to(name, file)
        return Entry(name, info.dtype, info.shape, info.nbytes, chunks, source.memory(name), place, copy)
    nbytes = info.nbytes // ITEMSIZE[info.dtype] * ITEMSIZE[dtype]
    return Entry(
        name,
        dtype,
        info.shape,
        nbytes,
        lambda: cast_chunks(name, source.chunks(name), info.dtype, dtype),
        source.memory(name),
        place,
    )


def _new_entry(name: str, tensor: Tensor, place: tuple[int, int]) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    chunks = lambda: tensor_chunks(tensor)  # noqa: E731
    return Entry(name, dtype, tuple(tensor.shape), tensor.nbytes, chunks, ("new", name), place)


def _plan_torch(source: Checkpoint, edit: Edit, path: Path, record: Record | None, options: Options) -> PlannedFile:
    entries = entries_of(source, edit, options.dtype)
    if not isinstance(source, TorchCheckpoint):
        check_flat(source, path, options)
        planned = plan_dict(entries, edit.insert, record, force=options.force)
    else:
        if options.dtype is not None:
            _check_castable(source, edit, options.dtype)
        planned = _plan_value(
            torch_writer.plan_torch(source.edited(edit), source, cast_chunks, options.dtype),
            lambda file: torch_writer.check_written(file, _described(entries), edit.insert, source.root),
            record,
            force=options.force,
        )
    recorded = record_size(record)
    return replace(planned, beside={record_path(path).name: recorded}) if recorded else planned


def plan_dict(
    entries: list[Entry],
    new: Mapping[str, Tensor] | None = None,
    record: Record | None = None,
    *,
    force: bool = False,
) -> PlannedFile:
    """A torch file of a plain state dict; RefusedError for a dtype that torch doesn't have."""
    for entry in entries:
        if entry.dtype not in ITEMSIZE:
            raise RefusedError(f"{entry.name}: torch has no dtype {entry.dtype}; write a .safetensors file instead")
    value = OrderedItems({entry.name: _torch_value(entry) for entry in entries})
    return _plan_value(
        torch_writer.plan_torch(value, None),
        lambda file: torch_writer.check_written(file, _described(entries), new or {}, ()),
        record,
        force=force,
    )


def _described(entries: list[Entry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {entry.name: (entry.dtype, entry.shape) for entry in entries}


def _plan_value(
    members: list[Member], check_file: Callable[[Path], str], record: Record | None, *, force: bool
) -> PlannedFile:
    """A torch file and the record beside it.

    Args:
        members: of the archive that it is.
        check_file: reads the file back, and gives its mark.
    """
    recorded = record_size(record)

    def write(path: Path, progress: Progress) -> None:
        beside = RecordBeside(path, record)
        try:
            with replacing(path, force=force, check=lambda at: beside.prepare(check_file(at))) as file:
                write_archive(Reported(file, progress), members)
        except BaseException:
            beside.undo()
            raise
        beside.finish()
        progress(recorded)

    return PlannedFile(archive_size(members) + recorded, write)


def _torch_value(entry: Entry) -> NewTensor:
    return NewTensor(entry.dtype, entry.shape, entry.chunks, entry.memory)


def _check_castable(source: TorchCheckpoint, edit: Edit, dtype: str) -> None:
    """Whether every tensor that is to be cast lies in a storage that can be."""
    storages = castable(source, dtype)
    for name, ref in source.tensors.items():
        if ref.dtype in FLOATS - {dtype} and name not in edit.remove and ref.storage.key not in storages:
            raise RefusedError(f"{name} shares its memory with a tensor of another dtype, and cannot be cast alone")


Planner: TypeAlias = Callable[[Checkpoint, Edit, Path, Record | None, Options], PlannedFile]
PLANNERS: dict[str, Planner] = {
    ".safetensors": _plan_safetensors,
    ".pt": _plan_torch,
    ".pth": _plan_torch,
    ".bin": _plan_torch,
    ".ckpt": _plan_torch,
}


def planner_of(path: Path) -> Planner:
    """What plans a file of that name."""
    if path.suffix not in PLANNERS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(PLANNERS)}")
    return PLANNERS[path.suffix]


def check_flat(source: Checkpoint, path: Path, options: Options) -> None:
    """Whether the source is a flat table of separate tensors: refuse what wouldn't survive in a new file of those."""
    for name, reason in source.unusable.items():
        raise RefusedError(f"{path}: there is no room for {name}, which {reason}")
    overlap = source.overlapping()
    if overlap is not None:
        raise RefusedError(
            f"{path}: {overlap[0]} and {overlap[1]} share a part of their memory, which can be kept only from one .pt"
            " file to another"
        )
    if options.state_only:
        return
    if isinstance(source, TorchCheckpoint) and source.root:
        root = ".".join(source.root)
        raise RefusedError(
            f"{path}: {source.path} holds more than the state dict at {root!r}, and there is no room for it; write a"
            f" .pt file instead, or leave the rest out with `convtool convert --root {root}`"
        )
    if source.others:
        raise RefusedError(
            f"{path}: {source.path} holds entries that aren't tensors, and there is no room for them"
            f" ({', '.join(source.others[:3])}); write a .pt file instead"
        )
