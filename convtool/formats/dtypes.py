"""The numbers that files hold, without torch: names, sizes, and what each format calls them."""

from __future__ import annotations

# By torch's name of a dtype: bytes per element, what .safetensors calls it, the class that torch pickles a storage of
# it as (one without goes as an UntypedStorage), and what numpy's files call it.
_DTYPES: dict[str, tuple[int, str | None, str | None, str | None]] = {
    "float64": (8, "F64", "DoubleStorage", "<f8"),
    "float32": (4, "F32", "FloatStorage", "<f4"),
    "float16": (2, "F16", "HalfStorage", "<f2"),
    "bfloat16": (2, "BF16", "BFloat16Storage", None),
    "int64": (8, "I64", "LongStorage", "<i8"),
    "int32": (4, "I32", "IntStorage", "<i4"),
    "int16": (2, "I16", "ShortStorage", "<i2"),
    "int8": (1, "I8", "CharStorage", "|i1"),
    "uint64": (8, "U64", None, None),
    "uint32": (4, "U32", None, None),
    "uint16": (2, "U16", None, None),
    "uint8": (1, "U8", "ByteStorage", "|u1"),
    "bool": (1, "BOOL", "BoolStorage", None),
    "float8_e4m3fn": (1, "F8_E4M3", None, None),
    "float8_e5m2": (1, "F8_E5M2", None, None),
    "float8_e4m3fnuz": (1, "F8_E4M3FNUZ", None, None),
    "float8_e5m2fnuz": (1, "F8_E5M2FNUZ", None, None),
    "float8_e8m0fnu": (1, "F8_E8M0", None, None),
    "float4_e2m1fn_x2": (1, "F4", None, None),  # two numbers in a byte, which torch counts as one
    "complex32": (4, None, None, None),
    "complex64": (8, "C64", "ComplexFloatStorage", "<c8"),
    "complex128": (16, None, "ComplexDoubleStorage", "<c16"),
}
ITEMSIZE = {name: row[0] for name, row in _DTYPES.items()}
SAFETENSORS_CODES = {name: row[1] for name, row in _DTYPES.items() if row[1] is not None}
SAFETENSORS = {code: name for name, code in SAFETENSORS_CODES.items()}
STORAGE_CLASSES = {name: row[2] for name, row in _DTYPES.items() if row[2] is not None}
STORAGES = {cls: name for name, cls in STORAGE_CLASSES.items()}
NUMPY = {name: row[3] for name, row in _DTYPES.items() if row[3] is not None}

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})

MOST_AXES = 64  # of a tensor, as of an array of numpy; a hostile header could have millions
LARGEST = 2**63 - 1  # what torch counts with
