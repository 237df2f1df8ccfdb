"""What each layer of a model reads and gives in one run, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from convtool.graph.judge import Judge
from convtool.live.layers import module_layers, with_fields
from convtool.live.state import StateCheckpoint
from convtool.live.trace import example_input, trace


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


def layer_runs(model: nn.Module, input_size: Sequence[int]) -> dict[str, list[LayerRun]]:
    """Every run of each layer while the model runs once in eval mode, by module path; nothing is computed.

    Args:
        input_size: of the model's input, without the batch.

    Raises:
        UsageError: the model doesn't run on it.
        RefusedError: its data flow can't be followed.
    """
    flow = trace(model, (example_input(model, input_size),))
    judge = Judge(flow, with_fields(StateCheckpoint.of(model), module_layers(model)), lambda name: True)
    runs: dict[str, list[LayerRun]] = {}
    for step in flow.calls():
        run = LayerRun(flow.input_shape(step)[1:], step.shape[1:], judge.cost(step).multiply_adds)
        runs.setdefault(step.name, []).append(run)
    return runs
