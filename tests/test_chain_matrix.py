"""The matrix of layers in chains and sums: against running them, and against the product of their own matrices."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

import convtool
from convtool.core import classes, kernels
from convtool.core.conv import Conv, conv
from convtool.core.expression import Expression, in_channels, out_channels, run
from convtool.core.geometry import Geometry
from convtool.core.kernels import ORDERS
from convtool.core.moves import NOTHING, Selection
from convtool.core.toeplitz import toeplitz
from convtool.core.tree import Chain, Sum
from convtool.errors import ConvtoolError, UsageError

MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
LARGEST = 400  # numbers of a feature map


def random_layer(rng: random.Random, inputs: int, axes: int, generator: torch.Generator) -> Conv | None:
    """Return a layer with whatever geometry; None where these numbers don't make one."""
    transposed, groups, outputs = rng.random() < 0.25, rng.choice([1, 1, 1, 2, inputs]), rng.choice([1, 2, 3, 4, 6])
    kernel, stride, dilation = ([rng.randint(1, most) for _ in range(axes)] for most in (4, 3, 2))
    more = [rng.randint(0, max(pair) - 1) if transposed else 0 for pair in zip(stride, dilation, strict=True)]
    if inputs % groups or outputs % groups:
        return None
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    return conv(
        torch.randn(*shape, *kernel, dtype=torch.float64, generator=generator),
        torch.randn(outputs, dtype=torch.float64, generator=generator) if rng.random() < 0.6 else None,
        stride=stride,
        padding=[(rng.randint(0, 2), rng.randint(0, 2)) for _ in range(axes)],
        dilation=dilation,
        groups=groups,
        padding_mode="zeros" if transposed else rng.choice(MODES),
        transposed=transposed,
        output_padding=more,
    )


def random_chain(seed: int) -> tuple[list[Conv], tuple[int, ...]]:
    """Return layers that run one after the other, and the size of the first one's input."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    axes, channels = rng.choice([1, 2, 2]), rng.choice([1, 2, 4])
    size = at = tuple(rng.randint(4, 9) for _ in range(axes))
    layers: list[Conv] = []
    wanted = rng.randint(2, 4)
    while len(layers) < wanted:
        try:
            layer = random_layer(rng, channels, axes, generator)
            out = () if layer is None else layer.output_size(at)
        except ConvtoolError:
            continue
        if layer is not None and math.prod(out) * layer.out_channels <= LARGEST:
            layers.append(layer)
            channels, at = layer.out_channels, out
    return layers, size


def truth(tree: Expression, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return matrix and bias of a tree by running it on zero and every basis vector."""
    inputs = in_channels(tree) * math.prod(size)
    bias = run(tree, torch.zeros(1, in_channels(tree), *size, dtype=torch.float64)).flatten()
    basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, in_channels(tree), *size)
    return (run(tree, basis).flatten(1) - bias).T, bias


def last(channels: int, size: tuple[int, ...]) -> Tensor:
    """Return where the numbers of a channels-last vector are in a channels-first one."""
    return torch.arange(channels * math.prod(size)).reshape(channels, -1).T.flatten()


def check(tree: Expression, size: tuple[int, ...]) -> None:
    """Hold every form of a tree's matrix against running it."""
    dense, bias = truth(tree, size)
    for order in ORDERS:
        for transpose in (False, True):
            plain, affine = (
                toeplitz(tree, size, transpose=transpose, affine=full, order=order) for full in (False, True)
            )
            wanted, offset = dense, bias
            if order == "HWC":
                rows, columns = last(out_channels(tree), plain.output_size), last(in_channels(tree), size)
                wanted, offset = dense[rows][:, columns], bias[rows]
            full = torch.cat([wanted, offset[:, None]], dim=1)
            wanted, full = (wanted.T, full.T) if transpose else (wanted, full)
            made = plain.to_dense()
            torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(affine.to_sparse_csr().to_dense(), full, rtol=1e-9, atol=1e-9)
            if plain.bias is not None:
                torch.testing.assert_close(plain.bias, offset, rtol=1e-9, atol=1e-9)
            start, stop = plain.shape[0] // 3, plain.shape[0] * 2 // 3
            assert torch.equal(plain.dense_rows(start, stop), made[start:stop])
            assert plain.nnz == len(plain.rows(0, plain.shape[0]).indices)


