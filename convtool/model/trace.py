"""Following one run of a model: which layer reads whose value, and what happens in between.

Three tracers, each for where the one before fails:

    torch.export   reads the whole run, in-place changes resolved; fails where control flow depends on values
    torch.fx       proves that control flow doesn't depend on the input; then a run of its graph is recorded
    hooks          a run of the model itself is recorded; what its code would do for another input isn't seen

Nothing is computed by the first, and by the others only where the model isn't on the meta device.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from convtool.checkpoint.info import TensorInfo, group_layers
from convtool.core.flow import Flow, Op, Step
from convtool.errors import RefusedError, UsageError
from convtool.model.layers import ModuleLayer, module_layers
from convtool.model.nowhere import nowhere
from convtool.model.record import kept_layers, record_run

Inputs = tuple[Any, ...]


def example_input(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """One input of that size (without the batch axis), on the model's device and in its dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    numbers = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *input_size, dtype=numbers.dtype, device=numbers.device)


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
    if any(map(_changes_in_place, exported.graph.nodes)):
        exported = exported.run_decompositions({})  # what is changed in place becomes a value of its own
    signature = exported.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    flow = _ExportedRun(exported.graph, tensors, model, layers).flow()
    # An exported graph doesn't show what the code puts aside for itself, or a hook does.
    known = {name: layer for name, layer in layers.items() if not layer.foreign}
    with nowhere(model):
        kept = kept_layers(model, inputs, known, classify, layer_axes)
    return replace(flow, apart={**dict.fromkeys(sorted(kept), "the model's code keeps its value"), **flow.apart})


