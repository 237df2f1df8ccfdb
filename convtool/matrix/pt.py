"""The .pt format: a dict {"weight", "bias"} for `torch.load(path, weights_only=True)`.

weight is a torch sparse CSR, sparse COO (coalesced) or dense tensor; dense, the file is an nn.Linear's state dict.
torch.save wants the whole matrix in memory, so its archive is written here: a pickle in which each storage is a name,
and a zip member of raw bytes per name, aligned for `torch.load(mmap=True)`. The record is the member
`extra/convtool_matrix.json`, which torch.load passes over.
"""

from __future__ import annotations

import io
import itertools
import pickle
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._utils  # what a saved tensor names as its maker; the format offers no public way to it
from torch import Tensor

from convtool.errors import InputError, OutputError
from convtool.formats.stored_zip import Member, archive_size, write_archive
from convtool.matrix.contents import RECORD_NAME, Array, Chunk, Contents, Layout, Output
from convtool.matrix.reading import Raw, check_sums

LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True
FOLDER = "archive"  # torch's name for it where it writes to no named file; each reader takes any

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.complex128: torch.ComplexDoubleStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
}
SPARSE = {"csr": torch.sparse_csr, "coo": torch.sparse_coo}


def refusal(dtype: torch.dtype, layout: Layout) -> str | None:
    """Why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in STORAGES:
        return None
    return (
        f".pt files of {str(dtype).removeprefix('torch.')} are not written; use --dtype, or write a .safetensors file"
    )


def index_dtype(layout: Layout, narrowest: torch.dtype) -> torch.dtype:
    """The dtype of indices, given the narrowest that holds them: torch's COO tensors take int64 alone."""
    return torch.int64 if layout == "coo" else narrowest


def file_size(contents: Contents) -> int:
    """The exact size of the file in bytes."""
    return archive_size(_members(contents))


def write(file: Output, contents: Contents) -> None:
    """Write the file."""
    write_archive(file, _members(contents))


def check(path: Path, contents: Contents) -> None:
    """Open what was written with torch; OutputError where it is not what was to be written."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse CSR tensors are young is no news of this file
            back = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        name = type(error).__name__  # torch's messages are pages of advice
        raise OutputError(f"the file read back is damaged (torch raised {name}); nothing was changed") from None
    weight: Tensor = back["weight"]
    layout = SPARSE.get(contents.layout, torch.strided)
    values = contents.arrays[0 if contents.layout == "dense" else 2]
    found = weight.layout, tuple(weight.shape), weight.dtype
    stored = weight.numel() if layout == torch.strided else weight._nnz()
    biases = [array.shape for array in contents.arrays if array.name == "bias"]
    if (
        found != (layout, contents.shape, values.dtype)
        or stored != torch.Size(values.shape).numel()
        or biases != [tuple(tensor.shape) for name, tensor in back.items() if name != "weight"]
    ):
        raise OutputError("the file read back holds other tensors than were written; nothing was changed")


@dataclass(frozen=True, slots=True)
class _Storage:
    """Elements whose bytes are a member of the archive."""

    key: str
    dtype: torch.dtype
    count: int
    chunks: Callable[[], Iterator[Chunk]]


class _Stored:
    """A tensor over a whole storage, pickled as torch pickles one."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage = storage
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = (self.shape[1], 1) if len(self.shape) == 2 else (1,)
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _StoredSparse:
    """A sparse tensor, pickled as torch pickles one."""

    def __init__(self, layout: torch.layout, parts: tuple[Any, ...]) -> None:
        self.layout = layout
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_sparse_tensor, (self.layout, self.parts)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, _Storage):
            return "storage", STORAGES[value.dtype], value.key, "cpu", value.count
        return None


def _members(contents: Contents) -> list[Member]:
    state, storages = _state(contents)
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(state)
    small = {"data.pkl": pickled.getvalue(), "byteorder": b"little"}
    members = [_member(name, len(text), text) for name, text in small.items()]
    members += [
        _member(f"data/{storage.key}", storage.count * storage.dtype.itemsize, b"", storage.chunks)
        for storage in storages
    ]
    members.append(_member("version", 2, b"3\n"))
    if contents.record is not None:
        text = contents.record.encode("ascii")
        members.append(_member(f"extra/{RECORD_NAME}.json", len(text), text))
    return members


def _member(name: str, size: int, head: bytes, chunks: Callable[[], Iterator[Chunk]] = lambda: iter(())) -> Member:
    return Member(f"{FOLDER}/{name}", size, head, chunks)


def _state(contents: Contents) -> tuple[dict[str, Any], list[_Storage]]:
    """The dict to pickle, and its storages."""
    storages: list[_Storage] = []

    def stored(*arrays: Array, shape: tuple[int, ...] | None = None) -> _Stored:
        first = arrays[0]
        count = sum(array.nbytes for array in arrays) // first.dtype.itemsize
        storage = _Storage(
            str(len(storages)),
            first.dtype,
            count,
            lambda: itertools.chain.from_iterable(array.chunks() for array in arrays),
        )
        storages.append(storage)
        return _Stored(storage, first.shape if shape is None else shape)

    arrays = {array.name: array for array in contents.arrays}
    state: dict[str, Any] = {}
    if contents.layout == "dense":
        state["weight"] = stored(arrays["weight"])
    elif contents.layout == "csr":
        parts = (stored(arrays["indptr"]), stored(arrays["indices"]), stored(arrays["data"]), contents.shape)
        state["weight"] = _StoredSparse(torch.sparse_csr, parts)
    else:
        row, column = arrays["row"], arrays["col"]
        indices = stored(row, column, shape=(2, *row.shape))  # one above the other
        coalesced = True  # sorted and unique by construction
        state["weight"] = _StoredSparse(torch.sparse_coo, (indices, stored(arrays["data"]), contents.shape, coalesced))
    if "bias" in arrays:
        state["bias"] = stored(arrays["bias"])
    return state, storages


def read(path: Path) -> Raw:
    """Arrays and record of a file; InputError where it isn't one of this format, or is damaged."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a .pt file of torch's zip format, or damaged")
    record = None
    try:
        with zipfile.ZipFile(path) as archive:
            check_sums(path, archive)
            for name in archive.namelist():
                if name.endswith(f"/extra/{RECORD_NAME}.json"):
                    record = archive.read(name).decode("utf-8", "replace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse CSR tensors are young is no news of this file
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        name = type(error).__name__  # torch's messages are pages of advice
        raise InputError(f"{path}: damaged, or more than tensors is in it (torch raised {name})") from None
    state = {"weight": loaded} if isinstance(loaded, Tensor) else loaded
    weight = state.get("weight") if isinstance(state, dict) else None
    if not isinstance(weight, Tensor):
        raise InputError(f"{path}: holds no matrix: expected a tensor, or a dict with a tensor `weight`")
    bias = state.get("bias")
    arrays = _torch_arrays(path, weight)
    return (arrays if bias is None else {**arrays, "bias": bias}), record


def _torch_arrays(path: Path, weight: Tensor) -> dict[str, Tensor]:
    shape = torch.tensor(weight.shape)
    if weight.layout == torch.sparse_csr:
        return {
            "indptr": weight.crow_indices(),
            "indices": weight.col_indices(),
            "data": weight.values(),
            "shape": shape,
        }
    if weight.layout == torch.sparse_coo:
        row, column = weight._indices()
        return {"row": row, "col": column, "data": weight._values(), "shape": shape}
    if weight.layout == torch.strided:
        return {"weight": weight}
    raise InputError(f"{path}: holds a {weight.layout} tensor; expected a sparse CSR, sparse COO or dense one")
