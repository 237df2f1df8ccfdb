"""Names of layers that stand together, in short: what they share is said once."""

from __future__ import annotations

from collections.abc import Sequence

from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves, map_leaves


def tree_in_short(tree: Tree[LayerRef]) -> str:
    """'layer1.0: conv1 + bn1' for a chain; '(a | b)' for a sum."""
    names = [leaf.name for leaf in leaves(tree) if not leaf.written]
    shared = _shared(names)
    text = _text(map_leaves(lambda leaf: LayerRef(leaf.name.removeprefix(shared)), tree))
    return f"{shared.removesuffix('.')}: {text}" if shared else text


def names_in_short(names: Sequence[str]) -> str:
    """'layer1.0: conv1, bn1'."""
    shared = _shared(names)
    text = ", ".join(name.removeprefix(shared) for name in names)
    return f"{shared.removesuffix('.')}: {text}" if shared else text


def _shared(names: Sequence[str]) -> str:
    """The path that all of the names begin with, its dot included."""
    split = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _text(tree: Tree[LayerRef]) -> str:
    if isinstance(tree, Chain):
        return " + ".join(_text(part) for part in tree.parts)
    if isinstance(tree, Sum):
        return f"({' | '.join(_text(part) for part in tree.parts)})"
    return tree.name
