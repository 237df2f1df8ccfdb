"""What torch.distributed.checkpoint writes: a folder with a table of contents, `.metadata`, and files of parts.

`.metadata` is a pickle of torch's own dataclasses, read as data. Each part stands somewhere in a file as torch.save
writes a tensor; a tensor that was sharded is put together of its parts. Read, never written.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.formats.dtypes import ITEMSIZE, is_size
from convtool.formats.indexes import named_file
from convtool.formats.pickle_reader import loads
from convtool.formats.pickle_values import (
    Call,
    Global,
    PickleError,
    StorageRef,
    TensorRef,
    numbers_of,
    plain_tensor,
)
from convtool.formats.pieces import tensor_chunks
from convtool.formats.source import Chunk, File, Held, Part, Source
from convtool.formats.state_dicts import StateDict, find_state
from convtool.formats.stored_tensors import StoredTensors
from convtool.formats.torch_contents import no_storage, read_contents

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dcp"
METADATA = ".metadata"
LARGEST_METADATA = 1 << 28
_CLASSES = "torch.distributed.checkpoint.metadata"
_SAVE_AGAIN = "put it into one file with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"


@dataclass(frozen=True)
class Shard:
    """A part of a tensor: the box of its elements, and where a file has it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    part: Part

    def tensor(self, dtype: str) -> StoredTensors:
        """Return the file of one tensor that the part is; its name is ''.

        Raises:
            InputError: it is damaged, or of another tensor than the table of contents says.
        """
        contents = read_contents(self.part)
        ref = plain_tensor(contents.value)
        if ref is None or (ref.dtype, ref.shape) != (dtype, self.sizes):
            raise self.part.damaged(f"bytes {self.part.start} and on aren't the {dtype} tensor that {METADATA} says")
        return StoredTensors(self.part, contents.storages, StateDict((), ref, {"": ref}))


class Sharded(Source):
    """The bytes of a tensor, row after row, wherever its parts are."""

    def __init__(self, source: Source, name: str, dtype: str, shape: tuple[int, ...], shards: list[Shard]) -> None:
        self.path, self.name = source.path, name
        self.dtype, self.shape, self.shards = dtype, shape, shards
        self.size = math.prod(shape) * ITEMSIZE[dtype]

    def read_into(self, buffer: memoryview, start: int) -> None:
        storage, begin = self._whole
        storage.read_into(buffer, begin + start)

    def checked(self, what: str) -> Iterator[Chunk]:
        return self._whole[0].checked(self.name)

    @cached_property
    def _whole(self) -> tuple[Source, int]:
        """What has all of it, row after row, and where in that it begins: its only part, or what is put together."""
        if len(self.shards) == 1:
            whole = self.shards[0].tensor(self.dtype)
            ref = whole.tensors[""]
            if ref.contiguous() and not ref.metadata:
                return whole.storages[ref.storage.key], ref.offset * ITEMSIZE[self.dtype]
        return Held(self, b"".join(tensor_chunks(self._put_together()))), 0

    def _put_together(self) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        made, there = torch.empty(self.shape, dtype=dtype), torch.zeros(self.shape, dtype=torch.bool)
        for shard in self.shards:
            box = tuple(slice(start, start + size) for start, size in zip(shard.offsets, shard.sizes, strict=True))
            if there[box].any():
                raise self.damaged(f"two parts of {self.name} overlap")
            there[box] = True
            made[box] = shard.tensor(self.dtype).tensor("")
        return made


