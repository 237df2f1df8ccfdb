"""Following one run of a model: which layer reads whose value, and what happens in between.

Three tracers, each for where the one before fails:

    torch.export   reads the whole run, in-place changes resolved; fails where control flow depends on values
    torch.fx       proves that control flow doesn't depend on the input; then a run of its graph is recorded
    hooks          a run of the model itself is recorded; what its code would do for another input isn't seen

Nothing is computed by the first, and by the others only where the model isn't on the meta device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convtool.errors import RefusedError, UsageError
from convtool.graph.flow import Flow
from convtool.live.exported import changes_in_place, read_graph
from convtool.live.layers import ModuleLayer, module_layers
from convtool.live.recorder import kept_layers, record_run

Inputs = tuple[Any, ...]


def example_input(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """One input of that size (without the batch axis), on the model's device and in its dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    numbers = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *input_size, dtype=numbers.dtype, device=numbers.device)


@contextlib.contextmanager
def nowhere(model: nn.Module) -> Iterator[None]:
    """Where tensors have shapes and no numbers, on whatever device the model is; it may be run on what it is run on."""
    if all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        with torch.device("meta"):
            yield
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def trace(model: nn.Module, inputs: Inputs) -> Flow:
    """The data flow of `model(*inputs)` in eval mode; see above for how.

    Raises:
        RefusedError: no tracer could follow it; says why each could not.
        UsageError: the model doesn't run on these inputs.
    """
    layers = module_layers(model)
    with _at_rest(model):
        failures: list[str] = []
        for name, tracer in _TRACERS.items():
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    flow = tracer(model, inputs, layers)
            except UsageError:
                raise
            except Exception as error:  # tracers raise what they like, and the model's code too
                failures.append(f"{name}: {_line(error)}")
                continue
            return Flow(flow.steps, flow.outputs, flow.apart, name, (*_REMARKS[name], *failures))
        _check_runs(model, inputs)
        raise RefusedError(
            "the model's data flow cannot be followed; name the layers to `convtool fuse` instead."
            f" {'; '.join(failures)}"
        )


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while, in which batch norms are linear and dropouts do nothing."""
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
            f"the model doesn't run on an input of shape {sizes} (the batch first, then the input size): {_line(error)}"
        ) from None


def _line(error: BaseException) -> str:
    """The first line of an error that says something, at most 200 characters of it."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"


# --- torch.export


def _by_export(model: nn.Module, inputs: Inputs, layers: Mapping[str, ModuleLayer]) -> Flow:
    exported = torch.export.export(model, inputs, strict=False)
    if changes_in_place(exported.graph):
        exported = exported.run_decompositions({})  # what is changed in place becomes a value of its own
    signature = exported.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    flow = read_graph(exported.graph, tensors, model, layers)
    # An exported graph doesn't show what the code puts aside for itself, or a hook does.
    known = {name: layer for name, layer in layers.items() if not layer.foreign}
    with nowhere(model):
        kept = kept_layers(model, inputs, known)
    return replace(flow, apart={**dict.fromkeys(sorted(kept), "the model's code keeps its value"), **flow.apart})


# --- torch.fx, and hooks


def _by_fx(model: nn.Module, inputs: Inputs, layers: Mapping[str, ModuleLayer]) -> Flow:
    tracer = _LayerTracer(layers)
    graph = tracer.trace(model)
    for name, module in model.named_modules():
        if any(isinstance(value, fx.Proxy) for value in vars(module).values()):
            raise RefusedError(f"{name or 'the model'} keeps a value of the run")
    return _recorded(fx.GraphModule(model, graph), model, inputs, layers)


class _LayerTracer(fx.Tracer):
    """Knows the layers of a model as single steps."""

    def __init__(self, layers: Mapping[str, ModuleLayer]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.layers or super().is_leaf_module(m, module_qualified_name)


def _by_hooks(model: nn.Module, inputs: Inputs, layers: Mapping[str, ModuleLayer]) -> Flow:
    return _recorded(model, model, inputs, layers)


def _recorded(run: Callable[..., Any], model: nn.Module, inputs: Inputs, layers: Mapping[str, ModuleLayer]) -> Flow:
    known = {name: layer for name, layer in layers.items() if not layer.foreign}
    steps, outputs, read_outside = record_run(run, model, inputs, known)
    apart = {name: reason for name, layer in layers.items() if (reason := layer.foreign or layer.bound)}
    for layer, tensor in read_outside.items():
        apart.setdefault(layer, f"{tensor} is read outside of the layer's own run as well")
    return Flow(tuple(steps), outputs, apart, "")


_TRACERS: dict[str, Callable[[nn.Module, Inputs, Mapping[str, ModuleLayer]], Flow]] = {
    "torch.export": _by_export,
    "torch.fx": _by_fx,
    "hooks": _by_hooks,
}
_ONE_RUN = (
    "one run was followed; if the model's own code decides by the values or the size of its input what to run, other"
    " inputs may take other ways"
)
_REMARKS: dict[str, tuple[str, ...]] = {"torch.export": (), "torch.fx": (), "hooks": (_ONE_RUN,)}