def patterns(layers: list[Conv], size: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield each layer's matrix of how many taps stand at each place."""
    for layer in layers:
        ones = Conv(torch.ones_like(layer.weight), None, layer.geometry)
        yield toeplitz(ones, size).to_dense()
        size = layer.output_size(size)


@pytest.mark.parametrize("seed", range(24))
def test_a_chains_matrix_is_what_the_chain_computes(seed: int) -> None:
    layers, size = random_chain(seed)
    check(Chain(tuple(layers)), size)
    entries = int((reduce(lambda done, one: one @ done, patterns(layers, size)) > 0).sum())
    stored = toeplitz(layers, size).nnz
    groups = reduce(math.gcd, (layer.geometry.groups for layer in layers))
    nested = all(max(one, two) % min(one, two) == 0 for one in _groups(layers) for two in _groups(layers))
    assert stored == entries if nested and groups == min(_groups(layers)) else stored >= entries


def _groups(layers: list[Conv]) -> list[int]:
    return [layer.geometry.groups for layer in layers]


def test_sums_and_layers_that_only_copy_are_part_of_a_chain() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third, fourth = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 2, 3, 3), (4, 4, 3, 1), (4, 2, 1, 3), (4, 4, 1, 1))
    )
    bias = torch.randn(4, dtype=torch.float64, generator=generator)
    head, tail = conv(first, bias, padding=(1, 0), stride=2), conv(fourth, bias)
    branches = Sum((Chain((conv(second, bias, padding=(1, 0)), tail)), conv(third, groups=2, padding=(0, 1)), tail))
    check(Chain((head, branches, tail)), (5, 7))
    check(Sum((Chain((branches, tail)), branches)), (3, 4))
    flat = Selection(torch.arange(24), 4, Geometry.of((3, 2)))
    linear = conv(torch.randn(5, 24, 1, 1, dtype=torch.float64, generator=generator), bias[[0, 1, 2, 3, 0]])
    check(Chain((conv(first, padding=1, stride=2), flat, linear)), (5, 4))
    turned = Selection(torch.tensor([3, NOTHING, 0, 0]), 4, Geometry.of((1, 1)))
    check(Chain((turned, branches, Selection(torch.tensor([0, 2]), 4, Geometry.of((1, 1))))), (3, 3))
    halves = Selection(torch.tensor([1, 0, 3, 2]), 4, Geometry.of((1, 1)))
    check(Chain((conv(second[:, :2], groups=2), halves, conv(second[:, :1], groups=4))), (6, 4))


@pytest.mark.parametrize("seed", range(16))
def test_long_axes_repeat_themselves_away_from_their_borders(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layers: list[Conv] = []
    size: tuple[int, ...] = (rng.randint(50, 70),)
    at = size
    while len(layers) < 3:
        layer = random_layer(rng, layers[-1].out_channels if layers else 1, 1, generator)
        if layer is not None and layer.out_channels < 4 and 12 < layer.output_size(at)[0] < 200:
            layers.append(layer)
            at = layer.output_size(at)
    tree = Chain(tuple(layers))
    dense, _ = truth(tree, size)
    torch.testing.assert_close(toeplitz(tree, size).to_dense(), dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(toeplitz(tree, size, transpose=True).to_dense(), dense.T, rtol=1e-9, atol=1e-9)
    assert classes.inside(tree, size, 0, np.arange(at[0])).sum() > 3  # or this shows nothing


@pytest.mark.parametrize("seed", [3, 5, 8])
def test_a_matrix_is_the_same_in_blocks_of_any_size(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, size = random_chain(seed)
    wanted = [toeplitz(layers, size, transpose=transpose).to_dense() for transpose in (False, True)]
    monkeypatch.setattr(kernels, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(classes, "CLASS_ENTRIES", 1)
    for transpose in (False, True):
        torch.testing.assert_close(toeplitz(layers, size, transpose=transpose).to_dense(), wanted[transpose])


def test_what_cannot_be_chained_is_said() -> None:
    one, other = conv(torch.ones(3, 2, 3)), conv(torch.ones(2, 3, 3))
    with pytest.raises(UsageError, match="channels don't fit: a layer takes 2, and the one before gives 3"):
        convtool.toeplitz([one, one], 9)
    with pytest.raises(UsageError, match="1 and 2 spatial axes"):
        convtool.toeplitz([one, conv(torch.ones(2, 3, 3, 3))], 9)
    with pytest.raises(UsageError, match="smaller than the kernel"):
        convtool.toeplitz([one, other], 4)
    assert convtool.toeplitz([one, other], 5, dtype=torch.float64).shape == (2, 10)


if __name__ == "__main__":  # as many as one likes: python tests/test_chain_matrix.py 1000
    for number in range(int(sys.argv[1])):
        check(Chain(tuple(random_chain(number)[0])), random_chain(number)[1])
    print(f"{sys.argv[1]} random chains: each matrix is what the chain computes")
