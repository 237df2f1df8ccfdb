"""Matrix files: the only place that touches them. A format is a module and a line in `FORMATS`.

First `plan_matrix` says what a file will hold and how large it will be, or why it can't be; then `write_matrix`
streams it, so that the memory it takes doesn't grow with the matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, get_args

import torch

from convtool.core.rows import index_dtype
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import OutputError, RefusedError, UsageError, human_bytes
from convtool.formats.atomic import check_target, replacing
from convtool.formats.room import Reported, check_space
from convtool.matrix import mtx, npy, npz, pt, safetensors
from convtool.matrix.contents import Contents, Layout, Output, bias_array, matrix_arrays
from convtool.matrix.file import MatrixFile
from convtool.matrix.reading import Raw

__all__ = [
    "FORMATS",
    "Layout",
    "MatrixFormat",
    "MatrixPlan",
    "contents_size",
    "plan_matrix",
    "planned_size",
    "write_contents",
    "write_matrix",
]


class MatrixFormat(Protocol):
    """What the module of a format offers."""

    @property
    def LAYOUTS(self) -> tuple[Layout, ...]:  # noqa: N802
        """The layouts it has room for, the default one first."""

    @property
    def STORES_BIAS(self) -> bool:  # noqa: N802
        """Whether it has room for a bias beside the matrix."""

    def refusal(self, dtype: torch.dtype, layout: Layout, /) -> str | None:
        """Why it can't hold values of that dtype, and the way out; None where it can."""

    def index_dtype(self, layout: Layout, narrowest: torch.dtype, /) -> torch.dtype:
        """The dtype of indices, given the narrowest that holds them."""

    def file_size(self, contents: Contents, /) -> int:
        """The exact size of the file in bytes; makes none of its arrays."""

    def write(self, file: Output, contents: Contents, /) -> None:
        """Write the file."""

    def check(self, path: Path, contents: Contents, /) -> None:
        """Open what was written with an independent reader; OutputError where it is not what was to be written."""

    def read(self, path: Path, /) -> Raw | MatrixFile:
        """Arrays and record of a file, or its matrix; InputError where it isn't one of this format, or is damaged."""


