"""Stretches cut into pieces that one layer each takes the place of, as cheaply as it goes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import ConvtoolError, RefusedError
from convtool.graph.again import adds_again, done_by_the_model, taken_off, takes_off
from convtool.graph.flow import LeftAlone, find_stretches
from convtool.graph.judge import Exact, Judge, Merge
from convtool.kinds.shares import shares, unshared
from convtool.kinds.written import read_layer, undoing

Price: TypeAlias = tuple[float, ...]  # compared from the first number on, and added number by number


MOST_BRANCHES = 6  # of a sum all of whose parts are tried


def cut(
    judge: Judge,
    *,
    fixed_size: bool,
    cheaper: bool,
    batch_norms_only: bool = False,
    rehearse: Callable[[Sequence[Merge]], dict[Tree[LayerRef], str]] = lambda merges: {},
) -> tuple[list[Merge], list[LeftAlone]]:
    """Return what to make one layer of in a run, in order; and what stays apart though nothing is in between, and why.

    Args:
        fixed_size: also take what is exact for inputs of the run's size only.
        cheaper: cut so that it takes the least work; otherwise into the fewest layers.
        batch_norms_only: take nothing but batch norms into the layers beside them.
        rehearse: returns what the model can't do without, with the reason; parts of it may still be one layer.
    """
    trees, left_alone = find_stretches(judge.flow)
    cutter = _Cutter(judge, fixed_size, cheaper, batch_norms_only)
    while True:
        cutter.left_alone.clear()
        merges = [merge for tree in trees for merge in cutter.cut(tree)[1]]
        wrong = _wrongly_shared(merges, judge) or rehearse(merges)
        if not wrong:
            shared = {name for merge in merges for name in shares(merge.tree, judge.owned)}
            return merges, [one for one in left_alone + cutter.left_alone if shared.isdisjoint(one.layers)]
        cutter.refused |= wrong


def _wrongly_shared(merges: Sequence[Merge], judge: Judge) -> dict[Tree[LayerRef], str]:
    """Return the merges without which each layer goes into one of them, or each of its channels does; with reasons."""
    wrong: dict[Tree[LayerRef], str] = {}
    for name in unshared((merge.tree for merge in merges), judge.owned):
        having = [merge.tree for merge in merges if any(leaf.name == name for leaf in leaves(merge.tree))]
        some = [tree for tree in having if name in shares(tree, judge.owned)]
        if any(unshared(some, judge.owned)):
            wrong |= dict.fromkeys(some, f"not everything that is put side by side before {name} could take it in")
        else:
            wrong |= {tree: f"{name} goes into the layers before it" for tree in having if tree not in some}
    return wrong


@dataclass(slots=True)
class _Cutter:
    judge: Judge
    fixed_size: bool
    cheaper: bool
    batch_norms_only: bool
    refused: dict[Tree[LayerRef], str] = field(default_factory=dict)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def cut(self, tree: Tree[LayerRef]) -> tuple[Price, list[Merge]]:
        """Return the price of the cheapest way to run a tree, and what of it is merged for that."""
        if isinstance(tree, Sum):
            return self._cut_less_input(tree) if takes_off(tree) else self._cut_sum(tree)
        if isinstance(tree, Chain):
            return self._cut_chain(tree.parts)
        return (0.0, 0.0, 0.0) if tree.written else self._price(self.judge.price(tree.name)), []

    def _cut_sum(self, tree: Sum[LayerRef]) -> tuple[Price, list[Merge]]:
        apart = [self.cut(part) for part in tree.parts]
        best = _total(apart)
        count = len(tree.parts)
        for some in itertools.combinations(range(count), count) if count > MOST_BRANCHES else _parts_of(count):
            try:
                whole = self._merge(Sum(tuple(tree.parts[number] for number in some)))
            except ConvtoolError:
                continue
            others = [apart[number] for number in range(count) if number not in some]
            best = min(best, _total([(self._priced(whole), [whole]), *others]), key=lambda one: one[0])
            if len(some) == count and self._priced(whole) <= max(price for price, _ in apart):
                break  # whatever else has the dearest branch in it takes as much
        if not any(isinstance(merge.tree, Sum) and len(merge.tree.parts) == count for merge in best[1]):
            self._leave(tree)
        return best

    def _cut_less_input(self, tree: Sum[LayerRef]) -> tuple[Price, list[Merge]]:
        """Cut what follows a sum to which the model's code adds what the branches read."""
        count, (chain, *_) = takes_off(tree), tree.parts
        assert isinstance(chain, Chain)
        first, *others = chain.parts
        assert isinstance(first, Sum)
        branches = first.parts[:-count]
        alone = branches[0] if len(branches) == 1 else Sum(branches)
        best = _total([self.cut(alone), self._cut_chain(others)])
        for stop in range(1, len(others) + 1):
            try:
                whole = self._merge(taken_off(self._chain([first, *others[:stop]]), count))
            except ConvtoolError:
                continue
            if adds_again(whole.tree, whole.name):
                continue  # in place of what follows the sum, nothing would be added to what it gives
            rest = [self._cut_chain(others[stop:])] if others[stop:] else []
            price, merges = _total([(self._priced(whole), [whole]), *rest])
            best = (price, merges) if price < best[0] else best
        if not any(takes_off(merge.tree) for merge in best[1]):
            self._leave(tree)
        return best

    def _cut_chain(self, parts: Sequence[Tree[LayerRef]]) -> tuple[Price, list[Merge]]:
        alone = [self.cut(part) for part in parts]
        found: dict[tuple[int, int], Merge] = {}

        def price(start: int, stop: int) -> Price | None:
            if stop - start == 1:
                return alone[start][0]
            # At an end of a chain, what has no tensors can as well stay in the model's code, where it is.
            if _is_written(parts[start]) or _is_written(parts[stop - 1]):
                return None
            try:
                merge = found[start, stop] = self._merge(self._chain(parts[start:stop]))
            except ConvtoolError:
                return None
            return self._priced(merge)

        total, cuts = partition(len(parts), price)
        # A written layer alone between two cuts is nothing that anybody expects to be merged.
        solid = [cut for cut in cuts if not (cut[1] - cut[0] == 1 and _is_written(parts[cut[0]]))]
        for (start, _), (_, stop) in itertools.pairwise(solid):
            self._leave(Chain(tuple(parts[start:stop])))
        return total, [merge for cut in cuts for merge in ([found[cut]] if cut in found else alone[cut[0]][1])]

    def _chain(self, parts: Sequence[Tree[LayerRef]]) -> Tree[LayerRef]:
        """Return parts as a chain that a layer can stand for while the model's code does what it did.

        The layer stands in the place of the first convolution or linear layer: what the code does in front of that has
        to be undone in front of the layer, and what it does behind that, behind the layer. What can't be undone is left
        as it is, and `_merge` refuses it.
        """
        added: tuple[list[Tree[LayerRef]], list[Tree[LayerRef]]] = [], []
        behind = False
        for part in parts:
            layer = read_layer(part.name) if isinstance(part, LayerRef) and part.written else None
            if layer is not None and layer.kind.code == "model":
                undone = layer.kind.undone_by(layer.fields) is not None
                added[behind][:0] = [LayerRef(undoing(layer.name).name)] if undone else []
            behind = behind or any(self.judge.layer(leaf.name).kind.main for leaf in leaves(part))
        return Chain((*added[0], *parts, *added[1]))

    def _merge(self, tree: Tree[LayerRef]) -> Merge:
        """Return the tree as one layer; an error says why it cannot be one."""
        for name in (leaf.name for leaf in leaves(tree) if not leaf.written):
            if set(name) & set("{}*?!@:()[]"):
                raise RefusedError(f"{name!r} has a sign in it that means something else in recipes")
        if tree in self.refused:
            raise RefusedError(self.refused[tree])
        if self.batch_norms_only and not _takes_batch_norms(self.judge, tree):
            raise RefusedError("only batch norms are to be fused (--batch-norms-only)")
        if again := next(done_by_the_model(tree), ""):
            raise RefusedError(f"{again} in it is done by the model's own code, which goes on to do it")
        merge = self.judge.merge(tree)
        if merge.exact is Exact.THIS_SIZE and not self.fixed_size:
            raise RefusedError("it would be exact for this input size only (--fixed-size takes it)")
        return merge

    def _leave(self, tree: Tree[LayerRef]) -> None:
        """Say why a tree isn't one layer."""
        try:
            merge = self._merge(self._chain(tree.parts) if isinstance(tree, Chain) else tree)
            before, after = f"{merge.before.multiply_adds} multiply-adds", f"{merge.after.multiply_adds}"
            if merge.seconds is not None:
                before, after = (f"{seconds * 1e3:.3g} ms" for seconds in merge.seconds)
            reason = f"it would cost more: {before} apart, {after} as one"
        except ConvtoolError as error:
            reason = str(error)
        self.left_alone.append(LeftAlone.of(tree, reason))

    def _priced(self, merge: Merge) -> Price:
        """Return the price of a merge: a batch norm that can go either way goes into the layer before it."""
        kinds = [self.judge.layer(leaf.name).kind for leaf in leaves(merge.tree)]
        early = sum(kind.spare for kind in itertools.takewhile(lambda kind: not kind.main, kinds))
        return self._price(float(merge.after.multiply_adds) if merge.seconds is None else merge.seconds[1], early)

    def _price(self, work: float, early: int = 0) -> Price:
        """Return the price of one layer that takes so much work, with batch norms in it that were before it."""
        return (*((work, 1.0) if self.cheaper else (1.0, work)), float(early))


