"""Modules of known kinds as the layers that they are, wherever the Python API takes a layer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from convtool.core.conv import Conv
from convtool.core.expression import Expression, output_size
from convtool.core.fields import Fields, geometry_fields
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves, map_leaves
from convtool.errors import RefusedError, UsageError, a_or_an, about
from convtool.fusing.lowering import lower_tree, stored_dtype
from convtool.kinds import KINDS
from convtool.kinds.kind import UNKNOWN
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.kinds.written import layer_of_module
from convtool.live.layers import module_layers
from convtool.live.state import StateCheckpoint

LayerLike: TypeAlias = Any  # a Conv, a Stored, an nn.Module, or a text such as 'avg_pool(2)'

_AXES = re.compile(r"(\d)d$")  # torch's names of classes say the spatial axes: BatchNorm2d, AvgPool1d


def lower_modules(
    tree: Tree[LayerLike], input_size: Sequence[int] | None = None
) -> tuple[Expression, torch.dtype | None]:
    """Return layers, modules among them, as `Conv`s, and the dtype that they are stored in.

    Args:
        tree: `Conv`s, modules, and layers without tensors as they are written in a chain: 'avg_pool(2)'.
        input_size: of the tree's input, with or without the channels in front.

    Raises:
        UsageError: a module of no known kind, or channels that don't fit.
        RefusedError: a module that computes something else than its class says.
        InputError: numbers that aren't finite, or none at all.
    """
    found = (_AXES.search(type(leaf).__name__) for leaf in leaves(tree))
    axes = next((int(one[1]) for one in found if one), None)
    tree = _written_out(tree, input_size, axes)
    numbers = itertools.count(1)
    tensors: dict[str, Tensor] = {}
    tables: dict[str, Fields] = {}

    def named(leaf: LayerLike) -> LayerRef:
        if isinstance(leaf, str):
            return LayerRef(leaf)
        name = f"layer {next(numbers)}"
        own, fields = _parts(leaf, name)
        tensors.update({f"{name}.{key}": value for key, value in own.items()})
        tables[name] = fields
        return LayerRef(name)

    refs: Tree[LayerRef] = map_leaves(named, tree)
    sources = FieldSources((FieldSource("the modules", tables, exact_names=True),))
    state = StateCheckpoint(tensors)
    lowered = lower_tree({BASE: state}, refs, sources, input_size, axes=axes)
    return map_leaves(lambda leaf: leaf.conv, lowered), stored_dtype(list(leaves(lowered))) if tensors else None


def _written_out(tree: Tree[LayerLike], input_size: Sequence[int] | None, axes: int | None) -> Tree[LayerLike]:
    """Return the tree with modules that have no tensors as they are written: nn.AvgPool2d(2) as 'avg_pool(2)'."""

    def size_behind(before: tuple[LayerLike, ...]) -> tuple[int, ...] | None:
        if input_size is None:
            return None
        known = len(input_size) - 1 if axes is None else axes
        spatial = tuple(input_size[len(input_size) - known :])
        return output_size(lower_modules(Chain(before), input_size)[0], spatial) if before else spatial

    def written(part: Tree[LayerLike], before: tuple[LayerLike, ...]) -> Tree[LayerLike]:
        if isinstance(part, Chain):
            parts: list[Tree[LayerLike]] = []
            for one in part.parts:
                parts.append(written(one, (*before, *parts)))
            return Chain(tuple(parts))
        if isinstance(part, Sum):
            return type(part)(tuple(written(one, before) for one in part.parts))
        if not isinstance(part, nn.Module) or part._forward_hooks or part._forward_pre_hooks:
            return part
        with about(type(part).__name__):
            layer = layer_of_module(part, partial(size_behind, before))
        return part if layer is None else layer.name

    return written(tree, ())


def _parts(leaf: LayerLike, name: str) -> tuple[Mapping[str, Tensor], Fields]:
    """Return a layer's tensors by parameter name, and its fields."""
    if isinstance(leaf, Conv):
        bias = {} if leaf.bias is None else {"bias_map" if leaf.has_bias_map else "bias": leaf.bias}
        return {"weight": leaf.torch_weight(), **bias}, geometry_fields(leaf.geometry) if leaf.spatial_axes else {}
    if not isinstance(leaf, nn.Module):
        raise UsageError(f"{name}: expected a Conv or an nn.Module, got {a_or_an(type(leaf).__name__)}")
    what, found = f"{name}, {a_or_an(type(leaf).__name__)},", module_layers(leaf)
    layer = found.layers.get("")
    if layer is None or layer.kind is UNKNOWN:
        known = sorted({path.rpartition(".")[2] for kind in KINDS for path in (*kind.modules, *kind.bare_modules)})
        inside = "; name the layers in it, or see `convtool.plan`" if list(leaf.children()) else ""
        raise UsageError(
            f"{what} is of no kind known here: expected {', '.join(known)}, an nn.Sequential of them, or a text such as"
            f" 'avg_pool(2)'{inside}"
        )
    if "" in found.foreign:
        raise RefusedError(f"{name} is {found.foreign['']}; what that is, isn't known")
    if any(
        not isinstance(hook, WeightNorm) for hook in (*leaf._forward_hooks.values(), *leaf._forward_pre_hooks.values())
    ):
        raise RefusedError(f"{what} has forward hooks, and what they do isn't known; remove them first")
    tensors = {key: value for key, value in leaf.state_dict().items() if isinstance(value, Tensor)}
    if any(value.is_meta for value in tensors.values()):
        raise UsageError(f"{what} is on the meta device, where tensors have no numbers; load its weights first")
    return tensors, layer.fields
