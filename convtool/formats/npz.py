"""The .npz format: a zip of .npy arrays, for `scipy.sparse.load_npz`, or `numpy.load` where dense.

Besides what scipy reads there are a member `bias`, where there is one to store, and `convtool_matrix`, the record as
JSON; scipy passes over both. Nothing is deflated: weights hardly shrink, and it would take 25 times as long.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convtool.errors import OutputError
from convtool.formats import npy
from convtool.formats.atomic import FilePlan
from convtool.formats.matrices import ARRAYS, RECORD_NAME, Contents, Found, Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Array, Source, StoredArray
from convtool.formats.stored_zip import plan_archive

LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True
COO_INDICES: str | None = None

_CONVERTED = ("csc", "bsr", "dia")  # scipy's formats that are read and never written
MOST_ROWS = 1 << 24  # of one of these, however small its file


def refusal(dtype: str, layout: Layout) -> str | None:
    """Say why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype == "float16" and layout != "dense":
        return (
            "scipy has no sparse matrices of float16; use --dtype float32, which holds every float16 exactly,"
            " --layout dense, or write a .safetensors file"
        )
    return npy.refusal(dtype, layout)


def plan_matrix(contents: Contents) -> FilePlan:
    """Plan a matrix file."""
    small: dict[str, Any] = {}
    if contents.layout != "dense":
        small = {"format": contents.layout.encode(), "shape": np.array(contents.shape, dtype="<i8"), "_is_array": True}
    if contents.record is not None:
        small[RECORD_NAME] = contents.record.encode("ascii")
    heads = {f"{name}.npy": _saved(value) for name, value in small.items()}
    members = [Piece.of(name, data) for name, data in heads.items()]
    members += map(npy.file_of, contents.arrays)
    heads |= {f"{array.name}.npy": npy.header(array) for array in contents.arrays}
    return plan_archive(members, lambda path: _check(path, members, heads))


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(value), allow_pickle=False)
    return file.getvalue()


def _check(path: Path, members: Sequence[Piece], heads: Mapping[str, bytes]) -> None:
    """Open what was written with zipfile; OutputError where it is not what was to be written."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sizes != {member.name: member.nbytes for member in members}:
            raise OutputError("the file read back holds other arrays than were written")
        for name, head in heads.items():
            with archive.open(name) as back:
                if back.read(len(head)) != head:
                    raise OutputError(f"{name} read back differs from what was written")


def read_matrix(source: Source) -> Found:
    """Return the arrays and the record of a file, every checksum compared.

    Raises:
        InputError: it isn't one of this format, or is damaged.
    """
    arrays: dict[str, Array] = {}
    texts: dict[str, str] = {}
    try:
        with source.opened() as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise source.error(f"the checksum of {damaged} doesn't fit what it holds; the file is damaged")
            for info in archive.infolist():
                name, array = info.filename.removesuffix(".npy"), _array(source, archive, info)
                if isinstance(array, np.ndarray) and array.dtype.kind in "SU":
                    item = array.item() if array.size == 1 else b""
                    texts[name] = item.decode("ascii", "replace") if isinstance(item, bytes) else item
                else:
                    arrays[name] = npy.tensor_of(source, array)
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, NotImplementedError) as error:
        raise source.error(f"not an .npz file, or damaged: {error}") from None
    form = texts.get("format")
    if form in _CONVERTED:
        arrays = _as_csr(source, form, arrays)
    elif form not in (None, *ARRAYS):
        raise source.error(f"holds a matrix in scipy's {form} format; save it with `.tocsr()` first")
    flat = [name for name, array in arrays.items() if len(array.shape) == 2]
    if form is None and len(flat) == 1 and arrays.keys() <= {*flat, "bias"}:  # numpy.savez(path, T), whatever its name
        arrays = {("weight" if name in flat else name): array for name, array in arrays.items()}
    return Found(arrays, texts.get(RECORD_NAME))


def _as_csr(source: Source, form: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return a matrix that scipy saved in another format as csr; it has to fit memory."""
    import torch

    from convtool.core.rows import check_scipy

    check_scipy(f"{source.path}: a {form} matrix takes")
    import scipy.sparse

    try:
        shape = tuple(arrays["shape"][:].tolist())
        if max(shape) > max(source.size, MOST_ROWS):  # what there is one number of for each row isn't in the file
            raise source.error(f"holds a matrix of {max(shape)} rows or columns, of which most are empty")
        with source.opened() as file:
            found = scipy.sparse.load_npz(file)
        if form != "dia":
            found.check_format(full_check=True)
        made = found.tocsr()
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise source.error(f"damaged: its arrays make no {form} matrix: {error}") from None
    numbers = {"indptr": made.indptr, "indices": made.indices, "data": made.data, "shape": np.array(shape)}
    return {name: torch.from_numpy(one) for name, one in numbers.items()}


def _array(source: Source, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any] | StoredArray:
    """Return a member's array; read in parts where it is stored as it is."""
    local = info.header_offset
    lengths = struct.unpack("<2H", source.view(local + 26, local + 30))  # of the name and of what stands behind it
    stored = info.compress_type == zipfile.ZIP_STORED
    with archive.open(info) as member:
        try:
            return npy.array_in(source, member, local + 30 + sum(lengths), info.file_size, stored=stored)
        except ValueError as error:
            raise ValueError(f"{info.filename}: {error}") from None
