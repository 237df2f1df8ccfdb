"""The .safetensors format: a JSON header and the tensors' bytes.

csr: `indptr`, `indices`, `data`; coo: `row`, `col`, `data`; both with `shape`, two int64. dense: `weight`, which with
`bias` is an nn.Linear's state dict. `__metadata__` has the `layout`, and the record as `convtool_matrix`. The tensors
stand in order of falling element size, without gaps, from a multiple of 64 on, so that each is aligned to its elements
when the file is mapped. The safetensors package, which wants all tensors in memory to write them, reads back what was
written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from convtool.errors import InputError, OutputError
from convtool.matrix.contents import RECORD_NAME, Array, Chunk, Contents, Layout, Output
from convtool.matrix.reading import Raw

LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True
ALIGNMENT = 64  # of the first tensor in the file

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def refusal(dtype: torch.dtype, layout: Layout) -> str | None:
    """Why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in DTYPES:
        return None
    return f"safetensors has no {str(dtype).removeprefix('torch.')}; write a .pt file instead"


def index_dtype(layout: Layout, narrowest: torch.dtype) -> torch.dtype:
    """The dtype of indices, given the narrowest that holds them."""
    return narrowest


def file_size(contents: Contents) -> int:
    """The exact size of the file in bytes."""
    return len(_header(contents)) + sum(array.nbytes for array in _tensors(contents))


def write(file: Output, contents: Contents) -> None:
    """Write the file."""
    file.write(_header(contents))
    for array in _tensors(contents):
        for chunk in array.chunks():
            file.write(chunk.data)


def check(path: Path, contents: Contents) -> None:
    """Open what was written with the safetensors package; OutputError where it is not what was to be written."""
    from safetensors import SafetensorError, safe_open

    expected = {array.name: (DTYPES[array.dtype], list(array.shape)) for array in _tensors(contents)}
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            metadata = opened.metadata()
    except SafetensorError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None
    if found != expected or metadata != _metadata(contents):
        raise OutputError("the file read back holds other tensors than were written; nothing was changed")


def _tensors(contents: Contents) -> list[Array]:
    arrays = list(contents.arrays)
    if contents.layout != "dense":
        arrays.insert(0, Array("shape", torch.int64, (2,), lambda: _shape(contents)))
    return sorted(arrays, key=lambda array: -array.dtype.itemsize)


def _shape(contents: Contents) -> Iterator[Chunk]:
    yield Chunk(torch.tensor(contents.shape, dtype=torch.int64))


def _metadata(contents: Contents) -> dict[str, str]:
    metadata = {"format": "pt", "layout": contents.layout}
    return metadata if contents.record is None else metadata | {RECORD_NAME: contents.record}


def _header(contents: Contents) -> bytes:
    header: dict[str, Any] = {"__metadata__": _metadata(contents)}
    offset = 0
    for array in _tensors(contents):
        span = [offset, offset + array.nbytes]
        header[array.name] = {"dtype": DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read(path: Path) -> Raw:
    """Arrays and record of a file; InputError where it isn't one of this format, or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata.get(RECORD_NAME)  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file, or damaged: {error}") from None
