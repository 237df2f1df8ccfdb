"""The data flow of one run of a model, as a value, and the linear stretches in it.

A stretch is a tree of layers between whose members nothing happens: each value inside of it is read once, by the next
member. So one layer can stand for all of them, or for any part that is next to each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves
from convtool.kinds.kind import Layer


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a run, or one run of a layer.

    Attributes:
        reads: the steps whose values it reads, by number.
        shape: of its value.
        layer: what it is, if a layer; one without tensors as it would be written.
        axes: of a layer: the spatial axes that it runs over, behind the channels at axis 1; 0 where the channels are
            the last axis.
        adds: whether it adds up values of one shape.
    """

    reads: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    layer: Layer | None = None
    axes: int = 0
    adds: bool = False

    @property
    def written(self) -> bool:
        """Return whether it is a layer without tensors."""
        return self.layer is not None and not self.layer.tensors


@dataclass(frozen=True, slots=True)
class Flow:
    """What reads whose value in one run of a model.

    Attributes:
        steps: in order; a step reads earlier ones only.
        outputs: the numbers of the steps whose values leave the run.
        apart: layers that must stay as they are, with the reason.
        remarks: what its user should know of it.
    """

    steps: tuple[Step, ...]
    outputs: frozenset[int]
    apart: Mapping[str, str]
    remarks: tuple[str, ...] = ()

    def calls(self) -> Iterator[tuple[Step, Layer]]:
        """Yield the runs of layers that have tensors."""
        return ((step, step.layer) for step in self.steps if step.layer is not None and step.layer.tensors)

    def input_shape(self, step: Step) -> tuple[int, ...]:
        """Return the shape of what a layer reads."""
        return self.steps[step.reads[0]].shape

    def barred(self) -> dict[str, str]:
        """Return the layers that no fusion may touch, with the reason: those apart, and those that run repeatedly."""
        counts = Counter(layer.name for _, layer in self.calls())
        often = {name: f"it runs {count} times" for name, count in counts.items() if count > 1}
        return {**often, **self.apart}


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """Layers with nothing in between that stay apart, and why."""

    layers: tuple[str, ...]
    reason: str

    @classmethod
    def of(cls, tree: Tree[LayerRef], reason: str) -> LeftAlone:
        """Return it of the layers of a tree."""
        return cls(tuple(leaf.name for leaf in leaves(tree) if not leaf.written), reason)


@dataclass(slots=True)
class _Stretch:
    """A stretch while it grows.

    Attributes:
        source: the step whose value it reads.
        parts: its members, one after the other.
        first_axes, axes: spatial axes of the values that it reads and gives.
        flat: whether the last member reshapes, so that only what runs over the last axis can follow.
    """

    source: int
    parts: list[Tree[LayerRef]]
    first_axes: int
    axes: int
    flat: bool = False


def find_stretches(flow: Flow) -> tuple[list[Tree[LayerRef]], list[LeftAlone]]:
    """Return every maximal stretch of a run, those of one layer too, in order; and what kept neighbours apart."""
    finder = _Finder(flow)
    for number, step in enumerate(flow.steps):
        if step.adds:
            finder.add(number, step)
        elif step.layer is not None:
            finder.join(number, step, step.layer)
    return finder.trees(), finder.left_alone


class _Finder:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.barred = flow.barred()
        self.readers = Counter(number for step in flow.steps for number in step.reads)
        self.readers.update(flow.outputs)
        self.growing: dict[int, _Stretch] = {}  # by the step whose value they end with
        self.left_alone: list[LeftAlone] = []

    def trees(self) -> list[Tree[LayerRef]]:
        """Return the stretches; of one that ends with a reshaping, all but that."""
        parts = [one.parts[:-1] if one.flat else one.parts for one in self.growing.values()]
        return [each[0] if len(each) == 1 else Chain(tuple(each)) for each in parts]

    def join(self, number: int, step: Step, layer: Layer) -> None:
        """Let a layer go on with the stretch that ends with what it reads, or begin one."""
        value, kind, barred = step.reads[0], layer.kind, layer.name in self.barred
        before = None if barred else self._ended_by(value)
        if before is not None and kind.neutral:  # what changes nothing isn't worth a place in the tree
            self.growing[number] = self.growing.pop(value)
        elif before is not None and before.axes == step.axes and (kind.channels_last or not before.flat):
            before.parts.append(LayerRef(layer.name))
            before.axes, before.flat = len(step.shape) - 2 if kind.reshapes else step.axes, kind.reshapes
            self.growing[number] = self.growing.pop(value)
        elif not step.written:
            self._note(value, layer.name)
            if not barred:
                self.growing[number] = _Stretch(value, [LayerRef(layer.name)], step.axes, step.axes)

    def add(self, number: int, step: Step) -> None:
        """Make one stretch of the branches that are added up, if these read one value and nothing else is added."""
        ended = [self._ended_by(value) for value in step.reads]
        branches = [branch for branch in ended if branch is not None and not branch.flat]
        alike = {(self._origin(branch.source), branch.first_axes, branch.axes) for branch in branches}
        if len(branches) < len(step.reads) or len(alike) > 1:
            return
        parts: list[Tree[LayerRef]] = []
        for value in step.reads:
            branch = self.growing.pop(value)
            inner = branch.parts[0]
            # a + b + c is one sum
            parts += inner.parts if len(branch.parts) == 1 and isinstance(inner, Sum) else [Chain(tuple(branch.parts))]
        first = branches[0]
        self.growing[number] = _Stretch(first.source, [Sum(tuple(parts))], first.first_axes, first.axes)

    def _ended_by(self, value: int) -> _Stretch | None:
        """Return the stretch that ends with a value, where that is read once only."""
        return self.growing.get(value) if self.readers[value] == 1 else None

    def _origin(self, value: int) -> int:
        """Return the value that a copy is of."""
        step = self.flow.steps[value]
        return self._origin(step.reads[0]) if step.layer is not None and step.layer.kind.neutral else value

    def _note(self, value: int, name: str) -> None:
        """Say why a layer was not joined to the one that it directly follows, if it does."""
        readers = self.readers[value]
        while self.flow.steps[value].written:
            value = self.flow.steps[value].reads[0]
            readers = max(readers, self.readers[value])
        before = self.flow.steps[value].layer
        if before is None:
            return
        reason = next((f"{one}: {self.barred[one]}" for one in (before.name, name) if one in self.barred), "")
        if not reason and readers > 1:
            kept = " or is an output of the model" if self.flow.outputs & {value} else ""
            reason = f"the value between them is read {readers} times{kept}"
        if reason:
            self.left_alone.append(LeftAlone((before.name, name), reason))
