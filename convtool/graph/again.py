"""What a model's code goes on to do beside the one layer that takes the place of several."""

from __future__ import annotations

from collections.abc import Iterator

from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, first_leaves, leaves, sole_layer
from convtool.kinds.written import read_layer, undoing

BARE = LayerRef("identity()")  # a branch that is nothing but what the sum reads


def taken_off(tree: Tree[LayerRef], count: int) -> Sum[LayerRef]:
    """Return a tree less what it reads, so many times: the model's code goes on to add that to what takes its place."""
    return Sum((tree, Chain((BARE, LayerRef(f"scale({-count}.0)")))))


def takes_off(tree: Tree[LayerRef]) -> int:
    """Return how often `taken_off` took off what a tree reads; 0 where it didn't."""
    added = tree.parts[0] if isinstance(tree, Sum) else None
    inner = added.parts[0] if isinstance(added, Chain) else None
    count = inner.parts.count(BARE) if isinstance(inner, Sum) else 0
    return count if count and added is not None and tree == taken_off(added, count) else 0


def adds_again(tree: Tree[LayerRef], name: str) -> bool:
    """Tell whether the model's code would add what a sum reads once more, to what takes the place of one of its layers.

    Not so where that is taken off, and the layer stands in the sum.
    """
    if isinstance(tree, Sum) and takes_off(tree):
        chain = tree.parts[0]
        return not isinstance(chain, Chain) or name not in {leaf.name for leaf in leaves(chain.parts[0])}
    return _has_bare(tree)


def _has_bare(tree: Tree[LayerRef]) -> bool:
    if not isinstance(tree, Chain | Sum):
        return False
    bare = isinstance(tree, Sum) and any(sole_layer(part) == BARE for part in tree.parts)
    return bare or any(map(_has_bare, tree.parts))


# Where a layer without tensors is in a model, and whether it stands in front of all else, such that its code does it.
_CODE = {("model", False), ("model", True), ("input", False)}


def done_by_the_model(tree: Tree[LayerRef], in_front: bool | None = None) -> Iterator[str]:
    """Yield the layers without tensors that the model's forward does itself, in chains with layers of the model.

    An identity is none, and a normalisation of the whole input stands in front of the model.

    Args:
        in_front: whether the tree's first layers are those that the whole input goes into.
    """
    ours = any(ref.source == BASE and not ref.written for ref in leaves(tree))
    if in_front is None:
        in_front = len({ref.name for ref in first_leaves(tree)}) == 1
    done: list[tuple[str, str]] = []  # with the layer that undoes each; '' where none does
    for number, part in enumerate(() if isinstance(tree, LayerRef) else tree.parts):
        first = in_front and (number == 0 or not isinstance(tree, Chain))
        if not isinstance(part, LayerRef):
            yield from done_by_the_model(part, first)
        elif isinstance(tree, Chain) and ours and part.written:
            layer = read_layer(part.name)
            if (layer.kind.code, first) not in _CODE:
                continue
            undone = layer.kind.undone_by(layer.fields) is not None
            one = (part.name, undoing(part.name).name if undone else "")
            # What is undone further on in the chain was fused such that the model's code may go on to do it.
            if done and (done[-1][1] == one[0] or done[-1][0] == one[1]):
                done.pop()
            else:
                done.append(one)
    yield from (name for name, _ in done)
