"""What one layer in place of several would be: where it is exact, and what it costs before and after.

Exactness depends on geometry and on which layers have a bias, not on channels or numbers. So it is decided by fusing
stand-ins of one channel, all of whose numbers are ones, by the code that fuses the layers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch

from convtool.core.border import Verdict
from convtool.core.conv import Conv
from convtool.core.expression import joined, multiply_adds
from convtool.core.fuse import Fusion, NamedConv, fuse_tree
from convtool.core.geometry import Geometry
from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves, map_leaves
from convtool.errors import RefusedError
from convtool.graph.flow import Flow, Step
from convtool.kinds.kind import Layer
from convtool.kinds.written import make_written


class Exact(Enum):
    """Where a fusion equals the layers that it stands for."""

    EVERY_SIZE = "at every input size"
    THIS_SIZE = "at this input size"
    NOT = "not at the border"


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


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Layers, and the one that would stand for them.

    Attributes:
        tree: the layers, by name.
        input_size: (C, *sizes) of their input.
        positions: how often the whole of it runs beside each other: the axes between batch and channels of a linear
            layer's input.
        exact: where it is.
        rim: what differs, in words; '' where exact.
        before, after: costs.
        fused: the layer, its numbers made up and shared by all of its weight.
        apart: the layers, likewise.
    """

    tree: Tree[LayerRef]
    input_size: tuple[int, ...]
    positions: int
    exact: Exact
    rim: str
    before: Cost
    after: Cost
    fused: Conv
    apart: Tree[NamedConv]


