"""Layers without tensors as they are written in a chain: 'avg_pool(2)', 'pad(0:1,2:2)', 'scale(0.5)'."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from convtool.core.conv import Conv
from convtool.core.fields import parse_field
from convtool.core.geometry import Geometry, format_sizes
from convtool.core.layers import average_pool, check_numbers, identity, nearest_upsample, zero_pad
from convtool.core.layers import scale as per_channel
from convtool.errors import RefusedError, UsageError

_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def is_function(name: str) -> bool:
    """Whether the name is that of a layer without tensors."""
    return _CALL.fullmatch(name) is not None


def check_closed(text: str) -> None:
    """UsageError for what begins as one of these layers does and lacks its end: 'avg_pool(2'."""
    name, opened, _ = text.partition("(")
    if opened and name in {*FUNCTIONS, "flatten"} and not is_function(text):
        raise UsageError(f"{text}: expected {name}(...), which ends in a parenthesis; quote it for the shell")


def make_function(text: str, channels: int, axes: int) -> Conv:
    """The layer that the text describes, for an input of `channels` channels and `axes` spatial axes.

    Raises:
        RefusedError: the layer isn't linear.
        UsageError: an unknown layer, or arguments that it doesn't have.
    """
    call = _CALL.fullmatch(text)
    name = call[1] if call else text
    if name in NOT_LINEAR:
        raise RefusedError(f"{text}: {name} is not linear; nothing can be fused across it")
    if name not in FUNCTIONS:
        raise UsageError(f"{text}: unknown layer {name!r}; expected one of {', '.join((*FUNCTIONS, 'flatten'))}")
    arguments = _parse(text)[1]
    fields, build = FUNCTIONS[name]
    try:
        return build(channels, axes, **arguments)
    except TypeError:
        raise UsageError(f"{text}: {name} takes {', '.join(fields)}, and needs the first of them") from None
    except UsageError as error:
        raise UsageError(f"{text}: {str(error).removeprefix(f'{name}: ').removeprefix(f'{text}: ')}") from None


def function_channels(text: str) -> int | None:
    """The number of channels that the layer's arguments tell, or None."""
    call = _CALL.fullmatch(text)
    if call is None or call[1] != "normalize":
        return None
    arguments = _parse(text)[1]
    counts = {len(arguments[key]) for key in ("mean", "std") if key in arguments} - {1}
    return counts.pop() if len(counts) == 1 else None


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
            key, value = next(iter(FUNCTIONS[name][0]), ""), part
            if number:
                raise UsageError(f"{text}: expected name=value after the first argument, got {part!r}")
        if key not in FUNCTIONS[name][0]:
            takes = ", ".join(FUNCTIONS[name][0]) or "nothing"
            raise UsageError(f"{text}: {name} takes {takes}, got {part!r}")
        if key in arguments:
            raise UsageError(f"{text}: {key} is given twice")
        arguments[key] = _value(key, value, text)
    return name, arguments


def _value(key: str, value: str, text: str) -> Any:
    # Sizes are written as the fields of layers are; a flag as `transposed` is.
    like = {"kernel_size": "stride", "count_include_pad": "transposed"}.get(key, key)
    if key == "factor" and text.startswith("upsample"):
        like = "stride"
    if like in ("stride", "padding", "transposed"):
        try:
            return parse_field(like, value)
        except UsageError as error:
            raise UsageError(f"{text}: {key}: {str(error).partition(': ')[2]}") from None
    if key == "size":
        return parse_field("flatten", value)
    if key in ("mean", "std"):
        return [_number(part.strip(), key, text) for part in value.split(",")]
    return _number(value, key, text)


def _number(value: str, key: str, text: str) -> float:
    """A number, perhaps as a fraction: '0.5', '1/255'."""
    try:
        over, slash, under = value.partition("/")
        number = float(over) / float(under) if slash else float(over)
        if math.isfinite(number):
            return number
    except (ValueError, ZeroDivisionError):
        pass
    raise UsageError(f"{text}: {key or 'argument'}: expected a finite number, got {value!r}")


def _scale(channels: int, axes: int, factor: float) -> Conv:
    return per_channel(torch.full((channels,), factor, dtype=torch.float64), axes)


def _normalize(
    channels: int, axes: int, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,), scale: float = 1.0
) -> Conv:
    """(x * scale - mean) / std, channel by channel: what is done to images before a network sees them."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UsageError(f"normalize: {name}: expected 1 or {channels} numbers, one per channel, got {len(values)}")
    if not all(values > 0 for values in std):
        raise UsageError(f"normalize: std: expected numbers above 0, got {', '.join(map(str, std))}")
    shift, spread = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in (mean, std))
    return per_channel(scale / spread, axes, -shift / spread)


def _unflatten(channels: int, axes: int, size: Sequence[int]) -> Conv:
    """Each channel's positions, which so far are channels themselves, side by side again (nn.Unflatten)."""
    positions = math.prod(size)
    if len(size) != axes or channels % positions:
        raise UsageError(f"unflatten({format_sizes(size)}): {channels} numbers don't make channels of that size")
    check_numbers(positions**2, f"unflatten({format_sizes(size)})")
    kernel = torch.eye(positions, dtype=torch.float64).reshape(1, positions, *size)
    geometry = Geometry.of(tuple(size), groups=channels // positions, transposed=True)
    return Conv(kernel.expand(channels // positions, -1, *(-1,) * axes), None, geometry)


FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[..., Conv]]] = {
    "identity": ((), identity),
    "scale": (("factor",), _scale),
    "avg_pool": (("kernel_size", "stride", "padding", "count_include_pad"), average_pool),
    "upsample": (("factor",), nearest_upsample),
    "pad": (("padding",), zero_pad),
    "normalize": (("mean", "std", "scale"), _normalize),
    "unflatten": (("size",), _unflatten),
}
NOT_LINEAR = frozenset(
    {"relu", "relu6", "leaky_relu", "prelu", "elu", "gelu", "silu", "swish", "mish", "sigmoid", "tanh", "softmax"}
    | {"hardswish", "hardsigmoid", "max_pool", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout"}
)
