"""The .safetensors format: an 8-byte length, a JSON header, the tensors' bytes.

The header is parsed here and not by the safetensors package because its order, its bytes and every inconsistency
matter (a file is to be copied bit by bit, and a damaged one is to be named), and because none of that needs torch. The
package wants all tensors in memory to write them, so that is done here too; what has been written is opened again with
the package, as an independent reader.

A checkpoint has its tensors, and convtool's record in `__metadata__`. A matrix has `indptr`, `indices`, `data` (csr) or
`row`, `col`, `data` (coo), both with `shape`, two int64; or `weight` (dense), which with `bias` is an nn.Linear's state
dict. `__metadata__` has its `layout`, and its record as `convtool_matrix`.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from convtool.errors import InputError, OutputError, RefusedError, UsageError
from convtool.formats.atomic import FilePlan, Written
from convtool.formats.dtypes import ITEMSIZE, LARGEST, MOST_AXES, SAFETENSORS, SAFETENSORS_CODES, is_size
from convtool.formats.matrices import ARRAYS, RECORD_NAME, Contents, Found, Layout
from convtool.formats.pieces import Piece, tensor_chunks
from convtool.formats.source import Chunk, Source, StoredArray
from convtool.formats.strict_json import is_unicode, parse_json
from convtool.formats.tensor_file import Place, TensorFile

if TYPE_CHECKING:
    from torch import Tensor

NAME = "safetensors"
LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True
COO_INDICES: str | None = None

PAIRED = "F4"  # a dtype of two numbers in a byte
MAX_HEADER = 100_000_000  # the safetensors package's own limit; a longer header is damage or an attack
RECORD_KEY = "convtool"
OWN_KEYS = (RECORD_KEY, "format")  # of the metadata, never a tied tensor's name
MATRIX_ALIGNMENT = 64  # of the first tensor in a matrix file, which is for mapping; a checkpoint's is the format's 8


class Span(NamedTuple):
    """A tensor's dtype, by the format's name, its shape, and where its bytes stand in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        return SAFETENSORS.get(self.code, self.code)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile(TensorFile):
    """A .safetensors file.

    Attributes:
        aliases: names that the metadata give for tensors that are stored under another (the way in which the
            safetensors package's `save_model` keeps tied tensors), with that other name.
    """

    format = NAME
    tensors: Mapping[str, Span]

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        header, data_start = _read_header(source)
        texts = _metadata(header, source)
        self._record = texts.pop(RECORD_KEY, None)
        spans = _table(header, data_start, source)
        self.aliases = {
            name: kept
            for name, kept in sorted(texts.items())
            if kept in spans and name not in spans and name not in OWN_KEYS
        }
        self.metadata = {key: text for key, text in texts.items() if key not in self.aliases}
        self.tensors = spans | {name: spans[kept] for name, kept in self.aliases.items()}

    def record(self) -> str | None:
        return self._record

    def in_order_of_bytes(self) -> list[str]:
        return sorted(self.tensors, key=lambda name: self.tensors[name][2:])

    def tensor(self, name: str) -> Tensor:
        return self.array(name).read()

    def array(self, name: str) -> StoredArray:
        """Return a tensor that is read in parts; raises what `tensor` does."""
        import torch

        span = self.tensors[name]
        found = getattr(torch, span.dtype, None)
        if span.dtype not in ITEMSIZE or found is None:
            raise InputError(f"{self.path}: {name}: dtype {span.code} is not supported")
        return StoredArray(self.source, span.start, found, span.shape)

    def piece(self, name: str) -> Piece:
        span = self.tensors[name]
        start, stop = span.start, span.stop
        return Piece(
            name,
            span.dtype,
            span.shape,
            span.nbytes,
            lambda: map(Chunk, self.source.chunks(start, stop)),
            memory=(start, stop) if start != stop else name,
            copy=lambda file: self.source.copy_to(file, start, stop),
        )

    def place(self, name: str) -> Place:
        return Place("the file", *self.tensors[name][2:])


def recognises(start: bytes) -> bool:
    """Tell whether a file that begins so could be one: a sane header length and the opening brace of its JSON."""
    return len(start) >= 9 and int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:9] == b"{"


def open_file(source: Source, root: str | None) -> SafetensorsFile:
    """Open a file.

    Raises:
        InputError: it is damaged.
        UsageError: there is no `root` to choose.
    """
    if root is not None:
        raise UsageError(f"{source.path}: --root is for nested torch files; a safetensors file is flat")
    return SafetensorsFile(source)


