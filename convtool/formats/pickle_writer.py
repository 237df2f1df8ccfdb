"""The values of `pickle_values` as a pickle again, of the protocol that torch writes and reads.

Numbers, texts and rows are written by the standard library's pickler in Python; what only these values have, here.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from convtool.errors import InputError
from convtool.formats.pickle_values import ENCODE, ORDERED, Call, Global, OldText, OrderedItems, StorageRef, TensorRef

_PROTOCOL, _NEWER = 2, 4  # of a pickle, and of one that has an opcode which the first hasn't


def dumps(
    value: Any,
    storage: Callable[[StorageRef], StorageRef],
    tensor: Callable[[Any], Any],
    instead: Mapping[int, Any] | None = None,
) -> bytes:
    """Return the pickle of a value.

    Args:
        storage: under what key, and as what, a storage is to be written; asked in the order of the pickle.
        tensor: what stands for a value that isn't one of `pickle_values`', such as a new tensor.
        instead: what is written in the place of a value, by the value's address, wherever it is met.

    Raises:
        InputError: values nested deeper than Python can follow.
    """
    file = io.BytesIO()
    writer = _Writer(file, _PROTOCOL)
    writer.storage, writer.tensor, writer.instead, writer.equal = storage, tensor, instead or {}, {}
    try:
        writer.dump(value)
    except RecursionError:
        raise InputError("the saved object is nested too deeply to be written again") from None
    file.seek(1)
    file.write(bytes([writer.needed]))
    return file.getvalue()


class _Writer(pickle._Pickler):
    """Has `save`, `write`, `memoize`, `memo` and `get` of the standard library's, and its ways with plain values."""

    write: Callable[[bytes], Any]
    memoize: Callable[[Any], None]
    memo: dict[int, tuple[int, Any]]
    get: Callable[[int], bytes]
    storage: Callable[[StorageRef], StorageRef]
    tensor: Callable[[Any], Any]
    instead: Mapping[int, Any]
    equal: dict[Any, Any]  # names and texts, each of which is written once
    needed = _PROTOCOL

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        value = self.instead.get(id(value), value)
        if type(value) in (str, Global):
            value = self.equal.setdefault(value, value)
        elif type(value) not in self.dispatch:
            value = self.tensor(value)
        super().save(value)  # type: ignore[misc]

    def unnamed(self, *values: Any) -> None:
        """Write what nothing refers to again: to remember the shapes of a million tensors would take gigabytes."""
        before, self.fast = self.fast, True
        for value in values:
            self.save(value)
        self.fast = before

    def known(self, value: Any) -> bool:
        """Write what holds itself, and was written meanwhile, as what is remembered; tell whether it was."""
        if id(value) not in self.memo:
            return False
        self.write(pickle.POP + self.get(self.memo[id(value)][0]))
        return True

    def newest(self, opcode: bytes) -> None:
        """Write an opcode that the usual protocol hasn't."""
        self.write(opcode)
        self.needed = _NEWER

    def old_text(self, value: OldText) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value.encode("latin-1"))

    def found(self, value: Global) -> None:
        text = value.module + value.name
        if text.isascii() and text.isprintable() and "." not in value.name:
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        else:
            self.unnamed(value.module, value.name)
            self.newest(pickle.STACK_GLOBAL)
        self.memoize(value)

    def ordered(self, value: OrderedItems) -> None:
        self.made(value, ORDERED)
        self.filled(value, value.state)

    def call(self, value: Call) -> None:
        if value.opcode == pickle.OBJ:
            self.write(pickle.MARK)
        self.save(value.function)
        for part in value.arguments if value.opcode in (pickle.OBJ, pickle.NEWOBJ_EX) else (value.arguments,):
            self.save(part)
        if value.opcode == pickle.NEWOBJ_EX:
            self.newest(pickle.NEWOBJ_EX)
        else:
            self.write(value.opcode)
        if self.known(value):
            return
        self.memoize(value)
        if value.appended:
            self.marked(value.appended, pickle.APPENDS)
        self.filled(value.items, value.state)
        for after in value.then:
            self.save(after)
            self.write(pickle.POP)

    def marked(self, values: Any, opcode: bytes) -> None:
        """Write values together, for an opcode that takes all behind a mark."""
        self.write(pickle.MARK)
        for value in values:
            self.save(value)
        self.write(opcode)

    def made(self, value: Any, function: Global, *arguments: Any) -> None:
        """Write what a call makes, known afterwards as `value`."""
        self.save(function)
        self.marked(arguments, pickle.TUPLE + pickle.REDUCE)
        self.memoize(value)

    def filled(self, items: Mapping[Any, Any], state: Any) -> None:
        """Put items and attributes into what was made."""
        if items:
            self.marked((one for pair in items.items() for one in pair), pickle.SETITEMS)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)

    def storage_of(self, value: StorageRef) -> None:
        written = self.storage(value)
        self.write(pickle.MARK)
        self.save("storage")
        self.save(Global("torch", written.cls) if written.cls else Global("torch.storage", "UntypedStorage"))
        self.unnamed(written.key)
        self.save(written.location)
        self.save(written.count)
        self.write(pickle.TUPLE + pickle.BINPERSID)

    def tensor_of(self, value: TensorRef) -> None:
        typed, hooks = value.storage.typed, value.hooks
        self.save(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.write(pickle.MARK)
        self.save(value.storage)
        self.unnamed(value.offset, value.shape, value.stride)
        self.save(value.requires_grad)
        if hooks is None or (isinstance(hooks, OrderedItems) and not hooks and hooks.state is None):
            self.save(ORDERED)
            self.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
        else:
            self.save(hooks)
        if not typed:
            self.save(Global("torch", value.dtype))
        if value.metadata is not None:
            self.save(value.metadata)
        self.write(pickle.TUPLE + pickle.REDUCE)
        self.memoize(value)


_PLAIN = (type(None), bool, int, float, str, tuple, list, dict)
_OWN: dict[type, Any] = {
    OldText: _Writer.old_text,
    bytes: lambda writer, value: writer.made(value, ENCODE, value.decode("latin-1"), "latin1"),
    bytearray: lambda writer, value: writer.made(value, Global("builtins", "bytearray"), bytes(value)),
    set: lambda writer, value: writer.made(value, Global("builtins", "set"), list(value)),
    frozenset: lambda writer, value: writer.made(value, Global("builtins", "frozenset"), list(value)),
    OrderedItems: _Writer.ordered,
    Global: _Writer.found,
    Call: _Writer.call,
    StorageRef: _Writer.storage_of,
    TensorRef: _Writer.tensor_of,
}
_Writer.dispatch = {**{kind: pickle._Pickler.dispatch[kind] for kind in _PLAIN}, **_OWN}
