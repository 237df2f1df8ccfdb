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
from convtool.core.conv import Conv, pointwise
from convtool.core.expression import multiply_adds
from convtool.core.flow import Flow, Step
from convtool.core.functions import flatten_size
from convtool.core.fuse import Fusion, NamedConv, fuse_tree
from convtool.core.geometry import Geometry
from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves, map_leaves
from convtool.errors import RefusedError
from convtool.model.shapes import LayerShape


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
        shapes: of the run's layers.
    """

    def __init__(self, flow: Flow, shapes: Mapping[str, LayerShape]) -> None:
        self.flow, self.shapes = flow, shapes
        self.steps = {step.name: step for step in flow.calls()}

    def judge(self, tree: Tree[LayerRef]) -> Piece:
        """The tree as one layer.

        Raises:
            RefusedError: no single layer has that form, or it would be wrong at every output.
        """
        first = self.steps[next(leaves(tree)).name]
        shape = self.flow.input_shape(first)
        size, positions = (shape[2:], 1) if first.axes else ((), math.prod(shape[1:-1]))
        apart = self._lower(tree, first.axes, _shaped)
        exact, rim, stand_in = self._exactness(self._lower(tree, first.axes, _stand_in), size)
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

    def cost(self, step: Step) -> Cost:
        """Of one run of a layer; nothing of one whose weight is made of tensors that only its own code knows."""
        if step.name not in self.shapes:
            return Cost(0, 0)
        shape = self.flow.input_shape(step)
        size, positions = (shape[2:], 1) if step.axes else ((), math.prod(shape[1:-1]))
        conv = self._leaf(LayerRef(step.name), step.axes, _shaped, None).conv
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

    def _lower(self, tree: Tree[LayerRef], axes: int, make: Callable[[LayerShape, Geometry], Conv]) -> Tree[NamedConv]:
        if isinstance(tree, Sum):
            return Sum(tuple(self._lower(part, axes, make) for part in tree.parts))
        if isinstance(tree, Chain):
            parts: list[Tree[NamedConv]] = []
            flattened: tuple[int, ...] | None = None
            for part in tree.parts:
                size = flatten_size(part.name) if isinstance(part, LayerRef) else None
                if size is not None:
                    flattened = size
                elif isinstance(part, LayerRef) and flattened is not None:
                    parts.append(self._leaf(part, axes, make, flattened))
                    flattened = None
                else:
                    parts.append(self._lower(part, axes, make))
            return Chain(tuple(parts))
        return self._leaf(tree, axes, make, None)

    def _leaf(
        self,
        ref: LayerRef,
        axes: int,
        make: Callable[[LayerShape, Geometry], Conv],
        flattened: tuple[int, ...] | None,
    ) -> NamedConv:
        shape = self.shapes[ref.name]
        geometry = shape.geometry or pointwise(axes, shape.groups)
        if flattened is not None:
            inputs = shape.weight[1] // math.prod(flattened)
            shape = replace(shape, weight=(shape.weight[0], inputs, *flattened))
            geometry = Geometry.of(flattened)
        return NamedConv(ref.name, make(shape, geometry))

    def _fused(self, apart: Tree[NamedConv], stand_in: Conv) -> Conv:
        groups = math.gcd(*(leaf.conv.geometry.groups for leaf in leaves(apart)))
        geometry = replace(stand_in.geometry, groups=groups)
        inputs, outputs = _first(apart).conv.in_channels, _last(apart).conv.out_channels
        bias = any(leaf.conv.bias is not None for leaf in leaves(apart))
        stored = [self.shapes[leaf.name] for leaf in leaves(apart)]
        dtype = next((shape.dtype for shape in stored if shape.kind in ("conv", "linear")), stored[0].dtype)
        return _made((outputs, inputs // groups, *geometry.kernel_size), bias, geometry, dtype)


def _shaped(shape: LayerShape, geometry: Geometry) -> Conv:
    kernel = geometry.kernel_size
    return _made((*shape.weight[:2], *kernel), shape.stored_bias, geometry, shape.dtype)


def _made(weight: tuple[int, ...], bias: bool, geometry: Geometry, dtype: torch.dtype) -> Conv:
    number = torch.tensor(0.5, dtype=dtype)  # no 1, which would be taken for an identity
    return Conv(number.expand(weight), number.expand(weight[0]) if bias else None, geometry)


def _stand_in(shape: LayerShape, geometry: Geometry) -> Conv:
    one = torch.ones((), dtype=torch.float64)
    kernel = geometry.kernel_size
    return Conv(one.expand(1, 1, *kernel), one.expand(1) if shape.biased else None, replace(geometry, groups=1))


def _rim(verdict: Verdict) -> str:
    return f"{verdict.describe_rim()} of the output would differ"


def _parameters(conv: Conv) -> int:
    return conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())


def _first(tree: Tree[NamedConv]) -> NamedConv:
    return _first(tree.parts[0]) if isinstance(tree, Chain | Sum) else tree


def _last(tree: Tree[NamedConv]) -> NamedConv:
    return _last(tree.parts[-1]) if isinstance(tree, Chain | Sum) else tree
