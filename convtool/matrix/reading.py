"""What the formats' readers share: what a file gives, and the checks that several of them make."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from convtool.errors import InputError
from convtool.matrix.contents import Layout

ARRAYS: dict[Layout, tuple[str, ...]] = {
    "csr": ("indptr", "indices", "data"),
    "coo": ("row", "col", "data"),
    "dense": ("weight",),
}

# What a reader gives: the arrays by name (and "shape", "bias"), and the record's text.
Raw: TypeAlias = tuple[dict[str, Tensor], str | None]


def check_sums(path: Path, archive: zipfile.ZipFile) -> None:
    """InputError where a member of an archive isn't what its checksum says; reads all of it."""
    damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path}: the checksum of {damaged} doesn't fit what it holds; the file is damaged")


def tensor_of(path: Path, array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor over the same memory; InputError where it holds no numbers."""
    if array.dtype.kind not in "biufc":
        raise InputError(f"{path}: expected numbers, got an array of {array.dtype}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)
