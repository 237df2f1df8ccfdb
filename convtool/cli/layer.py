"""The one layer that `toeplitz`, `unfold` and `spectrum` are about: found, lowered, and held against its input size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli import complete, shared
from convtool.cli.document import LayerFields, LayerKind, Sizes
from convtool.cli.options import Size, argument, flag, option
from convtool.cli.output import Reporter
from convtool.core.geometry import PADDING_MODES
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.core.conv import Conv

FIELDS = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")


def _parse_field(text: str, option: str) -> Any:
    """Return a field's value; a UsageError begins with the option's name."""
    from convtool.kinds import parse_field

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
    padding: Any = _field_option("P", "1, or 1,2, or before:after (0:1,2:2), or same, or half.")
    dilation: Any = _field_option("N[,N]", "Dilation of LAYER.")
    groups: Any = _field_option("N", "Groups of LAYER.")
    padding_mode: Any = _field_option(
        "MODE", "zeros, circular, replicate or reflect.", completion=complete.one_of(*PADDING_MODES)
    )
    transposed: bool = flag("LAYER is a ConvTranspose.")
    output_padding: Any = _field_option("N[,N]", "Of a transposed LAYER.")

    @property
    def fields(self) -> dict[str, Any]:
        """Those of --stride, --padding, ... that were given."""
        given = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in given.items() if value is not None and value is not False}  # 0 is given


@dataclass(frozen=True, slots=True)
class OfLayer:
    """A layer and the size of its input, as documents and the records of files hold them.

    Attributes:
        layer: as the checkpoint calls it.
        input_size: channels first; null where none was given.
        output_size: channels first.
    """

    layer: str
    kind: LayerKind
    fields: LayerFields
    input_size: Sizes | None
    output_size: Sizes | None

    @property
    def sizes_text(self) -> str:
        """'3x32x32 -> 16x30x30'."""
        return " → ".join("x".join(map(str, size or ())) for size in (self.input_size, self.output_size))


@dataclass(frozen=True, slots=True)
class LayerAtSize:
    """A layer, lowered, and the size of its input.

    Attributes:
        source: the checkpoint.
        spatial: spatial sizes of its input; None where none were given and none are needed.
        assumed: what was assumed of it, in words.
    """

    source: Path
    of: OfLayer
    conv: Conv
    spatial: tuple[int, ...] | None
    assumed: tuple[str, ...]


def find_layer(
    wanted: LayerOptions, given: shared.Sources, reporter: Reporter, *, needs_size: bool = True
) -> LayerAtSize:
    """Return the layer that is wanted; what was assumed of it is remarked.

    Args:
        needs_size: whether there has to be an --input-size (where the layer has spatial axes).

    Raises:
        UsageError, InputError: what opening a checkpoint and lowering a layer raise; or an input size is missing.
    """
    from convtool.core.fields import geometry_fields
    from convtool.core.sizes import split_input_size
    from convtool.fusing.lowering import lower_chain

    size = wanted.input_size
    opened = given.open(wanted.checkpoint, reporter)
    found, fields = opened.layer(wanted.layer), wanted.fields
    sources = given.fields(given.of_model(opened, reporter), opened.layers, {found.name: fields} if fields else {})
    if needs_size and size is None and not found.kind.channels_last:
        raise UsageError(
            f"{reporter.command} needs --input-size, the spatial sizes of {wanted.layer}'s input, such as 32,32"
        )
    lowered = lower_chain(opened, [wanted.layer], sources, size)[0]
    if lowered.assumed:
        reporter.note(f"assumed: {lowered.assumed}")
    conv = lowered.conv
    unsized = size is None and conv.spatial_axes
    spatial = None if unsized else split_input_size(size or (), conv.in_channels, conv.spatial_axes)
    of = OfLayer(
        found.name,
        found.kind.name,
        geometry_fields(conv.geometry) | lowered.fields,
        None if spatial is None else (conv.in_channels, *spatial),
        None if spatial is None else (conv.out_channels, *conv.output_size(spatial)),
    )
    return LayerAtSize(wanted.checkpoint, of, conv, spatial, (lowered.assumed,) if lowered.assumed else ())
