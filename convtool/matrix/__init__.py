"""Matrices as files, made and written row block by row block.

First `plan_matrix` says what a file will hold and how large it will be, or why it can't be; then `write_matrix`
streams it, so that the memory it takes doesn't grow with the matrix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from convtool.core.rounding import dtype_name
from convtool.core.rows import index_dtype
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import RefusedError, UsageError, human_bytes
from convtool.formats import MATRICES, matrix_format
from convtool.formats.atomic import FilePlan, Progress
from convtool.formats.matrices import Contents, Layout
from convtool.matrix.contents import bias_array, matrix_arrays

FORMATS = {suffix: matrix_format(suffix) for suffix in MATRICES}


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What a matrix file will hold.

    Attributes:
        format: the file's suffix, with its dot.
        layout: csr, coo or dense.
        rows, columns: the ranges A:B of the matrix that the file holds, or None for all of them.
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
    columns: tuple[int, int] | None
    shape: tuple[int, int]
    nnz: int
    dtype: torch.dtype
    index_dtype: torch.dtype | None
    size: int
    stores_bias: bool


def plan_matrix(
    matrix: ToeplitzMatrix,
    path: Path,
    *,
    layout: Layout | None = None,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> MatrixPlan:
    """Say what writing a matrix to `path` will give; nothing is made or written.

    Args:
        path: its suffix chooses the format.
        layout: the format's own by default: csr, and dense for .npy.
        rows, columns: only those from A to B-1. The bias is cut with the outputs, a transposed matrix's columns and
            another's rows; of a part of the inputs the file has all of it.

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
    refusal = FORMATS[path.suffix].refusal(dtype_name(matrix.dtype), chosen)
    if refusal is not None:
        raise RefusedError(f"{path}: {refusal}")
    return _plan(matrix, path.suffix, chosen, rows, columns)


def write_matrix(
    matrix: ToeplitzMatrix,
    plan: MatrixPlan,
    path: Path,
    *,
    force: bool,
    record: dict[str, object] | None = None,
    progress: Progress | None = None,
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
    advice = lambda size, free: _advice(matrix, plan, size, free)  # noqa: E731
    matrix_file(matrix, plan, record).write(path, force=force, progress=progress, advice=advice)


def _plan(
    matrix: ToeplitzMatrix,
    suffix: str,
    layout: Layout,
    rows: tuple[int, int] | None,
    columns: tuple[int, int] | None,
) -> MatrixPlan:
    part = matrix if columns is None else matrix.columns(*columns, rows)
    start, stop = (0, matrix.shape[0]) if rows is None else rows
    shape = stop - start, part.shape[1]
    nnz = part.entries(start, stop)
    indices = None
    if layout == "coo" and (needed := FORMATS[suffix].COO_INDICES) is not None:
        indices = getattr(torch, needed)
    elif layout != "dense":
        indices = index_dtype(max(shape) if layout == "coo" else max(nnz, *shape))
    bias = matrix.has_bias and not matrix.affine and FORMATS[suffix].STORES_BIAS
    plan = MatrixPlan(suffix, layout, rows, columns, shape, nnz, matrix.dtype, indices, 0, bias)
    return replace(plan, size=matrix_file(matrix, plan, None).size)


def matrix_file(matrix: ToeplitzMatrix, plan: MatrixPlan, record: dict[str, object] | None) -> FilePlan:
    """Return the file that is made of a plan, with this record in it."""
    rows = (0, matrix.shape[0]) if plan.rows is None else plan.rows
    part = matrix if plan.columns is None else matrix.columns(*plan.columns, plan.rows)
    arrays = matrix_arrays(part, plan.layout, rows, plan.index_dtype or torch.int64)
    if plan.stores_bias:
        arrays = *arrays, bias_array(matrix, plan.columns if matrix.transpose else plan.rows)
    text = None if record is None else json.dumps(record, separators=(",", ":"))
    return FORMATS[plan.format].plan_matrix(Contents(plan.layout, plan.shape, arrays, text))


def _advice(matrix: ToeplitzMatrix, plan: MatrixPlan, size: int, free: int) -> str:
    """Name the smallest file that holds as much, where that is worth saying."""
    others = [
        _plan(matrix, suffix, layout, plan.rows, plan.columns)
        for suffix, form in FORMATS.items()
        for layout in form.LAYOUTS
        if form.refusal(dtype_name(matrix.dtype), layout) is None and (form.STORES_BIAS or not plan.stores_bias)
    ]
    smallest = min(others, key=lambda other: other.size)
    part = "; --rows A:B writes a part of the matrix"
    if smallest.size >= 0.95 * size:  # it would be advice for the sake of a header
        return part
    fits = "" if smallest.size <= free else ", which is too much as well"
    return f"; a {smallest.format} file with --layout {smallest.layout} takes {human_bytes(smallest.size)}{fits}{part}"
