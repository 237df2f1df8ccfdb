"""A file of tensors that are views of storages, whatever format names them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from convtool.formats.dtypes import ITEMSIZE, REPEATED, ROOM
from convtool.formats.pickle_values import StorageRef, TensorRef, describe
from convtool.formats.pieces import Piece, tensor_chunks
from convtool.formats.source import Array, Chunk, Part, Source, StoredArray
from convtool.formats.state_dicts import StateDict
from convtool.formats.tensor_file import Place, TensorFile

if TYPE_CHECKING:
    from torch import Tensor


class StoredTensors(TensorFile):
    """An open file whose tensors are `TensorRef`s.

    Attributes:
        storages: the bytes that they are views of, by the storages' keys.
        state: the state dict that is meant.
    """

    tensors: Mapping[str, TensorRef]

    def __init__(self, source: Source, storages: Mapping[str, Source], state: StateDict, form: str = "") -> None:
        super().__init__(source)
        self.storages, self.state, self.format = storages, state, form
        self.tensors, self.unusable = state.tensors, state.unusable
        self.root, self.modules, self.beside = state.root, state.modules, state.beside
        self.others = {
            str(name): self.unusable.get(str(name)) or describe(value)
            for name, value in state.entries.items()
            if name not in self.tensors
        }
        self._verified_keys: set[str] = set()

    @property
    def entries(self) -> Iterable[Any]:
        return self.state.entries

    def tensor(self, name: str) -> Tensor:
        import torch

        ref = self.tensors[name]
        dtype: torch.dtype = getattr(torch, ref.dtype)
        if not ref.count:
            return torch.empty(ref.shape, dtype=dtype)
        place = self.place(name)
        flat: Tensor = torch.frombuffer(self._verified(ref.storage.key).view(place.start, place.stop), dtype=dtype)
        tensor, metadata = flat.as_strided(ref.shape, ref.stride), ref.metadata or {}
        if metadata.get("conj"):
            tensor = torch.conj(tensor)
        return torch._neg_view(tensor) if metadata.get("neg") else tensor

    def array(self, name: str) -> Array:
        """Return a tensor that is read in parts, where it stands in the file as it is; raises what `tensor` does."""
        import torch

        ref = self.tensors[name]
        if not (ref.count and ref.contiguous()) or ref.metadata:
            return self.tensor(name)
        storage = self._verified(ref.storage.key)
        if not isinstance(storage, Part):
            return self.tensor(name)
        return StoredArray(storage.whole, storage.start + self.place(name).start, getattr(torch, ref.dtype), ref.shape)

    def piece(self, name: str) -> Piece:
        ref = self.tensors[name]
        bits = tuple(sorted((ref.metadata or {}).items()))
        memory: Hashable = (ref.storage.key, ref.dtype, ref.offset, ref.shape, ref.stride, bits)

        def chunks() -> Iterable[memoryview]:
            if not ref.contiguous() or ref.metadata:
                return tensor_chunks(self.tensor(name))
            place = self.place(name)
            return self._verified(ref.storage.key).chunks(place.start, place.stop)

        made = lambda: map(Chunk, chunks() if ref.count else ())  # noqa: E731
        return Piece(name, ref.dtype, ref.shape, ref.nbytes, made, memory if ref.count else name)

    def place(self, name: str) -> Place:
        ref = self.tensors[name]
        size = ITEMSIZE[ref.dtype]
        return Place(ref.storage.key, ref.offset * size, (ref.offset + ref.reach) * size)

    def called(self, key: str) -> str:
        """Return what a storage is called in messages: by the first tensor that it belongs to."""
        return f"the storage {key} of {self.users.get(key, 'the saved object')}"

    @cached_property
    def users(self) -> dict[str, str]:
        """The first tensor of each storage, by the storage's key."""
        return {ref.storage.key: name for name, ref in reversed(list(self.tensors.items()))}

    def _verified(self, key: str) -> Source:
        """Return a storage, its checksum compared at the first use."""
        storage = self.storages[key]
        if key not in self._verified_keys:
            for _ in storage.checked(self.called(key)):
                pass
            self._verified_keys.add(key)
        return storage


def check_storages(source: Source, refs: Iterable[StorageRef], storages: Mapping[str, Source]) -> None:
    """Raise InputError where a storage, a tensor's or one by itself, is missing or of another length than declared."""
    for ref in refs:
        placed = storages.get(ref.key)
        if placed is None:
            raise source.damaged(f"the storage {ref.key!r} of a tensor is not in the file")
        if placed.size != ref.nbytes:
            raise source.damaged(
                f"the storage {ref.key!r} has {placed.size} bytes, and is declared to have {ref.nbytes}"
            )


def check_tensors(source: Source, tensors: Iterable[TensorRef]) -> None:
    """Check that every tensor's storage holds all that the tensor reads.

    Raises:
        InputError: one reads beyond its storage, or claims absurdly more elements than the file has bytes (a stride of
            0 repeats elements).
    """
    for tensor in tensors:
        ref, shape = tensor.storage, list(tensor.shape)
        if tensor.reach and (tensor.offset + tensor.reach) * ITEMSIZE[tensor.dtype] > ref.nbytes:
            raise source.damaged(
                f"a tensor of shape {shape} reads beyond its storage {ref.key!r} of {ref.nbytes} bytes"
            )
        if tensor.nbytes > REPEATED * source.size + ROOM:
            raise source.error(
                f"a tensor of shape {shape} repeats the {ref.nbytes} bytes of its storage to {tensor.nbytes}; save it"
                " after .contiguous() if that is meant"
            )
