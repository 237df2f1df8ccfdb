"""Nested dissection: in which order a symmetric sparse matrix over a grid is factored, and in which dense pieces.

The grid is cut in two by a layer of nodes that separates its halves, and so on; a separator is eliminated after what it
separates (George: Nested Dissection of a Regular Finite Element Mesh, 1973). What a piece leaves behind touches its
boundary alone: the nodes outside of it that it is connected with, all of them in separators around it. So a
factorisation is one of dense matrices, a front for each piece (Duff, Reid: The Multifrontal Solution of Indefinite
Sparse Symmetric Linear Equations, 1983), and takes about half of the work of one as a band, and less room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import scipy.sparse

Nodes: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Front:
    """A dense piece of a factorisation; its nodes go by their place in the order of elimination.

    Attributes:
        start, stop: the nodes that are eliminated here.
        boundary: those that are left, ascending; each is eliminated in a later front.
        children: earlier fronts, by number, whose boundaries become part of this one; each front is one's child.
    """

    start: int
    stop: int
    boundary: Nodes
    children: tuple[int, ...]

    @property
    def nodes(self) -> Nodes:
        """All of them, ascending."""
        return np.concatenate([np.arange(self.start, self.stop), self.boundary])

    @property
    def sizes(self) -> tuple[int, int]:
        """How many are eliminated, and how many are left."""
        return self.stop - self.start, len(self.boundary)


@dataclass(frozen=True, slots=True)
class Dissection:
    """The order of elimination, and the fronts in that order; children stand before their parents.

    Attributes:
        order: the node that is eliminated first, second, ...
        depth: of the tree of fronts.
    """

    order: Nodes
    fronts: tuple[Front, ...]
    depth: int

    def work(self, channels: int) -> int:
        """Multiply-adds of a factorisation in which each node stands for so many rows."""
        total = 0
        for here, left in (front.sizes for front in self.fronts):
            total += here**3 // 6 + here * here * left // 2 + here * left * left // 2
        return total * channels**3

    def kept(self, channels: int) -> int:
        """Numbers of a factor."""
        return sum(here * (here + left) for here, left in (front.sizes for front in self.fronts)) * channels**2

    def in_flight(self, channels: int) -> int:
        """Numbers that are needed at once, at most, besides the factor."""
        most, waiting = 0, dict[int, int]()
        for number, front in enumerate(self.fronts):
            here, left = front.sizes
            most = max(most, sum(waiting.values()) + 2 * (here + left) ** 2)  # a front, and what is made of it
            for child in front.children:
                del waiting[child]
            waiting[number] = left**2
        return most * channels**2


def dissect(connected: scipy.sparse.csr_array[Any], lengths: Sequence[int], least: int) -> Dissection:
    """How to factor a symmetric matrix with these nonzeros.

    Args:
        connected: (nodes, nodes), nonzero where two nodes are connected; nodes are the positions of a grid, row-major.
        lengths: of the grid.
        least: nodes of a piece that isn't cut any further.
    """
    places = np.indices(lengths).reshape(len(lengths), connected.shape[0])
    builder = _Builder(connected, places, max(1, least))
    root = builder.cut(np.arange(connected.shape[0]))
    assert len(builder.order) == connected.shape[0]
    assert not len(builder.boundaries[root])
    order = np.array(builder.order, dtype=np.int64)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    fronts = [
        Front(start, stop, np.sort(place[boundary]), children)
        for (start, stop), boundary, children in zip(builder.spans, builder.boundaries, builder.children, strict=True)
    ]
    return Dissection(order, tuple(fronts), builder.deepest)


class _Builder:
    def __init__(self, connected: scipy.sparse.csr_array[Any], places: Nodes, least: int) -> None:
        self._starts, self._neighbours = connected.indptr, connected.indices
        self._places = places
        self._least = least
        self._side = np.zeros(places.shape[1], dtype=np.int8)
        self._eliminated = np.zeros(places.shape[1], dtype=bool)
        self.order: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.boundaries: list[Nodes] = []
        self.children: list[tuple[int, ...]] = []
        self.deepest = 0

    def cut(self, nodes: Nodes, depth: int = 1) -> int:
        """Make the fronts of these nodes; the number of the last one."""
        self.deepest = max(self.deepest, depth)
        halves = self._halves(nodes) if len(nodes) > self._least else None
        if halves is None:
            return self._front(nodes, ())
        left, right, separator = halves
        return self._front(separator, (self.cut(left, depth + 1), self.cut(right, depth + 1)))

    def _front(self, nodes: Nodes, children: tuple[int, ...]) -> int:
        start = len(self.order)
        self.order += nodes.tolist()
        self.spans.append((start, len(self.order)))
        touched = np.unique(np.concatenate([self._around(nodes), *(self.boundaries[child] for child in children)]))
        self._eliminated[nodes] = True
        self.boundaries.append(touched[~self._eliminated[touched]])
        self.children.append(children)
        return len(self.spans) - 1

    def _around(self, nodes: Nodes) -> Nodes:
        """All neighbours of the nodes, some more than once."""
        counts = self._starts[nodes + 1] - self._starts[nodes]
        first = np.repeat(self._starts[nodes] - np.cumsum(counts) + counts, counts)
        around: Nodes = self._neighbours[first + np.arange(len(first))].astype(np.int64)
        return around

    def _halves(self, nodes: Nodes) -> tuple[Nodes, Nodes, Nodes] | None:
        """The nodes on both sides of a separator, and the separator, across the axis where it is smallest."""
        best = None
        for coordinate in self._places[:, nodes]:
            middle = np.sort(coordinate)[len(nodes) // 2]
            low = coordinate < middle
            if not low.any():
                continue
            self._side[nodes[~low]] = 1
            counts = self._starts[nodes + 1] - self._starts[nodes]
            reaching = np.zeros(len(nodes), dtype=bool)
            reaching[np.repeat(np.arange(len(nodes)), counts)[self._side[self._around(nodes)] == 1]] = True
            self._side[nodes] = 0
            separator = low & reaching
            left = low & ~separator
            if left.any() and (best is None or separator.sum() < len(best[2])):
                best = nodes[left], nodes[~low], nodes[separator]
        return best
