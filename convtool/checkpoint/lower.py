"""A named layer of a checkpoint as a `Conv`: one function per kind, in one table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.info import Layer, why_not_plain
from convtool.core.conv import Conv, lower_batch_norm, lower_conv, lower_linear
from convtool.core.fields import DEFAULT_EPS, Fields
from convtool.core.geometry import Geometry
from convtool.core.layers import linear_after_flatten, scale
from convtool.errors import ConvtoolError, InputError, UsageError


def lower_layer(checkpoint: Checkpoint, layer: Layer, fields: Fields, spatial_axes: int) -> Conv:
    """The layer with the given fields as a `Conv`, torch's defaults for the rest.

    Args:
        fields: stride, padding, ... of a convolution; eps of a batch norm.
        spatial_axes: of the layer's input, for the kinds whose tensors don't tell.

    Raises:
        InputError: the kind isn't a linear map that convtool knows, or a tensor holds inf or NaN.
        UsageError: the fields don't fit the tensors.
    """
    where = f"{checkpoint.path}: {layer.name or 'the bare module'}"
    if layer.kind not in _LOWERINGS:
        raise InputError(f"{where}: {_why_not(layer)}")
    others = _other_tensors(layer)
    if others:
        raise InputError(
            f"{where}: holds {', '.join(others)} as well, and what a {layer.kind.replace('_', ' ')} does with"
            f" {'that' if len(others) == 1 else 'those'} isn't known"
        )
    unknown = fields.keys() - _FIELDS[layer.kind]
    if unknown:
        raise UsageError(f"{where}: a {layer.kind.replace('_', ' ')} has no {', '.join(sorted(unknown))}")
    tensors = {name: checkpoint.tensor(info.name) for name, info in layer.tensors.items()}
    for name in tensors if layer.kind == "scale" else _NUMBERS:
        if name in tensors:
            _check_numbers(tensors[name], f"{where}.{name}")
    empty = [name for name in ("weight", "running_mean") if name in tensors and not tensors[name].numel()]
    if empty:
        raise InputError(f"{where}.{empty[0]}: holds no numbers (shape {tuple(tensors[empty[0]].shape)})")
    try:
        return _LOWERINGS[layer.kind](tensors, fields, spatial_axes)
    except ConvtoolError as error:
        raise type(error)(f"{where}: {error}") from None


def _conv(tensors: dict[str, Tensor], fields: Fields, spatial_axes: int) -> Conv:
    weight = tensors["weight"]
    if "bias" in tensors and "bias_map" in tensors:
        raise InputError("holds a bias and a bias_map, of which a layer has one")
    bias = tensors.get("bias_map", tensors.get("bias"))
    if bias is not None and len(bias) != len(weight) and len(bias) == weight.shape[1] and "transposed" not in fields:
        raise UsageError(
            f"its bias of {len(bias)} numbers is that of a transposed convolution; say so: transposed=true"
        )
    return lower_conv(weight, bias, Geometry.of(tuple(weight.shape[2:]), **fields))


def _linear(tensors: dict[str, Tensor], fields: Fields, spatial_axes: int) -> Conv:
    if "flatten" in fields:
        return linear_after_flatten(tensors["weight"], tensors.get("bias"), fields["flatten"])
    return lower_linear(tensors["weight"], tensors.get("bias"), spatial_axes)


def _scale(tensors: dict[str, Tensor], fields: Fields, spatial_axes: int) -> Conv:
    (factors,) = tensors.values()
    return scale(factors.reshape(-1), spatial_axes)  # (C,), whatever axes of size 1 follow


def _batch_norm(tensors: dict[str, Tensor], fields: Fields, spatial_axes: int) -> Conv:
    return lower_batch_norm(
        tensors["running_mean"],
        tensors["running_var"],
        tensors.get("weight"),
        tensors.get("bias"),
        fields.get("eps", DEFAULT_EPS),
        spatial_axes,
    )


_LOWERINGS: dict[str, Callable[[dict[str, Tensor], Fields, int], Conv]] = {
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "scale": _scale,
}
_OWN = {
    "conv": {"weight", "bias", "bias_map"},
    "linear": {"weight", "bias"},
    "batch_norm": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
}
_NUMBERS = ("weight", "bias", "bias_map", "running_mean", "running_var")
_GEOMETRY = {"stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding"}
_FIELDS = {"conv": _GEOMETRY, "linear": {"flatten"}, "batch_norm": {"eps"}, "scale": set[str]()}


def _other_tensors(layer: Layer) -> list[str]:
    """Tensors that a layer of its kind doesn't have: it isn't quite of that kind then."""
    sources = {name for info in layer.tensors.values() for name in info.derived_from}
    own = _OWN.get(layer.kind, layer.tensors.keys())
    return [name for name, info in layer.tensors.items() if name not in own and info.name not in sources]


def _check_numbers(tensor: Tensor, where: str) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise InputError(f"{where}: expected floating-point numbers, got {str(tensor.dtype).removeprefix('torch.')}")
    numbers = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # float8 knows no isfinite
    if not bool(numbers.isfinite().all()):
        raise InputError(f"{where}: holds inf or NaN; nothing exact can be said of it")


def _why_not(layer: Layer) -> str:
    reason = why_not_plain(layer.tensors)
    if reason is not None:
        return reason
    names = set(layer.tensors)
    return f"is not a convolution, linear layer or batch norm (it holds {', '.join(sorted(names))})"
