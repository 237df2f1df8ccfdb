"""The .safetensors format: an 8-byte length, a JSON header, the tensors' bytes.

The header is parsed here and not by the safetensors package because its order, its bytes and every inconsistency
matter (a file is to be copied bit by bit, and a damaged one is to be named), and because none of that needs torch.
What has been written is opened again with the package, as an independent reader.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convtool.checkpoint.base import Checkpoint, Place
from convtool.checkpoint.record import Record, loads
from convtool.core.flat import tensor_bits
from convtool.errors import InputError, OutputError, RefusedError
from convtool.formats.dtypes import ITEMSIZE, MOST_AXES, SAFETENSORS, SAFETENSORS_CODES
from convtool.formats.source import Receiver, Source
from convtool.kinds.kind import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# The safetensors package's own limit; a longer header is damage or an attack.
MAX_HEADER = 100_000_000
RECORD_KEY = "convtool"
OWN_KEYS = (RECORD_KEY, "format")  # of the metadata, never a tied tensor's name
LARGEST = 2**63 - 1  # what torch counts with


class Span(NamedTuple):
    """Where a tensor's bytes stand in the file, and the format's name of its dtype."""

    code: str
    start: int
    stop: int


class SafetensorsCheckpoint(Checkpoint):
    """A .safetensors file.

    Attributes:
        metadata: the header's `__metadata__`.
        spans: each tensor's place, in the header's order.
        aliases: names that the metadata give for tensors that are stored under another (the way in which the
            safetensors package's `save_model` keeps tied tensors), with that other name.
    """

    format = "safetensors"

    def __init__(self, path: Path, *, mapped: bool = True) -> None:
        super().__init__(path)
        self.source = Source(path, mapped=mapped)
        header, data_start = _read_header(self.source)
        self.metadata = _metadata(header, path)
        self.spans, self.infos = _table(header, data_start, self.source.size, path)
        self.aliases = {
            name: kept
            for name, kept in sorted(self.metadata.items())
            if kept in self.spans and name not in self.spans and name not in OWN_KEYS
        }
        for name, kept in self.aliases.items():
            info = self.infos[kept]
            self.spans[name] = self.spans[kept]
            self.infos[name] = TensorInfo(name, info.dtype, info.shape, info.nbytes)

    def stored_tensor(self, name: str) -> Tensor:
        import torch

        info, span = self.infos[name], self.spans[name]
        dtype = getattr(torch, info.dtype, None)
        if info.dtype not in ITEMSIZE or dtype is None:
            raise InputError(f"{self.path}: {name}: dtype {span.code} is not supported")
        if span.start == span.stop:
            return torch.empty(info.shape, dtype=dtype)
        view = self.source.view(span.start, span.stop)
        if span.start % dtype.itemsize:  # torch wants aligned memory, the format doesn't promise it
            view = memoryview(bytearray(view))
        tensor: Tensor = torch.frombuffer(view, dtype=dtype).reshape(info.shape)
        return tensor

    def bits(self, name: str) -> Tensor:
        import torch

        span = self.spans[name]
        if span.start == span.stop:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.source.view(span.start, span.stop), dtype=torch.uint8)

    def chunks(self, name: str) -> Iterator[memoryview]:
        span = self.spans[name]
        return self.source.chunks(span.start, span.stop)

    def copy_to(self, name: str, file: Receiver) -> None:
        span = self.spans[name]
        self.source.copy_to(file, span.start, span.stop)

    def memory(self, name: str) -> Hashable:
        span = self.spans[name]
        return (span.start, span.stop) if span.start != span.stop else name

    def place(self, name: str) -> Place:
        span = self.spans[name]
        return Place("the file", span.start, span.stop)

    @cached_property
    def record(self) -> Record | None:
        text = self.metadata.get(RECORD_KEY)
        return None if text is None else loads(text, str(self.path))


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that begins so could be one: a sane header length and the opening brace of its JSON."""
    return len(start) >= 9 and int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:9] == b"{"


