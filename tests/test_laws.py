"""The laws that every kind of layer keeps, once: what each row of `ROWS` is lowered to is held to all of them.

A new kind is one more row; a test sees that none of the table is without one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from cases import whole_numbers
from layers import kind
from torch import Tensor

from convtool.core.compose import add, compose
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.recover import matrix_to_conv
from convtool.core.toeplitz import toeplitz
from convtool.core.unfold import kernel_matrix, unfold
from convtool.kinds import KINDS

# kind, shapes of its tensors, fields, channels of the input, its size on one axis (0: any); all odd and not square.
Row = tuple[str, dict[str, tuple[int, ...]], dict[str, Any], int, int]
ROWS: list[Row] = [
    ("conv", {"weight": (4, 2)}, {"kernel": 3, "stride": 2, "padding": 1, "groups": 2}, 4, 0),  # strided, grouped
    ("conv", {"weight": (4, 2), "bias": (4,)}, {"kernel": 2, "dilation": 2, "padding": [(0, 1)]}, 2, 0),  # one-sided
    ("conv", {"weight": (2, 3)}, {"kernel": 3, "transposed": True, "stride": 2, "output_padding": 1}, 2, 0),  # adjoint
    ("conv", {"weight": (4, 1)}, {"kernel": 3, "padding": 1, "padding_mode": "reflect", "groups": 2}, 2, 0),
    ("linear", {"weight": (5, 3), "bias": (5,)}, {}, 3, 0),
    ("batch_norm", dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (3,)), {"eps": 0.5}, 3, 0),
    ("batch_norm", dict.fromkeys(("running_mean", "running_var"), (3,)), {}, 3, 0),  # affine=False
    ("scale", {"gamma": (3,)}, {}, 3, 0),
    ("scale", {}, {"factor": -0.5}, 3, 0),
    ("identity", {}, {}, 3, 0),
    ("normalize", {}, {"mean": [1.0, 2.0, 3.0], "std": [2.0], "scale": 0.5}, 3, 0),
    ("avg_pool", {}, {"kernel_size": 3, "stride": 2, "padding": 1}, 2, 0),
    ("upsample", {}, {"factor": 3}, 2, 0),
    ("pad", {}, {"padding": [(1, 2)]}, 2, 0),
    ("flatten", {}, {"size": 4}, 2, 4),
    ("unflatten", {}, {"size": 2}, 8, 1),
    ("avg_pool", {}, {"kernel_size": 2, "dilation": 2, "divisor_override": 3}, 2, 0),
    ("pixel_unshuffle", {}, {"factor": 2}, 3, 4),
    ("pixel_shuffle", {}, {"factor": 2}, 8, 3),
    ("focus", {}, {}, 3, 4),
    ("select", {}, {"channels": [1, 3]}, 4, 0),
    ("place", {}, {"channels": [1, 3], "of": 4}, 2, 0),
    ("permute", {}, {"order": [2, 0, 1]}, 3, 0),
    ("channel_shuffle", {}, {"groups": 2}, 6, 0),
    ("channel_unshuffle", {}, {"groups": 2}, 6, 0),
    ("kernel", {"kernel": (4, 2)}, {"kernel": 3, "stride": 2, "padding": 1}, 4, 0),  # a tensor, two groups
    ("kernel", {}, {"numbers": [1.0, 2.0, -1.0], "each": True, "padding": 1, "padding_mode": "reflect"}, 3, 0),
    ("offset", {"offset": (1, 3)}, {}, 3, 0),
    ("offset", {}, {"offset": [0.5]}, 3, 0),
]  # fmt: skip
same = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
IDS = [f"{number}-{row[0]}" for number, row in enumerate(ROWS)]
SIZES = (5, 4, 3)


def lowered(row: Row, axes: int) -> tuple[Conv, tuple[int, ...]]:
    """The row's layer over that many axes, each with the row's fields, and the size of its input."""
    name, shapes, given, channels, size = row
    fields = dict(given)
    kernel = (fields.pop("kernel"),) * axes if "kernel" in fields else ()
    if "numbers" in fields:  # a kernel of these along every axis
        numbers = torch.tensor(fields.pop("numbers"))
        fields["kernel"] = functools.reduce(lambda a, b: a[..., None] * b, [numbers] * axes).tolist()
    if "size" in fields:
        fields["size"] = [fields["size"]] * axes
    if isinstance(fields.get("padding"), list):
        fields["padding"] = fields["padding"] * axes
    tensors = {
        tensor: whole_numbers(number, *shape, *(kernel if tensor in ("weight", "kernel") else ())).abs() + 1
        for number, (tensor, shape) in enumerate(shapes.items())
    }
    conv = kind(name).lower(tensors, kind(name).over(fields, axes), axes, channels)
    return conv, (size,) * axes if size else SIZES[:axes]


def made(row: Row, axes: int) -> tuple[Conv, tuple[int, ...], Tensor]:
    """The layer, the size of its input, and an input."""
    conv, size = lowered(row, axes)
    return conv, size, whole_numbers(9, 2, conv.in_channels, *size)


def test_every_kind_has_a_row() -> None:
    # An adapter is no layer by itself: see test_adapters.
    assert {row[0] for row in ROWS} == {kind.name for kind in KINDS if not kind.adapts}


laws = pytest.mark.parametrize("axes", [1, 2, 3])
rows = pytest.mark.parametrize("row", ROWS, ids=IDS)


@laws
@rows
def test_the_matrix_computes_the_layer(row: Row, axes: int) -> None:
    conv, size, x = made(row, axes)
    matrix = toeplitz(conv, size)
    out = x.flatten(1) @ matrix.to_dense().T
    out = out if matrix.bias is None else out + matrix.bias
    same(out, forward(conv, x).flatten(1))


@laws
@rows
def test_the_transposed_matrix_is_the_adjoint(row: Row, axes: int) -> None:
    conv, size, x = made(row, axes)
    linear = Conv(conv.weight, None, conv.geometry)
    y = whole_numbers(8, 2, conv.out_channels, *conv.output_size(size))
    back = y.flatten(1) @ toeplitz(linear, size, transpose=True).to_dense().T
    left, right = (forward(linear, x) * y).sum(), (x.flatten(1) * back).sum()  # <A x, y> = <x, A* y>
    same(left, right)


@laws
@rows
def test_unfolding_and_a_matrix_product_are_the_layer(row: Row, axes: int) -> None:
    conv, _, x = made(row, axes)
    linear = Conv(conv.weight, None, conv.geometry)
    out = kernel_matrix(linear) @ unfold(x, conv.geometry)
    same(out.flatten(1), forward(linear, x).flatten(1))


@laws
@rows
def test_a_matrix_gives_its_kernel_back(row: Row, axes: int) -> None:
    conv, size, _ = made(row, axes)
    matrix = toeplitz(conv, size)
    found, residual = matrix_to_conv(matrix.to_dense(), matrix.bias, conv.geometry, size)
    assert residual.relative < 1e-13
    x = whole_numbers(7, 1, conv.in_channels, *size)
    same(forward(found, x), forward(conv, x), rtol=1e-10, atol=1e-10)


@laws
@rows
def test_composing_with_what_runs_at_each_position_is_running_both(row: Row, axes: int) -> None:
    """1x1 layers before and behind: they compose with every kind, and associatively."""
    conv, size, _ = made(row, axes)
    point = (1,) * axes
    before = Conv(whole_numbers(5, conv.in_channels, 2, *point), None, Geometry.of(point))
    after = Conv(whole_numbers(6, 3, conv.out_channels, *point), whole_numbers(4, 3), Geometry.of(point))
    one, other = compose(compose(before, conv), after), compose(before, compose(conv, after))
    same(one.weight, other.weight)
    assert one.geometry == other.geometry
    x = whole_numbers(3, 1, 2, *size)
    same(forward(one, x), forward(after, forward(conv, forward(before, x))))


@laws
@rows
def test_adding_commutes_and_is_adding_the_outputs(row: Row, axes: int) -> None:
    conv, _, x = made(row, axes)
    other = Conv(whole_numbers(2, *conv.weight.shape), whole_numbers(1, conv.out_channels), conv.geometry)
    total = add(conv, other)
    same(forward(total, x), forward(conv, x) + forward(other, x))
    same(total.weight, add(other, conv).weight)


@laws
@rows
def test_channels_are_what_the_kind_says(row: Row, axes: int) -> None:
    conv, size, _ = made(row, axes)
    name, shapes, fields, _, _ = row
    fields = {key: [value] * axes if key == "size" else value for key, value in fields.items() if key != "kernel"}
    fields = kind(name).over(fields, axes)
    kernels = name in ("conv", "kernel")
    full = {key: (*shape, *(1,) * axes) if kernels else shape for key, shape in shapes.items()}
    groups = {"groups": conv.geometry.groups} if kernels else {}
    assert kind(name).takes(full, fields | groups, conv.out_channels) in (conv.in_channels, None)
    assert kind(name).gives(full, fields | groups, conv.in_channels) == conv.out_channels
    assert math.prod(conv.output_size(size)) > 0