def _read_header(source: Source) -> tuple[dict[str, Any], int]:
    size = source.size
    if size < 8:
        raise source.error(f"is truncated: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(source.view(0, 8), "little")
    if length > MAX_HEADER:
        raise source.error(f"declares a header of {length} bytes, more than the format's {MAX_HEADER}")
    if length > size - 8:
        raise source.error(
            f"is truncated: expected a header of {length} bytes, but only {size - 8} bytes follow its length"
        )
    text = bytes(source.view(8, 8 + length))
    header = parse_json(text, source.path, "its header", _entry) if text.startswith(b"{") else None
    if not isinstance(header, dict):
        raise source.damaged("its header is not a JSON object")
    return header, 8 + length


def _metadata(header: dict[str, Any], source: Source) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(isinstance(value, str) for value in metadata.values()):
        raise source.damaged("its __metadata__ is not a table of strings")
    if not all(map(is_unicode, itertools.chain.from_iterable(metadata.items()))):
        raise source.damaged("its __metadata__ holds half a character (a surrogate)")
    return metadata


def _entry(pairs: dict[str, Any]) -> Span | None:
    """Return the tensor's entry that a JSON object is, as small as it gets: a hostile header has a million."""
    try:
        code, shape, (start, stop) = pairs["dtype"], pairs["shape"], pairs["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    if not (isinstance(code, str) and isinstance(shape, list) and len(shape) <= MOST_AXES):
        return None
    if not all(map(is_size, (*shape, start, stop))):
        return None
    return Span(sys.intern(code), tuple(shape), start, stop)


def _pairs(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tensor's shape as torch counts: two numbers of 4 bits are one element."""
    return (*shape[:-1], shape[-1] // 2) if code == PAIRED else shape


def _numbers(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tensor's shape as a header counts: number by number."""
    return (*shape[:-1], shape[-1] * 2) if code == PAIRED and shape else shape


def _table(header: dict[str, Any], data_start: int, source: Source) -> dict[str, Span]:
    """Return the spans within the file, in the header's order; every inconsistency is named."""
    spans = header
    for name, span in header.items():
        if not isinstance(span, Span) or not is_unicode(name):
            raise source.damaged(f"the header's entry for {name!r} is malformed")
        code, shape, start, stop = span
        if code == PAIRED and (not shape or shape[-1] % 2):
            raise source.damaged(f"{name!r} of dtype {code} has an odd number of numbers in a row, {list(shape)}")
        span = span._replace(shape=_pairs(code, shape))
        wrong = span.dtype in ITEMSIZE and stop - start != math.prod(span.shape) * ITEMSIZE[span.dtype]
        if start > stop or wrong or math.prod(filter(None, shape)) > LARGEST:
            raise source.damaged(
                f"{name!r} of dtype {code} and shape {list(shape)} is declared to take {stop - start} bytes"
            )
        spans[name] = Span(code, span.shape, data_start + start, data_start + stop)
    end = data_start
    for name, span in sorted(spans.items(), key=lambda item: item[1][2:]):
        if span.start != end:
            what = "overlaps the tensor before it" if span.start < end else "leaves a hole before it"
            raise source.damaged(f"{name!r} {what}")
        end = span.stop
    if end > source.size:
        raise source.error(f"is truncated: its header describes {end} bytes, the file has {source.size}")
    if end < source.size:
        raise source.damaged(f"{source.size - end} bytes follow the last tensor")
    return spans


# Writing


def plan_state(pieces: Sequence[Piece], metadata: Mapping[str, str], record: str | None) -> FilePlan:
    """Plan the file of a checkpoint's tensors; see `_plan`."""
    return _plan(pieces, metadata if record is None else {**metadata, RECORD_KEY: record})


def _plan(pieces: Sequence[Piece], metadata: Mapping[str, str], alignment: int = 8) -> FilePlan:
    """Plan a file of these tensors, in their order.

    Of tensors that share their memory the first is stored, and the metadata name the others' as the safetensors
    package does: `{name: stored name}`.

    Raises:
        RefusedError: a dtype that the format doesn't have, or a name that stands for something else in it.
    """
    kept: dict[Hashable, Piece] = {}
    aliases: dict[str, str] = {}
    for piece in pieces:
        _check_room(piece)
        first = kept.setdefault(piece.identity, piece)
        if first is not piece:
            if piece.name in OWN_KEYS or metadata.get(piece.name, first.name) != first.name:
                raise RefusedError(
                    f"{piece.name} shares the memory of {first.name}, and the metadata have another use of its name"
                )
            aliases[piece.name] = first.name
    stored, spans = _placed(list(kept.values()))
    known = {piece.name for piece in pieces}
    for key, value in metadata.items():
        if value in spans and key not in known and key not in OWN_KEYS:
            raise RefusedError(
                f"{value}: the metadata give this name to {key!r}, which would be read as a tensor tied to it; choose"
                " another name with --name"
            )
    texts = {name: text for name, text in metadata.items() if not (text in spans and name in aliases)} | aliases
    head = _header({piece.name: spans[piece.name] for piece in pieces if piece.name in spans}, texts, alignment)

    def fill(file: Written) -> None:
        file.write(head)
        for piece in stored:
            piece.write(file)

    size = len(head) + sum(piece.nbytes for piece in stored)
    return FilePlan(size, fill, lambda path: _check(path, stored, texts))


def _check_room(piece: Piece) -> None:
    if SAFETENSORS_CODES.get(piece.dtype, piece.dtype) in ITEMSIZE:  # torch's name of a dtype without a code
        raise RefusedError(f"{piece.name}: safetensors has no {piece.dtype}; write a .pt file instead")
    if SAFETENSORS_CODES.get(piece.dtype) == PAIRED and not piece.shape:
        raise RefusedError(f"{piece.name}: safetensors has no pair without an axis; write a .pt file instead")
    if piece.name == "__metadata__" or not is_unicode(piece.name):
        raise RefusedError(f"safetensors has no room for a tensor named {piece.name!r}; write a .pt file instead")


def _placed(pieces: Sequence[Piece]) -> tuple[list[Piece], dict[str, Span]]:
    """Return the pieces in the order of their bytes, and where each of them comes behind the header."""
    stored = sorted(pieces, key=lambda piece: piece.place)
    spans = _spans(stored)
    if any(spans[piece.name].start % ITEMSIZE.get(piece.dtype, 1) for piece in stored):
        # Readers map tensors where they stand, so that larger numbers come first where they would stand crooked.
        stored.sort(key=lambda piece: -ITEMSIZE.get(piece.dtype, 1))
        spans = _spans(stored)
    return stored, spans


def _spans(stored: Sequence[Piece]) -> dict[str, Span]:
    stops = itertools.accumulate(piece.nbytes for piece in stored)
    return {
        piece.name: Span(SAFETENSORS_CODES.get(piece.dtype, piece.dtype), piece.shape, stop - piece.nbytes, stop)
        for piece, stop in zip(stored, stops, strict=True)
    }


def _header(spans: Mapping[str, Span], metadata: Mapping[str, str], alignment: int) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, (code, shape, start, stop) in spans.items():
        header[name] = {"dtype": code, "shape": _numbers(code, shape), "data_offsets": (start, stop)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % alignment)  # the first tensor's bytes come behind
    return len(text).to_bytes(8, "little") + text


def _check(path: Path, stored: Sequence[Piece], metadata: Mapping[str, str]) -> None:
    """Open what was written with the safetensors package.

    Raises:
        OutputError: it is not what was to be written.
    """
    from safetensors import SafetensorError, safe_open

    codes = {one.name: SAFETENSORS_CODES.get(one.dtype, one.dtype) for one in stored}
    expected = {one.name: (codes[one.name], list(_numbers(codes[one.name], one.shape))) for one in stored}
    try:
        with path.open("rb") as file, safe_open(_unicode_name(path, file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            if found != expected or (opened.metadata() or {}) != metadata:
                raise OutputError("the file read back holds other tensors than were written")
            for piece in stored:
                if piece.verified:
                    piece.check(tensor_chunks(opened.get_tensor(piece.name)))
    except SafetensorError as error:
        raise ValueError(error) from None


def _unicode_name(path: Path, file: BinaryIO) -> str:
    """Return a name for an open file that the safetensors package takes: of a folder with any bytes it takes none."""
    return str(path) if is_unicode(str(path)) else f"/dev/fd/{file.fileno()}"


# Matrices


def refusal(dtype: str, layout: Layout) -> str | None:
    """Say why the format can't hold values of that dtype, and the way out; None where it can."""
    return None if dtype in SAFETENSORS_CODES else f"safetensors has no {dtype}; write a .pt file instead"


def plan_matrix(contents: Contents) -> FilePlan:
    """Plan a matrix file; its arrays stand in order of falling element size, so that each is aligned when mapped."""
    import torch

    arrays = list(contents.arrays)
    if contents.layout != "dense":
        arrays.insert(0, Piece.of_tensor("shape", torch.tensor(contents.shape)))
    arrays.sort(key=lambda array: -ITEMSIZE[array.dtype])
    metadata = {"format": "pt", "layout": contents.layout}
    record = {} if contents.record is None else {RECORD_NAME: contents.record}
    return _plan(arrays, metadata | record, MATRIX_ALIGNMENT)


def read_matrix(source: Source) -> Found:
    """Return the arrays and the record of a matrix file; InputError where it is damaged."""
    file = SafetensorsFile(source)
    return Found({name: file.array(name) for name in file.tensors}, file.metadata.get(RECORD_NAME))


def is_matrix(source: Source) -> bool:
    """Tell whether the file is a matrix and not a checkpoint, as far as its record or its arrays' names tell."""
    file = SafetensorsFile(source)
    return RECORD_NAME in file.metadata or set(ARRAYS["csr"]) <= file.tensors.keys()
