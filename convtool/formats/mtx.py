"""The Matrix Market format, .mtx: text, for `scipy.io.mmread` and programs outside of Python.

A line per entry, `row column value`, counted from 1, in order of rows, then columns. Each number is padded to a fixed
width, so that the file's size is known before anything is made. Values are written with as many digits as bring each
number back to the bit. There is no room for a bias; the record stands in comment lines, `%convtool_matrix` in front of
each. scipy's writer wants the whole matrix in memory; its reader is the one used here.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from convtool.errors import OutputError
from convtool.formats.atomic import FilePlan, Written
from convtool.formats.dtypes import NUMPY
from convtool.formats.matrices import RECORD_NAME, Contents, Found, Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Source

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS: tuple[Layout, ...] = ("coo",)
STORES_BIAS = False
COO_INDICES: str | None = None

COMMENT = f"%{RECORD_NAME} "
COMMENT_WIDTH = 1000  # the format allows lines of 1024 characters
LONGEST = 1 << 16  # of a line before the entries
LINES = 1 << 14  # entries made into text together
BLOCK = 1 << 18  # bytes of text that are looked at together: they stay in the processor's cache

# How each dtype is written: what the header calls it, the format of one number, and its width.
FIELDS = {
    "float64": ("real", "%.17g", 24),
    "float32": ("real", "%.9g", 16),
    "float16": ("real", "%.9g", 16),
    "bfloat16": ("real", "%.9g", 16),
    "complex128": ("complex", "%.17g", 24),
    "complex64": ("complex", "%.9g", 16),
    "int64": ("integer", "%d", 20),
    "int32": ("integer", "%d", 11),
    "int16": ("integer", "%d", 6),
    "int8": ("integer", "%d", 4),
    "uint8": ("integer", "%d", 3),
}
_WORDS = {"real": 3, "integer": 3, "complex": 4}  # numbers of a line, by what the header calls them
_DIGITS = b"0123456789- \t\r\n"
_CHARACTERS = {"real": _DIGITS + b"+.eEinfatyINFATY", "integer": _DIGITS, "complex": _DIGITS + b"+.eEinfatyINFATY"}
MOST_DIGITS, FEWEST_DIGITS = 16, 4  # of numbers that a text holds rounded
SINGLE_DIGITS = (8, 9)  # of a float32, none cut off
MOST_NUMBERS = 1 << 20  # that are looked at one by one; a layer has few different ones

Text = npt.NDArray[np.uint8]


def refusal(dtype: str, layout: Layout) -> str | None:
    """Say why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in FIELDS:
        return None
    return f"{dtype} isn't written as text; use --dtype float32, which holds every {dtype} exactly"


def plan_matrix(contents: Contents) -> FilePlan:
    """Plan a matrix file."""
    row, column, data = contents.arrays
    kind, pattern, width = FIELDS[data.dtype]
    header = _header(contents, kind)
    places = [len(str(size)) for size in contents.shape]
    line = sum(place + 1 for place in places) + (width + 1) * (_WORDS[kind] - 2)

    last = b""

    def fill(file: Written) -> None:
        nonlocal last
        file.write(header)
        for rows, columns, values in zip(_numbers(row), _numbers(column), _numbers(data), strict=True):
            numbers = values.reshape(len(rows), -1)  # a complex number is two
            for start in range(0, len(rows), LINES):
                part = slice(start, start + LINES)
                fields = [_counted(rows[part], places[0]), _counted(columns[part], places[1])]
                text = np.hstack(fields + [_formatted(one, pattern, width) for one in numbers[part].T])
                text[:, -1] = ord("\n")
                file.write(text.data.cast("B"))
                last = text[-1].tobytes()

    def check(path: Path) -> None:
        """Read the head and the last line again; to read all of it would take as long as to write it."""
        with path.open("rb") as file:
            head = file.read(len(header))
            file.seek(-len(last), os.SEEK_END)
            if (head, file.read()) != (header, last):
                raise OutputError("the file read back isn't what was written")

    return FilePlan(len(header) + data.shape[0] * line, fill, check)


def _header(contents: Contents, kind: str) -> bytes:
    lines = [f"%%MatrixMarket matrix coordinate {kind} general"]
    text = contents.record or ""
    lines += [COMMENT + text[start : start + COMMENT_WIDTH] for start in range(0, len(text), COMMENT_WIDTH)]
    lines.append(f"{contents.shape[0]} {contents.shape[1]} {contents.values.shape[0]}")
    return ("\n".join(lines) + "\n").encode("ascii")


