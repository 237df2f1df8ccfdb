"""One kind of layer as a value: all that is known of it stands in its module; `convtool.kinds` lists them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

from convtool.core.fields import Fields, FieldType
from convtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.core.conv import Conv
    from convtool.core.geometry import Geometry
    from convtool.core.stored import Stored
    from convtool.core.tree import Tree
    from convtool.kinds.scaling import Scaling

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]
Tensors: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's description.

    Attributes:
        name: in full.
        dtype: torch's name without the 'torch.'.
        derived_from: full names of the tensors that it is computed from (a weight norm's); of one that stands in the
            file, none.
        compute: makes it of those.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    derived_from: tuple[str, ...] = ()
    compute: Callable[..., Tensor] | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as it was found: the tensors that share a module path, or what was written in a layer's place.

    Attributes:
        name: module path ('' for a state dict of one bare module), or the text of a layer without tensors.
        kind: what it is, as far as names and shapes tell.
        tensors: by parameter name ('weight', 'running_mean', ...), what is computed from others included.
        fields: what its own text says ('avg_pool(2)'); of a layer of a checkpoint, nothing.
    """

    name: str
    kind: Kind
    tensors: Mapping[str, TensorInfo]
    fields: Fields = field(default_factory=dict)

    @property
    def shapes(self) -> Shapes:
        """Return the shape of each tensor by parameter name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def axes(self) -> int | None:
        """Return the number of spatial axes, where the layer tells."""
        return self.kind.axes(self.shapes, self.fields)

    def stored(self) -> Iterator[TensorInfo]:
        """Yield the tensors that stand in the file."""
        return (info for info in self.tensors.values() if not info.derived_from)

    def tensor_names(self) -> Iterator[str]:
        """Yield the full names of the layer's tensors in the file."""
        return (info.name for info in self.stored())


@dataclass(frozen=True, slots=True)
class Base:
    """The layer that an adapter changes, and its weight when it is asked for."""

    layer: Layer
    weight: Callable[[], Tensor]


class Channels(NamedTuple):
    """A number of channels, where it is known, and the layer or the option that says so."""

    channels: int | None
    origin: str = ""


class Reading(NamedTuple):
    """Another way to read a layer's tensors: the channels that it would take and give, and the setting that says so."""

    takes: int
    gives: int
    what: str
    setting: str


