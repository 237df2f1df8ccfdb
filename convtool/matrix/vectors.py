"""Singular vectors as a file: an .npz of `left`, `values` and `right`, for numpy.load."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convtool.core.extremes import Extremes
from convtool.errors import UsageError
from convtool.formats.atomic import check_target, replacing


def check_vectors(path: Path, *, force: bool) -> None:
    """Check that vectors can be written to `path`, before anything is computed."""
    if path.suffix != ".npz":
        raise UsageError(f"{path}: expected a name that ends in .npz")
    check_target(path, force=force)


def write_vectors(found: Extremes, path: Path, *, force: bool) -> None:
    """Write the values, the largest first and the smallest last, and beside each its vectors, as columns.

    Raises:
        OutputError: the file exists (without `force`) or could not be written.
    """
    values = np.concatenate([found.largest, found.smallest])
    with replacing(path, force=force) as file:
        np.savez(file, left=found.left, values=values, right=found.right)