def _numbers(array: Piece) -> Iterator[npt.NDArray[Any]]:
    """Yield an array's chunks as numpy has them: half-precision floats as float32, which holds them exactly, and
    complex numbers as two.
    """
    for chunk in array.chunks():
        if array.dtype == "bfloat16":  # the upper half of a float32
            yield (np.frombuffer(chunk.data, "<u2").astype("<u4") << 16).view("<f4")
            continue
        numbers = np.frombuffer(chunk.data, NUMPY[array.dtype])
        if numbers.dtype.kind == "c":
            numbers = numbers.view(numbers.real.dtype)
        yield numbers.astype("f4") if array.dtype == "float16" else numbers


def _counted(indices: npt.NDArray[Any], width: int) -> Text:
    """Return the numbers counted from 1 as digits, blanks in front and one behind: (entries, width + 1)."""
    rest = indices.astype(np.int64) + 1
    text = np.full((len(rest), width + 1), ord(" "), dtype=np.uint8)
    for place in range(width - 1, -1, -1):
        rest, digit = np.divmod(rest, 10)
        text[:, place] = np.where((rest > 0) | (digit > 0), digit + ord("0"), ord(" "))
        if not rest.any():
            break
    return text


def _formatted(values: npt.NDArray[Any], pattern: str, width: int) -> Text:
    """Return the values as text, blanks in front and one behind: (entries, width + 1).

    A matrix has few different ones, each of which is made once.
    """
    unique, where = np.unique(values.view(f"u{values.itemsize}"), return_inverse=True)
    texts = ((pattern % value).rjust(width) + " " for value in unique.view(values.dtype).tolist())
    return np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(-1, width + 1)[where]


class _Head(NamedTuple):
    """What stands before the entries: the kind of the numbers, the sizes, the record, and where the entries begin."""

    kind: str
    shape: tuple[int, int]
    entries: int
    record: str
    start: int


def read_matrix(source: Source) -> Found:
    """Return the arrays and the record of a file, read by scipy.

    Raises:
        InputError: it isn't one of this format, or is damaged.
        UsageError: scipy isn't installed.
    """
    import torch

    from convtool.core.rows import check_scipy

    check_scipy(f"{source.path}: to read .mtx takes")
    import scipy.io

    head = _head(source)
    try:
        with source.opened() as file:  # which it reads a KiB at a time: from a buffer that isn't Python code
            found = scipy.io.mmread(io.BufferedReader(file.raw, BLOCK))
    except (ValueError, OverflowError) as error:
        raise source.error(f"damaged: {error}") from None
    _check_words(source, head)
    digits = None if head.record else _digits(found.data)  # what another program wrote
    single = not head.record and digits in (None, *SINGLE_DIGITS) and _is_single(found.data)
    values = _in_written_dtype(source, torch.from_numpy(found.data), head.record)
    values = values.to(torch.complex64 if values.is_complex() else torch.float32) if single else values
    arrays = {"row": torch.from_numpy(found.row), "col": torch.from_numpy(found.col), "data": values}
    digits = None if single else digits
    return Found(arrays | {"shape": torch.tensor(head.shape)}, head.record or None, digits)


def _head(source: Source) -> _Head:
    """Read what stands before the entries, and hold it against the file's size: scipy makes room for what it says."""
    with source.opened() as file:
        lines = (file.readline(LONGEST) for _ in itertools.count())
        kind = next(lines).decode("ascii", "replace").split()
        if kind[:3] != ["%%MatrixMarket", "matrix", "coordinate"] or kind[4:] != ["general"] or kind[3] not in _WORDS:
            raise source.error(
                f"expected '%%MatrixMarket matrix coordinate' with real, integer or complex numbers,"
                f" 'general', in the first line; got {' '.join(kind)[:80]!r}"
            )
        record, number, line = "", 2, next(lines)
        while line.startswith(b"%") or line.isspace():
            text = line.decode("ascii", "replace").rstrip("\n")
            record += text.removeprefix(COMMENT) if text.startswith(COMMENT) else ""
            number, line = number + 1, next(lines)
        sizes = line.split()
        start = file.tell()
    if len(sizes) != 3 or not all(size.isdigit() and len(size) < 19 for size in sizes):
        got = line.decode("ascii", "backslashreplace").strip()
        raise source.error(f"damaged: line {number}: expected rows columns entries; got {got[:80]!r}")
    rows, columns, entries = map(int, sizes)
    if entries * 2 * _WORDS[kind[3]] > source.size - start:  # a digit of each number, and what ends it
        raise source.error(f"damaged: announces {entries} entries, more than its {source.size} bytes can hold")
    if bytes(source.view(source.size - 1, source.size)) != b"\n":  # a number that was cut short would still be one
        raise source.error("damaged: ends in the middle of a line")
    return _Head(kind[3], (rows, columns), entries, record, start)


