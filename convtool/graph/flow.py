"""The data flow of one run of a model, as a value, and the linear stretches in it.

A stretch is a tree of layers between whose members nothing happens: each value inside of it is read once, by the next
member. So one layer can stand for all of them, or for any part that is next to each other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves
from convtool.graph.again import BARE, taken_off
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
        stacks: the axis along which it puts values side by side; 0 where it doesn't.
        moves: of an operation that factors and offsets of channels can as well follow as precede: for each axis that
            the channels may be on before it, the one that they are on behind it.
        about: what it is, for messages.
        in_place: whether it changes a value that it reads, for whoever else has that.
    """

    reads: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    layer: Layer | None = None
    axes: int = 0
    adds: bool = False
    stacks: int = 0
    moves: Mapping[int, int] = field(default_factory=dict)
    about: str = ""
    in_place: bool = False

    @property
    def written(self) -> bool:
        """Return whether it is a layer without tensors."""
        return self.layer is not None and not self.layer.tensors

    @property
    def channels(self) -> int:
        """Return the axis that the channels of a layer's value are on."""
        return 1 if self.axes else len(self.shape) - 1


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
        channels: the axis that the channels are on.
        moved: whether there is an operation in it that factors and offsets of channels alone can pass.
        only_scales: whether all of its members are such.
        since: the number of its first step.
        solid: whether a convolution or linear layer is among them.
        bare: how often the value that it reads is added to its own, by the model's code.
        placed: where its channels are among those of several that stand side by side, until a layer follows these.
    """

    source: int
    parts: list[Tree[LayerRef]]
    first_axes: int
    axes: int
    flat: bool = False
    channels: int = 1
    moved: bool = False
    only_scales: bool = False
    since: int = 0
    solid: bool = False
    bare: int = 0
    placed: str = ""

    def tree(self) -> Tree[LayerRef] | None:
        """Return it as a tree; None where there is nothing in it that could be one layer."""
        parts = self.parts[:-1] if self.flat else list(self.parts)
        if self.bare and len(parts) == 1 and isinstance(parts[0], Sum):  # nothing follows: the code's sum stays a sum
            branches = parts[0].parts[: -self.bare]
            return Sum(branches) if len(branches) > 1 else branches[0]
        whole = parts[0] if len(parts) == 1 else Chain(tuple(parts))
        return taken_off(whole, self.bare) if self.bare else whole


def _sum_of(branches: Sequence[_Stretch], bare: int) -> _Stretch:
    """Return the stretch of branches that are added up, and of the value that they read, so many times."""
    first = branches[0]
    parts: list[Tree[LayerRef]] = []
    for branch in branches:
        inner = branch.parts[0]
        parts += inner.parts if len(branch.parts) == 1 and isinstance(inner, Sum) else [Chain(tuple(branch.parts))]
    added = [*parts, *[BARE] * bare]
    whole: list[Tree[LayerRef]] = [Sum(tuple(added))] if len(added) > 1 else parts
    made = _Stretch(first.source, whole, first.first_axes, first.axes, channels=first.channels, bare=bare)
    made.since, made.solid = min(one.since for one in branches), any(one.solid for one in branches)
    return made


def find_stretches(flow: Flow) -> tuple[list[Tree[LayerRef]], list[LeftAlone]]:
    """Return every maximal stretch of a run, those of one layer too, in order; and what kept neighbours apart."""
    finder = _Finder(flow)
    for number, step in enumerate(flow.steps):
        if step.adds:
            finder.add(number, step)
        elif step.stacks:
            finder.stack(number, step)
        elif step.layer is None or (step.written and finder.has_moved(step)):
            finder.move(number, step)
        else:
            finder.join(number, step, step.layer)
    return finder.trees(), finder.left_alone


class _Finder:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.barred = flow.barred()
        self.readers = Counter(number for step in flow.steps for number in step.reads)
        self.readers.update(flow.outputs)
        self.growing: dict[int, _Stretch] = {}  # by the step whose value they end with
        self.sums: dict[int, list[tuple[int, _Stretch | None]]] = {}  # the values that are added up, and their branches
        self.whole: set[int] = set()  # the sums that are one stretch
        self.stacked: dict[int, list[_Stretch]] = {}  # the stretches whose values stand side by side in a value
        self.left_alone: list[LeftAlone] = []

    def trees(self) -> list[Tree[LayerRef]]:
        """Return the stretches; of one that ends with a reshaping, all but that."""
        apart = (self._alike(addends) for number, addends in self.sums.items() if number not in self.whole)
        ended = [_sum_of(branches, 0) for alike in apart for branches in alike.values()]
        made = (one.tree() for one in (*self.growing.values(), *ended))
        return sorted((tree for tree in made if tree is not None), key=self._first_run)

    def _first_run(self, tree: Tree[LayerRef]) -> int:
        names = {leaf.name for leaf in leaves(tree)}
        return next(n for n, step in enumerate(self.flow.steps) if step.layer is not None and step.layer.name in names)

    def join(self, number: int, step: Step, layer: Layer) -> None:
        """Let a layer go on with the stretch that ends with what it reads, or begin one."""
        value, kind, barred = step.reads[0], layer.kind, layer.name in self.barred
        self._share(number, step, layer)
        before = None if barred else self._ended_by(value)
        if before is not None and kind.neutral:  # what changes nothing isn't worth a place in the tree
            self.growing[number] = self.growing.pop(value)
        elif before is not None and self._stays(before, number) and self._follows(before, step, layer):
            before.parts.append(LayerRef(layer.name))
            before.only_scales &= kind.per_channel
            before.solid |= kind.main
            if not before.moved and not (step.written and kind.per_channel):
                before.flat = kind.reshapes
                before.axes = len(step.shape) - 2 if kind.reshapes else step.axes
                before.channels = step.channels
            self.growing[number] = self.growing.pop(value)
        elif not step.written:
            self._note(value, layer.name)
            if not barred:
                begun = _Stretch(value, [LayerRef(layer.name)], step.axes, step.axes, only_scales=kind.per_channel)
                begun.channels, begun.since, begun.solid = step.channels, number, kind.main
                self.growing[number] = begun

    def stack(self, number: int, step: Step) -> None:
        """See which stretches give what is put side by side, as long as each of the values is one's."""
        values = list(self._side_by_side(step))
        branches = [branch for value in values if (branch := self._branch(value)) is not None]
        if len(branches) == len(values) and {branch.channels for branch in branches} == {step.stacks}:
            stops = list(itertools.accumulate(self.flow.steps[value].shape[step.stacks] for value in values))
            for branch, start, stop in zip(branches, [0, *stops], stops, strict=False):
                branch.placed = f"place({start}:{stop}; of={stops[-1]})"
            self.stacked[number] = branches

    def _side_by_side(self, step: Step) -> Iterator[int]:
        """Yield the values that a step puts side by side; of one that is made so, along the same axis, its own."""
        for value in step.reads:
            inner = self.flow.steps[value]
            if inner.stacks == step.stacks and self.readers[value] == 1:
                yield from self._side_by_side(inner)
            else:
                yield value

    def _share(self, number: int, step: Step, layer: Layer) -> None:
        """Let a layer behind values side by side go on with the stretches of each, which then share it.

        It begins a stretch of its own as well: one of the two comes to nothing when these are cut.
        """
        value, kind = step.reads[0], layer.kind
        branches = self.stacked.get(value, []) if self.readers[value] == 1 else []
        ours = kind.per_channel and not step.written and layer.name not in self.barred
        if not branches or not (kind.neutral or (ours and step.channels == branches[0].channels)):
            return
        self.stacked[number] = branches
        for branch in () if kind.neutral else branches:
            branch.parts += [*([LayerRef(branch.placed)] if branch.placed else []), LayerRef(layer.name)]
            branch.placed = ""

    def _follows(self, before: _Stretch, step: Step, layer: Layer) -> bool:
        """Return whether a layer can be a member of the stretch that ends with the value that it reads."""
        if before.moved:
            fits = step.channels == before.channels and not step.written
            return fits and (layer.kind.per_channel or before.only_scales)
        anywhere = step.written and layer.kind.per_channel  # one factor for all channels, whatever axis these are on
        return (anywhere or before.axes == step.axes) and (layer.kind.channels_last or anywhere or not before.flat)

    def _stays(self, before: _Stretch, number: int) -> bool:
        """Return whether what a stretch reads is the same until a step.

        One layer for it stands in the place of its first convolution or linear layer. Before that nothing is computed
        any more, so that the value there is the one that the stretch reads, which may change in place.
        """
        return before.solid or not any(step.in_place for step in self.flow.steps[before.since : number + 1])

    def has_moved(self, step: Step) -> bool:
        """Return whether what a step reads is a stretch that only factors and offsets can go on with."""
        before = self.growing.get(step.reads[0])
        return before is not None and before.moved

    def move(self, number: int, step: Step) -> None:
        """Let a stretch go on behind an operation that factors and offsets of channels can pass."""
        before = self._ended_by(step.reads[0]) if step.moves else None
        if before is not None and not before.flat and before.channels in step.moves:
            before.channels, before.moved = step.moves[before.channels], True
            self.growing[number] = self.growing.pop(step.reads[0])

    def add(self, number: int, step: Step) -> None:
        """Make one stretch of the branches that are added up, if these read one value.

        Nothing else may be added but that value itself; else what of the branches is alike is one stretch, that ends.
        """
        addends: list[tuple[int, _Stretch | None]] = []
        for value in step.reads:
            if value in self.sums and self.readers[value] == 1:  # (a + b) + c is one sum
                self.growing.pop(value, None)
                addends += self.sums.pop(value)
            else:
                branch = self._branch(value)
                addends.append((value, None if branch is None else self.growing.pop(value)))
        self.sums[number] = addends
        alike = self._alike(addends)
        bare = [value for value, branch in addends if branch is None]
        if len(alike) == 1:
            (((origin, _, _), branches),) = alike.items()
            if all(self._origin(value) == origin for value in bare):
                self.growing[number] = _sum_of(branches, len(bare))
                self.whole.add(number)

    def _alike(self, addends: Sequence[tuple[int, _Stretch | None]]) -> dict[tuple[int, int, int], list[_Stretch]]:
        """Return the branches by what they read and over how many axes they run."""
        found: dict[tuple[int, int, int], list[_Stretch]] = {}
        for _, branch in addends:
            if branch is not None:
                found.setdefault((self._origin(branch.source), branch.first_axes, branch.axes), []).append(branch)
        return found

    def _branch(self, value: int) -> _Stretch | None:
        branch = self._ended_by(value)
        return None if branch is None or branch.flat or branch.moved or branch.bare else branch

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
