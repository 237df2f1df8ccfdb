"""The run of a model that an exported program describes, as the operations that a recorded run has.

Values are told apart as in a recording: what is changed in place is another value from then on, for whoever reads that
memory, under whatever name. Which values lie in one memory is known by the operations that make views.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from convtool.checkpoint import Checkpoint
from convtool.formats.program import Inside, Node, Program, Value
from convtool.graph.flow import Flow
from convtool.graph.operations import INPUT, Operation, Run, read_flow

# ATen's operations whose value may lie in the memory of what they read first.
_VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "transpose", "t", "permute", "movedim", "swapaxes", "numpy_T", "mT"}
    | {"select", "slice", "narrow", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "reshape_as", "alias"}
    | {"detach", "chunk", "split", "split_with_sizes", "unbind", "tensor_split", "diagonal", "unfold", "as_strided"}
    | {
        "contiguous",
        "to",
        "dropout",
        "feature_dropout",
        "real",
        "imag",
        "view_as_real",
        "view_as_complex",
        "lift_fresh",
    }
)
_CONSTANT = -1  # the number of what nothing of the run's input goes into


def read_exported(opened: Checkpoint, program: Program) -> Flow:
    """Return the data flow of an exported program.

    A layer is one here where the program does nothing else in its runs than such a layer does; others stay apart.
    """
    stated = opened.stated
    layers = {name: replace(layer, fields=stated.get(name, {})) for name, layer in opened.layers.items()}
    apart = {name: "the program does something else with its tensors" for name in layers if name not in stated}
    return read_flow(read_run(program, layers), layers, apart)


def read_run(program: Program, layers: Container[str]) -> Run:
    """Return a program's run.

    Args:
        layers: of the model, by module path, those whose runs are told apart.
    """
    return _Reader(program, layers).run()


class _Reader:
    def __init__(self, program: Program, layers: Container[str]) -> None:
        self.program, self.layers = program, layers
        self.operations: list[Operation] = []
        self.made: dict[Value, int] = {}  # the operation that made a value
        self.memory: dict[Value, Value] = {}  # the value whose memory another lies in
        self.changed: dict[Value, int] = {}  # the last operation that changed a value's memory
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
        read = list(node.reads())
        reads = tuple(number for value in read if (number := self._number(value)) != _CONSTANT)
        tensors = tuple(name for value in read if (name := self._tensor(value)) is not None)
        shape = self.program.shapes.get(node.gives[0], ()) if node.gives else ()
        number, arguments = len(self.operations), {key: _plain(value) for key, value in node.arguments.items()}
        self.operations.append(Operation(node.name, reads, shape, tensors, arguments, self._call(node, number)))
        kind = node.name.split(".")[1] if node.name.count(".") else node.name
        in_place = kind.endswith("_") and not kind.endswith("__")
        for value in node.gives:
            if read and (in_place or kind in _VIEWS):
                self.memory[value] = self._home(read[0])
            if reads:
                self.made[value] = number
        if in_place and read and reads:
            self.changed[self._home(read[0])] = number

    def _home(self, value: Value) -> Value:
        return self.memory.get(value, value)

    def _number(self, value: Value) -> int:
        """Return the operation that a value comes from: the last one that changed its memory, if that is later."""
        return max(self.made.get(value, _CONSTANT), self.changed.get(self._home(value), _CONSTANT))

    def _tensor(self, value: Value) -> str | None:
        """Return the name of the model's tensor that a value is, or lies in."""
        return self.program.tensors.get(self._home(value))

    def _call(self, node: Node, number: int) -> tuple[str, int]:
        """Return the outermost layer in whose run an operation happens, and the number of that run."""
        inside: Inside | None = next((one for one in node.inside if one.path in self.layers), None)
        if inside is None:
            return "", 0
        return inside.path, self.runs.setdefault((inside.path, inside.run), number)


def _plain(value: Any) -> Any:
    """Return an argument with None in place of tensors, as recordings have it."""
    if isinstance(value, Value):
        return None
    return [_plain(one) for one in value] if isinstance(value, list) else value
