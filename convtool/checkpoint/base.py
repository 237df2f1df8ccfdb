"""What every kind of checkpoint file offers."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from convtool.checkpoint.info import Layer, TensorInfo, find_layer, group_layers

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.checkpoint.record import Record
    from convtool.core.conv import Conv
    from convtool.core.geometry import Padding, PerAxis


class Checkpoint(abc.ABC):
    """An open checkpoint: its table of contents at once, its tensors when asked for.

    Attributes:
        path: of the file.
        format: its name, as `inspect` shows it.
        infos: every tensor's description by full name, in the file's order.
    """

    format: str
    infos: Mapping[str, TensorInfo]

    def __init__(self, path: Path) -> None:
        self.path = path

    @abc.abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor of that full name, mapped from the file where the format allows; not to be written to."""

    @abc.abstractmethod
    def bits(self, name: str) -> Tensor:
        """The tensor's bytes, row-major, as a flat uint8 tensor; also of dtypes that torch doesn't have."""

    @property
    @abc.abstractmethod
    def record(self) -> Record | None:
        """What convtool recorded when it wrote the file, or None.

        Raises:
            InputError: there is a record, and it is damaged.
        """

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers by module path, in the file's order."""
        return group_layers(self.infos.values())

    def layer(self, name: str) -> Layer:
        """The layer of that name; UsageError with the nearest names where there is none."""
        return find_layer(self.layers, name, str(self.path))

    def conv(
        self,
        name: str,
        *,
        stride: PerAxis | None = None,
        padding: Padding | None = None,
        dilation: PerAxis | None = None,
        groups: int | None = None,
        padding_mode: str | None = None,
        transposed: bool | None = None,
        output_padding: PerAxis | None = None,
        eps: float | None = None,
        spatial_axes: int | None = None,
    ) -> Conv:
        """A layer of the checkpoint as a `Conv`.

        Args:
            name: module path.
            stride, padding, dilation, groups, padding_mode, transposed, output_padding: as in torch, and see
                `convtool.conv`; where None, what convtool recorded in the file, else nn.Conv's default.
            eps: of a batch norm; 1e-5 where None.
            spatial_axes: for a batch norm or a linear layer, whose tensors don't tell; 2 and 0 where None.

        Raises:
            UsageError: no such layer, or the fields don't fit it.
            InputError: the layer is of a kind that isn't linear or can't be read.
        """
        from convtool.checkpoint.lower import lower_layer

        given = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "transposed": transposed,
            "output_padding": output_padding,
            "eps": eps,
        }
        layer = self.layer(name)
        recorded = self.record.fields().get(layer.name, {}) if self.record else {}
        fields = recorded | {field: value for field, value in given.items() if value is not None}
        if spatial_axes is None:
            spatial_axes = {"batch_norm": 2}.get(layer.kind, 0)
        return lower_layer(self, layer, fields, spatial_axes)
