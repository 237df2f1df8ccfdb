"""Every exact fusion of a whole model, found, judged and priced; and carried out on a live one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from convtool import __version__
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record, SourceLayer
from convtool.core.tree import BASE, LayerRef, Tree, leaves, map_leaves
from convtool.errors import UsageError
from convtool.fusing.fusion import check_whole, plan_layer
from convtool.fusing.lowering import lower_tree
from convtool.graph.cut import cut
from convtool.graph.judge import Judge, Merge
from convtool.graph.planned import Plan
from convtool.graph.stopwatch import Stopwatch
from convtool.kinds.stated import FieldSources
from convtool.live.apply import Applying, apply_checkpoint
from convtool.live.layers import found_layers, is_torchs
from convtool.live.recorder import Recorded
from convtool.live.rehearse import Rehearsal
from convtool.live.state import StateCheckpoint
from convtool.live.trace import example_input, trace


def plan(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    fixed_size: bool = False,
    everything: bool = False,
    measure: bool = False,
    batch_norms_only: bool = False,
    barred: Mapping[str, str] | None = None,
    is_biased: Callable[[str], bool] | None = None,
) -> Plan:
    """Find every exact fusion in a model, from one run of it in eval mode that computes nothing.

    Args:
        model: on any device, the meta device too; it is left as it was.
        input_size: of the input, without the batch axis: (C, H, W) for images.
        inputs: the arguments of the model's forward in its place.
        fixed_size: also take what is exact for inputs of that size only.
        everything: cut each chain into the fewest layers; otherwise so that it takes the fewest multiply-adds.
        measure: so that it takes the least time on this machine.
        batch_norms_only: take nothing but batch norms into the layers beside them.
        barred: layers to leave alone besides, with the reason.
        is_biased: whether a layer's bias has anything but zeros in it, for a model whose tensors don't hold it.

    Raises:
        UsageError: the model doesn't run on such an input.
        RefusedError: its data flow can't be followed, as its control flow depends on values.
    """
    if (input_size is None) == (inputs is None):
        raise UsageError("plan: expected either an input size or inputs")
    arguments = (example_input(model, input_size),) if input_size is not None else tuple(inputs or ())
    flow, recorded = trace(model, arguments)
    flow = replace(flow, apart={**flow.apart, **(barred or {})})
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    watch = Stopwatch(dtype) if measure else None
    judge = Judge(flow, is_biased or StateCheckpoint.of(model).is_biased, watch)
    merges, left_alone = cut(
        judge,
        fixed_size=fixed_size,
        cheaper=measure or not everything,
        batch_norms_only=batch_norms_only,
        rehearse=lambda merges: _rehearsed(model, arguments, recorded, judge, merges),
    )
    return Plan.of(judge, merges, left_alone, found_layers(model).values(), uncounted=_uncounted(model, judge))


def _rehearsed(
    model: nn.Module, inputs: Sequence[Any], recorded: Recorded, judge: Judge, merges: Sequence[Merge]
) -> dict[Tree[LayerRef], str]:
    """Return the merges with which the model's code doesn't do what it did, with the reason."""

    def source(leaf: LayerRef) -> SourceLayer:
        layer = judge.layer(leaf.name)
        return SourceLayer(leaf.name, layer.kind, layer.fields if layer.tensors else {})

    put = [(one.name, map_leaves(source, one.tree), one.fused) for one in merges]
    # By its operations a layer is known whose module alone, which is all that apply looks at, doesn't tell.
    applying, strange = Applying(model), {name for name, module in model.named_modules() if not is_torchs(module)}
    unlike = {
        one.tree: f"{layer.name}: {what}"
        for one, (name, tree, _) in zip(merges, put, strict=True)
        if not strange.isdisjoint(leaf.name for leaf in leaves(tree))
        for layer, what, _ in applying.unlike(name, tree)
    }
    if unlike:
        return unlike
    wrong = Rehearsal(model, inputs, recorded, put).failing(range(len(put)))
    return {merges[number].tree: reason for number, reason in wrong.items()}


def _uncounted(model: nn.Module, judge: Judge) -> int:
    """Return how many parameters a model has besides those of the layers whose cost is counted."""
    counted = {name for _, layer in judge.flow.calls() for name in layer.tensor_names()}
    parameters = model.named_parameters()
    return sum(tensor.numel() for name, tensor in parameters if name not in counted and not is_lazy(tensor))


def fuse_model(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    fixed_size: bool = False,
    everything: bool = False,
    measure: bool = False,
    batch_norms_only: bool = False,
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
        everything=everything,
        measure=measure,
        batch_norms_only=batch_norms_only,
    )
    base = StateCheckpoint.of(model)
    sources = FieldSources((found.geometry,))
    layers = []
    for one in found.fusions:
        lowered = lower_tree({BASE: base}, one.tree, sources, one.only_size)
        layers.append(plan_layer(base, one.name, lowered, input_size=one.only_size))
    check_whole(base, layers)
    order = Edit.together(layer.edit for layer in layers).order(base.infos)
    tensors = {name: base.tensor(name) if tensor is None else tensor for name, tensor in order}
    record = Record(__version__, tuple(layer.record for layer in layers))
    return apply_checkpoint(model.eval(), StateCheckpoint(tensors, record))
