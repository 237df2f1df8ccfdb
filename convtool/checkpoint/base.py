"""What every kind of checkpoint file offers."""

from __future__ import annotations

import abc
from collections.abc import Container, Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convtool.checkpoint.find import find_layer, named_part
from convtool.errors import ConvtoolError, InputError
from convtool.kinds.found import group_layers, why_not_plain
from convtool.kinds.kind import Layer, TensorInfo, to_conv

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.checkpoint.record import Record
    from convtool.core.conv import Conv
    from convtool.core.fields import Fields
    from convtool.core.geometry import Padding, PerAxis
    from convtool.formats.source import Receiver


class Place(NamedTuple):
    """A stretch of memory: bytes start to stop of a storage, between which all of a tensor's elements lie."""

    storage: Hashable
    start: int
    stop: int

    def meets(self, other: Place) -> bool:
        return self.storage == other.storage and self.start < other.stop and other.start < self.stop


class Checkpoint(abc.ABC):
    """An open checkpoint: its table of contents at once, its tensors when asked for.

    Attributes:
        path: of the file.
        format: its name, as `inspect` shows it.
        infos: every tensor's description by full name, in the file's order.
        unusable: entries that are tensors and can't be computed with: what they are, and what to do.
    """

    format: str
    infos: Mapping[str, TensorInfo]
    unusable: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensor(self, name: str) -> Tensor:
        """The tensor of that full name, mapped from the file where the format allows; not to be written to.

        A weight that a weight norm makes of two others is computed in float64 and rounded once.

        Raises:
            InputError: its bytes are damaged, or of a dtype that torch doesn't have.
        """
        if name in self.infos:
            return self.stored_tensor(name)
        derived = self._derived[name]
        assert derived.compute is not None
        return derived.compute(*map(self.stored_tensor, derived.derived_from))

    @abc.abstractmethod
    def stored_tensor(self, name: str) -> Tensor:
        """A tensor that stands in the file."""

    @abc.abstractmethod
    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, row-major, in pieces that are each valid until the next is asked for."""

    def copy_to(self, name: str, file: Receiver) -> None:
        """Write the tensor's bytes to a file; as of `chunks`, where a format has no faster way."""
        for chunk in self.chunks(name):
            file.write(chunk)

    @abc.abstractmethod
    def memory(self, name: str) -> Hashable:
        """What tensors have in common that are the same elements of the same memory (tied ones)."""

    @abc.abstractmethod
    def bits(self, name: str) -> Tensor:
        """The tensor's bytes, row-major, as a flat uint8 tensor; also of dtypes that torch doesn't have."""

    def place(self, name: str) -> Place:
        """Where a tensor's elements lie; in memory of its own, where a format knows no other."""
        return Place(name, 0, self.infos[name].nbytes)

    def sharing(self, names: Container[str]) -> Iterator[tuple[str, str]]:
        """Pairs of tensors that share memory, tied or overlapping, of which the first is one of `names`."""
        places = [(self.place(name), name) for name in self.infos]
        own = [(place, name) for place, name in places if name in names]
        for place, name in own:
            yield from ((name, other) for there, other in places if other != name and place.meets(there))

    def overlapping(self) -> tuple[str, str] | None:
        """Two tensors that share memory without being the same elements of it; None where there are none."""
        storages: dict[Hashable, list[tuple[int, int, str]]] = {}
        for name in self.infos:
            place = self.place(name)
            if place.start < place.stop:
                storages.setdefault(place.storage, []).append((place.start, place.stop, name))
        for places in storages.values():
            places.sort()
            end, last = 0, places[0][2]
            for start, stop, name in places:
                if start < end and self.memory(name) != self.memory(last):
                    return last, name
                end, last = max(end, stop), name
        return None

    @property
    def others(self) -> list[str]:
        """Names of entries that aren't tensors of plain numbers."""
        return []

    @property
    def left_out(self) -> list[str]:
        """All that a file of the tensors alone would not hold."""
        return self.others

    @property
    @abc.abstractmethod
    def record(self) -> Record | None:
        """What convtool recorded when it wrote the file, or None.

        Raises:
            InputError: there is a record, and it is damaged.
        """

    @cached_property
    def _derived(self) -> dict[str, TensorInfo]:
        infos = (info for layer in self.layers.values() for info in layer.tensors.values())
        return {info.name: info for info in infos if info.derived_from}

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers by module path, in the file's order."""
        return group_layers(self.infos.values())

    def layer(self, name: str) -> Layer:
        """Return the layer of that name.

        Raises:
            UsageError: there is none; the nearest names are suggested.
            InputError: it has a tensor that can't be computed with.
        """
        for key, reason in self.unusable.items():
            if name in (key, key.rpartition(".")[0]):
                raise InputError(f"{self.path}: {key} {reason}")
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
        return self.lower(layer, fields, layer.kind.usual_axes if spatial_axes is None else spatial_axes)

    def part(self, name: str) -> Layer:
        """Return the layer of that name; of a tensor's full name, where it can be a scale per channel, that alone.

        Raises:
            UsageError, InputError: as `layer`.
            RefusedError: it may be a norm that only looks like a scale.
        """
        return named_part(self.layer(name), name)

    def tensors_of(self, layer: Layer) -> dict[str, Tensor]:
        """Return a layer's tensors by parameter name, those computed from others included."""
        return {name: self.tensor(info.name) for name, info in layer.tensors.items()}

    def lower(self, layer: Layer, fields: Fields, axes: int) -> Conv:
        """Return a layer of this checkpoint, with the given fields, as a `Conv`; see `convtool.kinds.kind.to_conv`."""
        where = f"{self.path}: {layer.name or 'the bare module'}"
        try:
            return to_conv(layer, self.tensors_of(layer), fields, axes, why_not=why_not_plain(layer.tensors))
        except ConvtoolError as error:
            raise type(error)(f"{where}: {error}") from None
