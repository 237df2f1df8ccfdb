"""What code a module has besides the layer that it is, seen by running it alone on shapes: an activation, a padding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.fields import Fields, geometry_fields
from convtool.errors import RefusedError, a_or_an
from convtool.graph.computed import with_own_weight
from convtool.graph.operations import VIEWS_OF_CONSTANTS, fields_of
from convtool.graph.recorded_run import INPUT, Operation
from convtool.kinds import standardized
from convtool.kinds.kind import UNKNOWN, Kind, Layer
from convtool.live.layers import (
    ModelLayers,
    computes_as,
    found_layers,
    is_plain,
    known_class,
    observe,
    parametrizations,
    stated_fields,
)
from convtool.live.modules import HOOKS
from convtool.live.recorder import Recorded, record
from convtool.live.trace import nowhere

_ALL_THE_SAME = "pass check=False to replace the layer all the same"
_RANKS = (4, 3, 5, 2)  # of inputs to try where a layer doesn't tell


@dataclass(frozen=True, slots=True)
class Inside:
    """A module of a class of its own, and the operation in it that is a layer.

    Attributes:
        fields: that the operation has.
        before, after: the operations in front of it and behind it that do something.
        followers: the module's children that run behind it, by name.
        shape: of the input that it was run on.
    """

    fields: Fields
    before: tuple[Operation, ...]
    after: tuple[Operation, ...]
    followers: Mapping[str, nn.Module]
    shape: tuple[int, ...]


def look_inside(module: nn.Module, kind: Kind) -> Inside | None:
    """Return what a module does, where one of its operations is the layer that its own tensors make; else None."""
    layer = found_layers(module).get("")
    if layer is None or layer.kind is not kind:
        return None
    # Where its attributes mean something else, those that tell how many channels meet hardly do.
    told = {name: value for name in ("groups", "transposed") if isinstance(value := getattr(module, name, None), int)}
    channels = layer.kind.takes(layer.shapes, stated_fields(module, kind) or told, None)
    axes = layer.axes()
    for rank in _RANKS if axes is None else (axes + 2,):
        shape = (1, channels or 1, *(4 * max((1, *layer.shapes.get("weight", ())[2:])),) * (rank - 2))
        recorded = _run(module, shape)
        if recorded is not None:
            return _found(module, layer, recorded, shape)
    return None


def fields_inside(model: nn.Module, known: ModelLayers) -> dict[str, Fields]:
    """Return the fields of layers in modules of classes of their own, as far as the layer's operation tells them.

    Those are the convolutions whose code standardises their weight and does nothing else besides, and the batch norms,
    whatever stands behind them in it: an activation is no part of the layer.

    Args:
        known: of the model.
    """
    found = {name: _told(model.get_submodule(name), known.layers[name].kind) for name in known.foreign}
    return {name: fields for name, fields in found.items() if fields is not None}


def _told(module: nn.Module, kind: Kind) -> Fields | None:
    if kind.spare:
        inside = look_inside(module, kind)
        return None if inside is None or inside.before else inside.fields
    inside, besides = _standardizing(module, kind)
    return None if inside is None or besides else inside.fields


def _standardizing(module: nn.Module, kind: Kind) -> tuple[Inside | None, tuple[Operation, ...]]:
    """Return what a module that standardises its weight does, and what of that is something else; None of others."""
    inside = look_inside(module, kind) if "standardized" in kind.fields else None
    if inside is None or "standardized" not in inside.fields:
        return None, ()
    return inside, inside.before + inside.after


def check_standardizes_alone(module: nn.Module, kind: Kind) -> None:
    """Raise RefusedError unless a plain convolution can stand in the place of a module that standardises its weight."""
    inside, besides = _standardizing(module, kind)
    if inside is None or besides:
        what = ", ".join(dict.fromkeys(one.name.split(".")[1] for one in besides))
        does = "does more than to standardize the layer's weight"
        raise RefusedError(f"{a_or_an(type(module).__name__)}, whose code {does}{f': {what}' if what else ''}")


def without_layer(module: nn.Module, kind: Kind, known: dict[tuple[type, str], tuple[str, ...]]) -> nn.Module:
    """Return what stands in a module's place once the layer in it is gone: nothing, or its children behind the layer.

    Args:
        known: the children that stay of modules that were looked at before, and look the same.

    Raises:
        RefusedError: the rest can't be made of the module's children.
    """
    if is_plain(module, kind):
        return nn.Identity()
    alike = type(module), repr(module)
    if alike not in known:
        known[alike] = tuple(_rest(module, kind))
    rest = nn.Sequential()
    for name in known[alike]:
        rest.add_module(name, module.get_submodule(name))
    return rest.train(module.training) if known[alike] else nn.Identity()


def _rest(module: nn.Module, kind: Kind) -> Iterable[str]:
    """Return the children of a module that do all that it does besides the layer."""
    what = f"{a_or_an(type(module).__name__)}, whose code does more than the layer"
    inside = look_inside(module, kind)
    if inside is None or inside.before:
        raise RefusedError(f"{what}: what is left of it can't be told")
    rest = nn.Sequential()
    for name, child in inside.followers.items():
        rest.add_module(name, child)
    again = _run(rest, inside.shape)
    if again is None or _names(again.run.operations) != _names(inside.after):
        raise RefusedError(f"{what}: the rest isn't done by modules in it alone")
    return inside.followers


def difference(module: nn.Module, source: SourceLayer, *, ends: bool) -> tuple[str, str]:
    """Return in what a module isn't the layer that was fused, in words, and the way out; '' and '' where it is.

    Args:
        source: that layer, as its record says.
        ends: whether nothing else that was fused runs behind it.
    """
    kind = source.kind
    if kind.parameter:
        return "", ""
    what, known = f"the model has {a_or_an(type(module).__name__)} there", known_class(module, [kind])
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if known is not None and any(not isinstance(hook, (*HOOKS, WeightNorm)) for hook in hooks):
        return f"{what} with forward hooks, which would be lost", f"Take them off, or {_ALL_THE_SAME}"
    if other := next((name for name, one in parametrizations(module) if not isinstance(one, _WeightNorm)), ""):
        return f"{what} with a parametrization of its {other}, which would be lost", f"Remove it, or {_ALL_THE_SAME}"
    try:
        told = known is not None and computes_as(module, known[1])
        found = stated_fields(module, kind) if told else observe(module, kind)
    except RefusedError as error:
        return f"{what} that {error}", f"Leave the layer out when fusing, or {_ALL_THE_SAME}"
    if found is None:
        inside = look_inside(module, kind)
        if inside is None or ((kind.main or not ends) and inside.after):
            code = "" if known is None else f" whose code isn't that of nn.{known[1].__name__} alone,"
            # Nothing keeps what the module does behind the layer: not even check=False, which replaces it whole.
            last = inside is not None and not inside.before and not kind.main
            way = "Fuse a chain that ends with it" if last else "Leave the layer out when fusing"
            return f"{what},{code} and a {kind.label} was fused", way
        found = inside.fields
    shapes = found_layers(module).get("", Layer("", UNKNOWN, {})).shapes
    # What nobody knew of the layer when it was fused, nothing depends on.
    # But a weight that was taken as it is, is none that the model standardises.
    fused, live = kind.describe({**standardized.without(found), **source.fields}, shapes), kind.describe(found, shapes)
    if fused == live:
        return "", ""
    return f"{fused} was fused, and the model has {live}", f"State it with --set when fusing, or {_ALL_THE_SAME}"


def put_numbers(module: nn.Module, source: SourceLayer, fused: Conv, dtype: torch.dtype, device: torch.device) -> None:
    """Let a module of a class of its own, which goes on to run its code, have a fused layer's weight and bias.

    Raises:
        RefusedError: the fused layer has another geometry, or the module's code can't take a bias.
    """
    what = f"{source.name} is {a_or_an(type(module).__name__)}, whose code does more than the layer"
    weight = module._parameters.get("weight")
    if weight is None or not same_geometry(fused, source.kind, tuple(weight.shape), source.fields):
        raise RefusedError(f"{what}: a layer of another geometry can't take its place")
    if "bias" not in module._parameters:
        raise RefusedError(f"{what}: it has no place for a bias")
    for name, numbers in (("weight", fused.weight), ("bias", fused.bias)):
        shape = None if numbers is None else weight.shape if name == "weight" else numbers.shape
        empty = None if shape is None else torch.empty(shape, dtype=dtype, device=device)
        module._parameters[name] = None if empty is None else nn.Parameter(empty)


def same_geometry(fused: Conv, kind: Kind, shape: tuple[int, ...], fields: Fields) -> bool:
    """Return whether a fused layer has the kernel and the geometry of one of its layers, as far as that is stated."""
    own = kind.written_out({key: value for key, value in fields.items() if key in kind.fields}, {"weight": shape})
    theirs = geometry_fields(fused.geometry)
    same = all(theirs[key] == value for key, value in own.items() if key in theirs)
    return same and fused.weight.numel() == math.prod(shape) and tuple(fused.weight.shape[2:]) == shape[2:]


def _run(module: nn.Module, shape: Sequence[int]) -> Recorded | None:
    dtype = next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.float32)
    with nowhere(module) as (mode, kept):
        with mode:
            x: Tensor = torch.zeros(shape, dtype=dtype)
        recorded = record(module, (x,), (), mode, kept, held=False)
        return recorded if recorded.failure is None else None


def _found(module: nn.Module, layer: Layer, recorded: Recorded, shape: tuple[int, ...]) -> Inside | None:
    operations = [one for one in recorded.run.operations if one.reads or one.name == INPUT]
    own = {name for name in layer.tensors if name not in layer.kind.counters}
    reading = [number for number, one in enumerate(recorded.run.operations) if own & set(one.tensors)]
    places = [number for number in reading if recorded.run.operations[number].reads]
    if len(places) != 1:
        return None
    last = recorded.run.operations[places[0]]
    operation, made, _ = with_own_weight(recorded.run.operations, last)
    if operation.computed or {name for name, _ in operation.operands.values()} != own:
        return None
    kind = layer.kind
    if kind.parameter:
        takes = recorded.run.operations[operation.reads[0]].shape
        about = operation.name, operation.arguments, takes, operation.shape
        fields = kind.of_operation(*about) if operation.name in kind.operations else None
    else:
        fields = fields_of(layer, operation)
    if fields is None:
        return None
    at = operations.index(last)
    children = dict(module.named_children())
    called = dict.fromkeys(name for name, number in recorded.calls if number > places[0] and name in children)
    return Inside(
        {**fields, **made},
        tuple(one for one in operations[:at] if _does_something(one)),
        tuple(one for one in operations[at + 1 :] if _does_something(one)),
        {name: children[name] for name in called},
        shape,
    )


def _does_something(operation: Operation) -> bool:
    return operation.name != INPUT and operation.name not in VIEWS_OF_CONSTANTS


def _names(operations: Sequence[Operation]) -> list[tuple[str, Any]]:
    return [(one.name, one.shape) for one in operations if _does_something(one) and one.reads]