class Entry(NamedTuple):
    """A tensor to write; its bytes are asked for when their turn comes, in chunks.

    Attributes:
        dtype: torch's name, or a code of the format's own that torch has no dtype for.
        memory: the same for tensors that share their memory.
        place: where its bytes come among the others'.
        copy: writes all of them to a file, where that is faster than in chunks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[memoryview]]
    memory: Hashable
    place: tuple[int, int]
    copy: Callable[[Receiver], None] | None = None


def plan_safetensors(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[Entry]]:
    """The header of a file of these tensors, in their order, and the entries whose bytes follow it, in theirs.

    Of tensors that share their memory the first is stored, and the metadata name the others' as the safetensors
    package does: `{name: stored name}`.

    Raises:
        RefusedError: a dtype that the format doesn't have, or a name that stands for something else in it.
    """
    kept: dict[Hashable, Entry] = {}
    aliases: dict[str, str] = {}
    for entry in entries:
        code = SAFETENSORS_CODES.get(entry.dtype, entry.dtype)
        if code in ITEMSIZE:
            raise RefusedError(f"{entry.name}: safetensors has no {entry.dtype}; write a .pt file instead")
        if entry.name == "__metadata__" or not _is_unicode(entry.name):
            raise RefusedError(f"safetensors has no room for a tensor named {entry.name!r}; write a .pt file instead")
        first = kept.setdefault(entry.memory, entry)
        if first is not entry:
            if entry.name in OWN_KEYS or metadata.get(entry.name, first.name) != first.name:
                raise RefusedError(
                    f"{entry.name} shares the memory of {first.name}, and the metadata have another use of its name"
                )
            aliases[entry.name] = first.name
    stored = sorted(kept.values(), key=lambda entry: entry.place)
    offsets = _offsets(stored)
    if any(offsets[entry.name][0] % ITEMSIZE.get(entry.dtype, 1) for entry in stored):
        # Readers map tensors where they stand, so that larger numbers come first where they would stand crooked.
        stored = sorted(stored, key=lambda entry: (-ITEMSIZE.get(entry.dtype, 1), entry.place))
        offsets = _offsets(stored)
    known = {entry.name for entry in entries}
    for key, value in metadata.items():
        if value in offsets and key not in known and key not in OWN_KEYS:
            raise RefusedError(
                f"{value}: the metadata give this name to {key!r}, which would be read as a tensor tied to it; choose"
                " another name with --name"
            )
    texts = {name: text for name, text in metadata.items() if not (text in offsets and name in aliases)} | aliases
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    for entry in entries:
        if entry.name not in aliases:
            code = SAFETENSORS_CODES.get(entry.dtype, entry.dtype)
            header[entry.name] = {
                "dtype": code,
                "shape": list(entry.shape),
                "data_offsets": list(offsets[entry.name]),
            }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8, as the format recommends
    return len(text).to_bytes(8, "little") + text, stored


def _offsets(stored: Sequence[Entry]) -> dict[str, tuple[int, int]]:
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in stored:
        offsets[entry.name] = (end, end + entry.nbytes)
        end += entry.nbytes
    return offsets


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_safetensors(file: Receiver, head: bytes, stored: Sequence[Entry]) -> None:
    """Write a file as `plan_safetensors` planned it."""
    file.write(head)
    for entry in stored:
        if entry.copy is not None:
            entry.copy(file)
            continue
        written = 0
        for chunk in entry.chunks():
            file.write(chunk)
            written += chunk.nbytes
        if written != entry.nbytes:
            raise RuntimeError(f"{entry.name}: {written} bytes came, {entry.nbytes} were announced")


def check_written(path: Path, expected: Mapping[str, tuple[int, ...]], new: Mapping[str, Tensor]) -> None:
    """Open what was written with the safetensors package: the same tensors, and the new ones bit for bit.

    Raises:
        OutputError: it is not what was to be written.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            if shapes != dict(expected):
                raise OutputError("the file read back holds other tensors than were written; nothing was changed")
            for name, tensor in new.items():
                back = opened.get_tensor(name)
                if not torch.equal(tensor_bits(back), tensor_bits(tensor)):
                    raise OutputError(f"{name} read back differs from what was written; nothing was changed")
    except SafetensorError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None


