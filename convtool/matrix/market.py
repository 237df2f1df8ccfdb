"""Matrix Market files as they are read: a block of lines at a time, in memory that doesn't grow with them.

Opening a file goes through it once: every line is checked, and where the blocks begin is noted. Where the entries stand
in the order of their rows, as convtool writes them, rows are then read from the blocks that they are in; else all of it
is taken into memory and brought into that order.
"""

from __future__ import annotations

import io
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.rows import BLOCK_ENTRIES, CsrBlock
from convtool.errors import InputError, UsageError
from convtool.matrix.contents import RECORD_NAME
from convtool.matrix.file import MatrixFile
from convtool.matrix.reading import Raw

if TYPE_CHECKING:
    import scipy.sparse

COMMENT = f"%{RECORD_NAME} "
LONGEST = 1 << 16  # of a line, which the format has end after 1024 characters
BLOCK_BYTES = 1 << 20  # of text that is read together
SHORTEST = 4  # characters of an entry at least: a row, a column, the blank between them, the end of the line

# How each dtype is written: what the header calls it, the format of one number, and its width.
FIELDS = {
    torch.float64: ("real", "%.17g", 24),
    torch.float32: ("real", "%.9g", 16),
    torch.float16: ("real", "%.9g", 16),
    torch.bfloat16: ("real", "%.9g", 16),
    torch.complex128: ("complex", "%.17g", 24),
    torch.complex64: ("complex", "%.9g", 16),
    torch.int64: ("integer", "%d", 20),
    torch.int32: ("integer", "%d", 11),
    torch.int16: ("integer", "%d", 6),
    torch.int8: ("integer", "%d", 4),
    torch.uint8: ("integer", "%d", 3),
}

_LINES = {
    kind: np.dtype([("row", "i8"), ("column", "i8"), *((name, number) for name in values)])
    for kind, number, values in (
        ("real", "f8", ("real",)),
        ("integer", "i8", ("real",)),
        ("complex", "f8", ("real", "imaginary")),
    )
}
_WANTED = {"real": "row column value", "integer": "row column integer", "complex": "row column real imaginary"}

