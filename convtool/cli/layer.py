"""The one layer that `toeplitz`, `unfold` and `spectrum` are about: found, lowered, and held against its input size."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli import complete, shared
from convtool.cli.document import HIDDEN, INLINE, LayerFields, LayerKind, Sizes
from convtool.cli.options import Size, argument, flag, option, spelled
from convtool.cli.output import Reporter, times
from convtool.core.geometry import PADDING_MODES
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, has_sum, leaves, map_leaves, tree_text, walk
from convtool.errors import UsageError, did_you_mean
from convtool.kinds import kind_named, parse_field
from convtool.kinds.kind import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from convtool.checkpoint import Checkpoint
    from convtool.core.expression import Expression
    from convtool.fusing.leaf import LoweredLayer
    from convtool.kinds.stated import FieldSources

FIELDS = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")


def _parse_field(text: str, option: str) -> Any:
    """Return a field's value; a UsageError begins with the option's name."""
    name = option.removeprefix("--").replace("-", "_")
    try:
        return parse_field(name, text)
    except UsageError as error:
        raise UsageError(f"{option}: {str(error).removeprefix(f'{name}: ')}") from None


_field_option = partial(option, parse=_parse_field)


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """The layer, the size of its input, and what options such as --stride say of it."""

    checkpoint: Path = shared.checkpoint()
    layer: str = argument("LAYER", "Module path of the layer.", complete.layers, required=True)
    input_size: Size | None = shared.input_size()
    stride: Any = _field_option("N[,N]", "Stride of LAYER.")
    padding: Any = _field_option("P", "Padding of LAYER: 1; or 1,2; or before:after, as 0:1,2:2; or same, or half.")
    dilation: Any = _field_option("N[,N]", "Dilation of LAYER.")
    groups: Any = _field_option("N", "Groups of LAYER.")
    padding_mode: Any = _field_option(
        "MODE",
        "Of LAYER: zeros, circular, replicate, reflect or symmetric.",
        completion=complete.one_of(*PADDING_MODES),
    )
    transposed: bool = flag("LAYER is a ConvTranspose.")
    output_padding: Any = _field_option("N[,N]", "Of a transposed LAYER.")

    @property
    def fields(self) -> dict[str, Any]:
        """Those of --stride, --padding, ... that were given."""
        given = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in given.items() if value is not None and value is not False}  # 0 is given


def more_layers() -> Any:
    """Declare the layers that come after the first one."""
    return argument("[LAYER...]", "The layers after it, which make a chain; also 'avg_pool(2)'.", complete.layers)


@dataclass(frozen=True, slots=True)
class OfLayer:
    """A layer and the size of its input, as documents and the records of files hold them.

    Attributes:
        layer: as the checkpoint calls it.
        unstated: those of the fields that nobody stated, and that have torch's default.
        input_size: channels first; null where none was given.
        output_size: channels first.
    """

    layer: str
    kind: LayerKind
    fields: LayerFields
    unstated: tuple[str, ...]
    input_size: Sizes | None
    output_size: Sizes | None

    @property
    def sizes_text(self) -> str:
        """'3x32x32 -> 16x30x30'."""
        return f"{times(self.input_size)} → {times(self.output_size)}"

    @property
    def fields_text(self) -> str:
        """'stride 2, padding 3; by default: dilation 1'; '' of a layer without fields."""
        kind = kind_named(self.kind) or UNKNOWN
        idle = () if self.fields.get("transposed") else ("output_padding",)
        said = {name: kind.say(name, value) for name, value in self.fields.items() if name not in idle}
        stated = ", ".join(text for name, text in said.items() if name not in self.unstated)
        default = ", ".join(text for name, text in said.items() if name in self.unstated)
        return "; ".join(text for text in (stated, default and f"by default: {default}") if text)


@dataclass(frozen=True, slots=True)
class OfLayers:
    """A layer, or several in chains and sums, as documents and the records of files hold them.

    Attributes:
        first: the layer; of several, the first one.
        chain: the layers of a chain or a tree, first to last; empty for one layer.
        tree: their names, where they aren't a plain chain.
    """

    first: OfLayer = field(metadata=INLINE)
    chain: tuple[OfLayer, ...]
    tree: Tree[str] | None = field(metadata=HIDDEN)

    @property
    def name(self) -> str:
        """'conv1 → bn1' for a chain, '(conv1 → bn1) + conv2' for a tree, a layer's name for one."""
        if self.tree is not None:
            return tree_text(self.tree)
        return " → ".join(one.layer for one in self.chain) or self.first.layer

    @property
    def sizes_text(self) -> str:
        """'3x32x32 → 16x30x30 → 16x15x15', of a chain the size behind each layer; of a tree the last one."""
        if self.tree is not None:
            return f"{times(self.first.input_size)} → {times(self.chain[-1].output_size)}"
        return " → ".join([self.first.sizes_text, *(times(one.output_size) for one in self.chain[1:])])

    @property
    def fields_lines(self) -> list[str]:
        """A line for each layer that has fields, with all that is known of them."""
        each = self.chain or (self.first,)
        return [f"  {f'{one.layer}: ' if self.chain else ''}{one.fields_text}" for one in each if one.fields]


@dataclass(frozen=True, slots=True)
class LayersAtSize:
    """A layer, or several in chains and sums, lowered, and the size of the first one's input.

    Attributes:
        source: the checkpoint.
        of: what they are.
        layers: the layers.
        dtype: that they are stored in.
        spatial: spatial sizes of the input; () where none were given and none are needed.
        assumed: what was assumed of them, in words.
    """

    source: Path
    of: OfLayers
    layers: Expression
    dtype: torch.dtype
    spatial: tuple[int, ...]
    assumed: tuple[str, ...]


