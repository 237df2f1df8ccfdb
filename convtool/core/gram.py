"""T's Gram matrix on its shorter side, factored by nested dissection: for the ends of T's spectrum.

G = T* T, or T T* where T has fewer rows than columns: a sparse matrix over the positions, with a block of channels for
every two positions that meet in a tap, and one such matrix for each group. Its blocks are sums of a few products of the
kernel's own matrices, so neither T nor G is made; fronts are filled as they are factored (`core.dissection`).
Factoring G less a multiple of the identity tells whether all eigenvalues lie above that multiple (Sylvester), and a
factor of G serves inverse iteration.

That a factorisation succeeds in floating point is a proof once rounding is allowed for: what was factored is then a
matrix no further from the given one than u times a sum over the fronts, of |L| |L*| times the number of terms and
additions that an entry went through there (Higham: Accuracy and Stability of Numerical Algorithms, 10.1; Rump:
Verification of Positive Definiteness, 2006). Its norm is at most its largest row sum, which is added up on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.dissection import Dissection, Front, dissect
from convtool.core.operator import ConvOperator
from convtool.core.taps import PADDED, tap_table
from convtool.errors import UsageError

Numbers = npt.NDArray[Any]

FACTOR_BYTES = 6 << 30  # of a kept factor and what is in flight while it is made
EXACT_BYTES = 1 << 30  # of a factor that is kept in float64; a larger one is kept in float32
FACTOR_WORK = 1 << 40  # multiply-adds of a factorisation: half a minute or so on two cores, and a few are made
MEETINGS = 1 << 25  # pairs of taps that meet
LEAST = 256  # rows of a piece that isn't cut any further
PANEL = 1024  # columns of a product of which only the lower half is wanted
UNIT = 2.0**-53  # of rounding in float64


@dataclass(frozen=True, slots=True)
class _Meetings:
    """Which positions meet in which taps, by their place in the order of elimination: in each front's own numbers.

    A block of G is the sum of `products` over its meetings; blocks of a front are `starts[front]:starts[front + 1]`.
    """

    starts: Numbers  # (fronts + 1,)
    rows: Numbers  # (blocks,) in the front
    columns: Numbers
    firsts: Numbers  # (blocks + 1,) of each block's meetings
    products: Numbers  # (meetings,) which product of two taps' matrices


class Gram:
    """The Gram matrix of one layer at one input size; `gram` makes it where it fits.

    Attributes:
        size: of its sides, over all groups: min(rows, columns) of T.
        work: multiply-adds of a factorisation.
        kept_dtype: in which a factor is kept for solving.
        norm: at least its largest eigenvalue.
        rounding: a failed factorisation means that there is an eigenvalue less than this on the right side of 0.
    """

    def __init__(self, conv: Conv, input_size: Sequence[int], rows_short: bool, pieces: _Pieces) -> None:
        exact = Conv(conv.weight, None, conv.geometry).exact()
        groups = conv.geometry.groups
        weight = exact.weight.reshape(groups, conv.out_channels // groups, conv.in_channels // groups, -1)
        taps = weight.permute(3, 0, 1, 2)  # (taps, groups, C_out/groups, C_in/groups)
        left, right = (taps, taps.mH) if rows_short else (taps.mH, taps)
        products = left[:, None] @ right[None]  # (taps, taps, groups, channels, channels)
        self._products = products.flatten(0, 1)
        self._pieces = pieces
        self._groups, self._channels = groups, products.shape[-1]
        matrix = ConvOperator(exact, input_size)
        self.size = min(matrix.shape)
        self.work = pieces.dissection.work(self._channels) * groups
        numbers = pieces.dissection.kept(self._channels) * groups
        self.kept_dtype = products.dtype
        if numbers * products.dtype.itemsize > EXACT_BYTES:
            self.kept_dtype = torch.complex64 if products.is_complex() else torch.float32
        sizes = ConvOperator(Conv(exact.weight.abs(), None, conv.geometry), input_size)
        ones = (torch.ones(count, 1, dtype=torch.float64) for count in reversed(matrix.shape))
        self.norm = float(sizes.apply(next(ones)).max()) * float(sizes.adjoint(next(ones)).max())
        # An entry is a sum over the taps that meet in it, and over channels.
        terms = int(np.diff(pieces.meetings.firsts).max(initial=0)) * max(weight.shape[1:3])
        self._of_complex = 4 if products.is_complex() else 1
        self._formed = (terms + 16) * UNIT * self.norm * self._of_complex
        longest = max(front.sizes[0] for front in pieces.dissection.fronts) * self._channels
        # |L| |L*| has the trace of what is factored.
        of_factor = (longest + self._additions) * UNIT * 2 * self.norm * (self.size // groups) * self._of_complex
        self.rounding = 2 * (self._formed + of_factor)

    @property
    def _additions(self) -> int:
        """How many additions, besides those within a front, an entry goes through."""
        return 8 * self._pieces.dissection.depth + 16

    def factor(self, shift: float, sign: int = 1, *, keep: torch.dtype | None = None) -> Factor | None:
        """The Cholesky factor of sign * (G - shift), or None where that isn't positive definite.

        Args:
            keep: keep it to solve with, computed and kept in this dtype; else what it proves is all that is left of it.
        """
        dtype = self._products.dtype if keep is None else keep
        products = (self._products if sign > 0 else -self._products).to(dtype)
        fronts = self._pieces.dissection.fronts
        waiting: dict[int, Tensor] = {}
        kept: list[tuple[Tensor, Tensor]] = []
        sums = torch.zeros(self._groups, self.size // self._groups, dtype=torch.float64)  # of rows of |L| |L*|, weighed
        for number, front in enumerate(fronts):
            matrix = self._filled(number, front, products, sign * shift)
            for child in front.children:
                if child in waiting:
                    self._add(matrix, front, fronts[child], waiting.pop(child))
            here = front.sizes[0] * self._channels
            upper, info = torch.linalg.cholesky_ex(matrix[:, :here, :here])
            if bool(info.any()):
                return None
            below = torch.linalg.solve_triangular(upper, matrix[:, here:, :here].mH, upper=False).mH.contiguous()
            self._weigh(sums, front, upper, below)
            if front.sizes[1]:
                waiting[number] = matrix[:, here:, here:].clone()
                del matrix
                _less_square(waiting[number], below)
            if keep is not None:
                kept.append((upper, below))
        of_factor = UNIT * float(sums.max()) * self._of_complex
        rounding = self._formed + UNIT * (self.norm + abs(shift)) + of_factor
        return Factor(self._pieces.dissection, kept, self._groups, self._channels, rounding)

    def _filled(self, number: int, front: Front, products: Tensor, shift: float) -> Tensor:
        """(groups, rows, rows): G less the shift, where a node that is eliminated in the front meets one of its own."""
        meetings, (here, left) = self._pieces.meetings, front.sizes
        blocks = slice(int(meetings.starts[number]), int(meetings.starts[number + 1]))
        firsts = meetings.firsts[blocks.start : blocks.stop + 1]
        which = torch.from_numpy(meetings.products[firsts[0] : firsts[-1]])
        place = torch.from_numpy(np.repeat(np.arange(len(firsts) - 1), np.diff(firsts)))
        values = torch.zeros(len(firsts) - 1, *products.shape[1:], dtype=products.dtype)
        for start in range(0, len(which), PANEL):
            part = slice(start, start + PANEL)
            values.index_add_(0, place[part], products[which[part]])
        matrix = torch.zeros(self._groups, here + left, self._channels, here + left, self._channels, dtype=values.dtype)
        rows, columns = (torch.from_numpy(part[blocks]) for part in (meetings.rows, meetings.columns))
        matrix.permute(1, 3, 0, 2, 4)[rows, columns] = values
        matrix = matrix.flatten(3, 4).flatten(1, 2)
        matrix.diagonal(dim1=1, dim2=2)[:, : here * self._channels] -= shift
        return matrix

    def _add(self, matrix: Tensor, front: Front, child: Front, rest: Tensor) -> None:
        """What a child left behind, where its nodes stand here."""
        nodes = torch.from_numpy(np.searchsorted(front.nodes, child.boundary))
        rows = (nodes[:, None] * self._channels + torch.arange(self._channels)).flatten()
        for start in range(0, len(rows), PANEL):  # below the diagonal; the nodes are in the same order in both
            part = slice(start, start + PANEL)
            matrix[:, rows[start:, None], rows[part]] += rest[:, start:, part]

    def _weigh(self, sums: Tensor, front: Front, upper: Tensor, below: Tensor) -> None:
        magnitudes = upper.tril().abs(), below.abs()
        across = (magnitudes[0].sum(1) + magnitudes[1].sum(1))[..., None]
        weight = upper.shape[-1] + self._additions
        rows = [(part @ across)[..., 0].double() for part in magnitudes]
        nodes = torch.from_numpy(front.nodes)
        place = (nodes[:, None] * self._channels + torch.arange(self._channels)).flatten()
        sums.index_add_(1, place, weight * torch.cat(rows, 1))


class Factor:
    """A Cholesky factor of a `Gram` less a multiple of the identity.

    Attributes:
        rounding: an eigenvalue of what was to be factored is at least minus this, if that was in float64.
    """

    def __init__(
        self,
        dissection: Dissection,
        kept: Sequence[tuple[Tensor, Tensor]],
        groups: int,
        channels: int,
        rounding: float,
    ) -> None:
        self._dissection = dissection
        self._kept = kept
        self._groups, self._channels = groups, channels
        self.rounding = rounding

    def solve(self, right: Tensor) -> Tensor:
        """The solution of what was factored, which has to be kept, against (size, n)."""
        order = torch.from_numpy(self._dissection.order)
        by_position = right.reshape(self._groups, self._channels, len(order), -1)
        x = by_position[:, :, order].transpose(1, 2).to(self._kept[0][0].dtype).flatten(1, 2).contiguous()
        places = [self._rows(front) for front in self._dissection.fronts]
        for (upper, below), (here, left) in zip(self._kept, places, strict=True):
            x[:, here] = torch.linalg.solve_triangular(upper, x[:, here], upper=False)
            x[:, left] -= below @ x[:, here]
        for (upper, below), (here, left) in zip(reversed(self._kept), reversed(places), strict=True):
            rest = x[:, here] - below.mH @ x[:, left]
            x[:, here] = torch.linalg.solve_triangular(upper.mH, rest, upper=True)
        out = torch.empty(by_position.shape, dtype=right.dtype)
        out[:, :, order] = x.unflatten(1, (len(order), self._channels)).transpose(1, 2).to(right.dtype)
        return out.reshape(right.shape)

    def _rows(self, front: Front) -> tuple[slice, Tensor]:
        left = (torch.from_numpy(front.boundary)[:, None] * self._channels + torch.arange(self._channels)).flatten()
        return slice(front.start * self._channels, front.stop * self._channels), left


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The positions of a Gram matrix, cut into pieces."""

    dissection: Dissection
    meetings: _Meetings


