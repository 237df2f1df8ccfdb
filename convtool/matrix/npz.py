"""The .npz format: a zip of .npy arrays, for `scipy.sparse.load_npz`, or `numpy.load` where dense.

Besides what scipy reads there are a member `bias`, where there is one to store, and `convtool_matrix`, the record as
JSON; scipy passes over both. Nothing is deflated: weights hardly shrink, and it would take 25 times as long.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from convtool.errors import InputError, OutputError
from convtool.formats.stored_zip import Member, archive_size, write_archive
from convtool.matrix import npy
from convtool.matrix.contents import RECORD_NAME, Contents, Layout, Output
from convtool.matrix.reading import ARRAYS, Raw, check_sums, tensor_of

LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True


def refusal(dtype: torch.dtype, layout: Layout) -> str | None:
    """Why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype == torch.float16 and layout != "dense":
        return (
            "scipy has no sparse matrices of float16; use --dtype float32, which holds every float16 exactly,"
            " --layout dense, or write a .safetensors file"
        )
    return npy.refusal(dtype, layout)


def index_dtype(layout: Layout, narrowest: torch.dtype) -> torch.dtype:
    """The dtype of indices, given the narrowest that holds them."""
    return narrowest


def file_size(contents: Contents) -> int:
    """The exact size of the file in bytes."""
    return archive_size(_members(contents))


def write(file: Output, contents: Contents) -> None:
    """Write the file."""
    write_archive(file, _members(contents))


def check(path: Path, contents: Contents) -> None:
    """Open what was written with zipfile and numpy; OutputError where it is not what was to be written."""
    expected = {member.name: member for member in _members(contents)}
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            if sizes != {name: member.size for name, member in expected.items()}:
                raise OutputError("the file read back holds other arrays than were written; nothing was changed")
            for name, member in expected.items():
                with archive.open(name) as back:
                    if back.read(len(member.head)) != member.head:
                        raise OutputError(f"{name} read back differs from what was written; nothing was changed")
    except zipfile.BadZipFile as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None


def _members(contents: Contents) -> list[Member]:
    small: dict[str, Any] = {}
    if contents.layout != "dense":
        small = {"format": contents.layout.encode(), "shape": np.array(contents.shape, dtype="<i8"), "_is_array": True}
    if contents.record is not None:
        small[RECORD_NAME] = contents.record.encode("ascii")
    members = [_small_member(name, value) for name, value in small.items()]
    for array in contents.arrays:
        head = npy.header(array)
        members.append(Member(f"{array.name}.npy", len(head) + array.nbytes, head, array.chunks))
    return members


def _small_member(name: str, value: Any) -> Member:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(value), allow_pickle=False)
    return Member(f"{name}.npy", len(file.getvalue()), file.getvalue(), lambda: iter(()))


def read(path: Path) -> Raw:
    """Arrays and record of a file; InputError where it isn't one of this format, or is damaged."""
    arrays: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            check_sums(path, archive)
            for info in archive.infolist():
                name, array = info.filename.removesuffix(".npy"), _npz_array(path, archive, info)
                if array.dtype.kind in "SU":
                    item = array.item() if array.size == 1 else b""
                    texts[name] = item.decode("ascii", "replace") if isinstance(item, bytes) else item
                else:
                    arrays[name] = tensor_of(path, array)
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, NotImplementedError) as error:
        raise InputError(f"{path}: not an .npz file, or damaged: {error}") from None
    form = texts.get("format")
    if form not in (None, *ARRAYS):
        raise InputError(f"{path}: holds a matrix in scipy's {form} format; save it with `.tocsr()` first")
    return arrays, texts.get(RECORD_NAME)


def _npz_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """A member's array; mapped where it is stored as it is."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        header = member.tell()
    if not dtype.hasobject and header + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} doesn't hold the {math.prod(shape)} elements that it announces")
    if info.compress_type != zipfile.ZIP_STORED or not shape or dtype.hasobject:
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    offset = info.header_offset + 30 + name + extra + header
    if 0 in shape:
        return np.empty(shape, dtype)
    order: Literal["F", "C"] = "F" if fortran else "C"
    return np.memmap(path, dtype, mode="c", offset=offset, shape=shape, order=order)
