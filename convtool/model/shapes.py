"""The layers of a model without their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from convtool.checkpoint import Layer
from convtool.core.fields import Fields
from convtool.core.geometry import Geometry
from convtool.model.layers import ModuleLayer
from convtool.model.state import StateCheckpoint


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer without its numbers.

    Attributes:
        kind: as in a checkpoint.
        weight: (C_out, C_in/groups, *kernel), also of a transposed layer.
        biased: whether it adds anything but zeros.
        stored_bias: whether it has a bias at all.
        geometry: of a convolution.
        groups: of the linear map; the channels of a batch norm or a scale.
        dtype: of its numbers.
    """

    kind: str
    weight: tuple[int, ...]
    biased: bool
    stored_bias: bool
    geometry: Geometry | None
    groups: int
    dtype: torch.dtype = torch.float32


def layer_shapes(
    state: StateCheckpoint, layers: Mapping[str, ModuleLayer], is_biased: Callable[[str], bool]
) -> dict[str, LayerShape]:
    """Of every layer that a model's state dict shows, with the geometry of its module."""
    shapes = {}
    for name, layer in state.layers.items():
        module = layers.get(name)
        if layer.kind == "scale" or (module is not None and module.kind == layer.kind):
            shapes[name] = _layer_shape(layer, {} if module is None else module.fields, is_biased)
    return shapes


def _layer_shape(layer: Layer, fields: Fields, is_biased: Callable[[str], bool]) -> LayerShape:
    infos = layer.tensors
    if layer.kind in ("batch_norm", "scale"):
        info = infos["running_mean"] if layer.kind == "batch_norm" else next(iter(infos.values()))
        channels, norm = info.shape[0], layer.kind == "batch_norm"
        return LayerShape(layer.kind, (channels, 1), norm, norm, None, channels, getattr(torch, info.dtype))
    weight, bias, dtype = infos["weight"].shape, infos.get("bias"), getattr(torch, infos["weight"].dtype)
    biased = bias is not None and is_biased(layer.name)
    if layer.kind == "linear":
        return LayerShape("linear", weight, biased, bias is not None, None, 1, dtype)
    geometry = Geometry.of(weight[2:], **fields)
    if geometry.transposed:
        weight = (weight[1] * geometry.groups, weight[0] // geometry.groups, *weight[2:])
    return LayerShape(layer.kind, weight, biased, bias is not None, geometry, geometry.groups, dtype)
