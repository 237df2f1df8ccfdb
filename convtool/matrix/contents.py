"""What a matrix file holds, whatever its format: named arrays, whose bytes are made when their turn comes.

An array comes as chunks of some hundred KiB, so a file of any size is written with little memory. A matrix repeats
itself (every output channel of a group has the same columns, interior positions the same values), so chunks are kept
for a while and come again as the same object.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from convtool.core.flat import tensor_bits
from convtool.core.rows import Stretch
from convtool.core.toeplitz import ToeplitzMatrix

Layout: TypeAlias = Literal["csr", "coo", "dense"]

_IndexChunks: TypeAlias = Callable[["RowMatrix", int, int, torch.dtype], Iterator["Chunk"]]

# The name of a file's record. A checkpoint's is `convtool`, and a dense file is a checkpoint too, of one linear layer.
RECORD_NAME = "convtool_matrix"

CHUNK_BYTES = 1 << 20  # of a chunk that isn't a stretch of the matrix's own
KEPT_BYTES = 16 << 20  # of chunks kept in case they come again


class RowMatrix(Protocol):
    """A matrix that makes any range of its rows on demand; `ToeplitzMatrix` says what each of these is."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def entries(self, start: int, stop: int, /) -> int: ...

    def stretches(self, start: int, stop: int, /) -> Iterator[Stretch]: ...

    def row_counts(self, start: int, stop: int, /) -> Tensor: ...

    def indices(self, start: int, stop: int, /) -> Tensor: ...

    def values(self, start: int, stop: int, /) -> Tensor: ...

    def dense_rows(self, start: int, stop: int, /) -> Tensor: ...


class Output(Protocol):
    """What a format needs of the file that it writes."""

    def write(self, data: bytes | memoryview, /) -> int: ...

    def seek(self, offset: int, /) -> int: ...


class Chunk:
    """Bytes of a file, and their CRC-32 for the formats that want it, computed once however often they are written."""

    def __init__(self, tensor: Tensor) -> None:
        self.data = _little_endian(tensor)

    @cached_property
    def crc(self) -> int:
        return zlib.crc32(self.data)


@dataclass(frozen=True, slots=True)
class Array:
    """An array of a file.

    Attributes:
        name: one of indptr, indices, row, col, data, weight, bias.
        chunks: makes its bytes, row-major and little-endian, from the start at each call.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Chunk]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Contents:
    """All that goes into a file.

    Attributes:
        shape: (rows, columns) of the matrix in the file.
        arrays: csr: indptr, indices, data; coo: row, col, data; dense: weight; each followed by the bias if there
            is one to store.
        record: what was done, as JSON in ASCII, or None.
    """

    layout: Layout
    shape: tuple[int, int]
    arrays: tuple[Array, ...]
    record: str | None


def matrix_arrays(
    matrix: RowMatrix, layout: Layout, rows: tuple[int, int], index_dtype: torch.dtype
) -> tuple[Array, ...]:
    """The arrays of rows A:B of a matrix in some layout."""
    start, stop = rows
    entries = matrix.entries(start, stop)
    if layout == "dense":
        shape = (stop - start, matrix.shape[1])
        return (Array("weight", matrix.dtype, shape, lambda: _dense(matrix, start, stop)),)
    data = Array("data", matrix.dtype, (entries,), lambda: _values(matrix, start, stop))

    def indices(name: str, shape: tuple[int, ...], chunks: _IndexChunks) -> Array:
        return Array(name, index_dtype, shape, lambda: chunks(matrix, start, stop, index_dtype))

    if layout == "coo":
        return indices("row", (entries,), _rows), indices("col", (entries,), _columns), data
    return indices("indptr", (stop - start + 1,), _row_starts), indices("indices", (entries,), _columns), data


def bias_array(matrix: ToeplitzMatrix, rows: tuple[int, int]) -> Array | None:
    """The bias that belongs to rows A:B, or None where there is none or the matrix has it as a column.

    A transposed matrix has an output in each column, so all of its bias belongs to any of its rows.
    """
    if matrix.conv.bias is None or matrix.affine:
        return None
    positions = math.prod(matrix.output_size)
    start, stop = (0, matrix.conv.out_channels * positions) if matrix.transpose else rows

    def chunks() -> Iterator[Chunk]:
        for first, last in _spans(start, stop, CHUNK_BYTES // 8):
            yield Chunk(matrix.bias_part(first, last))

    return Array("bias", matrix.dtype, (stop - start,), chunks)


def tensor_array(name: str, tensor: Tensor) -> Array:
    """An array that is there already."""

    def chunks() -> Iterator[Chunk]:
        flat = tensor.flatten()
        yield from (Chunk(flat[a:b]) for a, b in _spans(0, len(flat), CHUNK_BYTES // tensor.dtype.itemsize))

    return Array(name, tensor.dtype, tuple(tensor.shape), chunks)


def _row_starts(matrix: RowMatrix, start: int, stop: int, dtype: torch.dtype) -> Iterator[Chunk]:
    before = torch.zeros(1, dtype=torch.int64)
    yield Chunk(before.to(dtype))
    for first, last in _spans(start, stop, CHUNK_BYTES // 8):
        starts = before + matrix.row_counts(first, last).cumsum(0)
        yield Chunk(starts.to(dtype))
        before = starts[-1:]


def _columns(matrix: RowMatrix, start: int, stop: int, dtype: torch.dtype) -> Iterator[Chunk]:
    kept = _Kept()
    for first, last, same, _ in matrix.stretches(start, stop):
        yield kept.find(same) or kept.add(same, matrix.indices(first, last).to(dtype))


def _values(matrix: RowMatrix, start: int, stop: int) -> Iterator[Chunk]:
    kept = _Kept()
    for first, last, _, same in matrix.stretches(start, stop):
        yield kept.find(same) or kept.add(same, matrix.values(first, last))


def _rows(matrix: RowMatrix, start: int, stop: int, dtype: torch.dtype) -> Iterator[Chunk]:
    for first, last, _, _ in matrix.stretches(start, stop):
        number = torch.arange(first - start, last - start).to(dtype)
        yield Chunk(torch.repeat_interleave(number, matrix.row_counts(first, last)))


def _dense(matrix: RowMatrix, start: int, stop: int) -> Iterator[Chunk]:
    for first, last in _spans(start, stop, CHUNK_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize)):
        yield Chunk(matrix.dense_rows(first, last))


def _spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    step = max(1, step)
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


class _Kept:
    """The chunks used last, as far as `KEPT_BYTES` reach."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[Hashable, Chunk] = OrderedDict()
        self._bytes = 0

    def find(self, key: Hashable) -> Chunk | None:
        if key in self._chunks:
            self._chunks.move_to_end(key)
        return self._chunks.get(key)

    def add(self, key: Hashable, tensor: Tensor) -> Chunk:
        chunk = self._chunks[key] = Chunk(tensor)
        self._bytes += chunk.data.nbytes
        while self._bytes > KEPT_BYTES and len(self._chunks) > 1:
            _, oldest = self._chunks.popitem(last=False)
            self._bytes -= oldest.data.nbytes
        return chunk


def _little_endian(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major. By integers of its size, since numpy has no bfloat16."""
    size = tensor.dtype.itemsize // (2 if tensor.is_complex() else 1)
    words = tensor_bits(tensor).numpy()
    return words.view(f"u{size}").astype(f"<u{size}", copy=False).view(np.uint8).data
