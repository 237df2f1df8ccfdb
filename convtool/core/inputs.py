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
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, multiply_adds, output_size, run
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.taps import PADDED, Table, tap_table
from convtool.core.tree import Chain, Sum, Tree, leaves

BATCH_ELEMENTS = 1 << 20  # numbers in flight, of the widest layer: 8 MiB in float64
SCALES = (0, 3, -3, 10, -10)  # of the normals, as powers of two, so that neither bias nor weights always dominate
LOOKUP_WORK = 40  # of a number looked up and compared, in multiply-adds
BORDER_CHANNELS = 8  # of each group, at each place of the border: what is wrong there is so in all channels alike
COVER_ENTRIES = 1 << 25  # largest table of what meets what, along one axis; beyond, every position is taken


@dataclass(frozen=True, slots=True, eq=False)
class Impulses:
    """Inputs with a one in one channel of every group, each at a position of its own.

    Attributes:
        channels, size: of the inputs.
        groups: that the layers keep apart.
        chosen: (N,) for each input, which channel of every group.
        positions: (N, axes) for each input, where.
        rows: for each axis the output rows that are wanted, ascending; all of them where None. Only for inputs of one
            position, which reach no others.
    """

    channels: int
    groups: int
    chosen: Tensor
    positions: Tensor
    size: tuple[int, ...]
    rows: tuple[Tensor, ...] | None = None

    def abs(self) -> Impulses:
        """Itself: ones and zeros."""
        return self

    def to(self, device: torch.device) -> Impulses:
        """Return these inputs on another device."""
        rows = None if self.rows is None else tuple(row.to(device) for row in self.rows)
        return replace(self, chosen=self.chosen.to(device), positions=self.positions.to(device), rows=rows)

    def into(self, following: Sequence[Tree[Leaf]]) -> Impulses:
        """Return these inputs for a layer before `following`: with all output rows, unless those keep places."""
        return self if self.rows is None or _keep_place(following) else replace(self, rows=None)

    def wanted(self, out: Tensor, following: Sequence[Tree[Leaf]]) -> Tensor:
        """Pick the wanted rows of a chain's output, (N, C_out, *output_size), where its first layer gave all."""
        if self.rows is None or _keep_place(following):
            return out
        for axis, rows in enumerate(self.rows, 2):
            out = out.index_select(axis, rows)
        return out

    def __len__(self) -> int:
        return len(self.chosen)

    def dense(self) -> Tensor:
        """Write the inputs out, (N, C, *size) in float64."""
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


class HasGeometry(Protocol):
    """A layer, or what stands for one in a tree."""

    @property
    def geometry(self) -> Geometry:
        """Where it reads."""


Leaf = TypeVar("Leaf", bound=HasGeometry)


def _keep_place(trees: Sequence[Tree[Leaf]]) -> bool:
    """Tell whether every layer gives at a place what it makes of its input there alone: 1x1, as batch norms are."""
    return all(
        set(leaf.geometry.kernel_size) <= {1} and set(leaf.geometry.stride) <= {1} and not leaf.geometry.padded
        for tree in trees
        for leaf in leaves(tree)
    )


def apply(tree: Expression, x: Input) -> Tensor:
    """Return the tree's output, (N, C_out, *output_size)."""
    if isinstance(x, Tensor):
        return run(tree, x)
    if isinstance(tree, Chain):
        first, *others = tree.parts
        out = reduce(lambda value, part: run(part, value), others, apply(first, x.into(others)))
        return x.wanted(out, others)
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
        rest = out.movedim(2, -1)  # (N, C_out, *the other axes, kernel)
        if x.rows is not None:
            reads = table[x.rows[number]] == x.positions[0, number]  # (rows, kernel)
            out = rest @ reads.to(weight.dtype).mT
        else:
            each = table == x.positions[:, number, None, None]  # (N, output, kernel)
            spread = torch.bmm(rest.reshape(len(x), -1, rest.shape[-1]), each.to(weight.dtype).mT)
            out = spread.reshape(*rest.shape[:-1], -1)
    bias = conv.bias_over(conv.output_size(x.size))
    if bias is None:
        return out
    for place, rows in enumerate(x.rows or (), 1):
        bias = bias.index_select(place, rows)
    return out + bias


@dataclass(frozen=True, slots=True)
class ImpulsePlan:
    """Which impulses are run.

    Attributes:
        groups: that both sides keep apart.
        channels: of a group.
        entries: positions that together meet every kernel entry, each with all `chosen` channels.
        chosen: channels of a group that are run there; all of them, unless that is too much work.
        reached: for each of `entries`, the output rows that it reaches on each axis; None where that isn't known.
        border: positions at corners, edges and the centre, each with the channels that are run there.
    """

    groups: int
    channels: int
    entries: tuple[tuple[int, ...], ...]
    reached: tuple[tuple[Tensor, ...] | None, ...]
    chosen: tuple[int, ...]
    border: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def at_the_border(self) -> ImpulsePlan:
        """Return those impulses alone that aren't there for the kernel's entries; for all channels, as it were."""
        return replace(self, entries=(), reached=(), chosen=tuple(range(self.channels)))

    def __len__(self) -> int:
        return len(self.entries) * len(self.chosen) + sum(len(channels) for _, channels in self.border)


