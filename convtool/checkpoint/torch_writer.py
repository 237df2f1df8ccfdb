"""torch's zip files, written: a pickle of the saved object, and a member of the archive for each storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from convtool.checkpoint.tensor_bytes import Piece, tensor_chunks
from convtool.checkpoint.torch_file import TorchCheckpoint
from convtool.core.flat import tensor_bits
from convtool.errors import ConvtoolError, OutputError, RefusedError
from convtool.formats import pickle_writer
from convtool.formats.dtypes import FLOATS, ITEMSIZE, STORAGE_CLASSES
from convtool.formats.pickle_reader import StorageRef, TensorRef
from convtool.formats.stored_zip import LONGEST_NAME, Member

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "archive"  # of the members of a zip file; torch's name for it where it writes to no named file
_Cast: TypeAlias = Callable[[str, Iterator[memoryview], str, str], Iterator[memoryview]]
_Pieces: TypeAlias = Callable[[], Iterator[Piece]]


@dataclass(frozen=True, slots=True, eq=False)
class NewTensor:
    """A tensor of another file, to be stored in a torch file: its bytes come in chunks.

    Attributes:
        memory: the same for tensors that share their memory.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[memoryview]]
    memory: Hashable

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def plan_torch(
    value: Any, source: TorchCheckpoint | None, cast: _Cast | None = None, dtype: str | None = None
) -> list[Member]:
    """The members of a torch zip file of a value, a storage each; no storage is read before it is written.

    Args:
        value: as `pickle_reader` has it, with torch tensors and `NewTensor`s as well.
        source: where its storages are.
        cast, dtype: what makes another dtype of a storage of floating-point numbers, and which.

    Raises:
        InputError: values nested deeper than Python can follow; when written, a storage's bytes are damaged.
        RefusedError: the name of a member of the source is too long for the folder that torch gives all of them.
    """
    writer = _Writer(source, cast, dtype)
    pickled = writer.pickle(value)
    members = [
        _member("data.pkl", len(pickled), pickled),
        _member(".format_version", 1, b"1"),
        _member(".storage_alignment", 2, b"64"),
        _member("byteorder", 6, b"little"),
        *(_member(f"data/{ref.key}", ref.nbytes, pieces=pieces) for ref, pieces in writer.storages),
        _member("version", 2, b"3\n"),
    ]
    if source is not None:
        extras = source.contents.extras
        for name in extras:
            if len(f"{FOLDER}/{name}".encode()) > LONGEST_NAME:
                raise RefusedError(f"{source.path}: the name of a member, {name[:32]!r}..., is too long to be written")
        members += [_member(name, extras[name].nbytes, pieces=_extra(source, name)) for name in extras]
    return members


class _Writer:
    """The storages of a file to write, numbered as the pickle comes upon them."""

    def __init__(
        self,
        source: TorchCheckpoint | None,
        cast: _Cast | None,
        dtype: str | None,
    ) -> None:
        self.source = source
        self.cast = cast
        self.dtype = dtype
        self.storages: list[tuple[StorageRef, _Pieces]] = []
        self.known: dict[Hashable, StorageRef] = {}  # by the source's key, or ("new", memory)
        self.new: set[int] = set()  # the storages of new tensors, by identity: the source may have any string as a key
        self.refs: dict[int, TensorRef] = {}
        self.casts = castable(source, dtype) if source is not None and dtype is not None else set()

    def pickle(self, value: Any) -> bytes:
        return pickle_writer.dumps(value, self.storage, self.tensor)

    def storage(self, ref: StorageRef) -> StorageRef:
        """The storage as it is to be written; of a new tensor, as it is."""
        if id(ref) in self.new:
            return ref
        found = self.known.get(ref.key)
        if found is not None:
            return found
        assert self.source is not None
        source, key = self.source, ref.key
        if key in self.casts:
            assert self.dtype is not None
            assert self.cast is not None
            cast, dtype, old = self.cast, self.dtype, ref
            user = source.user(key)

            def chunks() -> Iterator[memoryview]:
                return cast(user, (piece.data for piece in source.storage_pieces(key)), old.dtype, dtype)

            written = self.add(dtype, old.count, chunks, ref.location)
        else:
            written = replace(ref, key=str(len(self.storages)), start=0)
            self.storages.append((written, lambda: source.storage_pieces(key)))
        self.known[ref.key] = written
        return written

    def add(
        self, dtype: str, count: int, chunks: Callable[[], Iterator[memoryview]], location: str = "cpu"
    ) -> StorageRef:
        """A storage of its own."""
        cls = STORAGE_CLASSES.get(dtype, "")
        size = count if cls else count * ITEMSIZE[dtype]
        ref = StorageRef(str(len(self.storages)), dtype if cls else "uint8", cls, location, size)
        self.storages.append((ref, lambda: map(Piece, chunks())))
        return ref

    def tensor(self, value: Any) -> TensorRef:
        """A tensor that isn't of the source as a reference to a storage of its own."""
        if id(value) in self.refs:
            return self.refs[id(value)]
        new = value if isinstance(value, NewTensor) else _new_tensor(value)
        key = ("new", new.memory)
        if key not in self.known:
            self.known[key] = self.add(new.dtype, new.count, new.chunks)
            self.new.add(id(self.known[key]))
        strides = [math.prod(new.shape[axis + 1 :]) for axis in range(len(new.shape))]
        ref = TensorRef(self.known[key], new.dtype, 0, new.shape, tuple(strides))
        self.refs[id(value)] = ref
        return ref


def castable(source: TorchCheckpoint, dtype: str) -> set[str]:
    """Storages of floating-point numbers of another dtype that every tensor of the state dict reads as such."""
    users: dict[str, set[str]] = {}
    for ref in source.tensors.values():
        users.setdefault(ref.storage.key, set()).add(ref.dtype if ref.storage.typed else "untyped")
    return {key for key, dtypes in users.items() if len(dtypes) == 1 and dtypes <= FLOATS - {dtype}}


def _new_tensor(tensor: Any) -> NewTensor:
    name = str(tensor.dtype).removeprefix("torch.")
    return NewTensor(name, tuple(tensor.shape), lambda: tensor_chunks(tensor), id(tensor))


def _member(name: str, size: int, head: bytes = b"", pieces: _Pieces = lambda: iter(())) -> Member:
    return Member(f"{FOLDER}/{name}", size, head, pieces)


def _extra(source: TorchCheckpoint, name: str) -> _Pieces:
    return lambda: source.pieces(name, source.contents.extras[name])


def check_written(
    path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]], new: Mapping[str, Tensor], root: Sequence[str]
) -> str:
    """Read back what was written: the same tensors, and the new ones bit for bit; OutputError where not.

    Returns:
        the file's mark.
    """
    import torch

    try:
        back = TorchCheckpoint(path, tuple(root))
        found = {name: (info.dtype, info.shape) for name, info in back.infos.items()}
        if found != dict(expected):
            raise OutputError("the file read back holds other tensors than were written; nothing was changed")
        for name, tensor in new.items():
            if not torch.equal(back.bits(name), tensor_bits(tensor)):
                raise OutputError(f"{name} read back differs from what was written; nothing was changed")
    except OutputError:
        raise
    except ConvtoolError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None
    return back.mark
