"""Following one run of a model: which layer reads whose value, and what happens in between.

A run is recorded, and before that it is seen to that other values would take the same way. Three ways to see that,
each for where the one before fails:

    torch.export   fails where control flow depends on values
    torch.fx       proves that control flow doesn't depend on the input; then a run of its graph is recorded
    hooks          nothing is proved: what the code would do for another input isn't seen

Nothing is computed by the first, and by the others only where the model isn't on the meta device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convtool.errors import RefusedError, UsageError
from convtool.graph.flow import Flow
from convtool.graph.operations import Run, read_flow
from convtool.live.layers import ModelLayers, found_layers, module_layers
from convtool.live.recorder import record

Inputs = tuple[Any, ...]


def example_input(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Return one input of that size (without the batch axis), on the model's device and in its dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    numbers = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *input_size, dtype=numbers.dtype, device=numbers.device)


@contextlib.contextmanager
def nowhere(model: nn.Module) -> Iterator[None]:
    """Let tensors have shapes and no numbers, for a while; the model may be run on what it is run on elsewhere."""
    if all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        with torch.device("meta"):
            yield
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def trace(model: nn.Module, inputs: Inputs) -> Flow:
    """Return the data flow of `model(*inputs)` in eval mode; see above for how.

    Raises:
        RefusedError: no tracer could follow it; says why each could not.
        UsageError: the model doesn't run on these inputs.
    """
    known = module_layers(model)
    # A scale of a block with more in it isn't a module by itself.
    layers = {name: layer for name, layer in found_layers(model).items() if layer.kind.parameter} | known.layers
    failures: list[str] = []
    with at_rest(model):
        for name, tracer in _TRACERS.items():
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    flow = read_flow(tracer(model, inputs, known), layers, known.apart)
            except UsageError:
                raise
            except Exception as error:  # tracers raise what they like, and the model's code too
                failures.append(f"{name}: {error_line(error)}")
                continue
            return replace(flow, tracer=name, remarks=(*_REMARKS[name], *failures))
        _check_runs(model, inputs)
    raise RefusedError(
        f"the model's data flow cannot be followed; name the layers to `convtool fuse` instead. {'; '.join(failures)}"
    )


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode for a while, in which batch norms are linear and dropouts do nothing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        sizes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
        raise UsageError(
            f"the model doesn't run on an input of shape {sizes} (the batch first, then the input size):"
            f" {error_line(error)}"
        ) from None


def error_line(error: BaseException) -> str:
    """Return the first line of an error that says something, at most 200 characters of it."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"


def _by_export(model: nn.Module, inputs: Inputs, layers: ModelLayers) -> Run:
    torch.export.export(model, inputs, strict=False)
    with nowhere(model):
        return record(model, model, inputs, layers.called())


def _by_fx(model: nn.Module, inputs: Inputs, layers: ModelLayers) -> Run:
    tracer = fx.Tracer()
    is_leaf = tracer.is_leaf_module
    # A layer of the model is one step of the graph.
    tracer.is_leaf_module = lambda m, module_qualified_name: (  # type: ignore[method-assign]
        module_qualified_name in layers.layers or is_leaf(m, module_qualified_name)
    )
    graph = tracer.trace(model)
    for name, module in model.named_modules():
        if any(isinstance(value, fx.Proxy) for value in vars(module).values()):
            raise RefusedError(f"{name or 'the model'} keeps a value of the run")
    return record(fx.GraphModule(model, graph), model, inputs, layers.called())


def _by_hooks(model: nn.Module, inputs: Inputs, layers: ModelLayers) -> Run:
    return record(model, model, inputs, layers.called())


_TRACERS: dict[str, Callable[[nn.Module, Inputs, ModelLayers], Run]] = {
    "torch.export": _by_export,
    "torch.fx": _by_fx,
    "hooks": _by_hooks,
}
_ONE_RUN = (
    "one run was followed; if the model's own code decides by the values or the size of its input what to run, other"
    " inputs may take other ways"
)
_REMARKS: dict[str, tuple[str, ...]] = {"torch.export": (), "torch.fx": (), "hooks": (_ONE_RUN,)}