def plan_impulses(
    trees: Sequence[Expression],
    geometries: Sequence[Geometry],
    channels: int,
    size: tuple[int, ...],
    work: int,
    seed: int,
    exhaustive: bool,
) -> ImpulsePlan:
    """Plan the impulses for one input size.

    Args:
        trees: both sides.
        geometries: of the layers whose kernel entries are to be met: the one for each side, where there is one.
        channels: of the input.
        work: multiply-adds that may be spent on the kernel entries.
        seed: chooses the channels where not all can be had.
        exhaustive: every position and channel, whatever the work.
    """
    groups = math.gcd(*(conv.geometry.groups for tree in trees for conv in leaves(tree)))
    inner = channels // groups
    if exhaustive:
        everywhere = tuple(itertools.product(*map(range, size)))
        rows = _reached(trees, geometries, size, everywhere)
        return ImpulsePlan(groups, inner, everywhere, rows, tuple(range(inner)), ())
    # Tables of several geometries agree in their input, whatever their outputs are.
    axes = [_covering([tap_table(g.axes[a], n) for g in set(geometries)], n) for a, n in enumerate(size)]
    entries = tuple(itertools.product(*axes))
    each = max(1, sum(_response_work(tree, size) for tree in trees))
    affordable = max(1, min(inner, work // (each * len(entries))))
    chosen = sorted(np.random.default_rng(seed).permutation(inner)[:affordable].tolist())
    edges = (sorted({0, n // 2, n - 1}) for n in size)
    around = [position for position in itertools.product(*edges) if position not in set(entries)]
    share = min(inner, BORDER_CHANNELS)
    # Where not all channels can be had at every position, positions take turns, so that as many come up as can.
    border = tuple(
        (position, tuple(sorted({(number * share + step) % inner for step in range(share)})))
        for number, position in enumerate(around)
    )
    return ImpulsePlan(groups, inner, entries, _reached(trees, geometries, size, entries), tuple(chosen), border)


def _reached(
    trees: Sequence[Expression],
    geometries: Sequence[Geometry],
    size: tuple[int, ...],
    positions: Sequence[tuple[int, ...]],
) -> tuple[tuple[Tensor, ...] | None, ...]:
    """Return for each position the output rows on each axis where a tap of some geometry reads it; None for all."""
    if len(geometries) < len(trees):  # not every tree has a single layer's geometry
        return (None,) * len(positions)
    found: list[dict[int, Tensor]] = []
    for axis, n in enumerate(size):
        tables = [torch.from_numpy(tap_table(geometry.axes[axis], n)) for geometry in set(geometries)]
        wanted = {position[axis] for position in positions}
        found.append(
            {at: torch.cat([(table == at).any(1).nonzero().flatten() for table in tables]).unique() for at in wanted}
        )
    rows = [tuple(found[axis][at] for axis, at in enumerate(position)) for position in positions]
    return tuple(one if all(len(part) for part in one) else None for one in rows)


def _covering(tables: Sequence[Table], size: int) -> list[int]:
    """Choose positions of one axis at which every tap is met: by itself, where it can be; the middle ones first."""
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
    """Count the multiply-adds of a tree's answer to one impulse; looking a number up takes as long as some of them."""
    if isinstance(tree, Sum):
        return sum(_response_work(part, size) for part in tree.parts)
    if isinstance(tree, Chain):
        total, at = _response_work(tree.parts[0], size), output_size(tree.parts[0], size)
        for part in tree.parts[1:]:
            total += multiply_adds(part, at)
            at = output_size(part, at)
        return total
    return tree.out_channels * math.prod(tree.geometry.kernel_size) * LOOKUP_WORK


def dense_inputs(
    channels: int, size: tuple[int, ...], trials: int, seed: int, widest: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield batches of inputs (N, C, *size) in float64, each with the name of its kind: normals, zero, a constant.

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


def dense_count(trials: int) -> int:
    """Return how many inputs `dense_inputs` makes of so many trials."""
    return trials + 2


def impulse_inputs(plan: ImpulsePlan, size: tuple[int, ...], widest: int) -> Iterator[Impulses]:
    """Yield the planned impulses in batches; see `dense_inputs`."""
    batch = max(1, BATCH_ELEMENTS // max(1, widest))

    def impulses(places: Sequence[tuple[tuple[int, ...], int]], rows: tuple[Tensor, ...] | None) -> Impulses:
        positions = torch.tensor([position for position, _ in places], dtype=torch.int64).reshape(
            len(places), len(size)
        )
        chosen = torch.tensor([channel for _, channel in places])
        return Impulses(plan.channels * plan.groups, plan.groups, chosen, positions, size, rows)

    for position, rows in zip(plan.entries, plan.reached, strict=True):
        for start in range(0, len(plan.chosen), batch):
            yield impulses([(position, channel) for channel in plan.chosen[start : start + batch]], rows)
    single = ((position, channel) for position, channels in plan.border for channel in channels)
    while taken := list(itertools.islice(single, batch)):
        yield impulses(taken, None)


def taps_read(geometry: Geometry, size: tuple[int, ...]) -> tuple[int, int]:
    """Count of a kernel's taps those that some output reads the input with at this size, and of how many."""
    read = [int((tap_table(axis, n) != PADDED).any(axis=0).sum()) for axis, n in zip(geometry.axes, size, strict=True)]
    return math.prod(read), math.prod(geometry.kernel_size)


def widest_layer(tree: Expression, size: tuple[int, ...]) -> int:
    """Count numbers of one input where a tree is widest: its input, an output, or an impulse's kernel pieces."""
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
