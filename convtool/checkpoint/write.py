"""Writing an edited checkpoint, as a file or as a folder of files with an index.

What the edit doesn't touch stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.write_file import Options, check_flat, format_of, pieces_of, plan_file
from convtool.errors import OutputError, RefusedError, UsageError
from convtool.formats import CHECKPOINTS, checkpoint_format
from convtool.formats.atomic import FilePlan, Progress, check_target
from convtool.formats.indexes import INDEX_SUFFIX, index_text, plain_index
from convtool.formats.pieces import Piece
from convtool.formats.several import SeveralPlan, free_names

SHARD_SIZE = 5 * 10**9  # bytes of a file, where a folder is written of a single file; huggingface_hub's own
CONFIGURATION = "config.json"  # of a model that a folder is all about


@dataclass(frozen=True, slots=True)
class WritePlan:
    """An edited checkpoint that is to be written; nothing of it is, yet.

    Attributes:
        path: where to.
        files: every file that will be written, and its size in bytes, exactly; first the one that is opened to read it
            (the one at `path`, or the index of the folder there).
        run: writes it; takes a `progress`.
        left_behind: files beside the source that a folder written of it will not have; none where a file is written.
        left_out: what the source holds besides its tensors and this will not, by name.
        record_bytes: of the record of what was fused.
    """

    path: Path
    files: dict[Path, int]
    run: Callable[..., None]
    left_behind: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    record_bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(self.files.values())

    def write(self, progress: Progress | None = None) -> None:
        """Write it, wholly and checked, or not at all.

        Args:
            progress: called with the number of bytes written since its last call; they add up to `size`.

        Raises:
            OutputError: it wouldn't fit the file system or could not be written, or something appeared at the path;
                nothing is left behind.
            InputError: a tensor's bytes are damaged, or a number is too large for the new dtype.
        """
        self.run(progress=progress)


def check_output(path: Path, *, force: bool, source: Checkpoint | None = None, shard_size: int | None = None) -> None:
    """Check that an edited checkpoint can be written to `path`, before anything is computed.

    Args:
        source, shard_size: as of `plan_edited`; they tell whether `path` is a folder's.

    Raises:
        UsageError: no known suffix, or no name.
        OutputError: something is in the way.
    """
    if path == Path():  # also what an empty string becomes, as of a shell's variable that isn't set
        raise UsageError("expected the name of a file or a folder as OUT, got an empty one, or the folder itself")
    if is_folder(path, source, shard_size):
        _check_folder(path, source, force=force)
        return
    format_of(path)
    check_target(path, force=force)


def plan_edited(
    source: Checkpoint,
    edit: Edit,
    path: Path,
    record: Record | None,
    *,
    force: bool,
    **given: Any,
) -> WritePlan:
    """Say what writing `source` with `edit` applied, and the record of it, will give; nothing is written.

    Args:
        path: a file, whose suffix chooses the format; or a folder or index, for a checkpoint in several files.
        record: None for a checkpoint without one.
        force: overwrite what is there.
        given: `Options`.

    Raises:
        OutputError: something is in the way (`check_output`).
        RefusedError: the format cannot hold what the source holds.
        UsageError: no known suffix, or a new name is taken.
    """
    options = Options(**given)
    check_output(path, force=force, source=source, shard_size=options.shard_size)
    if is_folder(path, source, options.shard_size):
        return _plan_folder(source, edit, path, record, options, force=force)
    form = format_of(path)
    plan = plan_file(source, edit, path, form, record, options)
    kept = source.format == form.NAME and not options.tensors_only
    left_out = source.replaced if kept else source.left_out
    return WritePlan(path, {path: plan.size}, partial(plan.write, path, force=force), left_out=tuple(left_out))


def is_folder(path: Path, source: Checkpoint | None, shard_size: int | None) -> bool:
    """Tell whether a checkpoint in several files is what is to be written."""
    if path.name.endswith(INDEX_SUFFIX) or path.is_dir():
        return True
    several = source is not None and source.index is not None
    return path.suffix not in CHECKPOINTS and (several or shard_size is not None)


# Folders


def _check_folder(path: Path, source: Checkpoint | None, *, force: bool) -> None:
    """Check that the index of a folder can be written; see `check_output`."""
    index = _index_path(path, source)
    folder = index.parent
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is not a folder")
    check_target(index if folder.exists() else folder, force=force)


def _index_path(path: Path, source: Checkpoint | None) -> Path:
    """Return the index that a folder is written with: the one named, the one there is, or one named as usual."""
    if path.name.endswith(INDEX_SUFFIX):
        if path.name.removesuffix(INDEX_SUFFIX).rpartition(".")[2] not in ("safetensors", "bin"):
            raise UsageError(
                f"{path}: expected an index named NAME.safetensors{INDEX_SUFFIX} or NAME.bin{INDEX_SUFFIX}"
            )
        return path
    if source is not None and source.index is not None:
        return path / plain_index(source.path.name)
    torch = source is not None and source.format == "torch"
    return path / f"{'pytorch_model.bin' if torch else 'model.safetensors'}{INDEX_SUFFIX}"


def _left_behind(source: Checkpoint, folder: Path) -> list[str]:
    """Return files of the source's model that a folder has not: a configuration, a tokenizer, whatever isn't tensors.

    They aren't copied: a configuration tells of layers and dtypes that an edit may have changed.
    """
    try:
        names = sorted(path.name for path in source.path.parent.iterdir() if path.is_file())
    except OSError:
        return []
    if source.index is None and CONFIGURATION not in names:
        return []  # a file among others that have nothing to do with it
    ours = (*CHECKPOINTS, INDEX_SUFFIX)
    return [name for name in names if not (name.endswith(ours) or name[0] == "." or (folder / name).exists())]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file of a folder: the tensors in it, their bytes, and the plan of it."""

    names: list[str]
    nbytes: int
    plan: FilePlan


