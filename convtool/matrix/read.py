"""Opening matrix files: read in parts where the format allows, so that one larger than memory can be gone through.

`open_matrix` reads what the formats of this package write, and what scipy, numpy and torch write in the same formats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from convtool.errors import ConvtoolError, InputError, UsageError
from convtool.formats import CHECKPOINTS, checkpoint_format
from convtool.formats.indexes import INDEX_SUFFIX, is_matrix_index, read_matrix_index
from convtool.formats.matrices import ARRAYS, Found
from convtool.formats.resources import asked
from convtool.formats.source import Array, File
from convtool.matrix import FORMATS
from convtool.matrix.file import MatrixFile, Part

__all__ = ["MatrixFile", "is_matrix_file", "load_matrix", "open_matrix"]

Kind: TypeAlias = Literal["torch", "scipy"]

_SEARCHED = 1 << 20  # row numbers of a coo file looked at together


def open_matrix(path: str | Path) -> MatrixFile:
    """Open a matrix file: .npz, .npy, .mtx, .safetensors or .pt, or the index of one in shards.

    .safetensors, .npy, .pt and what isn't deflated in .npz is read in parts; .mtx is read by scipy, all of it.
    The checksums of .npz and .pt are checked, which reads the file once.

    Raises:
        InputError: the file is missing, damaged, or holds no matrix.
        RefusedError: it is a pickle that holds code.
        UsageError: a suffix of none of these, or scipy isn't installed.

    >>> import tempfile, numpy, convtool
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.save(f"{folder}/matrix.npy", numpy.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    ...     matrix = convtool.open_matrix(f"{folder}/matrix.npy")
    ...     matrix.shape, matrix.layout, matrix.bias, matrix.rows(0, 1).indices
    ((2, 3), 'dense', None, tensor([0, 2]))
    """
    path = Path(path)
    return _open_index(path) if _is_index(path) else _open_file(path)


def is_matrix_file(path: str | Path) -> bool:
    """Tell whether the file is a matrix and not a checkpoint, as far as its suffix, its record or its arrays' names do.

    A dense matrix in .safetensors or .pt is a checkpoint as well, of one linear layer; the record makes the difference.
    False where the file cannot be read: what is wrong with it is for its reader to say.
    """
    path = Path(path)
    try:
        if _is_index(path):
            return is_matrix_index(path)
        if path.suffix not in FORMATS or path.suffix not in CHECKPOINTS:
            return path.suffix in FORMATS
        return checkpoint_format(path.suffix).is_matrix(File(path))
    except (ConvtoolError, ValueError):  # ValueError: a name that no file can have
        return False


def load_matrix(path: str | Path, kind: Kind = "torch") -> Any:
    """Return the matrix in a file, as torch or scipy has it; `open_matrix` gives its bias, its record, and parts of it.

    Args:
        path: a .npz, .npy, .mtx, .safetensors or .pt file.
        kind: "torch" for a sparse CSR, sparse COO or dense tensor, as the file has it; "scipy" for a csr_array or
            coo_array. Both stand on the file, mapped into memory, where the format allows (.safetensors always): as
            long as they are used, the file has to stay as it is, and a program that cuts it short ends this one.

    Raises:
        InputError: the file is missing, damaged, or holds no matrix.
        UsageError: another kind of file, or scipy is needed and not installed.
        RefusedError: scipy doesn't have that dtype.
    """
    if kind not in ("torch", "scipy"):
        raise UsageError(f"kind: expected 'torch' or 'scipy', got {kind!r}")
    opened = open_matrix(path)
    return opened.to_scipy() if kind == "scipy" else opened.to_torch()


def _is_index(path: Path) -> bool:
    return path.name.endswith(f".safetensors{INDEX_SUFFIX}")


def _open_file(path: Path) -> MatrixFile:
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: expected a matrix file, a name that ends in {', '.join(FORMATS)}")
    with asked(path, "read", InputError):
        if not path.is_file():
            raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    return _checked(path, FORMATS[path.suffix].read_matrix(File(path)))


def _open_index(path: Path) -> MatrixFile:
    index = read_matrix_index(path)
    shards: list[MatrixFile] = []
    end = 0
    for name, start, stop in index.shards:
        shard = _open_file(path.with_name(name))
        if (start, stop) != (end, end + shard.shape[0]) or shard.shape[1] != index.shape[1]:
            raise InputError(f"{path}: {name} isn't rows {start}:{stop} of a matrix of shape {index.shape}")
        end = stop
        shards.append(shard)
    if end != index.shape[0] or len({(shard.layout, shard.dtype) for shard in shards}) != 1:
        raise InputError(f"{path}: the shards it names aren't the whole of a matrix of shape {index.shape}")
    biases = [shard.bias for shard in shards if shard.bias is not None]
    if index.record is not None and index.record.get("transpose"):
        biases = biases[:1]  # each shard has all of it
    parts = tuple(part for shard in shards for part in shard.parts)
    return MatrixFile(path, index.shape, parts, torch.cat(biases) if biases else None, index.record)


def _checked(path: Path, found: Found) -> MatrixFile:
    """Return what a reader found as a matrix, checked as far as that takes no going through it."""
    arrays = found.arrays
    layout = next((layout for layout, names in ARRAYS.items() if set(names) <= set(arrays)), None)
    if layout is None:
        wanted = "; or ".join(f"{', '.join(names)} ({layout})" for layout, names in ARRAYS.items())
        got = ", ".join(sorted(arrays)) or "none"
        raise InputError(f"{path}: holds no matrix: expected arrays {wanted}; got {got}")
    parts = {name: arrays[name] for name in ARRAYS[layout]}
    values = parts[ARRAYS[layout][-1]]
    if layout == "dense":
        if len(values.shape) != 2:
            raise InputError(f"{path}: holds no matrix: expected an array of 2 axes, got shape {tuple(values.shape)}")
        shape = (values.shape[0], values.shape[1])
    else:
        shape = _shape(path, arrays.get("shape"))
        lengths = [len(part) if len(part.shape) == 1 else -1 for part in parts.values()]
        nnz = values.numel()
        if lengths != [shape[0] + 1 if layout == "csr" else nnz, nnz, nnz]:
            raise InputError(
                f"{path}: the matrix is damaged: {', '.join(parts)} of lengths {lengths} don't make"
                f" a {layout} matrix of shape {shape}"
            )
        for name in ARRAYS[layout][:2]:
            if parts[name].dtype not in (torch.int32, torch.int64):
                raise InputError(f"{path}: {name}: expected int32 or int64, got {parts[name].dtype}")
    if layout == "coo":
        parts = _in_order(parts)
        row = parts["row"]
        if len(row) and not 0 <= int(row[:1]) <= int(row[len(row) - 1 :]) < shape[0]:
            raise InputError(f"{path}: the matrix is damaged: entries name rows that it doesn't have")
    try:
        noted = None if found.record is None else json.loads(found.record)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: the record of what was done is not JSON") from None
    part = Part(path, layout, shape, parts)
    bias = arrays["bias"][:] if "bias" in arrays else None
    return MatrixFile(path, shape, (part,), bias, noted if isinstance(noted, dict) else None, found.digits)


def _shape(path: Path, stored: Array | None) -> tuple[int, int]:
    numbers = [] if stored is None or tuple(stored.shape) != (2,) else stored[:].tolist()
    if len(numbers) != 2 or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise InputError(f"{path}: holds no sparse matrix: expected a shape of 2 numbers")
    return numbers[0], numbers[1]


def _in_order(parts: dict[str, Array]) -> dict[str, Array]:
    """Return a coo matrix's arrays in the order of its rows: as they are where it is convtool's."""
    row = parts["row"]
    steps = range(0, len(row), _SEARCHED)
    if all(bool((row[at : at + _SEARCHED + 1].diff() >= 0).all()) for at in steps):
        return parts
    order = torch.argsort(row[:], stable=True)
    return {name: part[:][order] for name, part in parts.items()}
