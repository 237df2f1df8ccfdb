"""What one layer in place of several would be: where it is exact, and what it costs before and after.

Exactness depends on geometry and on which layers have a bias, not on channels or numbers. So it is decided by fusing
stand-ins of one channel, all of whose numbers are ones, by the code that fuses the layers themselves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import reduce

import torch

from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels, joined, multiply_adds, out_channels, with_sizes
from convtool.core.fuse import Fusion, NamedConv, fuse_tree
from convtool.core.moves import Selection, groups_of
from convtool.core.tree import Chain, LayerRef, Tree, leaves, map_leaves, walk
from convtool.errors import ConvtoolError, RefusedError
from convtool.graph.flow import Flow, Step
from convtool.graph.stopwatch import Stopwatch
from convtool.kinds.kind import UNKNOWN, Kind, Layer
from convtool.kinds.shares import Share, shares, without_places
from convtool.kinds.written import read_layer


class Exact(Enum):
    """Where a fusion equals the layers that it stands for."""

    EVERY_SIZE = "at every input size"
    THIS_SIZE = "at this input size"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of layers, for one input of the size that the run had.

    Attributes:
        parameters: numbers that they compute with.
        multiply_adds: of all positions.
    """

    parameters: int
    multiply_adds: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.parameters - other.parameters, self.multiply_adds - other.multiply_adds)


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """Layers, and the one that would stand for them.

    Attributes:
        name: of the fused layer: the first of theirs that can take others in.
        tree: the layers, by name.
        exact: where it is.
        input_size: (C, *sizes) of their input.
        before, after: costs.
        seconds: before and after on this machine, where measured.
        fused: the layer, its numbers made up and shared by all of its weight.
    """

    name: str
    tree: Tree[LayerRef]
    exact: Exact
    input_size: tuple[int, ...]
    before: Cost
    after: Cost
    seconds: tuple[float, float] | None
    fused: Conv

    @property
    def only_size(self) -> tuple[int, ...] | None:
        """Return the one input size that it is exact at, channels in front; None where it is at every size."""
        return self.input_size if self.exact is Exact.THIS_SIZE else None


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One run of a layer.

    Attributes:
        input_size, output_size: without the batch.
        multiply_adds: of it.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    multiply_adds: int


