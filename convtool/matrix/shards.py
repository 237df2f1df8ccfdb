"""A matrix in several .safetensors files, each a range of its rows, and an index that is written last.

A shard is what `--rows A:B` writes. Processes that torchrun started share the shards among them; the bytes don't depend
on how many processes there were. The index, OUT.index.json, names the shards with their rows and sizes, and comes into
being when all of them are there.
"""

from __future__ import annotations

from pathlib import Path

from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import UsageError
from convtool.formats.atomic import check_target
from convtool.formats.indexes import INDEX_SUFFIX, MatrixIndex, Shard, matrix_index_text
from convtool.formats.matrices import Layout
from convtool.formats.several import SeveralPlan, free_names
from convtool.matrix import matrix_file, plan_matrix

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


def plan_shards(
    matrix: ToeplitzMatrix,
    path: Path,
    count: int,
    *,
    layout: Layout | None = None,
    record: dict[str, object] | None = None,
) -> SeveralPlan:
    """Plan `count` shards and their index; nothing is made or written.

    Args:
        path: OUT.safetensors, which the files are named after.
        record: as of `write_matrix`; each shard's has its own `rows`.

    Raises:
        UsageError: more shards than rows, or a layout that doesn't do.
    """
    rows, index = matrix.shape[0], index_path(path)
    if count > rows:
        raise UsageError(f"--shards: expected at most {rows}, the number of rows, got {count}")
    shards = [Shard(name, *shard_rows(rows, n, count)) for n, name in enumerate(free_names(index, SUFFIX, count))]
    plans = {
        name: matrix_file(
            matrix,
            plan_matrix(matrix, path, layout=layout, rows=(start, stop)),
            None if record is None else record | {"rows": [start, stop]},
        )
        for name, start, stop in shards
    }
    contents = MatrixIndex(matrix.shape, tuple(shards), record)
    text = matrix_index_text(contents, matrix.nnz, [plan.size for plan in plans.values()])
    return SeveralPlan(index, text, plans)
