"""A pickle as plain values, read without running anything: what it would call is described, never called.

torch's own `weights_only` reader does call what it allows (`bytearray(10**12)`, `torch.Tensor(10**12)`), and it needs
torch. Here each opcode builds plain Python values; classes and functions are a `Global`, what would be called is a
`Call`, and a tensor is a `TensorRef` to a storage by its key. `pickle_writer` makes a pickle of the same values again.
Anything that torch's own files have no need for is refused by its name.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any, Protocol, cast

from convtool.errors import ConvtoolError, InputError, RefusedError
from convtool.formats.dtypes import ITEMSIZE, LARGEST, MOST_AXES, STORAGES

QUANTIZED = {"QInt8Storage": "int8", "QUInt8Storage": "uint8", "QInt32Storage": "int32"}  # classes, by what they hold


class PickleError(Exception):
    """The bytes are not a pickle such as torch writes; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """What a call would have made.

    Attributes:
        function: what would be called.
        arguments: with what.
        new: whether through its `__new__` alone.
        items: what is put into it by key afterwards.
        state: what its attributes are set from afterwards; None for nothing.
    """

    function: Global
    arguments: tuple[Any, ...]
    new: bool = False
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


class OrderedItems(dict[Any, Any]):
    """A collections.OrderedDict, and the attributes that it carries (a state dict's `_metadata`) as `state`."""

    def __init__(self, items: Mapping[Any, Any] | None = None, state: Any = None) -> None:
        super().__init__(items or {})
        self.state = state


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A tensor's memory by its key.

    Attributes:
        key: by which the file knows its bytes.
        dtype: torch's name, or 'uint8' of a storage without one.
        cls: the name of torch's class for it where that has the dtype; '' of an untyped one.
        location: the device that it was saved from.
        count: number of elements of all the storage.
        start: the first element of it that is meant, of a view in the older format.
    """

    key: str
    dtype: str
    cls: str
    location: str
    count: int
    start: int = 0

    @property
    def typed(self) -> bool:
        return bool(self.cls)

    @property
    def nbytes(self) -> int:
        return self.count * ITEMSIZE[self.dtype]


@dataclass(slots=True, eq=False)
class TensorRef:
    """A tensor: which elements of which storage; offset and strides in elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    hooks: Any = None
    metadata: Any = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * ITEMSIZE[self.dtype]

    @property
    def reach(self) -> int:
        """One past the last element that it reads, counted from its offset."""
        if not self.count:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def contiguous(self) -> bool:
        """Tell whether its elements stand one after the other, row-major."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
PARAMETERS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
# Tensors without plain numbers, which can be passed on but not computed with: what they are, and what to do.
_SPARSE = "is sparse; save it dense: tensor.to_dense()"
_OTHER_DEVICE = "was saved from a device that torch has no storages of; save it after .cpu()"
_SUBCLASS = "is of a tensor subclass; save the plain tensor that it stands for"
UNUSABLE = {
    "_rebuild_qtensor": "is quantized; save it dequantized: tensor.dequantize()",
    "_rebuild_sparse_tensor": _SPARSE,
    "_rebuild_sparse_csr_tensor": _SPARSE,
    "_rebuild_nested_tensor": "is a nested tensor; save its parts as tensors of their own",
    "_rebuild_meta_tensor_no_storage": "is on the meta device and holds no numbers; load the weights before saving",
    "_rebuild_device_tensor_from_numpy": _OTHER_DEVICE,
    "_rebuild_device_tensor_from_cpu_tensor": _OTHER_DEVICE,
    "_rebuild_wrapper_subclass": _SUBCLASS,
    "_rebuild_from_type_v2": _SUBCLASS,
}
# All classes and functions that a checkpoint's pickle may name, by their modules. None of them is ever called.
_BUILTINS = "set frozenset bytearray complex slice list dict int float"
_NAMES = {
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "collections": "OrderedDict Counter defaultdict",
    "argparse": "Namespace",
    "_codecs": "encode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
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
            *("float4_e2m1fn_x2", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"),
            *("per_channel_symmetric", "per_channel_affine_float_qparams"),
        )
    ),
}
_ALLOWED = {(module, name): Global(module, name) for module, names in _NAMES.items() for name in names.split()}
_ORDERED = Global("collections", "OrderedDict")
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


class PickleFile(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


def loads(file: PickleFile, where: str, persistent: Callable[[Any], Any]) -> tuple[Any, list[TensorRef]]:
    """Read one pickle from where the file stands, up to its end.

    Args:
        where: the file, for messages.
        persistent: what a persistent id stands for.

    Returns:
        what was pickled, and every tensor in it.

    Raises:
        PickleError: it is not a pickle, or one of a form that torch doesn't write.
        RefusedError: it asks for classes or functions that aren't a checkpoint's.
        InputError: it holds something that cannot be read, by name.
    """
    machine = _Machine(where, persistent)
    try:
        return machine.run(file), machine.tensors
    except (ConvtoolError, PickleError):
        raise
    except IndexError:
        raise PickleError("its pickle takes more from its stack than is there") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError, EOFError) as error:
        raise PickleError(f"its pickle cannot be read ({str(error)[:100] or type(error).__name__})") from None


def storage_ref(pid: Any) -> StorageRef:
    """Return what a persistent id of torch's stands for; PickleError where it is of another form."""
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
        raise PickleError("its pickle refers to something that isn't a storage")
    _, cls, key, location, count, *view = pid
    if not (isinstance(cls, Global) and cls.module in _STORAGE_MODULES and isinstance(key, str)):
        raise PickleError("its pickle refers to a storage of a class that torch doesn't have")
    if not isinstance(location, str) or not is_size(count):
        raise PickleError(f"its pickle describes the storage {key!r} wrongly")
    dtype = (STORAGES | QUANTIZED | {"UntypedStorage": "uint8"}).get(cls.name)
    if dtype is None:
        raise PickleError(f"its pickle refers to a storage of class {cls}")
    ref = StorageRef(key, dtype, "" if cls.name == "UntypedStorage" else cls.name, location, count)
    if view and view[0] is not None:
        if not (isinstance(view[0], tuple) and len(view[0]) == 3 and is_size(view[0][1])):
            raise PickleError(f"its pickle describes the storage {key!r} wrongly")
        ref = replace(ref, start=view[0][1])
    return ref


