"""Writing an edited checkpoint as a folder of files with an index."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convtool.checkpoint import safetensors_file
from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.safetensors_file import Entry, SafetensorsCheckpoint
from convtool.checkpoint.sharded import INDEX_SUFFIX, ShardedCheckpoint, is_plain_name, read_index
from convtool.checkpoint.torch_file import TorchCheckpoint
from convtool.checkpoint.torch_record import RECORD_SUFFIX
from convtool.checkpoint.write_file import (
    PLANNERS,
    Options,
    PlannedFile,
    check_flat,
    entries_of,
    metadata_of,
    plan_dict,
    plan_flat,
)
from convtool.errors import InputError, OutputError, RefusedError, UsageError
from convtool.formats.atomic import alone_in, check_target, discard, replacing
from convtool.formats.room import Progress, Reported

SHARD_SIZE = 5 * 10**9  # bytes of a file, where a folder is written of a single file; huggingface_hub's own
CONFIGURATION = "config.json"  # of a model that a folder is all about


def check_folder(path: Path, source: Checkpoint | None, *, force: bool) -> None:
    """Whether the index of a folder can be written; see `check_output`."""
    index = index_path(path, source)
    if not index.parent.is_dir():
        if index.parent.exists():
            raise OutputError(f"{index.parent}: is not a folder")
        if not index.parent.parent.is_dir():
            raise OutputError(f"{path}: the folder {index.parent.parent} doesn't exist; create it first")
        return
    check_target(index, force=force)


def index_path(path: Path, source: Checkpoint | None) -> Path:
    """The index that a folder is written with: the one named, the one there is, or one named as the source's."""
    if path.name.endswith(INDEX_SUFFIX):
        if path.name.removesuffix(INDEX_SUFFIX).rpartition(".")[2] not in ("safetensors", "bin"):
            raise UsageError(
                f"{path}: expected an index named NAME.safetensors{INDEX_SUFFIX} or NAME.bin{INDEX_SUFFIX}"
            )
        return path
    if isinstance(source, ShardedCheckpoint):
        return path / source.path.name
    usual = "pytorch_model.bin" if isinstance(source, TorchCheckpoint) else "model.safetensors"
    return path / f"{usual}{INDEX_SUFFIX}"


def left_behind(source: Checkpoint, folder: Path) -> list[str]:
    """Files of the source's model that a folder has not: a configuration, a tokenizer, whatever isn't a checkpoint's.

    They aren't copied: a configuration tells of layers and dtypes that an edit may have changed.
    """
    try:
        names = sorted(path.name for path in source.path.parent.iterdir() if path.is_file())
    except OSError:
        return []
    if not isinstance(source, ShardedCheckpoint) and CONFIGURATION not in names:
        return []  # a file among others that have nothing to do with it
    ours = (*PLANNERS, INDEX_SUFFIX, RECORD_SUFFIX)
    return [name for name in names if not (name.endswith(ours) or name[0] == "." or (folder / name).exists())]


def plan_folder(source: Checkpoint, edit: Edit, path: Path, record: Record | None, options: Options) -> PlannedFile:
    """The files under names that nothing has, and the index that names them. Written, they come first, then the index,
    then files go that the old index named and the new one doesn't: whoever reads the index finds the old checkpoint or
    the new one, whole.
    """
    index = index_path(path, source)
    check_folder(path, source, force=options.force)
    shards = _kept_shards(source, edit, index, options) or _new_shards(source, edit, index, options)
    if not any(shard.names for shard in shards):
        raise RefusedError(f"{path}: there are no tensors for an index to name; write a single file instead")
    names = _free_names(index, len(shards))
    homes = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.names}
    homes = {name: homes[name] for name, _ in edit.order([*source.infos, *source.unusable])}
    text = _index_text(source, homes, sum(shard.nbytes for shard in shards), record)

    def write(_: Path, progress: Progress) -> None:
        _write_folder(index, dict(zip(names, shards, strict=True)), text, progress, force=options.force)

    sizes = {name: shard.file.size for name, shard in zip(names, shards, strict=True)}
    return PlannedFile(len(text) + sum(sizes.values()), write, sizes)


def _write_folder(index: Path, shards: Mapping[str, _Shard], text: bytes, progress: Progress, *, force: bool) -> None:
    folder = index.parent
    made_folder = not folder.is_dir()
    try:
        if made_folder:
            _make_folder(folder)
        with alone_in(folder):
            _write_files(index, shards, text, progress, force=force)
    except BaseException:
        if made_folder:
            with contextlib.suppress(OSError):  # not empty: the index is there
                folder.rmdir()
        raise


def _write_files(index: Path, shards: Mapping[str, _Shard], text: bytes, progress: Progress, *, force: bool) -> None:
    folder, old, names = index.parent, _names_in(index), set(shards)
    if not all(_is_free(folder / name) for name in names):
        raise OutputError(f"{folder}: another process has written to it meanwhile; nothing was changed")
    written: set[str] = set()
    try:
        for name, shard in shards.items():
            shard.file.write(folder / name, progress)
            written.add(name)
        with replacing(index, force=force) as file:
            Reported(file, progress).write(text)
    except BaseException:
        # Where the index has its name already, its files belong to it.
        _remove(folder, old - names if _names_in(index) == names else written)
        raise
    _remove(folder, old - names)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror or error}") from None


