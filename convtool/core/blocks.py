"""A layer's matrix as the smaller ones that it falls apart into: their singular values together are its own.

- A layer in groups has a block for each group.
- Where an axis wraps around without a rest (O*s = I, each row the one before it moved by the stride), a Fourier
  transform of both sides leaves a block for each frequency, in which the s inputs of a stride are channels (Sedghi,
  Gupta, Long: The Singular Values of Convolutional Layers, 2019). A kernel as long as its stride, without padding, is
  such an axis too, with the same block at every frequency.
- On the other axes, outputs are connected with the inputs that they read; positions that no path connects never meet.
  Dilation, stride and padding make such components, many of them alike.

A transposed layer's matrix is the transpose of a plain one's, so that only plain tables come up here.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from convtool.core.conv import Conv, swap_channels
from convtool.core.flat import tensor_bits
from convtool.core.meeting import Array, Line, Meeting, meeting_of
from convtool.core.rows import check_scipy
from convtool.core.taps import PADDED, Table

SETTLED = 1 - 2.0**-22  # how near a bound on a symbol is to what was seen of it, when it is near enough
CHUNK = 1 << 22  # numbers of the blocks that are made at a time


@dataclass(frozen=True, eq=False)
class Block:
    """A matrix with a number for each pair of channels and each tap.

    Attributes:
        weight: (C_out, C_in, *taps) in float64 or complex128.
        lines: of each axis.
    """

    weight: Tensor
    lines: tuple[Line, ...]

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((C_out, outputs), (C_in, inputs))."""
        (rows, columns), outputs = self.weight.shape[:2], math.prod(len(line.table) for line in self.lines)
        return (rows, outputs), (columns, math.prod(line.size for line in self.lines))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.sides
        return math.prod(rows), math.prod(columns)

    @property
    def terms(self) -> int:
        """Of the sums that a product with T* T takes."""
        readers = math.prod(int(np.bincount(line.table[line.table >= 0]).max(initial=1)) for line in self.lines)
        return self.weight[0].numel() + len(self.weight) * readers

    @property
    def work(self) -> int:
        """Multiply-adds of such a product."""
        return 2 * self.weight.numel() * self.sides[0][1]

    @cached_property
    def _taps(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(C_out, C_in) the numbers of each tap that reads anything, of which outputs, and what these read."""
        found, by_tap = [], self.weight.movedim((0, 1), (-2, -1))
        for tap in itertools.product(*map(range, self.weight.shape[2:])):
            place, live = np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)
            for line, t in zip(self.lines, tap, strict=True):
                column = line.table[:, t]
                place = (place[:, None] * line.size + column).ravel()
                live = (live[:, None] & (column != PADDED)).ravel()
            if live.any():
                found.append((by_tap[tap], torch.from_numpy(np.flatnonzero(live)), torch.from_numpy(place[live])))
        return found

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        out = self.weight.new_zeros(*(part for side in self.sides for part in side))  # (C_out, outputs, C_in, inputs)
        for numbers, output, source in self._taps:
            out[:, output, :, source] += numbers
        return out.reshape(self.shape)

    def times(self, x: Tensor, adjoint: bool) -> Tensor:
        """Return T x, or T* x, for the rows of x."""
        given, gives = self.sides if adjoint else self.sides[::-1]
        x = x.reshape(-1, *given)
        out = x.new_zeros(len(x), *gives)
        for numbers, output, source in self._taps:
            if adjoint:
                out.index_add_(2, source, numbers.mH @ x[:, :, output])
            else:
                out.index_add_(2, output, numbers @ x[:, :, source])
        return out.flatten(1)

    @cached_property
    def norm(self) -> float:
        """A bound on the norm of the matrix of absolute values: the root of its largest row and column sums."""
        sizes, (rows, columns) = Block(self.weight.abs(), self.lines), self.shape
        sums = ((columns, False), (rows, True))
        each = (float(sizes.times(torch.ones(1, n, dtype=torch.float64), back).max()) for n, back in sums)
        return math.sqrt(math.prod(each))

    def meeting(self, flipped: bool) -> Meeting:
        """Return which positions of its shorter side meet."""
        return meeting_of(self.weight, self.lines, flipped)

    def bound(self, work: int) -> float:
        """Return a bound on the largest singular value: the norm of the convolution of an endless input.

        That one has the matrix as a part of it (of padding that copies inputs, once these are copied, by a map whose
        norm is the root of the most copies of one). Its norm is the largest that its symbol's is at any frequency. For
        a unit vector v, p(f) = |H(f) v|^2 is a trigonometric polynomial of degree n_i on axis i, the kernel's steps. On
        a line through the place where it is largest, M, it is of exponential type sum n_i |u_i|; so at a distance of
        d_i on each axis it is at least M cos(sum n_i d_i / 2)^2 (M. Riesz; Duffin and Schaeffer: Some Inequalities
        Concerning Functions of Exponential Type, 1938). A cell of frequencies in whose middle the symbol is below that,
        with what was seen elsewhere for M, doesn't hold that place. The other cells are cut until they bound M well.

        Args:
            work: multiply-adds that looking at frequencies may take, and some for each besides.
        """
        axes = [line.axis for line in self.lines]
        steps = np.array([axis.reach // axis.stride for axis in axes])
        rows, columns = self.weight.shape[0], self.weight.shape[1] * math.prod(axis.stride for axis in axes)
        left = work // (rows * columns * min(rows, columns) + (1 << 16))  # frequencies
        points = np.maximum((len(steps) + 1) * steps, 1)  # on each axis, so that the cosine isn't zero
        some = points.copy()
        if steps.any() and not self.weight.is_complex():  # a frequency's sign conjugates the symbol
            some[steps.argmax()] = (some[steps.argmax()] + 1) // 2
        middles = (np.indices(some).reshape(len(some), math.prod(some)).T + 0.5) / points  # (cells, axes) in periods
        radius, seen, most = 0.5 / points, 0.0, math.inf
        while math.isinf(most) or len(middles) <= left:
            gains = self._gains(middles)
            seen, left = max(seen, float(gains.max())), left - len(middles)
            share = math.cos(math.pi * float(steps @ radius)) ** 2
            most = min(most, float(gains.max()) / share)
            if share > SETTLED:
                break
            radius = np.where(steps > 0, radius / 2, 0.0)
            corners = np.unique(np.array(list(itertools.product((-1, 1), repeat=len(steps)))) * radius, axis=0)
            kept = middles[gains >= seen * share * (1 - 2.0**-36)]
            middles = (kept[:, None] + corners).reshape(-1, len(steps))
        copies = math.prod(line.copies for line in self.lines)
        return math.sqrt(most * copies) * (1 + 2.0**-36)

    def _gains(self, frequencies: Array) -> Array:
        """Return the squares of the symbol's norm at (frequencies, axes), in periods."""
        waves = [Wave(np.arange(line.axis.kernel) * line.axis.dilation, line.axis.stride, 1) for line in self.lines]
        strides = math.prod(wave.stride for wave in waves)
        found, channels = [], self.weight.shape[:2]
        numbers = self.weight.reshape(math.prod(channels), -1).T.to(torch.complex128)  # (taps, pairs of channels)
        for some in np.array_split(frequencies, len(frequencies) * self.weight.numel() * strides // CHUNK + 1):
            phases = torch.ones(len(some), 1, 1, dtype=torch.complex128)  # (frequencies, strides, taps)
            for wave, turns in zip(waves, some.T, strict=True):
                one = wave.at(turns)[:, None, :, None, :]
                phases = (phases[:, :, None, :, None] * one).flatten(3, 4).flatten(1, 2)
            symbol = (phases @ numbers).reshape(len(some), strides, *channels)
            symbol = symbol.movedim(1, 3).flatten(2)  # (frequencies, C_out, C_in * strides)
            product = symbol @ symbol.mH if symbol.shape[1] <= symbol.shape[2] else symbol.mH @ symbol
            found.append(np.linalg.eigvalsh(product.numpy())[:, -1])  # which is faster than torch's
        return np.concatenate(found)


@dataclass(frozen=True, slots=True, eq=False)
class Wave:
    """The frequencies of an axis.

    Attributes:
        reads: (taps,) where each tap reads, relative to an output's own place.
        stride: from one output's place to the next one's.
        points: of a period.
    """

    reads: Table
    stride: int
    points: int

    def phases(self, real: bool) -> Tensor:
        """Return (frequencies, stride, taps) by what each tap's numbers go into which of the stride's inputs.

        The sign of a frequency conjugates a real symbol, so half of them will do then.
        """
        count = self.points // 2 + 1 if real else self.points
        step = self.reads // self.stride
        moves = bool((step != step[0]).any())
        phases = self.at(np.arange(count if moves else 1))
        return phases if moves else phases.real.clone()

    def at(self, turns: Array) -> Tensor:
        """Return (turns, stride, taps) those of frequencies, as parts of `points`."""
        step, place = np.divmod(self.reads, self.stride)
        out = np.zeros((len(turns), self.stride, len(step)), dtype=np.complex128)
        angle = np.outer(turns, step - step.min()) % self.points
        out[:, place, np.arange(len(step))] = np.exp(2j * np.pi * angle / self.points)
        return torch.from_numpy(out)


def transformed(weights: Tensor, waves: Sequence[Wave]) -> Iterator[Tensor]:
    """Yield (blocks, C_out, C_in, *taps) of all frequencies, some at a time; the first axes of taps are transformed."""
    if not waves:
        yield weights
        return
    phases = waves[0].phases(not weights.is_complex())
    each = weights[..., 0].numel() * waves[0].stride
    for part in phases.split(max(1, CHUNK // max(1, each))):
        kind = torch.promote_types(weights.dtype, part.dtype)
        # (batch, C_out, C_in, *other taps, frequencies, stride)
        moved = torch.tensordot(weights.movedim(3, -1).to(kind), part.to(kind), dims=([-1], [2]))
        moved = moved.movedim(-2, 1).movedim(-1, 4).flatten(3, 4).flatten(0, 1)
        yield from transformed(moved, waves[1:])


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """A layer's matrix in pieces.

    Attributes:
        weights: (groups, C_out, C_in, *taps) the groups that differ.
        waves: the axes that are transformed; they stand in front.
        lines: the others.
        repeats: how many blocks there are for each component of `lines`, equal ones too.
    """

    weights: Tensor
    waves: tuple[Wave, ...]
    lines: tuple[Line, ...]
    repeats: int

    @classmethod
    def of(cls, conv: Conv, input_size: Sequence[int]) -> Apart:
        """Take a layer's matrix apart, at one input size."""
        geometry, weight, output_size = conv.geometry, conv.exact().weight, conv.output_size(input_size)
        sizes = zip(geometry.axes, input_size, output_size, strict=True)
        if geometry.transposed:
            weight = swap_channels(weight, geometry.groups)
            plain = (replace(axis, transposed=False, output_padding=0) for axis in geometry.axes)
            sizes = zip(plain, output_size, input_size, strict=True)
        lines = [Line.of(axis, size, outputs) for axis, size, outputs in sizes]
        groups = {tensor_bits(part).numpy().tobytes(): part for part in weight.chunk(geometry.groups)}
        wraps = [number for number, line in enumerate(lines) if line.wraps]
        others = [number for number, line in enumerate(lines) if not line.wraps]
        waves = [Wave(line.table[0], line.size // len(line.table), len(line.table)) for line in lines if line.wraps]
        weights = torch.stack(tuple(groups.values())).permute(0, 1, 2, *(3 + number for number in wraps + others))
        repeats = geometry.groups * math.prod(wave.points for wave in waves)
        return cls(weights, tuple(waves), tuple(lines[number] for number in others), repeats)

    def shape(self, lines: Sequence[Line]) -> tuple[int, int]:
        """Return (rows, columns) of the block of some component of `lines`."""
        rows, columns = self.weights.shape[1:3]
        columns *= math.prod(wave.stride for wave in self.waves)
        return rows * math.prod(len(line.table) for line in lines), columns * math.prod(line.size for line in lines)

    def work(self, lines: Sequence[Line]) -> int:
        """Return short * short * long of all that differ of the blocks of some component of `lines`, added up."""
        shape = self.shape(lines)
        differ = len(self.weights) * math.prod(len(wave.phases(real=True)) for wave in self.waves)
        return differ * min(shape) ** 2 * max(shape)

    def batches(self) -> Iterator[Tensor]:
        """Yield (blocks, C_out, C_in, *taps) the weights of all that differ, some at a time."""
        yield from transformed(self.weights, self.waves)

    def parts(self) -> Counter[tuple[Line, ...]]:
        """Return the components of `lines`, equal ones once and counted; UsageError where scipy isn't installed."""
        check_scipy("singular values of a layer this large need")
        counts: Counter[tuple[Line, ...]] = Counter()
        for parts in itertools.product(*(line.components().items() for line in self.lines)):
            counts[tuple(line for line, _ in parts)] = math.prod(count for _, count in parts)
        return counts
