"""A pickle as plain values, read without running anything: what it would call is described, never called.

torch's own `weights_only` reader does call what it allows (`bytearray(10**12)`, `torch.Tensor(10**12)`), and it needs
torch. Here the opcodes that only build numbers, texts and rows are the standard library's, and those that would look
up, call or fill anything are this module's: a class or function is inert, whatever its name, and so is all that would
be made with it. What stands in neither list is refused. `pickle_writer` makes a pickle of the same values again.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from convtool.errors import InputError
from convtool.formats.dtypes import ITEMSIZE, REPEATED, ROOM, STORAGES
from convtool.formats.pickle_values import (
    ARRAY,
    ENCODE,
    INSIDE,
    ORDERED,
    PARAMETERS,
    PLAIN_CLASSES,
    QUANTIZED,
    TENSORS,
    UNUSABLE,
    Call,
    Global,
    OldText,
    OrderedItems,
    PickleError,
    StorageRef,
    TensorRef,
    make_tensor,
    plain_tensor,
    read_array,
    storage_ref,
)

_BUILTINS = "set frozenset bytes bytearray complex slice list dict int float object"
# What people's state dicts and plain numbers beside them are made of, by module; all else is foreign, and listed.
_NAMES = {
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "collections": "OrderedDict Counter defaultdict",
    "argparse": "Namespace",
    "_codecs": "encode",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "torch._utils": " ".join((*TENSORS, *PARAMETERS, *UNUSABLE)),
    "torch._tensor": "_rebuild_from_type_v2",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.serialization": "_get_layout",
    "torch.storage": "UntypedStorage",
    "torch.cuda": " ".join(STORAGES),
    "torch": " ".join(
        (
            *("Size", "device", "Tensor", "strided", "UntypedStorage"),
            *(*ITEMSIZE, *STORAGES, *QUANTIZED, "quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
            *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
            *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"),
            *("per_channel_symmetric", "per_channel_affine_float_qparams"),
        )
    ),
}
_KNOWN = {Global(module, name) for module, names in _NAMES.items() for name in names.split()}
MOST_IN_KEY = 1000  # values in a key, counted each time that they are met
PAIR, PARSED = 50, 8  # bytes of an entry of a dict, about; and that could be copied while one of a pickle is read


@dataclass(slots=True)
class Pickled:
    """What a pickle says.

    Attributes:
        value: what was pickled.
        tensors: every tensor in it, arrays included.
        foreign: the classes and functions it names that are none of a state dict's, in order.
        arrays: the bytes of tensors that stand in it, and of arrays of numpy, by the keys of their storages.
    """

    value: Any = None
    tensors: list[TensorRef] = field(default_factory=list)
    foreign: dict[Global, None] = field(default_factory=dict)
    arrays: dict[str, bytes] = field(default_factory=dict)


def loads(file: BinaryIO, where: str, persistent: Callable[[Any], Any], around: _Machine | None = None) -> Pickled:
    """Read one pickle from where the file stands, up to its end.

    Args:
        where: the file, for messages.
        persistent: what a persistent id stands for.
        around: reads the pickle that this one stands in.

    Raises:
        PickleError: it is not a pickle, or one of a form that torch doesn't write.
        InputError: it holds something that cannot be read, by name.
    """
    machine = _Machine(file, where, persistent, around)
    try:
        machine.found.value = machine.load()
    except IndexError:
        raise PickleError("its pickle ends too early, or takes more from its stack than is there") from None
    except _ERRORS as error:
        raise PickleError(f"its pickle cannot be read ({str(error)[:100] or type(error).__name__})") from None
    if machine.stack or machine.metastack:
        raise PickleError("its pickle leaves more than one value")
    return machine.found


_ERRORS = (
    *(pickle.UnpicklingError, struct.error, EOFError, ValueError, TypeError, KeyError, OverflowError),
    *(RecursionError, AttributeError),
)


class _Memo(dict[int, Any]):
    """What a pickle remembers; a call in it is one that more may be done with."""

    def __setitem__(self, index: int, value: Any) -> None:
        super().__setitem__(index, value)
        if isinstance(value, Call):
            value.remembered = True


class _Machine(pickle._Unpickler):
    """The standard library's reader in Python, of whose opcodes those are kept that can't do anything.

    It calls `find_class`, `persistent_load`, `_instantiate` and `_decode_string`, and the methods of `_OWN`.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, file: BinaryIO, where: str, persistent: Callable[[Any], Any], around: _Machine | None) -> None:
        super().__init__(file)
        self.memo = _Memo()
        self.file, self.where = file, where
        self.around, self.copied = around, 0
        self.persistent = persistent
        self.found = Pickled()

    def _decode_string(self, data: bytes) -> OldText:
        return OldText(data.decode("latin-1"))

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)

    def frame(self) -> None:
        self.read(8)  # how far the opcodes go that could be read ahead: no more than the file has, whatever is said

    def byte_array(self) -> None:
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def pop(self) -> None:
        if not self.stack:
            self.pop_mark()
            return
        value = self.stack.pop()
        if isinstance(value, Call) and not value.remembered:
            # Nothing refers to what it gives: it is called for what it does to its first argument.
            target = value.arguments[0] if value.arguments else None
            if not isinstance(target, Call):
                raise PickleError("its pickle calls something and throws away what it gives")
            target.then.append(value)

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            target = target.appended
        if not isinstance(target, list):
            raise PickleError("its pickle appends to something that isn't a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("its pickle puts items into something that isn't a dict")
        check_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key in target:
                named = f"the key {key!r:.100}" if isinstance(key, str | int) else "a key"
                raise InputError(f"{self.where}: is damaged: a dict in its pickle has {named} twice")
            target[key] = value

    def dict_of(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise PickleError("its pickle adds to something that isn't a set")
        check_keys(items)
        target.update(items)

    def frozen_set(self) -> None:
        items = self.pop_mark()
        check_keys(items)
        self.stack.append(frozenset(items))

    def find_class(self, module: str, name: str) -> Global:
        found = Global(module, name)
        if found not in _KNOWN:
            self.found.foreign[found] = None
        return found

    def call(self, opcode: bytes, count: int = 1) -> None:
        """Make what a function or class gives for `count` arguments of the opcode, a tuple first."""
        arguments = tuple(self.stack.pop() for _ in range(count))[::-1]
        function = self.stack.pop()
        if not isinstance(function, Global | Call) or not isinstance(arguments[0], tuple):
            raise PickleError("its pickle calls something that isn't a function")
        reduced = opcode == pickle.REDUCE
        self.stack.append(self.made(function, arguments[0]) if reduced else _new(function, opcode, arguments))

    def _instantiate(self, function: Any, arguments: list[Any]) -> None:
        if not isinstance(function, Global):
            raise PickleError("its pickle makes an object of something that isn't a class")
        self.stack.append(Call(function, tuple(arguments), pickle.OBJ))

    def made(self, function: Global | Call, arguments: tuple[Any, ...]) -> Any:
        """Return what a function would give: a value where that is one of a state dict's, else the call."""
        if function == ORDERED:
            return self.ordered(arguments)
        call = Call(function, arguments)
        if (data := _bytes_of(call)) is not None:
            self.copies(len(data))
            return data
        if call.calls("torch.storage") == "_load_from_bytes" and isinstance(data := next(iter(arguments), None), bytes):
            self.copies(PARSED * len(data))
            return self.storage_in(data) or call
        name = call.calls("torch._utils")
        if name in TENSORS and not (arguments and isinstance(arguments[0], Call)):
            tensor = make_tensor(name, arguments)
            self.found.tensors.append(tensor)
            return tensor
        if name in PARAMETERS and arguments:
            call.tensor = plain_tensor(arguments[0])
        elif call.calls("torch._tensor") == "_rebuild_from_type_v2" and len(arguments) == 4:
            inner, cls, given, _ = arguments
            if isinstance(inner, Global) and isinstance(cls, Global) and cls in PLAIN_CLASSES and type(given) is tuple:
                call.tensor = plain_tensor(self.made(inner, given))
        return self.array(call)

    def copies(self, count: int) -> None:
        """Count bytes that are made of others, which a pickle can name again and again."""
        if self.around is not None:
            self.around.copies(count)
        self.copied += count
        if self.copied > REPEATED * self.file.tell() + ROOM:
            raise PickleError("its pickle makes the same bytes again and again")

    def storage_in(self, data: bytes) -> StorageRef | None:
        """Return the storage of a tensor that was pickled without torch.save: a file of torch's in the pickle.

        It is of the older format: a row of pickles, the fourth of them the storage, and its bytes. None where it isn't.
        """
        file = io.BytesIO(data)
        try:
            *_, storage, _ = (loads(file, self.where, storage_ref, self).value for _ in range(5))
        except PickleError:
            return None
        count, data = int.from_bytes(file.read(8), "little"), file.read()
        if not isinstance(storage, StorageRef) or (count, len(data)) != (storage.count, storage.nbytes):
            return None
        storage = replace(storage, key=f"{INSIDE}{len(self.found.arrays)}")
        self.found.arrays[storage.key] = data
        return storage

    def array(self, call: Call) -> Call:
        """Return a call, with the numbers that it holds where it makes an array of numpy."""
        found = read_array(call, f"{ARRAY}{len(self.found.arrays)}")
        if found is not None:
            call.tensor, self.found.arrays[found[0].storage.key] = found
            self.copies(len(found[1]))
            self.found.tensors.append(call.tensor)
        return call

    def ordered(self, arguments: tuple[Any, ...]) -> OrderedItems:
        pairs = arguments[0] if arguments else []
        if not isinstance(pairs, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
            raise PickleError("its pickle makes an OrderedDict of something that isn't a list of pairs")
        self.copies(PAIR * len(pairs))
        check_keys(key for key, _ in pairs)
        made = OrderedItems(dict(pairs))
        if len(made) != len(pairs):
            raise InputError(f"{self.where}: is damaged: an OrderedDict in its pickle has a key twice")
        return made

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Call | OrderedItems):
            raise PickleError("its pickle sets attributes of something that has none")
        if target.state is not None:
            raise PickleError("its pickle sets the attributes of an object twice")
        target.state = state
        if isinstance(target, Call):
            self.array(target)


def _bytes_of(call: Call) -> bytes | bytearray | None:
    """Return the bytes that a call makes, as the older protocols of pickle have them; None of any other call."""
    arguments, name = call.arguments, call.calls("builtins", "__builtin__")
    if call.function == ENCODE and len(arguments) == 2 and arguments[1] == "latin1" and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")
    if name == "bytearray" and len(arguments) == 1 and isinstance(arguments[0], bytes):
        return bytearray(arguments[0])
    return b"" if name == "bytes" and not arguments else None


def _new(function: Global | Call, opcode: bytes, arguments: tuple[Any, ...]) -> Any:
    """Return an object that its class makes by `__new__`."""
    if function == ORDERED and arguments == ((),):
        return OrderedItems()
    return Call(function, arguments[0] if opcode == pickle.NEWOBJ else arguments, opcode)


def check_keys(keys: Iterable[Any]) -> None:
    """Raise PickleError for a key of more values than anybody means; 60 tuples in tuples can be hashed 2**60 times."""
    for key in keys:
        left, ahead = MOST_IN_KEY, [key]
        while ahead:
            value = ahead.pop()
            left -= 1
            if left < 0:
                raise PickleError(f"its pickle has a key of more than {MOST_IN_KEY} values")
            if isinstance(value, tuple | frozenset):
                ahead += value if len(value) <= left else [None] * (left + 1)


# The opcodes of the standard library's that build numbers, texts and rows, and look nothing up but by `_Machine`.
_PLAIN = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.INT, pickle.LONG, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4),
    *(pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.LIST, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST, pickle.OBJ, pickle.BINPERSID),
)
_OWN: dict[bytes, Callable[[Any], None]] = {
    pickle.FRAME: _Machine.frame,
    pickle.BYTEARRAY8: _Machine.byte_array,
    pickle.POP: _Machine.pop,
    pickle.APPEND: lambda machine: machine.append_items([machine.stack.pop()]),
    pickle.APPENDS: lambda machine: machine.append_items(machine.pop_mark()),
    pickle.SETITEM: lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS: lambda machine: machine.set_items(machine.pop_mark()),
    pickle.DICT: _Machine.dict_of,
    pickle.ADDITEMS: _Machine.add_items,
    pickle.FROZENSET: _Machine.frozen_set,
    pickle.REDUCE: lambda machine: machine.call(pickle.REDUCE),
    pickle.NEWOBJ: lambda machine: machine.call(pickle.NEWOBJ),
    pickle.NEWOBJ_EX: lambda machine: machine.call(pickle.NEWOBJ_EX, 2),
    pickle.BUILD: _Machine.build,
}
_Machine.dispatch = {
    **{opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _PLAIN},
    **{opcode[0]: action for opcode, action in _OWN.items()},
}