class Kind:
    """What is known of one kind of layer. This is one that only its tensors' names tell; others override.

    Attributes:
        name: as files, recipes and messages call it.
        tensors: its own, by parameter name, the one that tells its dtype first; none for a layer that is only written.
        counters: those of them that nothing is computed with.
        fields: what no tensor says of it, with the values that each takes; the first one needs no name where it is
            written, as in 'avg_pool(2)'.
        defaults: torch's value of each field that need not be said. What of a layer with tensors is taken from here is
            an assumption, and said to be one.
        by_rule: the fields that are assumed where something depends on them, and not asked for.
        channelwise: the fields that tell which channels meet, and so matter only where channels are mixed behind it.
        written: whether it can be written in a chain, as NAME(ARGUMENTS).
        usual_axes: the spatial axes of its input where neither its tensors nor anybody tell.
        main: whether it can take other layers in: the fused layer has its name and its dtype.
        spare: whether people expect it to be gone once a network is fused.
        channels_last: whether it runs over the last axis of its input, and so over a feature map only once that is
            flat.
        inverse: the name of the kind that undoes it with the same arguments, if there is one.
        reshapes: whether it makes a feature map flat, or a flat one a feature map.
        per_channel: whether it gives each channel a factor and an offset of its own, wherever that is in a feature map.
        parameter: whether its tensor is a parameter of the block that multiplies by it, which stays when it is gone.
        code: where a layer without tensors is in a model: in its code, in front of its input, or nowhere.
        neutral: whether it changes nothing, so that what stands before it and behind it is next to each other.
        adapts: whether it is a change of another layer, and a layer only with that one; see `convtool.kinds.adapter`.
        modules: dotted names of torch's classes that compute it, and nothing else.
        bare_modules: dotted names of torch's classes without tensors that compute it, where `of_module` says so.
        operations: dotted names of ATen's operations that compute it, where `of_operation` says so.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[frozenset[str]] = frozenset()
    fields: ClassVar[Mapping[str, FieldType]] = {}
    defaults: ClassVar[Fields] = {}
    by_rule: ClassVar[frozenset[str]] = frozenset()
    channelwise: ClassVar[frozenset[str]] = frozenset()
    written: ClassVar[bool] = False
    usual_axes: ClassVar[int] = 0
    main: ClassVar[bool] = False
    spare: ClassVar[bool] = False
    inverse: ClassVar[str] = ""
    channels_last: ClassVar[bool] = False
    reshapes: ClassVar[bool] = False
    per_channel: ClassVar[bool] = False
    parameter: ClassVar[bool] = False
    code: ClassVar[Literal["model", "input", "nowhere"]] = "model"
    neutral: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()
    bare_modules: ClassVar[tuple[str, ...]] = ()
    operations: ClassVar[tuple[str, ...]] = ()

    @property
    def label(self) -> str:
        """Return the name as a message says it: 'batch norm'."""
        return self.name.replace("_", " ")

    @property
    def settable(self) -> Mapping[str, FieldType]:
        """Return the fields that can be stated of a layer in a checkpoint."""
        return self.fields if self.tensors and not self.written else {}

    # --- recognising

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Return whether a module with these tensors is of this kind; the first one of the table that says so is."""
        return False

    def is_tensor(self, name: str, info: TensorInfo) -> bool:
        """Return whether a tensor of an otherwise unknown module, named in full, is a layer of this kind by itself."""
        return False

    def check_found(self, layer: Layer) -> None:
        """Raise RefusedError where a layer found by its module's name may be something else that looks like it."""

    def applied(self, layer: Layer, base: Base, fields: Fields) -> Layer:
        """Return the layer that an adapter adds to the one that it changes."""
        raise NotImplementedError

    def assumed(self, layer: Layer, fields: Fields) -> list[str]:
        """Return what nobody says of an adapter, in words."""
        return []

    # --- channels and axes

    def axes(self, shapes: Shapes, fields: Fields) -> int | None:
        """Return the number of spatial axes, where tensors or fields tell."""
        return None

    def width(self, shapes: Shapes, fields: Fields) -> int | None:
        """Return the channels of a layer that gives as many as it takes, as far as it tells."""
        return None

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        """Return the channels of the input, as far as these or the output's settle them; else None."""
        return gives if (known := self.width(shapes, fields)) is None else known

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        """Return the channels of the output, as far as these or the input's settle them; else None."""
        return takes if (known := self.width(shapes, fields)) is None else known

    def infer(self, shapes: Shapes, fields: Fields, takes: Channels, gives: int | None) -> tuple[Fields, list[str]]:
        """Return the fields that follow from shapes and channels, and those of them in words that are worth saying.

        Args:
            fields: those that are stated.
            takes: the channels of the input and who says so, as far as anybody does.
            gives: the channels that the output has to have, where that is known.
        """
        return {}, []

    def trials(self, shapes: Shapes, fields: Fields, gives: int | None) -> Mapping[str, Sequence[object]]:
        """Return values to try for the fields that only geometry hangs on, to see whether a result depends on them.

        The first of each is its default. Other fields always matter, but for `channelwise` ones.

        Args:
            fields: those that are known.
            gives: the channels that the output has to have, where that is known.
        """
        return {}

    def apart(self, name: str, tensors: Tensors) -> tuple[float, str] | None:
        """Return by how many percent usual values of a field move the layer's numbers apart, and these values."""
        return None

    def with_fields(self, geometry: Geometry, fields: Fields) -> Geometry:
        """Return the geometry of a lowered layer that has these fields instead of its own; its groups are kept."""
        return geometry

    def other_readings(self, shapes: Shapes) -> Iterator[Reading]:
        """Yield what else tensors of these shapes could be, for messages about channels that don't fit."""
        return iter(())

    def moves_over(self, rank: int, shapes: Shapes, fields: Fields) -> int | None:
        """Return the spatial axes that it runs over in an input of `rank` axes; None where it reads it another way.

        Those are the axes behind the channels, which are axis 1; 0 where the channels are the last axis.
        """
        return rank - 2 if rank >= 2 else None

    def check_input(self, fields: Fields, size: tuple[int, ...]) -> None:
        """Raise UsageError where inputs of that spatial size aren't what the layer's fields say of them."""

    def over(self, fields: Fields, axes: int) -> Fields:
        """Return the fields of a layer that is written, over that many axes, as `takes` and `gives` need them."""
        return fields

    # --- the numbers

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        """Return the layer as a `Conv`.

        Args:
            tensors: by parameter name; those that the layer has, which are finite and floating-point.
            fields: those of `fields` that are stated; the defaults hold for the rest.
            axes: spatial axes of its input, for the kinds whose tensors don't tell.
            channels: of its input, for a layer without tensors; None for the others.

        Raises:
            UsageError, InputError, RefusedError: what doesn't fit.
        """
        raise NotImplementedError

    def written_out(self, fields: Fields, shapes: Shapes) -> Fields:
        """Return the given fields in the form that records have, with a value for each axis where it is known."""
        return fields

    def check_fields(self, fields: Fields) -> None:
        """Raise UsageError for fields that no layer of this kind could have."""
        if unknown := fields.keys() - self.settable.keys():
            raise UsageError(f"a {self.label} has no {', '.join(sorted(unknown))}")

    def parts(self, conv: Conv, tensors: Tensors, fields: Fields) -> Tree[Conv]:
        """Return the lowered layer as what it is held against: by another route than `lower`, where there is one."""
        return conv

    def stored(self, conv: Conv, tensors: Tensors, fields: Fields) -> Tree[Stored]:
        """Return the lowered layer with the most that storing its tensors can have moved each number by."""
        from convtool.core.stored import stored

        return stored(conv)

    def undone_by(self, fields: Fields) -> Fields | None:
        """Return the fields with which the kind `inverse` undoes this layer; None where nothing does."""
        return fields if self.inverse else None

    def doubt(self, layer: Layer, conv: Conv) -> str:
        """Return what a found layer may be instead, as its numbers look; '' where nothing speaks for it."""
        return ""

    def scaling(self, shapes: Shapes, stored: Tensor | None, fields: Fields, name: str) -> Scaling | None:
        """Return by what an adapter's change is multiplied; None of any other kind."""
        return None

    # --- live modules, and operations of a run

    def of_operation(self, name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Fields | None:
        """Return the fields of the layer that one of `operations` is; None where it is something else.

        Args:
            arguments: those that it was given, by the names of its schema, None for tensors; not the defaults.
            takes, gives: the shapes of what it reads and makes, batch first.
        """
        return None

    def timed(self, conv: Conv, x: Tensor) -> Callable[[], Tensor]:
        """Return what runs the layer on x as a model would, to be timed."""
        from convtool.core.forward import forward

        return lambda: forward(conv, x)

    def module_fields(self, module: Any) -> Fields:
        """Return the fields that a module of one of `modules` has as attributes.

        Raises:
            RefusedError: why it isn't this layer for all that.
        """
        return {name: getattr(module, name) for name in self.fields}

    def of_module(self, module: Any, size_of: Callable[[], tuple[int, ...] | None]) -> Fields:
        """Return the fields of the layer that a module of one of `bare_modules` is.

        Args:
            size_of: returns the size of the feature map that it reads, None where that isn't known.

        Raises:
            RefusedError: why it isn't this layer for all that.
            UsageError: it takes the size to tell.
        """
        return {}

    def fields_of_run(self, run: Sequence[tuple[str, Mapping[str, Any]]], shapes: Shapes) -> Fields | None:
        """Return the fields of a layer that these operations of ATen are a run of; None where they do anything else.

        Args:
            run: names and arguments, in order.
        """
        return None

    def observe(self, run: Callable[[Tensors, Tensor], Tensor], shapes: Shapes) -> Fields | None:
        """Return the fields of a module of unknown class that has this kind's tensors, found by running it.

        Args:
            run: computes the module's output with the tensors given in place of its own.

        Returns:
            None where it computes something else.
        """
        return None

    def claim(self, fields: Fields, shapes: Shapes) -> str:
        """Return the given fields that numbers or sizes hang on, those at their defaults too."""
        return ", ".join(self.say(name, value) for name, value in self.written_out(fields, shapes).items())

    def say(self, name: str, value: Any) -> str:
        """Return a field and its value in words."""
        return f"{name} {format_value(value)}"

    def describe(self, fields: Fields, shapes: Shapes) -> str:
        """Return the fields in words, equal for two layers exactly if they mean the same."""
        return ", ".join(f"{name} {format_value(value)}" for name, value in {**self.defaults, **fields}.items())


class Unknown(Kind):
    """Whatever is no other kind; it is listed, copied, and never computed with."""

    name = "other"


UNKNOWN = Unknown()


def check_size(count: int, layer: str) -> None:
    """Raise UsageError where a layer without tensors would need a kernel of more numbers than anyone means."""
    from convtool.core.conv import MOST_NUMBERS

    if count > MOST_NUMBERS:
        raise UsageError(f"{layer}: a kernel of {count} numbers is more than the {MOST_NUMBERS} that are built")


def format_value(value: Any) -> str:
    """Return a field's value in words."""
    return f"{value:g}" if isinstance(value, float) else str(value)