FORMATS: dict[str, MatrixFormat] = {
    ".npz": npz,
    ".npy": npy,
    ".safetensors": safetensors,
    ".pt": pt,
    ".mtx": mtx,
}


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What a matrix file will hold.

    Attributes:
        format: the file's suffix, with its dot.
        layout: csr, coo or dense.
        rows: the range A:B of the matrix's rows that the file holds, or None for all of them.
        shape: (rows, columns) in the file.
        nnz: entries in those rows (what a sparse layout stores).
        dtype: of the values.
        index_dtype: of the indices: int32 where it reaches, else int64 (which torch's COO tensors always have);
            None where dense.
        size: of the file in bytes, exactly; a record comes on top.
        stores_bias: whether the file holds a bias vector beside the matrix.
    """

    format: str
    layout: Layout
    rows: tuple[int, int] | None
    shape: tuple[int, int]
    nnz: int
    dtype: torch.dtype
    index_dtype: torch.dtype | None
    size: int
    stores_bias: bool


def plan_matrix(
    matrix: ToeplitzMatrix, path: Path, *, layout: Layout | None = None, rows: tuple[int, int] | None = None
) -> MatrixPlan:
    """What writing a matrix to `path` will give; nothing is made or written.

    Args:
        path: its suffix chooses the format.
        layout: the format's own by default: csr, and dense for .npy.
        rows: only rows A to B-1, as a matrix of B - A rows and all columns; the bias is cut alike (not that of a
            transposed matrix, whose outputs are columns).

    Raises:
        UsageError: an unknown suffix, a layout that the format has no room for, or rows that the matrix doesn't have.
        RefusedError: a dtype that the format can't hold.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    chosen = FORMATS[path.suffix].LAYOUTS[0] if layout is None else layout
    if chosen not in FORMATS[path.suffix].LAYOUTS:
        others = ", ".join(suffix for suffix, one in FORMATS.items() if chosen in one.LAYOUTS)
        if not others:
            raise UsageError(f"--layout: expected one of {', '.join(get_args(Layout))}, got {chosen!r}")
        held = " or ".join(FORMATS[path.suffix].LAYOUTS)
        raise UsageError(f"{path}: a {path.suffix} file holds {held}, not {chosen}; a file that holds it: {others}")
    start, stop = (0, matrix.shape[0]) if rows is None else rows
    if not 0 <= start < stop <= matrix.shape[0]:
        raise UsageError(f"--rows: expected A:B with 0 <= A < B <= {matrix.shape[0]}, got {start}:{stop}")
    refusal = FORMATS[path.suffix].refusal(matrix.dtype, chosen)
    if refusal is not None:
        raise RefusedError(f"{path}: {refusal}")
    return _plan(matrix, path.suffix, chosen, rows)


def planned_size(matrix: ToeplitzMatrix, plan: MatrixPlan, record: dict[str, object] | None = None) -> int:
    """The exact size in bytes of the file that `write_matrix` would write with this record."""
    return FORMATS[plan.format].file_size(_contents(matrix, plan, _record_text(record)))


def write_matrix(
    matrix: ToeplitzMatrix,
    plan: MatrixPlan,
    path: Path,
    *,
    force: bool,
    record: dict[str, object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a matrix file as planned: wholly and checked, or not at all.

    Args:
        plan: `plan_matrix`'s, for this matrix and this path's suffix.
        force: replace a file that exists.
        record: what was done, stored as JSON where the format has room (all but .npy).
        progress: called with the number of bytes written since its last call; they add up to the file's size.

    Raises:
        UsageError: the plan is for another format.
        OutputError: the file exists (without `force`), wouldn't fit its file system, or could not be written.
    """
    if path.suffix != plan.format:
        raise UsageError(f"{path}: the plan is for a {plan.format} file")
    contents = _contents(matrix, plan, _record_text(record))
    write_contents(
        contents, path, force=force, progress=progress, advice=lambda size, free: _advice(matrix, plan, size, free)
    )


def contents_size(contents: Contents, path: Path) -> int:
    """The exact size in bytes of the file that `write_contents` would write; makes none of its arrays."""
    return FORMATS[path.suffix].file_size(contents)


def write_contents(
    contents: Contents,
    path: Path,
    *,
    force: bool,
    progress: Callable[[int], None] | None = None,
    advice: Callable[[int, int], str] = lambda size, free: "",
) -> None:
    """Write a file of the format that its suffix says: wholly and checked, or not at all.

    Args:
        progress: called with the number of bytes written since its last call.
        advice: what to add to the message where the file, of `size` bytes, doesn't fit into the `free` ones.

    Raises:
        OutputError: the file exists (without `force`), wouldn't fit its file system, or could not be written.
    """
    target = check_target(path, force=force)
    form = FORMATS[path.suffix]
    size = form.file_size(contents)
    check_space(path, target.parent, size, advice)

    def check(written: Path) -> None:
        if written.stat().st_size != size:
            raise OutputError(f"{written.stat().st_size} bytes were written instead of {size}; nothing was changed")
        form.check(written, contents)

    with replacing(path, force=force, check=check) as file:
        form.write(Reported(file, progress), contents)


def _record_text(record: dict[str, object] | None) -> str | None:
    return None if record is None else json.dumps(record, separators=(",", ":"))


def _plan(matrix: ToeplitzMatrix, suffix: str, layout: Layout, rows: tuple[int, int] | None) -> MatrixPlan:
    start, stop = (0, matrix.shape[0]) if rows is None else rows
    shape = stop - start, matrix.shape[1]
    nnz = matrix.entries(start, stop)
    indices = None
    if layout != "dense":
        largest = max(shape) if layout == "coo" else max(nnz, *shape)
        indices = FORMATS[suffix].index_dtype(layout, index_dtype(largest))
    bias = matrix.conv.bias is not None and not matrix.affine and FORMATS[suffix].STORES_BIAS
    plan = MatrixPlan(suffix, layout, rows, shape, nnz, matrix.dtype, indices, 0, bias)
    return replace(plan, size=FORMATS[suffix].file_size(_contents(matrix, plan, None)))


def _contents(matrix: ToeplitzMatrix, plan: MatrixPlan, record: str | None) -> Contents:
    rows = (0, matrix.shape[0]) if plan.rows is None else plan.rows
    arrays = matrix_arrays(matrix, plan.layout, rows, plan.index_dtype or torch.int64)
    bias = bias_array(matrix, rows) if plan.stores_bias else None
    return Contents(plan.layout, plan.shape, arrays if bias is None else (*arrays, bias), record)


def _advice(matrix: ToeplitzMatrix, plan: MatrixPlan, size: int, free: int) -> str:
    """The smallest file that holds as much, where that is worth saying."""
    others = [
        _plan(matrix, suffix, layout, plan.rows)
        for suffix, form in FORMATS.items()
        for layout in form.LAYOUTS
        if form.refusal(matrix.dtype, layout) is None and (form.STORES_BIAS or not plan.stores_bias)
    ]
    smallest = min(others, key=lambda other: other.size)
    part = "; --rows A:B writes a part of the matrix"
    if smallest.size >= 0.95 * size:  # it would be advice for the sake of a header
        return part
    fits = "" if smallest.size <= free else ", which is too much as well"
    return f"; a {smallest.format} file with --layout {smallest.layout} takes {human_bytes(smallest.size)}{fits}{part}"
