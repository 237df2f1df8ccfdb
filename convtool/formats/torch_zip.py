"""torch's own files (.pt, .pth, .bin, .ckpt): a pickle of what was saved, and the bytes of its tensors' storages.

They are read without ever running a pickle's code, in torch's zip format and the older one. Written is the zip format:
torch.save wants all of it in memory, so a member of the archive is written here for each storage, aligned for
`torch.load(mmap=True)`. What is written is opened again with the reader, which shares nothing with the writer.

What is pickled is a state dict, maybe inside of other dicts, or a module. A module's own pickle can't be written: its
state dict is, in its place. `torch_script`, `pt2` and `torch_matrix` are about the other archives that torch has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from convtool.errors import OutputError, RefusedError
from convtool.formats import pickle_writer, pt2, torch_script
from convtool.formats.atomic import FilePlan
from convtool.formats.dtypes import ITEMSIZE
from convtool.formats.matrices import RECORD_NAME
from convtool.formats.pickle_values import Call, Global, OrderedItems, StorageRef, TensorRef, bare, describe
from convtool.formats.pieces import Piece
from convtool.formats.source import File, Part, Source
from convtool.formats.state_dicts import StateDict, descend, find_state
from convtool.formats.stored_tensors import StoredTensors
from convtool.formats.stored_zip import LONGEST_NAME, ZIP_MAGIC, plan_archive, read_members
from convtool.formats.tensor_file import TensorFile
from convtool.formats.torch_contents import Contents, read_archive, read_contents, text_member

NAME = "torch"
REBUILD_SPARSE = [Global("torch._utils", name) for name in ("_rebuild_sparse_tensor", "_rebuild_sparse_csr_tensor")]

FOLDER = "archive"  # of the members of a zip file; torch's name for it where it writes to no named file
MATRIX_RECORD = f"extra/{RECORD_NAME}.json"
_TEXT_PICKLE = re.compile(rb"\([dl]p\d+\n|c[\w.]+\n\w+\n(p\d+\n|\()")  # a dict, a list, or what a class makes
RECORD = "convtool.json"  # the member that holds convtool's record of a checkpoint


class TorchFile(StoredTensors):
    """A file that torch.save wrote.

    Attributes:
        contents: what stands in it.
    """

    def __init__(self, source: Source, contents: Contents, state: StateDict) -> None:
        super().__init__(source, contents.storages, state, NAME)
        self.contents = contents
        self.classes = tuple(map(str, contents.foreign))
        if state.value is not state.entries:
            self.replaced = {".".join(self.root) or ".": f"the module, {describe(state.value)}"}
        beside = contents.value.items() if self.root and isinstance(contents.value, dict) else ()
        self.optimizers = [str(name) for name, value in beside if name != self.root[0] and _is_optimizer(value)]

    def record(self) -> str | None:
        return self.contents.text(RECORD)

    def rewritten(
        self,
        entries: Sequence[tuple[Any, Piece | None]],
        record: str | None,
        cast: Callable[[Piece], Piece],
        *,
        alone: bool = False,
    ) -> FilePlan:
        """Plan the saved object with its state dict edited, entries that aren't tensors and all else as it was.

        Raises:
            RefusedError: a tensor that is to have another dtype shares its storage with one that isn't.
        """
        described, was = dict[str, Piece](), self.state.entries
        state: dict[Any, Any] = OrderedItems(state=was.state) if isinstance(was, OrderedItems) else {}
        for name, piece in entries:
            if piece is None and name in self.tensors:
                piece = self._cast(name, cast)
                described[name] = piece
                # An array's numbers stand in the pickle, in no storage that could be cast.
                array = self.tensors[name].storage.is_array and piece.dtype != self.tensors[name].dtype
                state[name] = piece if array else was[name]
            elif piece is not None:
                state[name] = described[name] = piece
            elif not alone or str(name) in self.unusable:
                state[name] = was[name]
        value, root = (state, ()) if alone else (self.contents.value, self.root)
        instead = {id(self.state.value): state}  # under whatever key it stands
        others = () if alone else self.contents.extras.items()
        extras = [self._extra(name, placed) for name, placed in others if name != RECORD]
        extras += text_member(RECORD, record)
        check = lambda path: check_written(path, described, partial(_state_at, root), record)  # noqa: E731
        return plan_value(value, check, extras, lambda ref: self._storage(ref, cast), instead)

    def _cast(self, name: str, cast: Callable[[Piece], Piece]) -> Piece:
        """Return a tensor that stays as it is to be stored."""
        piece, ref = cast(self.piece(name)), self.tensors[name]
        if piece.dtype != ref.dtype and self._dtypes[ref.storage.key] != {ref.dtype}:
            raise RefusedError(f"{name} shares its memory with a tensor of another dtype, and cannot be cast alone")
        return piece

    @cached_property
    def _dtypes(self) -> dict[str, set[str]]:
        """The dtypes of the tensors that lie in each storage, by its key."""
        dtypes: dict[str, set[str]] = {}
        for ref in self.tensors.values():
            plain = ref.storage.typed or ref.storage.is_array
            dtypes.setdefault(ref.storage.key, set()).add(ref.dtype if plain else "untyped")
        return dtypes

    @cached_property
    def _whole(self) -> dict[str, tuple[int, ...]]:
        """The shapes of tensors that are the whole of their storage, by its key."""
        refs = self.tensors.values()
        return {ref.storage.key: ref.shape for ref in refs if ref.contiguous() and ref.count == ref.storage.count}

    def _storage(self, ref: StorageRef, cast: Callable[[Piece], Piece]) -> Piece:
        """Return a storage that stays as it is to be stored."""
        key = ref.key
        chunks = lambda: self.storages[key].checked(self.called(key))  # noqa: E731
        piece = Piece(self.users.get(key, "the saved object"), ref.dtype, (ref.count,), ref.nbytes, chunks)
        # Numbers are held by rows, which only a tensor has that is the whole of its storage.
        rows = replace(piece, shape=self._whole.get(key, piece.shape))
        return replace(cast(rows), shape=piece.shape) if self._dtypes.get(key) == {ref.dtype} else piece

    def _extra(self, name: str, placed: Part) -> Piece:
        if len(f"{FOLDER}/{name}".encode()) > LONGEST_NAME:
            raise RefusedError(f"{self.path}: the name of a member, {name[:32]!r}..., is too long to be written")
        return Piece(name, "uint8", (placed.size,), placed.size, lambda: placed.checked(name))


def _state_at(root: tuple[str, ...], source: Source, contents: Contents) -> StoredTensors:
    """Open a file that was written by the keys that lead to its state dict."""
    entries = descend(contents.value, root)
    return StoredTensors(source, contents.storages, StateDict(root, entries, entries))


def _is_optimizer(value: object) -> bool:
    """Tell whether a value is what an optimizer's state_dict() gives, or a list of such."""
    if isinstance(value, list):
        return any(map(_is_optimizer, value))
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def recognises(start: bytes) -> bool:
    """Tell whether a file that begins so could be one: a zip archive, or a pickle, which may be text."""
    return start.startswith((ZIP_MAGIC, b"\x80")) or _TEXT_PICKLE.match(start) is not None