def bare(value: Any) -> Any:
    """Return what a parameter wraps; anything else as it is."""
    if isinstance(value, Call) and value.function.module == "torch._utils" and value.function.name in PARAMETERS:
        return value.arguments[0] if value.arguments else None
    return value


def plain_tensor(value: Any) -> TensorRef | None:
    """Return the tensor that a value is, also where it is a parameter; None where it isn't one."""
    value = bare(value)
    return value if isinstance(value, TensorRef) else None


def why_unusable(value: Any) -> str | None:
    """Say what an entry is that is a tensor but not one of plain numbers, and what to do; None for all others."""
    value = bare(value)
    if isinstance(value, Call) and value.function.module in ("torch._utils", "torch._tensor"):
        return UNUSABLE.get(value.function.name)
    return None


def is_size(value: object) -> bool:
    """Tell whether a value can be a number of elements."""
    return type(value) is int and 0 <= value <= LARGEST


class _Machine:
    """The stack, the marks and the memo."""

    def __init__(self, where: str, persistent: Callable[[Any], Any]) -> None:
        self.where = where
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.tensors: list[TensorRef] = []

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
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
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
            if key in target:
                raise InputError(f"{self.where}: is damaged: a dict in its pickle has the key {key!r} twice")
            target[key] = value

    def dict_of(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleError("its pickle adds to something that isn't a set")
        target.update(items)

    def find(self, module: str, name: str) -> None:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise _refusal(self.where, module, name)
        self.push(found)

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("its pickle names a class by something that isn't text")
        self.find(module, name)

    def called(self, what: str) -> tuple[Global, tuple[Any, ...]]:
        """Return what is to be called, and with what."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not (isinstance(function, Global) and isinstance(arguments, tuple)):
            raise PickleError(f"its pickle {what}")
        return function, arguments

    def reduce(self, _: Any) -> None:
        self.push(self.made(*self.called("calls something that isn't a function")))

    def new(self, _: Any) -> None:
        self.push(Call(*self.called("makes an object of something that isn't a class"), new=True))

    def made(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        if function == _ORDERED:
            pairs = arguments[0] if arguments else []
            if not isinstance(pairs, list) or any(len(pair) != 2 for pair in pairs):
                raise PickleError("its pickle makes an OrderedDict of something that isn't a list of pairs")
            made = OrderedItems(dict(pairs))
            if len(made) != len(pairs):
                raise InputError(f"{self.where}: is damaged: an OrderedDict in its pickle has a key twice")
            return made
        if function.module == "torch._utils" and function.name in TENSORS:
            tensor = _tensor(function.name, arguments)
            self.tensors.append(tensor)
            return tensor
        return Call(function, arguments)

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Call | OrderedItems):
            raise PickleError("its pickle sets attributes of something that has none")
        target.state = state


def _tensor(function: str, arguments: tuple[Any, ...]) -> TensorRef:
    """Return the tensor that torch._utils' function of that name makes of these arguments."""
    storage, offset, shape, stride, *rest = arguments
    if not isinstance(storage, StorageRef):
        raise PickleError("its pickle makes a tensor of something that isn't a storage")
    shape, stride = (tuple(numbers_of(value)) for value in (shape, stride))
    if len(shape) > MOST_AXES:
        raise PickleError(f"its pickle holds a tensor of {len(shape)} axes")
    if not is_size(offset) or len(shape) != len(stride) or not all(map(is_size, (*shape, *stride))):
        raise PickleError("its pickle holds a tensor whose offset, shape or strides make no sense")
    least = {"_rebuild_tensor": 0, "_rebuild_tensor_v2": 2, "_rebuild_tensor_v3": 3}[function]
    if not least <= len(rest) <= least + (function != "_rebuild_tensor"):
        raise PickleError("its pickle makes a tensor of too few or too many things")
    dtype, requires_grad, hooks, metadata = storage.dtype, False, None, None
    if function == "_rebuild_tensor_v2":
        requires_grad, hooks, metadata = (*rest, None)[:3]
    elif function == "_rebuild_tensor_v3":
        requires_grad, hooks, given, metadata = (*rest, None)[:4]
        if not (isinstance(given, Global) and given.module == "torch" and given.name in ITEMSIZE):
            raise PickleError(f"its pickle holds a tensor of dtype {given}, which is not known")
        dtype = given.name
        if storage.typed and dtype != storage.dtype:  # torch reads storages without a dtype so, and no others
            raise PickleError(f"its pickle reads a storage of {storage.dtype} as {dtype}")
    if not storage.typed and function != "_rebuild_tensor_v3":
        raise PickleError("its pickle holds a tensor without a dtype")
    return TensorRef(storage, dtype, offset + storage.start, shape, stride, bool(requires_grad), hooks, metadata)


def numbers_of(value: Any) -> tuple[Any, ...]:
    """Return the numbers of a shape or of strides, unchecked; PickleError where it is nothing like either."""
    if isinstance(value, Call) and value.function == Global("torch", "Size") and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list):
        raise PickleError("its pickle holds a tensor whose shape isn't a tuple")
    return tuple(value)


