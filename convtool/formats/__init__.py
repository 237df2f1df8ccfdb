"""File formats: each is read and written in one module, for checkpoints and for matrices, and all write in one way.

A format is a module here that offers what `CheckpointFormat` or `MatrixFormat` asks for, and a line for each of its
names' endings below.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from convtool.formats.atomic import FilePlan
    from convtool.formats.matrices import Contents, Found, Layout
    from convtool.formats.pieces import Piece
    from convtool.formats.source import Source
    from convtool.formats.tensor_file import TensorFile

# By name, since a format is imported when a file of it is read or written: `inspect` doesn't wait for the others.
CHECKPOINTS = {
    ".safetensors": "safetensors",
    ".pt": "torch_zip",
    ".pth": "torch_zip",
    ".bin": "torch_zip",
    ".ckpt": "torch_zip",
}
MATRICES = {
    ".npz": "npz",
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".pt": "torch_matrix",
    ".mtx": "mtx",
}


class CheckpointFormat(Protocol):
    """What the module of a format of checkpoints offers.

    Attributes:
        NAME: what `inspect` calls it.
    """

    NAME: str

    def recognises(self, start: bytes, /) -> bool:
        """Tell whether a file that begins so could be one."""

    def open_file(self, source: Source, root: str | None, /) -> TensorFile:
        """Open a file; `root` are the dotted keys of the state dict that is meant, in a file of several."""

    def plan_state(self, pieces: Sequence[Piece], metadata: Mapping[str, str], record: str | None, /) -> FilePlan:
        """Plan the file of a flat table of tensors, with convtool's record."""

    def is_matrix(self, source: Source, /) -> bool:
        """Tell whether a file is a matrix, as far as its record or its arrays' names tell."""


class MatrixFormat(Protocol):
    """What the module of a format of matrices offers.

    Attributes:
        LAYOUTS: the layouts it has room for, the default one first.
        STORES_BIAS: whether it has room for a bias beside the matrix.
        COO_INDICES: the dtype that indices of a coo matrix have to have; None for the narrowest that holds them.
    """

    LAYOUTS: tuple[Layout, ...]
    STORES_BIAS: bool
    COO_INDICES: str | None

    def refusal(self, dtype: str, layout: Layout, /) -> str | None:
        """Say why the format can't hold values of that dtype, and the way out; None where it can."""

    def plan_matrix(self, contents: Contents, /) -> FilePlan:
        """Plan the file of a matrix; none of its arrays is made before it is written."""

    def read_matrix(self, source: Source, /) -> Found:
        """Return arrays and record of a file; InputError where it isn't one of this format, or is damaged."""


def checkpoint_format(suffix: str) -> CheckpointFormat:
    """Return the module of the checkpoint format whose names end so."""
    return cast(CheckpointFormat, importlib.import_module(f"{__name__}.{CHECKPOINTS[suffix]}"))


def matrix_format(suffix: str) -> MatrixFormat:
    """Return the module of the matrix format whose names end so."""
    return cast(MatrixFormat, importlib.import_module(f"{__name__}.{MATRICES[suffix]}"))