def gram(conv: Conv, input_size: Sequence[int]) -> Gram | None:
    """The Gram matrix of a layer, or None where it is too large to factor; needs scipy."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UsageError("singular values of a layer this large need scipy: pip install 'convtool[scipy]'") from None
    output_size, groups = conv.output_size(input_size), conv.geometry.groups
    rows_short = conv.out_channels * math.prod(output_size) < conv.in_channels * math.prod(input_size)
    channels = (conv.out_channels if rows_short else conv.in_channels) // groups
    lengths = output_size if rows_short else tuple(input_size)
    item = 16 if conv.weight.is_complex() else 8
    taps = math.prod(conv.geometry.kernel_size)
    if math.prod(lengths) * channels**2 * item * groups > FACTOR_BYTES or taps**2 * channels**2 * groups > MEETINGS:
        return None
    table, partners = _readings(conv, input_size, rows_short)
    if table.shape[0] * table.shape[1] ** 2 > MEETINGS:
        return None
    pieces = _pieces(table, partners, taps, lengths, max(1, LEAST // channels))
    needed = pieces.dissection.work(channels) * groups
    in_flight, kept = (one(channels) * groups for one in (pieces.dissection.in_flight, pieces.dissection.kept))
    most = max(in_flight * item, (in_flight + kept) * item // (1 if kept * item <= EXACT_BYTES else 2))
    if needed > FACTOR_WORK or most > FACTOR_BYTES:
        return None
    return Gram(conv, input_size, rows_short, pieces)


def _readings(conv: Conv, input_size: Sequence[int], rows_short: bool) -> tuple[Numbers, Numbers]:
    """What meets: for each input position the outputs that read it (for each output what it reads, if not rows_short).

    Returns:
        (meeting places, most at one of them) positions and, alike, the taps; -1 where there are fewer.
    """
    position, live = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
    for axis, size in zip(conv.geometry.axes, input_size, strict=True):
        table = tap_table(axis, size)  # (outputs, taps)
        position = (position[:, None, :, None] * size + table[None, :, None, :]).reshape(
            position.shape[0] * table.shape[0], position.shape[1] * table.shape[1]
        )
        live = (live[:, None, :, None] & (table != PADDED)[None, :, None, :]).reshape(position.shape)
    taps = np.broadcast_to(np.arange(position.shape[1]), position.shape)
    if not rows_short:
        return np.where(live, position, -1), np.where(live, taps, -1)
    outputs, tap = np.nonzero(live)
    source = position[outputs, tap]
    order = np.argsort(source, kind="stable")
    source, outputs, tap = source[order], outputs[order], tap[order]
    counts = np.bincount(source, minlength=math.prod(input_size))
    rank = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(counts), max(1, int(counts.max(initial=0))))
    who, how = np.full(shape, -1), np.full(shape, -1)
    who[source, rank], how[source, rank] = outputs, tap
    return who, how


def _pieces(who: Numbers, how: Numbers, taps: int, lengths: Sequence[int], least: int) -> _Pieces:
    import scipy.sparse

    count = math.prod(lengths)
    row = np.broadcast_to(who[:, :, None], (*who.shape, who.shape[1]))
    column = np.broadcast_to(who[:, None, :], row.shape)
    both = (row >= 0) & (column >= 0)
    product = (how[:, :, None] * taps + how[:, None, :])[both]
    row, column = row[both], column[both]
    ones = np.ones(len(row), dtype=np.int8)
    connected = scipy.sparse.csr_array((ones, (row, column)), shape=(count, count)) + scipy.sparse.eye_array(count)
    dissection = dissect(connected.tocsr(), lengths, least)
    place = np.empty(count, dtype=np.int64)
    place[dissection.order] = np.arange(count)
    row, column = place[row], place[column]
    lower = row >= column
    row, column, product = row[lower], column[lower], product[lower]
    order = np.lexsort((row, column))  # by fronts, since these are in the order of columns
    row, column, product = row[order], column[order], product[order]
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    firsts = np.append(np.nonzero(new)[0], len(row))
    row, column = row[new], column[new]
    stops = np.array([front.stop for front in dissection.fronts])
    starts = np.append(0, np.searchsorted(column, stops))
    for number, front in enumerate(dissection.fronts):
        part = slice(starts[number], starts[number + 1])
        row[part] = np.searchsorted(front.nodes, row[part])
        column[part] -= front.start
    return _Pieces(dissection, _Meetings(starts, row, column, firsts, product))


def _less_square(matrix: Tensor, factor: Tensor) -> None:
    """Subtract factor @ factor*, below the diagonal."""
    for start in range(0, matrix.shape[-1], PANEL):
        part = slice(start, start + PANEL)
        matrix[:, start:, part] -= factor[:, start:] @ factor[:, part].mH
