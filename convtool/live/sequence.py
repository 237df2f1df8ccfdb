"""The layers of a live model in the order in which it runs them, and whether the network is nothing but that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from convtool.graph.flow import Flow, Step
from convtool.graph.recorded_run import INPUT
from convtool.live.trace import example_input, trace

# Functions that lengthen no difference of two inputs, whatever their arguments: |f(a) - f(b)| <= |a - b|.
SHRINKING = frozenset(
    {f"aten.{name}.default" for name in ("relu", "relu_", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh")}
    | {f"aten.{name}.default" for name in ("tanh_", "hardsigmoid", "hardsigmoid_", "abs", "neg", "view", "clone")}
    | {"aten.mean.dim", "aten.flatten.using_ints", "aten._unsafe_view.default", "aten.squeeze.dim", "aten.squeeze.dims"}
)


class LayerCall(NamedTuple):
    """One run of a layer: its name, or how it would be written, and its input's size without the batch."""

    name: str
    written: bool
    input_size: tuple[int, ...]


class Sequenced(NamedTuple):
    """What a model runs.

    Attributes:
        calls: of layers, in order.
        broken: why the network isn't these, one after the other, with nothing but functions in between that lengthen
            no difference; '' where it is.
    """

    calls: tuple[LayerCall, ...]
    broken: str


def sequence_of(model: nn.Module, input_size: Sequence[int]) -> Sequenced:
    """Return the runs of a model's layers, from one run of it that computes nothing.

    Raises:
        UsageError: the model doesn't run on such an input.
        RefusedError: its data flow can't be followed.
    """
    flow = trace(model, (example_input(model, input_size),))[0]
    steps = [(step, step.layer) for step in flow.steps if step.layer is not None]
    calls = (LayerCall(layer.name, step.written, flow.input_shape(step)[1:]) for step, layer in steps)
    return Sequenced(tuple(calls), _broken(flow))


def _broken(flow: Flow) -> str:
    """Return why a run isn't one sequence; '' where it is."""
    users = Counter(number for step in flow.steps for number in step.reads)
    last = len(flow.steps) - 1
    for number, step in enumerate(flow.steps):
        if number and step.reads != (number - 1,):
            return f"{_called(step)} doesn't read what the step before it gives, or not that alone"
        if users[number] != (number < last) or (number in flow.outputs) != (number == last):
            return f"what {_called(step)} gives is read more than once"
        if step.layer is None and step.about not in (*SHRINKING, INPUT):
            return f"{_called(step)} may make differences larger"
        if step.layer is not None and step.layer.name in flow.apart:
            return f"{step.layer.name}: {flow.apart[step.layer.name]}"
    return ""


def _called(step: Step) -> str:
    return (step.layer.name if step.layer is not None else step.about) or "a step"
