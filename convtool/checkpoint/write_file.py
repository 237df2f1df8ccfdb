"""Writing an edited checkpoint as one file: what the edit doesn't touch stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from convtool.checkpoint import safetensors_file, torch_file
from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.cast import cast_chunks
from convtool.checkpoint.dtypes import FLOATS, ITEMSIZE
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.pickled import OrderedItems
from convtool.checkpoint.record import Record
from convtool.checkpoint.safetensors_file import Entry, SafetensorsCheckpoint
from convtool.checkpoint.sharded import ShardedCheckpoint
from convtool.checkpoint.torch_file import NewTensor, TorchCheckpoint
from convtool.errors import OutputError, RefusedError, UsageError
from convtool.files.atomic import check_target, discard, replacing
from convtool.files.room import Progress, Reported
from convtool.files.stored_zip import Member, archive_size, write_archive


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
    chunks = lambda: torch_file.tensor_chunks(tensor)  # noqa: E731
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
            torch_file.plan_torch(source.edited(edit), source, cast_chunks, options.dtype),
            lambda file: torch_file.check_written(file, _described(entries), edit.insert, source.root),
            record,
            force=options.force,
        )
    recorded = _record_size(record)
    return replace(planned, beside={torch_file.record_path(path).name: recorded}) if recorded else planned


def plan_dict(
    entries: list[Entry],
    new: Mapping[str, Tensor] | None = None,
    record: Record | None = None,
    *,
    force: bool = False,
) -> PlannedFile:
    """A torch file of a plain state dict."""
    value = OrderedItems({entry.name: _torch_value(entry) for entry in entries})
    return _plan_value(
        torch_file.plan_torch(value, None),
        lambda file: torch_file.check_written(file, _described(entries), new or {}, ()),
        record,
        force=force,
    )


def _record_size(record: Record | None) -> int:
    return 0 if record is None else len(torch_file.record_text({torch_file.NO_MARK: record}))


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
    recorded = _record_size(record)

    def write(path: Path, progress: Progress) -> None:
        beside = _RecordBeside(path, record)
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
    castable = torch_file.castable(source, dtype)
    for name, ref in source.tensors.items():
        if ref.dtype in FLOATS - {dtype} and name not in edit.remove and ref.storage.key not in castable:
            raise RefusedError(f"{name} shares its memory with a tensor of another dtype, and cannot be cast alone")


class _RecordBeside:
    """The record beside a torch file, replaced so that the file that is there always has its own.

    The new record is there before the file takes its name, together with that of the file that is replaced; that one
    goes once the file has.
    """

    def __init__(self, path: Path, record: Record | None) -> None:
        self.checkpoint = path
        self.path = torch_file.record_path(path)
        self.record = record
        try:
            self.old = self.path.read_bytes() if check_target(self.path, force=True).exists() else None
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        self.before = torch_file.record_and_mark(path) if self.old is not None else None
        self.mark = ""
        self.prepared = False

    def prepare(self, mark: str) -> None:
        self.mark = mark
        if self.record is None:
            return
        records = {mark: self.record}
        if self.before is not None:
            records.setdefault(*self.before)
        self.prepared = True
        self._write(torch_file.record_text(records))

    def undo(self) -> None:
        """Put back what was there; where the file has taken its name already, the new record is its own and stays."""
        if not self.prepared:
            return
        if torch_file.mark_of(self.checkpoint) == self.mark:
            self.finish()
        elif self.old is None:
            discard(self.path)
        else:
            self._write(self.old)

    def finish(self) -> None:
        if self.record is None:
            discard(self.path)
        elif self.before is not None:
            self._write(torch_file.record_text({self.mark: self.record}))

    def _write(self, text: bytes) -> None:
        with replacing(self.path, force=True) as file:
            file.write(text)


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
