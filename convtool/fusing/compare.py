"""Two checkpoints held against each other: which fusions part them, and whether all the rest is the same."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce

from convtool.checkpoint import Checkpoint, TensorInfo
from convtool.checkpoint.cast import cast_piece
from convtool.checkpoint.digests import digests_of
from convtool.checkpoint.record import field_source
from convtool.checkpoint.spelled import Path
from convtool.core.conv import Conv
from convtool.core.expression import (
    Expression,
    alike_size,
    fused_geometry,
    in_channels,
    joined,
    output_size,
    split_input_size,
    widest_layer,
)
from convtool.core.fields import geometry_fields
from convtool.core.geometry import LARGEST, format_sizes
from convtool.core.tree import BASE, Chain, LayerRef, Tree, leaves, map_leaves, walk
from convtool.core.verify import LARGEST_INPUT
from convtool.errors import InputError, RefusedError, UsageError
from convtool.formats.pieces import same_bytes
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree
from convtool.fusing.settle import settle
from convtool.kinds.shares import unshared
from convtool.kinds.stated import FieldSource, FieldSources


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """A chain of BEFORE and the chain of AFTER that stands for it.

    Attributes:
        name: of the fused layer.
        before, after: the lowered layers, in chains and sums.
        sizes: the parts of BEFORE that were fused for one input size only, with that size; of their own inputs.
        dtypes: in which parts of it were stored before they were fused further, one for each time.
        path: of AFTER, whose record says so.
        dtype: that AFTER's layer is stored in, as it records; '' where it doesn't.
        claims: what the record says of the layers that no tensor of BEFORE does, (layer, what).
        takes, gives: the digests that the record has of the tensors on either side, by name as it writes them.
    """

    name: str
    before: Tree[LoweredLayer]
    after: Tree[LoweredLayer]
    sizes: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    dtypes: tuple[str, ...] = ()
    path: str = ""
    dtype: str = ""
    claims: tuple[tuple[str, str], ...] = ()
    takes: Mapping[str, str] = field(default_factory=dict)
    gives: Mapping[str, str] = field(default_factory=dict)

    def input_size(self) -> tuple[int, ...] | None:
        """Return the input size at which all parts get the ones that they were fused for; None where any will do.

        Raises:
            InputError: there is none; or the layers don't run on it, or it is too large to run here.
        """
        tree: Expression = map_leaves(lambda layer: layer.conv, self.before)
        axes = next(leaves(tree)).spatial_axes
        if not axes or not self.sizes:
            return None
        where = f"{self.path}: its record says that {self.name} was fused for input size"
        said = " and ".join(dict.fromkeys(format_sizes(size) for _, size in self.sizes))
        try:
            parts = [_part(tree, path, size) for path, size in self.sizes]
            smallest = tuple(max(_least(layers, axis, size) for layers, size in parts) for axis in range(axes))
            if any(_gives(layers, axis, smallest[axis]) != n for layers, size in parts for axis, n in enumerate(size)):
                raise InputError(
                    f"{where} {said}, one of them a part of it, and at no one input size are all of these exact; give"
                    " --input-size to compare at one of your own"
                )
            output_size(tree, smallest)
        except UsageError as error:
            raise InputError(f"{where} {said}, which doesn't fit its layers: {error}") from None
        if widest_layer(tree, alike_size((tree,), smallest)) > LARGEST_INPUT:
            raise InputError(
                f"{where} {said}, which is too large to run here; give a smaller --input-size to compare at"
            )
        return smallest


def _part(tree: Expression, path: Path, size: Sequence[int]) -> tuple[list[Expression], tuple[int, ...]]:
    """Return what the input of a tree's part at `path` went through, and its spatial size as given for that part."""
    before: list[Expression] = []
    for number in path:
        if isinstance(tree, Conv):
            raise UsageError("there is no such part")
        before += tree.parts[:number] if isinstance(tree, Chain) else ()
        tree = tree.parts[number]
    return before, split_input_size(size, in_channels(tree), next(leaves(tree)).spatial_axes)


def _least(layers: Sequence[Expression], axis: int, size: Sequence[int]) -> int:
    """Return the smallest input size of an axis with which the layers give at least that; sizes grow with sizes."""
    return bisect_left(range(LARGEST), size[axis], lo=1, key=lambda tried: _gives(layers, axis, tried))


def _gives(layers: Sequence[Expression], axis: int, size: int) -> int:
    """Return the output size of an axis; 0 where the input is too small."""

    def step(conv: Conv, at: int) -> int:
        return conv.geometry.axes[axis].output_size(at)

    with suppress(UsageError):
        return reduce(lambda at, layer: walk(layer, at, step, lambda _, sizes: sizes[0]), layers, size)
    return 0


def named_pairing(
    before: Checkpoint,
    after: Checkpoint,
    first: Sequence[str],
    second: Sequence[str],
    sources: tuple[FieldSources, FieldSources],
) -> Pairing:
    """Return the pairing of two chains of layers by name.

    Args:
        first, second: the chains in BEFORE and in AFTER.
        sources: fields of the layers in either.

    Raises:
        UsageError: names, fields or channels that don't fit.
    """
    lowered = lower_tree({BASE: before}, Chain(tuple(map(LayerRef, first))), sources[0])
    (chain,) = settle([lowered], {BASE: before}, sources[0].assume)
    return Pairing(",".join(second), chain, standing(second, chain, after, sources[1]))


