"""One run of a model as the operations of ATen that it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch.utils import _pytree as pytree


class Made(NamedTuple):
    """A value of an operation: the operation by its number, and which of its values it is."""

    number: int
    place: int = 0


PART = "part"  # the operation that every value but the first comes from, of one that gives several
INPUT = "input"  # the operation that what a run is given comes from
CONSTANT = -1  # the number of what nothing of the run's input goes into
UNKNOWN = Made(CONSTANT)  # what made a constant, where nobody knows it
# Operations that read of this argument its shape or dtype alone.
OF_SHAPE = {f"aten.{name}.default": "other" for name in ("reshape_as", "view_as", "expand_as", "type_as")}
OF_SHAPE["aten.to.other"] = "other"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        name: ATen's, dotted: 'aten.add.Tensor'; `INPUT` for what the run is given.
        reads: the operations whose values it reads, by number, in the order of its arguments; not constants, which
            nothing of the run's input goes into.
        shape: of its value, or of the first of several.
        tensors: full names of the model's tensors that it reads.
        arguments: by the names of the operation's schema, None in place of tensors; not the defaults.
        call: the layer in whose run it happens, and the number of that run; ('', 0) outside of all.
        operands: by the names of the schema, the arguments that are tensors of the model: their full names, and the
            shapes that they are read in.
        within: the modules in whose runs it happens, the outermost first, each with the number of its run.
        computed: by the names of the schema, the arguments that are other constant tensors: what made them of tensors
            of the model; `UNKNOWN` where that isn't known.
    """

    name: str
    reads: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    call: tuple[str, int] = ("", 0)
    operands: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    within: tuple[tuple[str, int], ...] = ()
    computed: Mapping[str, Made] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """The operations of one run.

    Attributes:
        outputs: those whose values leave the run.
        kept: those whose values somebody still holds once the outputs are gone.
    """

    operations: Sequence[Operation]
    outputs: frozenset[int]
    kept: frozenset[int] = frozenset()


