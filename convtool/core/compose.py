"""Two linear layers as one: `compose` for one after the other, `add` for side by side.

For second after first, per axis, not transposed:

    stride   s1*s2              dilation d = gcd(d1 if k1 > 1 else 0, s1*d2 if k2 > 1 else 0), or 1
    padding  p1 + s1*p2         kernel   k = (d1*(k1-1) + s1*d2*(k2-1)) / d + 1
    W[o, i, (t1*d1 + t2*d2*s1)/d] += sum over m of W2[o, m, t2] * W1[m, i, t1]
    bias     b2 + (sum over taps of W2) @ b1
    groups   gcd(g1, g2)

With transposed layers, o = i*s - p + t*d, the same substitution gives one transposed layer in three cases:

    both transposed              stride s1*s2, padding p2 + p1*s2, taps at t1*d1*s2 + t2*d2
    plain (s1 = 1), transposed   stride s2, padding p2 - p1*s2 + d1*(k1-1)*s2, taps at (k1-1-t1)*d1*s2 + t2*d2
    transposed, plain (s2 = 1)   stride s1, padding p1 - p2 + d2*(k2-1), taps at t1*d1 + (k2-1-t2)*d2

where a padding that comes out negative is made up for by zero taps on that side.

The result equals the two layers everywhere but near the border, where it may not: `convtool.core.border` decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor

from convtool.core.carried import carry
from convtool.core.conv import Conv, Scaled, pointwise
from convtool.core.geometry import Geometry, format_sizes
from convtool.core.joint import NOWHERE, AxisComposition, add_geometry, compose_axis, compose_geometry
from convtool.core.moves import NOTHING, Selection, compose_moves, regrouped
from convtool.core.rounding import exact_dtype
from convtool.errors import RefusedError, UsageError, human_bytes

MOST = 1 << 32  # numbers of a kernel: 32 GiB in float64


def compose(first: Conv, second: Conv) -> Conv:
    """The one layer that does `second` after `first`, in float64, right everywhere but perhaps near the border.

    Raises:
        UsageError: the second's input channels aren't the first's output channels.
        RefusedError: no single layer has that form.

    Source: the composition of two polynomials in the shift operator; strides and dilations as in DESIGN's section on
    composing, derived by substituting i = o1*s1 - p1 + t1*d1 into o1 = o2*s2 - p2 + t2*d2.
    """
    if first.has_bias_map or second.has_bias_map:
        raise RefusedError("a layer with a bias map cannot be fused further; start from the original layers")
    second = plain_behind([first, second])[1]
    if second.in_channels != first.out_channels:
        raise UsageError(
            f"channels don't fit: the first layer has {first.out_channels} output channels,"
            f" the second takes {second.in_channels}"
        )
    geometry = compose_geometry(first.geometry, second.geometry)
    moves = isinstance(first, Selection) or isinstance(second, Selection)
    if not moves and second.only_scales and geometry.kernel_size == first.geometry.kernel_size:
        return _scaled(first, second, geometry)
    first, second = _alike(first, second)
    if moves:
        return compose_moves(first, second, geometry)
    weight = _compose_weights(first, second, geometry)
    if first.bias is None:
        return Conv(weight, second.bias, geometry)
    bias = carry(second, first.bias)  # (C_out,)
    return Conv(weight, bias if second.bias is None else bias + second.bias, geometry)


def _scaled(first: Conv, second: Conv, geometry: Geometry) -> Conv:
    """Compose with a layer that only scales: no sums, and the kernel as it is stored until it is asked for."""
    dtype = _exact_dtype(first, second)
    factors = second.weight.flatten().to(dtype)
    bias = None if first.bias is None else first.bias.to(dtype) * factors
    if second.bias is not None:
        bias = second.bias.to(dtype) + (0 if bias is None else bias)
    return Scaled(Conv(first.weight, None, geometry), factors, bias)


def plain_behind(chain: Sequence[Conv]) -> list[Conv]:
    """Return the layers of a chain, those that are transposed with stride 1 behind a stride as the plain ones they are.

    o = i - p + t*d is i = o - (reach - p) + (k-1-t)*d: the kernel turned around, and cropping as less padding.
    """
    found, strided = list[Conv](), False
    for conv in chain:
        axes = conv.geometry.axes
        sides = [(axis.reach - axis.before, axis.reach - axis.after + axis.output_padding) for axis in axes]
        plain = strided and conv.geometry.transposed and set(conv.geometry.stride) == {1}
        if plain and min(itertools.chain(*sides)) >= 0:
            padding, none = tuple(sides), (0,) * len(axes)
            geometry = replace(conv.geometry, padding=padding, transposed=False, output_padding=none)
            conv = Conv(conv.weight.flip(tuple(range(2, len(conv.shape)))), conv.bias, geometry)
        strided = strided or (not conv.geometry.transposed and any(step > 1 for step in conv.geometry.stride))
        found.append(conv)
    return found


def compose_chain(chain: Sequence[Conv]) -> Conv:
    """The layers, first to last, as one; see `compose`. Composed in the order that takes the fewest multiply-adds."""
    if not chain:
        raise UsageError("expected at least one layer to fuse")
    if len(chain) < 3 or any(conv.geometry.transposed for conv in chain):
        # Which pairs of plain and transposed layers have a form depends on the order; first to last is the one checked.
        return regrouped(reduce(compose, chain) if chain[1:] else chain[0].exact(), chain)
    split = _cheapest_split(chain)

    def compose_range(first: int, last: int) -> Conv:
        if first == last:
            return chain[first]
        middle = split(first, last)[1]
        return compose(compose_range(first, middle), compose_range(middle + 1, last))

    return regrouped(compose_range(0, len(chain) - 1), chain)


def _cheapest_split(chain: Sequence[Conv]) -> Callable[[int, int], tuple[int, int]]:
    """Return what tells how few multiply-adds layers first to last take, as a product of matrices, and their split."""

    @cache
    def geometry(first: int, last: int) -> Geometry:
        return reduce(compose_geometry, (conv.geometry for conv in chain[first : last + 1]))

    @cache
    def split(first: int, last: int) -> tuple[int, int]:
        def work(middle: int) -> int:
            channels = chain[first].in_channels, chain[middle].out_channels, chain[last].out_channels
            here = compose_work(geometry(first, middle), geometry(middle + 1, last), channels)
            return split(first, middle)[0] + split(middle + 1, last)[0] + here

        return min(((work(middle), middle) for middle in range(first, last)), default=(0, first))

    return split


def compose_work(first: Geometry, second: Geometry, channels: tuple[int, int, int]) -> int:
    """Multiply-adds of `compose` for layers of these geometries, from channels[0] over channels[1] to channels[2]."""
    pieces = math.lcm(first.groups, second.groups)
    inner, middle, outer = channels[0] // first.groups, channels[1] // pieces, channels[2] // second.groups
    return pieces * outer * middle * inner * math.prod(first.kernel_size) * math.prod(second.kernel_size)


def _alike(a: Conv, b: Conv) -> tuple[Conv, Conv]:
    """Both in float64, or both in complex128 where one is complex."""
    dtype = _exact_dtype(a, b)
    return a.to(dtype), b.to(dtype)


def _exact_dtype(a: Conv, b: Conv) -> torch.dtype:
    return torch.promote_types(exact_dtype(a.dtype), exact_dtype(b.dtype))


def _compose_weights(first: Conv, second: Conv, geometry: Geometry) -> Tensor:
    """Convolve the kernels with each other, (C_out, C_in/groups, *kernel).

    The channels in between are cut where either layer's groups cut them, into lcm(g1, g2) pieces: piece by piece the
    layers are dense, and the products fill exactly the blocks of the fused weight that aren't structurally zero.
    """
    g1, g2, g = first.geometry.groups, second.geometry.groups, geometry.groups
    pieces = math.lcm(g1, g2)
    middle = first.out_channels // pieces
    rows, columns = second.out_channels // g2, first.in_channels // g1
    _check_room(second.out_channels, first.in_channels // g, geometry.kernel_size)
    k1, k2, k = (one.kernel_size or (1,) for one in (first.geometry, second.geometry, geometry))
    plan = [
        compose_axis(a, b, geometry.padding_mode)
        for a, b in zip(first.geometry.axes, second.geometry.axes, strict=True)
    ] or [NOWHERE]
    taps = math.prod(k2)  # said, as without channels it follows from nothing else
    left = second.weight.reshape(g2, rows, pieces // g2, middle, taps).permute(4, 0, 2, 1, 3)
    left = left.reshape(taps, pieces, rows, middle).contiguous()
    right = first.weight.reshape(pieces, middle, columns, *k1).movedim(2, -1)
    backwards = [number + 2 for number, axis in enumerate(plan) if axis.step1 < 0]
    flat = _laid_out(right.flip(backwards) if backwards else right).flatten(2)  # (pieces, middle, taps1 * columns)
    total = _zeros((pieces, rows, *k, columns), right.dtype)
    product = _zeros((pieces, rows, flat.shape[2]), right.dtype)  # made once: new memory takes as long as an addition
    for tap, place in zip(left, itertools.product(*map(range, k2)), strict=True):
        torch.matmul(tap, flat, out=product)
        landing = (_landing(axis, size, t) for axis, size, t in zip(plan, k1, place, strict=True))
        total[(slice(None), slice(None), *landing)] += product.reshape(pieces, rows, *k1, columns)
    # Group h2 of the second and h1 of the first meet in the rows of h2 and the columns of h1.
    blocks = total.reshape(g2, g1 // g, *total.shape[1:]) if pieces == max(g1, g2) else _meet(total, g1, g2)
    weight = blocks.movedim(1, -2)  # (g2, rows, *k, g1/g, columns)
    weight = weight.flatten(-2).flatten(0, 1).movedim(-1, 1)  # (C_out, C_in/groups, *k)
    return _laid_out(weight).reshape(*weight.shape[:2], *geometry.kernel_size)


def _check_room(rows: int, columns: int, kernel: tuple[int, ...]) -> None:
    """Refuse a kernel that no machine would make, before any of it is made."""
    count = rows * columns * math.prod(kernel)
    if count > MOST:
        raise RefusedError(
            f"the fused kernel would be {format_sizes(kernel)}, {human_bytes(8 * count)} of numbers, which is more than"
            " is computed with; check dilation, stride and padding, or fuse fewer of these layers"
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in float64 or complex128, by numpy: it asks the system for large pages, which come faster."""
    return torch.from_numpy(np.zeros(shape, dtype=np.complex128 if dtype.is_complex else np.float64))


