"""What a pickle says, as plain values: classes and functions by name, what would be called, storages and tensors.

`pickle_reader` makes them of a pickle and `pickle_writer` a pickle of them. None of them runs anything.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convtool.formats.dtypes import ITEMSIZE, MOST_AXES, OF_NUMPY, STORAGE_CLASSES, STORAGES, is_size

QUANTIZED = {"QInt8Storage": "int8", "QUInt8Storage": "uint8", "QInt32Storage": "int32"}  # classes, by what they hold

ARRAY = "\0array "  # how the keys of storages begin that are arrays of numpy
INSIDE = "\0inside "  # and of those whose bytes stand in the pickle


class PickleError(Exception):
    """The bytes are not a pickle such as torch writes; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


ORDERED = Global("collections", "OrderedDict")
ENCODE = Global("_codecs", "encode")  # what makes bytes of a text, in the older protocols


class Unusable(str):
    """A tensor that can't be computed with: what it is, and what to do."""

    __slots__ = ()


class OldText(str):
    """A text of Python 2, which is bytes; each character is one."""

    __slots__ = ()


@dataclass(slots=True, eq=False, repr=False)  # may hold itself, or one thing 2**60 times
class Call:
    """What a call would have made.

    Attributes:
        function: what would be called: a `Global`, or what another call would have made.
        arguments: with what.
        opcode: that says how.
        appended: what is put into it in order afterwards.
        items: what is put into it by key afterwards.
        state: what its attributes are set from afterwards; None for nothing.
        then: calls that are made for what they do to it.
        tensor: the plain numbers that it holds, where it is a tensor or an array.
        remembered: whether its pickle has a name for it, by which it can be met again.
    """

    function: Any
    arguments: tuple[Any, ...]
    opcode: bytes = pickle.REDUCE
    appended: list[Any] = field(default_factory=list)
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None
    then: list[Call] = field(default_factory=list)
    tensor: TensorRef | None = None
    remembered: bool = False

    def calls(self, *modules: str) -> str:
        """Return the name of the function that is called, where it is one of these modules; else ''."""
        function = self.function
        return function.name if isinstance(function, Global) and function.module in modules else ""


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

    @classmethod
    def of(cls, key: str, dtype: str, nbytes: int, location: str = "cpu") -> StorageRef:
        """Return a storage of so many bytes; one without a dtype where torch has no class for it."""
        name = STORAGE_CLASSES.get(dtype, "")
        stored = dtype if name else "uint8"
        return cls(key, stored, name, location, nbytes // ITEMSIZE[stored])

    @property
    def typed(self) -> bool:
        return bool(self.cls)

    @property
    def is_array(self) -> bool:
        """Whether its bytes are those of an array of numpy, in the pickle."""
        return self.key.startswith(ARRAY)

    @property
    def nbytes(self) -> int:
        return self.count * ITEMSIZE[self.dtype]


@dataclass(slots=True, eq=False)
class TensorRef:
    """A tensor: which elements of which storage; offset and strides in elements.

    Attributes:
        metadata: torch's bits for conjugate and negative.
    """

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    hooks: Any = None
    metadata: dict[str, bool] | None = None

    @classmethod
    def of(cls, storage: StorageRef, dtype: str, shape: tuple[int, ...]) -> TensorRef:
        """Return the tensor that a storage holds, row after row."""
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(storage, dtype, 0, shape, stride)

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
        steps = self.of(self.storage, self.dtype, self.shape).stride
        return all(size == 1 or own == step for size, own, step in zip(self.shape, self.stride, steps, strict=True))


# Functions that make a tensor of a storage, with what they are given behind offset, shape and strides.
_REST: dict[str, tuple[str, ...]] = {
    "_rebuild_tensor": (),
    "_rebuild_tensor_v2": ("requires_grad", "hooks", "metadata"),
    "_rebuild_tensor_v3": ("requires_grad", "hooks", "dtype", "metadata"),
}
TENSORS = set(_REST)
PARAMETERS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
# Classes that a tensor with attributes may have and still be one of plain numbers.
PLAIN_CLASSES = {
    *(Global("torch", "Tensor"), Global("torch._tensor", "Tensor")),
    *(Global("torch.nn.parameter", "Parameter"), Global("torch.nn.parameter", "Buffer")),
}
# Tensors without plain numbers, which can be passed on but not computed with: what they are, and what to do.
SPARSE = "is sparse; save it dense: tensor.to_dense()"
_OTHER_DEVICE = "was saved from a device that torch has no storages of; save it after .cpu()"
_SUBCLASS = "is of a tensor subclass; save the plain tensor that it stands for"
_DISTRIBUTED = (
    "is a distributed tensor, of which each process saved its part; save the whole: tensor.full_tensor(), or"
    " torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
)
_INSIDE = "was pickled with its numbers inside of the pickle; load the file and save it with torch.save"
UNUSABLE = {
    "_rebuild_qtensor": "is quantized; save it dequantized: tensor.dequantize()",
    "_rebuild_sparse_tensor": SPARSE,
    "_rebuild_sparse_csr_tensor": SPARSE,
    "_rebuild_nested_tensor": "is a nested tensor; save its parts as tensors of their own",
    "_rebuild_meta_tensor_no_storage": "is on the meta device and holds no numbers; load the weights before saving",
    "_rebuild_device_tensor_from_numpy": _OTHER_DEVICE,
    "_rebuild_device_tensor_from_cpu_tensor": _OTHER_DEVICE,
    "_rebuild_wrapper_subclass": _SUBCLASS,
    "_rebuild_from_type_v2": _SUBCLASS,
    **dict.fromkeys(TENSORS, _INSIDE),
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


def storage_ref(pid: Any) -> StorageRef:
    """Return what a persistent id of torch's stands for; PickleError where it is of another form."""
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
        raise PickleError("its pickle refers to something that isn't a storage")
    _, cls, key, location, count, *view = pid
    if not (isinstance(cls, Global) and cls.module in _STORAGE_MODULES and isinstance(key, str)) or key[:1] == "\0":
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
    if isinstance(value, Call) and value.calls("torch._utils") in PARAMETERS:
        return value.arguments[0] if value.arguments else None
    return value


def plain_tensor(value: Any) -> TensorRef | None:
    """Return the tensor of plain numbers that a value is: bare, as a parameter, or with attributes; else None."""
    value = bare(value)
    if isinstance(value, Call):
        return value.tensor
    return value if isinstance(value, TensorRef) else None


def why_unusable(value: Any) -> str | None:
    """Say what an entry is that is a tensor but not one of plain numbers, and what to do; None for all others."""
    value = bare(value)
    if isinstance(value, Unusable):
        return value
    if not isinstance(value, Call) or value.tensor is not None:
        return None
    classes = [one for one in (value.function, *value.arguments[:2]) if isinstance(one, Global)]
    names = ("DTensor", "ShardedTensor")
    if any(one.module.startswith("torch.distributed") and one.name in names for one in classes):
        return _DISTRIBUTED
    reason = UNUSABLE.get(value.calls("torch._utils", "torch._tensor"))
    if reason is _SUBCLASS and len(classes) > 1:
        return f"is of the tensor subclass {classes[-1]}; save the plain tensor that it stands for"
    return reason


def describe(value: Any) -> str:
    """Say what a value is, in a few words."""
    if isinstance(value, Call):
        return f"an object of {value.function}" if isinstance(value.function, Global) else "an object"
    if isinstance(value, dict | list | tuple | set | frozenset):
        return f"a {'dict' if isinstance(value, dict) else type(value).__name__} of {len(value)}"
    if isinstance(value, TensorRef):
        return "a tensor"
    return "None" if value is None else f"a value of type {'str' if isinstance(value, str) else type(value).__name__}"


def make_tensor(function: str, arguments: tuple[Any, ...]) -> TensorRef:
    """Return the tensor that torch._utils' function of that name makes of these arguments."""
    storage, offset, shape, stride, *rest = arguments
    names = _REST[function]
    if not isinstance(storage, StorageRef):
        raise PickleError("its pickle makes a tensor of something that isn't a storage")
    shape, stride = (tuple(numbers_of(value)) for value in (shape, stride))
    if not is_size(offset) or len(shape) != len(stride) or not all(map(is_size, (*shape, *stride))):
        raise PickleError("its pickle holds a tensor whose offset, shape or strides make no sense")
    if len(rest) not in (len(names), len(names) - 1):  # the metadata are new
        raise PickleError("its pickle makes a tensor of too few or too many things")
    said = dict(zip(names, rest, strict=False))
    dtype, metadata = storage.dtype, said.get("metadata")
    if "dtype" in said:
        given = said["dtype"]
        if not (isinstance(given, Global) and given.module == "torch" and given.name in ITEMSIZE):
            raise PickleError(f"its pickle holds a tensor of {describe(given)} as dtype, which is not known")
        dtype = given.name
        if storage.typed and dtype != storage.dtype:  # torch reads storages without a dtype so, and no others
            raise PickleError(f"its pickle reads a storage of {storage.dtype} as {dtype}")
    elif not storage.typed:
        raise PickleError("its pickle holds a tensor without a dtype")
    if metadata is not None and not (
        isinstance(metadata, dict) and all(key in ("conj", "neg") and type(metadata[key]) is bool for key in metadata)
    ):
        raise PickleError("its pickle holds a tensor with metadata that are not known")
    grad = bool(said.get("requires_grad"))
    return TensorRef(storage, dtype, offset + storage.start, shape, stride, grad, said.get("hooks"), metadata)


def numbers_of(value: Any) -> tuple[Any, ...]:
    """Return the numbers of a shape or of strides, unchecked; PickleError where it is nothing like either."""
    if isinstance(value, Call) and value.function == Global("torch", "Size") and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list):
        raise PickleError("its pickle holds a tensor whose shape isn't a tuple")
    if len(value) > MOST_AXES:
        raise PickleError(f"its pickle holds a tensor of {len(value)} axes")
    return tuple(value)


# Arrays of numpy

_NUMBERS = {code[1:]: name for code, name in OF_NUMPY.items()}


def read_array(call: Call, key: str) -> tuple[TensorRef, bytes] | None:
    """Return the numbers of an array and their bytes; None of whatever isn't one of little-endian numbers.

    Args:
        key: what its storage is to be called.
    """
    parts = _parts(call)
    if parts is None:
        return None
    data, dtype_of, shape_of, by_columns = parts
    dtype = _dtype(dtype_of)
    if isinstance(data, OldText):
        data = data.encode("latin-1")
    if dtype is None or not isinstance(data, bytes | bytearray) or not isinstance(shape_of, tuple | list | Call):
        return None
    shape = numbers_of(shape_of)
    if not all(map(is_size, shape)) or math.prod(shape) * ITEMSIZE[dtype] != len(data):
        return None
    tensor = TensorRef.of(StorageRef.of(key, dtype, len(data)), dtype, shape)
    if by_columns:
        tensor.stride = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return tensor, bytes(data)


def _parts(call: Call) -> tuple[Any, Any, Any, bool] | None:
    """Return data, dtype, shape and whether columns come first, as one of numpy's two ways to pickle has them."""
    if call.calls("numpy.core.multiarray", "numpy._core.multiarray") == "_reconstruct":
        cls = call.arguments[0] if call.arguments else None
        if cls == Global("numpy", "ndarray") and isinstance(call.state, tuple) and len(call.state) == 5:
            _, shape, dtype, by_columns, data = call.state
            return data, dtype, shape, bool(by_columns)
    elif call.calls("numpy.core.numeric", "numpy._core.numeric") == "_frombuffer" and len(call.arguments) == 4:
        data, dtype, shape, order = call.arguments
        return data, dtype, shape, order == "F"
    return None


def _dtype(value: Any) -> str | None:
    """Return torch's name of a dtype of numpy; None for one that isn't plain little-endian numbers."""
    if not (isinstance(value, Call) and value.calls("numpy") == "dtype" and value.arguments):
        return None
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "|"
    code = value.arguments[0]
    return _NUMBERS.get(code) if isinstance(code, str) and order in ("<", "|", "=") else None
