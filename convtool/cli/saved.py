"""What commands say of a checkpoint that they wrote, or would write: its tensors, its files, its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from convtool.cli.document import OPTIONAL, Count, Dtype, LayerFields, LayerKind, Sizes, fill
from convtool.cli.output import Reporter, times
from convtool.core.names import some_of
from convtool.core.tree import BASE, Tree, map_leaves
from convtool.errors import human_bytes

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint
    from convtool.checkpoint.edit import Edit
    from convtool.checkpoint.record import FusionRecord
    from convtool.checkpoint.write import WritePlan
    from convtool.fusing.fusion import PlannedLayer
    from convtool.fusing.reexpress import Reexpression

Files: TypeAlias = Annotated[
    dict[Path, Count],
    ("description", "bytes by path: of the file that is opened to read it (a folder's index), and of those beside it"),
]


@dataclass(frozen=True, slots=True)
class Written:
    """A new checkpoint.

    Attributes:
        written: false after --dry-run.
        tensors: in the new checkpoint.
        bytes: of all its files together.
        record_bytes: of them, what says what was fused, for `verify` and `apply`.
        left_out: what the source holds besides its tensors and the new one doesn't.
    """

    source: Path
    out: Path
    written: bool
    tensors: Count
    bytes: Count
    record_bytes: Count
    files: Files
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangedTensors:
    """The tensors that go, and those that come.

    Attributes:
        written: shapes by full name.
    """

    removed: tuple[str, ...]
    written: dict[str, Sizes]


@dataclass(frozen=True, slots=True)
class Source:
    """A layer that went into a fusion.

    Attributes:
        assumed: those of the fields that nobody stated.
        origin: the other checkpoint that it came from (--with).
        like: the layer that it shares its geometry with, where not all of that is known.
        unplaced: that it runs right behind the layer before it was assumed.
    """

    name: str
    kind: LayerKind
    fields: LayerFields
    assumed: tuple[str, ...]
    origin: str = field(metadata=OPTIONAL)
    like: str = field(metadata=OPTIONAL)
    unplaced: bool = field(metadata=OPTIONAL)

    def __str__(self) -> str:
        return f"{self.origin}:{self.name}" if self.origin else self.name


@dataclass(frozen=True, slots=True)
class Recorded:
    """A fusion as the new checkpoint's record has it.

    Attributes:
        fields: as far as they are known.
        fields_assumed: those that follow from what nobody stated.
        input_size: null: for every size.
        rim: rows that differ, per axis and side.
        before: what stands before a linear layer that stands for a convolution: a flatten.
        after: what stands behind it: an unflatten.
    """

    name: str
    sources: Tree[Source]
    fields: LayerFields
    fields_assumed: tuple[str, ...]
    dtype: Dtype
    exact: bool
    input_size: Sizes | None
    rim: tuple[Sizes, ...]
    before: str = field(metadata=OPTIONAL)
    after: str = field(metadata=OPTIONAL)

    @classmethod
    def of(cls, fusion: FusionRecord) -> Recorded:
        """Return what there is to say of a record's fusion."""
        tree = map_leaves(lambda one: fill(Source, one, kind=one.kind.name), fusion.tree)
        return fill(cls, fusion, sources=tree, fields_assumed=fusion.assumed)


def plan_changed(
    opened: Checkpoint,
    changes: Sequence[PlannedLayer | Reexpression],
    wanted: Any,
    others: Mapping[str, Checkpoint] | None = None,
    dtype: str | None = None,
    shard_size: int | None = None,
) -> tuple[Edit, WritePlan]:
    """Return what changes of a checkpoint come to together, and what writing it with them and their record will give.

    Args:
        wanted: a command's options, with an out, writing, sources and tensors_only.
        others: checkpoints that layers came from besides, by name.
        dtype, shard_size: as of `plan_edited`.
    """
    from convtool import __version__
    from convtool.checkpoint.digests import with_digests
    from convtool.checkpoint.edit import Edit
    from convtool.checkpoint.record import Record
    from convtool.checkpoint.write import plan_edited
    from convtool.checkpoint.write_file import Options

    edit, record = Edit.together([change.edit for change in changes]), opened.record
    if changes:
        sources = {**(others or {}), BASE: opened}
        new = Options(dtype).new
        pieces = ([new(*one) for one in change.edit.insert.items()] for change in changes)
        made = [with_digests(change.record, sources, some) for change, some in zip(changes, pieces, strict=True)]
        record = (record or Record(__version__)).appended(__version__, made)
    how: dict[str, Any] = {"force": wanted.writing.overwrite, "tensors_only": wanted.tensors_only}
    how |= {"state_only": wanted.sources.root is not None, "dtype": dtype, "shard_size": shard_size}
    plan = plan_edited(opened, edit, wanted.out, record, **how)
    return edit, replace(plan, record_bytes=0 if record is None else len(record.dumps()))


def write(plan: WritePlan, opened: Checkpoint, edit: Edit, reporter: Reporter, *, dry_run: bool) -> Written:
    """Write a checkpoint, with a bar where that takes long, unless it is a dry run; return what there is to say."""
    if not dry_run:
        with reporter.progress(f"writing {plan.path.name}", plan.size) as advance:
            plan.write(advance)
        if plan.left_behind:
            names = some_of(plan.left_behind)
            reporter.remark(f"left where they were: {names}; copy those that fit the new checkpoint too")
    for name, what in opened.replaced.items():
        reporter.remark(f"{name} is {what}, which can't be written; its state dict is")
    if left := [name for name in plan.left_out if name not in opened.replaced]:
        reporter.remark(f"left out: {some_of(left)}")
    states = [name for name in opened.optimizers if name not in plan.left_out]
    if states and edit.remove:
        reporter.remark(f"{some_of(states)}: holds an optimizer's states of the old parameters, which stay as they are")
    tensors = len(edit.order(opened.infos))
    return fill(Written, plan, source=opened.path, out=plan.path, written=not dry_run, tensors=tensors, bytes=plan.size)


def changed_tensors(edit: Edit) -> ChangedTensors:
    """Return what an edit does, by name."""
    removed = sorted(edit.remove - edit.insert.keys())
    return ChangedTensors(tuple(removed), {key: tuple(tensor.shape) for key, tensor in edit.insert.items()})


def show_tensors(tensors: ChangedTensors, reporter: Reporter) -> None:
    """Print what a dry run says beyond a run: the tensors that go and come, by name."""
    reporter.lines([f"  - {name}" for name in tensors.removed])
    reporter.lines([f"  + {name} {times(shape)}" for name, shape in tensors.written.items()])


def show(one: Written, reporter: Reporter) -> None:
    """Print the last line of what a command says of a checkpoint."""
    made_of, record = f", {one.tensors} tensors", one.record_bytes
    show_files(one, reporter, made_of, record)


def show_files(one: Any, reporter: Reporter, made_of: str = "", record: int = 0) -> None:
    """Print what was written, of what and how large, and how much of that is a record of what was fused.

    A dry run says bytes as they would be, of each file where there are several.

    Args:
        one: a result, with the files, out and whether it is written.
        record: its bytes.
    """
    written, size = one.written, sum(one.files.values())
    whole, part = (human_bytes(size), human_bytes(record)) if written else (f"{size} bytes", f"{record}")
    more = f", of which {part} say what was fused" if record else ""
    reporter.line(f"{'wrote' if written else 'would write'} {one.out}{made_of}, {whole}{more}")
    if len(one.files) > 1 and not written:
        reporter.lines([f"  {path}, {each} bytes" for path, each in one.files.items()])
