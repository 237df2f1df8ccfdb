"""The layers of a live model: which modules are linear maps that convtool knows, and the fields of each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from convtool.checkpoint.info import SCALES
from convtool.core.fields import Fields, geometry_fields
from convtool.core.geometry import Geometry

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FROZEN = {"weight", "bias", "running_mean", "running_var"}  # the buffers of a frozen batch norm


@dataclass(frozen=True, slots=True)
class ModuleLayer:
    """One module that is, or looks like, a linear layer.

    Attributes:
        name: module path.
        kind: 'conv', 'linear', 'batch_norm' or 'scale', as a checkpoint's layers are called.
        fields: its geometry, or a batch norm's eps: what its checkpoint doesn't hold.
        foreign: why its attributes don't tell what it computes; '' where they do.
        bound: why it cannot be replaced by another layer though its fields are known; '' where it can.
    """

    name: str
    kind: str
    fields: Fields
    foreign: str = ""
    bound: str = ""


def module_layers(model: nn.Module) -> dict[str, ModuleLayer]:
    """Every convolution, linear layer, batch norm and layer scale among the model's modules, by module path."""
    found = {name: layer for name, module in model.named_modules() if (layer := _layer(name, module)) is not None}
    tied = _tied_layers(model)
    return {
        name: ModuleLayer(name, layer.kind, layer.fields, layer.foreign, layer.bound or tied.get(name, ""))
        for name, layer in found.items()
    }


def geometry_of(model: nn.Module) -> dict[str, Fields]:
    """The fields of a model's convolutions and batch norms by module path, as `--geometry` files and `conv` take them.

    Only of layers that compute what torch's own classes do; a subclass with a forward of its own may pad or scale in
    it, and is left out.
    """
    return {name: layer.fields for name, layer in module_layers(model).items() if layer.fields and not layer.foreign}


def _layer(name: str, module: nn.Module) -> ModuleLayer | None:
    if isinstance(module, _ConvNd):
        foreign = _foreign(module, _CONVS, ("forward", "_conv_forward", "_output_padding"))
        return ModuleLayer(name, "conv", _conv_fields(module), foreign, _bound(module))
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:  # it normalises by each batch's own statistics
            return None
        return ModuleLayer(
            name, "batch_norm", {"eps": float(module.eps)}, _foreign(module, _NORMS, ("forward",)), _bound(module)
        )
    if isinstance(module, nn.Linear):
        return ModuleLayer(name, "linear", {}, _foreign(module, (nn.Linear,), ("forward",)), _bound(module))
    tensors = dict(_own_tensors(module))
    if tensors.keys() - {"num_batches_tracked"} == _FROZEN:
        eps = _frozen_eps(module)
        return None if eps is None else ModuleLayer(name, "batch_norm", {"eps": eps}, "", _bound(module))
    if len(tensors) == 1 and tensors.keys() <= set(SCALES) and not list(module.children()):
        return ModuleLayer(name, "scale", {}, "" if _only_scales(module) else _custom(module), _bound(module))
    return None


def _conv_fields(module: _ConvNd) -> Fields:
    transposed = isinstance(module, _ConvTransposeNd)
    padding: Any = module.padding
    geometry = Geometry.of(
        tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=0 if padding == "valid" else padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=transposed,
        output_padding=tuple(module.output_padding) if transposed else 0,
    )
    return geometry_fields(geometry)


def _foreign(module: nn.Module, own: tuple[type[nn.Module], ...], methods: tuple[str, ...]) -> str:
    """Whether a subclass overrides what torch's class computes."""
    base = next((kind for kind in own if isinstance(module, kind)), None)
    same = base is not None and all(
        getattr(type(module), method, None) is getattr(base, method, None) for method in methods
    )
    instance = any(method in vars(module) for method in methods)  # model.conv.forward = something
    return "" if same and not instance else _custom(module)


def _custom(module: nn.Module) -> str:
    return f"a {type(module).__name__}, which computes by code of its own"


def _bound(module: nn.Module) -> str:
    """What would be lost with the module: hooks, and weights that are computed each time."""
    if parametrize.is_parametrized(module):
        return "its weight is computed from others (parametrized)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks (weight_norm and spectral_norm are such), which would be lost"
    return ""


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _tied_layers(model: nn.Module) -> dict[str, str]:
    """Layers that share memory with another layer, or are registered under a second name, with the reason."""
    owners: dict[int, list[str]] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            owners.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    tied = {}
    for names in owners.values():
        for name in names:
            others = [other for other in names if other != name]
            if others:
                tied[name.rpartition(".")[0]] = f"{name} is one tensor with {others[0]} (tied weights)"
    return tied


def _materialised(module: nn.Module) -> nn.Module:
    """A copy of a small module with float64 ones for its tensors, whatever device they are on."""
    tensors = [tensor for _, tensor in _own_tensors(module)]
    memo: dict[int, Any] = {
        id(tensor): (
            nn.Parameter(torch.ones(tensor.shape, dtype=torch.float64, device="cpu"), requires_grad=False)
            if isinstance(tensor, nn.Parameter)
            else torch.ones(tensor.shape, dtype=torch.float64, device="cpu")
        )
        for tensor in tensors
    }
    return copy.deepcopy(module, memo).eval()


def _frozen_eps(module: nn.Module) -> float | None:
    """The eps of a batch norm in other code than torch's (torchvision, DETR), found by running it; None if it is none.

    With a variance of 0 and all else neutral, it multiplies by 1 / sqrt(eps); then all of it is held against the
    formula.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        norm: Any = _materialised(module)
        channels = norm.running_mean.shape[0]
        x = torch.randn(2, channels, 3, 4, dtype=torch.float64, generator=generator)
        norm.running_mean.zero_()
        norm.bias.zero_()
        norm.running_var.zero_()
        gain = norm(torch.ones_like(x))[0, 0, 0, 0]
        eps = float(f"{float(gain**-2):.12g}") if float(gain) > 0 else 0.0
        for name in _FROZEN:
            getattr(norm, name).copy_(torch.rand(channels, dtype=torch.float64, generator=generator) + 0.5)
        mean, var, weight, bias = (
            getattr(norm, name).reshape(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        expected = (x - mean) / torch.sqrt(var + eps) * weight + bias
        return eps if torch.allclose(norm(x), expected, rtol=1e-9, atol=1e-9) else None
    except Exception:  # it is the user's code, and takes what it takes
        return None


def _only_scales(module: nn.Module) -> bool:
    """Whether a module of one tensor multiplies the last axis by it, and does nothing else."""
    generator = torch.Generator().manual_seed(0)
    try:
        copied = _materialised(module)
        ((_, factors),) = _own_tensors(copied)
        if factors.dim() != 1:
            return False
        with torch.no_grad():
            factors.copy_(torch.rand(factors.shape, dtype=torch.float64, generator=generator) + 0.5)
        x = torch.randn(2, 3, len(factors), dtype=torch.float64, generator=generator)
        with torch.no_grad():
            return bool(torch.equal(copied(x), x * factors))
    except Exception:
        return False
