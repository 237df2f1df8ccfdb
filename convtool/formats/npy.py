"""The .npy format: one dense array, for `numpy.load`; it has no room for a bias or a record."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convtool.errors import OutputError
from convtool.formats.atomic import FilePlan, Written
from convtool.formats.dtypes import NUMPY
from convtool.formats.matrices import Contents, Found, Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Source

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS: tuple[Layout, ...] = ("dense",)
STORES_BIAS = False
COO_INDICES: str | None = None


def refusal(dtype: str, layout: Layout) -> str | None:
    """Say why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in NUMPY:
        return None
    exactly = f", which holds every {dtype} exactly" if "float" in dtype else ""
    return f"numpy has no {dtype}; use --dtype float32{exactly}, or write a .safetensors file"


def plan_matrix(contents: Contents) -> FilePlan:
    """Plan a matrix file."""
    weight = contents.values
    head = header(weight)

    def fill(file: Written) -> None:
        file.write(head)
        weight.write(file)

    return FilePlan(len(head) + weight.nbytes, fill, lambda path: _check(path, weight))


def header(array: Piece) -> bytes:
    """Return what stands before an array's bytes: a multiple of 64 bytes."""
    file = io.BytesIO()
    fields = {"descr": NUMPY[array.dtype], "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _check(path: Path, weight: Piece) -> None:
    try:
        back = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None
    if back.shape != weight.shape or back.dtype.str != NUMPY[weight.dtype]:
        raise OutputError(f"the file read back holds {back.dtype} {back.shape}; nothing was changed")


def read_matrix(source: Source) -> Found:
    """Return the array of a file; InputError where it isn't one of this format, or is damaged."""
    try:
        array = np.load(source.path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise source.error(f"not an .npy file, or damaged: {error}") from None
    return Found({"weight": tensor_of(source, array)}, None)


def tensor_of(source: Source, array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array as a tensor over the same memory; InputError where it holds no numbers."""
    import torch

    if array.dtype.kind not in "biufc":
        raise source.error(f"expected numbers, got an array of {array.dtype}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)
