"""The layers of a live model: which modules are linear maps that convtool knows, and the fields of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from convtool.checkpoint.info import SCALES
from convtool.core.fields import Fields, geometry_fields
from convtool.errors import UsageError
from convtool.modules.observed import frozen_eps, only_scales, own_tensors
from convtool.modules.own import CONVS, NORMS, module_geometry, own_class


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
    """Every convolution, linear layer, batch norm and layer scale among the model's modules, by module path.

    Raises:
        UsageError: a lazy module, which has no shape before it first runs.
    """
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise UsageError(f"{name} has no shape yet, being that of a lazy module; run the model once before")
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
        fields = geometry_fields(module_geometry(module))
        return ModuleLayer(name, "conv", fields, _foreign(module, CONVS), _bound(module))
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:  # it normalises by each batch's own statistics
            return None
        return ModuleLayer(name, "batch_norm", {"eps": float(module.eps)}, _foreign(module, NORMS), _bound(module))
    if isinstance(module, nn.Linear):
        return ModuleLayer(name, "linear", {}, _foreign(module, (nn.Linear,)), _bound(module))
    tensors = dict(own_tensors(module))
    eps = frozen_eps(module)
    if eps is not None:
        return ModuleLayer(name, "batch_norm", {"eps": eps}, "", _bound(module))
    if len(tensors) == 1 and tensors.keys() <= set(SCALES) and not list(module.children()):
        return ModuleLayer(name, "scale", {}, "" if only_scales(module) else _custom(module), _bound(module))
    return None


def _foreign(module: nn.Module, own: tuple[type[nn.Module], ...]) -> str:
    """Whether a subclass overrides what torch's class computes."""
    return "" if own_class(module, own) else _custom(module)


def _custom(module: nn.Module) -> str:
    return f"a {type(module).__name__}, which computes by code of its own"


def _bound(module: nn.Module) -> str:
    """What would be lost with the module: hooks, and weights that are computed each time."""
    if parametrize.is_parametrized(module):
        return "its weight is computed from others (parametrized)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks (weight_norm and spectral_norm are such), which would be lost"
    return ""


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
