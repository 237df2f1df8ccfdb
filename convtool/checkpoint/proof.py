"""Lowered layers as they are held against each other: batch norms step by step, and how far storing moved each number.

A batch norm lowered to one layer has one bias, offset - mean * scale, which may be small where its two parts aren't.
The bound on what another program's arithmetic can have done to it goes by the parts, so here a batch norm is the two
layers that its definition names: less the mean, and then times the scale plus the offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.chain import LoweredLayer
from convtool.checkpoint.fusion import PlannedLayer
from convtool.core.bound import Stored, half_ulp, stored
from convtool.core.conv import Conv
from convtool.core.expression import Expression
from convtool.core.sizes import alike_size, default_sizes
from convtool.core.tree import Chain, Sum, Tree, fold, map_leaves
from convtool.core.verify import EquivalenceReport, verify

PLAN_TRIALS = 2  # random inputs for each fusion that is checked before it is written
PLAN_SIZES = 2  # and input sizes: one, and one that the stride doesn't divide
PLAN_WORK = 4_000_000_000  # multiply-adds for impulses: about a second


def exact_tree(tree: Tree[LoweredLayer], checkpoints: Mapping[str, Checkpoint]) -> Expression:
    """The layers of BEFORE, their numbers as they are in the file.

    Args:
        checkpoints: by the origin that the layers name.
    """
    return map_leaves(lambda leaf: leaf.conv, stored_tree(tree, checkpoints))


def stored_tree(tree: Tree[LoweredLayer], checkpoints: Mapping[str, Checkpoint]) -> Tree[Stored]:
    """The layers of AFTER, each number with what rounding it when it was stored can have moved it by."""

    def one(leaf: LoweredLayer) -> Tree[Stored]:
        if leaf.layer.kind == "batch_norm":
            return _batch_norm(leaf, checkpoints[leaf.origin])
        return stored(leaf.conv)

    def chain(parts: list[Tree[Stored]]) -> Tree[Stored]:
        return Chain(tuple(parts))

    def total(parts: list[Tree[Stored]]) -> Tree[Stored]:
        return Sum(tuple(parts))

    return fold(tree, one, chain, total)


def _batch_norm(lowered: LoweredLayer, checkpoint: Checkpoint) -> Chain[Stored]:
    """Less the mean, and then times weight / sqrt(variance + eps), plus the bias."""
    tensors = {name: checkpoint.tensor(info.name) for name, info in lowered.layer.tensors.items()}
    mean, bias = tensors["running_mean"], tensors.get("bias")
    geometry, scale = lowered.conv.geometry, lowered.conv.weight  # (C, 1, ...)
    error = _scale_error(scale.flatten(), tensors, lowered.fields["eps"]).reshape(scale.shape)
    moved = Conv(torch.ones_like(scale), -mean.to(torch.float64), geometry)
    scaled = Conv(scale, None if bias is None else bias.to(torch.float64), geometry)
    return Chain(
        (
            Stored(moved, torch.zeros_like(scale), _half(mean)),
            Stored(scaled, error, None if bias is None else _half(bias)),
        )
    )


def _scale_error(scale: Tensor, tensors: Mapping[str, Tensor], eps: float) -> Tensor:
    """(C,) the most that storing weight and variance moved the scale by.

    d(scale)/scale = d(weight)/weight - d(variance)/(2 variance), and for steps of some size a little more.
    """
    variance = tensors["running_var"].to(torch.float64) + eps
    step = _half(tensors["running_var"]) / variance
    relative = torch.where(step < 0.5, step / 2 / (1 - step), math.inf)
    error = scale.abs() * relative
    return error if "weight" not in tensors else error + _half(tensors["weight"]) / variance.sqrt() * (1 + relative)


def _half(tensor: Tensor) -> Tensor:
    return half_ulp(tensor, tensor.dtype)


def check_planned(
    layer: PlannedLayer,
    checkpoints: Mapping[str, Checkpoint],
    progress: Callable[[float], None] = lambda share: None,
) -> list[EquivalenceReport]:
    """Run a planned layer, as it will be in the file, against the layers that it stands for.

    Args:
        checkpoints: by the origin that the layers name.
        progress: called with the share of the work done since the last call.

    Returns:
        A report for each input size that it was run on.

    Raises:
        AssertionError: it differs, and not only where it was said to: a mistake in convtool.
    """
    before, verdict = exact_tree(layer.tree, checkpoints), layer.fusion.verdict
    if verdict.input_size is None:
        sizes = default_sizes(before)[:PLAN_SIZES]
    else:
        sizes = [alike_size((before, layer.fusion.conv), verdict.input_size)]

    def advance(share: float) -> None:
        progress(share / len(sizes))

    reports = [
        verify(before, [layer.fusion.conv], size, trials=PLAN_TRIALS, work=PLAN_WORK, progress=advance)
        for size in sizes
    ]
    for report in reports:
        if not (report.equivalent if verdict.exact else _equal_inside(report)):
            names = ", ".join(source.name for source in layer.record.sources)
            raise AssertionError(
                f"{layer.name!r}, made of {names}, differs from them at input size {report.input_size}:"
                f" {report.mismatch or f'error/bound {report.ratio:.3g}'}; nothing was written (--no-verify writes it)"
            )
    return reports


def _equal_inside(report: EquivalenceReport) -> bool:
    return not report.mismatch and (report.interior.equal or not report.interior.positions)
