"""convtool: exact linear algebra on the convolutions inside saved checkpoints.

A layer is a `Conv`: a weight, a bias or none, and a frozen `Geometry`. It is made of tensors, or taken from a
checkpoint, which holds no geometry: that is given in torch's words.

>>> import torch, convtool
>>> first = convtool.conv(torch.ones(3, 2, 3, 1), padding=(1, 0))
>>> second = convtool.conv(torch.ones(4, 3, 1, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]), stride=(1, 2))

Its matrix has the outputs as rows and the inputs as columns. Shape and number of entries are known at once, the rows
are made on demand: whole, in blocks, or as a file (`convtool toeplitz`), which `load_matrix` and `open_matrix` read.
`operator` multiplies by the matrix without making it, and `spectrum` tells its largest and smallest singular value.

>>> matrix = convtool.toeplitz(first, (4, 5))
>>> matrix.shape, matrix.nnz
((60, 40), 300)
>>> x = torch.arange(40.0).reshape(1, 2, 4, 5)
>>> torch.equal(matrix.to_dense() @ x.reshape(-1), convtool.forward(first, x).reshape(-1))
True
>>> tuple(convtool.unfold(x, first.geometry).shape)
(1, 6, 20)

>>> convtool.operator(first, (4, 5)).shape
(60, 40)
>>> ends = convtool.spectrum(first, (4, 5))
>>> ends.largest.value >= ends.smallest.value >= 0
True
>>> convtool.load_matrix("sample_models/none.npz")
Traceback (most recent call last):
convtool.errors.InputError: sample_models/none.npz: no such file

Layers one after the other, or side by side and added up, become one; `fuse` does it where that is exact, and refuses
with the reason where it isn't. `verify` holds both against each other, and against what rounding can do at most.

>>> fused = convtool.fuse([first, second])
>>> fused.weight.shape, fused.geometry.describe()
(torch.Size([4, 2, 3, 2]), 'kernel 3,2, stride 1,2, padding 1,0')
>>> report = convtool.verify([first, second], [fused], (4, 5))
>>> report.equivalent and report.ratio <= 1
True
>>> torch.equal(convtool.compose(first, second).weight, fused.weight.double())
True
>>> convtool.add(first, first).weight.unique()
tensor([2.], dtype=torch.float64)
>>> convtool.stack([first, first]).weight.shape
torch.Size([6, 2, 3, 1])
>>> convtool.fuse([second, convtool.conv(torch.ones(1, 4, 3, 3), padding=1)])
Traceback (most recent call last):
convtool.errors.RefusedError: ...

Checkpoints are opened with `open_checkpoint`; `apply` puts the fusions that a checkpoint records into a live nn.Module.

>>> checkpoint = convtool.open_checkpoint("sample_models/chains.safetensors")
>>> checkpoint.conv("widen", padding=(1, 2)).geometry.output_size((4, 6))
(4, 6)

Of a live nn.Module `geometry_of` reads what its checkpoint doesn't hold, `plan` finds every exact fusion, and
`fuse_model` carries them out.

>>> model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, (3, 1)), torch.nn.BatchNorm2d(3), torch.nn.ReLU())
>>> convtool.geometry_of(model)["1"]
{'eps': 1e-05}
>>> [fusion.name for fusion in convtool.plan(model, (2, 6, 5)).fusions]
['0']
>>> convtool.fuse_model(model, (2, 6, 5))
Sequential(
  (0): Conv2d(2, 3, kernel_size=(3, 1), stride=(1, 1))
  (1): Identity()
  (2): ReLU()
)

All of these, and nothing else, are the public API. They are imported on first use, so that `import convtool` (and with
it the command line's help) doesn't pay for importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from convtool.core.conv import Conv as Conv
    from convtool.core.geometry import Geometry as Geometry
    from convtool.core.toeplitz import ToeplitzMatrix as ToeplitzMatrix
    from convtool.core.verify import EquivalenceReport as EquivalenceReport
    from convtool.errors import ConvtoolError as ConvtoolError
    from convtool.errors import InputError as InputError
    from convtool.errors import OutputError as OutputError
    from convtool.errors import RefusedError as RefusedError
    from convtool.errors import UsageError as UsageError
    from convtool.graph.planned import Plan as Plan
    from convtool.live.public import add as add
    from convtool.live.public import apply as apply
    from convtool.live.public import compose as compose
    from convtool.live.public import conv as conv
    from convtool.live.public import forward as forward
    from convtool.live.public import fuse as fuse
    from convtool.live.public import fuse_model as fuse_model
    from convtool.live.public import geometry_of as geometry_of
    from convtool.live.public import load_matrix as load_matrix
    from convtool.live.public import open_checkpoint as open_checkpoint
    from convtool.live.public import open_matrix as open_matrix
    from convtool.live.public import operator as operator
    from convtool.live.public import plan as plan
    from convtool.live.public import spectrum as spectrum
    from convtool.live.public import stack as stack
    from convtool.live.public import toeplitz as toeplitz
    from convtool.live.public import unfold as unfold
    from convtool.live.public import verify as verify

_HOMES = {
    "convtool.core.conv": ("Conv",),
    "convtool.core.geometry": ("Geometry",),
    "convtool.core.toeplitz": ("ToeplitzMatrix",),
    "convtool.core.verify": ("EquivalenceReport",),
    "convtool.errors": (
        "ConvtoolError",
        "InputError",
        "OutputError",
        "RefusedError",
        "UsageError",
    ),
    "convtool.graph.planned": ("Plan",),
    "convtool.live.public": (
        *("add", "apply", "compose", "conv", "forward", "fuse", "fuse_model", "geometry_of", "load_matrix"),
        *("open_checkpoint", "open_matrix", "operator", "plan", "spectrum", "stack", "toeplitz", "unfold", "verify"),
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'convtool' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