def _remove(folder: Path, names: set[str]) -> None:
    """Remove files that no index names any more; one that stays does no harm."""
    for name in sorted(names):
        discard(folder / name)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file of a folder: the tensors in it, their bytes, and how it is written."""

    names: list[str]
    nbytes: int
    file: PlannedFile


def _kept_shards(source: Checkpoint, edit: Edit, index: Path, options: Options) -> list[_Shard]:
    """The files of the source, each with its part of the edit; none where they are to be divided otherwise."""
    if not isinstance(source, ShardedCheckpoint) or options.shard_size is not None:
        return []
    suffix = _shard_suffix(index)
    if any((suffix == ".safetensors") != isinstance(shard, SafetensorsCheckpoint) for shard in source.shards.values()):
        return []
    edit.order(source.infos)  # finds a name that is taken, in whichever file
    options = replace(options, force=False)
    shards = [_kept_shard(shard, _part(edit, shard), index, options) for shard in source.shards.values()]
    return [shard for shard in shards if shard.names]  # no index would name a file that the edit leaves empty


def _kept_shard(shard: Checkpoint, edit: Edit, index: Path, options: Options) -> _Shard:
    names = [name for name, _ in edit.order([*shard.infos, *shard.unusable])]
    nbytes = sum(entry.nbytes for entry in entries_of(shard, edit, options.dtype))
    return _Shard(names, nbytes, PLANNERS[_shard_suffix(index)](shard, edit, index, None, options))


def _part(edit: Edit, shard: Checkpoint) -> Edit:
    """What of an edit concerns one file."""
    places = {anchor: new for anchor, new in edit.places.items() if anchor in shard.infos}
    return Edit(edit.remove & shard.infos.keys(), places)


def _new_shards(source: Checkpoint, edit: Edit, index: Path, options: Options) -> list[_Shard]:
    """Files of at most the size that was asked for, filled in the order of the tensors; tied ones stay together."""
    check_flat(source, index, options)
    largest = options.shard_size or SHARD_SIZE
    groups: list[list[Entry]] = [[]]
    sizes = [0]
    home: dict[Hashable, int] = {}
    for entry in entries_of(source, edit, options.dtype):
        if entry.memory in home:
            groups[home[entry.memory]].append(entry)
            continue
        if groups[-1] and sizes[-1] + entry.nbytes > largest:
            groups.append([])
            sizes.append(0)
        groups[-1].append(entry)
        sizes[-1] += entry.nbytes
        home[entry.memory] = len(groups) - 1
    metadata = metadata_of(source)
    return [_new_shard(entries, size, index, metadata) for entries, size in zip(groups, sizes, strict=True)]


def _new_shard(entries: list[Entry], nbytes: int, index: Path, metadata: dict[str, str]) -> _Shard:
    flat = _shard_suffix(index) == ".safetensors"
    file = plan_flat(entries, metadata, {}, force=False) if flat else plan_dict(entries)
    return _Shard([entry.name for entry in entries], nbytes, file)


def _shard_suffix(index: Path) -> str:
    return f".{index.name.removesuffix(INDEX_SUFFIX).rpartition('.')[2]}"


def _free_names(index: Path, count: int) -> list[str]:
    """Names for the files of a folder, as huggingface_hub makes them, and numbered anew where there are such."""
    stem, suffix = index.name.removesuffix(INDEX_SUFFIX).rpartition(".")[0], _shard_suffix(index)
    for generation in itertools.count(1):
        more = "" if generation == 1 else f"-{generation}"
        names = [f"{stem}-{number:05}-of-{count:05}{more}{suffix}" for number in range(1, count + 1)]
        if all(_is_free(index.parent / name) for name in names):
            return names
    raise AssertionError


def _is_free(path: Path) -> bool:
    return not (path.exists() or path.is_symlink())


def _names_in(index: Path) -> set[str]:
    """The files that an index names, as far as they are in its folder; none where there is no index."""
    if not index.exists():
        return set()
    try:
        names = set(read_index(index)["weight_map"].values())
    except InputError:
        return set()
    return {name for name in names if is_plain_name(name) and "/" not in name}


def _index_text(source: Checkpoint, homes: dict[str, str], total: int, record: Record | None) -> bytes:
    metadata: dict[str, Any] = {}
    if isinstance(source, ShardedCheckpoint):
        metadata = dict(source.index["metadata"])
    metadata["total_size"] = total
    metadata.pop(safetensors_file.RECORD_KEY, None)
    if record is not None:
        metadata[safetensors_file.RECORD_KEY] = record.dumps()
    return (json.dumps({"metadata": metadata, "weight_map": homes}, indent=2) + "\n").encode()
