"""Two checkpoints held against each other: which fusions part them, and whether all the rest is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from convtool.checkpoint import Checkpoint, TensorInfo
from convtool.checkpoint.cast import cast_piece
from convtool.checkpoint.digests import digests_of
from convtool.checkpoint.record import FusionRecord, SourceLayer, full_name
from convtool.checkpoint.spelled import Path, spelled_out
from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels, output_size
from convtool.core.geometry import LARGEST, format_sizes
from convtool.core.inputs import widest_layer
from convtool.core.sizes import alike_size, split_input_size
from convtool.core.tree import BASE, Chain, LayerRef, Tree, first_leaves, leaves, map_leaves, walk
from convtool.core.verify import LARGEST_INPUT
from convtool.errors import InputError, RefusedError, UsageError
from convtool.formats.pieces import same_bytes
from convtool.fusing.claims import fused_claims
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree
from convtool.fusing.settle import settle
from convtool.fusing.standing import like_fused, standing
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.kinds.written import read_layer


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
            ranges = [_sizes_for(tree, path, size) for path, size in self.sizes]
            smallest = tuple(max(one[a][0] for one in ranges) for a in range(axes))
            largest = tuple(min(one[a][1] for one in ranges) for a in range(axes))
            if any(least > most for least, most in zip(smallest, largest, strict=True)):
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


def _sizes_for(tree: Expression, path: Path, size: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return per axis the smallest and the largest input size of the tree with which its part at `path` gets `size`."""
    before: list[Expression] = []
    part = tree
    for number in path:
        if isinstance(part, Conv):
            raise UsageError("there is no such part")
        before += part.parts[:number] if isinstance(part, Chain) else ()
        part = part.parts[number]
    spatial = split_input_size(size, in_channels(part), next(leaves(part)).spatial_axes)
    return [
        (_smallest_giving(before, axis, n), _smallest_giving(before, axis, n + 1) - 1) for axis, n in enumerate(spatial)
    ]


def _smallest_giving(layers: Sequence[Expression], axis: int, least: int) -> int:
    """Return the smallest input size of an axis with which the layers give at least that; sizes grow with sizes."""
    low, high = 1, LARGEST
    while low < high:
        middle = (low + high) // 2
        if _gives(layers, axis, middle) >= least:
            high = middle
        else:
            low = middle + 1
    return low


def _gives(layers: Sequence[Expression], axis: int, size: int) -> int:
    """Return the output size of an axis; 0 where the input is too small."""
    for layer in layers:
        try:
            size = _axis_size(layer, axis, size)
        except UsageError:
            return 0
    return size


def _axis_size(tree: Expression, axis: int, size: int) -> int:
    return walk(tree, size, lambda conv, at: conv.geometry.axes[axis].output_size(at), lambda _, sizes: sizes[0])


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


def recorded_pairings(
    before: Checkpoint,
    after: Checkpoint,
    sources: FieldSources,
    others: Mapping[str, Checkpoint] | None = None,
    named: Sequence[Pairing] = (),
) -> list[Pairing]:
    """Return a pairing for each fusion that AFTER records and BEFORE doesn't.

    Geometry is as recorded, `sources` overruling it.

    Args:
        others: the other checkpoints that layers came from, by the names they were given.
        named: what stands in place of the record for the layers in it.

    Raises:
        InputError: AFTER has no record of a fusion that BEFORE lacks, or the record doesn't fit the tensors.
    """
    if after.record is None:
        same_names = before.record is None and before.infos.keys() == after.infos.keys()
        if same_names and not differing_tensors(before, after, []):
            return []  # nothing was fused, and nothing else was done either
        swapped = "; BEFORE holds one: BEFORE and AFTER may be swapped" if before.record is not None else ""
        raise InputError(
            f"{after.path}: holds no record of what was fused{swapped}; name the layers: --before a,b --after c; or all"
            " at once: --recipe, or --model with --model-input"
        )
    fusions = after.record.since(before.record)
    last = {fusion.name: fusion for fusion in fusions}
    checkpoints = {BASE: before, **(others or {})}
    pairings = []
    taken = {leaf.layer.name for pairing in named for leaf in leaves(pairing.before) if leaf.own}
    taken_after = {leaf.layer.name for pairing in named for leaf in leaves(pairing.after)}
    for name, spelled in spelled_out(fusions).items():
        tree = spelled.tree
        if name in taken_after or any(source.name in taken for source in leaves(tree) if source.origin == BASE):
            continue
        chain = [source for source in leaves(tree) if not source.written and source.origin == BASE]
        missing = [source.name for source in chain if not _has_layer(before, source.name)]
        if missing or name not in after.layers:
            where, which = (before.path, missing[0]) if missing else (after.path, name)
            raise InputError(f"{where}: has no layer {which!r}, which the record of {after.path} names")
        for source in leaves(tree):
            _check_kind(source, checkpoints, after)
        try:
            fused = lower_tree({BASE: after}, _stands(last[name]), FieldSources())
        except UsageError as error:
            raise _does_not_fit(after, error) from None
        stands = next(leaves(fused)).conv
        axes = stands.spatial_axes  # which batch norms by themselves don't tell
        layers = _lower_recorded(tree, checkpoints, after, sources, stands)
        if next(leaves(layers)).conv.spatial_axes != axes:  # a matrix fused further in the flat form that it has
            raise InputError(
                f"{after.path}: its record can't say how {name!r}, which takes flat numbers, stands for layers over"
                " feature maps; name them: --before a,b --after c"
            )
        (layers,) = settle([layers], checkpoints, sources.assume)
        pairings.append(
            Pairing(
                name,
                layers,
                like_fused(fused, layers),
                spelled.sizes,
                spelled.dtypes,
                str(after.path),
                last[name].dtype,
                (*_claims(layers, sources), *fused_claims(last[name], layers, fused)),
                _taken(fusions),
                last[name].gives,
            )
        )
    return pairings


