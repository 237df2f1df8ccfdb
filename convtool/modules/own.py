"""torch's own layers among a live model's modules: which they are, and the geometry that their attributes say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from convtool.core.geometry import Geometry

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_METHODS = ("forward", "_conv_forward", "_output_padding")  # what code of one's own would replace


def own_class(module: nn.Module, classes: Sequence[type[nn.Module]]) -> type[nn.Module] | None:
    """The one of these classes of torch that a module computes as; None where it has code of its own, or is none."""
    kind = next((one for one in classes if isinstance(module, one)), None)
    same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _METHODS)
    replaced = any(name in vars(module) for name in _METHODS)  # model.conv.forward = something
    return kind if same and not replaced else None


def module_geometry(module: _ConvNd) -> Geometry:
    """The geometry of an nn.Conv or nn.ConvTranspose."""
    transposed = isinstance(module, _ConvTransposeNd)
    padding: Any = module.padding
    return Geometry.of(
        tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=0 if padding == "valid" else padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=transposed,
        output_padding=tuple(module.output_padding) if transposed else 0,
    )
