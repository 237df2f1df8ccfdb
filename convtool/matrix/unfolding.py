"""A layer's im2col form as a file: W, and for an input size the gather matrix U, so that T = (W x I) @ U.

W is the array `weight`, beside the layer's `bias`. U stands as a sparse csr matrix stands in the format: in .npz it is
what `scipy.sparse.load_npz` gives, in .safetensors `indptr`, `indices`, `data` and `shape`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from convtool.core.conv import Conv
from convtool.core.rounding import check_room, dtype_name, held
from convtool.core.unfold import GatherMatrix, kernel_matrix
from convtool.errors import RefusedError, UsageError
from convtool.formats.matrices import Contents
from convtool.formats.pieces import Piece
from convtool.matrix import FORMATS
from convtool.matrix.contents import matrix_arrays

WITH_GATHER = (".npz", ".safetensors")  # the formats that hold named arrays beside a sparse matrix


def unfolding_contents(
    conv: Conv, gather: GatherMatrix | None, path: Path, dtype: torch.dtype, record: dict[str, object] | None = None
) -> Contents:
    """Say what the file at `path` will hold; nothing of the gather matrix is made.

    Raises:
        UsageError: a suffix of no format, or of one that has no room for all of it.
        RefusedError: a dtype that the format can't hold, or that has no room for the layer's complex numbers.
    """
    if path.suffix not in FORMATS or (gather is not None and path.suffix not in WITH_GATHER):
        allowed = FORMATS if gather is None else WITH_GATHER
        raise UsageError(f"{path}: expected a name that ends in {', '.join(allowed)}")
    if "dense" not in FORMATS[path.suffix].LAYOUTS:
        raise UsageError(f"{path}: a {path.suffix} file has no room for a dense matrix such as W")
    refusal = FORMATS[path.suffix].refusal(dtype_name(dtype), "dense" if gather is None else "csr")
    if refusal is not None:
        raise RefusedError(f"{path}: {refusal}")
    check_room(conv.dtype, dtype)
    kernel = held(kernel_matrix(conv), dtype, "W")
    text = None if record is None else json.dumps(record, separators=(",", ":"))
    arrays = [Piece.of_tensor("weight", kernel)]
    if conv.bias is not None and FORMATS[path.suffix].STORES_BIAS:
        arrays.append(Piece.of_tensor("bias", held(conv.bias, dtype, "the bias")))
    if gather is None:
        return Contents("dense", (kernel.shape[0], kernel.shape[1]), tuple(arrays), text)
    sparse = matrix_arrays(gather, "csr", (0, gather.shape[0]), gather.index_dtype)
    return Contents("csr", gather.shape, (*sparse, *arrays), text)