def _refusal(where: str, module: str, name: str) -> ConvtoolError:
    asked = f"{module}.{name}"
    if module.startswith("torch.distributed"):
        return InputError(
            f"{where}: holds a distributed tensor ({asked}), of which each process saved its part; save the whole:"
            " tensor.full_tensor(), or torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if module.startswith("__torch__"):
        return InputError(f"{where}: is TorchScript; save its weights: torch.save(module.state_dict(), PATH)")
    if module.startswith("torch.nn.modules") or name in ("Sequential", "ModuleList") or module == "__main__":
        return RefusedError(
            f"{where}: its pickle asks for {asked}: a whole module was saved, that is code, and convtool runs no code"
            " from a checkpoint; save the state dict alone: torch.save(model.state_dict(), PATH)"
        )
    return RefusedError(
        f"{where}: its pickle asks for {asked}, that is code, and convtool runs no code from a checkpoint; save the"
        " state dict alone: torch.save(model.state_dict(), PATH)"
    )


def _pushes(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _push_mark(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make(machine.pop_mark()))


def _instance(machine: _Machine, argument: str) -> None:
    raise _refusal(machine.where, *argument.split(" ", 1))


_ARGUMENTS = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_ARGUMENTS, _Machine.push),
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
    "FROZENSET": _push_mark(frozenset),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.pop_mark()),
    "GLOBAL": lambda machine, argument: machine.find(*argument.split(" ", 1)),
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _instance,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.stack.pop())),
}
