"""Writing an edited checkpoint: what the edit doesn't touch stays as it is, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.cast import cast_tensor
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.sharded import INDEX_SUFFIX, ShardedCheckpoint
from convtool.checkpoint.torch_record import record_path
from convtool.checkpoint.write_file import PLANNERS, Options, PlannedFile, planner_of
from convtool.checkpoint.write_folder import check_folder, index_path, left_behind, plan_folder
from convtool.errors import UsageError
from convtool.formats.atomic import check_target
from convtool.formats.room import Progress, check_space


def check_output(path: Path, *, force: bool, source: Checkpoint | None = None, shard_size: int | None = None) -> None:
    """Whether an edited checkpoint can be written to `path`, before anything is computed.

    Args:
        source, shard_size: as of `write_edited`; they tell whether `path` is a folder's.

    Raises:
        UsageError: no known suffix, or no name.
        OutputError: something is in the way.
    """
    if path == Path():  # also what an empty string becomes, as of a shell's variable that isn't set
        raise UsageError("expected the name of a file or a folder as OUT, got an empty one, or the folder itself")
    if is_folder(path, source, shard_size):
        check_folder(path, source, force=force)
        return
    planner_of(path)
    check_target(path, force=force)
    if path.suffix != ".safetensors":
        check_target(record_path(path), force=force)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """An edited checkpoint that is to be written; nothing of it is, yet.

    Attributes:
        path: where to.
        folder: the one that its files will stand in.
        main: the file that is opened to read it: the one at `path`, or the index of the folder there.
        size: of all its files in bytes, exactly: the index and the record included.
        left_behind: files beside the source that a folder written of it will not have; none where a file is written.
    """

    path: Path
    folder: Path
    main: Path
    file: PlannedFile
    left_behind: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def files(self) -> dict[Path, int]:
        """Every file that will be written, and its bytes; a folder's index first."""
        beside = {self.main.with_name(name): size for name, size in self.file.beside.items()}
        return {self.main: self.size - sum(beside.values())} | beside

    def write(self, progress: Progress | None = None) -> None:
        """Write it, wholly and checked, or not at all.

        Args:
            progress: called with the number of bytes written since its last call; they add up to `size`.

        Raises:
            OutputError: it wouldn't fit the file system or could not be written, or something appeared at the path;
                nothing is left behind.
            InputError: a tensor's bytes are damaged, or a number is too large for the new dtype.
        """
        check_space(self.path, self.folder, self.size)
        self.file.write(self.path, progress or (lambda count: None))


def plan_edited(
    source: Checkpoint,
    edit: Edit,
    path: Path,
    record: Record | None,
    *,
    force: bool,
    dtype: str | None = None,
    state_only: bool = False,
    shard_size: int | None = None,
) -> WritePlan:
    """What writing `source` with `edit` applied, and the record of it, will give; nothing is written.

    Args:
        path: a file, whose suffix chooses the format; or a folder or index, for a checkpoint in several files.
        record: None for a checkpoint without one.
        force, dtype, state_only, shard_size: see `Options`.

    Raises:
        OutputError: something is in the way (`check_output`).
        RefusedError: the format cannot hold what the source holds.
        UsageError: no known suffix, or a new name is taken.
        InputError: a new tensor holds a number that is too large for `dtype`.
    """
    options = Options(force, dtype, state_only, shard_size)
    check_output(path, force=force, source=source, shard_size=shard_size)
    if dtype is not None:
        edit = edit.changed(lambda name, tensor: cast_tensor(name, tensor, dtype))
    if is_folder(path, source, shard_size):
        index = index_path(path, source)
        file = plan_folder(source, edit, path, record, options)
        return WritePlan(path, index.parent, index, file, left_behind(source, index.parent))
    file = planner_of(path)(source, edit, path, record, options)
    return WritePlan(path, check_target(path, force=force).parent, path, file)


def write_edited(
    source: Checkpoint,
    edit: Edit,
    path: Path,
    record: Record | None,
    *,
    force: bool,
    dtype: str | None = None,
    state_only: bool = False,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `source` with `edit` applied and the record of it: `plan_edited`, then `WritePlan.write`, with the
    arguments and the errors of both.
    """
    plan = plan_edited(
        source, edit, path, record, force=force, dtype=dtype, state_only=state_only, shard_size=shard_size
    )
    plan.write(progress)


def is_folder(path: Path, source: Checkpoint | None, shard_size: int | None) -> bool:
    """Whether a checkpoint in several files is what is to be written."""
    if path.name.endswith(INDEX_SUFFIX) or path.is_dir():
        return True
    return path.suffix not in PLANNERS and (isinstance(source, ShardedCheckpoint) or shard_size is not None)
