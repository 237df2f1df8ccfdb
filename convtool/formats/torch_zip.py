"""torch's own files (.pt, .pth, .bin, .ckpt): a pickle of what was saved, and the bytes of its tensors' storages.

They are read without ever running a pickle's code, in torch's zip format and the older one. Written is the zip format:
torch.save wants all of it in memory, so a member of the archive is written here for each storage, aligned for
`torch.load(mmap=True)`. What is written is opened again with the reader, which shares nothing with the writer.

A checkpoint is a state dict, maybe inside of other dicts. A matrix is a dict {"weight", "bias"} for
`torch.load(path, weights_only=True)`, whose weight is a sparse CSR, sparse COO (coalesced) or dense tensor; dense, it
is an nn.Linear's state dict. Its record is the member `extra/convtool_matrix.json`, which torch.load passes over.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.errors import ConvtoolError, InputError, OutputError, RefusedError, UsageError
from convtool.formats import pickle_writer
from convtool.formats.atomic import FilePlan, Written
from convtool.formats.dtypes import ITEMSIZE, STORAGE_CLASSES
from convtool.formats.matrices import RECORD_NAME, Found, Layout
from convtool.formats.matrices import Contents as MatrixContents
from convtool.formats.pickle_reader import (
    Call,
    Global,
    OrderedItems,
    PickleError,
    StorageRef,
    TensorRef,
    bare,
    is_size,
    numbers_of,
    plain_tensor,
    why_unusable,
)
from convtool.formats.pieces import Chunk, Piece, tensor_chunks
from convtool.formats.source import Source
from convtool.formats.stored_array import Array, StoredArray
from convtool.formats.stored_zip import LONGEST_NAME, archive_size, write_archive
from convtool.formats.tensor_file import Place, TensorFile
from convtool.formats.torch_contents import ZIP_MAGIC, Contents, Placed, checked_bytes, checked_chunks, read_contents

if TYPE_CHECKING:
    from torch import Tensor

NAME = "torch"
LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True
COO_INDICES: str | None = "int64"  # all that torch's COO tensors take

FOLDER = "archive"  # of the members of a zip file; torch's name for it where it writes to no named file
DEPTH = 4  # how many dicts deep a state dict is looked for
MATRIX_RECORD = f"extra/{RECORD_NAME}.json"
RECORD = "convtool.json"  # the member that holds convtool's record of a checkpoint

_REBUILD_SPARSE = [Global("torch._utils", name) for name in ("_rebuild_sparse_tensor", "_rebuild_sparse_csr_tensor")]
_SPARSE_PARTS = {"torch.sparse_csr": ("indptr", "indices", "data"), "torch.sparse_coo": ("indices", "data")}
_LAYOUT = Global("torch.serialization", "_get_layout")


class TorchFile(TensorFile):
    """A file that torch.save wrote.

    Attributes:
        contents: what stands in it.
        state: the tensors by name, and whatever else stands among them.

    Args:
        root: the keys that lead to `state` in what was saved.
    """

    format = NAME
    tensors: Mapping[str, TensorRef]

    def __init__(self, source: Source, contents: Contents, root: tuple[str, ...], state: dict[Any, Any]) -> None:
        super().__init__(source)
        self.contents = contents
        self.root = root
        self.state = state
        self.tensors = {
            name: tensor
            for name, value in state.items()
            if isinstance(name, str) and (tensor := plain_tensor(value)) is not None
        }
        self.unusable = {
            str(name): reason for name, value in state.items() if (reason := why_unusable(value)) is not None
        }
        self._verified_keys: set[str] = set()

    @property
    def entries(self) -> Iterable[Any]:
        return self.state

    @property
    def left_out(self) -> list[str]:
        outside = [] if not self.root else [str(name) for name in self.contents.value if name != self.root[0]]
        return outside + self.others

    def record(self) -> tuple[str, Path] | None:
        text = _member_text(self.source, self.contents, RECORD)
        return None if text is None else (text, self.path)

    def tensor(self, name: str) -> Tensor:
        import torch

        ref = self.tensors[name]
        dtype: torch.dtype = getattr(torch, ref.dtype)
        if not ref.count:
            return torch.empty(ref.shape, dtype=dtype)
        view = self._view(name, ref.reach)
        flat: Tensor = torch.frombuffer(view, dtype=dtype)
        return _with_metadata(flat.as_strided(ref.shape, ref.stride), ref.metadata, f"{self.path}: {name}")

    def array(self, name: str) -> Array:
        """Return a tensor that is read in parts, where it stands in the file as it is; raises what `tensor` does."""
        import torch

        ref = self.tensors[name]
        if not (ref.count and ref.contiguous()) or ref.metadata:
            return self.tensor(name)
        start = self._verified(ref.storage.key, name).start + ref.offset * ITEMSIZE[ref.dtype]
        return StoredArray(self.source, start, getattr(torch, ref.dtype), ref.shape)

    def data(self, name: str) -> memoryview:
        ref = self.tensors[name]
        if ref.contiguous() and not ref.metadata:
            return self._view(name, ref.count) if ref.count else memoryview(b"")
        return memoryview(bytearray().join(tensor_chunks(self.tensor(name))))

    def piece(self, name: str) -> Piece:
        ref = self.tensors[name]
        memory: Hashable = (ref.storage.key, ref.dtype, ref.offset, ref.shape, ref.stride, repr(ref.metadata))

        def chunks() -> Iterable[memoryview]:
            if not ref.contiguous() or ref.metadata:
                return tensor_chunks(self.tensor(name))
            start = self._verified(ref.storage.key, name).start + ref.offset * ITEMSIZE[ref.dtype]
            return self.source.chunks(start, start + ref.nbytes)

        made = lambda: map(Chunk, chunks() if ref.count else ())  # noqa: E731
        return Piece(name, ref.dtype, ref.shape, ref.nbytes, made, memory if ref.count else name)

    def place(self, name: str) -> Place:
        ref = self.tensors[name]
        size = ITEMSIZE[ref.dtype]
        return Place(ref.storage.key, ref.offset * size, (ref.offset + ref.reach) * size)

    def rewritten(
        self, entries: Sequence[tuple[Any, Piece | None]], record: str | None, cast: Callable[[Piece], Piece]
    ) -> FilePlan:
        """Plan the saved object with its state dict edited, entries that aren't tensors and all else as it was.

        Raises:
            RefusedError: a tensor that is to have another dtype shares its storage with one that isn't.
        """
        dtypes: dict[str, set[str]] = {}  # of the tensors that lie in each storage
        for ref in self.tensors.values():
            dtypes.setdefault(ref.storage.key, set()).add(ref.dtype if ref.storage.typed else "untyped")
        whole = {
            ref.storage.key: ref.shape
            for ref in self.tensors.values()
            if ref.contiguous() and ref.count == ref.storage.count
        }
        described = {}
        for name, piece in entries:
            if piece is None and name in self.tensors:
                piece, ref = cast(self.piece(name)), self.tensors[name]
                if piece.dtype != ref.dtype and dtypes[ref.storage.key] != {ref.dtype}:
                    raise RefusedError(
                        f"{name} shares its memory with a tensor of another dtype, and cannot be cast alone"
                    )
            if piece is not None:
                described[name] = piece

        def storage(ref: StorageRef) -> Piece:
            key = ref.key
            chunks = lambda: checked_chunks(self.source, self._called(key), self.contents.storages[key])  # noqa: E731
            piece = Piece(self._users.get(key, "the saved object"), ref.dtype, (ref.count,), ref.nbytes, chunks)
            # Numbers are held by rows, which only a tensor has that is the whole of its storage.
            rows = replace(piece, shape=whole.get(key, piece.shape))
            return replace(cast(rows), shape=piece.shape) if dtypes.get(key) == {ref.dtype} else piece

        state = OrderedItems(state=self.state.state) if isinstance(self.state, OrderedItems) else {}
        for name, piece in entries:
            state[name] = self.state[name] if piece is None else piece
        value = _replace(self.contents.value, self.root, state)
        others = ((name, placed) for name, placed in self.contents.extras.items() if name != RECORD)
        extras = [*(self._extra(name, placed) for name, placed in others), *_record_member(record)]
        reopen = lambda source, back: TorchFile(source, back, self.root, _descend(back.value, self.root))  # noqa: E731
        return FilePlan(*_archive(value, extras, storage), lambda path: _check(path, described, reopen, record))

    def _extra(self, name: str, placed: Placed) -> Piece:
        if len(f"{FOLDER}/{name}".encode()) > LONGEST_NAME:
            raise RefusedError(f"{self.path}: the name of a member, {name[:32]!r}..., is too long to be written")
        chunks = lambda: checked_chunks(self.source, name, placed)  # noqa: E731
        return Piece(name, "uint8", (placed.nbytes,), placed.nbytes, chunks)

    def _view(self, name: str, count: int) -> memoryview:
        """Return so many numbers of a tensor's storage, from the tensor's first on."""
        ref = self.tensors[name]
        size = ITEMSIZE[ref.dtype]
        start = self._verified(ref.storage.key, name).start + ref.offset * size
        return self.source.view(start, start + count * size)

    def _verified(self, key: str, name: str) -> Placed:
        """Return a storage's place, its checksum compared at the first use."""
        placed = self.contents.storages[key]
        if key not in self._verified_keys:
            for _ in checked_chunks(self.source, self._called(key), placed):
                pass
            self._verified_keys.add(key)
        return placed

    def _called(self, key: str) -> str:
        """Return what a storage is called in messages: by the first tensor that it belongs to."""
        return f"the storage {key} of {self._users.get(key, 'the saved object')}"

    @cached_property
    def _users(self) -> dict[str, str]:
        return {ref.storage.key: name for name, ref in reversed(list(self.tensors.items()))}


