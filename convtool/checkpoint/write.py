"""Writing an edited checkpoint: what the edit doesn't touch stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from convtool.checkpoint import safetensors_file, torch_file
from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.cast import cast_chunks
from convtool.checkpoint.dtypes import FLOATS, ITEMSIZE
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.pickled import OrderedItems
from convtool.checkpoint.record import Record
from convtool.checkpoint.safetensors_file import Entry, SafetensorsCheckpoint
from convtool.checkpoint.torch_file import NewTensor, TorchCheckpoint
from convtool.errors import RefusedError, UsageError
from convtool.files.atomic import check_target, replacing


@dataclass(frozen=True, slots=True)
class Options:
    """How an edited checkpoint is written.

    Attributes:
        force: overwrite what is there.
        dtype: of every floating-point tensor of 16 bits and more that the edit doesn't bring; None for what it has.
        state_only: leave out what a torch file holds beside its state dict, where the format has no room for it.
    """

    force: bool = False
    dtype: str | None = None
    state_only: bool = False


def check_output(path: Path, *, force: bool) -> None:
    """Whether an edited checkpoint can be written to `path`, before anything is computed.

    Raises:
        UsageError: no known suffix.
        OutputError: something is in the way.
    """
    _writer(path)
    check_target(path, force=force)
    if path.suffix != ".safetensors":
        check_target(torch_file.record_path(path), force=force)


def write_edited(
    source: Checkpoint,
    edit: Edit,
    path: Path,
    record: Record | None,
    *,
    force: bool,
    dtype: str | None = None,
    state_only: bool = False,
) -> None:
    """Write `source` with `edit` applied and the record of it; the suffix of `path` chooses the format.

    Args:
        record: None for a checkpoint without one.
        force, dtype, state_only: see `Options`.

    Raises:
        OutputError: the target exists, or could not be written; nothing is left behind.
        RefusedError: the format cannot hold what the source holds.
        UsageError: no known suffix, or a new name is taken.
        InputError: a tensor's bytes are damaged, or a number is too large for `dtype`.
    """
    _writer(path)(source, edit, path, record, Options(force, dtype, state_only))


def _write_safetensors(source: Checkpoint, edit: Edit, path: Path, record: Record | None, options: Options) -> None:
    if isinstance(source, TorchCheckpoint):
        _check_flat(source, path, options)
    entries = _entries(source, edit, options.dtype)
    metadata = _metadata(source, record)
    head, stored = safetensors_file.plan_safetensors(entries, metadata)
    shapes = {entry.name: entry.shape for entry in stored}
    new = {name: tensor for name, tensor in edit.insert.items() if name in shapes}
    with replacing(
        path, force=options.force, check=lambda file: safetensors_file.check_written(file, shapes, new)
    ) as file:
        safetensors_file.write_safetensors(file, head, stored)


def _metadata(source: Checkpoint, record: Record | None) -> dict[str, str]:
    """The metadata of a .safetensors file made of `source`, less the names of tied tensors, which are given anew."""
    metadata = {"format": "pt"}
    if isinstance(source, SafetensorsCheckpoint):
        metadata = {key: text for key, text in source.metadata.items() if key not in source.aliases}
    metadata.pop(safetensors_file.RECORD_KEY, None)
    return metadata if record is None else metadata | {safetensors_file.RECORD_KEY: record.dumps()}


def _entries(source: Checkpoint, edit: Edit, dtype: str | None) -> list[Entry]:
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
        return Entry(name, info.dtype, info.shape, info.nbytes, lambda: source.chunks(name), source.memory(name), place)
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


def _write_torch(source: Checkpoint, edit: Edit, path: Path, record: Record | None, options: Options) -> None:
    known = source if isinstance(source, TorchCheckpoint) else None
    if known is not None:
        value, root = known.edited(edit), known.root
        if options.dtype is not None:
            _check_castable(known, edit, options.dtype)
    else:
        entries = _entries(source, edit, options.dtype)
        value, root = OrderedItems({entry.name: _torch_value(entry) for entry in entries}), ()
    expected = {entry.name: (entry.dtype, entry.shape) for entry in _entries(source, edit, options.dtype)}
    beside = _RecordBeside(path, record)

    def check(file: Path) -> None:
        mark = torch_file.check_written(file, expected, edit.insert, root)
        beside.prepare(mark)

    try:
        with replacing(path, force=options.force, check=check) as file:
            torch_file.write_torch(file, value, known, cast_chunks, options.dtype)
    except BaseException:
        beside.undo()
        raise
    beside.finish()


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
        self.path = torch_file.record_path(path)
        self.record = record
        self.old = self.path.read_bytes() if self.path.exists() else None
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
        self._write(torch_file.record_text(records))
        self.prepared = True

    def undo(self) -> None:
        if not self.prepared:
            return
        if self.old is None:
            self.path.unlink(missing_ok=True)
        else:
            self._write(self.old)

    def finish(self) -> None:
        if self.record is None:
            self.path.unlink(missing_ok=True)
        elif self.before is not None:
            self._write(torch_file.record_text({self.mark: self.record}))

    def _write(self, text: bytes) -> None:
        with replacing(self.path, force=True) as file:
            file.write(text)


_WRITERS: dict[str, Callable[[Checkpoint, Edit, Path, Record | None, Options], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".bin": _write_torch,
    ".ckpt": _write_torch,
}


def _writer(path: Path) -> Callable[[Checkpoint, Edit, Path, Record | None, Options], None]:
    if path.suffix not in _WRITERS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(_WRITERS)}")
    return _WRITERS[path.suffix]


def _check_flat(source: TorchCheckpoint, path: Path, options: Options) -> None:
    """A safetensors file is a flat table of separate tensors; refuse what wouldn't survive in one."""
    for name, reason in source.unusable.items():
        raise RefusedError(f"{path}: safetensors has no room for {name}, which {reason}")
    overlap = source.overlapping()
    if overlap is not None:
        raise RefusedError(
            f"{path}: {overlap[0]} and {overlap[1]} share a part of their memory, which safetensors cannot express;"
            " write a .pt file instead"
        )
    if options.state_only:
        return
    if source.root:
        raise RefusedError(
            f"{path}: {source.path} holds more than the state dict at {'.'.join(source.root)!r}, and a safetensors"
            " file has no room for it; write a .pt file instead, or leave the rest out with `convtool convert --root"
            f" {'.'.join(source.root)}`"
        )
    others = source.others
    if others:
        raise RefusedError(
            f"{path}: {source.path} holds entries that safetensors has no room for ({', '.join(others[:3])});"
            " write a .pt file instead"
        )