def standing(
    names: Sequence[str], before: Tree[LoweredLayer], after: Checkpoint, sources: FieldSources
) -> Tree[LoweredLayer]:
    """Return the layers of AFTER that stand for those of BEFORE; what nobody states of them follows from the latter."""
    first = next(leaves(before)).conv
    if len(names) > 1:  # each is what BEFORE's of its name is, as far as nobody says otherwise
        said = sources.with_first(field_source(after))
        alike = {
            leaf.name: {
                key: value
                for key, value in leaf.fields.items()
                if key not in said.fields(leaf.name) and key in after.part(leaf.name).kind.settable
            }
            for leaf in leaves(before)
            if leaf.name in names
        }
        sources = sources.with_first(FieldSource("BEFORE", alike, exact_names=True))
    stands: Tree[LoweredLayer] = lower_tree(
        {BASE: after},
        Chain(tuple(map(LayerRef, names))),
        sources,
        axes=first.spatial_axes,
        channels=first.in_channels,
        channels_from="the chain in BEFORE",
    )
    (settled,) = settle([like_fused(stands, before)], {BASE: after}, sources.assume)
    return settled


def like_fused(stands: Tree[LoweredLayer], before: Tree[LoweredLayer]) -> Tree[LoweredLayer]:
    """Return AFTER's layers, what is open of the one with a geometry being what one layer in place of BEFORE's has."""
    opened = [leaf for leaf in leaves(stands) if leaf.conv.spatial_axes and any(leaf.open.values())]
    if len(opened) != 1:
        return stands
    try:
        fused = fused_geometry(map_leaves(lambda leaf: leaf.conv, joined(before)))
    except RefusedError:
        return stands  # no single layer has that form
    fields, (known,) = geometry_fields(fused), opened
    for name in [name for name, values in known.open.items() if values and name in fields]:
        known = known.with_field(name, fields[name])
    return map_leaves(lambda leaf: known if leaf is opened[0] else leaf, stands)


def unfitting(
    pairings: Sequence[Pairing], checkpoints: Mapping[str, Checkpoint], after: Checkpoint, rounded_to: str = ""
) -> dict[str, str]:
    """Return the tensors whose digests aren't those that AFTER records, BEFORE's with before: in front, -> 'digest'.

    Args:
        checkpoints: BEFORE and others, by the origin that the layers name.
        rounded_to: a dtype that those of AFTER may have been rounded to since.

    Raises:
        InputError: the record has no digest of a tensor that went into a fusion.
    """
    found: dict[str, str] = {}
    for pairing in (pairing for pairing in pairings if pairing.path):
        for leaf in leaves(pairing.before):
            for name, digest in digests_of(checkpoints[leaf.origin], leaf.layer.tensor_names(), leaf.origin).items():
                if name not in pairing.takes:
                    raise InputError(f"{pairing.path}: its convtool record is damaged: it has no digest of {name}")
                if pairing.takes[name] != digest:
                    found[f"before:{name}"] = "digest"
        stored = {info.name: info.dtype for leaf in leaves(pairing.after) for info in leaf.layer.stored()}
        recast = {name for name, dtype in stored.items() if dtype == rounded_to != pairing.dtype}
        digests = digests_of(after, stored.keys() - recast)
        found |= {name: "digest" for name in pairing.gives.keys() - recast if digests.get(name) != pairing.gives[name]}
        found |= dict.fromkeys(digests.keys() - pairing.gives.keys(), "digest")
    return found


def untouched(before: Checkpoint, pairings: Sequence[Pairing]) -> list[TensorInfo]:
    """Return the tensors of BEFORE that no pairing accounts for, or not all of whose channels."""
    trees = [pairing.before for pairing in pairings]
    in_part = set(unshared(trees, LoweredLayer.owned))
    found = {leaf for tree in trees for leaf in leaves(tree) if leaf.origin == BASE and leaf.name not in in_part}
    used = {name for leaf in found for name in leaf.layer.tensor_names()}
    return [info for name, info in before.infos.items() if name not in used]


def differing_tensors(
    before: Checkpoint,
    after: Checkpoint,
    pairings: Sequence[Pairing],
    progress: Callable[[int], None] = lambda count: None,
    rounded_to: str = "",
) -> dict[str, str]:
    """Tensors that no pairing accounts for and that aren't the same: name -> 'changed', 'missing', 'new', or
    'dtype' of a fused one that isn't stored as recorded.

    Args:
        rounded_to: a dtype that AFTER's may be rounded to.
        progress: called with the number of bytes of BEFORE that were compared since the last call.
    """
    made = {key for pairing in pairings for lowered in leaves(pairing.after) for key in lowered.layer.tensor_names()}
    differing = {}
    kept = {info.name: info.nbytes for info in untouched(before, pairings)}
    for name, size in kept.items():
        if name not in after.infos:
            differing[name] = "missing"
        elif not same_numbers(before, after, name, rounded_to):
            differing[name] = "changed"
        progress(size)
    for name in after.infos.keys() - made - kept.keys():
        differing[name] = "new"
    for pairing in pairings:
        for leaf in leaves(pairing.after) if pairing.dtype else ():
            for info in leaf.layer.stored():
                if info.dtype not in (pairing.dtype, rounded_to):
                    differing[info.name] = "dtype"
    return dict(sorted(differing.items()))


def same_numbers(before: Checkpoint, after: Checkpoint, name: str, rounded_to: str = "") -> bool:
    """Return whether the tensor is the same in both: dtype, shape, and every bit (so that NaN equals the same NaN).

    Args:
        rounded_to: a dtype that those of AFTER may have been rounded to, once.
    """
    one, other = before.infos[name], after.infos[name]
    piece = before.piece(name)
    if rounded_to and one.dtype != other.dtype == rounded_to:
        piece = cast_piece(piece, rounded_to)
    if (piece.dtype, one.shape, piece.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    try:
        return same_bytes((chunk.data for chunk in piece.chunks()), after.chunks(name))
    except RefusedError:  # the dtype doesn't hold BEFORE's numbers
        return False