def _laid_out(numbers: Tensor) -> Tensor:
    """A copy whose elements lie in the order of its axes."""
    return _zeros(tuple(numbers.shape), numbers.dtype).copy_(numbers)


def _meet(total: Tensor, g1: int, g2: int) -> Tensor:
    """The pieces (pieces, ...) added where they meet: (g2, g1/g, ...), zeros where none does."""
    g, piece = math.gcd(g1, g2), torch.arange(len(total))
    h1, h2 = piece * g1 // len(total), piece * g2 // len(total)
    blocks = total.new_zeros(g2 * (g1 // g), *total.shape[1:])
    blocks.index_add_(0, h2 * (g1 // g) + h1 % (g1 // g), total)
    return blocks.reshape(g2, g1 // g, *total.shape[1:])


def _landing(plan: AxisComposition, taps: int, tap: int) -> slice:
    """Return where the first layer's taps land, in ascending order, for one tap of the second."""
    start = (plan.base + tap * plan.step2 + min(0, plan.step1) * (taps - 1)) // plan.axis.dilation
    step = max(1, abs(plan.step1) // plan.axis.dilation)
    return slice(start, start + (taps - 1) * step + 1, step)


def add(a: Conv, b: Conv) -> Conv:
    """Two layers side by side, their outputs added, as one layer, in float64; exact at every input size.

    The taps are aligned by where they read; both kernels are embedded in the smallest one that holds them, and layers
    with different groups are expanded no further than to the gcd of the groups.

    Raises:
        UsageError: different channels or spatial axes.
        RefusedError: the outputs don't have the same size for every input, or the layers pad differently.
    """
    if a.has_bias_map or b.has_bias_map:
        raise RefusedError("a layer with a bias map cannot be fused further; start from the original layers")
    if (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        raise UsageError(
            f"channels don't fit: cannot add a layer of {a.in_channels} → {a.out_channels} channels"
            f" and one of {b.in_channels} → {b.out_channels}"
        )
    geometry = add_geometry(a.geometry, b.geometry)
    a, b = _alike(a, b)
    _check_room(a.out_channels, a.in_channels // geometry.groups, geometry.kernel_size)
    weight = a.weight.new_zeros(a.out_channels, a.in_channels // geometry.groups, *geometry.kernel_size)
    for conv in (a, b):
        weight[(slice(None), slice(None), *_embedding(conv.geometry, geometry))] += in_groups(conv, geometry.groups)
    biases = [conv.bias for conv in (a, b) if conv.bias is not None]
    return Conv(weight, sum(biases[1:], biases[0]) if biases else None, geometry)


def stack(layers: Sequence[Conv]) -> Conv:
    """Layers on one input, their outputs side by side along the channels as torch.cat has them, as one layer.

    It is the sum of the layers, each placed among the channels of all; in float64, exact at every input size.

    Raises:
        UsageError, RefusedError: as of `add`.
    """
    if not layers:
        raise UsageError("expected at least one layer to stack")
    total, placed = sum(conv.out_channels for conv in layers), list[Conv]()
    for number, conv in enumerate(layers):
        first = sum(before.out_channels for before in layers[:number])
        picked = torch.full((total,), NOTHING)
        picked[first : first + conv.out_channels] = torch.arange(conv.out_channels)
        placed.append(compose(conv, Selection(picked, conv.out_channels, pointwise(conv.spatial_axes))))
    return reduce(add, placed)


def _embedding(part: Geometry, whole: Geometry) -> tuple[slice, ...]:
    slices = []
    for a, c in zip(part.axes, whole.axes, strict=True):
        start = (c.before - a.before) // c.dilation
        step = max(1, a.dilation // c.dilation)
        slices.append(slice(start, start + (a.kernel - 1) * step + 1, step))
    return tuple(slices)


def in_groups(conv: Conv, groups: int) -> Tensor:
    """The weight as that of a layer with fewer groups, (C_out, C_in/groups, *kernel), zeros between the old groups."""
    old = conv.geometry.groups
    if old == groups:
        return conv.weight
    inner = old // groups
    weight = conv.weight.reshape(groups, inner, conv.out_channels // old, conv.in_channels // old, -1)
    out = weight.new_zeros(groups, inner, conv.out_channels // old, inner, conv.in_channels // old, weight.shape[-1])
    diagonal = torch.arange(inner)
    out[:, diagonal, :, diagonal] = weight.transpose(0, 1)  # the two index lists move to the front together
    return out.reshape(conv.out_channels, conv.in_channels // groups, *conv.geometry.kernel_size)