def _takes_batch_norms(judge: Judge, tree: Tree[LayerRef]) -> bool:
    """Return whether a tree is one layer and batch norms that go into it."""
    kinds = [judge.layer(leaf.name).kind for leaf in leaves(tree) if not leaf.written]
    return sum(kind.main for kind in kinds) == 1 and all(kind.main or kind.spare for kind in kinds)


def _parts_of(count: int) -> Iterator[tuple[int, ...]]:
    """Yield the choices of two or more among so many, the largest first."""
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in range(count, 1, -1))


def _total(found: Sequence[tuple[Price, list[Merge]]]) -> tuple[Price, list[Merge]]:
    prices = tuple(map(sum, zip(*(price for price, _ in found), strict=True)))
    return prices, [merge for _, merges in found for merge in merges]


def _is_written(part: Tree[LayerRef]) -> bool:
    return isinstance(part, LayerRef) and part.written


def partition(count: int, cost: Callable[[int, int], Price | None]) -> tuple[Price, list[tuple[int, int]]]:
    """Return the cheapest partition of positions 0 ... count-1 into consecutive pieces.

    Args:
        count: of positions, at least 1.
        cost: of the piece from `start` up to but without `stop`; None where there can be no such piece. A piece of one
            position always has a cost.

    Returns:
        The total and the pieces (start, stop) in order. Of equally cheap partitions the one with the longest last
        pieces.
    """
    best: list[tuple[Price, list[tuple[int, int]]]] = [((), [])]
    for stop in range(1, count + 1):
        prices = [(start, price) for start in range(stop) if (price := cost(start, stop)) is not None]
        total, start = min((_added(best[start][0], price), start) for start, price in prices)
        best.append((total, [*best[start][1], (start, stop)]))
    return best[count]


def _added(total: Price, price: Price) -> Price:
    return tuple(map(operator.add, total, price)) if total else price
