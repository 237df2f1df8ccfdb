"""Inputs that find faults: signed normals, a constant, and impulses that meet every kernel entry by itself.

An impulse is a one among zeros. Where it stands away from the border, each output that it reaches reads one entry of
the fused kernel and nothing else. Which positions it takes to meet all entries so is read off the tap tables, an axis
at a time: one for each residue of the stride, where the input is long enough. Impulses in different groups don't meet,
so one input has one in each group.

The first layer's answer to an impulse is a piece of its kernel. It is looked up and not computed, since a convolution
would multiply by zeros for all other channels: 512 times as many as there is to do for a layer of 512 channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, multiply_adds, output_size, run
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.taps import PADDED, Table, tap_table
from convtool.core.tree import Chain, Sum, leaves

BATCH_ELEMENTS = 1 << 22  # numbers in flight, of the widest layer: 32 MiB in float64
SCALES = (0, 3, -3, 10, -10)  # of the normals, as powers of two, so that neither bias nor weights always dominate
LOOKUP_WORK = 4  # of a number looked up, in multiply-adds
BORDER_SHARE = 8  # the border gets one in so many of the multiply-adds that the kernel entries get
COVER_ENTRIES = 1 << 25  # largest table of what meets what, along one axis; beyond, every position is taken


@dataclass(frozen=True, slots=True, eq=False)
class Impulses:
    """Inputs with a one in one channel of every group, each at a position of its own.

    Attributes:
        channels, size: of the inputs.
        groups: that the layers keep apart.
        chosen: (N,) for each input, which channel of every group.
        positions: (N, axes) for each input, where.
    """

    channels: int
    groups: int
    chosen: Tensor
    positions: Tensor
    size: tuple[int, ...]

    def abs(self) -> Impulses:
        """Itself: ones and zeros."""
        return self

    def to(self, device: torch.device) -> Impulses:
        """The same on another device."""
        return replace(self, chosen=self.chosen.to(device), positions=self.positions.to(device))

    def __len__(self) -> int:
        return len(self.chosen)

    def dense(self) -> Tensor:
        """The inputs written out, (N, C, *size) in float64."""
        x = torch.zeros(len(self), self.groups, self.channels // self.groups, *self.size, dtype=torch.float64)
        for number, (channel, position) in enumerate(zip(self.chosen.tolist(), self.positions.tolist(), strict=True)):
            x[(number, slice(None), channel, *position)] = 1.0
        return x.flatten(1, 2)

    def source(self, number: int, channel: int, channels: int) -> tuple[int, ...]:
        """(channel, *position) of the one that an output channel, of so many, answers to in that input."""
        group = channel // (channels // self.groups)
        inner = group * (self.channels // self.groups) + int(self.chosen[number])
        return (inner, *(int(place) for place in self.positions[number]))


Input: TypeAlias = Tensor | Impulses


def apply(tree: Expression, x: Input) -> Tensor:
    """The tree's output, (N, C_out, *output_size)."""
    if isinstance(x, Tensor):
        return run(tree, x)
    if isinstance(tree, Chain):
        return reduce(lambda value, part: run(part, value), tree.parts[1:], apply(tree.parts[0], x))
    if isinstance(tree, Sum):
        return reduce(torch.add, (apply(part, x) for part in tree.parts))
    return respond(tree, x)


