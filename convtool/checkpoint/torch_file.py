"""torch's own files (.pt, .pth, .bin, .ckpt): a pickled state dict, read without ever running a pickle's code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.checkpoint.base import Checkpoint, Place
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.tensor_bytes import Piece, tensor_chunks
from convtool.checkpoint.torch_record import mark_of_contents, record_of, record_path
from convtool.core.flat import tensor_bits
from convtool.errors import InputError, UsageError
from convtool.formats.dtypes import ITEMSIZE
from convtool.formats.pickle_reader import OrderedItems, plain_tensor, why_unusable
from convtool.formats.source import Source
from convtool.formats.stored_zip import combine_crc
from convtool.formats.torch_zip import Placed, check_crc, read_contents
from convtool.kinds.kind import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

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
        return tensor_bits(self.stored_tensor(name))

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

    def storage_pieces(self, key: str) -> Iterator[Piece]:
        """All bytes of a storage, checked against the file's checksum as they go by."""
        return self.pieces(f"the storage {key} of {self.user(key)}", self.contents.storages[key])

    def pieces(self, what: str, placed: Placed) -> Iterator[Piece]:
        """All bytes of a member of the file, checked against its checksum as they go by."""
        crc = 0
        for data in self.source.chunks(placed.start, placed.start + placed.nbytes):
            piece = Piece(data)
            crc = combine_crc(crc, piece.crc, len(data))
            yield piece
        check_crc(self.source, what, placed, crc)

    @cached_property
    def record(self) -> Record | None:
        path = record_path(self.path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        return record_of(text, self.mark, path, self.path)

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
        return mark_of_contents(self.contents)

    def edited(self, edit: Edit) -> Any:
        """The saved object with its state dict edited, entries that aren't tensors and everything else as it was."""
        state = OrderedItems(state=self.state.state) if isinstance(self.state, OrderedItems) else {}
        for name, tensor in edit.order(self.state):
            state[name] = self.state[name] if tensor is None else tensor
        return _replace(self.top, self.root, state)

    def _verified(self, key: str, name: str) -> Placed:
        """A storage's place, its checksum compared at the first use."""
        if key not in self._checked:
            for _ in self.storage_pieces(key):
                pass
            self._checked.add(key)
        return self.contents.storages[key]

    def user(self, key: str) -> str:
        """The first tensor that a storage belongs to."""
        return self._users.get(key, "the saved object")

    @cached_property
    def _users(self) -> dict[str, str]:
        return {ref.storage.key: name for name, ref in reversed(self.tensors.items())}


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


def _only_numbers(value: object) -> bool:
    """Whether a dict holds tensors by name, though it be numbers alone."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and plain_tensor(item) is not None for name, item in value.items()
    )


def _candidates(top: object, is_one: Callable[[object], bool]) -> list[tuple[str, ...]]:
    """The keys that lead to each dict that is one, each dict looked at once."""
    found: list[tuple[str, ...]] = []
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], object]] = [((), top)]
    for _ in range(DEPTH + 1):
        following: list[tuple[tuple[str, ...], object]] = []
        for keys, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            if is_one(value):
                found.append(keys)
            following += [((*keys, name), item) for name, item in value.items() if isinstance(name, str)]
        level = following
    return found


def _find_root(top: object, root: str | None, path: Path) -> tuple[str, ...]:
    found = _candidates(top, _is_state)
    if not found:
        found = [()] if root is None and _only_numbers(top) else _candidates(top, _only_numbers)
    names = [_dotted(keys) for keys in found]
    if root is not None:
        named = [keys for keys in _candidates(top, _only_numbers) if _dotted(keys) == root]
        named = [keys for keys in found if _dotted(keys) == root] or named
        if len(named) != 1:
            known = ", ".join(names) or "none"
            raise UsageError(f"{path}: --root {root}: there is no such state dict; state dicts found: {known}")
        return named[0]
    if not found:
        raise InputError(f"{path}: holds no state dict (a dict of tensors by name), but {_kind(top)}")
    if len(found) > 1:
        raise UsageError(f"{path}: holds several state dicts ({', '.join(names)}); choose one with --root")
    return found[0]


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
