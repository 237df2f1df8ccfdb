"""The layers of a live model: which modules are linear maps that convtool knows, and the fields of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from convtool.core.fields import Fields
from convtool.errors import RefusedError, UsageError
from convtool.kinds.kind import UNKNOWN, Kind
from convtool.modules.own import class_of, computes_as, kind_by_class, observe, own_layer


@dataclass(frozen=True, slots=True)
class ModuleLayer:
    """One module that is, or looks like, a linear layer.

    Attributes:
        name: module path.
        kind: as a checkpoint's layers have it.
        fields: its geometry, or a batch norm's eps: what its checkpoint doesn't hold.
        axes: its spatial axes, where its tensors tell.
        foreign: why its attributes don't tell what it computes; '' where they do.
        bound: why it cannot be replaced by another layer though its fields are known; '' where it can.
    """

    name: str
    kind: Kind
    fields: Fields
    axes: int | None = None
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
    return {name: replace(layer, bound=layer.bound or tied.get(name, "")) for name, layer in found.items()}


def geometry_of(model: nn.Module) -> dict[str, Fields]:
    """The fields of a model's convolutions and batch norms by module path, as `--geometry` files and `conv` take them.

    Only of layers that compute what torch's own classes do; a subclass with a forward of its own may pad or scale in
    it, and is left out.
    """
    return {name: layer.fields for name, layer in module_layers(model).items() if layer.fields and not layer.foreign}


def _layer(name: str, module: nn.Module) -> ModuleLayer | None:
    kind = kind_by_class(module)
    if kind is not None:
        known = class_of(module, kind)
        try:
            fields = kind.module_fields(module)
        except RefusedError:
            return None
        foreign = "" if known is not None and computes_as(module, known) else _custom(module)
        return ModuleLayer(name, kind, fields, kind.module_axes(module), foreign, _bound(module))
    if list(module.children()):
        return None
    kind = own_layer(module).kind
    if kind is UNKNOWN:
        return None
    observed = observe(module, kind)
    if observed is None and not kind.parameter:
        return None
    foreign = "" if observed is not None else _custom(module)
    return ModuleLayer(name, kind, observed or {}, None, foreign, _bound(module))


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
