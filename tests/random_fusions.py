"""Random fusions that are correct, verified: none may fail, and the largest ratio of error to bound is to be near 1.

    python tests/random_fusions.py --count 10000

Layers of all kinds and sizes, chains and sums, weights from subnormal to large, channels of zeros, biases that
dominate, batch norms whose bias cancels; fused and rounded to the dtype of the layers. `test_verify` runs some of them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from layers import lower_batch_norm
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, default_sizes
from convtool.core.fuse import NamedConv, fuse_tree
from convtool.core.geometry import PADDING_MODES, Geometry
from convtool.core.rounding import rounded
from convtool.core.tree import Chain, Sum, Tree, leaves, map_leaves
from convtool.core.verify import EquivalenceReport, verify
from convtool.errors import InputError, RefusedError, UsageError

AXES = (0, *(1,) * 7, *(2,) * 9, *(3,) * 2, 4)  # how often each number of axes comes up
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Fusion:
    """A tree of layers in some dtype, and the layer that convtool makes of it."""

    seed: int
    dtype: torch.dtype
    tree: Expression
    fused: Conv


class Random:
    """Numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, share: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def numbers(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Numbers of a dtype: of a scale of their own, some of them much smaller, some zero."""
        values = self.normal(*shape) * 2.0 ** self.integer(-9, 4)
        if self.chance(0.3):  # down to where float16 is subnormal, and beyond
            values *= torch.exp2(-18 * torch.rand(shape, generator=self.generator, dtype=torch.float64))
        if self.chance(0.15):
            values[self.integer(0, shape[0] - 1)] = -0.0
        if self.chance(0.05):
            values.zero_()
        if self.chance(0.1):  # whole numbers: ties of rounding, and sums that are exact
            values = values.round()
        return rounded(values, dtype)


def random_layer(
    random: Random, inner: int, axes: int, dtype: torch.dtype, outer: int = 0, padded: bool = False
) -> Conv:
    """A convolution of any kind, a batch norm or a linear layer where there are no axes."""
    if random.chance(0.2):
        return (
            _batch_norm(random, inner, axes, dtype)
            if not outer or outer == inner
            else _pointwise(random, inner, outer, axes, dtype)
        )
    groups = random.integer(1, 3)
    groups = groups if inner % groups == 0 and outer % groups == 0 else 1
    outer = outer or groups * random.integer(1, 3)
    most = (0, 4, 3, 2, 2)[axes]
    fields = {
        "stride": [random.integer(1, 3) if random.chance(0.4) else 1 for _ in range(axes)],
        "dilation": [random.integer(1, 2) for _ in range(axes)],
        "padding": [(random.integer(0, 2), random.integer(0, 2)) if padded else (0, 0) for _ in range(axes)],
    }
    kernel = tuple(random.integer(1, most) for _ in range(axes))
    mode = PADDING_MODES[random.integer(0, 3)] if padded and random.chance(0.3) else "zeros"
    transposed = axes > 0 and not padded and random.chance(0.1)
    geometry = Geometry.of(
        kernel,
        groups=groups,
        padding_mode=mode,
        transposed=transposed,
        **fields,  # type: ignore[arg-type]
    )
    weight = random.numbers(dtype, outer, inner // groups, *kernel)
    bias = random.numbers(dtype, outer) if random.chance(0.6) else None
    if bias is not None and random.chance(0.1):
        bias = rounded(bias.double() * 2.0**10, dtype)  # dominates
    return Conv(weight, bias, geometry)


def _pointwise(random: Random, inner: int, outer: int, axes: int, dtype: torch.dtype) -> Conv:
    return Conv(random.numbers(dtype, outer, inner, *(1,) * axes), None, Geometry.of((1,) * axes))


def _batch_norm(random: Random, channels: int, axes: int, dtype: torch.dtype) -> Conv:
    mean, variance = random.numbers(dtype, channels), random.numbers(dtype, channels).double().square() + 0.01
    weight, bias = random.numbers(dtype, channels), random.numbers(dtype, channels)
    variance = rounded(variance, dtype)
    if random.chance(0.3):  # the bias all but cancels
        bias = rounded(mean.double() * weight.double() / (variance.double() + 1e-5).sqrt(), dtype)
    affine = random.chance(0.8)
    return lower_batch_norm(mean, variance, weight if affine else None, bias if affine else None, 1e-5, axes)


def random_tree(random: Random, dtype: torch.dtype) -> Expression:
    """A chain of one to three layers, or a sum of branches, or a chain of both."""
    axes = AXES[random.integer(0, len(AXES) - 1)]
    channels = random.integer(1, 6)
    if random.chance(0.25):
        outer = channels if random.chance(0.5) else random.integer(1, 4)
        first = random_layer(random, channels, axes, dtype, outer)
        branches: list[Tree[Conv]] = [first, Conv(random.numbers(dtype, *first.weight.shape), None, first.geometry)]
        if outer == channels and not first.geometry.transposed and set(first.geometry.stride) <= {1}:
            kernel = tuple(k if k % 2 else k + 1 for k in first.geometry.kernel_size)
            same = Geometry.of(kernel, padding="same", groups=1)
            branches = [Conv(random.numbers(dtype, outer, channels, *kernel), None, same)]
            branches += [_batch_norm(random, channels, axes, dtype), _pointwise(random, channels, outer, axes, dtype)]
        total: Tree[Conv] = Sum(tuple(branches))
        if random.chance(0.5):
            return total
        return Chain((total, random_layer(random, outer, axes, dtype)))
    layers = [random_layer(random, channels, axes, dtype, padded=random.chance(0.5))]
    for _ in range(random.integer(0, 2)):
        layers.append(random_layer(random, layers[-1].out_channels, axes, dtype))
    return Chain(tuple(layers))


def random_fusions(count: int, dtypes: tuple[torch.dtype, ...] = DTYPES, seed: int = 0) -> Iterator[Fusion]:
    """That many fusions, of each dtype in turn; trees that cannot be fused exactly are passed over."""
    made = 0
    while made < count:
        dtype = dtypes[made % len(dtypes)]
        tree = random_tree(Random(seed), dtype)
        seed += 1
        named = map_leaves(lambda conv: NamedConv("a layer", conv), tree)
        try:
            fused = fuse_tree(named, input_size=None, allow_border=False, dtype=dtype).conv
        except (RefusedError, InputError, UsageError):  # no single layer, beyond the dtype's range, channels
            continue
        made += 1
        yield Fusion(seed - 1, dtype, tree, fused)


def check(fusion: Fusion, every_size: bool = False) -> list[EquivalenceReport]:
    """Verified at one input size, or at all that are chosen by default."""
    sizes = default_sizes(fusion.tree)
    chosen = sizes if every_size else [sizes[fusion.seed % len(sizes)]]
    return [verify(fusion.tree, [fusion.fused], size, trials=2, seed=fusion.seed) for size in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="fusions in all, of each dtype in turn")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, failed = time.monotonic(), 0
    largest = dict.fromkeys(DTYPES, 0.0)
    numbers = dict.fromkeys(DTYPES, 0)
    layers = 0
    for fusion in random_fusions(arguments.count, seed=arguments.seed):
        numbers[fusion.dtype] += 1
        layers += sum(1 for _ in leaves(fusion.tree))
        for report in check(fusion):
            largest[fusion.dtype] = max(largest[fusion.dtype], report.ratio)
            if not report.equivalent:
                failed += 1
                print(f"seed {fusion.seed}, {fusion.dtype}: FAILED with ratio {report.ratio:.6g}", flush=True)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        print(f"{name:>9}: {numbers[dtype]} fusions, largest error/bound {largest[dtype]:.6f}")
    seconds = time.monotonic() - start
    print(f"{sum(numbers.values())} fusions of {layers} layers, {failed} failed, {seconds:.0f} s")
    raise SystemExit(1 if failed or not all(math.isfinite(ratio) for ratio in largest.values()) else 0)


if __name__ == "__main__":
    main()
