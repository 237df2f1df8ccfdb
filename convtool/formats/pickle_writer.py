"""The values of `pickle_values` as a pickle again, of the protocol that torch writes and reads."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from typing import Any

from convtool.errors import InputError
from convtool.formats.pickle_values import (
    NEWOBJ_EX,
    OBJ,
    Call,
    Global,
    OldText,
    OrderedItems,
    StorageRef,
    TensorRef,
)

_ORDERED = Global("collections", "OrderedDict")
_ENCODE = Global("_codecs", "encode")


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
    writer = _Writer(storage, tensor, instead or {})
    try:
        writer.save(value)
    except RecursionError:
        raise InputError("the saved object is nested too deeply to be written again") from None
    return b"\x80" + bytes([writer.protocol]) + writer.out.getvalue() + b"."


class _Writer:
    def __init__(
        self,
        storage: Callable[[StorageRef], StorageRef],
        tensor: Callable[[Any], Any],
        instead: Mapping[int, Any],
    ) -> None:
        self.out = io.BytesIO()
        self.protocol = 2
        self.storage = storage
        self.tensor = tensor
        self.instead = instead
        self.memo: dict[Any, int] = {}
        self.kept: list[Any] = []  # what is known by its address has to stay alive

    def save(self, value: Any) -> None:
        value = self.instead.get(id(value), value)
        if self.known(value):
            return
        save = _SAVERS.get(type(value))
        if save is not None:
            save(self, value)
        else:
            self.save(self.tensor(value))

    def known(self, value: Any, before: bytes = b"") -> bool:
        """Write what was written before as what is remembered, behind `before`; tell whether it was."""
        index = self.memo.get(_memo_key(value))
        if index is None:
            return False
        self.out.write(before)
        self.memo_operation(b"h", b"j", index)
        return True

    def remember(self, value: Any) -> None:
        index = len(self.memo)
        self.memo[_memo_key(value)] = index
        self.kept.append(value)
        self.memo_operation(b"q", b"r", index)

    def memo_operation(self, short: bytes, long: bytes, index: int) -> None:
        self.out.write(short + bytes([index]) if index < 256 else long + struct.pack("<I", index))

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out.write(b"K" + bytes([value]))
        elif 0 <= value < 1 << 16:
            self.out.write(b"M" + struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self.out.write(b"J" + struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out.write(b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data)))
            self.out.write(data)

    def text(self, value: str) -> None:
        self.characters(value)
        self.remember(value)

    def characters(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.out.write(b"X" + struct.pack("<I", len(data)) + data)

    def old_text(self, value: OldText) -> None:
        self.out.write(b"T" + struct.pack("<i", len(value)) + value.encode("latin-1"))

    def found(self, value: Global) -> None:
        text = value.module + value.name
        if text.isascii() and text.isprintable() and "." not in value.name:
            self.out.write(f"c{value.module}\n{value.name}\n".encode())
        else:
            self.characters(value.module)
            self.characters(value.name)
            self.newest(b"\x93")
        self.remember(value)

    def newest(self, opcode: bytes) -> None:
        """Write an opcode that protocol 2 hasn't."""
        self.out.write(opcode)
        self.protocol = 4

    def tuple_of(self, value: tuple[Any, ...]) -> None:
        self.items_of(value)
        # One that holds itself by way of a list or an object was written meanwhile.
        if value and not self.known(value, b"0"):
            self.remember(value)

    def items_of(self, value: tuple[Any, ...]) -> None:
        """Write a tuple that nothing refers to again: to remember those of a million tensors would take gigabytes."""
        if not value:
            self.out.write(b")")
            return
        if len(value) > 3:
            self.out.write(b"(")
        for item in value:
            self.save(item)
        self.out.write({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t"))

    def list_of(self, value: list[Any]) -> None:
        self.out.write(b"]")
        self.remember(value)
        self.appended(value)

    def appended(self, value: list[Any]) -> None:
        if value:
            self.out.write(b"(")
            for item in value:
                self.save(item)
            self.out.write(b"e")

    def items(self, value: dict[Any, Any]) -> None:
        if value:
            self.out.write(b"(")
            for key, item in value.items():
                self.save(key)
                self.save(item)
            self.out.write(b"u")

    def dict_of(self, value: dict[Any, Any]) -> None:
        self.out.write(b"}")
        self.remember(value)
        self.items(value)

    def ordered(self, value: OrderedItems) -> None:
        self.made(value, _ORDERED)
        self.filled(value, value.state)

    def call(self, value: Call) -> None:
        if value.opcode == OBJ:
            self.out.write(b"(")
        self.save(value.function)
        for part in value.arguments if value.opcode in (OBJ, NEWOBJ_EX) else (value.arguments,):
            self.save(part)
        if value.opcode == NEWOBJ_EX:
            self.newest(NEWOBJ_EX)
        else:
            self.out.write(value.opcode)
        if self.known(value, b"0"):  # as with tuples
            return
        self.remember(value)
        self.appended(value.appended)
        self.filled(value.items, value.state)
        for after in value.then:
            self.save(after)
            self.out.write(b"0")

    def made(self, value: Any, function: Global, *arguments: Any) -> None:
        """Write what a call makes, known afterwards as `value`."""
        self.save(function)
        self.items_of(arguments)
        self.out.write(b"R")
        self.remember(value)

    def filled(self, items: dict[Any, Any], state: Any) -> None:
        """Put items and attributes into what was made."""
        self.items(items)
        if state is not None:
            self.save(state)
            self.out.write(b"b")

    def storage_of(self, value: StorageRef) -> None:
        written = self.storage(value)
        cls = Global("torch", written.cls) if written.cls else Global("torch.storage", "UntypedStorage")
        self.out.write(b"(")
        self.save("storage")
        self.save(cls)
        self.characters(written.key)  # which nothing refers to again
        self.save(written.location)
        self.save(written.count)
        self.out.write(b"tQ")

    def tensor_of(self, value: TensorRef) -> None:
        typed = value.storage.typed
        self.save(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.out.write(b"(")
        self.save(value.storage)
        self.save(value.offset)
        self.items_of(value.shape)
        self.items_of(value.stride)
        self.save(value.requires_grad)
        hooks = OrderedItems() if value.hooks is None else value.hooks
        if isinstance(hooks, OrderedItems) and not hooks and hooks.state is None:
            self.save(_ORDERED)
            self.out.write(b")R")
        else:
            self.save(hooks)
        if not typed:
            self.save(Global("torch", value.dtype))
        if value.metadata is not None:
            self.save(value.metadata)
        self.out.write(b"tR")
        self.remember(value)


def _memo_key(value: Any) -> Any:
    return value if type(value) in (str, Global) else id(value)


def _write(make: Callable[[Any], bytes]) -> Callable[[_Writer, Any], None]:
    def save(writer: _Writer, value: Any) -> None:
        writer.out.write(make(value))

    return save


def _binary(writer: _Writer, value: bytes) -> None:
    writer.made(value, _ENCODE, value.decode("latin-1"), "latin1")


_SAVERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): _write(lambda _: b"N"),
    bool: _write(lambda value: b"\x88" if value else b"\x89"),
    int: _Writer.integer,
    float: _write(lambda value: b"G" + struct.pack(">d", value)),
    str: _Writer.text,
    OldText: _Writer.old_text,
    bytes: _binary,
    bytearray: lambda writer, value: writer.made(value, Global("builtins", "bytearray"), bytes(value)),
    tuple: _Writer.tuple_of,
    list: _Writer.list_of,
    dict: _Writer.dict_of,
    set: lambda writer, value: writer.made(value, Global("builtins", "set"), list(value)),
    frozenset: lambda writer, value: writer.made(value, Global("builtins", "frozenset"), list(value)),
    OrderedItems: _Writer.ordered,
    Global: _Writer.found,
    Call: _Writer.call,
    StorageRef: _Writer.storage_of,
    TensorRef: _Writer.tensor_of,
}