def recognises(start: bytes) -> bool:
    """Tell whether a file that begins so could be one: a zip archive, or a pickle."""
    return start.startswith((ZIP_MAGIC, b"\x80"))


def open_file(source: Source, root: str | None) -> TorchFile:
    """Open a file of a state dict.

    Args:
        root: the keys that lead to it, joined by dots ('.' for the saved dict itself), needed only where there are
            several.

    Raises:
        InputError: it is damaged, or holds none.
        UsageError: several state dicts and no `root`.
    """
    contents = read_contents(source)
    keys = _find_root(source, contents.value, root)
    return TorchFile(source, contents, keys, _descend(contents.value, keys))


def _with_metadata(tensor: Tensor, metadata: Any, where: str) -> Tensor:
    """Return the tensor with torch's bits for conjugate and negative set as its metadata say."""
    import torch

    if not metadata:
        return tensor
    if not isinstance(metadata, dict) or not metadata.keys() <= {"conj", "neg"}:
        raise InputError(f"{where}: has attributes that are not known ({metadata!r:.100})")
    if metadata.get("conj"):
        tensor = torch.conj(tensor)
    return torch._neg_view(tensor) if metadata.get("neg") else tensor


def _find_root(source: Source, top: object, root: str | None) -> tuple[str, ...]:
    candidates = _candidates(top)
    found = [keys for keys, more in candidates.items() if more]
    if not found:
        found = [()] if root is None and () in candidates else list(candidates)
    names = ", ".join(map(_dotted, found))
    if root is not None:
        named = [keys for keys in found if _dotted(keys) == root]
        named = named or [keys for keys in candidates if _dotted(keys) == root]
        if len(named) == 1:
            return named[0]
        known = names or "none"
        raise UsageError(f"{source.path}: --root {root}: there is no such state dict; state dicts found: {known}")
    if not found:
        raise source.error(f"holds no state dict (a dict of tensors by name), but {_kind(top)}")
    if len(found) > 1:
        raise UsageError(f"{source.path}: holds several state dicts ({names}); choose one with --root")
    return found[0]


