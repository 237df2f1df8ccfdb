"""The numbers that files hold, without torch: names, sizes, and what each format calls them."""

from __future__ import annotations

# By torch's name of a dtype: bytes per element, what .safetensors calls it, the class that torch pickles a storage of
# it as (one without goes as an UntypedStorage), what numpy's files call it, and its number in exported programs.
_DTYPES: dict[str, tuple[int, str | None, str | None, str | None, int | None]] = {
    "float64": (8, "F64", "DoubleStorage", "<f8", 8),
    "float32": (4, "F32", "FloatStorage", "<f4", 7),
    "float16": (2, "F16", "HalfStorage", "<f2", 6),
    "bfloat16": (2, "BF16", "BFloat16Storage", None, 13),
    "int64": (8, "I64", "LongStorage", "<i8", 5),
    "int32": (4, "I32", "IntStorage", "<i4", 4),
    "int16": (2, "I16", "ShortStorage", "<i2", 3),
    "int8": (1, "I8", "CharStorage", "|i1", 2),
    "uint64": (8, "U64", None, "<u8", 35),
    "uint32": (4, "U32", None, "<u4", 34),
    "uint16": (2, "U16", None, "<u2", 28),
    "uint8": (1, "U8", "ByteStorage", "|u1", 1),
    "bool": (1, "BOOL", "BoolStorage", "|b1", 12),
    "float8_e4m3fn": (1, "F8_E4M3", None, None, 29),
    "float8_e5m2": (1, "F8_E5M2", None, None, 30),
    "float8_e4m3fnuz": (1, "F8_E4M3FNUZ", None, None, 31),
    "float8_e5m2fnuz": (1, "F8_E5M2FNUZ", None, None, 32),
    "float8_e8m0fnu": (1, "F8_E8M0", None, None, 33),
    "float4_e2m1fn_x2": (1, "F4", None, None, None),  # two numbers in a byte, which torch counts as one
    "complex32": (4, None, None, None, 9),
    "complex64": (8, "C64", "ComplexFloatStorage", "<c8", 10),
    "complex128": (16, None, "ComplexDoubleStorage", "<c16", 11),
}
ITEMSIZE = {name: row[0] for name, row in _DTYPES.items()}
SAFETENSORS_CODES = {name: row[1] for name, row in _DTYPES.items() if row[1] is not None}
SAFETENSORS = {code: name for name, code in SAFETENSORS_CODES.items()}
STORAGE_CLASSES = {name: row[2] for name, row in _DTYPES.items() if row[2] is not None}
STORAGES = {cls: name for name, cls in STORAGE_CLASSES.items()}
NUMPY = {name: row[3] for name, row in _DTYPES.items() if row[3] is not None}
OF_NUMPY = {code: name for name, code in NUMPY.items()}
EXPORTED = {row[4]: name for name, row in _DTYPES.items() if row[4] is not None}

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})

MOST_AXES = 64  # of a tensor, as of an array of numpy; a hostile header could have millions
# How much larger than the file a tensor of repeated elements may be, so that no small file fills the memory.
REPEATED, ROOM = 16, 1 << 24
LARGEST = 2**63 - 1  # what torch counts with


def is_size(value: object) -> bool:
    """Tell whether a value can be a number of elements, or of bytes."""
    return type(value) is int and 0 <= value <= LARGEST
