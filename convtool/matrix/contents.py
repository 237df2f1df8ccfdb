"""A matrix as the arrays that a file of it holds, whatever its format; their bytes are made when their turn comes.

An array comes as chunks of some hundred KiB, so a file of any size is written with little memory. A matrix repeats
itself (every output channel of a group has the same columns, interior positions the same values), so chunks are kept
for a while and come again as the same object.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from convtool.core.flat import tensor_bits
from convtool.core.rounding import dtype_name
from convtool.core.rows import RowMatrix
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.formats.matrices import Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Chunk

CHUNK_BYTES = 1 << 20  # of a chunk that isn't a stretch of the matrix's own
KEPT_BYTES = 16 << 20  # of chunks kept in case they come again


def matrix_arrays(
    matrix: RowMatrix, layout: Layout, rows: tuple[int, int], index_dtype: torch.dtype
) -> tuple[Piece, ...]:
    """Return the arrays of rows A:B of a matrix in some layout."""
    start, stop = rows
    entries = matrix.entries(start, stop)
    if layout == "dense":
        return (_array("weight", matrix.dtype, (stop - start, matrix.shape[1]), lambda: _dense(matrix, start, stop)),)
    data = _array("data", matrix.dtype, (entries,), lambda: _values(matrix, start, stop))

    def indices(name: str, count: int, make: Callable[[RowMatrix, int, int, torch.dtype], Iterator[Chunk]]) -> Piece:
        return _array(name, index_dtype, (count,), lambda: make(matrix, start, stop, index_dtype))

    if layout == "coo":
        return indices("row", entries, _rows), indices("col", entries, _columns), data
    return indices("indptr", stop - start + 1, _row_starts), indices("indices", entries, _columns), data


def bias_array(matrix: ToeplitzMatrix, outputs: tuple[int, int] | None) -> Piece:
    """Return the bias of outputs A:B, or of all."""
    start, stop = outputs or (0, matrix.outputs)

    def chunks() -> Iterator[Chunk]:
        for first, last in _spans(start, stop, CHUNK_BYTES // 8):
            yield _chunk(matrix.bias_part(first, last))

    return _array("bias", matrix.dtype, (stop - start,), chunks)


def _array(name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Callable[[], Iterator[Chunk]]) -> Piece:
    return Piece(name, dtype_name(dtype), shape, math.prod(shape) * dtype.itemsize, chunks)


def _chunk(tensor: Tensor) -> Chunk:
    return Chunk(tensor_bits(tensor).numpy().data)


def _row_starts(matrix: RowMatrix, start: int, stop: int, dtype: torch.dtype) -> Iterator[Chunk]:
    before = torch.zeros(1, dtype=torch.int64)
    yield _chunk(before.to(dtype))
    for first, last in _spans(start, stop, CHUNK_BYTES // 8):
        starts = before + matrix.row_counts(first, last).cumsum(0)
        yield _chunk(starts.to(dtype))
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
        yield _chunk(torch.repeat_interleave(number, matrix.row_counts(first, last)))


def _dense(matrix: RowMatrix, start: int, stop: int) -> Iterator[Chunk]:
    for first, last in _spans(start, stop, CHUNK_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize)):
        yield _chunk(matrix.dense_rows(first, last))


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
        chunk = self._chunks[key] = _chunk(tensor)
        self._bytes += chunk.data.nbytes
        while self._bytes > KEPT_BYTES and len(self._chunks) > 1:
            _, oldest = self._chunks.popitem(last=False)
            self._bytes -= oldest.data.nbytes
        return chunk
