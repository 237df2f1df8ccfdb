"""The Matrix Market format, .mtx: text, for `scipy.io.mmread` and programs outside of Python.

A line per entry, `row column value`, counted from 1, in order of rows, then columns. Each number is padded to a fixed
width, so that the file's size is known before anything is made and a range of rows can be found without reading the
rest. Values are written with as many digits as bring each number back to the bit. There is no room for a bias; the
record stands in comment lines, `%convtool_matrix` in front of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convtool.errors import OutputError
from convtool.matrix.contents import Array, Contents, Layout, Output
from convtool.matrix.market import COMMENT, FIELDS, TextMatrix, read_market
from convtool.matrix.reading import Raw

LAYOUTS: tuple[Layout, ...] = ("coo",)
STORES_BIAS = False

COMMENT_WIDTH = 1000  # the format allows lines of 1024 characters
LINES = 1 << 14  # entries made into text together

Text = npt.NDArray[np.uint8]


def refusal(dtype: torch.dtype, layout: Layout) -> str | None:
    """Why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in FIELDS:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{name} isn't written as text; use --dtype float32, which holds every {name} exactly"


def index_dtype(layout: Layout, narrowest: torch.dtype) -> torch.dtype:
    """The dtype of indices, given the narrowest that holds them; in the file they are text."""
    return narrowest


def file_size(contents: Contents) -> int:
    """The exact size of the file in bytes."""
    _, _, data = contents.arrays
    return len(_header(contents)) + data.shape[0] * _line_width(contents)


def write(file: Output, contents: Contents) -> None:
    """Write the file."""
    file.write(_header(contents))
    row, column, data = contents.arrays
    widths = [len(str(size)) for size in contents.shape]
    _, pattern, width = FIELDS[data.dtype]
    parts = zip(_numbers(row), _numbers(column), _numbers(data), strict=True)
    for rows, columns, values in parts:
        for start in range(0, len(rows), LINES):
            part = slice(start, start + LINES)
            fields = [_counted(rows[part], widths[0]), _counted(columns[part], widths[1])]
            numbers = values[part].reshape(len(rows[part]), -1)  # a complex number is two
            fields += [_formatted(numbers[:, number], pattern, width) for number in range(numbers.shape[1])]
            file.write(_lines(fields).data.cast("B"))


def check(path: Path, contents: Contents) -> None:
    """Read the head and the last line again; OutputError where they are not what was to be written."""
    header, width = _header(contents), _line_width(contents)
    _, _, data = contents.arrays
    with path.open("rb") as file:
        sound = file.read(len(header)) == header
        if data.shape[0]:
            file.seek(len(header) + (data.shape[0] - 1) * width)
            last = file.read()
            numbers = last.split()
            sound = sound and last.endswith(b"\n") and len(numbers) == (4 if data.dtype.is_complex else 3)
            sound = sound and all(
                1 <= int(number) <= size for number, size in zip(numbers[:2], contents.shape, strict=True)
            )
    if not sound:
        raise OutputError("the file read back isn't what was written; nothing was changed")


def _header(contents: Contents) -> bytes:
    _, _, data = contents.arrays
    lines = [f"%%MatrixMarket matrix coordinate {FIELDS[data.dtype][0]} general"]
    text = contents.record or ""
    lines += [COMMENT + text[start : start + COMMENT_WIDTH] for start in range(0, len(text), COMMENT_WIDTH)]
    lines.append(f"{contents.shape[0]} {contents.shape[1]} {data.shape[0]}")
    return ("\n".join(lines) + "\n").encode("ascii")


def _line_width(contents: Contents) -> int:
    _, _, data = contents.arrays
    number = FIELDS[data.dtype][2] + 1
    places = sum(len(str(size)) + 1 for size in contents.shape)
    return places + number * (2 if data.dtype.is_complex else 1)


def _numbers(array: Array) -> Iterator[npt.NDArray[Any]]:
    """The chunks of an array as numpy has them; half-precision floats as float32, which holds them exactly."""
    kind = array.dtype.to_real()
    for chunk in array.chunks():
        words = np.frombuffer(chunk.data, dtype=f"<u{kind.itemsize}").astype(f"=u{kind.itemsize}")
        flat = torch.from_numpy(words).view(kind)
        yield (flat.float() if kind in (torch.float16, torch.bfloat16) else flat).numpy()


def _counted(indices: npt.NDArray[Any], width: int) -> Text:
    """(entries, width) the numbers counted from 1 as digits, blanks in front."""
    rest = indices.astype(np.int64) + 1
    text = np.full((len(rest), width), ord(" "), dtype=np.uint8)
    for place in range(width - 1, -1, -1):
        rest, digit = np.divmod(rest, 10)
        text[:, place] = np.where((rest > 0) | (digit > 0), digit + ord("0"), ord(" "))
        if not rest.any():
            break
    return text


def _formatted(values: npt.NDArray[Any], pattern: str, width: int) -> Text:
    """(entries, width) the values as text, blanks in front; a matrix has few different ones, and each is made once."""
    unique, where = np.unique(values.view(f"u{values.itemsize}"), return_inverse=True)
    lines = b"".join((pattern % value).rjust(width).encode("ascii") for value in unique.view(values.dtype).tolist())
    return np.frombuffer(lines, dtype=np.uint8).reshape(-1, width)[where]


def _lines(fields: list[Text]) -> Text:
    blank = np.full((len(fields[0]), 1), ord(" "), dtype=np.uint8)
    end = np.full((len(fields[0]), 1), ord("\n"), dtype=np.uint8)
    parts = [part for field in fields for part in (field, blank)]
    return np.ascontiguousarray(np.hstack([*parts[:-1], end]))


def read(path: Path) -> Raw | TextMatrix:
    """The matrix in a file; InputError where it isn't one of this format, or is damaged."""
    return read_market(path)
