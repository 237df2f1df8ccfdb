"""Layers one after the other and side by side, nested as one likes: the shape that fusions, recipes and records share.

What stands at the leaves differs: patterns in a recipe, names in a plan, named layers with their geometry in a record,
`Conv`s where the mathematics is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Generic, TypeAlias, TypeVar

from convtool.core.names import is_written
from convtool.errors import UsageError

BASE = ""  # the checkpoint itself, among several that layers come from


@dataclass(frozen=True, slots=True)
class LayerRef:
    """A layer by name.

    Attributes:
        name: of a layer of the checkpoint, or one without tensors ('avg_pool(2)').
        source: the other checkpoint that it is from.
        like: the layer whose stride, padding, dilation and padding mode it has, as far as none are stated of it.
        unplaced: nobody states that it runs right behind the layer before it in its chain.
    """

    name: str
    source: str = BASE
    like: str = ""
    unplaced: bool = field(default=False, compare=False)

    @property
    def written(self) -> bool:
        """Return whether it is a layer without tensors."""
        return is_written(self.name)

    def __str__(self) -> str:
        return f"{self.source}:{self.name}" if self.source else self.name


Leaf = TypeVar("Leaf")
Made = TypeVar("Made")
State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class Chain(Generic[Leaf]):
    """Parts applied one after the other, first to last."""

    parts: tuple[Tree[Leaf], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("expected at least one layer in a chain")


@dataclass(frozen=True, slots=True)
class Sum(Generic[Leaf]):
    """Parts applied to the same input, their outputs added."""

    parts: tuple[Tree[Leaf], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("expected at least one branch in a sum")


@dataclass(frozen=True, slots=True)
class Stack(Sum[Leaf]):
    """Parts applied to the same input, their outputs side by side along the channels.

    It is the sum of the parts, each placed among the channels, and becomes that once the parts' channels are known.
    """


Tree: TypeAlias = Leaf | Chain[Leaf] | Sum[Leaf]


def leaves(tree: Tree[Leaf]) -> Iterator[Leaf]:
    """Yield every leaf, in order."""
    if isinstance(tree, Chain | Sum):
        for part in tree.parts:
            yield from leaves(part)
    else:
        yield tree


def has_sum(tree: Tree[Leaf]) -> bool:
    """Return whether there are branches anywhere in it."""
    return isinstance(tree, Sum) or (isinstance(tree, Chain) and any(has_sum(part) for part in tree.parts))


def flat_parts(chain: Chain[Leaf]) -> Iterator[Leaf | Sum[Leaf]]:
    """Yield a chain's parts, chains directly inside of it spelled out, and a sum or chain of one part as that part."""
    for part in chain.parts:
        while isinstance(part, Sum) and len(part.parts) == 1:
            part = part.parts[0]
        if isinstance(part, Chain):
            yield from flat_parts(part)
        else:
            yield part


def first_leaves(tree: Tree[Leaf]) -> list[Leaf]:
    """Return the leaves that the tree's input goes into."""
    return fold(tree, lambda leaf: [leaf], lambda parts: parts[0], lambda parts: sum(parts, list[Leaf]()))


def walk(
    tree: Tree[Leaf],
    state: State,
    step: Callable[[Leaf, State], State],
    merge: Callable[[State, list[State]], State],
) -> State:
    """Carry a state through the tree, as an input goes through its layers, and return what comes out.

    Args:
        step: makes the state behind a leaf of the one before it.
        merge: makes the state behind a sum of the one before it and those behind its branches.
    """
    if isinstance(tree, Chain):
        return reduce(lambda at, part: walk(part, at, step, merge), tree.parts, state)
    if isinstance(tree, Sum):
        return merge(state, [walk(part, state, step, merge) for part in tree.parts])
    return step(tree, state)


def map_leaves(change: Callable[[Leaf], Tree[Made]], tree: Tree[Leaf]) -> Tree[Made]:
    """Return the tree with every leaf changed, into another leaf or a tree."""
    if isinstance(tree, Chain):
        return Chain(tuple(map_leaves(change, part) for part in tree.parts))
    if isinstance(tree, Sum):
        parts = tuple(map_leaves(change, part) for part in tree.parts)
        return Stack(parts) if isinstance(tree, Stack) else Sum(parts)
    return change(tree)


def chains(tree: Tree[Leaf]) -> list[list[Leaf]]:
    """Return the leaves that follow each other with nothing but leaves in between."""
    if isinstance(tree, Sum):
        return [run for part in tree.parts for run in chains(part)]
    if not isinstance(tree, Chain):
        return [[tree]]
    runs: list[list[Leaf]] = [[]]
    for part in tree.parts:
        if isinstance(part, Chain | Sum):
            runs += chains(part)
            runs.append([])
        else:
            runs[-1].append(part)
    return [run for run in runs if run]


def tree_text(tree: Tree[Leaf], name: Callable[[Leaf], str] = str) -> str:
    """Return the tree in words: 'a → ((b → c) + d)', → for then and + for added."""
    if not isinstance(tree, Chain | Sum):
        return name(tree)
    texts = [tree_text(part, name) for part in tree.parts]
    if isinstance(tree, Stack):
        return f"stack({', '.join(texts)})"
    joint = " → " if isinstance(tree, Chain) else " + "
    return joint.join(f"({text})" if " → " in text or " + " in text else text for text in texts)


def fold(
    tree: Tree[Leaf],
    leaf: Callable[[Leaf], Made],
    chain: Callable[[list[Made]], Made],
    total: Callable[[list[Made]], Made],
) -> Made:
    """Return the tree's value from the bottom up."""
    if isinstance(tree, Chain):
        return chain([fold(part, leaf, chain, total) for part in tree.parts])
    if isinstance(tree, Sum):
        return total([fold(part, leaf, chain, total) for part in tree.parts])
    return leaf(tree)


def sole_layer(tree: Tree[Leaf]) -> Leaf | None:
    """Return the layer that is all of the tree; None where there are several."""
    while isinstance(tree, Chain | Sum):
        if len(tree.parts) > 1:
            return None
        tree = tree.parts[0]
    return tree
