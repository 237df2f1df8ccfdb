"""Layers that multiply each channel by a number of its own: scales, identities, and what is done to images first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convtool.core.fields import NUMBER, NUMBER_OR_TENSOR, NUMBERS, Fields
from convtool.errors import RefusedError, UsageError
from convtool.kinds.flatten import VIEWS
from convtool.kinds.kind import Kind, Layer, Shape, Shapes, TensorInfo, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.core.conv import Conv


_DROPOUTS = tuple(f"aten.{name}.default" for name in ("dropout", "feature_dropout", "alpha_dropout"))
_ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor")


class Scale(Kind):
    """A factor for each channel, from a tensor (a layer scale), or one for all, as written: scale(0.5)."""

    name = "scale"
    tensors = ("gamma", "layer_scale_parameter", "lambda1", "factor")  # as timm and transformers call them; scale(X)
    fields = {"factor": NUMBER_OR_TENSOR}
    written = True
    parameter = True
    per_channel = True
    inverse = "scale"
    operations = ("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        modules = set(self.tensors) - {"factor"}
        return len(tensors) == 1 and all(name in modules and _is_factor(info) for name, info in tensors.items())

    def is_tensor(self, name: str, info: TensorInfo) -> bool:
        return channels_of(info.shape) is not None

    def check_found(self, layer: Layer) -> None:
        if "norm" in layer.name.rpartition(".")[2].lower():
            tensor = next(layer.tensor_names())
            raise RefusedError(
                f"{layer.name} holds nothing but {tensor}, as an RMS norm does, which isn't linear; if it is a plain"
                f" scale, name the tensor: {tensor}"
            )

    def width(self, shapes: Shapes, fields: Fields) -> int | None:
        return next((channels_of(shape) for shape in shapes.values()), None)

    def moves_over(self, rank: int, shapes: Shapes, fields: Fields) -> int | None:
        # (C, 1, 1) and (1, C, 1, 1) run over the last two.
        axes = max((len(shape) - 1 - _channel_axis(shape) for shape in shapes.values()), default=0)
        return axes if rank == axes + 2 or (axes == 0 and rank >= 2) else None

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        other, divides = arguments.get("other"), "div" in name
        if takes != gives or (divides and arguments.get("rounding_mode")):
            return None
        if other is None:  # by a tensor
            return None if divides else {}
        plain = isinstance(other, int | float) and not isinstance(other, bool) and math.isfinite(other) and other
        return {"factor": 1.0 / other if divides else float(other)} if plain else None

    def undone_by(self, fields: Fields) -> Fields | None:
        factor = fields.get("factor")  # or a tensor's full name, which none is the inverse of
        return {"factor": 1.0 / factor} if isinstance(factor, int | float) and factor else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        if tensors:
            (factors,) = tensors.values()
            if channels_of(tuple(factors.shape)) is None:
                raise UsageError(f"expected a number for each channel, got a tensor of shape {tuple(factors.shape)}")
            return per_channel(factors.reshape(-1), axes)  # (C,), whatever axes of size 1 there are
        if isinstance(fields["factor"], str):
            raise UsageError(f"{fields['factor']} is the name of a tensor, and here there is no checkpoint")
        return per_channel(torch.full((channels or 0,), fields["factor"], dtype=torch.float64), axes)

    def observe(self, run: Callable[[Tensors, Tensor], Tensor], shapes: Shapes) -> Fields | None:
        import torch

        ((name, shape),) = shapes.items()
        if len(shape) != 1:
            return None
        generator = torch.Generator().manual_seed(0)
        factors = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5
        x = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)
        return {} if torch.equal(run({name: factors}, x), x * factors) else None


class Identity(Kind):
    """A branch, or a place in a chain, that changes nothing."""

    name = "identity"
    written = True
    code = "nowhere"
    neutral = True
    bare_modules = ("torch.nn.modules.linear.Identity",)
    operations = (
        *(f"aten.{name}.default" for name in ("clone", "alias", "detach", "contiguous", "lift_fresh")),
        *_DROPOUTS,
        *VIEWS,
        *_ADDITIONS,
    )

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        at_rest = name not in _DROPOUTS or arguments.get("train") is False
        nothing = name not in _ADDITIONS or (arguments.get("other") == 0 and arguments.get("alpha", 1) == 1)
        return {} if takes == gives and at_rest and nothing else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        return per_channel(torch.ones(channels or 0, dtype=torch.float64), axes)


class Normalize(Kind):
    """(x * scale - mean) / std, channel by channel: what is done to images before a network sees them."""

    name = "normalize"
    fields = {"mean": NUMBERS, "std": NUMBERS, "scale": NUMBER}
    defaults = {"mean": [0.0], "std": [1.0], "scale": 1.0}
    written = True
    code = "input"

    def width(self, shapes: Shapes, fields: Fields) -> int | None:
        counts = {len(fields[name]) for name in ("mean", "std") if name in fields} - {1}
        return counts.pop() if len(counts) == 1 else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        import torch

        channels = channels or 0
        mean, std, scale = ({**self.defaults, **fields}[name] for name in ("mean", "std", "scale"))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise UsageError(f"{name}: expected 1 or {channels} numbers, one per channel, got {len(values)}")
        if not all(value > 0 for value in std):
            raise UsageError(f"std: expected numbers above 0, got {', '.join(map(str, std))}")
        shift, spread = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in (mean, std))
        return per_channel(scale / spread, axes, -shift / spread)


SCALE, IDENTITY, NORMALIZE = Scale(), Identity(), Normalize()


def per_channel(factors: Tensor, axes: int, offsets: Tensor | None = None) -> Conv:
    """Return y[c] = factors[c] * x[c] + offsets[c], a depthwise 1x1 convolution over `axes` spatial axes.

    Args:
        factors: (C,)
        offsets: (C,) or None.
    """
    from convtool.core.conv import Conv, pointwise

    return Conv(factors.reshape(-1, 1, *(1,) * axes), offsets, pointwise(axes, groups=len(factors)))


def channels_of(shape: Shape) -> int | None:
    """Return how many channels a tensor has a number for: the one axis that isn't 1; None where there are more."""
    return math.prod(shape) if shape and sum(size != 1 for size in shape) <= 1 else None


def _channel_axis(shape: Shape) -> int:
    return next((axis for axis, size in enumerate(shape) if size != 1), 0)


def _is_factor(info: TensorInfo) -> bool:
    """Return whether a tensor is of shape (C,), or of (C, 1, 1), ..., as it multiplies feature maps."""
    shape: Sequence[int] = info.shape
    return bool(shape) and all(size == 1 for size in shape[1:])