Lines = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the entries.

    Attributes:
        kind: real, integer or complex.
        start: where the entries begin, in bytes.
        line: the number of their first line.
        dtype: that the numbers were written from, as the record says; None where there is none.
    """

    path: Path
    kind: str
    shape: tuple[int, int]
    entries: int
    record: str
    start: int
    line: int
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Block:
    """Lines of the file, and the rows that they are about, counted from 0; there is one line at least."""

    start: int
    stop: int
    line: int
    entries: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class TextMatrix(MatrixFile):
    """A matrix whose entries are read from the text each time they are asked for."""

    head: _Head | None = None
    parts: tuple[_Block, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        assert self.head is not None
        kinds = {"real": torch.float64, "integer": torch.int64, "complex": torch.complex128}
        return kinds[self.head.kind] if self.head.dtype is None else self.head.dtype

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return sum(part.entries for part in self.parts)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        start, gathered = 0, 0
        for part in self.parts:
            if gathered and gathered + part.entries > entries and part.first > start:
                yield from _in_steps(start, part.first, entries)
                start, gathered = part.first, 0
            gathered += part.entries
        yield from _in_steps(start, self.shape[0], entries)

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        assert self.head is not None
        parts = [part for part in self.parts if start <= part.last and part.first < stop]
        arrays = _all(self.head, parts)
        wanted = (arrays["row"] >= start) & (arrays["row"] < stop)
        row, column, values = (arrays[name][wanted] for name in ("row", "col", "data"))
        return CsrBlock(torch.bincount(row - start, minlength=stop - start), column, values)

    def to_torch(self) -> Tensor:
        """The matrix in memory, as torch has it."""
        return self._whole().to_torch()

    def to_scipy(self) -> scipy.sparse.csr_array[Any] | scipy.sparse.coo_array[Any]:
        """The matrix in memory, as scipy has it."""
        return self._whole().to_scipy()

    def _whole(self) -> MatrixFile:
        assert self.head is not None
        arrays = _all(self.head, self.parts)
        return MatrixFile(self.path, "coo", self.shape, arrays, None, self.record)


def read_market(path: Path) -> Raw | TextMatrix:
    """The matrix in a file: as text where it can stay there, else its arrays and record.

    Raises:
        InputError: it isn't a file of this format, or is damaged; with the line.
    """
    head = _head(path)
    parts: list[_Block] = []
    ordered, last = True, 0
    for part, lines in _through(head):
        steps = np.diff(lines["row"], prepend=last)
        ordered = ordered and not bool((steps < 0).any())
        last = int(lines["row"][-1])
        parts.append(part)
        _tensors(head, lines)  # whether they are of the dtype that the record says
    found = sum(part.entries for part in parts)
    if found != head.entries:
        raise InputError(f"{path}: damaged: announces {head.entries} entries and holds {found}")
    if not ordered:
        rows, columns = head.shape
        return _all(head, parts) | {"shape": torch.tensor([rows, columns])}, head.record or None
    try:
        record = json.loads(head.record) if head.record else None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: the record of what was done is not JSON") from None
    noted = record if isinstance(record, dict) else None
    return TextMatrix(path, "coo", head.shape, {}, None, noted, head, tuple(parts))


def _head(path: Path) -> _Head:
    with path.open("rb") as file:
        lines = (file.readline(LONGEST) for _ in itertools.count())
        kind = next(lines).decode("ascii", "replace").split()
        if kind[:3] != ["%%MatrixMarket", "matrix", "coordinate"] or kind[4:] != ["general"] or kind[3] not in _LINES:
            raise InputError(
                f"{path}: expected '%%MatrixMarket matrix coordinate' with real, integer or complex numbers,"
                f" 'general', in the first line; got {' '.join(kind)[:80]!r}"
            )
        record, number, line = "", 2, next(lines)
        while line.startswith(b"%") or line.isspace():
            text = line.decode("ascii", "replace").rstrip("\n")
            record += text.removeprefix(COMMENT) if text.startswith(COMMENT) else ""
            number, line = number + 1, next(lines)
        sizes = line.split()
        if len(sizes) != 3 or not all(size.isdigit() and len(size) < 19 for size in sizes):
            raise _malformed(path, number, "rows columns entries", line)
        rows, columns, entries = map(int, sizes)
        start = file.tell()
    size = path.stat().st_size
    if entries * SHORTEST > size - start:
        raise InputError(f"{path}: damaged: announces {entries} entries, more than its {size} bytes can hold")
    return _Head(path, kind[3], (rows, columns), entries, record, start, number + 1, _written_dtype(record))


def _through(head: _Head) -> Iterator[tuple[_Block, Lines]]:
    """All blocks of lines, each checked."""
    with head.path.open("rb") as file:
        file.seek(head.start)
        at, number = head.start, head.line
        while text := file.read(BLOCK_BYTES):
            text += file.readline(LONGEST)
            if not text.endswith(b"\n"):  # a number that was cut short would still be one
                raise InputError(f"{head.path}: damaged: ends in the middle of a line")
            lines = _parsed(head, text, number)
            if len(lines):
                first, last = int(lines["row"].min()) - 1, int(lines["row"].max()) - 1
                yield _Block(at, at + len(text), number, len(lines), first, last), lines
            at, number = at + len(text), number + text.count(b"\n")


def _lines(head: _Head, part: _Block) -> Lines:
    """The lines of a block once more."""
    with head.path.open("rb") as file:
        file.seek(part.start)
        lines = _parsed(head, file.read(part.stop - part.start), part.line)
    if len(lines) != part.entries:
        raise InputError(f"{head.path}: changed while it was read")
    return lines


def _parsed(head: _Head, text: bytes, number: int) -> Lines:
    """Lines as (row, column, real[, imaginary]), counted from 1, inside of the matrix; `number` is the first line's."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="loadtxt: input contained no data")
            # NumPy before 2.4 takes 1.9 for the integer 1, and says so in this warning alone.
            warnings.filterwarnings("error", category=DeprecationWarning)
            lines = np.loadtxt(io.StringIO(text.decode("ascii")), dtype=_LINES[head.kind], comments=None, ndmin=1)
    except (ValueError, OverflowError, DeprecationWarning):
        raise _first_malformed(head, text, number) from None
    for name, size in zip(("row", "column"), head.shape, strict=True):
        if len(lines) and not 1 <= int(lines[name].min()) <= int(lines[name].max()) <= size:
            raise _first_malformed(head, text, number)
    return lines


