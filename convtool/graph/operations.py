"""A run of a model as operations of ATen, and the data flow that these make: layers, sums, and everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from convtool.core.fields import Fields
from convtool.errors import ConvtoolError, UsageError
from convtool.graph.computed import with_own_weight
from convtool.graph.flow import Flow, Step
from convtool.graph.passing import moved_axes
from convtool.graph.recorded_run import INPUT, Operation, Run
from convtool.graph.shuffled import with_shuffles
from convtool.kinds.kind import Layer
from convtool.kinds.written import layer_of_operation

_ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor")
# Operations that give a constant itself, in another shape or in the dtype that it has.
VIEWS_OF_CONSTANTS = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "alias.default", "detach.default", "unsqueeze.default", "to.dtype"),
        *("to.dtype_layout", "to.device", "to.other", "flatten.using_ints", "contiguous.default"),
    )
)
_OUTSIDE = -1  # whoever reads the values that leave the run


def read_flow(
    run: Run, layers: Mapping[str, Layer], apart: Mapping[str, str], foreign: Mapping[str, str] | None = None
) -> Flow:
    """Return the data flow of a run.

    Args:
        layers: those of the model, by name. A run of one is a step where it reads one value and gives one; outside of
            such runs an operation is one that its kind says it is, and that reads all of its tensors.
        apart: layers that must stay as they are, with the reason.
        foreign: layers that are left alone unless their operations tell what they are, with the reason.

    Raises:
        UsageError: the run's input has no batch axis.
    """
    return _Reader(with_shuffles(run), layers, apart, foreign or {}).flow()


def fields_of(layer: Layer, operation: Operation) -> Fields | None:
    """Return the fields of a layer that an operation is a run of; None where it is none, or has what none here has."""
    try:
        return layer.kind.fields_of_run([(operation.name, operation.arguments)], layer.shapes)
    except ConvtoolError:
        return None


def _in_place(operation: Operation) -> bool:
    return operation.name.rpartition(".")[0].endswith("_")


def _is_another(layer: Layer, operation: Operation) -> bool:
    """Return whether a module is another layer while it runs than it is before and after that."""
    training, eps = (operation.arguments.get(name) for name in ("training", "eps"))
    return bool(training) or (eps is not None and eps != layer.fields.get("eps", eps))


class _Reader:
    def __init__(
        self, run: Run, layers: Mapping[str, Layer], apart: Mapping[str, str], foreign: Mapping[str, str]
    ) -> None:
        self.run, self.operations, self.layers, self.apart = run, run.operations, layers, dict(apart)
        self.foreign = foreign
        self.owners = {info.name: layer for layer in layers.values() for info in layer.tensors.values()}
        self.users: dict[int, set[int]] = defaultdict(set)
        calls: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, operation in enumerate(self.operations):
            for value in operation.reads:
                self.users[value].add(number)
            if operation.call[0]:
                calls[operation.call].append(number)
        for value in run.outputs | run.kept:
            self.users[value].add(_OUTSIDE)
        # Operations that compute a weight that is known to be standardised, of the layer's own tensors.
        self.computing = {
            number
            for operation in self.operations
            if operation.computed
            for number in with_own_weight(self.operations, operation).inside
        }
        self.calls = {call: inside for call, inside in calls.items() if self._is_layer(inside)}
        self.steps: list[Step] = []
        self.number: dict[int, int] = {}  # the steps by their operations

    def flow(self) -> Flow:
        for number, operation in enumerate(self.operations):
            inside = self.calls.get(operation.call)
            step = None
            if inside is None:
                step = self._step(number)
            elif number == inside[-1]:
                step = self._layer_step(self.layers[operation.call[0]], self._read_by(inside), operation.shape)
            if step is not None:
                self.number[number] = len(self.steps)
                self.steps.append(step)
        kept = self._kept([self.number[value] for value in self.run.kept if value in self.number])
        outputs = frozenset(self.number[value] for value in self.run.outputs if value in self.number)
        return Flow(tuple(self.steps), outputs, {**kept, **self.apart})

    def _read_by(self, inside: Sequence[int]) -> list[int]:
        """Return what is read by operations and made by none of them."""
        return list(dict.fromkeys(value for n in inside for value in self.operations[n].reads if value not in inside))

    def _is_layer(self, inside: Sequence[int]) -> bool:
        """Return whether a call's operations read one value and give one, and no tensors but the layer's own."""
        layer = self.layers[self.operations[inside[0]].call[0]]
        given = {number for number in inside if not self.users[number] <= set(inside)}
        own = {info.name for info in layer.tensors.values()}
        read = self._read_by(inside)
        # Of tied tensors only one name is known here; such a layer is left alone anyway.
        plain = layer.name in self.apart or all(own.issuperset(self.operations[number].tensors) for number in inside)
        if any(_is_another(layer, self.operations[number]) for number in inside):
            self.apart.setdefault(
                layer.name, "it runs in training mode, or with another eps than it has before the run"
            )
            return False
        return len(read) == 1 and given <= {inside[-1]} and plain and self._axes(layer, read[0]) is not None

    def _axes(self, layer: Layer, value: int) -> int | None:
        rank = len(self.operations[value].shape)
        axes = layer.kind.moves_over(rank, layer.shapes, layer.fields)
        if axes is None and rank - 1 == layer.axes():
            without = f"reads an input of {rank} axes, which is one without a batch"
            if all(len(before.shape) <= rank for before in self.operations[:value]):  # and so has the model's input
                raise UsageError(
                    f"{layer.name} {without}; the input size is that of the model's input with the channels in front,"
                    " such as 3,224,224"
                )
            self.apart.setdefault(layer.name, f"it {without}")
        return axes

    def _layer_step(
        self, layer: Layer, reads: Sequence[int], shape: tuple[int, ...], axes: int | None = None
    ) -> Step | None:
        axes = self._axes(layer, reads[0]) if axes is None else axes
        return None if axes is None else Step((self.number[reads[0]],), shape, layer, axes)

    def _step(self, number: int) -> Step | None:
        """Return an operation outside of the layers' runs as a step; None for one that makes a constant."""
        operation, reads = self.operations[number], self.operations[number].reads
        step = self._as_layer(operation) if len(reads) == 1 else None
        if step is not None:
            return step
        constant = not reads and operation.name != INPUT
        # A layer whose tensors are read by anything but its own run has to keep them.
        for name in () if number in self.computing else operation.tensors:
            layer = self.owners.get(name)
            if layer is not None and not (constant and operation.name in VIEWS_OF_CONSTANTS):
                reason = f"{name} is read outside of the layer's own run as well"
                self.apart.setdefault(layer.name, self.foreign.get(layer.name, reason))
        if constant or any(self._stacked(user) == number for user in self.users[number]):
            return None
        stacked = self._stacked(number)
        if stacked is not None:
            reads = self.operations[stacked].reads
        adds = stacked is not None or self._adds(operation, reads)
        steps = tuple(self.number[value] for value in reads)
        before = self.operations[reads[0]].shape if len(reads) == 1 else ()
        moves = moved_axes(operation.name, operation.arguments, before, operation.shape) if before else {}
        stacks = self._stacks(operation)
        about, in_place = operation.name, _in_place(operation)
        return Step(steps, operation.shape, None, 0, adds, stacks, moves, about, in_place)

    def _as_layer(self, operation: Operation) -> Step | None:
        """Return what an operation that reads one value is by itself."""
        about = (operation.name, operation.arguments, self.operations[operation.reads[0]].shape, operation.shape)
        if not operation.tensors:
            written = layer_of_operation(*about)
            step = None if written is None else self._layer_step(written, operation.reads, operation.shape)
            return None if step is None else replace(step, moves=moved_axes(*about), in_place=_in_place(operation))
        layer = self.owners.get(operation.tensors[0])
        operation, made, _ = with_own_weight(self.operations, operation)
        if layer is None or self._reads_others(layer, operation):
            return None
        if layer.kind.parameter:
            known = operation.name in layer.kind.operations and layer.kind.of_operation(*about) is not None
            axes = self._factor_axes(operation) if known else None
            return None if axes is None else self._layer_step(layer, operation.reads, operation.shape, axes)
        fields = fields_of(layer, operation)
        shapes = {key: shape for key, (_, shape) in operation.operands.items() if key != "gain"}  # read as one axis
        if fields is None or any(shape != layer.shapes[key] for key, shape in shapes.items()):
            return None
        return self._layer_step(replace(layer, fields={**fields, **made}), operation.reads, operation.shape)

    def _reads_others(self, layer: Layer, operation: Operation) -> bool:
        """Return whether an operation reads other tensors than all of a layer's own, each as the argument it is."""
        given = {key: name for key, (name, _) in operation.operands.items()}
        own = {key: info.name for key, info in layer.tensors.items() if key not in layer.kind.counters}
        if layer.kind.parameter:
            return sorted(given.values()) != sorted(own.values()) or len(operation.tensors) != 1
        return bool(operation.computed) or given != own or sorted(operation.tensors) != sorted(own.values())

    def _factor_axes(self, operation: Operation) -> int | None:
        """Return the spatial axes behind the one that a tensor's numbers belong to: all, or none; None for others."""
        value = self.operations[operation.reads[0]].shape
        ((_, factors),) = operation.operands.values()
        long = [axis - len(factors) for axis, size in enumerate(factors) if size > 1]
        if len(value) < 2 or len(factors) > len(value) or len(long) > 1:
            return None
        axis = len(value) + (long[0] if long else -len(factors))
        if value[axis] != math.prod(factors) or axis not in (1, len(value) - 1):
            return None
        return len(value) - 2 if axis == 1 else 0

    def _adds(self, operation: Operation, reads: Sequence[int]) -> bool:
        plain = operation.name in _ADDITIONS and operation.arguments.get("alpha", 1) == 1
        return plain and len(reads) == 2 and {self.operations[value].shape for value in reads} == {operation.shape}

    @staticmethod
    def _stacks(operation: Operation) -> int:
        """Return the axis along which an operation puts values of the run side by side; 0 where it doesn't."""
        if operation.name != "aten.cat.default" or len(operation.reads) != len(operation.arguments["tensors"]):
            return 0
        axis: int = operation.arguments.get("dim", 0)
        return axis % len(operation.shape)

    def _stacked(self, number: int) -> int | None:
        """Return the torch.stack all of which an operation adds up again, and which nothing else reads."""
        # torch.stack([a(x), b(x)]).sum(0) is how some code adds a list of branches up.
        operation = Operation("") if number == _OUTSIDE else self.operations[number]
        if operation.name != "aten.sum.dim_IntList" or len(operation.reads) != 1:
            return None
        (value,) = operation.reads
        before, axes = self.operations[value], list(operation.arguments.get("dim") or [])
        whole = operation.arguments.keys() - {"keepdim"} == {"self", "dim"} and not operation.arguments.get("keepdim")
        if before.name != "aten.stack.default" or len(axes) != 1 or not whole or self.users[value] != {number}:
            return None
        rank = len(before.shape)
        return value if axes[0] % rank == before.arguments.get("dim", 0) % rank else None

    def _kept(self, ahead: list[int]) -> dict[str, str]:
        """Return the layers whose values are these steps', or go into them with only copies and additions between."""
        kept, seen = set(), set[int]()
        while ahead:
            number = ahead.pop()
            step = self.steps[number]
            if step.layer is not None and not step.written:
                kept.add(step.layer.name)
            elif (step.adds or step.written) and number not in seen:
                ahead += step.reads
            seen.add(number)
        return dict.fromkeys(sorted(kept), "the model's code keeps its value")