class Judge:
    """Judges parts of the stretches of one run.

    Args:
        layers: of the run, with the fields of their modules.
        is_biased: whether a layer's bias has anything but zeros in it.
    """

    def __init__(self, flow: Flow, layers: Mapping[str, Layer], is_biased: Callable[[str], bool]) -> None:
        self.flow, self.layers, self.is_biased = flow, layers, is_biased
        self.steps = {step.name: step for step in flow.calls()}

    def judge(self, tree: Tree[LayerRef]) -> Piece:
        """The tree as one layer.

        Raises:
            RefusedError: no single layer has that form, or it would be wrong at every output.
        """
        first = self.steps[next(leaves(tree)).name]
        shape = self.flow.input_shape(first)
        size, positions = (shape[2:], 1) if first.axes else ((), math.prod(shape[1:-1]))
        apart = joined(self._lower(tree, first.axes, shape[1] if first.axes else shape[-1])[0])
        exact, rim, stand_in = self._exactness(map_leaves(self._stand_in, apart), size)
        fused = self._fused(apart, stand_in)
        expression: Tree[Conv] = map_leaves(lambda leaf: leaf.conv, apart)
        return Piece(
            tree,
            (shape[1] if first.axes else shape[-1], *size),
            positions,
            exact,
            rim,
            Cost(sum(_parameters(leaf.conv) for leaf in leaves(apart)), positions * multiply_adds(expression, size)),
            Cost(_parameters(fused), positions * multiply_adds(fused, size)),
            fused,
            apart,
        )

    def geometry(self, step: Step) -> Geometry:
        """Return the geometry of a layer of the run."""
        return self._leaf(LayerRef(step.name), step.axes, 0).conv.geometry

    def cost(self, step: Step) -> Cost:
        """Of one run of a layer; nothing of one whose weight is made of tensors that only its own code knows."""
        if step.name not in self.layers:
            return Cost(0, 0)
        shape = self.flow.input_shape(step)
        size, positions = (shape[2:], 1) if step.axes else ((), math.prod(shape[1:-1]))
        conv = self._leaf(LayerRef(step.name), step.axes, 0).conv
        return Cost(_parameters(conv), positions * multiply_adds(conv, size))

    def _exactness(self, tree: Tree[NamedConv], size: tuple[int, ...]) -> tuple[Exact, str, Conv]:
        def fuse(at: tuple[int, ...] | None) -> Fusion:
            return fuse_tree(tree, input_size=at, allow_border=True, dtype=torch.float64)

        try:
            always = fuse(None)
        except RefusedError:
            here = fuse(size)  # wrong inside for some sizes, or a branch that is exact for this one only
            if not here.verdict.exact:
                raise
            return Exact.THIS_SIZE, "", here.conv
        if always.verdict.exact:
            return Exact.EVERY_SIZE, "", always.conv
        here = fuse(size)
        if here.verdict.exact:
            return Exact.THIS_SIZE, "", here.conv
        return Exact.NOT, _rim(here.verdict), always.conv

    def _lower(self, tree: Tree[LayerRef], axes: int, channels: int) -> tuple[Tree[NamedConv], int]:
        """Return the layers, their numbers made up, and the channels of their output."""
        if isinstance(tree, Sum):
            parts = [self._lower(part, axes, channels) for part in tree.parts]
            return Sum(tuple(part for part, _ in parts)), parts[0][1]
        if isinstance(tree, Chain):
            chain: list[Tree[NamedConv]] = []
            for part in tree.parts:
                lowered, channels = self._lower(part, axes, channels)
                chain.append(lowered)
            return Chain(tuple(chain)), channels
        leaf = self._leaf(tree, axes, channels)
        return leaf, leaf.conv.out_channels

    def _leaf(self, ref: LayerRef, axes: int, channels: int) -> NamedConv:
        if ref.written:
            return NamedConv(ref.name, make_written(ref.name, channels, axes))
        layer = self.layers[ref.name]
        numbers = {name: _number(info.dtype).expand(info.shape) for name, info in layer.tensors.items()}
        return NamedConv(ref.name, layer.kind.lower(numbers, layer.fields, axes, None))

    def _stand_in(self, leaf: NamedConv) -> NamedConv:
        """Return a layer of one channel, of ones, that is exact where this one is."""
        one = torch.ones((), dtype=torch.float64)
        geometry, layer = replace(leaf.conv.geometry, groups=1), self.layers.get(leaf.name)
        # A batch norm's bias is made of four tensors, and is hardly ever zero throughout.
        biased = leaf.conv.bias is not None and (layer is None or not layer.kind.main or self.is_biased(leaf.name))
        return NamedConv(
            leaf.name, Conv(one.expand(1, 1, *geometry.kernel_size), one.expand(1) if biased else None, geometry)
        )

    def _fused(self, apart: Tree[NamedConv], stand_in: Conv) -> Conv:
        groups = math.gcd(*(leaf.conv.geometry.groups for leaf in leaves(apart)))
        geometry = replace(stand_in.geometry, groups=groups)
        inputs, outputs = _first(apart).conv.in_channels, _last(apart).conv.out_channels
        bias = any(leaf.conv.bias is not None for leaf in leaves(apart))
        stored = [self.layers[leaf.name] for leaf in leaves(apart) if leaf.name in self.layers]
        main = next((layer for layer in stored if layer.kind.main), stored[0])
        number = _number(next(iter(main.tensors.values())).dtype)
        weight = number.expand(outputs, inputs // groups, *geometry.kernel_size)
        return Conv(weight, number.expand(outputs) if bias else None, geometry)


def _number(dtype: str) -> torch.Tensor:
    """Return the number that all made-up tensors consist of: no 1, which would be taken for an identity."""
    return torch.tensor(0.5, dtype=getattr(torch, dtype))


def _rim(verdict: Verdict) -> str:
    return f"{verdict.describe_rim()} of the output would differ"


def _parameters(conv: Conv) -> int:
    return conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())


def _first(tree: Tree[NamedConv]) -> NamedConv:
    return _first(tree.parts[0]) if isinstance(tree, Chain | Sum) else tree


def _last(tree: Tree[NamedConv]) -> NamedConv:
    return _last(tree.parts[-1]) if isinstance(tree, Chain | Sum) else tree
