"""A matrix in several .safetensors files, each a range of its rows, and an index that is written last.

A shard is what `--rows A:B` writes. Processes that torchrun started share the shards among them; the bytes don't depend
on how many processes there were. The index, OUT.index.json, names the shards with their rows and sizes, and comes into
being when all of them are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import UsageError
from convtool.formats.atomic import check_space, check_target
from convtool.formats.indexes import INDEX_SUFFIX, MatrixIndex, Shard, matrix_index_text
from convtool.formats.matrices import Layout
from convtool.formats.several import Ranks, SeveralPlan, free_names
from convtool.matrix import MatrixPlan, matrix_file, plan_matrix

SUFFIX = ".safetensors"
MOST_SHARDS = 99999  # as many as their names have room for


def index_path(path: Path) -> Path:
    """Return OUT.safetensors.index.json for OUT.safetensors."""
    return path.with_name(f"{path.name}{INDEX_SUFFIX}")


def shard_rows(rows: int, number: int, count: int) -> tuple[int, int]:
    """Return the rows A:B of a shard."""
    return rows * number // count, rows * (number + 1) // count


def check_shards(path: Path, count: int, *, force: bool) -> None:
    """Check that the shards can be written, before anything is computed.

    Raises:
        UsageError: a name or a number that doesn't do.
        OutputError: something is in the way.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"{path}: a matrix in shards is {SUFFIX}")
    if not 1 <= count <= MOST_SHARDS:
        raise UsageError(f"--shards: expected a number from 1 to {MOST_SHARDS}, got {count}")
    check_target(index_path(path), force=force)


@dataclass(frozen=True, slots=True)
class ShardsPlan:
    """What a matrix in shards will be made of.

    Attributes:
        path: OUT.safetensors, which the files are named after.
        shards: what each holds, by its name.
        several: the files.
    """

    path: Path
    shards: Mapping[str, MatrixPlan]
    several: SeveralPlan

    @property
    def files(self) -> dict[Path, int]:
        """Size in bytes, exactly, of the index and of each shard."""
        return self.several.files()


def plan_shards(
    matrix: ToeplitzMatrix,
    path: Path,
    count: int,
    *,
    layout: Layout | None = None,
    record: dict[str, object] | None = None,
) -> ShardsPlan:
    """Say what writing `count` shards and their index will give; nothing is made or written.

    Args:
        record: as of `write_matrix`; each shard's has its own `rows`.

    Raises:
        UsageError: more shards than rows, or a layout that doesn't do.
    """
    rows, index = matrix.shape[0], index_path(path)
    if count > rows:
        raise UsageError(f"--shards: expected at most {rows}, the number of rows, got {count}")
    names = free_names(index, SUFFIX, count)
    spans = {name: shard_rows(rows, number, count) for number, name in enumerate(names)}
    shards = {name: plan_matrix(matrix, path, layout=layout, rows=span) for name, span in spans.items()}
    records = {name: None if record is None else record | {"rows": list(span)} for name, span in spans.items()}
    plans = {name: matrix_file(matrix, plan, records[name]) for name, plan in shards.items()}
    contents = MatrixIndex(matrix.shape, tuple(Shard(name, *span) for name, span in spans.items()), record)
    text = matrix_index_text(contents, matrix.nnz, [plan.size for plan in plans.values()])
    return ShardsPlan(path, shards, SeveralPlan(index, text, plans))


def write_shards(
    plan: ShardsPlan, *, force: bool, ranks: Ranks | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Write this process's shards as planned, and the index when all have written theirs.

    Args:
        progress: called with the number of bytes that this process has written since the last call.

    Raises:
        UsageError: a name or a number that doesn't do.
        OutputError: the matrix exists (without `force`), wouldn't fit its file system, or couldn't be written, here or
            by another process: what was there before is there still, whole.
    """
    check_shards(plan.path, len(plan.shards), force=force)
    check_space(plan.path, plan.path.parent, sum(plan.files.values()))
    plan.several.write(force=force, ranks=ranks, progress=progress)
