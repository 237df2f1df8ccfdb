"""Every exact fusion of a whole model, found, judged and priced; and carried out on a live one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from convtool import __version__
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import FusionRecord, Record, SourceLayer
from convtool.core.fields import geometry_fields
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves, map_leaves
from convtool.errors import ConvtoolError, RefusedError, UsageError
from convtool.fusing.fusion import check_ties, plan_layer
from convtool.fusing.lowering import lower_tree
from convtool.graph.flow import Flow, Obstacle, find_stretches
from convtool.graph.judge import Cost, Exact, Judge, Piece
from convtool.graph.partition import Cost as Price
from convtool.graph.partition import partition
from convtool.graph.planned import LeftAlone, Plan, PlannedPiece
from convtool.graph.stopwatch import Stopwatch
from convtool.kinds.kind import Kind, Layer
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.kinds.written import read_layer
from convtool.live.apply import apply_checkpoint
from convtool.live.layers import module_layers, with_fields
from convtool.live.rehearse import failures
from convtool.live.state import StateCheckpoint
from convtool.live.trace import example_input, trace


def plan(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    fixed_size: bool = False,
    only_if_cheaper: bool = False,
    measure: bool = False,
    barred: Mapping[str, str] | None = None,
    is_biased: Callable[[str], bool] | None = None,
) -> Plan:
    """Find every exact fusion in a model, from one run of it in eval mode that computes nothing.

    Args:
        model: on any device, the meta device too; it is left as it was.
        input_size: of the input, without the batch axis: (C, H, W) for images.
        inputs: the arguments of the model's forward in its place.
        fixed_size: also take what is exact for inputs of that size only.
        only_if_cheaper: cut each chain so that it takes the fewest multiply-adds; otherwise into the fewest layers.
        measure: so that it takes the least time on this machine.
        barred: layers to leave alone besides, with the reason.
        is_biased: whether a layer's bias has anything but zeros in it, for a model whose tensors don't hold it.

    Raises:
        UsageError: the model doesn't run on such an input.
        RefusedError: its data flow can't be followed, as its control flow depends on values.
    """
    if (input_size is None) == (inputs is None):
        raise UsageError("plan: expected either an input size or inputs")
    arguments = (example_input(model, input_size),) if input_size is not None else tuple(inputs or ())
    flow = trace(model, arguments)
    flow = replace(flow, apart={**flow.apart, **(barred or {})})
    planner = _Planner(model, flow, fixed_size, only_if_cheaper, measure, is_biased)
    return planner.plan(arguments)


def fuse_model(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    fixed_size: bool = False,
    only_if_cheaper: bool = False,
    measure: bool = False,
    planned: Plan | None = None,
) -> nn.Module:
    """Plan, and put the fused layers into the live model, in eval mode, which is changed in place and returned.

    Args:
        planned: a plan of this model, in place of the input size and all else that is asked for a new one.
        Everything else is as for `plan`; the model has its weights.

    Raises:
        as `plan` does; InputError where a fused layer isn't finite. Where anything fails the model is left as it was.
    """
    found = planned or plan(
        model,
        input_size,
        inputs=inputs,
        fixed_size=fixed_size,
        only_if_cheaper=only_if_cheaper,
        measure=measure,
    )
    base = StateCheckpoint.of(model)
    sources = FieldSources((FieldSource("the model", found.fields, exact_names=True),))
    layers = []
    for one in found.fusions:
        lowered = lower_tree({BASE: base}, one.piece.tree, sources, one.only_size)
        layers.append(plan_layer(base, one.name, lowered, input_size=one.only_size))
    edits = [layer.edit for layer in layers]
    check_ties(base, edits)
    tensors = {
        name: base.tensor(name) if tensor is None else tensor for name, tensor in Edit.together(edits).order(base.infos)
    }
    record = Record(__version__).appended(__version__, [layer.record for layer in layers])
    model.eval()
    return apply_checkpoint(model, StateCheckpoint(tensors, record))


class _Planner:
    def __init__(
        self,
        model: nn.Module,
        flow: Flow,
        fixed_size: bool,
        only_if_cheaper: bool,
        measure: bool,
        is_biased: Callable[[str], bool] | None,
    ) -> None:
        self.model, self.flow, self.fixed_size = model, flow, fixed_size
        self.cheaper = only_if_cheaper or measure
        self.layers = module_layers(model)
        self.state = StateCheckpoint.of(model)
        self.shapes = with_fields(self.state, self.layers)
        self.judge = Judge(flow, self.shapes, is_biased or self._is_biased)
        self.flow = replace(flow, apart={**self._resized(), **flow.apart})
        self.watch = Stopwatch(self._kind, _dtype(model)) if measure else None
        self.left_alone: list[LeftAlone] = []

    def plan(self, arguments: Sequence[Any]) -> Plan:
        stretches, obstacles = find_stretches(self.flow)
        pieces = [piece for stretch in stretches for piece in self._cut(stretch.tree)[1]]
        named = [PlannedPiece(_name(piece.tree, self.shapes), piece, self._seconds(piece)) for piece in pieces]
        wrong, unseen = failures(self.model, arguments, [(self._record(one), one.piece.fused) for one in named])
        for number, reason in wrong.items():
            self._leave(named[number].piece.tree, reason)
        kept = tuple(one for number, one in enumerate(named) if number not in wrong)
        used = {leaf.name for one in kept for leaf in leaves(one.piece.tree)}
        return Plan(
            kept,
            (*map(_obstacle, obstacles), *self.left_alone),
            {name: layer.fields for name, layer in self.layers.items() if name in used and layer.fields},
            self._total(),
            self.flow.tracer,
            (*self.flow.remarks, *([unseen] if unseen else [])),
        )

    # --- cutting stretches into pieces

    def _cut(self, tree: Tree[LayerRef]) -> tuple[Price, list[Piece]]:
        """The cheapest way to run a tree, and the pieces of it that are fused for that."""
        if isinstance(tree, Sum):
            return self._cut_sum(tree)
        if isinstance(tree, Chain):
            return self._cut_chain(tree)
        return self._price_apart(tree), []

    def _cut_sum(self, tree: Sum[LayerRef]) -> tuple[Price, list[Piece]]:
        apart = [self._cut(part) for part in tree.parts]
        price = tuple(map(sum, zip(*(each for each, _ in apart), strict=True)))
        whole = self._allowed(tree)
        if whole is not None and (not self.cheaper or self._price(whole) <= price):
            return self._price(whole), [whole]
        reason = self._why_apart(tree)
        if reason:
            self._leave(tree, reason)
        return price, [piece for _, pieces in apart for piece in pieces]

    def _cut_chain(self, tree: Chain[LayerRef]) -> tuple[Price, list[Piece]]:
        parts = tree.parts
        alone = [self._cut(part) for part in parts]
        found: dict[tuple[int, int], Piece] = {}

        def price(start: int, stop: int) -> Price | None:
            if stop - start == 1:
                return alone[start][0]
            if _is_written(parts[start]) or _is_written(parts[stop - 1]):
                return None
            piece = self._allowed(Chain(parts[start:stop]))
            if piece is None:
                return None
            found[start, stop] = piece
            return self._price(piece)

        total, cuts = partition(len(parts), price)
        self._say_why(parts, cuts)
        pieces = [piece for cut in cuts for piece in ([found[cut]] if cut in found else alone[cut[0]][1])]
        return total, pieces

    def _say_why(self, parts: Sequence[Tree[LayerRef]], cuts: Sequence[tuple[int, int]]) -> None:
        """For each cut, why what meets there isn't one layer."""
        solid = [cut for cut in cuts if not (cut[1] - cut[0] == 1 and _is_written(parts[cut[0]]))]
        for (start, _), (_, stop) in itertools.pairwise(solid):
            both = Chain(tuple(parts[start:stop]))
            self._leave(both, self._why_apart(both))

    def _why_apart(self, tree: Tree[LayerRef]) -> str:
        try:
            piece = self._judged(tree)
        except ConvtoolError as error:
            return str(error)
        if piece.exact is Exact.NOT:
            return piece.rim
        if piece.exact is Exact.THIS_SIZE and not self.fixed_size:
            return "it would be exact for this input size only (--fixed-size takes it)"
        before, after = self._cost_in_words(piece)
        return f"it would cost more: {before} apart, {after} as one"

    def _allowed(self, tree: Tree[LayerRef]) -> Piece | None:
        try:
            piece = self._judged(tree)
        except ConvtoolError:
            return None
        good = piece.exact is Exact.EVERY_SIZE or (self.fixed_size and piece.exact is Exact.THIS_SIZE)
        return piece if good else None

    def _judged(self, tree: Tree[LayerRef]) -> Piece:
        named = [leaf.name for leaf in leaves(tree) if not leaf.written]
        if not any(self.shapes[name].kind.main for name in named):
            raise RefusedError("there is no convolution or linear layer among them that could take the others in")
        for name in named:
            if set(name) & set("{}*?!@:()[]"):
                raise RefusedError(f"{name!r} has a sign in it that means something else in recipes")
        return self.judge.judge(tree)

    # --- prices

    def _price(self, piece: Piece) -> Price:
        cost = float(piece.after.multiply_adds)
        if self.watch is not None:
            cost = self.watch.layer(None, piece.fused, piece.input_size[1:], piece.positions)
        return (cost, 1.0) if self.cheaper else (1.0, cost)

    def _price_apart(self, ref: LayerRef) -> Price:
        if ref.written:
            return 0.0, 0.0
        piece = self.judge.judge(ref)
        cost = float(piece.before.multiply_adds)
        if self.watch is not None:
            cost = self.watch.seconds(piece.apart, piece.input_size[1:], piece.positions)
        return (cost, 1.0) if self.cheaper else (1.0, cost)

    def _seconds(self, piece: Piece) -> tuple[float, float] | None:
        if self.watch is None:
            return None
        size = piece.input_size[1:]
        before = self.watch.seconds(piece.apart, size, piece.positions)
        return before, self.watch.layer(None, piece.fused, size, piece.positions)

    def _cost_in_words(self, piece: Piece) -> tuple[str, str]:
        seconds = self._seconds(piece)
        if seconds is not None:
            return f"{seconds[0] * 1e3:.3g} ms", f"{seconds[1] * 1e3:.3g} ms"
        return f"{piece.before.multiply_adds} multiply-adds", f"{piece.after.multiply_adds}"

    def _resized(self) -> dict[str, str]:
        """Layers whose output isn't of the size that their geometry says: transposed ones that are told another."""
        told = {}
        for step in self.flow.calls():
            shape = self.shapes.get(step.name)
            if shape is None or not shape.axes():
                continue
            if step.shape[2:] != self.judge.geometry(step).output_size(self.flow.input_shape(step)[2:]):
                told[step.name] = "the model's code gives it an output size of its own"
        return told

    def _is_biased(self, name: str) -> bool:
        bias = self.state.tensor(f"{name}.bias" if name else "bias")
        return bias.is_meta or bool(bias.count_nonzero())

    def _kind(self, name: str) -> Kind:
        return self.shapes[name].kind

    def _total(self) -> Cost:
        counted: set[str] = set()
        total = Cost(0, 0)
        for step in self.flow.calls():
            cost = self.judge.cost(step)
            total += cost if step.name not in counted else replace(cost, parameters=0)
            counted.add(step.name)
        return total

    # --- the rest

    def _leave(self, tree: Tree[LayerRef], reason: str) -> None:
        names = tuple(leaf.name for leaf in leaves(tree) if not leaf.written)
        self.left_alone.append(LeftAlone(names, reason))

    def _record(self, one: PlannedPiece) -> FusionRecord:
        piece = one.piece
        size = one.only_size[1:] if one.only_size is not None else None
        return FusionRecord(
            one.name,
            map_leaves(self._source, piece.tree),
            geometry_fields(piece.fused.geometry),
            "",
            True,
            size,
            ((0, 0),) * piece.fused.spatial_axes,
        )

    def _source(self, leaf: LayerRef) -> SourceLayer:
        if leaf.written:
            return SourceLayer(leaf.name, read_layer(leaf.name).kind, {})
        return SourceLayer(leaf.name, self.shapes[leaf.name].kind, self.shapes[leaf.name].fields)


def _name(tree: Tree[LayerRef], layers: Mapping[str, Layer]) -> str:
    """Return the layer whose place the fused one takes: the first main one."""
    return next(leaf.name for leaf in leaves(tree) if not leaf.written and layers[leaf.name].kind.main)


def _is_written(part: Tree[LayerRef]) -> bool:
    return isinstance(part, LayerRef) and part.written


def _obstacle(obstacle: Obstacle) -> LeftAlone:
    return LeftAlone((obstacle.first, obstacle.second), obstacle.reason)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
