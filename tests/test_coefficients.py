"""Numbers of layers held against those of other layers: running them through torch is the oracle."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import real_numbers
from torch import Tensor

from convtool.core.bound import Bound
from convtool.core.coefficients import compare_numbers
from convtool.core.compose import add
from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels, run
from convtool.core.fuse import fuse
from convtool.core.geometry import PADDING_MODES, Geometry
from convtool.core.stored import half_ulp, less_inwards, stored
from convtool.core.tally import Region
from convtool.core.tree import Chain, Sum, Tree, leaves, map_leaves
from convtool.errors import RefusedError, UsageError

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


def compared(before: Expression, after: Tree[Conv], dtype: torch.dtype | None = None, **options: Any) -> Region:
    """Return what comes of holding layers against each other."""
    kept = map_leaves(lambda conv: stored(conv, dtype), after)
    return compare_numbers(before, kept, Bound(before, kept), **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fused_layers_are_equal_and_a_number_two_units_off_is_not(dtype: torch.dtype) -> None:
    chance, caught, planted = random.Random(1), 0, 0
    for chain in chains(60, seed=2):
        tree, fused = Chain(tuple(chain)), fuse(chain, allow_border=True, dtype=dtype)
        sound = compared(tree, fused)
        assert sound.equal
        assert sound.elements == fused.weight.numel() + (0 if fused.bias is None else fused.bias.numel())
        wrong = fused.weight.clone()
        places = wrong.reshape(-1).nonzero().flatten().tolist()
        if not places:
            continue
        at = chance.choice(places)
        words = wrong.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]).view(-1)
        words[at] += 2
        other = Conv(wrong, fused.bias, fused.geometry)
        found = compared(tree, other)
        planted += 1
        caught += not found.equal
        if not found.equal:
            assert (found.differing, found.ratio > 1) == (1, True)
            assert found.where is not None
            output, channel, *tap = found.where
            inner = wrong.shape[1]
            where = output, channel - output // (len(wrong) // fused.geometry.groups) * inner, *tap
            assert sum(i * math.prod(wrong.shape[n + 1 :]) for n, i in enumerate(where)) == at
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
        found = compared(tree, other)
        assert found.differing == (1 if bias is not None else 4)
        assert found.where == ((2,) if bias is not None else found.where)


def test_what_the_layers_never_read_has_to_be_zero() -> None:
    first = Conv(real_numbers(1, 2, 2, 2), None, Geometry.of((2,), dilation=2))
    second = Conv(real_numbers(2, 2, 2, 2), None, Geometry.of((2,), dilation=3))
    fused = fuse([first, second], dtype=torch.float32)  # taps at 0, 2, 3 and 5 of 6
    tree = Chain((first, second))
    assert compared(tree, fused).equal
    fused.weight[1, 0, 4] = 1e-30
    found = compared(tree, fused)
    assert (found.differing, found.where) == (1, (1, 0, 4))


def test_a_layer_of_another_geometry_differs() -> None:
    chain = [Conv(real_numbers(n, 2, 2, 3), None, Geometry.of((3,), padding=1)) for n in (1, 2)]
    fused, tree = fuse(chain, allow_border=True), Chain(tuple(chain))
    assert compared(tree, fused).equal
    assert not compared(tree, fused, size=(9,), everywhere=True).equal  # the border
    for geometry in (Geometry.of((5,), transposed=True), Geometry.of((5,), padding=((1, 3),))):
        assert not compared(tree, Conv(fused.weight, fused.bias, geometry)).equal
    with pytest.raises(RefusedError, match="far inside"):  # the outputs of the one don't stand where the other's do
        compared(tree, Conv(fused.weight, fused.bias, Geometry.of((5,), stride=2, padding=2)))


def by_running(tree: Expression, size: tuple[int, ...]) -> Tensor:
    """Return the matrix of a tree and what it makes of zeros, its last column, from running it."""
    inputs = in_channels(tree) * math.prod(size)
    kind = torch.complex128 if any(conv.dtype.is_complex for conv in leaves(tree)) else torch.float64
    bias = run(tree, torch.zeros(1, in_channels(tree), *size, dtype=kind)).flatten(1)
    basis = torch.eye(inputs, dtype=kind).reshape(inputs, in_channels(tree), *size)
    return torch.cat([run(tree, basis).flatten(1) - bias, bias]).T


def any_layer(chance: random.Random, channels: int, kind: str) -> Conv:
    """Return a layer of one axis that may be transposed, complex, or pad in any way."""
    groups = chance.choice([n for n in (1, 1, 2) if channels % n == 0])
    outer, kernel, seed = groups * chance.choice((1, 2)), chance.choice((1, 2, 3)), chance.randrange(10**6)
    transposed = kind == "transposed" and chance.random() < 0.6
    geometry = Geometry.of(
        (kernel,),
        stride=chance.choice((1, 1, 2)),
        padding=0 if transposed else ((chance.choice((0, 1)), chance.choice((0, 1))),),
        groups=groups,
        transposed=transposed,
        padding_mode="zeros" if transposed else chance.choice(PADDING_MODES),
    )
    weight, bias = real_numbers(seed, outer, channels // groups, kernel), real_numbers(seed + 1, outer)
    if kind == "complex":
        weight, bias = weight + 1j * real_numbers(seed + 2, *weight.shape), bias * (1 - 2j)
    return Conv(weight, bias if chance.random() < 0.7 else None, geometry)


@pytest.mark.parametrize("kind", ["plain", "transposed", "complex"])
def test_chains_of_any_layers_are_equal_where_running_them_says_so(kind: str) -> None:
    """Also where no single layer stands for a chain; against another one with a number moved, or another border."""
    chance, verdicts = random.Random(kind), list[bool]()
    while len(verdicts) < 60:
        channels = chance.choice((2, 4))
        first = any_layer(chance, channels, kind)
        chain = [first, any_layer(chance, first.out_channels, kind)]
        size, number = (chance.randint(1, 9),), chance.randrange(2)
        other, weight = [*chain], chain[number].weight.clone()
        if chance.random() < 0.5:
            weight.view(-1)[chance.randrange(weight.numel())] *= 1 + chance.choice((1e-15, 1e-3))
        geometry = chain[number].geometry
        if chance.random() < 0.5 and not geometry.transposed:
            geometry = replace(geometry, padding_mode=chance.choice(PADDING_MODES))
        other[number] = Conv(weight, chain[number].bias, geometry)
        one, two = Chain(tuple(chain)), Chain(tuple(other))
        try:
            expected, found = by_running(one, size), by_running(two, size)
        except UsageError:  # too small
            continue
        equal = bool(torch.allclose(expected, found, rtol=0, atol=1e-9))
        assert (compared(one, two, size=size, everywhere=True).ratio <= 1) == equal
        verdicts.append(equal)
    assert 10 < sum(verdicts) < 50


def test_a_bias_map_is_compared_at_its_size() -> None:
    norm = Conv(real_numbers(1, 2, 1, 1), real_numbers(2, 2), Geometry.of((1,), groups=2))
    second = Conv(real_numbers(3, 3, 2, 3), None, Geometry.of((3,), padding=1))
    tree, fused = Chain((norm, second)), fuse([norm, second], input_size=(6,), bias_map=True, dtype=torch.float32)
    assert fused.has_bias_map
    assert fused.bias is not None
    found = compared(tree, fused, size=(6,))
    assert found.equal
    assert found.elements == fused.weight.numel() + fused.bias.numel()
    moved = Conv(fused.weight, fused.bias.roll(1, 1), fused.geometry)
    assert compared(tree, moved, size=(6,)).differing > 3


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
    assert compared(Sum((wide, narrow)), add(wide, narrow)).equal


def test_a_transposed_layer_of_a_large_stride_takes_the_room_of_its_live_taps() -> None:
    upsample = Conv(real_numbers(1, 2, 512, 64, 64), None, Geometry.of((64, 64), stride=32, transposed=True))
    scale = Conv(real_numbers(2, 2, 1, 1, 1), real_numbers(3, 2), Geometry.of((1, 1), groups=2))
    made = fuse([upsample, scale])
    kept = Conv(made.weight.float(), None if made.bias is None else made.bias.float(), made.geometry)
    both = Chain((upsample, scale)), stored(kept)
    found = compare_numbers(*both, Bound(*both))
    assert (found.elements, found.differing) == (2 * 512 * 64 * 64 + 2 * 32 * 32, 0)  # and a bias for each phase
    kept.weight[1, 300, 63, 17] *= 1 + 2.0**-20
    both = Chain((upsample, scale)), stored(kept)
    assert compare_numbers(*both, Bound(*both)).differing > 0


def test_a_bias_that_is_kept_does_not_hide_that_many_numbers_were_rounded() -> None:
    before = Conv(real_numbers(1, 64, 64, 3, 3), torch.ones(64).double(), Geometry.of((3, 3)))
    after = stored(Conv(before.weight.float(), torch.ones(64), before.geometry))
    found = compare_numbers(before, after, Bound(before, after))
    assert (found.ratio, found.differing) == (1, 0)
