"""A run of a model as a file describes it: its operations, what each reads, and in the run of which module it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Value(NamedTuple):
    """A tensor of the run, by the name that the file has for it."""

    name: str


class Inside(NamedTuple):
    """A module in whose run an operation happens.

    Attributes:
        run: the same for all operations of one run of it.
        path: of the module.
        cls: its class, dotted.
    """

    run: str
    path: str
    cls: str


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        name: ATen's, dotted: 'aten.add.Tensor'; another namespace's where it is of one.
        arguments: by the names of the operation's schema, with a `Value` for each tensor; not the defaults.
        gives: its values, the first of them what it computes.
        inside: the modules in whose runs it happens, the outermost first.
    """

    name: str
    arguments: Mapping[str, Any]
    gives: tuple[Value, ...]
    inside: tuple[Inside, ...] = ()

    def reads(self) -> Iterator[Value]:
        """Yield the tensors that it reads, in the order of its arguments."""
        for value in self.arguments.values():
            yield from values_in(value)


@dataclass(frozen=True, slots=True)
class Program:
    """The operations of a run, in order.

    Attributes:
        inputs: what the run is given.
        tensors: full names of the model's tensors, and of constants, by the values that they are.
        outputs: what leaves the run.
        shapes: of values; of a size that isn't fixed, the one that the run was followed with.
    """

    nodes: Sequence[Node]
    inputs: tuple[Value, ...]
    tensors: Mapping[Value, str]
    outputs: tuple[Value, ...]
    shapes: Mapping[Value, tuple[int, ...]]


def values_in(tree: Any) -> Iterator[Value]:
    """Yield the values in an argument, which may be a list of them."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, list):
        for one in tree:
            yield from values_in(one)
