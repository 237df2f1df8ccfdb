"""The fields of layers that a file itself states: beside a pickled module's tensors, or in an exported program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from convtool.core.fields import Fields
from convtool.errors import ConvtoolError
from convtool.formats.program import Node, Program, Value, values_in
from convtool.formats.tensor_file import SavedModule
from convtool.kinds import KINDS
from convtool.kinds.kind import Layer


def fields_of_modules(layers: Mapping[str, Layer], modules: Mapping[str, SavedModule]) -> dict[str, Fields]:
    """Return the fields of the layers that are modules of torch's own classes.

    What attributes mean is known for those alone: other classes may have a `stride` that isn't a convolution's.
    """
    found: dict[str, Fields] = {}
    for path, module in modules.items():
        layer = layers.get(path)
        if layer is None or module.cls not in layer.kind.modules or not layer.kind.settable:
            continue
        try:
            found[path] = layer.kind.module_fields(SimpleNamespace(**module.attributes))
        except (ConvtoolError, AttributeError, TypeError, ValueError, OverflowError):
            continue  # of an older torch, or damaged: nothing is known
    return found


def other_classes(modules: Mapping[str, SavedModule]) -> dict[str, str]:
    """Return the classes of modules that aren't torch's own, by path: nothing is known of what these compute."""
    own = {name for kind in KINDS for name in kind.modules}
    return {path: module.cls for path, module in modules.items() if module.cls and module.cls not in own}


def fields_of_program(layers: Mapping[str, Layer], program: Program) -> dict[str, Fields]:
    """Return the fields with which a program runs layers; of one that it runs in two ways, nothing."""
    made = {value: node for node in program.nodes for value in node.gives}
    found: dict[str, Fields | None] = {}
    for node in program.nodes:
        for layer in _layers_of(node, program, layers):
            run = [(one.name, one.arguments) for one in (*_before(node, made), node)]
            try:
                fields = layer.kind.fields_of_run(run, layer.shapes)
            except (ConvtoolError, TypeError, ValueError, OverflowError):
                fields = None
            found[layer.name] = fields if found.get(layer.name, fields) == fields else None
    return {name: fields for name, fields in found.items() if fields is not None}


def _layers_of(node: Node, program: Program, layers: Mapping[str, Layer]) -> Iterator[Layer]:
    """Yield the layer that an operation runs, where all of the model's tensors that it reads are that layer's."""
    names = [program.tensors[value] for value in node.reads() if value in program.tensors]
    paths = {name.rpartition(".")[0] for name in names}
    for path in paths if len(paths) == 1 else ():
        if path in layers and layers[path].kind.settable:
            yield layers[path]


def _before(node: Node, made: Mapping[Value, Node]) -> list[Node]:
    """Return the operation that makes what another reads first, where both happen in one run of a module."""
    first: Any = next(iter(node.arguments.values()), None)
    before = next((made[value] for value in values_in(first) if value in made), None)
    same = before is not None and node.inside and before.inside[-1:] == node.inside[-1:]
    return [before] if same and before is not None else []
