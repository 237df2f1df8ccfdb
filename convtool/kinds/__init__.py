"""Every kind of layer that convtool knows: the table, and what is found by it.

A new kind is a module in this folder and its name in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from convtool.core.fields import FieldType
from convtool.errors import UsageError, did_you_mean
from convtool.kinds.adapter import DIFFERENCE, LOHA, LOKR, LORA
from convtool.kinds.batch_norm import BATCH_NORM
from convtool.kinds.convolution import CONV
from convtool.kinds.fixed import KERNEL, OFFSET
from convtool.kinds.flatten import FLATTEN, UNFLATTEN
from convtool.kinds.kind import UNKNOWN, Kind, TensorInfo
from convtool.kinds.linear import LINEAR
from convtool.kinds.moving import (
    CHANNEL_SHUFFLE,
    CHANNEL_UNSHUFFLE,
    FOCUS,
    PERMUTE,
    PIXEL_SHUFFLE,
    PIXEL_UNSHUFFLE,
    PLACE,
    SELECT,
)
from convtool.kinds.scale import IDENTITY, NORMALIZE, SCALE
from convtool.kinds.window import AVG_POOL, PAD, UPSAMPLE

KINDS: list[Kind] = [
    *(CONV, LINEAR, BATCH_NORM, IDENTITY, SCALE),
    *(AVG_POOL, UPSAMPLE, PAD, NORMALIZE, UNFLATTEN, FLATTEN, KERNEL, OFFSET),
    *(PIXEL_UNSHUFFLE, PIXEL_SHUFFLE, FOCUS, SELECT, PLACE, PERMUTE, CHANNEL_SHUFFLE, CHANNEL_UNSHUFFLE),
    *(LORA, LOHA, LOKR, DIFFERENCE),
]


def kind_named(name: str) -> Kind | None:
    """Return the kind of that name, or None."""
    return next((kind for kind in KINDS if kind.name == name), None)


def stored_kinds() -> list[Kind]:
    """Return the kinds whose layers stand in checkpoints."""
    return [kind for kind in KINDS if kind.tensors]


def kind_of(tensors: Mapping[str, TensorInfo]) -> Kind:
    """Return what a module must be, as far as its tensors' names and shapes tell."""
    return next((kind for kind in KINDS if kind.recognises(tensors)), UNKNOWN)


def field_types() -> dict[str, FieldType]:
    """Return the fields that a layer of a checkpoint can have, whatever its kind."""
    return {name: value for kind in KINDS for name, value in kind.settable.items()}


def parse_field(name: str, value: object) -> object:
    """Return one field's value, from the text of an option or the value of a TOML or JSON file.

    Raises:
        UsageError: an unknown field, or a value of the wrong form. Ranges are checked where the layer is lowered.
    """
    types = field_types()
    if name not in types:
        raise UsageError(f"unknown field {name!r}{did_you_mean(name, types, '; expected one of ' + ', '.join(types))}")
    return types[name].read(name, value)


def names_of(kinds: Iterable[Kind]) -> str:
    """Return the names of kinds for a message."""
    return ", ".join(kind.name for kind in kinds)