class Following(ABC):
    """A run while it is followed, operation by operation: which of these each of its values comes from.

    What is changed in place is another value from then on, for whoever reads that memory, under whatever name. So a
    value has two keys, one of its own and one of the memory that it lies in; what they are, subclasses say.

    Args:
        of: the type of the values.
        tensors: full names of the model's tensors, by memory.
        layers: of the model, by module path, those whose runs are told apart.
    """

    def __init__(self, of: type, tensors: Mapping[Any, str], layers: Container[str]) -> None:
        self.of, self.tensors, self.layers = of, tensors, layers
        self.operations: list[Operation] = []
        self.made: dict[Hashable, int] = {}  # the operation that made a value
        self.last: dict[Hashable, int] = {}  # the last one whose value lies in a piece of memory
        self.changed: dict[Hashable, int] = {}  # the last one that changed a piece of memory
        self.made_of: dict[Hashable, tuple[str, ...]] = {}  # the model's tensors that a constant is computed of
        self.constant: dict[Hashable, Made] = {}  # what made a constant of the model's tensors
        self.overwritten: dict[Hashable, int] = {}  # the last one that changed a constant in place, by memory

    @abstractmethod
    def key(self, value: Any) -> Hashable:
        """Return what a value is told apart by."""

    @abstractmethod
    def home(self, value: Any) -> Hashable:
        """Return what the memory that a value lies in is told apart by."""

    @abstractmethod
    def shape(self, value: Any) -> tuple[int, ...]:
        """Return a value's shape."""

    def number_in(self, value: Any) -> int | float | None:
        """Return the number that a value is to those that read it; None where nobody knows."""
        return None

    def values(self, tree: Any) -> list[Any]:
        """Return the values in arguments."""
        return [one for one in pytree.tree_leaves(tree, self._is_value) if self._is_value(one)]

    def _is_value(self, one: Any) -> bool:
        return isinstance(one, self.of)

    @abstractmethod
    def is_whole(self, value: Any) -> bool:
        """Return whether a value is all of one of the model's tensors, its numbers in their order, in any shape."""

    def begin(self, value: Any) -> None:
        """See what the run is given."""
        self.made[self.key(value)] = self.last[self.home(value)] = len(self.operations)
        self.operations.append(Operation(INPUT, shape=self.shape(value)))

    def read_by(self, name: str, given: Mapping[str, Any]) -> tuple[list[Any], tuple[int, ...]]:
        """Return the values whose numbers an operation reads, and the operations that they come from."""
        read = self.values([value for key, value in given.items() if key != OF_SHAPE.get(name)])
        return read, tuple(number for value in read if (number := self.number(value)) != CONSTANT)

    def see(
        self,
        name: str,
        given: Mapping[str, Any],
        reading: tuple[Sequence[Any], tuple[int, ...]],
        within: Sequence[tuple[str, int]],
        made: Sequence[Any],
        writes: Sequence[Any],
    ) -> Operation:
        """Add an operation.

        Args:
            given: its arguments, by the names of its schema.
            reading: what it reads, of `read_by`.
            within: the modules in whose runs it happens, the outermost first, each with the number of its run.
            made: its values.
            writes: those that it changes in place.
        """
        read, reads = reading
        tensors = tuple(one for value in read for one in self.model_tensors(value))
        for value in made if tensors and not reads else ():
            if self.home(value) not in self.tensors:
                self.made_of[self.home(value)] = tensors
        alone = {key: value for key, value in given.items() if self._is_value(value)}
        constants = {key: value for key, value in alone.items() if self.number(value) == CONSTANT}
        whole = {key: value for key, value in constants.items() if self.is_whole(value)}
        number = len(self.operations)
        operation = Operation(
            name,
            reads,
            self.shape(made[0]) if made else (),
            tensors,
            pytree.tree_map_only(self.of, self.number_in, dict(given), self._is_value),
            next((one for one in within if one[0] in self.layers), ("", 0)),
            {key: (self.tensors[self.home(value)], self.shape(value)) for key, value in whole.items()},
            tuple(within),
            {key: self._made_by(value) for key, value in constants.items() if key not in whole},
        )
        self.operations.append(operation)
        self._note(operation, number, made)
        for value in writes:
            self.overwritten[self.home(value)] = number
            if reads:  # whoever reads that memory from now on, by whatever name, reads the new value
                self.changed[self.home(value)] = number
        return operation

    def _note(self, operation: Operation, number: int, made: Sequence[Any]) -> None:
        """Note where an operation's values come from: each but the first from a part of it, an operation too."""
        none: dict[str, Any] = {"tensors": (), "arguments": {}, "operands": {}, "computed": {}}
        for place, value in enumerate(made):
            if operation.reads and place:
                part = replace(operation, name=PART, reads=(number,), shape=self.shape(value), **none)
                self.operations.append(part)
            if operation.reads:
                self.made[self.key(value)] = self.last[self.home(value)] = len(self.operations) - 1
            elif operation.tensors:
                self.constant[self.key(value)] = Made(number, place)

    def number(self, value: Any) -> int:
        """Return the operation that a value comes from: the last one that changed its memory, if that is later."""
        home = self.home(value)
        return max(self.made.get(self.key(value), self.last.get(home, CONSTANT)), self.changed.get(home, CONSTANT))

    def _made_by(self, value: Any) -> Made:
        """Return what a constant comes from, as far as it is made of the model's tensors."""
        made = self.constant.get(self.key(value), UNKNOWN)
        return UNKNOWN if self.overwritten.get(self.home(value), CONSTANT) > made.number else made

    def model_tensors(self, value: Any) -> tuple[str, ...]:
        """Return the model's tensor that a value is, or lies in; or those that it is computed of."""
        home = self.home(value)
        return (self.tensors[home],) if home in self.tensors else self.made_of.get(home, ())
