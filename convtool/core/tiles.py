"""The rows that every output channel of a group has: which columns, and which value stands where.

Nothing about them depends on the numbers in the weight, and away from the borders they are the same at every position,
up to a shift. So a channel's positions are cut into tiles, tiles that look alike share a template, and consecutive ones
make a run, which is one template over and over.
"""

from __future__ import annotations

import math
import threading
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from convtool.core.kernels import Kernels
from convtool.core.taps import PADDED

# Entries in a run, unless one position has more: 1 MiB of indices or of float32, which a core's own cache holds while
# it is copied to the next place, and long enough that the overhead of a copy doesn't show.
RUN_ENTRIES = 1 << 18

# Entries in a tile. What is made entry by entry are templates and the first tile of each kind: shorter is cheaper.
TILE_ENTRIES = 1 << 13

# Templates kept, of 12 bytes an entry. A tile is at an axis's start, inside or at its end: nine kinds for two axes.
TEMPLATES = 12

# Ranges of positions whose runs are kept.
RANGES = 1 << 10


Look: TypeAlias = tuple[int, int, bytes]  # an axis, so many positions of it, and a digest of what they have


class Tile(NamedTuple):
    """A range of positions of a channel, and the template that it shares with all tiles that look like it."""

    start: int
    stop: int
    pattern: tuple[Look, ...]
    shift: int  # of its columns against the template's


class Run(NamedTuple):
    """Consecutive positions of a channel: a tile over and over, or a part of one tile."""

    start: int
    stop: int
    tile: Tile  # the first
    tiles: int
    step: int  # columns that each tile is shifted against the one before
    entries: int  # of all tiles

    @property
    def part(self) -> tuple[int, int]:
        """Which of the tile's positions."""
        return self.start - self.tile.start, min(self.stop, self.tile.stop) - self.tile.start

    @property
    def look(self) -> tuple[object, ...]:
        """Runs of equal look have equal values, as far as both go."""
        return (*self.tile.pattern, *self.part)


class Template(NamedTuple):
    """What a tile looks like in every output channel of the first group."""

    starts: npt.NDArray[np.int64]  # (positions + 1,) where each position's entries begin
    columns: npt.NDArray[Any]  # (entries,) of the matrix's index dtype, less the tile's shift
    sources: npt.NDArray[np.int64]  # (entries,) where among the channel's values each value stands

    def of(self, run: Run) -> Template:
        """Return that of a run's part of the tile."""
        first, last = run.part
        here = slice(int(self.starts[first]), int(self.starts[last]))
        return Template(self.starts[first : last + 1] - here.start, self.columns[here], self.sources[here])