def _changes_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class _ExportedRun:
    """An exported graph as steps: the nodes of one call of a known layer are one of them."""

    def __init__(
        self, graph: fx.Graph, tensors: Mapping[str, str], model: nn.Module, layers: Mapping[str, ModuleLayer]
    ) -> None:
        self.graph, self.tensors, self.layers = graph, tensors, layers
        self.modules = dict(model.named_modules())
        self.scales = _held_scales(model)
        self.apart = {name: reason for name, layer in layers.items() if (reason := layer.foreign or layer.bound)}
        self.steps: list[Step] = []
        self.number: dict[fx.Node, int] = {}
        self.constant = self._constants()
        self.groups = self._calls()

    def flow(self) -> Flow:
        outputs: set[int] = set()
        for node in self.graph.nodes:
            if node.op == "output":
                outputs = {self.number[value] for value in self._values(node)}
            elif node not in self.constant:
                self._take(node)
            elif node.op == "call_function" and not self.groups.get(self._call(node)):
                for name in self._tensors(node):
                    self._read_outside(node, name)
        return Flow(tuple(self.steps), frozenset(outputs), self.apart, "")

    def _constants(self) -> set[fx.Node]:
        """The nodes that nothing of the model's input goes into: its tensors, and what is computed of them alone."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            known = node.name in self.tensors or node.op == "get_attr"
            if known or (node.op == "call_function" and all(value in found for value in node.all_input_nodes)):
                found.add(node)
        return found

    def _calls(self) -> dict[str, list[fx.Node]]:
        """The nodes of each call of a known layer that reads one value and gives one, by the call's name."""
        groups: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            call = self._call(node)
            if call:
                groups.setdefault(call, []).append(node)
        return {call: nodes for call, nodes in groups.items() if self._is_plain(nodes)}

    def _call(self, node: fx.Node) -> str:
        """The call of a known layer that a node belongs to; '' where to none."""
        stack = node.meta.get("nn_module_stack") if node.op == "call_function" else None
        if not stack:
            return ""
        call, (path, *_) = next(reversed(stack.items()))
        known = self.layers.get(path)
        return str(call) if known is not None and not known.foreign else ""

    def _path(self, node: fx.Node) -> str:
        return str(next(reversed(node.meta["nn_module_stack"].values()))[0])

    def _is_plain(self, nodes: Sequence[fx.Node]) -> bool:
        inside = set(nodes)
        read = {value for node in nodes for value in self._values(node)} - inside
        given = {node for node in nodes if any(user not in inside for user in node.users)}
        layer = self.layers[self._path(nodes[0])]
        # Of tied tensors only one name is known here; such a layer is left alone anyway.
        own = bool(layer.bound) or all(
            name.rpartition(".")[0] == layer.name for node in nodes for name in self._tensors(node)
        )
        return len(read) == 1 and len(given) == 1 and given == {nodes[-1]} and own and self._axes(nodes) is not None

    def _axes(self, nodes: Sequence[fx.Node]) -> int | None:
        """Spatial axes that a call moves over; None for inputs without a batch axis."""
        inside = set(nodes)
        value = next(value for node in nodes for value in self._values(node) if value not in inside)
        path = self._path(nodes[0])
        return layer_axes(self.layers[path], self.modules[path], len(_shape(value)))

    def _take(self, node: fx.Node) -> None:
        nodes = self.groups.get(self._call(node))
        if nodes is not None:
            if node is nodes[-1]:
                self._emit_layer(nodes)
            return
        for name in self._tensors(node):
            self._read_outside(node, name)
        if node in self.number or self._is_inner_stack(node):
            return
        self._emit(node, *self._kind(node))

    def _emit_layer(self, nodes: Sequence[fx.Node]) -> None:
        inside = set(nodes)
        read = {value: None for node in nodes for value in self._values(node) if value not in inside}
        layer, axes = self.layers[self._path(nodes[0])], self._axes(nodes)
        assert axes is not None
        self._add(nodes[-1], Step(Op.LAYER, layer.name, self._numbers(read), (), axes, layer.kind == "linear"))

    def _emit(self, node: fx.Node, op: Op, reads: Sequence[fx.Node]) -> None:
        scale = self._scale(node)
        if scale is not None:
            name, axes, value = scale
            self._add(node, Step(Op.LAYER, name, self._numbers([value]), (), axes))
        else:
            self._add(node, Step(op, node.name, self._numbers(reads)))

    def _add(self, node: fx.Node, step: Step) -> None:
        self.number[node] = len(self.steps)
        self.steps.append(Step(step.op, step.name, step.reads, _shape(node), step.axes, step.flattens))

    def _numbers(self, nodes: Iterator[fx.Node] | Sequence[fx.Node] | Mapping[fx.Node, None]) -> tuple[int, ...]:
        return tuple(self.number[node] for node in nodes)

    def _values(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads besides the model's tensors."""
        found: list[fx.Node] = []

        def see(value: fx.Node) -> fx.Node:
            if value not in self.constant:
                found.append(value)
            return value

        fx.map_arg((node.args, node.kwargs), see)
        return found

    def _tensors(self, node: fx.Node) -> list[str]:
        """Full names of the parameters and buffers that a node reads."""
        return [self.tensors[value.name] for value in node.all_input_nodes if value.name in self.tensors]

    def _read_outside(self, node: fx.Node, name: str) -> None:
        """A layer whose tensors are read by anything but its own run has to keep them."""
        layer = name.rpartition(".")[0]
        if layer in self.layers and layer not in self.apart:
            self.apart[layer] = f"{name} is read outside of the layer's own run as well"

    def _scale(self, node: fx.Node) -> tuple[str, int, fx.Node] | None:
        """(layer, axes, value) where a node multiplies a value by a scale per channel that its module holds."""
        if _target(node) != "mul.Tensor" or len(node.args) != 2:
            return None
        names = self._tensors(node)
        values = self._values(node)
        if len(names) != 1 or len(values) != 1 or names[0] not in self.scales:
            return None
        layer, shape = self.scales[names[0]]
        rank = len(_shape(values[0]))
        axes = len(shape) - 1
        fits = _shape(node) == _shape(values[0]) and (axes == 0 or rank == len(shape) + 1)
        return (layer, axes, values[0]) if fits else None

    def _is_inner_stack(self, node: fx.Node) -> bool:
        """A torch.stack whose only reader adds up what was stacked."""
        users = list(node.users)
        return (
            _target(node) == "stack.default"
            and len(users) == 1
            and _target(users[0]) == "sum.dim_IntList"
            and _summed_axis(users[0]) == _stacked_axis(node)
        )

    def _kind(self, node: fx.Node) -> tuple[Op, Sequence[fx.Node]]:
        values = self._values(node)
        if _target(node) == "sum.dim_IntList" and self._is_inner_stack(values[0]):
            stacked = self._values(values[0])
            return Op.ADD, stacked
        return classify(_target(node), [_shape(v) for v in values], _shape(node), node.args, node.kwargs), values


def _target(node: fx.Node) -> str:
    """'add.Tensor' of aten's; '' of anything else."""
    return str(node.target).removeprefix("aten.") if node.op == "call_function" else ""


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _stacked_axis(node: fx.Node) -> int:
    axis = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    return axis % len(_shape(node))


def _summed_axis(node: fx.Node) -> int | None:
    axes: Any = node.args[1] if len(node.args) > 1 else ()
    keeps = len(node.args) > 2 and bool(node.args[2])
    return int(axes[0]) % (len(_shape(node)) + 1) if len(axes) == 1 and not keeps and not node.kwargs else None


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
    steps, outputs, read_outside = record_run(run, model, inputs, known, classify, layer_axes)
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


# --- what both make of operations


def layer_axes(layer: ModuleLayer, module: nn.Module, rank: int) -> int | None:
    """Spatial axes that a layer moves over in an input of that many axes; None where it reads it another way."""
    if layer.kind == "conv":
        axes = len(module.kernel_size)  # type: ignore[arg-type]
        if rank == axes + 1:
            raise UsageError(
                f"{layer.name} reads an input of {rank} axes, which is one without a batch; the input size is that of"
                " the model's input with the channels in front, such as 3,224,224"
            )
        return axes if rank == axes + 2 else None
    if layer.kind == "batch_norm":
        return rank - 2 if rank >= 2 else None
    return 0 if rank >= 2 else None  # linear, scale: the last axis


def classify(
    name: str,
    read: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Op:
    """What an operation of aten is, by its name and the shapes that it reads and gives."""
    if name in ("add.Tensor", "add_.Tensor") and kwargs.get("alpha", 1) == 1 and len(args) == 2:
        if len(read) == 2 and read[0] == read[1] == shape:
            return Op.ADD
        numbers = [value for value in args if isinstance(value, int | float)]
        return Op.PASS if numbers and not numbers[0] and read[0] == shape else Op.OTHER
    if len(read) != 1:
        return Op.OTHER
    if name in _PASSES and read[0] == shape:
        return Op.PASS
    if (
        name in ("dropout.default", "feature_dropout.default", "alpha_dropout.default")
        and read[0] == shape
        and len(args) == 3
        and args[2] is False
    ):
        return Op.PASS
    if name in _VIEWS and read[0] == shape:
        return Op.PASS
    if name in _VIEWS and len(read[0]) > 2 and shape == (read[0][0], math.prod(read[0][1:])):
        return Op.FLATTEN
    return Op.OTHER


_PASSES = frozenset({"clone.default", "alias.default", "detach.default", "contiguous.default", "lift_fresh.default"})
_VIEWS = frozenset(
    {"view.default", "reshape.default", "flatten.using_ints", "_unsafe_view.default"}
    | {"squeeze.default", "squeeze.dim", "squeeze.dims"}
)


def _held_scales(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Scales per channel that a module with more in it holds as a tensor of its own: full name -> (layer, shape)."""
    infos = [
        TensorInfo(name, str(tensor.dtype), tuple(tensor.shape), 0)
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    found = {}
    for layer in group_layers(infos).values():
        if layer.kind == "scale":
            (info,) = layer.tensors.values()
            found[info.name] = (layer.name, info.shape)
    return found
