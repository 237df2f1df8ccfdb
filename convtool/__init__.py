"""convtool: exact linear algebra on the convolutions inside saved checkpoints.

The names below are the public API. They are imported on first use, so that `import convtool` (and with it the command
line's help) doesn't pay for importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convtool.api import apply as apply
    from convtool.api import conv as conv
    from convtool.checkpoint import open_checkpoint as open_checkpoint
    from convtool.core.compose import add as add
    from convtool.core.compose import compose as compose
    from convtool.core.conv import Conv as Conv
    from convtool.core.forward import forward as forward
    from convtool.core.fuse import fuse as fuse
    from convtool.core.geometry import Geometry as Geometry
    from convtool.core.operator import operator as operator
    from convtool.core.spectrum import spectrum as spectrum
    from convtool.core.toeplitz import ToeplitzMatrix as ToeplitzMatrix
    from convtool.core.toeplitz import toeplitz as toeplitz
    from convtool.core.unfold import unfold as unfold
    from convtool.core.verify import EquivalenceReport as EquivalenceReport
    from convtool.core.verify import verify as verify
    from convtool.errors import ConvtoolError as ConvtoolError
    from convtool.errors import InputError as InputError
    from convtool.errors import OutputError as OutputError
    from convtool.errors import RefusedError as RefusedError
    from convtool.errors import UsageError as UsageError
    from convtool.matrix.read import load_matrix as load_matrix
    from convtool.matrix.read import open_matrix as open_matrix

_HOME = {
    "apply": "convtool.api",
    "conv": "convtool.api",
    "open_checkpoint": "convtool.checkpoint",
    "add": "convtool.core.compose",
    "compose": "convtool.core.compose",
    "Conv": "convtool.core.conv",
    "forward": "convtool.core.forward",
    "fuse": "convtool.core.fuse",
    "Geometry": "convtool.core.geometry",
    "operator": "convtool.core.operator",
    "spectrum": "convtool.core.spectrum",
    "ToeplitzMatrix": "convtool.core.toeplitz",
    "toeplitz": "convtool.core.toeplitz",
    "unfold": "convtool.core.unfold",
    "EquivalenceReport": "convtool.core.verify",
    "verify": "convtool.core.verify",
    "ConvtoolError": "convtool.errors",
    "InputError": "convtool.errors",
    "OutputError": "convtool.errors",
    "RefusedError": "convtool.errors",
    "UsageError": "convtool.errors",
    "load_matrix": "convtool.matrix.read",
    "open_matrix": "convtool.matrix.read",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'convtool' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