class Judge:
    """Judges parts of the stretches of one run.

    Attributes:
        flow: the run, in which what no layer known here is stays apart.

    Args:
        is_biased: whether a layer's bias has anything but zeros in it.
        watch: what measures layers, if that is asked for.
    """

    def __init__(self, flow: Flow, is_biased: Callable[[str], bool], watch: Stopwatch | None = None) -> None:
        self.is_biased, self.watch = is_biased, watch
        self.calls = {layer.name: (step, layer) for step, layer in flow.calls()}
        self.leaves: dict[tuple[str, int, int], NamedConv] = {}
        self.flow = flow
        self.unknown: dict[str, str] = {}  # layers of which only the tensors' shapes are known, with the reason
        for step, layer in flow.calls():
            try:
                self._conv(step, layer)
            except ConvtoolError as error:
                self.unknown.setdefault(layer.name, str(error))
        self.flow = replace(flow, apart={**self.unknown, **flow.apart})
        self.resized = {layer.name for step, layer in flow.calls() if self._is_resized(step, layer)}

    def layer(self, name: str) -> Layer:
        """Return the layer of a name, or what is written in a layer's place."""
        return self.calls[name][1] if name in self.calls else read_layer(name)

    def owned(self, ref: LayerRef) -> tuple[str, Kind] | None:
        """Return name and kind of a layer of the run that has tensors; None of any other."""
        return None if ref.written else (ref.name, self.layer(ref.name).kind)

    def merge(self, tree: Tree[LayerRef]) -> Merge:
        """Return the tree as one layer.

        Raises:
            RefusedError: no single layer has that form, or it would be wrong at the border, or at every output.
        """
        layers = [self.layer(leaf.name) for leaf in leaves(tree)]
        main = next((layer for layer in layers if layer.kind.main), None)
        if main is None:
            raise RefusedError("there is no convolution or linear layer among them that could take the others in")
        told = next((layer.name for layer in layers if layer.name in self.resized), "")
        if told and not all(layer.kind.per_channel for layer in layers if layer.name != told):
            raise RefusedError(f"{told}: the model's code gives it an output size of its own")
        # What only scales and shifts channels may stand where feature maps are of another size or shape.
        ours = [layer for layer in layers if layer.tensors]
        sized = next((layer for layer in ours if not layer.kind.per_channel), ours[0])
        step = self.calls[sized.name][0]
        channels, size, positions = self._input(step)
        parts = shares(tree, self.owned)
        apart = self._lowered(without_places(tree, self.owned), step.axes, channels)
        convs: Expression = map_leaves(lambda leaf: leaf.conv, apart)
        exact, stand_in = self._exactness(map_leaves(self._stand_in, apart), size)
        groups = _groups(convs)
        number, outputs = _number(main), out_channels(convs)
        fused = Conv(
            number.expand(outputs, in_channels(convs) // groups, *stand_in.geometry.kernel_size),
            number.expand(outputs) if any(conv.bias is not None for conv in leaves(convs)) else None,
            replace(stand_in.geometry, groups=groups),
        )
        seconds = None
        if self.watch is not None:
            seconds = self._seconds(apart, size, positions), self.watch.seconds(UNKNOWN, fused, size, positions)
        before = reduce(operator.add, (self._cost(*self.calls[layer.name], parts.get(layer.name)) for layer in ours))
        after = _cost(fused, size, positions)
        return Merge(main.name, tree, exact, (channels, *size), before, after, seconds, fused)

    def price(self, name: str) -> float:
        """Return what one run of a layer takes: seconds where measured, else multiply-adds."""
        step, layer = self.calls[name]
        if self.watch is None:
            return float(self._cost(step, layer).multiply_adds)
        channels, size, positions = self._input(step)
        return self._seconds(self._lowered(LayerRef(name), step.axes, channels), size, positions)

    def runs(self) -> dict[str, list[LayerRun]]:
        """Return every run of each layer, by its name."""
        runs: dict[str, list[LayerRun]] = {}
        for step, layer in self.flow.calls():
            work = self._cost(step, layer).multiply_adds
            runs.setdefault(layer.name, []).append(LayerRun(self.flow.input_shape(step)[1:], step.shape[1:], work))
        return runs

    def total(self) -> Cost:
        """Return the cost of all layers of the run, parameters counted once."""
        costs = [(layer.name, self._cost(step, layer)) for step, layer in self.flow.calls()]
        parameters = sum(cost.parameters for cost in dict(costs).values())
        return Cost(parameters, sum(cost.multiply_adds for _, cost in costs))

    def _is_resized(self, step: Step, layer: Layer) -> bool:
        """Return whether a layer's output isn't of the size that its geometry says: a transposed one told another."""
        conv = self._conv(step, layer) if layer.fields.get("transposed") else None
        return conv is not None and step.shape[2:] != conv.output_size(self._input(step)[1])

    def _conv(self, step: Step, layer: Layer, some: Share | None = None) -> Conv | None:
        """Return a layer of the run, or some of its channels; None where only its code knows what its weight is."""
        if layer.kind is UNKNOWN or layer.name in self.unknown:
            return None
        channels = self._input(step)[0] if some is None else some.stop - some.start
        return self._leaf(LayerRef(layer.name), step.axes, channels).conv

    def _cost(self, step: Step, layer: Layer, some: Share | None = None) -> Cost:
        """Return the cost of one run of a layer, or of some of its channels, as far as it is known."""
        conv = self._conv(step, layer, some)
        return Cost(0, 0) if conv is None else _cost(conv, *self._input(step)[1:])

    def _input(self, step: Step) -> tuple[int, tuple[int, ...], int]:
        """Return channels and spatial size of what a layer reads, and how often it runs beside itself.

        The latter is by the axes between batch and channels of a linear layer's input.
        """
        shape = self.flow.input_shape(step)
        return (shape[1], shape[2:], 1) if step.axes else (shape[-1], (), math.prod(shape[1:-1]))

    def _lowered(self, tree: Tree[LayerRef], axes: int, channels: int) -> Tree[NamedConv]:
        """Return the layers, their numbers made up."""
        made: list[NamedConv] = []

        def lower(ref: LayerRef, channels: int) -> int:
            made.append(self._leaf(ref, axes, channels))
            return made[-1].conv.out_channels

        walk(tree, channels, lower, lambda _, outputs: outputs[0])
        found = iter(made)
        return joined(map_leaves(lambda _: next(found), tree))

    def _leaf(self, ref: LayerRef, axes: int, channels: int) -> NamedConv:
        key = ref.name, axes, channels
        if key not in self.leaves:
            layer = self.layer(ref.name)
            whole = layer.kind.takes(layer.shapes, layer.fields, channels) if layer.kind.per_channel else None
            shapes = {  # of some of the channels, where it gets no more
                name: tuple(channels if size == whole else size for size in shape)
                for name, shape in layer.shapes.items()
            }
            numbers = {name: _number(layer).expand(shape) for name, shape in shapes.items()}
            self.leaves[key] = NamedConv(ref.name, layer.kind.lower(numbers, layer.fields, axes, channels))
        return self.leaves[key]

    def _stand_in(self, leaf: NamedConv) -> NamedConv:
        """Return a layer of one channel that is exact where this one is."""
        layer, geometry = self.layer(leaf.name), replace(leaf.conv.geometry, groups=1)
        # A batch norm's bias is made of four tensors, and is hardly ever zero throughout.
        biased = leaf.conv.bias is not None and (not layer.kind.main or self.is_biased(leaf.name))
        if layer.tensors:  # no two taps of which are alike: a transposed layer would spread a bias evenly
            chance = torch.Generator().manual_seed(0)
            weight = torch.rand((1, 1, *geometry.kernel_size), generator=chance, dtype=torch.float64)
        else:
            weight = leaf.conv.weight[:1, :1].double()
        return NamedConv(leaf.name, Conv(weight, weight.new_ones(1) if biased else None, geometry))

    def _exactness(self, tree: Tree[NamedConv], size: tuple[int, ...]) -> tuple[Exact, Conv]:
        def fuse(at: tuple[int, ...] | None) -> Fusion:
            return fuse_tree(tree, input_size=at, allow_border=True, dtype=torch.float64)

        refused = None
        try:
            always = fuse(None)
            if always.verdict.exact:
                return Exact.EVERY_SIZE, always.conv
        except RefusedError as error:  # wrong inside for some sizes, or a branch that is exact for this one only
            refused = error
        here = fuse(size)
        if here.verdict.exact:
            return Exact.THIS_SIZE, here.conv
        raise refused or RefusedError(f"{here.verdict.describe_rim()} of the output would differ")

    def _seconds(self, tree: Tree[NamedConv], size: tuple[int, ...], positions: int) -> float:
        """Return the seconds of layers one after the other; adding up branches is not counted."""
        assert self.watch is not None
        convs: Expression = map_leaves(lambda leaf: leaf.conv, tree)
        kinds = (self.layer(leaf.name).kind for leaf in leaves(tree))
        runs = zip(kinds, with_sizes(convs, size), strict=True)
        return sum(self.watch.seconds(kind, conv, at, positions) for kind, (conv, at) in runs)


def _number(layer: Layer) -> torch.Tensor:
    """Return the number that all made-up tensors of a layer consist of: no 1, which would be taken for an identity."""
    dtype = next((info.dtype for info in layer.tensors.values()), "float64")
    return torch.tensor(0.5, dtype=getattr(torch, dtype))


def _groups(convs: Expression) -> int:
    """Return the groups of the layer that others become; channels that are permuted there and back change none."""
    each = list(leaves(convs))
    if isinstance(convs, Chain) and len(each) == len(convs.parts) and any(isinstance(conv, Selection) for conv in each):
        return groups_of(each)
    return math.gcd(*(conv.geometry.groups for conv in each))


def _cost(convs: Expression, size: tuple[int, ...], positions: int) -> Cost:
    parameters = sum(conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel()) for conv in leaves(convs))
    return Cost(parameters, positions * multiply_adds(convs, size))
