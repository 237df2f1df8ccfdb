"""A layer's numbers against the impulse response of the layers that it stands for: torch runs the oracle."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import real_numbers
from torch import Tensor

from convtool.core.bound import Allowance, fused_geometry, half_ulp, less_inwards
from convtool.core.coefficients import compare_numbers
from convtool.core.compose import add, compose_chain
from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels
from convtool.core.fuse import fuse
from convtool.core.geometry import Geometry
from convtool.core.response import constant, responses
from convtool.core.tree import Chain, Sum, leaves, map_leaves
from convtool.errors import RefusedError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def layer(chance: random.Random, channels: int, axes: int) -> Conv:
    """Return a random layer: of any groups, strides, dilations and paddings, or a factor for each channel."""
    seed = chance.randrange(10**6)
    if chance.random() < 0.25:
        weight = real_numbers(seed, channels, 1, *(1,) * axes)
        return Conv(weight, real_numbers(seed + 1, channels), Geometry.of((1,) * axes, groups=channels))
    groups = chance.choice([n for n in (1, 2, 3, channels) if channels % n == 0])
    outer, kernel = groups * chance.choice((1, 2, 3)), tuple(chance.choice((1, 1, 2, 3)) for _ in range(axes))
    geometry = Geometry.of(
        kernel,
        stride=tuple(chance.choice((1, 1, 2, 3)) for _ in kernel),
        padding=tuple((chance.choice((0, 1)), chance.choice((0, 2))) for _ in kernel),
        dilation=tuple(chance.choice((1, 1, 2)) for _ in kernel),
        groups=groups,
    )
    bias = real_numbers(seed + 1, outer) if chance.random() < 0.5 else None
    return Conv(real_numbers(seed, outer, channels // groups, *kernel), bias, geometry)


def chains(count: int, seed: int = 0) -> Iterator[list[Conv]]:
    chance = random.Random(seed)
    for number in range(count):
        channels, axes, chain = chance.choice((2, 3, 4)), (2, 1, 0, 2, 1, 3)[number % 6], []
        for _ in range(chance.choice((2, 2, 3))):
            chain.append(layer(chance, channels, axes))
            channels = chain[-1].out_channels
        yield chain


def by_torch(tree: Expression, residue: tuple[int, ...], channel: int) -> dict[tuple[int, ...], Tensor]:
    """Return what torch makes of an impulse far from the border, by output position counted from there."""
    whole = fused_geometry(tree)
    stride = whole.stride
    far = 2 + max((a.reach + a.before + a.after) // a.stride for a in whole.axes) if residue else 0  # outputs
    size = tuple(2 * far * s for s in stride)
    x = torch.zeros(1, in_channels(tree), *size, dtype=torch.float64)
    x[(0, channel, *(far * s + q for s, q in zip(stride, residue, strict=True)))] = 1

    def run(part: Expression, x: Tensor) -> Tensor:
        if isinstance(part, Chain):
            for one in part.parts:
                x = run(one, x)
            return x
        if isinstance(part, Sum):
            outs = [run(one, x) for one in part.parts]
            return torch.stack(outs).sum(0)
        g = part.geometry
        x = F.pad(x, [side for pair in reversed(g.padding) for side in pair])
        if not g.kernel_size:
            return F.linear(x, part.weight)
        function = (F.conv1d, F.conv2d, F.conv3d)[len(g.kernel_size) - 1]
        out: Tensor = function(x, part.weight, stride=g.stride, dilation=g.dilation, groups=g.groups)
        return out

    if any(conv.geometry.groups > 1 for conv in leaves(tree)) and not residue:
        tree = map_leaves(lambda conv: Conv(dense(conv), None, Geometry.of(())), tree)
    out = run(tree, x)[0]
    found = out.abs().sum(0).nonzero().tolist()
    return {tuple(at - far for at in place): out[(slice(None), *place)] for place in found}


def dense(conv: Conv) -> Tensor:
    blocks = conv.weight.reshape(conv.geometry.groups, -1, conv.weight.shape[1])
    found: Tensor = torch.block_diag(*blocks)
    return found


@pytest.mark.parametrize("number", range(5))
def test_an_impulse_does_what_torch_makes_of_it(number: int) -> None:
    for chain in chains(6, seed=number):
        tree: Expression = Chain(tuple(chain))
        check_responses(tree)


def test_an_impulse_in_branches() -> None:
    chance = random.Random(5)
    for groups in (1, 2, 4):
        wide = Conv(real_numbers(1, 4, 4 // groups, 3, 2), None, Geometry.of((3, 2), padding=1, groups=groups))
        narrow = Conv(real_numbers(2, 4, 4, 1, 1), None, Geometry.of((1, 1), padding=((0, 0), (0, 1))))
        same = Conv(torch.ones(4, 1, 1, 1, dtype=torch.float64), None, Geometry.of((1, 1), groups=4))
        after = layer(chance, 4, 2)
        check_responses(Sum((wide, narrow)))
        check_responses(Chain((Sum((Chain((same, narrow)), wide)), after)))


def check_responses(tree: Expression) -> None:
    for residue, response in responses(tree):
        numbers = response.regrouped(1).numbers()  # (C_out, C_in, *places)
        for channel in range(numbers.shape[1]):
            expected = by_torch(tree, residue, channel)
            for index in torch.ones(numbers.shape[2:]).nonzero().tolist() if numbers.dim() > 2 else [[]]:
                place = tuple(places[i] for places, i in zip(response.places, index, strict=True))
                found = numbers[:, channel, *index]
                assert torch.allclose(found, expected.pop(place, torch.zeros_like(found)), rtol=1e-12, atol=1e-12)
            assert not expected  # torch reaches nothing else


def test_zeros_far_from_the_border_become_the_bias() -> None:
    for chain in chains(20, seed=9):
        tree = Chain(tuple(chain))
        bias, found = compose_chain(chain).bias, constant(tree)
        assert (bias is None) == (found is None)
        if bias is not None and found is not None:
            assert torch.allclose(found, bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fused_layers_are_equal_and_a_number_two_units_off_is_not(dtype: torch.dtype) -> None:
    chance, caught, planted = random.Random(1), 0, 0
    for chain in chains(60, seed=2):
        tree, fused = Chain(tuple(chain)), fuse(chain, allow_border=True, dtype=dtype)
        sound = compare_numbers(tree, fused, Allowance(tree, fused), dtype)
        assert sound.equal
        assert sound.compared == fused.weight.numel() + (0 if fused.bias is None else fused.bias.numel())
        wrong = fused.weight.clone()
        places = wrong.reshape(-1).nonzero().flatten().tolist()
        if not places:
            continue
        at = chance.choice(places)
        words = wrong.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]).view(-1)
        words[at] += 2
        other = Conv(wrong, fused.bias, fused.geometry)
        found = compare_numbers(tree, other, Allowance(tree, other), dtype)
        planted += 1
        caught += not found.equal
        if not found.equal:
            assert (found.differing, found.ratio > 1) == (1, True)
            shape = tuple(wrong.shape)
            assert found.where is not None
            assert sum(i * math.prod(shape[n + 1 :]) for n, i in enumerate(found.where)) == at
    assert caught == planted or dtype == torch.float64  # whose own rounding is what may be off


def test_a_bias_two_units_off_or_left_out_is_found() -> None:
    first = Conv(real_numbers(1, 3, 2, 2), real_numbers(2, 3), Geometry.of((2,)))
    second = Conv(real_numbers(3, 4, 3, 2), None, Geometry.of((2,)))
    tree, fused = Chain((first, second)), fuse([first, second], dtype=torch.float32)
    assert fused.bias is not None
    off = fused.bias.clone()
    off.view(torch.int32)[2] += 2
    for bias in (off, None):
        other = Conv(fused.weight, bias, fused.geometry)
        found = compare_numbers(tree, other, Allowance(tree, other), torch.float32)
        assert found.differing == (1 if bias is not None else 4)
        assert found.where == ((2,) if bias is not None else found.where)


def test_what_no_impulse_meets_has_to_be_zero() -> None:
    first = Conv(real_numbers(1, 2, 2, 2), None, Geometry.of((2,), dilation=2))
    second = Conv(real_numbers(2, 2, 2, 2), None, Geometry.of((2,), dilation=3))
    fused = fuse([first, second], dtype=torch.float32)  # taps at 0, 2, 3 and 5 of 6
    tree = Chain((first, second))
    assert compare_numbers(tree, fused, Allowance(tree, fused), torch.float32).equal
    fused.weight[1, 0, 4] = 1e-30
    found = compare_numbers(tree, fused, Allowance(tree, fused), torch.float32)
    assert (found.differing, found.where) == (1, (1, 0, 4))
    read = compare_numbers(tree, fused, Allowance(tree, fused), torch.float32, [[0, 2, 3, 5]])
    assert read.equal
    assert read.compared == 16


def test_a_layer_of_another_geometry_is_not_compared_so() -> None:
    chain = [Conv(real_numbers(n, 2, 2, 3), None, Geometry.of((3,), padding=1)) for n in (1, 2)]
    fused = fuse(chain, allow_border=True)
    tree = Chain(tuple(chain))
    for geometry in (Geometry.of((5,), stride=2, padding=2), Geometry.of((5,), transposed=True)):
        other = Conv(fused.weight, fused.bias, geometry)
        with pytest.raises(RefusedError):
            compare_numbers(tree, other, Allowance(tree, other), torch.float64)
    moved = Conv(fused.weight, fused.bias, Geometry.of((5,), padding=((1, 3),)))
    with pytest.raises(RefusedError, match="reach beyond"):
        compare_numbers(tree, moved, Allowance(tree, moved), torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_tell_the_same_as_arithmetic(dtype: torch.dtype) -> None:
    """half_ulp and less_inwards read the exponent off the bits; of numbers in a wider dtype they compute it."""
    info = torch.finfo(dtype)
    some = [0.0, 1.0, -2.0, 1.5, -3.1, 0.1, info.smallest_normal, -info.smallest_normal / 2, info.max, info.tiny * 3]
    numbers = torch.cat([torch.tensor(some, dtype=torch.float64), real_numbers(3, 200) * 1e-3]).to(dtype)
    assert torch.equal(half_ulp(numbers, dtype), half_ulp(numbers.to(torch.float64), dtype))
    one, other = less_inwards(numbers, dtype), less_inwards(numbers.to(torch.float64), dtype)
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


def test_adding_branches_is_what_their_responses_add_up_to() -> None:
    wide = Conv(real_numbers(1, 4, 2, 3, 2), real_numbers(5, 4), Geometry.of((3, 2), padding=1, groups=2))
    narrow = Conv(real_numbers(2, 4, 4, 1, 1), None, Geometry.of((1, 1), padding=((0, 0), (0, 1))))
    tree = Sum((wide, narrow))
    total = add(wide, narrow)
    assert compare_numbers(tree, total, Allowance(tree, total), torch.float64).equal
