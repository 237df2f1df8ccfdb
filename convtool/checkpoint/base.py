"""Named tensors, from wherever they come: of a file, of several that an index names, or in memory."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.checkpoint.find import find_layer, named_part
from convtool.checkpoint.record import Record, UnknownRecordError, loads
from convtool.checkpoint.saved_fields import classes_in_program, fields_of_modules, fields_of_program, other_classes
from convtool.core.names import is_written
from convtool.errors import InputError, UsageError, did_you_mean
from convtool.formats.indexes import RECORD_KEY
from convtool.formats.pieces import Piece
from convtool.formats.tensor_file import Place, TensorFile
from convtool.kinds import field_types
from convtool.kinds.found import group_layers, why_not_plain
from convtool.kinds.kind import Layer, TensorInfo
from convtool.kinds.to_conv import to_conv
from convtool.kinds.written import read_layer, with_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.core.conv import Conv
    from convtool.core.fields import Fields


class Checkpoint:
    """An open checkpoint: its table of contents at once, its tensors when asked for.

    Attributes:
        path: of the file, or of the index.
        format: its name, as `inspect` shows it.
        infos: every tensor's description by full name, in the file's order.
        unusable: entries that are tensors and can't be computed with: what they are, and what to do.
        files: the files that it is in; by the names that the index gives them, in its order, where there is one.
        index: what the index says: `weight_map` and `metadata`; None where there is none.
        root: the keys that lead to the tensors, in a file of dicts in dicts.
        metadata: the texts that a .safetensors file made of it has.
        others: entries that aren't tensors of plain numbers, and what they are.
        left_out: all that a file of the tensors alone would not hold, and what it is.
        replaced: what even a file of the same format would not hold: a pickled module, whose state dict is written.
        program: the run of a model that the file describes, where it does.
        classes: classes and functions that the files name, dotted, and that no state dict is made of; none is looked
            up.
        optimizers: names of entries beside the tensors that hold what optimizers keep of each parameter.

    Args:
        files: one, or with an index several; none where a subclass has the tensors from elsewhere.
    """

    format: str
    infos: Mapping[str, TensorInfo]

    def __init__(
        self, path: Path, files: Mapping[str, TensorFile] | None = None, index: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.files, self.index = path, files or {}, index
        self._homes: Mapping[str, str] = {} if index is None else index["weight_map"]
        self._only = self.files.get("")
        self.root, self.program = (self._only.root, self._only.program) if self._only is not None else ((), None)
        each, told = self.files.values(), ("unusable", "metadata", "others", "left_out", "replaced", "modules")
        tables = ({key: one for file in each for key, one in getattr(file, name).items()} for name in told)
        self.unusable, self.metadata, self.others, self.left_out, self.replaced, self._modules = tables
        self.classes = list(dict.fromkeys(name for file in each for name in file.classes))
        self.optimizers = [name for file in each for name in file.optimizers]
        if not self.files:
            return
        if index is not None:
            self._check()
        # A name in an index may also be of a tensor that can't be computed with.
        described = ((name, self._home(name).tensors.get(name)) for name in self._homes or self._home("").tensors)
        self.infos = {
            name: TensorInfo(name, one.dtype, one.shape, one.nbytes) for name, one in described if one is not None
        }
        formats = " and ".join(sorted({file.format for file in self.files.values()}))
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        self.format = formats if index is None else f"{formats} in {count}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.format}, {len(self.infos)} tensors)"

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of that full name, read from its file.

        A weight that a weight norm makes of two others is computed in float64 and rounded once.

        Raises:
            InputError: its bytes are damaged, or of a dtype that torch doesn't have.
        """
        return self.made(self.infos.get(name) or self._derived[name])

    def made(self, info: TensorInfo) -> Tensor:
        """Return a tensor as it stands in a file, or as it is computed from others."""
        if info.compute is None:
            return self.stored_tensor(info.name)
        return info.compute(*map(self.stored_tensor, info.derived_from))

    def stored_tensor(self, name: str) -> Tensor:
        """Return a tensor that stands in a file."""
        return self._home(name).tensor(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes, row-major, in pieces; each is valid until the next is asked for."""
        return (chunk.data for chunk in self.piece(name).chunks())

    def piece(self, name: str) -> Piece:
        """Return the tensor as it goes into a file."""
        piece = self._home(name).piece(name)
        return replace(piece, memory=(self._homes.get(name), piece.memory))

    def place(self, name: str) -> Place:
        """Return where a tensor's elements lie; in memory of its own, where nothing else is known."""
        if not self.files:
            return Place(name, 0, self.infos[name].nbytes)
        place = self._home(name).place(name)
        return place._replace(storage=(self._homes.get(name), place.storage))

    def sharing(self, names: Container[str]) -> Iterator[tuple[str, str]]:
        """Yield pairs of tensors that share memory, tied or overlapping, of which the first is one of `names`."""
        for places in self._by_storage():
            for place, name in places if len(places) > 1 else ():
                others = places if name in names else ()
                yield from ((name, other) for there, other in others if other != name and place.meets(there))

    def overlapping(self) -> tuple[str, str] | None:
        """Return two tensors that share memory without being the same elements of it; None where there are none."""
        for places in self._by_storage():
            end, last = 0, ""
            for place, name in sorted((place, name) for place, name in places if place.start < place.stop):
                if place.start < end and self.piece(name).memory != self.piece(last).memory:
                    return last, name
                end, last = max(end, place.stop), name
        return None

    def _by_storage(self) -> Iterable[list[tuple[Place, str]]]:
        """Return where tensors lie and their names, those of each storage together."""
        stored: dict[Hashable, list[tuple[Place, str]]] = {}
        for name in self.infos:
            place = self.place(name)
            stored.setdefault(place.storage, []).append((place, name))
        return stored.values()

    def in_order_of_bytes(self) -> list[str]:
        """Return the tensors' names in the order of their bytes, where a new file is to keep that."""
        return list(self.infos) if self._only is None else self._only.in_order_of_bytes()

    @cached_property
    def stated(self) -> dict[str, Fields]:
        """The fields that the file itself states of its layers, by layer, beside a record of convtool's."""
        run = {} if self.program is None else fields_of_program(self.layers, self.program)
        return fields_of_modules(self.layers, self._modules) | run

    @cached_property
    def other_classes(self) -> dict[str, str]:
        """The classes of its modules that aren't torch's own, by path; what those compute isn't known."""
        run = {} if self.program is None else classes_in_program(self.program)
        return run | other_classes(self._modules)

    @property
    def record(self) -> Record | None:
        """What convtool recorded when it wrote the file, or None; also None for a record that is unknown.

        Raises:
            InputError: there is a record, and it is damaged.
        """
        found = self._record
        return None if isinstance(found, UnknownRecordError) else found

    @property
    def unknown_record(self) -> str:
        """Why the record that is there says what this version doesn't know, in words; '' where it doesn't."""
        return str(self._record) if isinstance(self._record, UnknownRecordError) else ""

    @cached_property
    def _record(self) -> Record | UnknownRecordError | None:
        text = self._home("").record() if self.index is None else self.index["metadata"].get(RECORD_KEY)
        if not isinstance(text, str | None):
            raise InputError(f"{self.path}: its convtool record is damaged (expected text)")
        try:
            return None if text is None else loads(text, str(self.path))
        except UnknownRecordError as unknown:
            return unknown

    def _home(self, name: str) -> TensorFile:
        """Return the file that a tensor is in."""
        return self.files[self._homes.get(name, "")]

    def _check(self) -> None:
        """Check that the index and the files name the same tensors."""
        for name, home in self._homes.items():
            if name not in self.files[home].tensors and name not in self.files[home].unusable:
                raise InputError(f"{self.path}: is damaged: {name!r} is not in {home}, where the index has it")
        there = sum(file.source.size for file in self.files.values())
        most = max(there, sum(one.nbytes for file in self.files.values() for one in file.tensors.values()))
        if self.index is not None and self.index["metadata"].get("total_size", 0) > most:
            total = self.index["metadata"]["total_size"]
            raise InputError(f"{self.path}: is damaged: its total_size is {total}, and its files have {there} bytes")
        for home, file in self.files.items():
            stray = next((name for name in file.tensors if self._homes.get(name) != home), None)
            if stray is not None:
                raise InputError(f"{self.path}: is damaged: {home} holds {stray!r}, which the index doesn't have there")

    @property
    def odd_total(self) -> str:
        """What is odd about the index's total_size, in words; '' where nothing is.

        Writers don't agree on what they count: huggingface_hub bytes of storages, so tensors that are tied once;
        transformers before that each of them; mlx bytes of files; what trains in parts has written the size of one part
        or of parameters that were elsewhere. No reader looks at it, and that every tensor is there and whole is known
        from the files. So a total that is larger than any of these counts is damage, and a smaller one is said.
        """
        total = None if self.index is None else self.index["metadata"].get("total_size")
        if total is None or self.unusable:
            return ""
        least = sum(stop - start for _, start, stop in set(map(self.place, self.infos)))
        if total >= least:
            return ""
        return f"its total_size is {total}, and the tensors that it names have {least} bytes; they are all there"

    def is_biased(self, name: str) -> bool:
        """Return whether a layer's bias has anything but zeros in it, as far as it has numbers."""
        info = self.layer(name).tensors.get("bias")
        bias = None if info is None else self.tensor(info.name)
        return bias is not None and (bias.is_meta or bool(bias.count_nonzero()))

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
        if not isinstance(name, str):
            raise UsageError(f"expected a layer's name, got {name!r}")
        for key, reason in self.unusable.items():
            if name in (key, key.rpartition(".")[0]):
                raise InputError(f"{self.path}: {key} {reason}")
        return find_layer(self.layers, name, str(self.path))

    def conv(self, name: str, *, spatial_axes: int | None = None, **fields: Any) -> Conv:
        """Return a layer of the checkpoint as a `Conv`.

        Args:
            name: module path.
            spatial_axes: for a batch norm or a linear layer, whose tensors don't tell; 2 and 0 where None.
            fields: stride, padding, dilation, groups, padding_mode, transposed, output_padding as in torch, and see
                `convtool.conv`; eps of a batch norm. Where None, what convtool recorded in the file, else nn.Conv's
                default. Of a layer that convtool made, what it could not record has to be passed, and eps where no
                record states it.

        Raises:
            UsageError: no such layer, the fields don't fit it, or one that matters is stated nowhere.
            InputError: the layer is of a kind that isn't linear or can't be read.
        """
        known = [*field_types(), "spatial_axes"]
        for other in fields.keys() - known:
            raise UsageError(f"conv: a layer has no field {other!r}{did_you_mean(other, known)}")
        layer = self.layer(name)
        recorded = (self.record.fields() if self.record else self.stated).get(layer.name)
        fields = {**(recorded or {}), **{field: value for field, value in fields.items() if value is not None}}
        missing = self._missing(layer, fields, made=recorded is not None)
        if missing:
            raise UsageError(
                f"{self.path}: {layer.name}: nobody states its {', '.join(missing)}; pass"
                f" {', '.join(f'{name}=...' for name in missing)}"
            )
        return self.lower(layer, fields, layer.kind.usual_axes if spatial_axes is None else spatial_axes)

    def _missing(self, layer: Layer, fields: Fields, made: bool) -> list[str]:
        """Return the fields of a layer that have to be passed, as it depends on them.

        Args:
            made: by convtool, so that its code has something else than the defaults perhaps.
        """
        tried = layer.kind.trials(layer.shapes, fields, None)
        asked = [name for name in layer.kind.defaults if name not in fields and name in layer.kind.settable]
        free = layer.kind.by_rule | (frozenset() if made else layer.kind.channelwise | tried.keys())
        return [name for name in asked if name not in free and len(tried.get(name, (0, 1))) > 1]

    def part(self, name: str) -> Layer:
        """Return the layer of that name; of a tensor's full name, where it can be a scale per channel, that alone.

        One that is written ('avg_pool(2)') has those tensors of the checkpoint that it names.

        Raises:
            UsageError, InputError: as `layer`.
            RefusedError: it may be a norm that only looks like a scale.
        """
        if is_written(name):
            return with_tensors(read_layer(name), self.infos)
        return named_part(self.layer(name), name)

    def tensors_of(self, layer: Layer) -> Mapping[str, Tensor]:
        """Return a layer's tensors by parameter name, those computed from others included, each read when asked for."""
        return _Tensors(self, layer)

    def lower(self, layer: Layer, fields: Fields, axes: int, channels: int | None = None) -> Conv:
        """Return a layer of this checkpoint, with the given fields, as a `Conv`; see `convtool.kinds.to_conv`."""
        where = f"{self.path}: {layer.name or 'the bare module'}"
        return to_conv(layer, self.tensors_of(layer), fields, axes, where, why_not_plain(layer.tensors), channels)


class _Tensors(Mapping[str, "Tensor"]):
    """The tensors of one layer; see `Checkpoint.tensors_of`."""

    def __init__(self, checkpoint: Checkpoint, layer: Layer) -> None:
        self.checkpoint, self.layer = checkpoint, layer

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.made(self.layer.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.tensors)

    def __len__(self) -> int:
        return len(self.layer.tensors)
