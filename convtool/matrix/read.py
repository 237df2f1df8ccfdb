"""Opening matrix files: mapped where the format allows, so that a matrix larger than memory can be gone through.

`open_matrix` reads what the formats of this package write, and what scipy, numpy and torch write in the same formats.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from convtool.errors import InputError, UsageError
from convtool.matrix import FORMATS
from convtool.matrix.contents import RECORD_NAME
from convtool.matrix.file import MatrixFile, ShardedMatrix
from convtool.matrix.reading import ARRAYS

__all__ = ["MatrixFile", "is_matrix_file", "load_matrix", "open_matrix"]

Kind: TypeAlias = Literal["torch", "scipy"]

INDEX_SUFFIX = ".safetensors.index.json"  # of a matrix in shards

_SEARCHED = 1 << 20  # row numbers of a coo file looked at together


def open_matrix(path: str | Path) -> MatrixFile:
    """Open a matrix file: .npz, .npy, .mtx, .safetensors or .pt, or the index of one in shards.

    .safetensors, .npy, .pt and what isn't deflated in .npz is mapped into memory; of .mtx lines are read when they are
    asked for, where they stand in the order of rows. Opening one goes through it once.
    The checksums of .npz and .pt are checked, which reads the file once.

    Raises:
        InputError: the file is missing, damaged, or holds no matrix.
        UsageError: a suffix of none of these.

    >>> import tempfile, numpy, convtool
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.save(f"{folder}/matrix.npy", numpy.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    ...     matrix = convtool.open_matrix(f"{folder}/matrix.npy")
    ...     matrix.shape, matrix.layout, matrix.bias, matrix.rows(0, 1).indices
    ((2, 3), 'dense', None, tensor([0, 2]))
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: expected a matrix file, a name that ends in {', '.join(FORMATS)}")
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        found = FORMATS[path.suffix].read(path)
        return found if isinstance(found, MatrixFile) else _checked(path, *found)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def is_matrix_file(path: str | Path) -> bool:
    """Whether the file is a matrix and not a checkpoint, as far as its suffix, its record or its arrays' names tell.

    A dense matrix in .safetensors or .pt is a checkpoint as well, of one linear layer; the record makes the difference.
    False where the file cannot be read: what is wrong with it is for its reader to say.
    """
    path = Path(path)
    if path.suffix in (".npz", ".npy", ".mtx"):
        return True
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return "shards" in json.loads(path.read_bytes())
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="np") as opened:
                names = set(opened.keys())
                return RECORD_NAME in (opened.metadata() or {}) or set(ARRAYS["csr"]) <= names
        if path.suffix == ".pt" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/extra/{RECORD_NAME}.json") for name in archive.namelist())
    except Exception:  # a damaged file may raise anything
        return False
    return False


def load_matrix(path: str | Path, kind: Kind = "torch") -> Any:
    """The matrix in a file, as torch or scipy has it; see `open_matrix` for its bias, its record, and parts of it.

    Args:
        path: a .npz, .npy, .mtx, .safetensors or .pt file.
        kind: "torch" for a sparse CSR, sparse COO or dense tensor, as the file has it; "scipy" for a csr_array or
            coo_array. Both stand on the mapped file where the format allows (.safetensors always).

    Raises:
        InputError: the file is missing, damaged, or holds no matrix.
        UsageError: another kind of file, or scipy is needed and not installed.
        RefusedError: scipy doesn't have that dtype.
    """
    if kind not in ("torch", "scipy"):
        raise UsageError(f"kind: expected 'torch' or 'scipy', got {kind!r}")
    opened = open_matrix(path)
    return opened.to_scipy() if kind == "scipy" else opened.to_torch()


def _open_index(path: Path) -> ShardedMatrix:
    try:
        index = json.loads(path.read_bytes())
        shape = (int(index["shape"][0]), int(index["shape"][1]))
        named = [(str(one["file"]), int(one["rows"][0]), int(one["rows"][1])) for one in index["shards"]]
        record = index.get(RECORD_NAME)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; without its index a matrix in shards isn't whole") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, OverflowError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
        raise InputError(f"{path}: isn't the index of a matrix in shards, or is damaged") from None
    shards = []
    end = 0
    for name, first, last in named:
        if Path(name).name != name or Path(name).suffix != ".safetensors" or "\0" in name:
            raise InputError(f"{path}: names {name!r}, which isn't a .safetensors file beside it")
        shard = open_matrix(path.with_name(name))
        if (first, last) != (end, end + shard.shape[0]) or shard.shape[1] != shape[1]:
            raise InputError(f"{path}: {name} isn't rows {first}:{last} of a matrix of shape {shape}")
        end = last
        shards.append(shard)
    if end != shape[0] or len({(shard.layout, shard.dtype) for shard in shards}) != 1:
        raise InputError(f"{path}: the shards it names aren't the whole of a matrix of shape {shape}")
    noted = record if isinstance(record, dict) else None
    biases = [shard.bias for shard in shards if shard.bias is not None]
    bias = (
        biases[0] if biases and noted is not None and noted.get("transpose") else torch.cat(biases) if biases else None
    )
    ends = tuple(last for _, _, last in named)
    return ShardedMatrix(path, shards[0].layout, shape, {}, bias, noted, tuple(shards), ends)


def _checked(path: Path, arrays: dict[str, Tensor], record: str | None) -> MatrixFile:
    """What a reader found as a matrix, as far as that can be said without going through it."""
    layout = next((layout for layout, names in ARRAYS.items() if set(names) <= set(arrays)), None)
    if layout is None:
        wanted = "; or ".join(f"{', '.join(names)} ({layout})" for layout, names in ARRAYS.items())
        found = ", ".join(sorted(arrays)) or "none"
        raise InputError(f"{path}: holds no matrix: expected arrays {wanted}; got {found}")
    parts = {name: arrays[name] for name in ARRAYS[layout]}
    values = parts[ARRAYS[layout][-1]]
    if layout == "dense":
        if values.dim() != 2:
            raise InputError(f"{path}: holds no matrix: expected an array of 2 axes, got shape {tuple(values.shape)}")
        shape = (values.shape[0], values.shape[1])
    else:
        shape = _shape(path, arrays.get("shape"))
        lengths = [len(part) if part.dim() == 1 else -1 for part in parts.values()]
        wanted_lengths = [shape[0] + 1 if layout == "csr" else len(values), len(values), len(values)]
        if values.dim() != 1 or lengths != wanted_lengths:
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
        if len(row) and not 0 <= int(row[0]) <= int(row[-1]) < shape[0]:
            raise InputError(f"{path}: the matrix is damaged: entries name rows that it doesn't have")
    try:
        noted = None if record is None else json.loads(record)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: the record of what was done is not JSON") from None
    return MatrixFile(path, layout, shape, parts, arrays.get("bias"), noted if isinstance(noted, dict) else None)


def _shape(path: Path, stored: Tensor | None) -> tuple[int, int]:
    if stored is None or stored.shape != (2,) or int(stored.min()) < 0:
        raise InputError(f"{path}: holds no sparse matrix: expected a shape of 2 numbers")
    return int(stored[0]), int(stored[1])


def _in_order(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A coo matrix's arrays in the order of its rows, as convtool writes them; others are brought into it."""
    row = parts["row"]
    steps = range(0, len(row), _SEARCHED)
    if all(bool((row[at : at + _SEARCHED + 1].diff() >= 0).all()) for at in steps):
        return parts
    order = torch.argsort(row, stable=True)
    return {name: part[order] for name, part in parts.items()}