def _first_malformed(head: _Head, text: bytes, number: int) -> InputError:
    """The error about the first line that isn't what it should be."""
    kind = _LINES[head.kind]
    wanted = f"{_WANTED[head.kind]}, within {head.shape[0]} x {head.shape[1]}"
    for place, line in enumerate(text.split(b"\n")[:-1]):
        words = line.split()
        if not words:
            continue
        try:
            numbers = [
                kind[name].type(word.decode("ascii")) for name, word in zip(kind.names or (), words, strict=True)
            ]
        except (ValueError, OverflowError):
            return _malformed(head.path, number + place, wanted, line)
        if not all(1 <= one <= size for one, size in zip(numbers[:2], head.shape, strict=True)):
            return _malformed(head.path, number + place, wanted, line)
    return InputError(f"{head.path}: damaged: lines from {number} on: expected {wanted}")


def _malformed(path: Path, number: int, wanted: str, line: bytes) -> InputError:
    got = line.decode("ascii", "backslashreplace").strip()
    return InputError(f"{path}: damaged: line {number}: expected {wanted}; got {got[:80]!r}")


def _tensors(head: _Head, lines: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns, counted from 0, and values."""
    row, column = (torch.from_numpy(lines[name] - 1) for name in ("row", "column"))
    values = torch.from_numpy(lines["real"].copy())
    if head.kind == "complex":  # not a sum, in which an infinite part would make the other one nan
        values = torch.complex(values, torch.from_numpy(lines["imaginary"].copy()))
    return row, column, _in_written_dtype(head, values)


def _all(head: _Head, parts: Sequence[_Block]) -> dict[str, Tensor]:
    """The arrays of some blocks, one after the other."""
    count = sum(part.entries for part in parts)
    made: list[Tensor] = []
    at = 0
    for part in parts:
        found = _tensors(head, _lines(head, part))
        made = made or [torch.empty(count, dtype=one.dtype) for one in found]
        for array, one in zip(made, found, strict=True):
            array[at : at + part.entries] = one
        at += part.entries
    made = made or list(_tensors(head, np.zeros(0, dtype=_LINES[head.kind])))
    return dict(zip(("row", "col", "data"), made, strict=True))


def _in_steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Rows in ranges that are no longer than that, however few entries they have."""
    yield from ((first, min(first + step, stop)) for first in range(start, stop, step))


def _written_dtype(record: str) -> torch.dtype | None:
    try:
        name = json.loads(record)["dtype"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return next((dtype for dtype in FIELDS if str(dtype) == f"torch.{name}"), None)


def _in_written_dtype(head: _Head, values: Tensor) -> Tensor:
    """The values in the dtype that the record says they were written from, where it says so."""
    dtype = head.dtype
    if dtype is None:
        return values
    if (dtype.is_complex, dtype.is_floating_point) == (values.is_complex(), values.is_floating_point()):
        # The digits that are written bring each number back; what moves by more than they leave open wasn't that dtype.
        back = values.to(dtype)
        if not bool(((back.to(values.dtype) - values).abs() > values.abs() * 1e-8).any()):
            return back
    name = str(dtype).removeprefix("torch.")
    raise InputError(f"{head.path}: damaged: its record calls its numbers {name}, which they aren't")
