"""A matrix in several .safetensors files, each a range of its rows, and an index that is written last.

A shard is what `--rows A:B` writes. Processes that torchrun started share the shards among them; the bytes don't depend
on how many processes there were. The index, OUT.index.json, names the shards with their rows and sizes. It comes into
being when all of them are there, and goes before any of them is replaced: without an index there is no matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import OutputError, UsageError
from convtool.files.atomic import check_target, replacing, sync_folder
from convtool.matrix import plan_matrix, planned_size, write_matrix
from convtool.matrix.contents import RECORD_NAME, Layout

SUFFIX = ".safetensors"
SCHEMA = 1
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
        """There is nobody to wait for."""


def index_path(path: Path) -> Path:
    """OUT.safetensors.index.json for OUT.safetensors."""
    return path.with_name(f"{path.name}.index.json")


def shard_path(path: Path, number: int, count: int) -> Path:
    """OUT-00001-of-00002.safetensors for the first of two."""
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}{SUFFIX}")


def shard_rows(rows: int, number: int, count: int) -> tuple[int, int]:
    """The rows A:B of a shard."""
    return rows * number // count, rows * (number + 1) // count


def check_shards(path: Path, count: int, *, force: bool) -> None:
    """Whether the shards can be written, before anything is computed.

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


def write_shards(
    matrix: ToeplitzMatrix,
    path: Path,
    count: int,
    *,
    layout: Layout | None = None,
    force: bool,
    record: dict[str, object] | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write this process's shards, and the index when all have written theirs.

    Args:
        path: OUT.safetensors; nothing is written under that name itself.
        count: how many shards.
        record: as of `write_matrix`; each shard's has its own `rows`.
        progress: called with the number of bytes that this process has written since the last call.

    Returns:
        The size of all shards in bytes.

    Raises:
        UsageError: more shards than rows, or a name or layout that doesn't do.
        OutputError: a file exists (without `force`) or couldn't be written, here or by another process; the shards that
            are there by then are without an index.
    """
    ranks = Alone() if ranks is None else ranks
    check_shards(path, count, force=force)
    rows = matrix.shape[0]
    if count > rows:
        raise UsageError(f"--shards: expected at most {rows}, the number of rows, got {count}")
    ranks.wait()  # until nobody will see files that another one has begun to write
    if ranks.rank == 0:
        index_path(path).unlink(missing_ok=True)
        sync_folder(path.parent)
    ranks.wait()
    shards: list[dict[str, Any]] = []
    for number in range(count):
        span, target = shard_rows(rows, number, count), shard_path(path, number, count)
        plan = plan_matrix(matrix, target, layout=layout, rows=span)
        own = None if record is None else record | {"rows": list(span)}
        shards.append({"file": target.name, "rows": list(span), "bytes": planned_size(matrix, plan, own)})
        if number % ranks.count == ranks.rank:
            write_matrix(matrix, plan, target, force=force, record=own, progress=progress)
    ranks.wait()
    if ranks.rank == 0:
        _write_index(matrix, path, shards, record, force=force)
    ranks.wait()
    return sum(int(shard["bytes"]) for shard in shards)


def _write_index(
    matrix: ToeplitzMatrix, path: Path, shards: list[dict[str, Any]], record: dict[str, object] | None, *, force: bool
) -> None:
    for shard in shards:
        there = path.with_name(shard["file"])
        if not there.is_file() or there.stat().st_size != shard["bytes"]:
            raise OutputError(f"{there}: isn't there as it was written; no index was written")
    document = {
        "metadata": {"total_size": sum(shard["bytes"] for shard in shards), "format": "convtool matrix"},
        "schema": SCHEMA,
        "shape": list(matrix.shape),
        "nnz": matrix.nnz,
        "shards": shards,
        RECORD_NAME: record,
    }
    with replacing(index_path(path), force=force) as file:
        file.write(json.dumps(document, indent=1).encode("ascii") + b"\n")