def _taken(fusions: Sequence[FusionRecord]) -> dict[str, str]:
    """Return the digests of the tensors that the first of these fusions found, and none of them made."""
    taken: dict[str, str] = {}
    made: set[str] = set()
    for fusion in fusions:
        taken |= {name: digest for name, digest in fusion.takes.items() if name not in made}
        made |= fusion.gives.keys()
    return taken


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


def _claims(tree: Tree[LoweredLayer], sources: FieldSources) -> Iterator[tuple[str, str]]:
    """Yield the fields of recorded layers that nobody else states, and that nothing in BEFORE shows."""
    whole = {leaf.name for leaf in leaves(tree)}
    for leaf in leaves(tree):
        kind, stated = leaf.layer.kind, sources.fields(leaf.name)
        shown = {"of"} if leaf.fields.get("of") in whole else set()  # that an adapter changes what it is added to
        for assumed in (False, True) if kind.settable else ():
            names = leaf.known.keys() - stated.keys() - leaf.implied - shown
            claimed = {name: leaf.known[name] for name in leaf.known if name in names}
            said = kind.claim(
                {name: value for name, value in claimed.items() if (name in leaf.assumed) == assumed}, leaf.layer.shapes
            )
            if said:
                yield leaf.name, f"{said} (assumed)" if assumed else said
        if leaf.like and not shown:
            yield leaf.name, f"otherwise as {leaf.like}"


def _lower_recorded(
    tree: Tree[SourceLayer],
    checkpoints: Mapping[str, Checkpoint],
    after: Checkpoint,
    sources: FieldSources,
    stands: Conv,
) -> Tree[LoweredLayer]:
    """Return the layers of BEFORE; an error is the record's, unless what else is said of them may be the cause."""
    names = {full_name(source.name, source.origin): source for source in leaves(tree)}
    known = FieldSource(
        f"the record of {after.path}",
        {name: source.fields for name, source in names.items()},
        exact_names=True,
        assumed={name: source.assumed for name, source in names.items()},
    )
    try:
        refs = map_leaves(lambda source: LayerRef(source.name, source.origin, source.like), tree)
        # What is written in front doesn't tell its channels.
        channels = stands.in_channels if any(source.written for source in first_leaves(tree)) else None
        return lower_tree(checkpoints, refs, sources.with_first(known), axes=stands.spatial_axes, channels=channels)
    except UsageError as error:
        lacking = any(not source.written and source.origin not in checkpoints for source in names.values())
        if lacking or any(sources.fields(name) for name in names):
            raise
        raise _does_not_fit(after, error) from None


def _check_kind(source: SourceLayer, checkpoints: Mapping[str, Checkpoint], after: Checkpoint) -> None:
    """InputError where the record takes a layer for what it isn't."""
    if not source.written and source.origin not in checkpoints:
        return  # which is said where it is read
    found = (read_layer(source.name) if source.written else checkpoints[source.origin].part(source.name)).kind
    if source.kind is not found:
        raise InputError(
            f"{after.path}: its convtool record is damaged: it calls {source.name!r} a {source.kind.label}, and it is a"
            f" {found.label}"
        )


def _does_not_fit(after: Checkpoint, error: UsageError) -> InputError:
    what = str(error).removeprefix(f"{after.path}: ")
    return InputError(f"{after.path}: its convtool record doesn't fit the tensors: {what}")


def _stands(fusion: FusionRecord) -> Tree[LayerRef]:
    """Return what stands in AFTER for the sources: the layer, between what gives and takes the form of its tensors."""
    return Chain(tuple(LayerRef(name) for name in (fusion.before, fusion.name, fusion.after) if name))


def _has_layer(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether there is a layer of exactly that name, or a tensor of it that went into a fusion as a scale."""
    try:
        return checkpoint.part(name).name == name
    except UsageError:
        return False


def tensors_of(tree: Tree[LoweredLayer]) -> set[str]:
    """Return the full names of the checkpoint's tensors that a tree of its layers consists of."""
    return {name for leaf in leaves(tree) if leaf.origin == BASE for name in leaf.layer.tensor_names()}


def untouched(before: Checkpoint, pairings: Sequence[Pairing]) -> list[TensorInfo]:
    """Return the tensors of BEFORE that no pairing accounts for."""
    used = set().union(*(tensors_of(pairing.before) for pairing in pairings))
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
