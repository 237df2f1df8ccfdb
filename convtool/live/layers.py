"""The layers of a live model: which of its modules are which kind, and the fields that they have as attributes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from convtool.core.fields import Fields
from convtool.errors import RefusedError, UsageError, a_or_an
from convtool.graph.left_over import COMPUTED
from convtool.kinds import KINDS
from convtool.kinds.found import group_layers
from convtool.kinds.kind import UNKNOWN, Kind, Layer
from convtool.live.state import tensor_info, tensors_of

_METHODS = ("forward", "_conv_forward", "_output_padding")  # what code of one's own would replace


class ModelLayers(NamedTuple):
    """What is known of a live model's layers.

    Attributes:
        layers: by module path, with the fields that their modules have; what a checkpoint doesn't hold.
        foreign: those whose modules' attributes don't tell what they compute, with the reason.
        bound: those that no other layer can take the place of, with the reason.
    """

    layers: dict[str, Layer]
    foreign: dict[str, str]
    bound: dict[str, str]

    def called(self) -> list[str]:
        """Return the layers whose runs can be told by those of their modules."""
        return [name for name in self.layers if name not in self.foreign]


def module_layers(model: nn.Module) -> ModelLayers:
    """Return the modules of a model that are of the kinds known here, or look like it.

    Raises:
        UsageError: a lazy module, which has no shape before it first runs.
    """
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise UsageError(f"{name} has no shape yet, being that of a lazy module; run the model once before")
    found, layers, foreign, bound = found_layers(model), {}, {}, _tied_layers(model)
    for name, module in model.named_modules():
        layer = found.get(name, Layer(name, UNKNOWN, {}))
        known = known_class(module)
        try:
            fields = observe(module, layer.kind) if known is None else stated_fields(module, known[0])
        except RefusedError:
            continue
        if known is None and fields is None and (list(module.children()) or not layer.kind.parameter):
            continue
        # Of a weight that is made of others in a way unknown here, the tensors don't tell the kind.
        kind = layer.kind if known is None or layer.kind is known[0] else UNKNOWN
        layers[name] = replace(layer, kind=kind, fields=fields or {})
        if fields is None or not (known is None or computes_as(module, known[1])):
            foreign[name] = f"{a_or_an(type(module).__name__)}, which computes by code of its own"
        if is_parametrized(module):
            bound[name] = COMPUTED
        elif module._forward_hooks or module._forward_pre_hooks:
            bound[name] = "it has forward hooks (weight_norm and spectral_norm are such), which would be lost"
    return ModelLayers(layers, foreign, {name: reason for name, reason in bound.items() if name in layers})


def stated_fields(module: nn.Module, kind: Kind) -> Fields | None:
    """Return the fields that a module has as attributes; None where these are others than torch's own class has.

    Raises:
        RefusedError: why it isn't a layer of the kind for all that.
    """
    try:
        return kind.module_fields(module)
    except RefusedError:
        raise
    except Exception:  # of a class of the user's, whose attributes mean what its code makes of them
        return None


def geometry_of(model: nn.Module) -> dict[str, Fields]:
    """Return the fields of a model's layers by module path, as `--geometry` files and `conv` take them.

    Only of layers that compute what torch's own classes do; a subclass with a forward of its own may pad or scale in
    it, and is left out.
    """
    found = module_layers(model)
    return {name: layer.fields for name, layer in found.layers.items() if layer.fields and name not in found.foreign}


def found_layers(model: nn.Module) -> dict[str, Layer]:
    """Return a model's layers by the tensors that its modules hold, a weight that is made of others included."""
    tensors = {**tensors_of(model), **dict(model.named_buffers())}
    return group_layers(tensor_info(name, value) for name, value in tensors.items() if isinstance(value, Tensor))


def computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether a module computes what that class of torch does, and has no code of its own for it."""
    same = all(getattr(type(module), name, None) is getattr(known, name, None) for name in _METHODS)
    return same and not any(name in vars(module) for name in _METHODS)  # model.conv.forward = something


def is_torchs(module: nn.Module) -> bool:
    """Return whether a module is of a class of torch's own, and has no code of its own."""
    return type(module).__module__.startswith("torch.nn.") and computes_as(module, type(module))


def is_plain(module: nn.Module, kind: Kind) -> bool:
    """Return whether a module is a layer of a kind and nothing else, by its class or by what it computes."""
    known = known_class(module, [kind])
    if known is None:
        return observe(module, kind) is not None
    return computes_as(module, known[1])


def observe(module: nn.Module, kind: Kind) -> Fields | None:
    """Return the fields of a module of unknown class as a layer of that kind, found by running a small copy of it.

    Returns:
        None where it has other tensors, or computes something else.
    """
    layer = None if list(module.children()) else found_layers(module).get("")
    if layer is None or layer.kind is not kind:
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


def known_class(module: nn.Module, kinds: Sequence[Kind] = KINDS) -> tuple[Kind, type[nn.Module]] | None:
    """Return the kind that a module's class says it is, and the class of torch's that it is or is derived from."""
    classes = [(f"{one.__module__}.{one.__qualname__}", one) for one in type(module).__mro__]
    return next(((kind, one) for kind in kinds for name, one in classes if name in kind.modules), None)


def _tied_layers(model: nn.Module) -> dict[str, str]:
    """Return the layers that share memory with another, or are registered under a second name, with the reason."""
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
    """Return a copy of a small module with float64 ones for its tensors, whatever device they are on."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False)):
        ones = torch.ones(tensor.shape, dtype=torch.float64, device="cpu")
        memo[id(tensor)] = nn.Parameter(ones, requires_grad=False) if isinstance(tensor, nn.Parameter) else ones
    return copy.deepcopy(module, memo).eval()


def parametrizations(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each with the name of the tensor that it makes."""
    if is_parametrized(module):
        for name, listed in module.get_submodule("parametrizations").named_children():
            yield from ((name, one) for one in listed.children())
