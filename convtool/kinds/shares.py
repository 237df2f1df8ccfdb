"""Layers that several fusions share, each of which takes some of their channels.

What stands behind a concatenation stands behind each of the values in it: of a batch norm of cat([a(x), b(x)]) the
first channels go into a, the others into b. Each of the two is a chain of its own, such as
(a, place(0:32; of=64), norm, select(0:32)), and with both of them all of the norm is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias, TypeVar

from convtool.core.names import is_written
from convtool.core.tree import Chain, Sum, Tree, flat_parts, leaves
from convtool.kinds.kind import Kind
from convtool.kinds.moving import PLACE
from convtool.kinds.written import read_layer, undoing

Leaf = TypeVar("Leaf")
Owned: TypeAlias = "Callable[[Leaf], tuple[str, Kind] | None]"  # name and kind of a layer of the checkpoint itself


class Share(NamedTuple):
    """Channels from `start` up to `stop` of a layer that has `of`."""

    start: int
    stop: int
    of: int


def shares(tree: Tree[Leaf], owned: Owned[Leaf]) -> dict[str, Share]:
    """Return, for each layer of which a tree takes some channels only, which ones.

    Args:
        owned: returns name and kind of a layer of the checkpoint that is changed, None of any other.
    """
    return {name: share for _, _, share, names in _spans(_parts(tree), owned) for name in names}


def without_places(tree: Tree[Leaf], owned: Owned[Leaf]) -> Tree[Leaf]:
    """Return a tree with nothing around the layers of which it takes some channels: as if these were all of them."""
    parts = _parts(tree)
    gone = {number for start, stop, *_ in _spans(parts, owned) for number in (start, stop)}
    return Chain(tuple(part for number, part in enumerate(parts) if number not in gone)) if gone else tree


def _parts(tree: Tree[Leaf]) -> list[Leaf | Sum[Leaf]]:
    return list(flat_parts(tree)) if isinstance(tree, Chain) else []


def _spans(parts: Sequence[Leaf | Sum[Leaf]], owned: Owned[Leaf]) -> Iterator[tuple[int, int, Share, list[str]]]:
    """Yield where channels are placed and where they are selected again, these, and the layers in between."""
    texts = ["" if isinstance(part, Sum) else str(getattr(part, "name", "")) for part in parts]
    for start, text in enumerate(texts):
        layer = read_layer(text) if is_written(text) else None
        back = undoing(text).name if layer is not None and layer.kind is PLACE else ""
        if layer is None or not back or back not in texts[start:]:
            continue
        stop = texts.index(back, start)
        within = [None if isinstance(part, Sum) else owned(part) for part in parts[start + 1 : stop]]
        names = [one[0] for one in within if one is not None and one[1].per_channel]
        if len(names) == stop - start - 1:  # else outputs hang on other channels, too
            first, last = layer.fields["channels"]
            yield start, stop, Share(first, last or layer.fields["of"], layer.fields["of"]), names


def unshared(trees: Iterable[Tree[Leaf]], owned: Owned[Leaf]) -> Iterator[str]:
    """Yield the layers of which a tree takes some channels, and of whose channels not each goes into one tree."""
    taken: dict[str, list[Share | None]] = {}
    for tree in trees:
        some = shares(tree, owned)
        for one in map(owned, leaves(tree)):
            if one is not None:
                taken.setdefault(one[0], []).append(some.get(one[0]))
    return (name for name, claims in taken.items() if not _whole(claims))


def _whole(claims: Sequence[Share | None]) -> bool:
    some = sorted(one for one in claims if one is not None)
    if not some:
        return True
    joined = all(one.stop == other.start and one.of == other.of for one, other in pairwise(some))
    return len(some) == len(claims) and joined and some[0].start == 0 and some[-1].stop == some[-1].of