def _plan_folder(
    source: Checkpoint, edit: Edit, path: Path, record: Record | None, options: Options, *, force: bool
) -> WritePlan:
    """Plan files under names that nothing has, and the index that names them."""
    index = _index_path(path, source)
    shards = _kept_shards(source, edit, index, options) or _new_shards(source, edit, index, options)
    if not any(shard.names for shard in shards):
        raise RefusedError(f"{path}: there are no tensors for an index to name; write a single file instead")
    planned = dict(zip(free_names(index, _shard_suffix(index), len(shards)), shards, strict=True))
    homes = {tensor: name for name, shard in planned.items() for tensor in shard.names}
    homes = {name: homes[name] for name, _ in edit.order([*source.infos, *source.unusable])}
    total = sum(shard.nbytes for shard in shards)
    text = index_text(source.index or {}, homes, total, None if record is None else record.dumps())
    plan = SeveralPlan(index, text, {name: shard.plan for name, shard in planned.items()})
    left_out = tuple(source.left_out if source.index is None else ())
    run, left_behind = partial(plan.write, force=force), _left_behind(source, index.parent)
    return WritePlan(path, plan.files(), run, left_behind, left_out)


def _kept_shards(source: Checkpoint, edit: Edit, index: Path, options: Options) -> list[_Shard]:
    """Plan the files of the source, each with its part of the edit; none where they are to be divided otherwise."""
    form = checkpoint_format(_shard_suffix(index))
    others = any(file.format != form.NAME for file in source.files.values())
    if source.index is None or options.shard_size is not None or others:
        return []
    edit.order(source.infos)  # finds a name that is taken, in whichever file
    shards = []
    for file in source.files.values():
        shard = Checkpoint(file.path, {"": file})
        places = {anchor: new for anchor, new in edit.places.items() if anchor in shard.infos}
        part = Edit(edit.remove & shard.infos.keys(), places)
        names = [name for name, _ in part.order([*shard.infos, *shard.unusable])]
        if names:  # no index would name a file that the edit leaves empty
            nbytes = sum(piece.nbytes for piece in pieces_of(shard, part, options))
            shards.append(_Shard(names, nbytes, plan_file(shard, part, index, form, None, options)))
    return shards


def _new_shards(source: Checkpoint, edit: Edit, index: Path, options: Options) -> list[_Shard]:
    """Plan files of at most the size that was asked for, filled in the tensors' order; tied ones stay together."""
    check_flat(source, index, options)
    largest = options.shard_size or SHARD_SIZE
    groups: list[list[Piece]] = [[]]
    sizes = [0]
    home: dict[object, list[Piece]] = {}
    for piece in pieces_of(source, edit, options):
        if piece.identity not in home:
            if sizes[-1] and sizes[-1] + piece.nbytes > largest:
                groups.append([])
                sizes.append(0)
            sizes[-1] += piece.nbytes
            home[piece.identity] = groups[-1]
        home[piece.identity].append(piece)
    form = checkpoint_format(_shard_suffix(index))
    plans = [form.plan_state(pieces, source.metadata, None) for pieces in groups]
    names = [[piece.name for piece in pieces] for pieces in groups]
    return [_Shard(*parts) for parts in zip(names, sizes, plans, strict=True)]


def _shard_suffix(index: Path) -> str:
    return f".{index.name.removesuffix(INDEX_SUFFIX).rpartition('.')[2]}"
