"""Layers of the kinds that tests build by hand, by the numbers that they take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.kinds import kind_named
from convtool.kinds.kind import Kind, Layer, TensorInfo
from convtool.kinds.scale import per_channel as scale
from convtool.kinds.written import make_written

__all__ = ["average_pool", "found", "identity", "kind", "lower_batch_norm", "lower_linear", "make", "scale"]


def kind(name: str) -> Kind:
    found = kind_named(name)
    assert found is not None
    return found


def found(name: str, shape: tuple[int, ...] = ()) -> Layer:
    """Return a layer as it is found in a checkpoint, of that kind, with a weight of that shape or none."""
    tensors = {"weight": TensorInfo("weight", "float32", shape, 4 * math.prod(shape))} if shape else {}
    return Layer("", kind(name), tensors)


def make(name: str, channels: int, axes: int, **fields: Any) -> Conv:
    """Return a layer without tensors by its kind's name and its fields."""
    return kind(name).lower({}, fields, axes, channels)


def identity(channels: int, axes: int) -> Conv:
    return make_written("identity()", channels, axes)


def average_pool(channels: int, axes: int, kernel_size: Any, **fields: Any) -> Conv:
    return make("avg_pool", channels, axes, kernel_size=kernel_size, **fields)


def lower_linear(weight: Tensor, bias: Tensor | None, axes: int = 0) -> Conv:
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return kind("linear").lower(tensors, {}, axes, None)


def lower_batch_norm(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: int
) -> Conv:
    given = {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias}
    tensors = {name: torch.as_tensor(tensor) for name, tensor in given.items() if tensor is not None}
    return kind("batch_norm").lower(tensors, {"eps": eps}, axes, None)
