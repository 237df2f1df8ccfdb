"""One run of a model as the operations of ATen that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Made(NamedTuple):
    """A value of an operation: the operation by its number, and which of its values it is."""

    number: int
    place: int = 0


INPUT = "input"  # the operation that what a run is given comes from
UNKNOWN = Made(-1)  # what made a constant, where nobody knows it


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
