"""Arrays of numpy in a pickle: which numbers they hold, and where. Nothing here needs numpy."""

from __future__ import annotations

import math
from typing import Any

from convtool.formats.dtypes import ITEMSIZE, STORAGE_CLASSES
from convtool.formats.pickle_values import Call, Global, OldText, StorageRef, TensorRef, is_size, numbers_of

_NUMBERS = {
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"{sign[:1] or 'i'}{size}": f"{sign}int{8 * size}" for sign in ("", "u") for size in (1, 2, 4, 8)},
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
}


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
    cls = STORAGE_CLASSES.get(dtype, "")
    storage = StorageRef(key, dtype if cls else "uint8", cls, "cpu", len(data) // (ITEMSIZE[dtype] if cls else 1))
    tensor = TensorRef.of(storage, dtype, shape)
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