def _read_header(source: Source) -> tuple[dict[str, Any], int]:
    path, size = source.path, source.size
    if size < 8:
        raise InputError(f"{path}: is truncated: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(source.view(0, 8), "little")
    if length > MAX_HEADER:
        raise InputError(f"{path}: declares a header of {length} bytes, more than the format's {MAX_HEADER}")
    if length > size - 8:
        raise InputError(
            f"{path}: is truncated: expected a header of {length} bytes, but only {size - 8} bytes follow its length"
        )
    text = bytes(source.view(8, 8 + length))
    if not text.startswith(b"{"):
        raise InputError(f"{path}: is damaged: its header is not a JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is damaged: its header is not UTF-8") from None
    except _DuplicateKeyError as error:
        raise InputError(f"{path}: is damaged: its header has the key {error.args[0]!r} twice") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: is damaged: its header is not a JSON object")
    return header, 8 + length


def _no_constant(text: str) -> None:
    raise ValueError(text)  # NaN and Infinity, which JSON doesn't have and Python reads


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    """A JSON object: a tensor's entry in its small form, anything else as a dict."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return _entry(found) or found


def _metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: is damaged: its __metadata__ is not a table of strings")
    if not all(map(_is_unicode, itertools.chain.from_iterable(metadata.items()))):
        raise InputError(f"{path}: is damaged: its __metadata__ holds half a character (a surrogate)")
    return metadata


class _Entry(NamedTuple):
    """A tensor's entry in the header, as small as it gets: a hostile header has a million."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _entry(pairs: dict[str, Any]) -> _Entry | None:
    """The tensor's entry that a JSON object is; None where it isn't one."""
    try:
        code, shape, (start, stop) = pairs["dtype"], pairs["shape"], pairs["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    if not (isinstance(code, str) and isinstance(shape, list) and len(shape) <= MOST_AXES):
        return None
    if any(type(n) is not int or not 0 <= n <= LARGEST for n in (*shape, start, stop)):
        return None
    return _Entry(sys.intern(code), tuple(shape), start, stop)


def _table(
    header: dict[str, Any], data_start: int, size: int, path: Path
) -> tuple[dict[str, Span], dict[str, TensorInfo]]:
    """Spans and descriptions, in the header's order; every inconsistency named."""
    spans: dict[str, Span] = {}
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if not isinstance(entry, _Entry) or not _is_unicode(name):
            raise InputError(f"{path}: is damaged: the header's entry for {name!r} is malformed")
        code, shape, start, stop = entry
        dtype = SAFETENSORS.get(code, code)
        nbytes = math.prod(shape) * ITEMSIZE.get(dtype, 0)
        if start > stop or (dtype in ITEMSIZE and stop - start != nbytes) or math.prod(filter(None, shape)) > LARGEST:
            raise InputError(
                f"{path}: is damaged: {name!r} of dtype {code} and shape {list(shape)} is declared to take"
                f" {stop - start} bytes"
            )
        spans[name] = Span(code, data_start + start, data_start + stop)
        infos[name] = TensorInfo(name, dtype, shape, stop - start)
    end = data_start
    for name, span in sorted(spans.items(), key=lambda item: item[1][1:]):
        if span.start != end:
            what = "overlaps the tensor before it" if span.start < end else "leaves a hole before it"
            raise InputError(f"{path}: is damaged: {name!r} {what}")
        end = span.stop
    if end > size:
        raise InputError(f"{path}: is truncated: its header describes {end} bytes, the file has {size}")
    if end < size:
        raise InputError(f"{path}: is damaged: {size - end} bytes follow the last tensor")
    return spans, infos
