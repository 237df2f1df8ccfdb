"""Layers without tensors as they are written in a chain: 'avg_pool(2)', 'pad(0:1,2:2)', 'scale(0.5)'."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from convtool.core.conv import Conv
from convtool.core.fields import parse_field
from convtool.core.layers import average_pool, identity, nearest_upsample, scale, zero_pad
from convtool.errors import RefusedError, UsageError

_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def is_function(name: str) -> bool:
    """Whether the name is that of a layer without tensors."""
    return _CALL.fullmatch(name) is not None


def make_function(text: str, channels: int, axes: int) -> Conv:
    """The layer that the text describes, for an input of `channels` channels and `axes` spatial axes.

    Raises:
        RefusedError: the layer isn't linear.
        UsageError: an unknown layer, or arguments that it doesn't have.
    """
    name, arguments = _parse(text)
    if name in NOT_LINEAR:
        raise RefusedError(f"{text}: {name} is not linear; nothing can be fused across it")
    if name not in FUNCTIONS:
        raise UsageError(f"{text}: unknown layer {name!r}; expected one of {', '.join((*FUNCTIONS, 'flatten'))}")
    fields, build = FUNCTIONS[name]
    unknown = arguments.keys() - fields
    if unknown:
        raise UsageError(f"{text}: {name} has no {sorted(unknown)[0]}; it takes {', '.join(fields) or 'nothing'}")
    try:
        return build(channels, axes, **arguments)
    except TypeError:
        raise UsageError(f"{text}: {name} takes {', '.join(fields)}") from None


def flatten_size(text: str) -> tuple[int, ...] | None:
    """(H, W) where the text is 'flatten(H,W)', the size of the feature map that is flattened; else None."""
    call = _CALL.fullmatch(text)
    if call is None or call[1] != "flatten":
        return None
    try:
        size = tuple(int(part) for part in call[2].split(","))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise UsageError(f"{text}: expected the spatial sizes of what is flattened, such as flatten(7,7)")
    return size


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """'avg_pool(2,3; padding=1)' as ('avg_pool', {'kernel_size': [2, 3], 'padding': 1}); semicolons part arguments."""
    call = _CALL.fullmatch(text)
    if call is None:
        raise UsageError(f"{text!r}: expected NAME(ARGUMENTS)")
    name, inside = call[1], call[2].strip()
    arguments: dict[str, Any] = {}
    for number, part in enumerate(part.strip() for part in inside.split(";") if part.strip()):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            key, value = (FUNCTIONS.get(name, ((),))[0] or ("",))[0], part
            if number:
                raise UsageError(f"{text}: expected name=value after the first argument, got {part!r}")
        arguments[key] = _value(key, value, text)
    return name, arguments


def _value(key: str, value: str, text: str) -> Any:
    if key in ("stride", "padding"):
        return parse_field(key, value)
    if key == "kernel_size" or (key == "factor" and text.startswith("upsample")):
        return parse_field("stride", value)
    if key == "count_include_pad":
        return parse_field("transposed", value)
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"{text}: {key or 'argument'}: expected a number, got {value!r}") from None


def _scale(channels: int, axes: int, factor: float) -> Conv:
    return scale(torch.full((channels,), factor, dtype=torch.float64), axes)


FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[..., Conv]]] = {
    "identity": ((), identity),
    "scale": (("factor",), _scale),
    "avg_pool": (("kernel_size", "stride", "padding", "count_include_pad"), average_pool),
    "upsample": (("factor",), nearest_upsample),
    "pad": (("padding",), zero_pad),
}
NOT_LINEAR = frozenset(
    {"relu", "relu6", "gelu", "silu", "swish", "sigmoid", "tanh", "hardswish", "softmax", "max_pool", "layer_norm"}
    | {"group_norm", "instance_norm", "dropout"}
)
