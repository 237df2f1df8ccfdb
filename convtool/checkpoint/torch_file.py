"""torch's own files (.pt, .pth, .bin, .ckpt): a pickled state dict, read without ever running a pickle's code."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from convtool.checkpoint import pickle_writer
from convtool.checkpoint.base import Checkpoint, Place
from convtool.checkpoint.dtypes import FLOATS, ITEMSIZE, STORAGE_CLASSES
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.info import TensorInfo
from convtool.checkpoint.pickled import (
    OrderedItems,
    StorageRef,
    TensorRef,
    plain_tensor,
    why_unusable,
)
from convtool.checkpoint.record import Record, loads
from convtool.checkpoint.torch_container import Contents, Placed, check_crc, read_contents
from convtool.errors import ConvtoolError, InputError, OutputError, UsageError
from convtool.files.source import CHUNK, Source
from convtool.files.stored_zip import Member

if TYPE_CHECKING:
    from torch import Tensor

RECORD_SUFFIX = ".convtool.json"
FOLDER = "archive"  # of the members of a zip file; torch's name for it where it writes to no named file
_Cast: TypeAlias = Callable[[str, Iterator[memoryview], str, str], Iterator[memoryview]]

DEPTH = 4  # how many dicts deep a state dict is looked for


class TorchCheckpoint(Checkpoint):
    """A file that torch.save wrote, in its zip format or the older one.

    Attributes:
        top: what was saved, as `pickled` reads it.
        root: keys that lead to the state dict in it.
        state: the state dict.

    Args:
        root: those keys, joined by dots ('.' for the saved dict itself), needed only where there are several; or one by
            one, as found before.
    """

    format = "torch"

    def __init__(self, path: Path, root: str | Sequence[str] | None = None, *, mapped: bool = True) -> None:
        super().__init__(path)
        self.source = Source(path, mapped=mapped)
        self.contents = read_contents(self.source)
        self.top = self.contents.value
        self.root = _find_root(self.top, root, path) if root is None or isinstance(root, str) else tuple(root)
        self.state: dict[Any, Any] = _descend(self.top, self.root)
        self.tensors = {
            name: tensor
            for name, value in self.state.items()
            if isinstance(name, str) and (tensor := plain_tensor(value)) is not None
        }
        self.infos = {
            name: TensorInfo(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in self.tensors.items()
        }
        self.unusable = {
            str(name): reason for name, value in self.state.items() if (reason := why_unusable(value)) is not None
        }
        self._checked: set[str] = set()

    def stored_tensor(self, name: str) -> Tensor:
        import torch

        ref = self.tensors[name]
        dtype: torch.dtype = getattr(torch, ref.dtype)
        if not ref.count:
            return torch.empty(ref.shape, dtype=dtype)
        placed = self._verified(ref.storage.key, name)
        itemsize = ITEMSIZE[ref.dtype]
        start = placed.start + ref.offset * itemsize
        view = self.source.view(start, start + ref.reach * itemsize)
        if start % itemsize:  # torch wants aligned memory, the older format doesn't promise it
            view = memoryview(bytearray(view))
        flat: Tensor = torch.frombuffer(view, dtype=dtype)
        return _with_metadata(flat.as_strided(ref.shape, ref.stride), ref.metadata, f"{self.path}: {name}")

    def bits(self, name: str) -> Tensor:
        import torch

        flat = self.stored_tensor(name).resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)

    def chunks(self, name: str) -> Iterator[memoryview]:
        ref = self.tensors[name]
        if not ref.count:
            return iter(())
        if not ref.contiguous() or ref.metadata:
            return tensor_chunks(self.stored_tensor(name))
        placed = self._verified(ref.storage.key, name)
        start = placed.start + ref.offset * ITEMSIZE[ref.dtype]
        return self.source.chunks(start, start + ref.nbytes)

    def memory(self, name: str) -> Hashable:
        ref = self.tensors[name]
        if not ref.count:
            return name
        return ref.storage.key, ref.dtype, ref.offset, ref.shape, ref.stride, repr(ref.metadata)

    def place(self, name: str) -> Place:
        ref = self.tensors[name]
        size = ITEMSIZE[ref.dtype]
        return Place(ref.storage.key, ref.offset * size, (ref.offset + ref.reach) * size)

    def storage_chunks(self, key: str) -> Iterator[memoryview]:
        """All bytes of a storage, checked against the file's checksum as they go by."""
        placed = self.contents.storages[key]
        crc = 0
        for piece in self.source.chunks(placed.start, placed.start + placed.nbytes):
            crc = zlib.crc32(piece, crc)
            yield piece
        check_crc(self.source, f"the storage {key} of {self._user(key)}", placed, crc)

    @cached_property
    def record(self) -> Record | None:
        path = record_path(self.path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        return _record_of(text, self.mark, path, self.path)

    @property
    def others(self) -> list[str]:
        return [str(name) for name in self.state if name not in self.tensors]

    @property
    def left_out(self) -> list[str]:
        outside = [] if not self.root else [str(name) for name in self.top if name != self.root[0]]
        return outside + self.others

    @property
    def mark(self) -> str:
        """By what the record beside the file knows it: a hash of its table of contents, checksums included."""
        return _mark(self.contents)

    def edited(self, edit: Edit) -> Any:
        """The saved object with its state dict edited, entries that aren't tensors and everything else as it was."""
        state = OrderedItems(state=self.state.state) if isinstance(self.state, OrderedItems) else {}
        for name, tensor in edit.order(self.state):
            state[name] = self.state[name] if tensor is None else tensor
        return _replace(self.top, self.root, state)

    def _verified(self, key: str, name: str) -> Placed:
        """A storage's place, its checksum compared at the first use."""
        if key not in self._checked:
            for _ in self.storage_chunks(key):
                pass
            self._checked.add(key)
        return self.contents.storages[key]

    def _user(self, key: str) -> str:
        """The first tensor that a storage belongs to."""
        return next((name for name, ref in self.tensors.items() if ref.storage.key == key), "the saved object")


def record_path(path: Path) -> Path:
    """Where the record of a torch file stands."""
    return path.with_name(path.name + RECORD_SUFFIX)


def record_and_mark(path: Path) -> tuple[str, Record] | None:
    """The mark of the torch file at `path` and its record, where it has one that can be read."""
    try:
        mark = _mark(read_contents(Source(path)))
        beside = record_path(path)
        return mark, _record_of(beside.read_text(encoding="utf-8"), mark, beside, path)
    except (ConvtoolError, OSError, UnicodeDecodeError):
        return None


def mark_of(path: Path) -> str | None:
    """The mark of the torch file at `path`, where there is one that can be read."""
    try:
        return _mark(read_contents(Source(path)))
    except ConvtoolError:
        return None


def _mark(contents: Contents) -> str:
    return hashlib.sha256(contents.mark).hexdigest()


NO_MARK = "0" * 64  # as long as any, for the size of a record whose file isn't written yet


def record_text(records: Mapping[str, Record]) -> bytes:
    """Records of files by their marks, as the file beside a torch file holds them, indented for people.

    There are two while the file that the record stands beside is replaced, and one before and after.
    """
    files = [{"mark": mark, **json.loads(record.dumps())} for mark, record in records.items()]
    document = files[0] if len(files) == 1 else {"files": files}
    return (json.dumps(document, indent=2) + "\n").encode()


def _record_of(text: str, mark: str, path: Path, checkpoint: Path) -> Record:
    """The record of the file of that mark.

    Raises:
        InputError: it is damaged, or of another file.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its convtool record is damaged ({type(error).__name__}: {error})") from None
    files = document.get("files", [document]) if isinstance(document, dict) else [document]
    for one in files if isinstance(files, list) else []:
        if isinstance(one, dict) and one.get("mark", mark) == mark:
            return loads(json.dumps(one), str(path))
    if isinstance(document, dict) and all(isinstance(one, dict) for one in files):
        raise InputError(
            f"{path}: is the record of another file than {checkpoint.name}, which was written anew since; delete it, or"
            " restore the file"
        )
    raise InputError(f"{path}: its convtool record is damaged (expected a table)")


@dataclass(frozen=True, slots=True)
class _Chunk:
    data: memoryview

    @property
    def crc(self) -> int:
        return zlib.crc32(self.data)


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
        value: as `pickled` has it, with torch tensors and `NewTensor`s as well.
        source: where its storages are.
        cast, dtype: what makes another dtype of a storage of floating-point numbers, and which.

    Raises:
        InputError: values nested deeper than Python can follow; when written, a storage's bytes are damaged.
        RefusedError: a dtype that torch files don't have.
    """
    writer = _Writer(source, cast, dtype)
    pickled = writer.pickle(value)
    members = [
        _member("data.pkl", len(pickled), pickled),
        _member(".format_version", 1, b"1"),
        _member(".storage_alignment", 2, b"64"),
        _member("byteorder", 6, b"little"),
        *(_member(f"data/{ref.key}", ref.nbytes, b"", chunks) for ref, chunks in writer.storages),
        _member("version", 2, b"3\n"),
    ]
    if source is not None:
        members += [
            _member(name, placed.nbytes, b"", _placed_chunks(source.source, placed))
            for name, placed in source.contents.extras.items()
        ]
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
        self.storages: list[tuple[StorageRef, Callable[[], Iterator[memoryview]]]] = []
        self.known: dict[Hashable, StorageRef] = {}
        self.refs: dict[int, TensorRef] = {}
        self.casts = castable(source, dtype) if source is not None and dtype is not None else set()

    def pickle(self, value: Any) -> bytes:
        return pickle_writer.dumps(value, self.storage, self.tensor)

    def storage(self, ref: StorageRef) -> StorageRef:
        """The storage as it is to be written; of a new tensor, as it is."""
        found = self.known.get(ref.key)
        if found is not None:
            return found
        assert self.source is not None
        source, key = self.source, ref.key
        if key in self.casts:
            assert self.dtype is not None
            assert self.cast is not None
            cast, dtype, old = self.cast, self.dtype, ref
            user = source._user(key)
            written = self.add(
                dtype, old.count, lambda: cast(user, source.storage_chunks(key), old.dtype, dtype), ref.location
            )
        else:
            written = replace(ref, key=str(len(self.storages)), start=0)
            self.storages.append((written, lambda: source.storage_chunks(key)))
        self.known[ref.key] = written
        return written

    def add(
        self, dtype: str, count: int, chunks: Callable[[], Iterator[memoryview]], location: str = "cpu"
    ) -> StorageRef:
        """A storage of its own."""
        cls = STORAGE_CLASSES.get(dtype, "")
        size = count if cls else count * ITEMSIZE[dtype]
        ref = StorageRef(str(len(self.storages)), dtype if cls else "uint8", cls, location, size)
        self.storages.append((ref, chunks))
        return ref

    def tensor(self, value: Any) -> TensorRef:
        """A tensor that isn't of the source as a reference to a storage of its own."""
        if id(value) in self.refs:
            return self.refs[id(value)]
        new = value if isinstance(value, NewTensor) else _new_tensor(value)
        key = ("new", new.memory)
        if key not in self.known:
            self.known[key] = replace(self.add(new.dtype, new.count, new.chunks))
        storage = self.known[key]
        self.known[storage_key := f"new/{storage.key}"] = storage
        strides = [math.prod(new.shape[axis + 1 :]) for axis in range(len(new.shape))]
        ref = TensorRef(replace(storage, key=storage_key), new.dtype, 0, new.shape, tuple(strides))
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


def _member(name: str, size: int, head: bytes, chunks: Callable[[], Iterator[memoryview]] = lambda: iter(())) -> Member:
    return Member(f"{FOLDER}/{name}", size, head, lambda: map(_Chunk, chunks()))


def _placed_chunks(source: Source, placed: Placed) -> Callable[[], Iterator[memoryview]]:
    return lambda: source.chunks(placed.start, placed.start + placed.nbytes)


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major, in pieces, however it lies in memory."""
    import torch

    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.nbytes > CHUNK and tensor.dim() > 0 and not tensor.is_contiguous():
        yield from itertools.chain.from_iterable(map(tensor_chunks, tensor))
    elif tensor.numel():
        view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        yield from (view[start : start + CHUNK] for start in range(0, len(view), CHUNK))


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
            if not torch.equal(back.bits(name), _bits(tensor)):
                raise OutputError(f"{name} read back differs from what was written; nothing was changed")
    except OutputError:
        raise
    except ConvtoolError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None
    return back.mark


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _with_metadata(tensor: Tensor, metadata: Any, where: str) -> Tensor:
    """The tensor with torch's bits for conjugate and negative set as its metadata say."""
    import torch

    if not metadata:
        return tensor
    if not isinstance(metadata, dict) or not metadata.keys() <= {"conj", "neg"}:
        raise InputError(f"{where}: has attributes that are not known ({metadata!r:.100})")
    if metadata.get("conj"):
        tensor = torch.conj(tensor)
    return torch._neg_view(tensor) if metadata.get("neg") else tensor


def _is_state(value: object) -> bool:
    """Whether a dict is one of named tensors; numbers alone (an accuracy, a counter) don't make it one."""
    if not isinstance(value, dict):
        return False
    tensors = ((plain_tensor(item), why_unusable(item)) for name, item in value.items() if isinstance(name, str))
    return any((plain is not None and plain.shape) or why is not None for plain, why in tensors)


def _candidates(top: object) -> list[tuple[str, ...]]:
    """The keys that lead to each state dict, each dict looked at once."""
    found: list[tuple[str, ...]] = []
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], object]] = [((), top)]
    for _ in range(DEPTH + 1):
        following: list[tuple[tuple[str, ...], object]] = []
        for keys, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            if _is_state(value):
                found.append(keys)
            following += [((*keys, name), item) for name, item in value.items() if isinstance(name, str)]
        level = following
    return found


