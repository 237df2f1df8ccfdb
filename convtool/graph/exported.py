"""The run of a model that an exported program describes, as the operations that a recorded run has.

Values are told apart as in a recording: what is changed in place is another value from then on, for whoever reads that
memory, under whatever name. Which values lie in one memory is known by the operations that make views.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from convtool.checkpoint import Checkpoint
from convtool.errors import UsageError
from convtool.formats.program import Node, Program, Value, values_in
from convtool.graph.cut import cut
from convtool.graph.flow import Flow
from convtool.graph.judge import Judge
from convtool.graph.left_over import COMPUTED
from convtool.graph.operations import OF_SHAPE, read_flow
from convtool.graph.planned import Plan
from convtool.graph.recorded_run import INPUT, UNKNOWN, Made, Operation, Run

# ATen's operations whose value may lie in the memory of what they read first.
_VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "transpose", "t", "permute", "movedim", "swapaxes", "numpy_T", "mT"}
    | {"select", "slice", "narrow", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "reshape_as", "alias"}
    | {"detach", "chunk", "split", "split_with_sizes", "unbind", "tensor_split", "diagonal", "unfold", "as_strided"}
    | {"contiguous", "to", "dropout", "feature_dropout", "real", "imag", "view_as_real", "view_as_complex"}
    | {"lift_fresh"}
)
_IN_TRAINING = "was exported in training, where it takes the numbers of each batch; export the model after model.eval()"
_CONSTANT = -1  # the number of what nothing of the run's input goes into


def read_exported(opened: Checkpoint, program: Program) -> Flow:
    """Return the data flow of an exported program.

    A layer is an operation here, as in a recorded run; one that pads by itself in another way than with zeros, or makes
    its weight of others, is told by its module's run, whose code that is.
    """
    stated = opened.stated
    own_code = {name for name, fields in stated.items() if fields.get("padding_mode", "zeros") != "zeros"}
    made = {name for name, one in opened.layers.items() if any(info.derived_from for info in one.tensors.values())}
    layers = {name: replace(layer, fields=stated.get(name, {})) for name, layer in opened.layers.items()}
    training = (value for node in program.nodes if node.arguments.get("training") is True for value in node.reads())
    homes = {program.tensors.get(value, "").rpartition(".")[0] for value in training}
    apart = dict.fromkeys(made, COMPUTED) | dict.fromkeys(homes & layers.keys(), _IN_TRAINING)
    return read_flow(_Reader(program, own_code | made).run(), layers, apart)


def plan_exported(
    opened: Checkpoint, *, fixed_size: bool = False, everything: bool = False, batch_norms_only: bool = False
) -> Plan:
    """Return every fusion in the network that a checkpoint describes, of which no code is run.

    Args:
        fixed_size: also take what is exact for inputs of the size only that it was exported with.
        everything: cut each chain into the fewest layers; otherwise so that it takes the fewest multiply-adds.
        batch_norms_only: take nothing but batch norms into the layers beside them.

    Raises:
        UsageError: the checkpoint describes none.
    """
    if opened.program is None:
        raise UsageError(
            f"{opened.path}: says nothing of the network's data flow; expected --model, the code that builds it, and"
            " --model-input, such as 3,224,224"
        )
    flow = read_exported(opened, opened.program)
    judge = Judge(flow, opened.is_biased)
    merges, left_alone = cut(judge, fixed_size=fixed_size, cheaper=not everything, batch_norms_only=batch_norms_only)
    stated = {layer.name: {**layer.fields, **opened.stated.get(layer.name, {})} for _, layer in flow.calls()}
    others = (layer for layer in opened.layers.values() if layer.name not in stated)
    uncounted = sum(info.count for layer in others for info in layer.stored())
    return Plan.of(judge, merges, left_alone, opened.layers.values(), stated, uncounted=uncounted)


class _Reader:
    """Reads a program's run.

    Args:
        layers: of the model, by module path, those whose runs are told apart.
    """

    def __init__(self, program: Program, layers: Container[str]) -> None:
        self.program, self.layers = program, layers
        self.operations: list[Operation] = []
        self.made: dict[Value, int] = {}  # the operation that made a value
        self.memory: dict[Value, Value] = {}  # the value whose memory another lies in
        self.changed: dict[Value, int] = {}  # the last operation that changed a value's memory
        self.made_of: dict[Value, tuple[str, ...]] = {}  # the model's tensors that a constant is computed of
        self.constant: dict[Value, Made] = {}  # what made a constant
        self.overwritten: dict[Value, int] = {}  # the last one that changed a constant's memory
        self.runs: dict[tuple[str, str], int] = {}  # of modules, by the number of their first operation

    def run(self) -> Run:
        for value in self.program.inputs:
            self.made[value] = len(self.operations)
            self.operations.append(Operation(INPUT, shape=self.program.shapes.get(value, ())))
        for node in self.program.nodes:
            self._add(node)
        outputs = frozenset(number for value in self.program.outputs if (number := self._number(value)) != _CONSTANT)
        return Run(self.operations, outputs)

    def _add(self, node: Node) -> None:
        read = [
            one for key, value in node.arguments.items() if key != OF_SHAPE.get(node.name) for one in values_in(value)
        ]
        reads = tuple(number for value in read if (number := self._number(value)) != _CONSTANT)
        tensors = tuple(name for value in read for name in self._tensors(value))
        number, arguments = len(self.operations), {key: _plain(value) for key, value in node.arguments.items()}
        operands = {
            key: (self.program.tensors[value], self.program.shapes.get(value, ()))
            for key, value in node.arguments.items()
            if isinstance(value, Value) and value in self.program.tensors and self._number(value) == _CONSTANT
        }
        computed = {
            key: self._made_by(value)
            for key, value in node.arguments.items()
            if isinstance(value, Value) and key not in operands and self._number(value) == _CONSTANT
        }
        shape = self.program.shapes.get(node.gives[0], ()) if node.gives else ()
        within = tuple((one.path, self.runs.setdefault((one.path, one.run), number)) for one in node.inside)
        call = next((one for one in within if one[0] in self.layers), ("", 0))
        self.operations.append(Operation(node.name, reads, shape, tensors, arguments, call, operands, within, computed))
        kind = node.name.split(".")[1] if node.name.count(".") else node.name
        in_place = kind.endswith("_") and not kind.endswith("__")
        for place, value in enumerate(node.gives):
            if read and (in_place or kind in _VIEWS):
                self.memory[value] = self._home(read[0])
            if reads:
                self.made[value] = number
            elif tensors:
                self.made_of[value], self.constant[value] = tensors, Made(number, place)
        if in_place and read:
            (self.changed if reads else self.overwritten)[self._home(read[0])] = number

    def _home(self, value: Value) -> Value:
        return self.memory.get(value, value)

    def _number(self, value: Value) -> int:
        """Return the operation that a value comes from: the last one that changed its memory, if that is later."""
        return max(self.made.get(value, _CONSTANT), self.changed.get(self._home(value), _CONSTANT))

    def _made_by(self, value: Value) -> Made:
        """Return what a constant comes from, as far as it is made of the model's tensors."""
        made = self.constant.get(value, UNKNOWN)
        return UNKNOWN if self.overwritten.get(self._home(value), _CONSTANT) > made.number else made

    def _tensors(self, value: Value) -> tuple[str, ...]:
        """Return the name of the model's tensor that a value is, or lies in; or of those that it is computed of."""
        name = self.program.tensors.get(self._home(value))
        return self.made_of.get(value, ()) if name is None else (name,)


def _plain(value: Any) -> Any:
    """Return an argument with None in place of tensors, as recordings have it."""
    if isinstance(value, Value):
        return None
    return [_plain(one) for one in value] if isinstance(value, list) else value
