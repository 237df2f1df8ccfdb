"""Layers that add, repeat or surround positions, each channel by itself: pooling, upsampling, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from convtool.core.fields import FLAG, INTEGER, INTEGERS, PADDING, Fields
from convtool.core.geometry import Geometry, format_sizes, per_axis
from convtool.errors import RefusedError, UsageError
from convtool.kinds.kind import Kind, Shape, Tensors, check_size

if TYPE_CHECKING:
    from convtool.core.conv import Conv


class AvgPool(Kind):
    """nn.AvgPool as a depthwise convolution; its stride is the kernel size unless it is said."""

    name = "avg_pool"
    fields = {
        "kernel_size": INTEGERS,
        "stride": INTEGERS,
        "padding": PADDING,
        "count_include_pad": FLAG,
        "dilation": INTEGERS,
        "divisor_override": INTEGER,
    }
    defaults = {"stride": None, "padding": 0, "count_include_pad": True, "dilation": 1, "divisor_override": None}
    written = True
    bare_modules = tuple(
        f"torch.nn.modules.pooling.{name}{axes}d" for name in ("AvgPool", "AdaptiveAvgPool") for axes in (1, 2, 3)
    )

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        if hasattr(module, "output_size"):
            wanted, size = module.output_size, size_of()
            if size is None:
                raise UsageError("how large a map it reads isn't known here; write it as 'avg_pool(7,7)'")
            each = wanted if isinstance(wanted, tuple) else (wanted,) * len(size)
            wanted = [whole if part is None else part for whole, part in zip(size, each, strict=True)]
            if any(not part or whole % part for whole, part in zip(size, wanted, strict=True)):
                raise RefusedError(
                    f"it makes a map of {format_sizes(wanted)} of {format_sizes(size)}, which it doesn't divide"
                )
            return {"kernel_size": [whole // part for whole, part in zip(size, wanted, strict=True)]}
        if module.ceil_mode:
            raise RefusedError("with ceil_mode it divides by less at the border, which no convolution does")
        found = {name: getattr(module, name, None) for name in self.fields.keys() - {"dilation"}}
        return {name: value for name, value in found.items() if value != self.defaults.get(name, ())}

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        kernel = per_axis("kernel_size", fields["kernel_size"], axes, least=1)
        given = {**self.defaults, **fields}
        stride = kernel if given["stride"] is None else given["stride"]
        where = {"padding": given["padding"], "dilation": given["dilation"]}
        geometry = Geometry.of(kernel, stride=stride, groups=channels or 0, **where)
        if geometry.padded and not given["count_include_pad"] and given["divisor_override"] is None:
            # Then the divisor changes at the border, and no convolution does that.
            raise RefusedError(
                "an average pooling with padding and count_include_pad=False divides by less at the border, which no"
                " convolution does"
            )
        divisor = math.prod(kernel) if given["divisor_override"] is None else given["divisor_override"]
        if not divisor:
            raise UsageError("divisor_override: expected a number other than 0")
        return _everywhere(1.0 / divisor, geometry, self.name)


class Upsample(Kind):
    """nn.Upsample(mode='nearest') by whole factors: a transposed depthwise convolution of ones, kernel = stride."""

    name = "upsample"
    fields = {"factor": INTEGERS}
    written = True
    bare_modules = tuple(f"torch.nn.modules.upsampling.{name}" for name in ("Upsample", "UpsamplingNearest2d"))

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        factors = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,)
        if module.mode != "nearest" or any(factor is None or factor % 1 for factor in factors):
            raise RefusedError("only mode='nearest' by whole factors is a layer here")
        return {"factor": [int(factor) for factor in factors]}

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        factors = per_axis("factor", fields["factor"], axes, least=1)
        geometry = Geometry.of(factors, stride=factors, groups=channels or 0, transposed=True)
        return _everywhere(1.0, geometry, self.name)


class Pad(Kind):
    """nn.ZeroPad (F.pad with zeros): an identity that pads."""

    name = "pad"
    fields = {"padding": PADDING}
    written = True
    bare_modules = tuple(f"torch.nn.modules.padding.ZeroPad{axes}d" for axes in (1, 2, 3))
    operations = ("aten.pad.default", "aten.constant_pad_nd.default")

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        sides = module.padding  # of the last axis first
        return {"padding": [(sides[at], sides[at + 1]) for at in range(len(sides) - 2, -1, -2)]}

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        sides, zeros = arguments["pad"], not arguments.get("value") and arguments.get("mode", "constant") == "constant"
        plain = zeros and len(sides) == 2 * (len(takes) - 2) and min(sides, default=-1) >= 0
        return {"padding": [[sides[at], sides[at + 1]] for at in range(len(sides) - 2, -1, -2)]} if plain else None

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        geometry = Geometry.of((1,) * axes, padding=fields["padding"], groups=channels or 0)
        return _everywhere(1.0, geometry, self.name)


AVG_POOL, UPSAMPLE, PAD = AvgPool(), Upsample(), Pad()


def _everywhere(number: float, geometry: Geometry, name: str) -> Conv:
    """Return the depthwise layer of that geometry all of whose taps are one number."""
    import torch

    from convtool.core.conv import Conv

    shape = geometry.groups, 1, *geometry.kernel_size
    check_size(math.prod(shape), name)
    return Conv(torch.full(shape, number, dtype=torch.float64), None, geometry)