def open_file(source: Source, root: str | None) -> TensorFile:
    """Open a file of a state dict, or another archive of torch's.

    Args:
        root: the keys that lead to it, joined by dots ('.' for the saved dict itself), needed only where there are
            several.

    Raises:
        InputError: it is damaged, or holds none.
        UsageError: several state dicts and no `root`.
    """
    if bytes(source.view(0, min(4, source.size))) != ZIP_MAGIC:
        contents = read_contents(source)
    else:
        members = read_members(source)
        if torch_script.recognises(members):
            return torch_script.open_members(source, members, root)
        if pt2.recognises(members):
            return pt2.open_members(source, members, root)
        contents = read_archive(source, members)
    return TorchFile(source, contents, find_state(source, contents.value, root))


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
        ref = self.refs[id(piece)] = TensorRef.of(self.known[key], piece.dtype, piece.shape)
        return ref

    def add(self, piece: Piece, location: str, like: StorageRef | None = None) -> StorageRef:
        """Return a storage of a piece's bytes; as another file had it, where it is the same but for its key."""
        key = str(len(self.members))
        self.members.append(replace(piece, name=f"data/{key}"))
        if like is not None:
            return replace(like, key=key, start=0)
        return StorageRef.of(key, piece.dtype, piece.nbytes, location)


def plan_state(pieces: Sequence[Piece], metadata: Mapping[str, str], record: str | None) -> FilePlan:
    """Plan the file of a plain state dict; RefusedError for a dtype that torch doesn't have."""
    for piece in pieces:
        if piece.dtype not in ITEMSIZE:
            raise RefusedError(f"{piece.name}: torch has no dtype {piece.dtype}; write a .safetensors file instead")
    state = {piece.name: piece for piece in pieces}
    check = lambda path: check_written(path, state, partial(_state_at, ()), record)  # noqa: E731
    return plan_value(OrderedItems(state), check, text_member(RECORD, record))


def plan_value(
    value: Any,
    check: Callable[[Path], None],
    extras: Sequence[Piece] = (),
    kept: Callable[[StorageRef], Piece] | None = None,
    instead: Mapping[int, Any] | None = None,
) -> FilePlan:
    """Plan a torch zip file of a value; no storage is read before it is written.

    Args:
        value: of `pickle_values`, with pieces for new tensors.
        check: as of `FilePlan`.
        extras: further members of the archive.
        kept: see `_Storages`.
        instead: see `pickle_writer.dumps`.

    Raises:
        InputError: values nested deeper than Python can follow; when written, a storage's bytes are damaged.
    """
    storages = _Storages(kept)
    pickled = pickle_writer.dumps(value, storages.storage, storages.tensor, instead)
    small = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
    first = (Piece.of(name, data) for name, data in small.items())
    members = [
        replace(member, name=f"{FOLDER}/{member.name}")
        for member in (*first, *storages.members, Piece.of("version", b"3\n"), *extras)
    ]
    return plan_archive(members, check)


def check_written(
    path: Path,
    described: Mapping[str, Piece],
    reopen: Callable[[Source, Contents], StoredTensors],
    record: str | None = None,
) -> None:
    """Read back what was written: the tensors that were to be in it, the new ones to the bit, and the record.

    Args:
        reopen: finds the tensors in the file.
        record: convtool's, of a checkpoint.

    Raises:
        OutputError: it is not what was to be written.
    """
    source = File(path)
    contents = read_contents(source)
    back = reopen(source, contents)
    expected = {name: (piece.dtype, piece.shape) for name, piece in described.items()}
    if {name: (ref.dtype, ref.shape) for name, ref in back.tensors.items()} != expected:
        raise OutputError("the file read back holds other tensors than were written")
    for name, piece in described.items():
        if piece.verified:
            piece.check(chunk.data for chunk in back.piece(name).chunks())
    if contents.text(RECORD) != record:
        raise OutputError("the record read back differs from what was written")


def is_matrix(source: Source) -> bool:
    """Tell whether the file is a matrix and not a checkpoint, as far as its record tells."""
    contents = read_contents(source)
    value = None if isinstance(contents.value, dict) else bare(contents.value)
    # torch.save(matrix, path)
    alone = isinstance(value, TensorRef) or (isinstance(value, Call) and value.function in REBUILD_SPARSE)
    return alone or MATRIX_RECORD in contents.extras
