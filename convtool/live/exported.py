"""A graph that torch.export made, read as the steps of a data flow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from convtool.graph.flow import Flow, Op, Step
from convtool.graph.operations import classify
from convtool.kinds.found import group_layers
from convtool.kinds.kind import TensorInfo
from convtool.live.layers import ModuleLayer, layer_axes


def read_graph(
    graph: fx.Graph, tensors: Mapping[str, str], model: nn.Module, layers: Mapping[str, ModuleLayer]
) -> Flow:
    """The data flow of an exported graph.

    Args:
        tensors: the names of parameters and buffers by those of the graph's inputs.
        layers: of the model, those that are one step each.
    """
    return _ExportedRun(graph, tensors, model, layers).flow()


def changes_in_place(graph: fx.Graph) -> bool:
    """Whether any operation changes what others read."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


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
        return layer_axes(self.layers[path], len(_shape(value)))

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
        self._add(nodes[-1], Step(Op.LAYER, layer.name, self._numbers(read), (), axes, layer.kind.channels_last))

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


def _held_scales(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Scales per channel that a module with more in it holds as a tensor of its own: full name -> (layer, shape)."""
    infos = [
        TensorInfo(name, str(tensor.dtype), tuple(tensor.shape), 0)
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    found = {}
    for layer in group_layers(infos).values():
        if layer.kind.parameter:
            (info,) = layer.tensors.values()
            found[info.name] = (layer.name, info.shape)
    return found