def find_layers(
    wanted: LayerOptions,
    more: list[str] | None,
    given: shared.Sources,
    reporter: Reporter,
    recipe: str | None = None,
    *,
    needs_size: bool = True,
) -> LayersAtSize:
    """Return the layer, the chain or the tree that is wanted; what was assumed is remarked.

    Args:
        more: the layers after the first one.
        recipe: whose fusion of the layer's name is wanted.
        needs_size: whether a single layer has to have an --input-size (where it has spatial axes).
    """
    from convtool.fusing.leaf import said_of
    from convtool.fusing.lowering import lower_tree
    from convtool.fusing.settle import settle_alone

    single, size = not more and recipe is None, wanted.input_size
    for name in () if single else wanted.fields:
        raise UsageError(
            f"{spelled(name)}: is for one layer; of one of several, --set {wanted.layer}.{name}=... says it"
        )
    opened = given.open(wanted.checkpoint, reporter)
    layer = opened.layer(wanted.layer) if single else None
    if size is None and (layer is None or (needs_size and not layer.kind.channels_last)):
        said = f"{reporter.command} needs --input-size, the size of {wanted.layer}'s input"
        raise UsageError(f"{said}, such as {'3,32,32' if layer is None else '32,32'}")
    refs: Tree[LayerRef] = Chain(tuple(map(LayerRef, (wanted.layer, *more)))) if more else LayerRef(wanted.layer)
    model = given.read_model(opened, reporter)
    sources = given.fields(model, opened.layers, {layer.name: wanted.fields} if layer and wanted.fields else {})
    if recipe is not None:
        refs, sources = _of_recipe(recipe, wanted.layer, more, opened, sources)
    found = lower_tree({BASE: opened}, refs, sources, size)
    defined = _defined(next(leaves(found)), opened, given.fields(model, opened.layers)) if single else frozenset()
    lowered = settle_alone(leaves(found), {BASE: opened}, sources.assume | defined, weight_only=size is None)
    reporter.note(*(() if defined else said_of(lowered)))
    each = iter(lowered)
    return _at_size(wanted.checkpoint, map_leaves(lambda _: next(each), found), size, bool(defined))


def _at_size(source: Path, tree: Tree[LoweredLayer], size: Size | None, defined: bool) -> LayersAtSize:
    """Return what there is to say of lowered layers.

    Args:
        defined: by options; then nothing was assumed.
    """
    from convtool.core.expression import joined, split_input_size
    from convtool.fusing.lowering import stored_dtype

    first, lowered = next(leaves(tree)).conv, list(leaves(tree))
    sized = size is not None or not first.spatial_axes
    spatial = split_input_size(size or (), first.in_channels, first.spatial_axes) if sized else None
    found: list[OfLayer] = []

    def step(leaf: LoweredLayer, at: tuple[int, ...] | None) -> tuple[int, ...] | None:
        found.append(_of_layer(leaf, at))
        return None if at is None else leaf.conv.output_size(at)

    walk(tree, spatial, step, lambda _, sizes: sizes[0])
    chain = tuple(found) if isinstance(tree, Chain | Sum) else ()
    return LayersAtSize(
        source,
        OfLayers(found[0], chain, map_leaves(lambda leaf: leaf.name, tree) if has_sum(tree) else None),
        map_leaves(lambda leaf: leaf.conv, joined(tree)),
        stored_dtype(lowered),
        spatial or (),
        () if defined else tuple(f"{name}: {what}" for leaf in lowered for name, what in leaf.assumptions()),
    )


def _of_recipe(
    name: str, fused: str, more: list[str] | None, opened: Checkpoint, sources: FieldSources
) -> tuple[Tree[LayerRef], FieldSources]:
    """Return the layers of one of a recipe's fusions, and what is known of them."""
    from convtool.fusing.named import by_name, chosen

    if more:
        raise UsageError("--recipe: LAYER is the name of one of its fusions; further layers don't go with it")
    checkpoints = {BASE: opened}
    fusions, sources = by_name(chosen(name, checkpoints, sources)[0], checkpoints, sources)
    trees = {one.name: one.tree for one in fusions}
    if fused not in trees:
        hint = did_you_mean(fused, trees, f"; it makes {', '.join(trees)}")
        raise UsageError(f"--recipe {name}: makes no layer {fused!r}{hint}")
    return trees[fused], sources


def _of_layer(leaf: LoweredLayer, spatial: Sequence[int] | None) -> OfLayer:
    conv = leaf.conv
    sizes = (None, None) if spatial is None else (spatial, conv.output_size(spatial))
    channels = conv.in_channels, conv.out_channels
    inputs, outputs = (None if one is None else (c, *one) for c, one in zip(channels, sizes, strict=True))
    return OfLayer(leaf.name, leaf.layer.kind.name, leaf.known, tuple(sorted(leaf.assumed)), inputs, outputs)


def _defined(leaf: LoweredLayer, opened: Checkpoint, sources: FieldSources) -> frozenset[str]:
    """Return the fields that options define, with torch's defaults: of a layer that nothing else speaks of.

    Args:
        sources: all but those options.
    """
    from convtool.checkpoint.record import field_source

    layer = leaf.layer
    if sources.fields(layer.name).keys() & layer.kind.settable.keys() or layer.name in field_source(opened).tables:
        return frozenset()
    out_channels, of_a_group, *_ = (*layer.shapes.get("weight", ()), 0, 0)
    asked = layer.kind.channelwise if of_a_group == 1 < out_channels else ()  # as like as not it is depthwise
    return frozenset(n for n, values in leaf.open.items() if n not in asked and (values or n in layer.kind.channelwise))