def open_folder(source: Source, root: str | None) -> StoredTensors:
    """Open a folder by its table of contents.

    Args:
        root: the keys that lead to the state dict that is meant, as in a file of torch.save.

    Raises:
        InputError: it is damaged, incomplete or compressed, or holds no state dict.
        UsageError: several state dicts and no `root`.
    """
    if source.size > LARGEST_METADATA:
        raise source.error("is larger than any table of contents")
    data = bytes(source.view(0, source.size))
    try:
        read = loads(io.BytesIO(data), str(source.path), no_storage)
        table = _Table(source, read.value)
        top = table.nested()
    except (PickleError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise source.damaged(
            f"it isn't the table of contents of torch.distributed.checkpoint ({str(error)[:100]})"
        ) from None
    return StoredTensors(source, table.storages, find_state(source, top, root), NAME)


class _Table:
    """The table of contents, checked: parts that are there, don't overlap, and make up their tensors."""

    def __init__(self, source: Source, value: Any) -> None:
        self.source = source
        self.state = _fields(value, "Metadata")
        self.parts = self._parts()
        self.storages: dict[str, Sharded] = {}

    def nested(self) -> dict[Any, Any]:
        """Return what was saved, dicts in dicts, with tensors where tensors were."""
        values = {name: self._value(name, one) for name, one in self.state["state_dict_metadata"].items()}
        paths = self.state.get("planner_data") or {}
        top: dict[Any, Any] = {}
        for name, value in values.items():
            path = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
            if not (isinstance(path, tuple) and path and all(isinstance(one, str | int) for one in path)):
                raise ValueError("a path that isn't of names")
            inside = top
            for key in path[:-1]:
                inside = inside.setdefault(key, {})
            if path[-1] in inside:
                raise ValueError("two values under one path")
            inside[path[-1]] = value
        return top

    def _value(self, name: str, about: Call) -> Any:
        if about.calls(_CLASSES) != "TensorStorageMetadata":
            return b""  # bytes, which are a pickle of something
        fields = _fields(about, "TensorStorageMetadata")
        dtype = fields["properties"].state[0]
        if not (isinstance(dtype, Global) and dtype.module == "torch" and dtype.name in ITEMSIZE):
            raise ValueError("a dtype that is not known")
        shape = _numbers(fields["size"])
        boxes = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
        places = [(_numbers(box["offsets"]), _numbers(box["sizes"])) for box in boxes]
        shards = [Shard(offsets, sizes, self.parts[name, offsets]) for offsets, sizes in places]
        for shard in shards:
            ends = (start + size for start, size in zip(shard.offsets, shard.sizes, strict=True))
            if len(shard.sizes) != len(shape) or any(end > size for end, size in zip(ends, shape, strict=True)):
                raise ValueError("a part that reaches beyond its tensor")
        count = math.prod(shape)
        if sum(math.prod(shard.sizes) for shard in shards) != count:
            raise self.source.damaged(f"the parts of {name:.100} don't make up a tensor of shape {list(shape)}")
        self.storages[name] = Sharded(self.source, name, dtype.name, shape, shards)
        storage = StorageRef(name, "uint8", "", "cpu", self.storages[name].size)
        return TensorRef.of(storage, dtype.name, shape)

    def _parts(self) -> dict[tuple[str, tuple[int, ...]], Part]:
        """Return where each part stands, by its tensor's name and its offsets."""
        parts: dict[tuple[str, tuple[int, ...]], Part] = {}
        files: dict[str, Source] = {}
        for index, info in self.state["storage_data"].items():
            of, where = _fields(index, "MetadataIndex"), info.state
            name, start, length = where["relative_path"], where["offset"], where["length"]
            if not (isinstance(name, str) and isinstance(of["fqn"], str)):  # tuples in tuples can be hashed for ever
                raise ValueError("a name that isn't a text")
            if where.get("transform_descriptors"):
                raise self.source.error(f"was compressed or encrypted when it was saved; {_SAVE_AGAIN}")
            if name not in files:
                files[name] = File(named_file(self.source.path, name))
            if not (is_size(start) and is_size(length)) or start + length > files[name].size:
                raise self.source.damaged(f"a part of {of['fqn']!s:.100} is not in {name!s:.100}")
            offsets = () if of.get("offset") is None else _numbers(of["offset"])
            parts[of["fqn"], offsets] = Part(files[name], start, length)
        _check_apart(self.source, list(parts.values()))
        return parts


def _check_apart(source: Source, parts: list[Part]) -> None:
    """Check that no bytes are two parts', so that tensors can't be larger than the files."""
    taken: dict[Path, int] = {}
    for part in sorted(parts, key=lambda part: (str(part.path), part.start)):
        if part.start < taken.get(part.path, 0):
            raise source.damaged("two parts stand in the same place")
        taken[part.path] = part.start + part.size


def _fields(value: Any, cls: str) -> dict[Any, Any]:
    """Return the fields of an object of one of torch's classes."""
    if not (isinstance(value, Call) and value.calls(_CLASSES) == cls and isinstance(value.state, dict)):
        raise ValueError(f"expected a {cls}")
    return value.state


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = numbers_of(value)
    if not all(map(is_size, numbers)):
        raise ValueError("sizes that make no sense")
    return numbers
