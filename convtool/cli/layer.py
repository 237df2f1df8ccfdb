"""The one layer that `toeplitz`, `unfold` and `spectrum` are about: found, lowered, and held against its input size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.options import (
    CheckpointPath,
    Dilation,
    Groups,
    InputSize,
    OutputPadding,
    Padding,
    PaddingModeOption,
    SourceOptions,
    Stride,
    Transposed,
    check_used,
    parse_input_size,
    single_layer_fields,
)
from convtool.cli.output import Reporter
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.core.conv import Conv


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """The layer, the size of its input, and what options such as --stride say of it: as typed."""

    checkpoint: CheckpointPath
    layer: Annotated[
        str,
        typer.Argument(
            metavar="LAYER", help="Module path of the layer.", show_default=False, autocompletion=complete.layers
        ),
    ]
    input_size: InputSize = None
    stride: Stride = None
    padding: Padding = None
    dilation: Dilation = None
    groups: Groups = None
    padding_mode: PaddingModeOption = None
    transposed: Transposed = False
    output_padding: OutputPadding = None

    @property
    def fields(self) -> dict[str, Any]:
        """Those of --stride, --padding, ... that were given, parsed; UsageError where one can't be."""
        return single_layer_fields(
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            transposed=self.transposed,
            output_padding=self.output_padding,
        )


@dataclass(frozen=True, slots=True)
class LayerAtSize:
    """A layer and the size of its input.

    Attributes:
        name: as the checkpoint has it.
        fields: its geometry, as records and documents hold it.
        spatial: spatial sizes of its input; None where none were given and none are needed.
        assumed: what was assumed of it, in words.
    """

    name: str
    kind: str
    conv: Conv
    fields: dict[str, Any]
    spatial: tuple[int, ...] | None
    assumed: list[str]

    @property
    def record(self) -> dict[str, Any]:
        """What a file made from it notes of it."""
        sizes = None if self.spatial is None else [self.conv.in_channels, *self.spatial]
        made = None if self.spatial is None else [self.conv.out_channels, *self.conv.output_size(self.spatial)]
        return {
            "layer": self.name,
            "kind": self.kind,
            "fields": self.fields,
            "input_size": sizes,
            "output_size": made,
        }


def lower_layer(
    reporter: Reporter, wanted: LayerOptions, given: SourceOptions, *, needs_size: bool = True
) -> LayerAtSize:
    """The layer that is wanted, and a remark on what was assumed of it.

    Args:
        needs_size: whether there has to be an --input-size (where the layer has spatial axes).

    Raises:
        UsageError, InputError: what opening a checkpoint and lowering a layer raise; or an input size is missing.
    """
    from convtool.core.fields import geometry_fields
    from convtool.core.sizes import split_input_size
    from convtool.fusing.lowering import lower_chain

    size = parse_input_size(wanted.input_size)
    opened = given.open(wanted.checkpoint, reporter)
    found = opened.layer(wanted.layer)
    fields = wanted.fields
    sources = given.fields(given.of_model(opened, reporter), {found.name: fields} if fields else {})
    check_used(sources, list(opened.layers))
    if needs_size and size is None and not found.kind.channels_last:
        raise UsageError(
            f"{reporter.command} needs --input-size, the spatial sizes of {wanted.layer}'s input, such as 32,32"
        )
    lowered = lower_chain(opened, [wanted.layer], sources, size)[0]
    if lowered.assumed:
        reporter.remark(f"assumed: {lowered.assumed}")
    conv = lowered.conv
    spatial = None
    if needs_size or size is not None or conv.spatial_axes == 0:
        spatial = split_input_size(size or (), conv.in_channels, conv.spatial_axes)
    return LayerAtSize(
        found.name,
        found.kind.name,
        conv,
        geometry_fields(conv.geometry) | lowered.fields,
        spatial,
        [lowered.assumed] if lowered.assumed else [],
    )