def _is_single(values: npt.NDArray[Any]) -> bool:
    """Return whether each number has the fewest digits that bring a float32 back, as scipy's `mmwrite` writes these."""
    if values.dtype.kind not in "fc" or not values.size:
        return False
    numbers = np.unique(values.view(values.real.dtype))
    numbers = numbers[np.isfinite(numbers)]
    with np.errstate(over="ignore"):
        nearest = numbers.astype(np.float32)
    if (np.abs(nearest.astype(np.float64) - numbers) > np.abs(numbers) * 1e-7).any() or len(numbers) > MOST_NUMBERS:
        return False
    return all(float(str(short)) == number for short, number in zip(nearest, numbers.tolist(), strict=True))


def _digits(values: npt.NDArray[Any]) -> int | None:
    """Return how many decimal digits the numbers have, None for as many as a float64 takes, and for few.

    Programs that are told to write fewer digits than bring a number back, write it rounded. Numbers of fewer than
    `FEWEST_DIGITS` may be all that they are.
    """
    numbers = np.abs(values.view(values.real.dtype)) if values.dtype.kind in "fc" else np.empty(0)
    numbers = numbers[np.isfinite(numbers) & (numbers > 1e-280)]  # far from where powers of ten end
    if not numbers.size:
        return None

    def have(some: npt.NDArray[Any], digits: int) -> bool:
        for part in np.array_split(some, some.nbytes // BLOCK + 1):
            unit = 10.0 ** (np.floor(np.log10(part)) - digits + 1)
            if (np.abs(np.rint(part / unit) * unit - part) > 4 * np.spacing(part)).any():
                return False
        return True

    likely = next((count for count in range(1, MOST_DIGITS) if have(numbers[:LINES], count)), MOST_DIGITS)
    count = next((count for count in range(likely, MOST_DIGITS) if have(numbers, count)), MOST_DIGITS)
    return count if FEWEST_DIGITS <= count < MOST_DIGITS else None


def _check_words(source: Source, head: _Head) -> None:
    """Find what scipy passes over without a word: what stands in a line, or in a number, behind what it reads.

    It takes '1 1 5D3' (Fortran's way) and '1 1 5 6' for the entry 5, and as an integer 5.5 too.
    """
    words, blank, at = 0, True, head.start
    for data in source.chunks(head.start, source.size):
        for block in (data[start : start + BLOCK] for start in range(0, len(data), BLOCK)):
            strange = bytes(block).translate(None, _CHARACTERS[head.kind])
            if strange:
                line = 1 + bytes(source.view(0, at)).count(b"\n") + bytes(block).split(strange[:1])[0].count(b"\n")
                raise source.error(f"damaged: line {line}: has {strange[:1]!r} in a number of its kind")
            blanks = np.frombuffer(block, np.uint8) <= ord(" ")
            words += int(blank and not blanks[0]) + int(np.count_nonzero(blanks[:-1] > blanks[1:]))
            blank, at = bool(blanks[-1]), at + len(block)
    wanted = head.entries * _WORDS[head.kind]
    if words != wanted:
        raise source.error(
            f"damaged: {head.entries} entries of {_WORDS[head.kind]} numbers each are {wanted}, and it holds {words}"
        )


def _in_written_dtype(source: Source, values: Tensor, record: str) -> Tensor:
    """Return the values in the dtype that the record says they were written from, where it says so."""
    import torch

    try:
        name = json.loads(record)["dtype"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return values
    if not isinstance(name, str) or name not in FIELDS:
        return values
    dtype: torch.dtype = getattr(torch, name)
    if (dtype.is_complex, dtype.is_floating_point) == (values.is_complex(), values.is_floating_point()):
        # The digits that are written bring each number back; what moves by more than they leave open wasn't that dtype.
        back = values.to(dtype)
        parts = zip(back.split(BLOCK), values.split(BLOCK), strict=True)  # as much as a cache holds
        if not any(bool(((kept - part).abs() > part.abs() * 1e-8).any()) for kept, part in parts):
            return back
    raise source.error(f"damaged: its record calls its numbers {name}, which they aren't")
