"""Checkpoints to try things on: small ones of every form, and the raw bytes of damaged ones."""

from __future__ import annotations

import codecs
import copy
import io
import json
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from cases import whole_numbers
from torch import Tensor

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.digests import digest
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.write import plan_edited
from convtool.formats.atomic import Progress
from convtool.formats.pieces import Piece, tensor_chunks

SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"
SAMPLE_NAMES = ("chains", "conv_bn", "repvgg", "separable1d")

# dtypes that both formats have, and one tensor of each
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


def write_edited(
    source: Checkpoint,
    edit: Edit,
    path: Path,
    record: Record | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> None:
    """Plan and write in one go; the options are those of `plan_edited`."""
    plan_edited(source, edit, path, record, **options).write(progress)


def bytes_of(opened: Checkpoint, name: str) -> bytes:
    """A tensor's bytes as they go into another file."""
    return b"".join(bytes(chunk.data) for chunk in opened.piece(name).chunks())


def bits_of(opened: Checkpoint, name: str) -> bytes:
    """A tensor's bytes as they are in memory."""
    return b"".join(map(bytes, tensor_chunks(opened.tensor(name))))


def any_bits(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of random bits: NaNs with payloads, infinities, denormals and all."""
    if dtype == torch.bool:
        return whole_numbers(seed, *shape) > 0
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def small_network(seed: int = 0) -> dict[str, Tensor]:
    """Two convolutions that fuse, a batch norm after them, a linear layer, and a counter; nothing square."""
    return {
        "stem.first.weight": whole_numbers(seed, 4, 3, 3, 2).float(),
        "stem.first.bias": whole_numbers(seed + 1, 4).float(),
        "stem.second.weight": whole_numbers(seed + 2, 5, 4, 1, 2).float(),
        "stem.bn.weight": whole_numbers(seed + 3, 5).float(),
        "stem.bn.bias": whole_numbers(seed + 4, 5).float(),
        "stem.bn.running_mean": whole_numbers(seed + 5, 5).float(),
        "stem.bn.running_var": whole_numbers(seed + 6, 5).float().abs(),
        "stem.bn.num_batches_tracked": torch.tensor(7),
        "head.weight": whole_numbers(seed + 7, 2, 5).float(),
    }


def with_metadata(state: dict[str, Tensor]) -> OrderedDict[str, Any]:
    """A state dict as nn.Module.state_dict gives it, `_metadata` included."""
    ordered: Any = OrderedDict(state)
    paths = dict.fromkeys(["", *(name.rpartition(".")[0] for name in state)])
    ordered._metadata = OrderedDict((path, {"version": 2 if path.endswith("bn") else 1}) for path in paths)
    return ordered  # type: ignore[no-any-return]


def save(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Save by the package that the format is of."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, metadata=metadata)
    else:
        torch.save(with_metadata(state), path)
    return path


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a .safetensors file with that header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN and all."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return not one.numel() or torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


def described(pickled: bytes) -> str:
    """What a pickle makes by Python's own reader, every class and function in it a dummy that writes down its use."""

    class Dummy:
        log: list[Any]

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made = object.__new__(cls)
            made.log = [(args, kwargs)]
            return made

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __setstate__(self, state: Any) -> None:
            self.log.append(("state", state))

        def __setitem__(self, key: Any, value: Any) -> None:
            self.log.append(("item", key, value))

        def append(self, value: Any) -> None:
            self.log.append(("append", value))

    seen: dict[int, int] = {}

    def text(value: Any) -> str:
        if isinstance(value, dict | list | Dummy) and id(value) in seen:
            return f"the same as {seen[id(value)]}"
        if isinstance(value, dict | list | Dummy):
            seen[id(value)] = len(seen)
        if isinstance(value, dict):
            return f"{{{', '.join(f'{text(key)}: {text(one)}' for key, one in value.items())}}}"
        if isinstance(value, list | tuple):
            return f"{type(value).__name__}({', '.join(map(text, value))})"
        if isinstance(value, set | frozenset):
            return f"a set of {sorted(map(text, value))}"
        return f"{type(value).__name__} {text(value.log)}" if isinstance(value, Dummy) else repr(value)

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            plain = {"_codecs encode": codecs.encode, "builtins set": set, "builtins frozenset": frozenset}
            return plain.get(f"{module} {name}") or type(f"{module} {name}", (Dummy,), {})

        def persistent_load(self, pid: Any) -> Any:
            return pid

    return text(Reader(io.BytesIO(pickled)).load())


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name, with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fitted(record: Any, state: dict[str, Tensor]) -> Any:
    """Return a record whose digests are those of the tensors, wrong or not, so that their numbers have to tell."""
    document = copy.deepcopy(record)
    for fusion in document["fusions"]:
        names = fusion["gives"].keys() & state.keys()
        fusion["gives"] = {name: digest(Piece.of_tensor(name, state[name])) for name in names}
    return document
