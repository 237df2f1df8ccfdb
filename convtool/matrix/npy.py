"""The .npy format: one dense array, for `numpy.load`; it has no room for a bias or a record."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from convtool.errors import InputError, OutputError
from convtool.matrix.contents import Array, Contents, Layout, Output
from convtool.matrix.reading import Raw, tensor_of

LAYOUTS: tuple[Layout, ...] = ("dense",)
STORES_BIAS = False

DTYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.complex128: "<c16",
    torch.complex64: "<c8",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "|i1",
    torch.uint8: "|u1",
}


def refusal(dtype: torch.dtype, layout: Layout) -> str | None:
    """Why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in DTYPES:
        return None
    name = str(dtype).removeprefix("torch.")
    exactly = f", which holds every {name} exactly" if dtype.is_floating_point else ""
    return f"numpy has no {name}; use --dtype float32{exactly}, or write a .safetensors file"


def index_dtype(layout: Layout, narrowest: torch.dtype) -> torch.dtype:
    """The dtype of indices, given the narrowest that holds them."""
    return narrowest


def file_size(contents: Contents) -> int:
    """The exact size of the file in bytes."""
    (weight,) = contents.arrays
    return len(header(weight)) + weight.nbytes


def write(file: Output, contents: Contents) -> None:
    """Write the file."""
    (weight,) = contents.arrays
    file.write(header(weight))
    for chunk in weight.chunks():
        file.write(chunk.data)


def check(path: Path, contents: Contents) -> None:
    """Open what was written with numpy; OutputError where it is not what was to be written."""
    (weight,) = contents.arrays
    try:
        back = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None
    if back.shape != weight.shape or back.dtype.str != DTYPES[weight.dtype]:
        raise OutputError(f"the file read back holds {back.dtype} {back.shape}; nothing was changed")


def header(array: Array) -> bytes:
    """What stands before the array's bytes: a multiple of 64 bytes."""
    file = io.BytesIO()
    fields = {"descr": DTYPES[array.dtype], "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def read(path: Path) -> Raw:
    """Arrays and record of a file; InputError where it isn't one of this format, or is damaged."""
    try:
        return {"weight": tensor_of(path, np.load(path, mmap_mode="c", allow_pickle=False))}, None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not an .npy file, or damaged: {error}") from None
