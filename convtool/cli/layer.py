"""The one layer that `toeplitz`, `unfold` and `spectrum` are about: found, lowered, and held against its input size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli.options import check_used, field_sources, parse_input_size, single_layer_fields
from convtool.cli.output import Reporter
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.core.conv import Conv


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
    reporter: Reporter,
    checkpoint: Path,
    layer: str,
    *,
    root: str | None,
    input_size: str | None,
    fields: dict[str, Any],
    geometry: Path | None,
    settings: list[str] | None,
    model: str | None,
    model_args: str | None,
    needs_size: bool = True,
) -> LayerAtSize:
    """The layer of that name, and a remark on what was assumed of it.

    Args:
        fields: of --stride, --padding, ...: as they were typed.
        needs_size: whether there has to be an --input-size (where the layer has spatial axes).

    Raises:
        UsageError, InputError: what opening a checkpoint and lowering a layer raise; or an input size is missing.
    """
    from convtool.checkpoint import open_checkpoint
    from convtool.checkpoint.chain import lower_chain
    from convtool.cli.model import model_fields
    from convtool.core.fields import geometry_fields
    from convtool.core.verify import split_input_size

    size = parse_input_size(input_size)
    opened = open_checkpoint(checkpoint, root)
    found = opened.layer(layer)
    given = single_layer_fields(**fields)
    sources = field_sources(
        geometry, settings, {found.name: given} if given else {}, model_fields(model, model_args, opened, reporter)
    )
    check_used(sources, list(opened.layers))
    axes = found.spatial_axes
    if axes is None and found.kind == "batch_norm":
        axes = len(size) - 1 if size is not None else None
    if needs_size and size is None and axes != 0 and found.kind != "linear":
        raise UsageError(f"{reporter.command} needs --input-size, the spatial sizes of {layer}'s input, such as 32,32")
    channels = size[0] if size is not None and axes is not None and len(size) == axes + 1 else None
    lowered = lower_chain(opened, [layer], sources, channels, spatial_axes=axes)[0]
    if lowered.assumed:
        reporter.remark(f"assumed: {lowered.assumed}")
    conv = lowered.conv
    spatial = None
    if needs_size or size is not None or conv.spatial_axes == 0:
        spatial = split_input_size(size or (), conv.in_channels, conv.spatial_axes)
    return LayerAtSize(
        found.name,
        found.kind,
        conv,
        geometry_fields(conv.geometry) | lowered.fields,
        spatial,
        [lowered.assumed] if lowered.assumed else [],
    )
