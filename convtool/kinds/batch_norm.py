"""nn.BatchNorm in eval mode: a depthwise 1x1 convolution.

y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, a missing weight being 1 and a missing bias 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convtool.core.fields import POSITIVE, Fields
from convtool.core.tree import Chain, Tree
from convtool.errors import InputError, RefusedError
from convtool.kinds.kind import Kind, Layer, Shapes, TensorInfo, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.core.conv import Conv
    from convtool.core.stored import Stored

_AFFINE = ("weight", "bias", "running_mean", "running_var")


class BatchNorm(Kind):
    """A batch norm by its running statistics; it has eps, which no tensor tells."""

    name = "batch_norm"
    tensors = ("weight", "running_mean", "running_var", "bias", "num_batches_tracked")
    counters = frozenset({"num_batches_tracked"})
    fields = {"eps": POSITIVE}
    defaults = {"eps": 1e-5}
    usual_axes = 2
    spare = True
    per_channel = True
    modules = tuple(
        f"torch.nn.modules.batchnorm.{name}" for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
    )

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        return "running_mean" in tensors and "running_var" in tensors

    def width(self, shapes: Shapes, fields: Fields) -> int | None:
        return shapes["running_mean"][0]

    def apart(self, name: str, tensors: Tensors) -> tuple[float, str] | None:
        import torch

        variance = tensors["running_var"].to(torch.float64)
        ratio = torch.sqrt((variance + 1e-3) / (variance + 1e-5))  # the two values that networks have
        most = float(ratio.max()) if len(ratio) else 1.0
        return (most - 1) * 100, "1e-05 or 0.001"

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        """Return a float64 `Conv` with a group for each channel, whatever the dtype of the tensors.

        Raises:
            InputError: a variance + eps that isn't positive, which no trained batch norm has.
        """
        import torch

        from convtool.core.conv import Conv, pointwise

        exact = {name: tensors[name].to(torch.float64) for name in _AFFINE if name in tensors}
        shift, spread, eps = exact["running_mean"], exact["running_var"], fields.get("eps", self.defaults["eps"])
        lowest = float((spread + eps).min()) if spread.numel() else 1.0
        if not lowest > 0:
            raise InputError(
                f"batch norm: expected running_var + eps above 0, got {lowest:g} (eps {eps:g}); the statistics are"
                " damaged"
            )
        scale = exact.get("weight", torch.ones_like(spread)) / torch.sqrt(spread + eps)
        moved = exact["bias"] - shift * scale if "bias" in exact else -shift * scale
        return Conv(scale.reshape(-1, 1, *(1,) * axes), moved, pointwise(axes, groups=len(scale)))

    def parts(self, conv: Conv, tensors: Tensors, fields: Fields) -> Chain[Conv]:
        """Return two layers: less the mean, and then times the scale, plus the offset; the scale as torch has it.

        Lowered to one layer it has one bias, offset - mean * scale, which may be small where its two parts aren't. The
        bound on what another program's arithmetic can have done to it goes by the parts.
        """
        import torch
        import torch.nn.functional as F

        from convtool.core.conv import Conv

        exact = {name: tensors[name].to(torch.float64) for name in _AFFINE if name in tensors}
        mean, var, ones = exact["running_mean"], exact["running_var"], torch.ones(1, *exact["running_var"].shape)
        eps = fields.get("eps", self.defaults["eps"])
        scale = F.batch_norm(ones.to(var), torch.zeros_like(mean), var, exact.get("weight"), eps=eps)
        weight, shape = scale.reshape(conv.shape), conv.geometry
        return Chain((Conv(torch.ones_like(weight), -mean, shape), Conv(weight, exact.get("bias"), shape)))

    def doubt(self, layer: Layer, conv: Conv) -> str:
        # InPlaceABN has the same tensors but for the counter, takes its weights' absolute values, and an activation.
        if "num_batches_tracked" in layer.tensors or not bool((conv.weight < 0).any()):
            return ""
        return "has weights below 0 and no counter, as a batch norm with an activation inside has; --model tells"

    def stored(self, conv: Conv, tensors: Tensors, fields: Fields) -> Tree[Stored]:
        """Return the two layers of `parts`."""
        import torch

        from convtool.core.conv import Conv
        from convtool.core.stored import Stored, half_ulp

        mean, bias, geometry = tensors["running_mean"], tensors.get("bias"), conv.geometry
        moved, scaled = self.parts(conv, tensors, fields).parts
        assert isinstance(moved, Conv)
        assert isinstance(scaled, Conv)
        eps = fields.get("eps", self.defaults["eps"])
        error = _scale_error(scaled.weight.flatten(), tensors, eps).reshape(scaled.weight.shape)
        offset = None if bias is None else half_ulp(bias, bias.dtype)
        still = Conv(torch.zeros_like(moved.weight), half_ulp(mean, mean.dtype), geometry)
        return Chain((Stored(moved, still), Stored(scaled, Conv(error, offset, geometry))))

    def timed(self, conv: Conv, x: Tensor) -> Callable[[], Tensor]:
        import torch
        import torch.nn.functional as F

        ones = torch.ones(conv.in_channels, dtype=x.dtype)
        return lambda: F.batch_norm(x, ones, ones, ones, ones)

    def module_fields(self, module: Any) -> Fields:
        if module.running_mean is None:
            raise RefusedError("keeps no statistics and goes by those of each batch")
        return {"eps": float(module.eps)}

    def fields_of_run(self, run: Sequence[tuple[str, Mapping[str, Any]]], shapes: Shapes) -> Fields | None:
        name, arguments = run[-1]
        eps, plain = arguments.get("eps", arguments.get("epsilon")), len(run) == 1 and not arguments.get("training")
        return {"eps": float(eps)} if plain and "batch_norm" in name and isinstance(eps, int | float) else None

    def observe(self, run: Callable[[Tensors, Tensor], Tensor], shapes: Shapes) -> Fields | None:
        """Find eps of a batch norm in other code than torch's (torchvision's, DETR's frozen ones).

        With a variance of 0 and all else neutral it multiplies by 1 / sqrt(eps); then it is held against the formula.
        """
        import torch

        if shapes.keys() - self.counters != set(_AFFINE):
            return None
        channels, generator = shapes["running_mean"][0], torch.Generator().manual_seed(0)
        x = torch.randn(2, channels, 3, 4, dtype=torch.float64, generator=generator)
        zero, one = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
        neutral = {"running_mean": zero, "running_var": zero, "weight": one, "bias": zero}
        gain = float(run(neutral, torch.ones_like(x))[0, 0, 0, 0])
        eps = float(f"{gain**-2:.12g}") if gain > 0 else 0.0
        some = {name: torch.rand(channels, dtype=torch.float64, generator=generator) + 0.5 for name in sorted(_AFFINE)}
        mean, var, weight, bias = (
            some[name].reshape(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        expected = (x - mean) / torch.sqrt(var + eps) * weight + bias
        return {"eps": eps} if torch.allclose(run(some, x), expected, rtol=1e-9, atol=1e-9) else None


BATCH_NORM = BatchNorm()


def _scale_error(scale: Tensor, tensors: Tensors, eps: float) -> Tensor:
    """Return (C,) the most that storing weight and variance moved the scale by.

    d(scale)/scale = d(weight)/weight - d(variance)/(2 variance), and for steps of some size a little more.
    """
    import torch

    from convtool.core.stored import half_ulp

    stored = tensors["running_var"]
    variance = stored.to(torch.float64) + eps
    step = half_ulp(stored, stored.dtype) / variance
    relative = torch.where(step < 0.5, step / 2 / (1 - step), math.inf)
    error = scale.abs() * relative
    if "weight" not in tensors:
        return error
    weight = tensors["weight"]
    return error + half_ulp(weight, weight.dtype) / variance.sqrt() * (1 + relative)
