"""A matrix in several .safetensors files, each a range of its rows, and an index that is written last.

A shard is what `--rows A:B` writes. Processes that torchrun started share the shards among them; the bytes don't depend
on how many processes there were. The index, OUT.index.json, names the shards with their rows and sizes. It comes into
being when all of them are there, and goes before any of them is replaced: without an index there is no matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import OutputError, UsageError
from convtool.formats.atomic import check_target, replacing, sync_folder
from convtool.formats.indexes import INDEX_SUFFIX, MatrixIndex, Shard, matrix_index_text
from convtool.formats.matrices import Layout
from convtool.matrix import MatrixPlan, plan_matrix, planned_size, write_matrix

SUFFIX = ".safetensors"
MOST_SHARDS = 99999  # as many as their names have room for


class Ranks(Protocol):
    """The processes that write one matrix together."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def count(self) -> int:
        """How many there are."""

    def wait(self) -> None:
        """Go on when all have come here; OutputError where one of them is gone."""


class Alone:
    """One process by itself."""

    rank = 0
    count = 1

    def wait(self) -> None:
        """Go on at once: there is nobody to wait for."""


def index_path(path: Path) -> Path:
    """Return OUT.safetensors.index.json for OUT.safetensors."""
    return path.with_name(f"{path.name}{INDEX_SUFFIX}")


def shard_path(path: Path, number: int, count: int) -> Path:
    """Return OUT-00001-of-00002.safetensors for the first of two."""
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}{SUFFIX}")


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
    for target in (index_path(path), *(shard_path(path, number, count) for number in range(count))):
        check_target(target, force=force)


@dataclass(frozen=True, slots=True)
class ShardsPlan:
    """What a matrix in shards will be made of.

    Attributes:
        path: OUT.safetensors, which the files are named after.
        shards: what each holds, by its file.
        records: what each notes of what was done, by its file.
        files: size in bytes, exactly, of the index and of each shard.
        index: what the index will hold.
    """

    path: Path
    shards: Mapping[Path, MatrixPlan]
    records: Mapping[Path, dict[str, object] | None]
    files: Mapping[Path, int]
    index: bytes


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
    rows = matrix.shape[0]
    if count > rows:
        raise UsageError(f"--shards: expected at most {rows}, the number of rows, got {count}")
    spans = {shard_path(path, number, count): shard_rows(rows, number, count) for number in range(count)}
    shards = {target: plan_matrix(matrix, target, layout=layout, rows=span) for target, span in spans.items()}
    records = {target: None if record is None else record | {"rows": list(span)} for target, span in spans.items()}
    sizes = {target: planned_size(matrix, plan, records[target]) for target, plan in shards.items()}
    index = MatrixIndex(matrix.shape, tuple(Shard(at.name, *span) for at, span in spans.items()), record)
    text = matrix_index_text(index, matrix.nnz, list(sizes.values()))
    return ShardsPlan(path, shards, records, {index_path(path): len(text), **sizes}, text)


def write_shards(
    matrix: ToeplitzMatrix,
    plan: ShardsPlan,
    *,
    force: bool,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write this process's shards as planned, and the index when all have written theirs.

    Args:
        plan: `plan_shards`'s, for this matrix. Nothing is written under the name OUT.safetensors itself.
        progress: called with the number of bytes that this process has written since the last call.

    Raises:
        UsageError: a name or a number that doesn't do.
        OutputError: a file exists (without `force`) or couldn't be written, here or by another process; the shards that
            are there by then are without an index.
    """
    ranks = Alone() if ranks is None else ranks
    check_shards(plan.path, len(plan.shards), force=force)
    ranks.wait()  # until nobody will see files that another one has begun to write
    if ranks.rank == 0:
        index_path(plan.path).unlink(missing_ok=True)
        sync_folder(plan.path.parent)
    ranks.wait()
    for number, (target, shard) in enumerate(plan.shards.items()):
        if number % ranks.count == ranks.rank:
            write_matrix(matrix, shard, target, force=force, record=plan.records[target], progress=progress)
    ranks.wait()
    if ranks.rank == 0:
        _write_index(plan, force=force)
    ranks.wait()


def _write_index(plan: ShardsPlan, *, force: bool) -> None:
    for target in plan.shards:
        if not target.is_file() or target.stat().st_size != plan.files[target]:
            raise OutputError(f"{target}: isn't there as it was written; no index was written")
    with replacing(index_path(plan.path), force=force) as file:
        file.write(plan.index)
