"""A pickle as plain values, read without running anything: what it would call is described, never called.

torch's own `weights_only` reader does call what it allows (`bytearray(10**12)`, `torch.Tensor(10**12)`), and it needs
torch. Here each opcode builds the plain values of `pickle_values`: a class or function is inert, whatever its name, and
so is all that would be made with it. `pickle_writer` makes a pickle of the same values again.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast

from convtool.errors import ConvtoolError, InputError
from convtool.formats.dtypes import ITEMSIZE, STORAGES
from convtool.formats.numpy_arrays import read_array
from convtool.formats.pickle_values import (
    ARRAY,
    NEWOBJ,
    NEWOBJ_EX,
    OBJ,
    PARAMETERS,
    PLAIN_CLASSES,
    QUANTIZED,
    REDUCE,
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
_ORDERED = Global("collections", "OrderedDict")
_ENCODE = Global("_codecs", "encode")
MOST_IN_KEY = 1000  # values in a key, counted each time that they are met


class PickleFile(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


@dataclass(slots=True)
class Pickled:
    """What a pickle says.

    Attributes:
        value: what was pickled.
        tensors: every tensor in it, arrays included.
        foreign: the classes and functions it names that are none of a state dict's, in order.
        arrays: the bytes of its arrays of numpy, by the keys of their storages.
    """

    value: Any = None
    tensors: list[TensorRef] = field(default_factory=list)
    foreign: dict[Global, None] = field(default_factory=dict)
    arrays: dict[str, bytes] = field(default_factory=dict)


def loads(file: PickleFile, where: str, persistent: Callable[[Any], Any]) -> Pickled:
    """Read one pickle from where the file stands, up to its end.

    Args:
        where: the file, for messages.
        persistent: what a persistent id stands for.

    Raises:
        PickleError: it is not a pickle, or one of a form that torch doesn't write.
        InputError: it holds something that cannot be read, by name.
    """
    machine = _Machine(where, persistent)
    try:
        machine.read.value = machine.run(file)
    except (ConvtoolError, PickleError):
        raise
    except IndexError:
        raise PickleError("its pickle takes more from its stack than is there") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError, EOFError) as error:
        raise PickleError(f"its pickle cannot be read ({str(error)[:100] or type(error).__name__})") from None
    return machine.read


class _Machine:
    """The stack, the marks and the memo."""

    def __init__(self, where: str, persistent: Callable[[Any], Any]) -> None:
        self.where = where
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.remembered: set[int] = set()  # calls by their addresses; the memo keeps them alive
        self.read = Pickled()

    def run(self, file: PickleFile) -> Any:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
            name = opcode.name
            if name == "STOP":
                (result,) = self.stack  # exactly one value is left
                return result
            action = _ACTIONS.get(name)
            if action is None:
                raise PickleError(f"its pickle uses the opcode {name}, which torch's files don't")
            action(self, argument)
        raise PickleError("its pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self, _: Any) -> None:
        if not self.stack:
            self.pop_mark()
            return
        value = self.stack.pop()
        if isinstance(value, Call) and id(value) not in self.remembered:
            # Nothing refers to what it gives: it is called for what it does to its first argument.
            target = value.arguments[0] if value.arguments else None
            if not isinstance(target, Call):
                raise PickleError("its pickle calls something and throws away what it gives")
            target.then.append(value)

    def put(self, index: int) -> None:
        value = self.memo[index] = self.stack[-1]
        if isinstance(value, Call):
            self.remembered.add(id(value))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def append(self, items: list[Any]) -> None:
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
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            if key in target:
                named = f"the key {key!r:.100}" if isinstance(key, str | int) else "a key"
                raise InputError(f"{self.where}: is damaged: a dict in its pickle has {named} twice")
            target[key] = value

    def dict_of(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleError("its pickle adds to something that isn't a set")
        for item in items:
            check_key(item)
            target.add(item)

    def frozen_set(self, _: Any) -> None:
        items = self.pop_mark()
        for item in items:
            check_key(item)
        self.push(frozenset(items))

    def find(self, module: str, name: str) -> Global:
        found = Global(module, name)
        if found not in _KNOWN:
            self.read.foreign[found] = None
        return found

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("its pickle names a class by something that isn't text")
        self.push(self.find(module, name))

    def call(self, opcode: bytes, count: int = 1) -> None:
        """Make what a function or class gives for `count` arguments of the opcode, a tuple first."""
        arguments = tuple(self.stack.pop() for _ in range(count))[::-1]
        function = self.stack.pop()
        if not isinstance(function, Global | Call) or not isinstance(arguments[0], tuple):
            raise PickleError("its pickle calls something that isn't a function")
        self.push(self.made(function, arguments[0]) if opcode == REDUCE else _new(function, opcode, arguments))

    def instance(self, function: Any, arguments: list[Any]) -> None:
        if not isinstance(function, Global):
            raise PickleError("its pickle makes an object of something that isn't a class")
        self.push(Call(function, tuple(arguments), OBJ))

    def made(self, function: Global | Call, arguments: tuple[Any, ...]) -> Any:
        """Return what a function would give: a value where that is one of a state dict's, else the call."""
        if function == _ORDERED:
            return self.ordered(arguments)
        call = Call(function, arguments)
        if (data := _bytes_of(call)) is not None:
            return data
        name = call.calls("torch._utils")
        if name in TENSORS and not (arguments and isinstance(arguments[0], Call)):
            tensor = make_tensor(name, arguments)
            self.read.tensors.append(tensor)
            return tensor
        if name in PARAMETERS and arguments:
            call.tensor = plain_tensor(arguments[0])
        elif call.calls("torch._tensor") == "_rebuild_from_type_v2" and len(arguments) == 4:
            self.with_attributes(call, *arguments)
        return self.array(call)

    def with_attributes(self, call: Call, function: Any, cls: Any, arguments: Any, _: Any) -> None:
        """Find the numbers of a tensor with attributes of Python's, where it is a plain one for the rest."""
        if not (isinstance(function, Global) and isinstance(arguments, tuple) and arguments and cls in PLAIN_CLASSES):
            return
        if function.module == "torch._utils" and function.name in TENSORS and isinstance(arguments[0], StorageRef):
            if arguments[0].start:
                return  # of a form that torch no longer wrote when tensors had attributes
            call.tensor = make_tensor(function.name, arguments)
            self.read.tensors.append(call.tensor)
        elif function.module == "torch._utils" and function.name in PARAMETERS:
            call.tensor = plain_tensor(arguments[0])

    def array(self, call: Call) -> Call:
        """Return a call, with the numbers that it holds where it makes an array of numpy."""
        found = read_array(call, f"{ARRAY}{len(self.read.arrays)}")
        if found is not None:
            call.tensor, self.read.arrays[found[0].storage.key] = found
            self.read.tensors.append(call.tensor)
        return call

    def ordered(self, arguments: tuple[Any, ...]) -> OrderedItems:
        pairs = arguments[0] if arguments else []
        if not isinstance(pairs, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
            raise PickleError("its pickle makes an OrderedDict of something that isn't a list of pairs")
        for key, _ in pairs:
            check_key(key)
        made = OrderedItems(dict(pairs))
        if len(made) != len(pairs):
            raise InputError(f"{self.where}: is damaged: an OrderedDict in its pickle has a key twice")
        return made

    def build(self, _: Any) -> None:
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
    if call.function == _ENCODE and len(arguments) == 2 and arguments[1] == "latin1" and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")
    if name == "bytearray" and len(arguments) == 1 and isinstance(arguments[0], bytes):
        return bytearray(arguments[0])
    return b"" if name == "bytes" and not arguments else None


def _new(function: Global | Call, opcode: bytes, arguments: tuple[Any, ...]) -> Any:
    """Return an object that its class makes by `__new__`."""
    if function == _ORDERED and arguments == ((),):
        return OrderedItems()
    return Call(function, arguments[0] if opcode == NEWOBJ else arguments, opcode)


def check_key(key: Any) -> None:
    """Raise PickleError for a key of more values than anybody means; 60 tuples in tuples can be hashed 2**60 times."""
    left, ahead = MOST_IN_KEY, [key]
    while ahead:
        value = ahead.pop()
        left -= 1
        if left < 0:
            raise PickleError(f"its pickle has a key of more than {MOST_IN_KEY} values")
        if isinstance(value, tuple | frozenset):
            ahead += value if len(value) <= left else [None] * (left + 1)


def _pushes(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _push_mark(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make(machine.pop_mark()))


def _object(machine: _Machine, _: Any) -> None:
    cls, *arguments = machine.pop_mark()
    machine.instance(cls, arguments)


_ARGUMENTS = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_ARGUMENTS, _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), lambda machine, text: machine.push(OldText(text))),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "NONE": _pushes(lambda: None),
    "NEWTRUE": _pushes(lambda: True),
    "NEWFALSE": _pushes(lambda: False),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_SET": _pushes(set),
    "EMPTY_TUPLE": _pushes(tuple),
    "LIST": _push_mark(list),
    "DICT": lambda machine, _: machine.dict_of(machine.pop_mark()),
    "TUPLE": _push_mark(tuple),
    "FROZENSET": _Machine.frozen_set,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.pop_mark()),
    "GLOBAL": lambda machine, argument: machine.push(machine.find(*argument.split(" ", 1))),
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": lambda machine, name: machine.instance(machine.find(*name.split(" ", 1)), machine.pop_mark()),
    "OBJ": _object,
    "REDUCE": lambda machine, _: machine.call(REDUCE),
    "NEWOBJ": lambda machine, _: machine.call(NEWOBJ),
    "NEWOBJ_EX": lambda machine, _: machine.call(NEWOBJ_EX, 2),
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.stack.pop())),
}
