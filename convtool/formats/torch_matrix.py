"""torch's files of matrices (.pt): a dict {"weight", "bias"} for `torch.load(path, weights_only=True)`.

The weight is a sparse CSR, sparse COO (coalesced) or dense tensor; dense, it is an nn.Linear's state dict. The record
is the member `extra/convtool_matrix.json`, which torch.load passes over.
"""

from __future__ import annotations

import itertools
from typing import Any

from convtool.formats.atomic import FilePlan
from convtool.formats.dtypes import STORAGE_CLASSES, is_size
from convtool.formats.matrices import Contents as MatrixContents
from convtool.formats.matrices import Found, Layout
from convtool.formats.pickle_values import Call, Global, PickleError, TensorRef, bare, numbers_of, plain_tensor
from convtool.formats.pieces import Piece
from convtool.formats.source import Source
from convtool.formats.state_dicts import StateDict
from convtool.formats.stored_tensors import StoredTensors
from convtool.formats.torch_contents import Contents, read_contents, text_member
from convtool.formats.torch_zip import MATRIX_RECORD, REBUILD_SPARSE, check_written, plan_value

LAYOUTS: tuple[Layout, ...] = ("csr", "coo", "dense")
STORES_BIAS = True
COO_INDICES: str | None = "int64"  # all that torch's COO tensors take

_SPARSE_PARTS = {"torch.sparse_csr": ("indptr", "indices", "data"), "torch.sparse_coo": ("indices", "data")}
_LAYOUT = Global("torch.serialization", "_get_layout")


def refusal(dtype: str, layout: Layout) -> str | None:
    """Say why the format can't hold values of that dtype, and the way out; None where it can."""
    if dtype in STORAGE_CLASSES:
        return None
    return f".pt files of {dtype} are not written; use --dtype, or write a .safetensors file"


def plan_matrix(contents: MatrixContents) -> FilePlan:
    """Plan a matrix file."""
    arrays = {array.name: array for array in contents.arrays}
    weight: Any
    if contents.layout == "dense":
        weight = arrays["weight"]
    elif contents.layout == "csr":
        weight = _sparse("torch.sparse_csr", arrays["indptr"], arrays["indices"], arrays["data"], contents.shape)
    else:
        row, column = arrays.pop("row"), arrays.pop("col")
        chunks = lambda: itertools.chain(row.chunks(), column.chunks())  # noqa: E731  # one above the other
        indices = Piece("indices", row.dtype, (2, *row.shape), row.nbytes + column.nbytes, chunks)
        arrays = {"indices": indices, **arrays}
        coalesced = True  # sorted and unique by construction
        weight = _sparse("torch.sparse_coo", indices, arrays["data"], contents.shape, coalesced)
    value = {"weight": weight} | ({"bias": arrays["bias"]} if "bias" in arrays else {})
    record = text_member(MATRIX_RECORD, contents.record)
    reopen = lambda source, back: _open_matrix(source, back)[0]  # noqa: E731
    return plan_value(value, lambda path: check_written(path, arrays, reopen), record)


def _sparse(layout: str, *parts: Any) -> Call:
    """Return a sparse tensor as torch pickles one."""
    return Call(REBUILD_SPARSE[0], (Call(_LAYOUT, (layout,)), parts))


def _open_matrix(source: Source, contents: Contents) -> tuple[StoredTensors, tuple[int, ...] | None]:
    """Open a file by the tensors that the matrix in it is made of, by name; with the shape of a sparse one.

    Raises:
        InputError: it holds no matrix, or a damaged one.
    """
    value = contents.value
    state = value if isinstance(value, dict) else {"weight": value}
    weight = bare(state.get("weight"))
    bias = {"bias": state["bias"]} if "bias" in state else {}
    if isinstance(weight, TensorRef):
        return _opened(source, contents, {"weight": weight} | bias), None
    if not (isinstance(weight, Call) and weight.function in REBUILD_SPARSE):
        raise source.error("holds no matrix: expected a tensor, or a dict with a tensor `weight`")
    try:
        layout, parts = weight.arguments
        (name,) = layout.arguments
        if not isinstance(name, str):  # tuples in tuples can be hashed for ever
            raise TypeError
        names = _SPARSE_PARTS.get(name)
        if names is None:
            raise source.error(f"holds a {name:.80} tensor; expected a sparse CSR, sparse COO or dense one")
        tensors = dict(zip(names, map(plain_tensor, parts), strict=False))
        rows, columns = numbers_of(parts[len(names)])
    except (PickleError, TypeError, ValueError, AttributeError, IndexError):
        raise source.damaged("its sparse tensor is not made as torch makes one") from None
    if None in tensors.values() or not (is_size(rows) and is_size(columns)):
        raise source.damaged("its sparse tensor is not made of tensors and a shape")
    return _opened(source, contents, tensors | bias), (rows, columns)


def _opened(source: Source, contents: Contents, entries: dict[str, Any]) -> StoredTensors:
    file = StoredTensors(source, contents.storages, StateDict((), entries, entries))
    if file.tensors.keys() != entries.keys():
        raise source.error("holds a matrix that isn't made of tensors alone")
    return file


def read_matrix(source: Source) -> Found:
    """Return the arrays and the record of a matrix file; InputError where it is damaged or holds none."""
    import torch

    contents = read_contents(source)
    file, shape = _open_matrix(source, contents)
    arrays = {name: file.array(name) for name in file.tensors}
    if shape is not None:
        arrays["shape"] = torch.tensor(shape)
    if shape is not None and "indptr" not in arrays:
        pair = arrays.pop("indices")
        if len(pair.shape) != 2 or len(pair) != 2:
            raise source.damaged(f"its sparse tensor has indices of shape {tuple(pair.shape)}")
        arrays["row"], arrays["col"] = pair.unbind()
    return Found(arrays, contents.text(MATRIX_RECORD))