class ChannelRows:
    """The rows of an output channel of the first group, less their values.

    Args:
        made: what the matrix is made of.
        bias_column: whether each row ends in one more entry, whose column and value the caller fills in.
    """

    def __init__(self, made: Kernels, *, bias_column: bool) -> None:
        self._made, self._bias_column = made, bias_column
        self.positions = math.prod(made.row_size)
        slots = math.prod(int(axis.counts.max(initial=0)) for axis in made.slots)
        self.longest = made.column_channels * slots + bias_column
        self._templates: dict[tuple[object, ...], Template] = {}
        self.runs = lru_cache(RANGES)(self._find_runs)  # every channel is cut at the same places
        self.entries_before = lru_cache(RANGES)(self._count_before)
        self._range = lru_cache(None)(self._find_range)
        self._lock = threading.Lock()  # threads mostly want the same template

    @cached_property
    def entries(self) -> int:
        """Entries in all rows."""
        return self.entries_before(self.positions)

    def _count_before(self, position: int) -> int:
        """Count the entries in the rows of all positions before this one."""
        if position == self.positions:
            before = math.prod(int(starts[-1]) for starts in self._counts_before)
        else:
            # Those positions agree with it on some leading axes, are smaller on the next, and any on the rest.
            before, agree, inner, rest = 0, 1, self.positions, position
            below = math.prod(int(starts[-1]) for starts in self._counts_before)
            for size, starts in zip(self._made.row_size, self._counts_before, strict=True):
                inner, below = inner // size, below // max(1, int(starts[-1]))
                index, rest = divmod(rest, inner)
                before += agree * int(starts[index]) * below
                agree *= int(starts[index + 1] - starts[index])
        return self._made.column_channels * before + (position if self._bias_column else 0)

    @cached_property
    def _counts_before(self) -> list[npt.NDArray[np.int64]]:
        """For each axis the slots in use before each of its positions, and behind the last."""
        return [np.concatenate([[0], np.cumsum(axis.counts)]) for axis in self._made.slots]

    def counts(self, position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(positions,) number of entries in the rows of these positions."""
        counts = np.full(len(position), self._made.column_channels, dtype=np.int64)
        for axis, where in zip(self._made.slots, self._unravel(position), strict=True):
            counts *= axis.counts[where]
        return counts + 1 if self._bias_column else counts

    def _unravel(self, position: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Positions as one index per axis."""
        return np.unravel_index(position, self._made.row_size) if self._made.row_size else ()

    def _find_runs(self, start: int, stop: int) -> list[Run]:
        """Cut positions start:stop into runs of at most `RUN_ENTRIES` entries (one tile at least)."""
        runs = []
        while start < stop:
            tile = last = self._tile(start)
            end, count, step = min(stop, tile.stop), 1, 0
            most = RUN_ENTRIES // max(1, self.longest * (tile.stop - tile.start)) if start == tile.start else 1
            while count < most and end < stop:
                following = self._tile(end)
                further = following.shift - last.shift
                if following.pattern != tile.pattern or following.stop > stop or (count > 1 and further != step):
                    break
                last, end, count, step = following, following.stop, count + 1, further
            runs.append(Run(start, end, tile, count, step, self.entries_before(end) - self.entries_before(start)))
            start = end
        return runs

    @cached_property
    def _tiling(self) -> tuple[int, int, int]:
        """(axis, step, inner): a tile is `step` positions of that axis, all `inner` ones of the axes after it.

        Axes before it have one position in a tile.
        """
        longest, inner = max(1, self.longest), 1
        for number, size in reversed(list(enumerate(self._made.row_size))):
            if number == 0 or inner * size * longest > RUN_ENTRIES:
                step = max(1, TILE_ENTRIES // (inner * longest))
                period = self._made.periods[number]
                if period * inner * longest <= RUN_ENTRIES:
                    step = math.ceil(step / period) * period
                return number, min(step, size), inner
            inner *= size
        return 0, 1, 1

    def _tile(self, position: int) -> Tile:
        """Return the tile that a position is in."""
        if not self._made.row_size:
            return Tile(0, 1, (), 0)
        number, step, inner = self._tiling
        line, rest = divmod(position, self._made.row_size[number] * inner)
        begin = rest // (step * inner) * step
        end = min(begin + step, self._made.row_size[number])
        pattern, shift, leading, left = [], 0, math.prod(self._made.row_size[:number]), line
        for axis, size in enumerate(self._made.row_size):
            if axis < number:
                leading //= size
                index, left = divmod(left, leading)
                look, lowest = self._range(axis, index, index + 1)
            else:
                look, lowest = self._range(axis, begin, end) if axis == number else self._range(axis, 0, size)
            pattern.append(look)
            shift += lowest
        offset = line * self._made.row_size[number]
        return Tile((offset + begin) * inner, (offset + end) * inner, tuple(pattern), shift)

    def _find_range(self, number: int, start: int, stop: int) -> tuple[Look, int]:
        """Return what positions start:stop of an axis look like, and the lowest column that they have."""
        axis, size = self._made.slots[number], self._made.column_size[number]
        columns, subsets = axis.columns[start:stop], axis.subsets[start:stop]
        live = columns != PADDED
        lowest = int(columns[live].min(initial=size - 1))
        look = blake2b(np.where(live, columns - lowest, PADDED).tobytes())
        look.update(np.where(live, subsets, 0).tobytes())
        return (number, stop - start, look.digest()), lowest * math.prod(self._made.column_size[number + 1 :])

    def template(self, run: Run, dtype: npt.DTypeLike) -> Template:
        """Return what each tile of a run looks like, with columns of that dtype."""
        key = (np.dtype(dtype), *run.tile.pattern)  # a type and its dtype aren't equal keys
        with self._lock:
            if key not in self._templates:
                if len(self._templates) >= TEMPLATES:
                    self._templates.pop(next(iter(self._templates)))
                self._templates[key] = self._make_template(run.tile, dtype)
            return self._templates[key].of(run)

    def _make_template(self, tile: Tile, dtype: npt.DTypeLike) -> Template:
        positions = tile.stop - tile.start
        where = self._unravel(np.arange(tile.start, tile.stop))
        axes = len(self._made.slots)
        channels = self._made.column_channels
        subsets = math.prod(len(axis.members) for axis in self._made.slots)
        index = np.arange(channels, dtype=np.int64)
        # Index expressions over (positions, channels, slots of axis 0, slots of axis 1, ...), kept broadcastable.
        columns = (index * math.prod(self._made.column_size)).reshape(1, channels, *(1,) * axes)
        sources = (index * subsets).reshape(1, channels, *(1,) * axes)
        live = np.ones((1,) * (axes + 2), dtype=bool)
        column_step, source_step = math.prod(self._made.column_size), subsets
        counts = np.full(positions, channels, dtype=np.int64)
        for number, (axis, size, row) in enumerate(zip(self._made.slots, self._made.column_size, where, strict=True)):
            column_step //= size
            source_step //= len(axis.members)
            shape = [positions, 1, *(1,) * axes]
            shape[number + 2] = axis.columns.shape[1]
            columns = columns + (axis.columns[row] * column_step).reshape(shape)
            sources = sources + (axis.subsets[row] * source_step).reshape(shape)
            live = live & (axis.columns[row] != PADDED).reshape(shape)
            counts *= axis.counts[row]
        full = np.broadcast_shapes(columns.shape, live.shape, (positions, channels, *(1,) * axes))
        chosen = np.broadcast_to(live, full)
        flat_columns = np.broadcast_to(columns, full)[chosen] - tile.shift
        flat_sources = np.broadcast_to(sources, full)[chosen]
        if self._bias_column:
            ends = np.cumsum(counts)  # the bias goes behind the last entry of each row
            flat_columns = np.insert(flat_columns, ends, 0)
            flat_sources = np.insert(flat_sources, ends, channels * subsets)
            counts = counts + 1
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        return Template(starts, flat_columns.astype(dtype), flat_sources)