def _find_root(top: object, root: str | None, path: Path) -> tuple[str, ...]:
    found = _candidates(top)
    if not found and root is None and _only_numbers(top):
        found = [()]
    names = [_dotted(keys) for keys in found]
    if root is not None:
        if names.count(root) != 1:
            known = ", ".join(names) or "none"
            raise UsageError(f"{path}: --root {root}: there is no such state dict; state dicts found: {known}")
        return found[names.index(root)]
    if not found:
        raise InputError(f"{path}: holds no state dict (a dict of tensors by name), but {_kind(top)}")
    if len(found) > 1:
        raise UsageError(f"{path}: holds several state dicts ({', '.join(names)}); choose one with --root")
    return found[0]


def _only_numbers(top: object) -> bool:
    return isinstance(top, dict) and any(
        isinstance(name, str) and plain_tensor(item) is not None for name, item in top.items()
    )


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join(keys) or "."


def _kind(value: object) -> str:
    if plain_tensor(value) is not None:
        return "a single tensor; save it in a dict under its name"
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries without one"
    return f"a {type(value).__name__}"


def _descend(value: Any, root: tuple[str, ...]) -> Any:
    for name in root:
        value = value[name]
    return value


def _replace(top: Any, root: tuple[str, ...], state: Any) -> Any:
    if not root:
        return state
    changed = copy.copy(top)
    changed[root[0]] = _replace(top[root[0]], root[1:], state)
    return changed
