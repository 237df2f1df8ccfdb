"""The run of a model that an exported program describes, as the operations that a recorded run has.

Values are told apart as in a recording; which of them lie in one memory is known by the operations that make views.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from convtool.checkpoint import Checkpoint
from convtool.errors import UsageError
from convtool.formats.program import Node, Program, Value
from convtool.graph.cut import cut
from convtool.graph.flow import Flow
from convtool.graph.judge import Judge
from convtool.graph.left_over import COMPUTED
from convtool.graph.operations import read_flow
from convtool.graph.planned import Plan
from convtool.graph.recorded_run import CONSTANT, Following, Run

# ATen's operations whose value may lie in the memory of what they read first.
_VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "transpose", "t", "permute", "movedim", "swapaxes", "numpy_T", "mT"}
    | {"select", "slice", "narrow", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "reshape_as", "alias"}
    | {"detach", "chunk", "split", "split_with_sizes", "unbind", "tensor_split", "diagonal", "unfold", "as_strided"}
    | {"contiguous", "to", "dropout", "feature_dropout", "real", "imag", "view_as_real", "view_as_complex"}
    | {"lift_fresh"}
)
_IN_TRAINING = "was exported in training, where it takes the numbers of each batch; export the model after model.eval()"


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


class _Reader(Following):
    """Reads a program's run.

    Args:
        layers: of the model, by module path, those whose runs are told apart.
    """

    def __init__(self, program: Program, layers: Container[str]) -> None:
        super().__init__(Value, program.tensors, layers)
        self.program = program
        self.homes: dict[Value, Value] = {}  # the value whose memory another lies in
        self.runs: dict[tuple[str, str], int] = {}  # of modules, by the number of their first operation

    def run(self) -> Run:
        for value in self.program.inputs:
            self.begin(value)
        for node in self.program.nodes:
            self._add(node)
        return Run(self.operations, frozenset(map(self.number, self.program.outputs)) - {CONSTANT})

    def _add(self, node: Node) -> None:
        reading = read, _ = self.read_by(node.name, node.arguments)
        number = len(self.operations)
        kind = node.name.split(".")[1] if node.name.count(".") else node.name
        in_place = kind.endswith("_") and not kind.endswith("__")
        if read and (in_place or kind in _VIEWS):
            self.homes |= dict.fromkeys(node.gives, self.home(read[0]))
        within = [(one.path, self.runs.setdefault((one.path, one.run), number)) for one in node.inside]
        self.see(node.name, node.arguments, reading, within, node.gives, read[:1] if in_place else ())

    def key(self, value: Value) -> Value:
        return value

    def home(self, value: Value) -> Value:
        return self.homes.get(value, value)

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.program.shapes.get(value, ())

    def is_whole(self, value: Value) -> bool:
        return value in self.program.tensors
