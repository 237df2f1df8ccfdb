"""What a matrix file holds, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from convtool.formats.pieces import Piece
from convtool.formats.source import Array

Layout: TypeAlias = Literal["csr", "coo", "dense"]

# The arrays of each layout, the values last.
ARRAYS: dict[Layout, tuple[str, ...]] = {
    "csr": ("indptr", "indices", "data"),
    "coo": ("row", "col", "data"),
    "dense": ("weight",),
}

# The name of a file's record. A checkpoint's is `convtool`, and a dense file is a checkpoint too, of one linear layer.
RECORD_NAME = "convtool_matrix"


@dataclass(frozen=True, slots=True)
class Contents:
    """All that is to go into a file.

    Attributes:
        shape: (rows, columns) of the matrix in the file.
        arrays: those of the layout in the order of `ARRAYS`, followed by others that the file is to hold (a bias).
        record: what was done, as JSON in ASCII, or None.
    """

    layout: Layout
    shape: tuple[int, int]
    arrays: tuple[Piece, ...]
    record: str | None

    @property
    def values(self) -> Piece:
        """The array of the matrix's numbers."""
        return self.arrays[len(ARRAYS[self.layout]) - 1]


class Found(NamedTuple):
    """What a reader found in a file: nothing of it is checked beyond what the format itself fixes.

    Attributes:
        arrays: by name; with those of a layout, the `shape` of a sparse matrix and maybe a `bias`.
        record: as it stands there.
        digits: decimal ones that the numbers were written with, where that is fewer than bring each back to the bit.
    """

    arrays: Mapping[str, Array]
    record: str | None
    digits: int | None = None
