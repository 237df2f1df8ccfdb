"""The geometry of two layers as one: `compose_geometry` one after the other, `add_geometry` side by side.

The formulas stand in `convtool.core.compose`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from convtool.core.geometry import LARGEST, Axis, Geometry, PaddingMode, format_sizes
from convtool.errors import RefusedError, UsageError


def compose_geometry(first: Geometry, second: Geometry) -> Geometry:
    """Return the geometry of the one layer that does `second` after `first`.

    Raises:
        RefusedError: no single layer has that form.
        UsageError: different numbers of spatial axes.
    """
    if len(first.kernel_size) != len(second.kernel_size):
        raise UsageError(
            f"cannot chain a layer of {len(first.kernel_size)} spatial axes and one of {len(second.kernel_size)}"
        )
    mode = _padding_mode(first, second)
    for a, b in zip(first.axes, second.axes, strict=True):
        if b.transposed and not a.transposed and a.stride != 1:
            raise RefusedError(
                f"no single layer is a convolution of stride {a.stride} and then a transposed convolution"
            )
        if a.transposed and not b.transposed and b.stride != 1:
            raise RefusedError(
                f"no single layer is a transposed convolution and then a convolution of stride {b.stride}"
            )
    axes = [compose_axis(a, b, mode).axis for a, b in zip(first.axes, second.axes, strict=True)]
    return Geometry.from_axes(axes, math.gcd(first.groups, second.groups))


@dataclass(frozen=True, slots=True)
class AxisComposition:
    """One axis of a composition: tap t1 of the first and t2 of the second become one tap of the fused layer, which is

    (base + t1*step1 + t2*step2) / axis.dilation
    """

    axis: Axis
    base: int
    step1: int
    step2: int


NOWHERE = AxisComposition(Axis(kernel=1), 0, 1, 1)  # the axis that a layer without axes is looked at as having


def compose_axis(first: Axis, second: Axis, mode: PaddingMode) -> AxisComposition:
    """Compose one axis of `compose_geometry`, with the place of each pair of taps."""
    # All four cases are one. The layer whose taps keep their spacing is `outer`: the first of two plain ones, and a
    # transposed one wherever it is the second. The other's are spread by the stride in between, and run backwards where
    # only one of the two is transposed, since t*d then stands on opposite sides of i = o*s - p + t*d.
    outer, inner = (second, first) if second.transposed else (first, second)
    scale = second.stride if first.transposed or second.transposed else first.stride
    sign = 1 if first.transposed == second.transposed else -1
    wide = sign * scale * inner.dilation
    step1, step2 = (wide, outer.dilation) if second.transposed else (outer.dilation, wide)
    base = inner.reach * scale if sign < 0 else 0
    before, after = outer.before + sign * scale * inner.before + base, outer.after + sign * scale * inner.after + base
    dilation = math.gcd(step1 if first.kernel > 1 else 0, step2 if second.kernel > 1 else 0) or 1
    reach = abs(step1) * (first.kernel - 1) + abs(step2) * (second.kernel - 1)
    front, back = (-(min(0, side) // dilation) * dilation for side in (before, after))  # zero taps, rounded up
    axis = _with_small_output_padding(
        Axis(
            kernel=(front + reach + back) // dilation + 1,
            stride=first.stride * second.stride,
            before=before + front,
            after=after + back,
            dilation=dilation,
            padding_mode=mode,
            transposed=first.transposed or second.transposed,
            output_padding=outer.output_padding + scale * inner.output_padding,
        )
    )
    if max(axis.kernel, axis.stride, axis.before, axis.after, axis.dilation) > LARGEST:
        raise RefusedError("the fused layer's kernel, stride or padding would exceed 2**31 - 1")
    return AxisComposition(axis, base + front, step1, step2)


def _with_small_output_padding(axis: Axis) -> Axis:
    """Bring output padding below stride or dilation, as torch wants it: zero taps at the end do the rest.

    Both make the output longer, a tap by the dilation.
    """
    excess = axis.output_padding - max(axis.stride, axis.dilation) + 1
    taps = max(0, -(-excess // axis.dilation))
    return replace(axis, kernel=axis.kernel + taps, output_padding=axis.output_padding - taps * axis.dilation)


def _padding_mode(first: Geometry, second: Geometry) -> PaddingMode:
    """A layer has one padding mode for all axes; a layer that doesn't pad goes with any.

    A transposed layer's padding crops its output, and has no mode; a transposed result knows zeros only.
    """
    modes = {layer.padding_mode for layer in (first, second) if layer.padded and not layer.transposed}
    if len(modes) > 1:
        raise RefusedError(f"no single layer pads with {first.padding_mode} and then with {second.padding_mode}")
    mode: PaddingMode = modes.pop() if modes else "zeros"
    if mode != "zeros" and (first.transposed or second.transposed):
        raise RefusedError(f"no single layer is transposed and pads with {mode}")
    return mode


def add_geometry(a: Geometry, b: Geometry) -> Geometry:
    """The geometry of the sum of two layers; see `add`."""
    if len(a.kernel_size) != len(b.kernel_size):
        raise UsageError(f"cannot add layers of {len(a.kernel_size)} and {len(b.kernel_size)} spatial axes")
    if a.transposed != b.transposed:
        raise RefusedError("cannot add a convolution and a transposed one")
    if a.stride != b.stride:
        raise RefusedError(f"cannot add layers of stride {format_sizes(a.stride)} and {format_sizes(b.stride)}")
    if not a.transposed and a.padded and b.padded and a.padding_mode != b.padding_mode:
        raise RefusedError(f"no single layer pads with both {a.padding_mode} and {b.padding_mode}")
    mode = a.padding_mode if a.padded else b.padding_mode
    axes = [_add_axis(x, y, mode) for x, y in zip(a.axes, b.axes, strict=True)]
    return Geometry.from_axes(axes, math.gcd(a.groups, b.groups))


def _add_axis(a: Axis, b: Axis, mode: PaddingMode) -> Axis:
    # Of a transposed layer, padding takes from the output; of a plain one it adds: both as (reach - padding).
    slack = {axis.reach - axis.before - axis.after + axis.output_padding for axis in (a, b)}
    if len(slack) > 1:
        raise RefusedError(
            f"cannot add layers whose outputs differ in size: kernel {a.kernel} with padding {a.before}:{a.after}"
            f" and kernel {b.kernel} with padding {b.before}:{b.after}"
        )
    before, after = max(a.before, b.before), max(a.after, b.after)
    # Taps stand at -before + t*dilation; the common grid has the gcd of both dilations and of the offset between them.
    spread = math.gcd(a.dilation if a.kernel > 1 else 0, b.dilation if b.kernel > 1 else 0, a.before - b.before)
    dilation = spread or 1
    reach = max(before - axis.before + axis.reach for axis in (a, b))
    if not a.transposed:
        if mode != "zeros" and (before, after) not in ((a.before, a.after), (b.before, b.after)):
            raise RefusedError(f"no single layer of {mode} padding holds both kernels")
        return Axis(reach // dilation + 1, a.stride, before, after, dilation, mode)
    after = reach - before - slack.pop()  # what leaves the output's size as it is
    kernel, output_padding = reach // dilation + 1, max(0, -after)
    return _with_small_output_padding(
        Axis(kernel, a.stride, before, max(0, after), dilation, mode, True, output_padding)
    )
