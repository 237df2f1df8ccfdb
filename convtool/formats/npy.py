"""The .npy format: one dense array, for `numpy.load`; it has no room for a bias or a record."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import IO, Any

import numpy as np

from convtool.errors import OutputError
from convtool.formats.atomic import FilePlan
from convtool.formats.dtypes import NUMPY, OF_NUMPY
from convtool.formats.matrices import Contents, Found, Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Array, Chunk, Source, StoredArray

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
    file = file_of(weight)
    return FilePlan(file.nbytes, file.write, lambda path: _check(path, weight))


def file_of(array: Piece) -> Piece:
    """Return an array as a file of this format, which is a member of an .npz archive too."""
    head = header(array)
    size = len(head) + array.nbytes
    chunks = lambda: itertools.chain((Chunk(head),), array.chunks())  # noqa: E731
    return Piece(f"{array.name}.npy", "uint8", (size,), size, chunks)


def header(array: Piece) -> bytes:
    """Return what stands before an array's bytes: a multiple of 64 bytes."""
    file = io.BytesIO()
    fields = {"descr": NUMPY[array.dtype], "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _check(path: Path, weight: Piece) -> None:
    back = np.load(path, mmap_mode="r", allow_pickle=False)
    if back.shape != weight.shape or back.dtype.str != NUMPY[weight.dtype]:
        raise OutputError(f"the file read back holds {back.dtype} {back.shape}")


def read_matrix(source: Source) -> Found:
    """Return the array of a file; InputError where it isn't one of this format, or is damaged."""
    try:
        with source.opened() as file:
            array = array_in(source, file, 0, source.size)
    except (ValueError, EOFError) as error:
        raise source.error(f"not an .npy file, or damaged: {error}") from None
    return Found({"weight": tensor_of(source, array)}, None)


def array_in(
    source: Source, file: IO[bytes], start: int, size: int, *, stored: bool = True
) -> np.ndarray[Any, Any] | StoredArray:
    """Return an array of a file, read from its header on; numbers that stand in the source as they are, in parts.

    Args:
        file: what the header, and an array that isn't read in parts, are read from.
        start: of the header in the source.
        size: in bytes, of header and array.
        stored: whether the source has the bytes as `file` has them.

    Raises:
        ValueError: it is no such array, or of another size.
    """
    import torch

    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    header, count = file.tell(), math.prod(shape)
    if dtype.hasobject or header + count * dtype.itemsize != size:
        raise ValueError(f"it doesn't hold the {count} elements that it announces, or holds Python's objects")
    if stored and shape and not fortran and dtype.str in OF_NUMPY:
        return StoredArray(source, start + header, getattr(torch, OF_NUMPY[dtype.str]), shape)
    numbers = np.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype)
    return numbers.reshape(shape, order="F" if fortran else "C")


def tensor_of(source: Source, array: np.ndarray[Any, Any] | StoredArray) -> Array:
    """Return an array's numbers as a tensor, or in the file; InputError where it holds none."""
    import torch

    if isinstance(array, StoredArray):
        return array
    if array.dtype.kind not in "biufc":
        raise source.error(f"expected numbers, got an array of {array.dtype}")
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError:
        raise source.error(f"torch has no {array.dtype}; save it in another dtype") from None
