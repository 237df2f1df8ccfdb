"""The layers of a live model: which of its modules are which kind, and the fields that they have as attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from convtool.checkpoint import Checkpoint
from convtool.core.fields import Fields
from convtool.errors import RefusedError, UsageError
from convtool.kinds import KINDS
from convtool.kinds.found import group_layers
from convtool.kinds.kind import UNKNOWN, Kind, Layer, TensorInfo
from convtool.live.modules import HOOKS

_METHODS = ("forward", "_conv_forward", "_output_padding")  # what code of one's own would replace


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
    if is_parametrized(module):
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


def layer_axes(layer: ModuleLayer, rank: int) -> int | None:
    """Return the spatial axes that a layer moves over in an input of that many axes; None where in another way."""
    try:
        return layer.kind.moves_over(rank, layer.axes)
    except UsageError as error:
        raise UsageError(f"{layer.name} {error}") from None


def with_fields(state: Checkpoint, modules: Mapping[str, ModuleLayer]) -> dict[str, Layer]:
    """Return every layer that a model's state dict shows, with the fields of its module."""
    found = {}
    for name, layer in state.layers.items():
        module = modules.get(name)
        if layer.kind.parameter or (module is not None and module.kind is layer.kind):
            found[name] = replace(layer, fields={} if module is None else module.fields)
    return found


def class_of(module: nn.Module, kind: Kind) -> type[nn.Module] | None:
    """Return the class among those of a kind that a module is or is derived from, or None."""
    return next((one for one in type(module).__mro__ if f"{one.__module__}.{one.__qualname__}" in kind.modules), None)


def kind_by_class(module: nn.Module) -> Kind | None:
    """Return the kind that a module's class says it is; None where that is no class of torch's that convtool knows."""
    return next((kind for kind in KINDS if class_of(module, kind) is not None), None)


def computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether a module computes what that class of torch does, and has no code of its own for it."""
    same = all(getattr(type(module), name, None) is getattr(known, name, None) for name in _METHODS)
    return same and not any(name in vars(module) for name in _METHODS)  # model.conv.forward = something


def own_layer(module: nn.Module) -> Layer:
    """Return a module as a layer by the tensors that it holds itself, a weight that a norm makes of others included."""
    tensors = {**module.state_dict(keep_vars=True), **dict(module.named_buffers(recurse=False))}
    infos = (
        TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    )
    return group_layers(infos).get("", Layer("", UNKNOWN, {}))


def observe(module: nn.Module, kind: Kind) -> Fields | None:
    """Return the fields of a module of unknown class as a layer of that kind, found by running a small copy of it.

    Returns:
        None where it has other tensors, or computes something else.
    """
    layer = own_layer(module)
    if layer.kind is not kind or list(module.children()):
        return None

    def run(numbers: Mapping[str, Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            for name, values in numbers.items():
                getattr(copied, name).copy_(values)
            output: Tensor = copied(x)
            return output

    try:
        copied: Any = _materialised(module)
        return kind.observe(run, layer.shapes)
    except Exception:  # it is the user's code, and takes what it takes
        return None


def difference(module: nn.Module, kind: Kind, fields: Fields) -> str:
    """Return in what a module isn't the layer that was fused, in words; '' where it is.

    Args:
        kind, fields: of that layer, as its record says.
    """
    if kind.parameter:
        return ""
    what, known = f"the model has a {type(module).__name__} there", class_of(module, kind)
    shapes = own_layer(module).shapes
    if known is None:
        found = observe(module, kind)
        if found is None:
            return f"{what}, and a {kind.label} was fused"
    elif not computes_as(module, known):
        return f"{what}, whose forward isn't that of nn.{known.__name__}"
    elif any(
        not isinstance(hook, (*HOOKS, WeightNorm))
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ):
        return f"{what} with forward hooks, which would be lost"
    elif other := next((name for name, one in _parametrizations(module) if not isinstance(one, _WeightNorm)), ""):
        return f"{what} with a parametrization of its {other}, which would be lost"
    else:
        try:
            found = kind.module_fields(module)
        except RefusedError as error:
            return f"{what} that {error}"
    fused, live = kind.describe(fields, shapes), kind.describe(found, shapes)
    return "" if fused == live else f"{fused} was fused, and the model has {live}"


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _materialised(module: nn.Module) -> nn.Module:
    """Return a copy of a small module with float64 ones for its tensors, whatever device they are on."""
    memo: dict[int, Any] = {}
    for _, tensor in _own_tensors(module):
        ones = torch.ones(tensor.shape, dtype=torch.float64, device="cpu")
        memo[id(tensor)] = nn.Parameter(ones, requires_grad=False) if isinstance(tensor, nn.Parameter) else ones
    return copy.deepcopy(module, memo).eval()


def _parametrizations(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each with the name of the tensor that it makes."""
    if is_parametrized(module):
        for name, listed in module.get_submodule("parametrizations").named_children():
            yield from ((name, one) for one in listed.children())