def respond(conv: Conv, x: Input) -> Tensor:
    """One layer's output; for impulses the same as `forward` gives for them written out, taken from the kernel."""
    if isinstance(x, Tensor):
        return forward(conv, x)
    geometry, weight = conv.geometry, conv.weight
    own, outer = geometry.groups, conv.out_channels
    inner = weight.shape[1]
    # The group of each output channel holds every (own / groups)-th of an impulse's channels.
    part = (torch.arange(outer, device=weight.device) // (outer // own)) % (own // x.groups)
    local = x.chosen.to(weight.device)[:, None] - part * inner  # (N, C_out) which of the kernel's own channels
    meets = (local >= 0) & (local < inner)
    row = torch.arange(outer, device=weight.device).expand_as(local)
    out = weight[row, local.clamp(0, inner - 1)]  # (N, C_out, *kernel)
    if not bool(meets.all()):
        out = torch.where(meets.reshape(*meets.shape, *(1,) * conv.spatial_axes), out, torch.zeros_like(out))
    for number, (axis, size) in enumerate(zip(geometry.axes, x.size, strict=True)):
        table = torch.from_numpy(tap_table(axis, size)).to(weight.device)  # (output, kernel)
        reads = (table == x.positions[:, number, None, None]).to(weight.dtype)  # (N, output, kernel)
        rest = out.movedim(2, -1)  # (N, C_out, *the other axes, kernel)
        out = torch.bmm(rest.reshape(len(x), -1, rest.shape[-1]), reads.mT).reshape(*rest.shape[:-1], -1)
    bias = conv.bias_over(conv.output_size(x.size))
    return out if bias is None else out + bias


@dataclass(frozen=True, slots=True)
class ImpulsePlan:
    """Which impulses are run.

    Attributes:
        groups: that both sides keep apart.
        channels: of a group.
        entries: positions that together meet every kernel entry, each with all `chosen` channels.
        chosen: channels of a group that are run there; all of them, unless that is too much work.
        border: positions at corners, edges and the centre, each with the channels that are run there.
    """

    groups: int
    channels: int
    entries: tuple[tuple[int, ...], ...]
    chosen: tuple[int, ...]
    border: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def plan_impulses(
    trees: Sequence[Expression],
    geometries: Sequence[Geometry],
    channels: int,
    size: tuple[int, ...],
    work: int,
    seed: int,
    exhaustive: bool,
) -> ImpulsePlan:
    """The impulses for one input size.

    Args:
        trees: both sides.
        geometries: of the layers whose kernel entries are to be met: the fused one's, on either side.
        channels: of the input.
        work: multiply-adds that may be spent on the kernel entries.
        seed: chooses the channels where not all can be had.
        exhaustive: every position and channel, whatever the work.
    """
    groups = math.gcd(*(conv.geometry.groups for tree in trees for conv in leaves(tree)))
    inner = channels // groups
    if exhaustive:
        everywhere = tuple(itertools.product(*(range(n) for n in size)))
        return ImpulsePlan(groups, inner, everywhere, tuple(range(inner)), ())
    # Tables of several geometries agree in their input, whatever their outputs are.
    axes = [_covering([tap_table(g.axes[a], n) for g in geometries], n) for a, n in enumerate(size)]
    entries = tuple(itertools.product(*axes))
    each = max(1, sum(_response_work(tree, size) for tree in trees))
    affordable = max(1, min(inner, work // (each * len(entries))))
    generator = np.random.default_rng(seed)
    chosen = sorted(generator.permutation(inner)[:affordable].tolist())
    edges = (sorted({0, n // 2, n - 1}) for n in size)
    around = [position for position in itertools.product(*edges) if position not in set(entries)]
    share = max(1, min(inner, work // BORDER_SHARE // (each * max(1, len(around)))))
    # Where not all channels can be had at every position, positions take turns, so that as many come up as can.
    border = tuple(
        (position, tuple(sorted({(number * share + step) % inner for step in range(share)})))
        for number, position in enumerate(around)
    )
    return ImpulsePlan(groups, inner, entries, tuple(chosen), border)


def _covering(tables: Sequence[Table], size: int) -> list[int]:
    """Positions of one axis at which every tap is met: by itself, where it can be; the middle ones first."""
    if not tables or sum(table.shape[1] for table in tables) * size > COVER_ENTRIES:
        return list(range(size))
    met = np.concatenate([_met(table, size) for table in tables])  # (taps of all tables, size)
    met = met[met.any(axis=1)]
    from_middle = np.abs(np.arange(size) - (size - 1) / 2)
    chosen: list[int] = []
    while len(met):
        gain = met.sum(axis=0)
        best = int(np.lexsort((from_middle, -gain))[0])
        chosen.append(best)
        met = met[~met[:, best]]
    return sorted(chosen) or [size // 2]


def _met(table: Table, size: int) -> npt.NDArray[np.bool_]:
    """(taps, size) at which positions each tap is met by itself, or at all where it never is by itself."""
    outputs, taps = table.shape
    live = table != PADDED
    row, tap = np.nonzero(live)
    column = table[live]
    readers = np.zeros((outputs, size), dtype=np.int32) if outputs * size <= COVER_ENTRIES else None
    together = np.zeros((taps, size), dtype=bool)
    together[tap, column] = True
    if readers is None:
        return together
    np.add.at(readers, (row, column), 1)
    single = readers[row, column] == 1
    alone = np.zeros((taps, size), dtype=bool)
    alone[tap[single], column[single]] = True
    return np.where(alone.any(axis=1, keepdims=True), alone, together)


def _response_work(tree: Expression, size: tuple[int, ...]) -> int:
    """Multiply-adds of a tree's answer to one impulse; looking a number up takes as long as some of them."""
    if isinstance(tree, Sum):
        return sum(_response_work(part, size) for part in tree.parts)
    if isinstance(tree, Chain):
        total, at = _response_work(tree.parts[0], size), output_size(tree.parts[0], size)
        for part in tree.parts[1:]:
            total += multiply_adds(part, at)
            at = output_size(part, at)
        return total
    longest = max(tree.geometry.kernel_size, default=1)
    return tree.out_channels * math.prod(tree.output_size(size)) * longest * LOOKUP_WORK


def dense_inputs(
    channels: int, size: tuple[int, ...], trials: int, seed: int, widest: int
) -> Iterator[tuple[str, Tensor]]:
    """Batches of inputs (N, C, *size) in float64, each with the name of its kind: normals, zero, a constant.

    Args:
        widest: numbers for one input in the widest layer; sets the batches' size.
    """
    shape = (channels, *size)
    batch = max(1, BATCH_ELEMENTS // max(1, widest))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, trials, batch):
        count = min(batch, trials - start)
        scales = torch.tensor([2.0 ** SCALES[(start + i) % len(SCALES)] for i in range(count)], dtype=torch.float64)
        # One at a time: what torch draws for several at once depends on how many, and so on how batches are cut.
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
        normal = torch.stack(drawn)
        yield "normal", normal * scales.reshape(-1, *(1,) * len(shape))
    yield "zero", torch.zeros(1, *shape, dtype=torch.float64)
    yield "constant", torch.ones(1, *shape, dtype=torch.float64)


def impulse_inputs(plan: ImpulsePlan, size: tuple[int, ...], widest: int) -> Iterator[Impulses]:
    """The planned impulses in batches; see `dense_inputs`."""
    batch = max(1, BATCH_ELEMENTS // max(1, widest))
    places = itertools.chain(((position, plan.chosen) for position in plan.entries), plan.border)
    single = ((position, channel) for position, channels in places for channel in channels)
    while taken := list(itertools.islice(single, batch)):
        positions = torch.tensor([position for position, _ in taken], dtype=torch.int64).reshape(len(taken), len(size))
        chosen = torch.tensor([channel for _, channel in taken])
        yield Impulses(plan.channels * plan.groups, plan.groups, chosen, positions, size)


def widest_layer(tree: Expression, size: tuple[int, ...]) -> int:
    """Numbers of one input in the widest place of a tree: its input, any output, or the kernel pieces of an impulse."""
    if isinstance(tree, Sum):
        return sum(widest_layer(part, size) for part in tree.parts)
    if isinstance(tree, Chain):
        widest, at = 0, size
        for part in tree.parts:
            widest = max(widest, widest_layer(part, at))
            at = output_size(part, at)
        return widest
    outputs = tree.out_channels * max(math.prod(tree.output_size(size)), math.prod(tree.geometry.kernel_size))
    return max(tree.in_channels * math.prod(size), outputs)
