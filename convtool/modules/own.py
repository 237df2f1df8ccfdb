"""A live model's modules held against the kinds of layers: which module is which, and what its attributes say."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from convtool.core.fields import Fields
from convtool.errors import RefusedError
from convtool.kinds import KINDS
from convtool.kinds.found import group_layers
from convtool.kinds.kind import UNKNOWN, Kind, Layer, TensorInfo
from convtool.modules.live import HOOKS

_METHODS = ("forward", "_conv_forward", "_output_padding")  # what code of one's own would replace


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
