"""The .safetensors format: an 8-byte length, a JSON header, the tensors' bytes.

The header is parsed here and not by the safetensors package because its order, its bytes and every inconsistency
matter (a file is to be copied bit by bit, and a damaged one is to be named), and because none of that needs torch.
What has been written is opened again with the package, as an independent reader.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.info import TensorInfo
from convtool.checkpoint.record import Record, loads
from convtool.errors import InputError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

# The safetensors package's own limit; a longer header is damage or an attack.
MAX_HEADER = 100_000_000
RECORD_KEY = "convtool"
CHUNK = 1 << 24  # bytes copied at a time

# Format's name of a dtype: (torch's name, bytes per element).
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
}
CODES = {name: code for code, (name, _) in DTYPES.items()}


class Span(NamedTuple):
    """Where a tensor's bytes stand in the file, and the format's name of its dtype."""

    code: str
    start: int
    stop: int


class SafetensorsCheckpoint(Checkpoint):
    """A .safetensors file, mapped into memory."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with path.open("rb") as file:
                self._size = file.seek(0, 2)
                file.seek(0)
                header, data_start = _read_header(file, self._size, path)
                # A private mapping: torch asks for writable memory, and nothing written could reach the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        self.metadata = _metadata(header, path)
        self.spans, self.infos = _table(header, data_start, self._size, path)

    def tensor(self, name: str) -> Tensor:
        import torch

        info, span = self.infos[name], self.spans[name]
        if span.code not in DTYPES:
            raise InputError(f"{self.path}: {name}: dtype {span.code} is not supported")
        dtype = getattr(torch, info.dtype)
        if span.start == span.stop:
            return torch.empty(info.shape, dtype=dtype)
        if span.start % dtype.itemsize:  # torch wants aligned memory, the format doesn't promise it
            return torch.frombuffer(bytearray(self.raw(name)), dtype=dtype).reshape(info.shape)
        count = (span.stop - span.start) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=span.start).reshape(info.shape)

    def bits(self, name: str) -> Tensor:
        import torch

        span = self.spans[name]
        if span.start == span.stop:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=span.stop - span.start, offset=span.start)

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes as they stand in the file."""
        span = self.spans[name]
        return memoryview(self._map)[span.start : span.stop]

    @cached_property
    def record(self) -> Record | None:
        text = self.metadata.get(RECORD_KEY)
        return None if text is None else loads(text, str(self.path))


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that begins so could be one: a sane header length and the opening brace of its JSON."""
    return len(start) >= 9 and int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:9] == b"{"


class Entry(NamedTuple):
    """A tensor to write; its bytes are asked for when their turn comes, in chunks."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[memoryview]]


def write_safetensors(file: BinaryIO, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Write a file of these tensors, in their order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8, as the format recommends
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for entry in entries:
        for chunk in entry.chunks():
            file.write(chunk)


def chunks_of(view: memoryview) -> Iterator[memoryview]:
    """The bytes in pieces, so that a writer's progress can be seen and interrupted."""
    return (view[start : start + CHUNK] for start in range(0, len(view), CHUNK))


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return chunks_of(flat.view(torch.uint8).numpy().data) if flat.numel() else iter(())


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
                back = opened.get_tensor(name).contiguous()
                if not torch.equal(_bits(back), _bits(tensor.detach().cpu().contiguous())):
                    raise OutputError(f"{name} read back differs from what was written; nothing was changed")
    except SafetensorError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise InputError(f"{path}: is truncated: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise InputError(f"{path}: declares a header of {length} bytes, more than the format's {MAX_HEADER}")
    if length > size - 8:
        raise InputError(
            f"{path}: is truncated: expected a header of {length} bytes, but only {size - 8} bytes follow its length"
        )
    text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is damaged: its header is not UTF-8") from None
    except _DuplicateKeyError as error:
        raise InputError(f"{path}: is damaged: its header has the key {error.args[0]!r} twice") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: is damaged: its header is not a JSON object")
    return header, 8 + length


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: is damaged: its __metadata__ is not a table of strings")
    return metadata


def _table(
    header: dict[str, Any], data_start: int, size: int, path: Path
) -> tuple[dict[str, Span], dict[str, TensorInfo]]:
    """Spans and descriptions, in order of position; every inconsistency named."""
    spans: dict[str, Span] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in header.items():
        try:
            code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, stop)
            if not isinstance(code, str) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: is damaged: the header's entry for {name!r} is malformed") from None
        if start > stop or (code in DTYPES and stop - start != math.prod(shape) * DTYPES[code][1]):
            raise InputError(
                f"{path}: is damaged: {name!r} of dtype {code} and shape {list(shape)} is declared to take"
                f" {stop - start} bytes"
            )
        spans[name] = Span(code, data_start + start, data_start + stop)
        shapes[name] = shape
    spans = dict(sorted(spans.items(), key=lambda item: item[1][1:]))
    end = data_start
    for name, span in spans.items():
        if span.start != end:
            what = "overlaps the tensor before it" if span.start < end else "leaves a hole before it"
            raise InputError(f"{path}: is damaged: {name!r} {what}")
        end = span.stop
    if end > size:
        raise InputError(f"{path}: is truncated: its header describes {end} bytes, the file has {size}")
    if end < size:
        raise InputError(f"{path}: is damaged: {size - end} bytes follow the last tensor")
    infos = {
        name: TensorInfo(name, DTYPES.get(span.code, (span.code, 0))[0], shapes[name], span.stop - span.start)
        for name, span in spans.items()
    }
    return spans, infos
