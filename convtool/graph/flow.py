"""The data flow of one run of a model, as a value, and the linear stretches in it.

A stretch is a tree of layers between whose members nothing happens: each value inside of it is read once, by the next
member. So one layer can stand for all of them, or for any part that is next to each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from convtool.core.geometry import format_sizes
from convtool.core.tree import Chain, LayerRef, Sum, Tree


class Op(Enum):
    """What a step of a run is."""

    LAYER = "layer"  # a named linear layer
    ADD = "add"  # values of one shape, added
    PASS = "pass"  # the value as it is: a dropout at rest, a copy
    FLATTEN = "flatten"  # (N, C, *size) -> (N, C * prod(size))
    OTHER = "other"  # everything else, the model's inputs too


@dataclass(frozen=True, slots=True)
class Step:
    """One operation.

    Attributes:
        op: its kind.
        name: module path of a layer; else what the operation is called.
        reads: the steps whose values it reads, by number.
        shape: of its value.
        axes: of a layer: the spatial axes that it moves over, behind the channels at axis 1; 0 where the channels are
            the last axis.
        flattens: of a linear layer, whether it may follow a flatten.
    """

    op: Op
    name: str
    reads: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    axes: int = 0
    flattens: bool = False


@dataclass(frozen=True, slots=True)
class Flow:
    """One run.

    Attributes:
        steps: in order; a step reads earlier ones only.
        outputs: the numbers of the steps whose values leave the run, or are kept.
        apart: layers that must stay as they are, with the reason.
        tracer: what followed the run.
        remarks: what its user should know of it.
    """

    steps: tuple[Step, ...]
    outputs: frozenset[int]
    apart: Mapping[str, str]
    tracer: str
    remarks: tuple[str, ...] = ()

    def calls(self) -> list[Step]:
        """The layers' steps."""
        return [step for step in self.steps if step.op is Op.LAYER]

    def input_shape(self, step: Step) -> tuple[int, ...]:
        """Shape of what a layer reads."""
        return self.steps[step.reads[0]].shape

    def barred(self) -> dict[str, str]:
        """The layers that no fusion may touch, with the reason: those apart, and those that run more than once."""
        counts = Counter(step.name for step in self.calls())
        often = {name: f"it runs {count} times" for name, count in counts.items() if count > 1}
        return {**often, **self.apart}


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layers with nothing in between.

    Attributes:
        tree: their names, in chains and sums, flatten(...) among them.
        shape: of the value that they read.
        axes: spatial axes of that value.
    """

    tree: Tree[LayerRef]
    shape: tuple[int, ...]
    axes: int


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Two layers with nothing in between that are left alone all the same."""

    first: str
    second: str
    reason: str


@dataclass(slots=True)
class _Open:
    """A stretch while it grows: what it reads, its members, and the axes of its value."""

    source: int
    parts: list[Tree[LayerRef]]
    axes: int
    start_axes: int
    flattened: bool = field(default=False)


def find_stretches(flow: Flow) -> tuple[list[Stretch], list[Obstacle]]:
    """Every maximal stretch of a run, those of a single layer too, in order; and what kept neighbours apart."""
    finder = _Finder(flow)
    for number, step in enumerate(flow.steps):
        finder.take(number, step)
    return finder.stretches(), finder.obstacles


class _Finder:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.barred = flow.barred()
        self.readers = Counter(number for step in flow.steps for number in step.reads)
        self.readers.update(flow.outputs)
        self.growing: dict[int, _Open] = {}  # by the step whose value they end with
        self.obstacles: list[Obstacle] = []

    def take(self, number: int, step: Step) -> None:
        if step.op is Op.LAYER:
            self._layer(number, step)
        elif step.op is Op.ADD:
            self._add(number, step)
        elif step.op is Op.PASS:
            before = self._ended_by(step.reads[0])
            if before is not None:
                self._move(step.reads[0], number, before)
        elif step.op is Op.FLATTEN:
            self._flatten(number, step)

    def stretches(self) -> list[Stretch]:
        found = []
        for grown in self.growing.values():
            parts = grown.parts[:-1] if grown.flattened else grown.parts
            tree = parts[0] if len(parts) == 1 else Chain(tuple(parts))
            found.append(Stretch(tree, self.flow.steps[grown.source].shape, grown.start_axes))
        return found

    def _ended_by(self, value: int) -> _Open | None:
        """The stretch that ends with a value, where that is read once only."""
        return self.growing.get(value) if self.readers[value] == 1 else None

    def _move(self, value: int, number: int, grown: _Open) -> None:
        del self.growing[value]
        self.growing[number] = grown

    def _layer(self, number: int, step: Step) -> None:
        value = step.reads[0]
        barred = step.name in self.barred
        before = None if barred else self._ended_by(value)
        if before is not None and before.axes == step.axes and (step.flattens or not before.flattened):
            before.parts.append(LayerRef(step.name))
            before.flattened = False
            self._move(value, number, before)
            return
        self._note(value, step)
        if not barred:
            self.growing[number] = _Open(value, [LayerRef(step.name)], step.axes, step.axes)

    def _flatten(self, number: int, step: Step) -> None:
        value = step.reads[0]
        shape = self.flow.steps[value].shape
        before = self._ended_by(value)
        if before is not None and before.axes == len(shape) - 2 > 0:
            before.parts.append(LayerRef(f"flatten({format_sizes(shape[2:])})"))
            before.axes, before.flattened = 0, True
            self._move(value, number, before)

    def _add(self, number: int, step: Step) -> None:
        branches = [self._ended_by(value) for value in step.reads]
        grown = [branch for branch in branches if branch is not None and not branch.flattened]
        sources = {self._origin(branch.source) for branch in grown}
        forms = {(branch.start_axes, branch.axes) for branch in grown}
        if len(grown) < len(step.reads) or len(sources) > 1 or len(forms) > 1:
            return
        for value in step.reads:
            del self.growing[value]
        parts: list[Tree[LayerRef]] = []
        for branch in grown:
            if len(branch.parts) == 1 and isinstance(branch.parts[0], Sum):  # a + b + c is one sum
                parts += branch.parts[0].parts
            else:
                parts.append(Chain(tuple(branch.parts)))
        self.growing[number] = _Open(grown[0].source, [Sum(tuple(parts))], grown[0].axes, grown[0].start_axes)

    def _origin(self, value: int) -> int:
        """The value that a copy is of."""
        while self.flow.steps[value].op is Op.PASS:
            value = self.flow.steps[value].reads[0]
        return value

    def _note(self, value: int, step: Step) -> None:
        """Say why a layer was not joined to the one that it directly follows, if it does."""
        readers = self.readers[value]
        while self.flow.steps[value].op in (Op.PASS, Op.FLATTEN):
            value = self.flow.steps[value].reads[0]
            readers = max(readers, self.readers[value])
        before = self.flow.steps[value]
        if before.op is not Op.LAYER:
            return
        reason = next((f"{name}: {self.barred[name]}" for name in (before.name, step.name) if name in self.barred), "")
        if not reason and readers > 1:
            kept = " or is an output of the model" if self.flow.outputs & {value} else ""
            reason = f"the value between them is read {readers} times{kept}"
        if reason:
            self.obstacles.append(Obstacle(before.name, step.name, reason))