def _candidates(top: object) -> dict[tuple[str, ...], bool]:
    """Return the keys that lead to each dict of tensors by name, each dict looked at once.

    With them whether it holds more than numbers: an accuracy or a counter alone don't make a state dict.
    """
    found: dict[tuple[str, ...], bool] = {}
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], object]] = [((), top)]
    for _ in range(DEPTH + 1):
        following: list[tuple[tuple[str, ...], object]] = []
        for keys, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            items = {name: item for name, item in value.items() if isinstance(name, str)}
            tensors = [tensor for tensor in map(plain_tensor, items.values()) if tensor is not None]
            more = any(tensor.shape for tensor in tensors) or any(map(why_unusable, items.values()))
            if tensors or more:
                found[keys] = more
            following += [((*keys, name), item) for name, item in items.items()]
        level = following
    return found


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


# Writing


class _Storages:
    """The storages of a file to write, numbered as the pickle comes upon them.

    Args:
        kept: gives the bytes of a storage of the file that is rewritten.
    """

    def __init__(self, kept: Callable[[StorageRef], Piece] | None) -> None:
        self.kept = kept
        self.members: list[Piece] = []
        self.known: dict[Hashable, StorageRef] = {}  # by the rewritten file's key, or (new, memory)
        self.new: set[int] = set()  # storages of new tensors by identity: the rewritten file may have any text as a key
        self.refs: dict[int, TensorRef] = {}

    def storage(self, ref: StorageRef) -> StorageRef:
        """Return the storage as it is to be written; of a new tensor, as it is."""
        if id(ref) in self.new:
            return ref
        if ref.key not in self.known:
            assert self.kept is not None
            piece = self.kept(ref)
            self.known[ref.key] = self.add(piece, ref.location, ref if piece.dtype == ref.dtype else None)
        return self.known[ref.key]

    def tensor(self, piece: Piece) -> TensorRef:
        """Return a new tensor as a reference to a storage of its own, or of those that share its memory."""
        if id(piece) in self.refs:
            return self.refs[id(piece)]
        key = ("new", piece.identity)
        if key not in self.known:
            self.known[key] = self.add(piece, "cpu")
            self.new.add(id(self.known[key]))
        stride = tuple(math.prod(piece.shape[axis + 1 :]) for axis in range(len(piece.shape)))
        ref = self.refs[id(piece)] = TensorRef(self.known[key], piece.dtype, 0, piece.shape, stride)
        return ref

    def add(self, piece: Piece, location: str, like: StorageRef | None = None) -> StorageRef:
        """Return a storage of a piece's bytes; as another file had it, where it is the same but for its key."""
        key = str(len(self.members))
        self.members.append(replace(piece, name=f"data/{key}"))
        if like is not None:
            return replace(like, key=key, start=0)
        cls = STORAGE_CLASSES.get(piece.dtype, "")
        if not cls:
            return StorageRef(key, "uint8", "", location, piece.nbytes)
        return StorageRef(key, piece.dtype, cls, location, piece.nbytes // ITEMSIZE[piece.dtype])


def _record_member(record: str | None) -> list[Piece]:
    return [] if record is None else [Piece.of(RECORD, record.encode())]


def _member_text(source: Source, contents: Contents, name: str) -> str | None:
    """Return a member of the archive as text; None where there is none."""
    placed = contents.extras.get(name)
    return None if placed is None else checked_bytes(source, name, placed).decode("utf-8", "replace")


def plan_state(pieces: Sequence[Piece], metadata: Mapping[str, str], record: str | None) -> FilePlan:
    """Plan the file of a plain state dict; RefusedError for a dtype that torch doesn't have."""
    for piece in pieces:
        if piece.dtype not in ITEMSIZE:
            raise RefusedError(f"{piece.name}: torch has no dtype {piece.dtype}; write a .safetensors file instead")
    state = {piece.name: piece for piece in pieces}
    reopen = lambda source, back: TorchFile(source, back, (), back.value)  # noqa: E731
    archive = _archive(OrderedItems(state), _record_member(record))
    return FilePlan(*archive, lambda path: _check(path, state, reopen, record))


def _archive(
    value: Any, extras: Sequence[Piece] = (), kept: Callable[[StorageRef], Piece] | None = None
) -> tuple[int, Callable[[Written], None]]:
    """Return the size of a torch zip file of a value, and what writes it; no storage is read before it is written.

    Args:
        value: as `pickle_reader` has it, with pieces for new tensors.
        extras: further members of the archive.
        kept: see `_Storages`.

    Raises:
        InputError: values nested deeper than Python can follow; when written, a storage's bytes are damaged.
    """
    storages = _Storages(kept)
    pickled = pickle_writer.dumps(value, storages.storage, storages.tensor)
    small = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
    first = (Piece.of(name, data) for name, data in small.items())
    members = [
        replace(member, name=f"{FOLDER}/{member.name}")
        for member in (*first, *storages.members, Piece.of("version", b"3\n"), *extras)
    ]
    return archive_size(members), lambda file: write_archive(file, members)


def _check(
    path: Path,
    described: Mapping[str, Piece],
    reopen: Callable[[Source, Contents], TorchFile],
    record: str | None = None,
) -> None:
    """Read back what was written: the tensors that were to be in it, the new ones to the bit, and the record.

    Args:
        reopen: finds the tensors in the file.
        record: convtool's, of a checkpoint.

    Raises:
        OutputError: it is not what was to be written.
    """
    expected = {name: (piece.dtype, piece.shape) for name, piece in described.items()}
    try:
        source = Source(path)
        back = reopen(source, read_contents(source))
        if {name: (ref.dtype, ref.shape) for name, ref in back.tensors.items()} != expected:
            raise OutputError("the file read back holds other tensors than were written")
        for piece in described.values():
            if piece.verified and not piece.is_in(back.data(piece.name)):
                raise OutputError(f"{piece.name} read back differs from what was written")
        if _member_text(source, back.contents, RECORD) != record:
            raise OutputError("the record read back differs from what was written")
    except OutputError:
        raise
    except ConvtoolError as error:
        raise OutputError(f"the file read back is damaged ({error})") from None


# Matrices


def refusal(dtype: str, layout: Layout) -> str | None:
    """Say why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in STORAGE_CLASSES:
        return None
    return f".pt files of {dtype} are not written; use --dtype, or write a .safetensors file"


def plan_matrix(contents: MatrixContents) -> FilePlan:
    """Plan a matrix file."""
    arrays = {array.name: array for array in contents.arrays}
    weight: Any
    if contents.layout == "dense":
        weight = arrays["weight"]
    elif contents.layout == "csr":
        weight = _sparse("torch.sparse_csr", arrays["indptr"], arrays["indices"], arrays["data"], contents.shape)
    else:
        row, column = arrays.pop("row"), arrays.pop("col")
        chunks = lambda: itertools.chain(row.chunks(), column.chunks())  # noqa: E731  # one above the other
        indices = Piece("indices", row.dtype, (2, *row.shape), row.nbytes + column.nbytes, chunks)
        arrays = {"indices": indices, **arrays}
        coalesced = True  # sorted and unique by construction
        weight = _sparse("torch.sparse_coo", indices, arrays["data"], contents.shape, coalesced)
    value = {"weight": weight} | ({"bias": arrays["bias"]} if "bias" in arrays else {})
    record = [] if contents.record is None else [Piece.of(MATRIX_RECORD, contents.record.encode("ascii"))]
    reopen = lambda source, back: _open_matrix(source, back)[0]  # noqa: E731
    return FilePlan(*_archive(value, record), lambda path: _check(path, arrays, reopen))


def _sparse(layout: str, *parts: Any) -> Call:
    """Return a sparse tensor as torch pickles one."""
    return Call(_REBUILD_SPARSE[0], (Call(_LAYOUT, (layout,)), parts))


def _open_matrix(source: Source, contents: Contents) -> tuple[TorchFile, tuple[int, ...] | None]:
    """Open a file by the tensors that the matrix in it is made of, by name; with the shape of a sparse one.

    Raises:
        InputError: it holds no matrix, or a damaged one.
    """
    value = contents.value
    state = value if isinstance(value, dict) else {"weight": value}
    weight = bare(state.get("weight"))
    bias = {"bias": state["bias"]} if "bias" in state else {}
    if isinstance(weight, TensorRef):
        return TorchFile(source, contents, (), {"weight": weight} | bias), None
    if not (isinstance(weight, Call) and weight.function in _REBUILD_SPARSE):
        raise source.error("holds no matrix: expected a tensor, or a dict with a tensor `weight`")
    try:
        layout, parts = weight.arguments
        (name,) = layout.arguments
        names = _SPARSE_PARTS.get(name)
        if names is None:
            raise source.error(f"holds a {name} tensor; expected a sparse CSR, sparse COO or dense one")
        tensors = dict(zip(names, map(plain_tensor, parts), strict=False))
        rows, columns = numbers_of(parts[len(names)])
    except (PickleError, TypeError, ValueError, AttributeError, IndexError):
        raise source.damaged("its sparse tensor is not made as torch makes one") from None
    if None in tensors.values() or not (is_size(rows) and is_size(columns)):
        raise source.damaged("its sparse tensor is not made of tensors and a shape")
    return TorchFile(source, contents, (), tensors | bias), (rows, columns)


def read_matrix(source: Source) -> Found:
    """Return the arrays and the record of a matrix file; InputError where it is damaged or holds none."""
    import torch

    contents = read_contents(source)
    file, shape = _open_matrix(source, contents)
    arrays = {name: file.array(name) for name in file.tensors}
    if shape is not None:
        arrays["shape"] = torch.tensor(shape)
    if shape is not None and "indptr" not in arrays:
        pair = arrays.pop("indices")
        if len(pair.shape) != 2 or len(pair) != 2:
            raise source.damaged(f"its sparse tensor has indices of shape {tuple(pair.shape)}")
        arrays["row"], arrays["col"] = pair.unbind()
    return Found(arrays, _member_text(source, contents, MATRIX_RECORD))


def is_matrix(source: Source) -> bool:
    """Tell whether the file is a matrix and not a checkpoint, as far as its record tells."""
    return MATRIX_RECORD in read_contents(source).extras
