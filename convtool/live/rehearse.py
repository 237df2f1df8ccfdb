"""Fusions put into the model for a moment, to see whether its code runs with them: shapes alone, nothing computed.

A forward that reshapes to a fixed number of channels, or that can't do without a scale, shows here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.tree import Tree, leaves
from convtool.graph.operations import INPUT
from convtool.live.apply import Applying
from convtool.live.recorder import record
from convtool.live.trace import at_rest, error_line, nowhere

Fused: TypeAlias = tuple[str, Tree[SourceLayer], Conv]  # a layer's name, what it stands for, and the layer


def failures(model: nn.Module, inputs: Sequence[Any], fusions: Sequence[Fused]) -> tuple[dict[int, str], str]:
    """Return the fusions with which the model's code doesn't do the same, by their number, with the reason.

    It does the same where it runs every operation that it ran before, but for those of the fused layers, and gives
    outputs of the same shapes. Code that looks at what kind of module it calls may not.

    Also why nothing could be seen, in words; '' where something could.
    """
    if not fusions:
        return {}, ""
    names = {source.name for _, tree, _ in fusions for source in leaves(tree)}
    before = _run(model, inputs, [], names)
    if isinstance(before, str):
        return {}, f"whether the model's code runs with the fused layers could not be tried: {before}"

    def wrong(chosen: Sequence[Fused]) -> str:
        after = _run(model, inputs, chosen, names)
        if isinstance(after, str):
            return f"the model's code doesn't run without the layers: {after}"
        if after[0] != before[0]:
            return "the model's code gives outputs of another shape without the layers"
        return "" if after == before else "the model's code does something else without the layers"

    together = wrong(fusions)
    if not together:
        return {}, ""
    found = {number: reason for number, fusion in enumerate(fusions) if (reason := wrong([fusion]))}
    return found or dict.fromkeys(range(len(fusions)), f"of all fusions together: {together}"), ""


_Seen: TypeAlias = tuple[list[tuple[int, ...]], list[str]]  # shapes of the outputs, and the operations


def _run(model: nn.Module, inputs: Sequence[Any], fusions: Sequence[Fused], names: set[str]) -> _Seen | str:
    """Return what a run shows with these fusions in the model; an error in words where it doesn't run.

    Args:
        names: of layers whose operations aren't told, and of scales whose multiplications aren't.
    """
    applying = Applying(model, check=False)  # what the layers are has been seen to; only their places count here
    shapes: list[tuple[int, ...]] = []

    def run(*inputs: Any) -> None:
        output = pytree.tree_leaves(model(*inputs))
        shapes[:] = [tuple(value.shape) for value in output if isinstance(value, Tensor)]

    try:
        with at_rest(model), nowhere(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for fusion in fusions:
                applying.put(*fusion)
            model.eval()
            # A scale is named by the module that holds it, which may hold all else as well.
            modules = dict(model.named_modules(remove_duplicate=False))
            whole = [name for name in names if name in modules and not list(modules[name].children())]
            operations = record(run, model, inputs, whole).operations
    except Exception as error:  # the user's code
        return error_line(error)
    finally:
        applying.undo()
    told = [one for one in operations if not one.call[0] and one.name != INPUT]
    return shapes, [one.name for one in told if names.isdisjoint(name.rpartition(".")[0] for name in one.tensors)]
