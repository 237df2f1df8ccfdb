"""Writing an edited checkpoint: what the edit doesn't touch stays as it is, bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtool.checkpoint import safetensors_file, torch_file
from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.safetensors_file import Entry, SafetensorsCheckpoint
from convtool.checkpoint.torch_file import TorchCheckpoint
from convtool.errors import RefusedError, UsageError
from convtool.files.atomic import check_target, replacing


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


def write_edited(source: Checkpoint, edit: Edit, path: Path, record: Record, *, force: bool) -> None:
    """Write `source` with `edit` applied and the record of it; the suffix of `path` chooses the format.

    Raises:
        OutputError: the target exists, or could not be written; nothing is left behind.
        RefusedError: the format cannot hold what the source holds.
        UsageError: no known suffix, or a new name is taken.
    """
    _writer(path)(source, edit, path, record, force)


def _write_safetensors(source: Checkpoint, edit: Edit, path: Path, record: Record, force: bool) -> None:
    if isinstance(source, TorchCheckpoint):
        _check_flat(source, path)
    order = edit.order(source.infos)
    entries = [_entry(source, name, tensor) for name, tensor in order]
    metadata = dict(source.metadata) if isinstance(source, SafetensorsCheckpoint) else {"format": "pt"}
    metadata[safetensors_file.RECORD_KEY] = record.dumps()
    shapes = {entry.name: entry.shape for entry in entries}
    with replacing(
        path, force=force, check=lambda file: safetensors_file.check_written(file, shapes, edit.insert)
    ) as file:
        safetensors_file.write_safetensors(file, entries, metadata)


def _write_torch(source: Checkpoint, edit: Edit, path: Path, record: Record, force: bool) -> None:
    if isinstance(source, TorchCheckpoint):
        value: Any = source.edited(edit)
        root = ".".join(source.root)
    else:
        value = OrderedDict(
            (name, source.tensor(name) if tensor is None else tensor) for name, tensor in edit.order(source.infos)
        )
        root = ""
    shapes = {
        name: source.infos[name].shape if tensor is None else tuple(tensor.shape)
        for name, tensor in edit.order(source.infos)
    }
    # The record is on disk before the checkpoint takes its name, and takes its own right after: the only failure that
    # could part them is one between two renames, and `verify` would find the record untrue of the tensors.
    with replacing(torch_file.record_path(path), force=force) as record_file:
        record_file.write(torch_file.record_text(record))
        record_file.flush()
        with replacing(
            path, force=force, check=lambda file: torch_file.check_written(file, shapes, edit.insert, root)
        ) as file:
            torch.save(value, file)


_WRITERS: dict[str, Callable[[Checkpoint, Edit, Path, Record, bool], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".bin": _write_torch,
    ".ckpt": _write_torch,
}


def _writer(path: Path) -> Callable[[Checkpoint, Edit, Path, Record, bool], None]:
    if path.suffix not in _WRITERS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(_WRITERS)}")
    return _WRITERS[path.suffix]


def _entry(source: Checkpoint, name: str, tensor: Tensor | None) -> Entry:
    if tensor is None and isinstance(source, SafetensorsCheckpoint):
        info, span = source.infos[name], source.spans[name]
        return Entry(name, span.code, info.shape, info.nbytes, lambda: safetensors_file.chunks_of(source.raw(name)))
    value = source.tensor(name) if tensor is None else tensor
    code = safetensors_file.CODES.get(str(value.dtype).removeprefix("torch."))
    if code is None:
        raise RefusedError(f"{name}: safetensors has no {value.dtype}; write a .pt file instead")
    return Entry(name, code, tuple(value.shape), value.nbytes, lambda: safetensors_file.tensor_chunks(value))


def _check_flat(source: TorchCheckpoint, path: Path) -> None:
    """A safetensors file is a flat table of separate tensors; refuse what wouldn't survive in one."""
    if source.root:
        raise RefusedError(
            f"{path}: {source.path} holds more than the state dict at {'.'.join(source.root)!r}, and a safetensors"
            " file has no room for it; write a .pt file instead"
        )
    others = [str(name) for name in source.state if name not in source.infos]
    if others:
        raise RefusedError(
            f"{path}: {source.path} holds entries that safetensors has no room for ({', '.join(others[:3])});"
            " write a .pt file instead"
        )
    tensors: Mapping[str, Tensor] = {name: source.tensor(name) for name in source.infos}
    tied = torch_file.shared_storages(tensors)
    if tied:
        raise RefusedError(
            f"{path}: {tied[0][0]} and {tied[0][1]} share their memory, which safetensors cannot express;"
            " write a .pt file instead"
        )
