"""A chain of named layers, lowered: fields gathered from every source, the rest settled, or assumed and said so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.info import Layer
from convtool.checkpoint.lower import lower_layer
from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.fields import DEFAULT_EPS, Fields, FieldSource, FieldSources, geometry_fields
from convtool.errors import RefusedError, UsageError


@dataclass(frozen=True, slots=True, eq=False)
class LoweredLayer:
    """One layer of a chain.

    Attributes:
        layer: as found in the checkpoint.
        conv: what it was lowered to.
        fields: all of its fields, the assumed ones too.
        assumed: what nobody stated, in words; '' where everything was stated.
    """

    layer: Layer
    conv: Conv
    fields: Fields
    assumed: str

    def source(self) -> SourceLayer:
        return SourceLayer(self.layer.name, self.layer.kind, self.fields)


def recorded(checkpoint: Checkpoint) -> FieldSource:
    """What convtool wrote down about the layers that it made itself."""
    record = checkpoint.record
    return FieldSource("record", record.fields() if record else {}, exact_names=True)


def lower_chain(
    checkpoint: Checkpoint,
    names: Sequence[str],
    sources: FieldSources,
    input_channels: int | None = None,
    spatial_axes: int | None = None,
) -> list[LoweredLayer]:
    """The named layers, first to last, with their fields from `sources` (the checkpoint's record comes before them).

    Args:
        input_channels: of the chain's input, where the user gave them; settles groups that nobody stated.
        spatial_axes: of the chain's input, for a chain without a convolution; 0 where None.

    Raises:
        UsageError: an unknown layer, one named twice, fields or channels that don't fit.
        InputError: a layer that isn't linear, or holds inf or NaN.
        RefusedError: layers that cannot be chained here.
    """
    layers = [checkpoint.layer(name) for name in names]
    for number, layer in enumerate(layers):
        if any(layer.name == other.name for other in layers[:number]):
            raise UsageError(f"{layer.name} is named twice; a chain runs through each layer once")
    sources = sources.with_first(recorded(checkpoint))
    axes = _spatial_axes(layers, spatial_axes or 0)
    lowered: list[LoweredLayer] = []
    channels, known_from = input_channels, "--input-size"
    for layer in layers:
        fields = sources.fields(layer.name)
        assumed: list[str] = []
        if layer.kind == "conv":
            fields, assumed = _settle_conv(layer, fields, channels, known_from)
        elif layer.kind == "batch_norm" and "eps" not in fields:
            assumed = [f"eps {DEFAULT_EPS:g}"]
        conv = lower_layer(checkpoint, layer, fields, axes)
        if channels is not None and conv.in_channels != channels:
            raise UsageError(
                f"channels don't fit: {layer.name} takes {conv.in_channels} channels, and {known_from} gives {channels}"
            )
        full = geometry_fields(conv.geometry) if layer.kind == "conv" else dict(fields)
        if layer.kind == "batch_norm":
            full.setdefault("eps", DEFAULT_EPS)
        lowered.append(LoweredLayer(layer, conv, full, f"{layer.name}: {', '.join(assumed)}" if assumed else ""))
        channels, known_from = conv.out_channels, layer.name
    return lowered


def stored_dtype(chain: Sequence[LoweredLayer]) -> torch.dtype:
    """The dtype that the chain is stored in: its first convolution's or linear layer's, else its first layer's."""
    layers = [lowered.layer for lowered in chain]
    layer = next((layer for layer in layers if layer.kind in ("conv", "linear")), layers[0])
    info = layer.tensors.get("weight") or layer.tensors["running_mean"]
    dtype: torch.dtype = getattr(torch, info.dtype)
    return dtype


def _spatial_axes(layers: Sequence[Layer], default: int) -> int:
    """The number of spatial axes of a chain, as its convolutions tell; `default` where there is none."""
    counts = {layer.name: layer.spatial_axes for layer in layers if layer.spatial_axes is not None}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} has {axes}" for name, axes in counts.items())
        raise UsageError(f"layers of different numbers of spatial axes cannot be chained: {each}")
    axes = next(iter(counts.values()), default)
    linear = [layer.name for layer in layers if layer.kind == "linear"]
    if axes and linear:
        raise RefusedError(
            f"{linear[0]} is a linear layer: between it and a convolution there is a flatten or a pooling that the"
            " checkpoint doesn't show, and fusing across one is not supported"
        )
    return axes


def _settle_conv(layer: Layer, fields: Fields, channels: int | None, known_from: str) -> tuple[Fields, list[str]]:
    """Groups inferred where the channels settle them, and the list of what was assumed."""
    assumed = []
    weight = layer.tensors["weight"].shape
    if "stride" not in fields:
        assumed.append("stride 1")
    if "padding" not in fields:
        assumed.append("padding 0")
    elif "padding_mode" not in fields and fields["padding"] != 0:
        assumed.append("padding_mode zeros")
    if "dilation" not in fields and any(k > 1 for k in weight[2:]):
        assumed.append("dilation 1")
    if "groups" not in fields:
        per_group = weight[1]
        if channels is not None and not fields.get("transposed") and per_group and channels % per_group == 0:
            groups = channels // per_group
            fields = fields | {"groups": groups}
            if groups != 1:
                assumed.append(f"groups {groups} ({channels} channels from {known_from}, {per_group} per group)")
        else:
            assumed.append("groups 1")
    return fields, assumed
