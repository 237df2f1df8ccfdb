"""Random expressions of layers, chains in sums in chains: what fuses computes the same to the bit, and the laws of it.

Whole numbers throughout, so that equal means equal. The laws of each operation by itself are in test_compose, test_add.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import make_conv, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import identity, scale
from strategies import SEEDS, chains, sizes_that_run

from convtool.core.compose import add, compose, stack
from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels, output_size, run
from convtool.core.forward import forward
from convtool.core.fuse import Fusion, NamedConv, fuse_tree
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import toeplitz
from convtool.core.tree import Chain, Sum, Tree, map_leaves
from convtool.errors import RefusedError

MOST = 3  # of a layer's numbers: products of several layers stay whole in float64


@st.composite
def layers(draw: st.DrawFn, inner: int, outer: int) -> Conv:
    """A layer that keeps the size of its input, of kernel 1 more often than not."""
    kernel = tuple(draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in range(2))
    dilation = tuple(draw(st.sampled_from((1, 1, 2))) for _ in range(2))
    before = [draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True)]
    padding = [(p, d * (k - 1) - p) for p, k, d in zip(before, kernel, dilation, strict=True)]
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 4) if inner % g == 0 and outer % g == 0]))
    geometry = Geometry.of(kernel, padding=padding, dilation=dilation, groups=groups)
    return make_conv(geometry, inner, outer, bias=draw(st.booleans()), seed=draw(SEEDS), most=MOST)


@st.composite
def expressions(draw: st.DrawFn, inner: int, outer: int, depth: int = 3) -> Expression:
    """A layer, or a chain or a sum of expressions."""
    kind = draw(st.sampled_from(("layer", "chain", "sum"))) if depth else "layer"
    if kind == "layer":
        if inner == outer and not draw(st.integers(0, 3)):
            return identity(inner, 2)
        return draw(layers(inner, outer))
    if kind == "sum":
        return Sum(tuple(draw(expressions(inner, outer, depth - 1)) for _ in range(draw(st.integers(2, 3)))))
    middle = draw(st.sampled_from((2, 4)))
    return Chain((draw(expressions(inner, middle, depth - 1)), draw(expressions(middle, outer, depth - 1))))


def named(expression: Expression) -> Tree[NamedConv]:
    return map_leaves(lambda conv: NamedConv("layer", conv), expression)


def fused(expression: Expression, size: tuple[int, int] | None = None, bias_map: bool = False) -> Fusion | None:
    try:
        return fuse_tree(named(expression), input_size=size, allow_border=False, dtype=torch.float64, bias_map=bias_map)
    except RefusedError:
        return None


OUTCOMES: Counter[str] = Counter()


@settings(max_examples=200)
@given(expression=expressions(2, 4), size=st.tuples(st.integers(1, 7), st.integers(1, 7)), seed=SEEDS)
def _random_expression(expression: Expression, size: tuple[int, int], seed: int) -> None:
    x = whole_numbers(seed, 2, in_channels(expression), *size, most=MOST)
    assert output_size(expression, size) == size
    expected = run(expression, x)
    everywhere, here, mapped = fused(expression), fused(expression, size), fused(expression, size, bias_map=True)
    for name, fusion in (("every size", everywhere), ("this size", here), ("bias map", mapped)):
        if fusion is not None:
            OUTCOMES[name] += 1
            assert torch.equal(forward(fusion.conv, x), expected)
    if everywhere is not None:  # exact for every size is exact for this one, and without a map
        assert here is not None
    if here is not None:
        assert mapped is not None
        assert not mapped.conv.has_bias_map
    if mapped is None:
        OUTCOMES["refused"] += 1


def test_what_fuses_computes_the_same_to_the_bit() -> None:
    OUTCOMES.clear()
    _random_expression()
    # All of it came up: what is exact, what is with a map, and what isn't at all.
    assert OUTCOMES["every size"] > 50
    assert OUTCOMES["bias map"] > OUTCOMES["this size"] + 5
    assert OUTCOMES["refused"] > 10


@settings(max_examples=60)
@given(chain=chains(length=2, biases=True, largest_number=MOST), more=st.tuples(*[st.integers(0, 3)] * 3), seed=SEEDS)
def test_a_scale_goes_in_from_either_side(chain: list[Conv], more: tuple[int, ...], seed: int) -> None:
    conv = chain[0]
    axes = conv.spatial_axes
    factors = whole_numbers(seed, conv.out_channels)
    after = compose(conv, scale(factors, axes))
    assert torch.equal(after.weight, conv.weight * factors.reshape(-1, *(1,) * (axes + 1)))
    entering = whole_numbers(seed, conv.in_channels)
    before = compose(scale(entering, axes), conv)
    size = sizes_that_run([conv], more[:axes])
    x = whole_numbers(seed + 1, 2, conv.in_channels, *size)
    assert torch.equal(forward(before, x), forward(conv, x * entering.reshape(-1, *(1,) * axes)))
    # a number taken out of one layer and given to the next changes nothing
    half = compose(
        compose(conv, scale(torch.full((conv.out_channels,), 0.5), axes)),
        scale(torch.full((conv.out_channels,), 2.0), axes),
    )
    assert torch.equal(half.weight, conv.weight)


@settings(max_examples=40)
@given(
    chain=chains(length=2, mode="zeros", biases=False, largest_number=MOST), more=st.tuples(*[st.integers(0, 2)] * 3)
)
def test_the_adjoint_of_a_composition_is_the_adjoints_in_the_other_order(
    chain: list[Conv], more: tuple[int, ...]
) -> None:
    first, second = chain
    axes = first.spatial_axes
    unpadded = Conv(second.weight, None, _without_padding(second.geometry))  # then nothing is lost at the border
    size = sizes_that_run([first, unpadded], more[:axes])
    middle = first.output_size(size)
    adjoint = toeplitz(compose(first, unpadded), size, transpose=True).to_dense()
    one = toeplitz(first, size, transpose=True).to_dense()
    other = toeplitz(unpadded, middle, transpose=True).to_dense()
    assert torch.equal(adjoint, one @ other)


@settings(max_examples=40)
@given(data=st.data(), size=st.tuples(st.integers(2, 5), st.integers(2, 5)))
def test_the_adjoint_of_a_sum_is_the_sum_of_the_adjoints(data: st.DataObject, size: tuple[int, int]) -> None:
    one, other = data.draw(layers(4, 2)), data.draw(layers(4, 2))
    adjoints = [toeplitz(conv, size, transpose=True).to_dense() for conv in (one, other)]
    assert torch.equal(toeplitz(add(one, other), size, transpose=True).to_dense(), adjoints[0] + adjoints[1])


@settings(max_examples=40)
@given(data=st.data(), size=st.tuples(st.integers(2, 5), st.integers(2, 5)), count=st.integers(1, 3))
def test_a_stack_gives_what_its_layers_give_side_by_side(
    data: st.DataObject, size: tuple[int, int], count: int
) -> None:
    convs = [data.draw(layers(4, 2)) for _ in range(count)]
    matrices = [toeplitz(conv, size).to_dense() for conv in convs]
    whole = stack(convs)
    assert torch.equal(toeplitz(whole, size).to_dense(), torch.cat(matrices))
    biases = [conv.bias if conv.bias is not None else torch.zeros(conv.out_channels) for conv in convs]
    assert torch.equal(
        torch.zeros(2 * count).double() if whole.bias is None else whole.bias, torch.cat(biases).double()
    )


def _without_padding(geometry: Geometry) -> Geometry:
    return Geometry.of(geometry.kernel_size, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_chains_of_any_length(count: int) -> None:
    chain = [
        make_conv(Geometry.of((1 + n % 2, 1 + (n + 1) % 3)), 2 + n % 3, 2 + (n + 1) % 3, seed=n, most=2)
        for n in range(count)
    ]
    expression: Expression = Chain(tuple(chain))
    fusion = fused(expression)
    assert fusion is not None
    x = whole_numbers(1, 1, 2, 9, 17, most=2)
    assert torch.equal(forward(fusion.conv, x), run(expression, x))
