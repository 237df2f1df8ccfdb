"""Index files, of both kinds: of a checkpoint in several files (Hugging Face's), and of a matrix in shards.

Both are JSON that names files in its own folder. A checkpoint's says in `weight_map` which file has which tensor, and
keeps convtool's record in its `metadata`; a matrix's says in `shards` which file has which rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from convtool.errors import InputError
from convtool.formats.dtypes import LARGEST, is_size
from convtool.formats.matrices import RECORD_NAME
from convtool.formats.resources import asked
from convtool.formats.source import File
from convtool.formats.strict_json import parse_json

INDEX_SUFFIX = ".index.json"
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
RECORD_KEY = "convtool"
MAX_INDEX = 100_000_000  # bytes, as of a safetensors header
MATRIX_SCHEMA = 1


def is_index(name: str) -> bool:
    """Tell whether a file of that name is an index, maybe one of a variant: model.safetensors.index.fp16.json."""
    return _INDEX.search(name) is not None


def plain_index(name: str) -> str:
    """Return an index's name without its variant."""
    return _INDEX.sub(INDEX_SUFFIX, name)


def read_index(path: Path) -> dict[str, Any]:
    """Return a checkpoint's index, checked; the names in it are not yet those of files that may be opened.

    Raises:
        InputError: it is missing, or not an index.
    """
    index = _document(path)
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(homes, dict) or not all(isinstance(home, str) for home in homes.values()):
        raise InputError(f"{path}: is not an index: expected a weight_map from names of tensors to names of files")
    if not isinstance(index.setdefault("metadata", {}), dict):
        raise InputError(f"{path}: is damaged: its metadata is not a table")
    total = index["metadata"].get("total_size", 0)
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 <= total <= LARGEST:  # nor NaN
        raise InputError(f"{path}: is damaged: its total_size is {total!r:.80}, not a number of bytes")
    if not homes:
        raise InputError(f"{path}: names no tensors")
    return dict(index)


def index_text(index: Mapping[str, Any], homes: Mapping[str, str], total: int, record: str | None) -> bytes:
    """Return the index of a checkpoint whose tensors are `total` bytes.

    Args:
        index: an older one, whose metadata stay.
        homes: the file of each tensor.
    """
    metadata = {**index.get("metadata", {}), "total_size": total}
    metadata.pop(RECORD_KEY, None)
    if record is not None:
        metadata[RECORD_KEY] = record
    return (json.dumps({"metadata": metadata, "weight_map": homes}, indent=2) + "\n").encode()


class Shard(NamedTuple):
    """A file with rows start:stop of a matrix."""

    file: str
    start: int
    stop: int


class MatrixIndex(NamedTuple):
    """What the index of a matrix says: its shape, its shards in order, and what was done."""

    shape: tuple[int, int]
    shards: tuple[Shard, ...]
    record: dict[str, Any] | None


def read_matrix_index(path: Path) -> MatrixIndex:
    """Return the index of a matrix in shards; that the shards are the whole of it is not checked.

    Raises:
        InputError: it is missing, not an index, or names files elsewhere.
    """
    index = _document(path, "; without its index a matrix in shards isn't whole")
    try:
        rows, columns = map(_size, index["shape"])
        shards = tuple(Shard(str(one["file"]), *map(_size, one["rows"])) for one in index["shards"])
        sizes = {str(one["file"]): _size(one["bytes"]) for one in index["shards"]}
        total = _size(index["metadata"]["total_size"])
        record = index.get(RECORD_NAME)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: isn't the index of a matrix in shards, or is damaged") from None
    for name, _, _ in shards:
        if not is_plain_name(name) or "/" in name or Path(name).suffix != ".safetensors":
            raise InputError(f"{path}: names {name!r}, which isn't a .safetensors file beside it")
        if path.with_name(name).is_file() and path.with_name(name).stat().st_size != sizes[name]:
            raise InputError(f"{path}: is damaged, or {name} is, which has another size than the index says")
    if total != sum(sizes.values()):
        raise InputError(
            f"{path}: is damaged: its total_size is {total}, and its shards have {sum(sizes.values())} bytes"
        )
    return MatrixIndex((rows, columns), shards, record if isinstance(record, dict) else None)


def matrix_index_text(index: MatrixIndex, nnz: int, sizes: Sequence[int]) -> bytes:
    """Return the index of a matrix whose shards are files of these sizes in bytes."""
    document = {
        "metadata": {"total_size": sum(sizes), "format": "convtool matrix"},
        "schema": MATRIX_SCHEMA,
        "shape": index.shape,
        "nnz": nnz,
        "shards": [
            {"file": file, "rows": [start, stop], "bytes": size}
            for (file, start, stop), size in zip(index.shards, sizes, strict=True)
        ],
        RECORD_NAME: index.record,
    }
    return json.dumps(document, indent=1).encode("ascii") + b"\n"


def named_beside(index: Path) -> set[str]:
    """Return the files in its folder that an index of either kind names; none where it isn't there, or is damaged.

    Raises:
        InputError: it cannot be read.
    """
    if not index.exists():
        return set()
    source = File(index)
    data = bytes(source.view(0, min(source.size, MAX_INDEX)))
    try:
        document = parse_json(data, index, "it")
        names = [one["file"] for one in document["shards"]] if "shards" in document else document["weight_map"].values()
        return {name for name in names if is_plain_name(name) and "/" not in name}
    except (InputError, TypeError, KeyError, AttributeError):
        return set()


def is_matrix_index(path: Path) -> bool:
    """Tell whether an index is of a matrix in shards."""
    index = _document(path)
    return isinstance(index, dict) and "shards" in index


def is_plain_name(name: str) -> bool:
    """Tell whether a file's name in an index stays in the index's folder, on every system."""
    if not name or "\0" in name or "\\" in name or PureWindowsPath(name).drive or PurePosixPath(name).is_absolute():
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def named_file(index: Path, name: str) -> Path:
    """Return the path of a file that an index names.

    A link out of the folder is followed only into the store of the cache that huggingface_hub keeps
    (`snapshots/REVISION/NAME` -> `blobs/HASH`).

    Raises:
        InputError: the name leads out of the folder.
    """
    folder = index.parent
    if not is_plain_name(name):
        raise InputError(f"{index}: refused: it names the file {name!r}, which is not one in its folder")
    path = folder / name
    with asked(path, "read", InputError):
        real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{index}: refused: {name} is a link out of its folder")
    return path


def _document(path: Path, missing: str = "") -> Any:
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file{missing}")
    source = File(path)
    if source.size > MAX_INDEX:
        raise source.error("is larger than any index")
    return parse_json(bytes(source.view(0, source.size)), path, "it")


def _size(number: int) -> int:
    if not is_size(number):
        raise ValueError(number)
    return number
