"""The fields of layers that a file itself states: beside a pickled module's tensors, or in an exported program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from convtool.core.fields import Fields
from convtool.errors import ConvtoolError
from convtool.formats.program import Node, Program
from convtool.formats.tensor_file import SavedModule
from convtool.kinds import KINDS
from convtool.kinds.derived import WEIGHT_NORM
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


def classes_in_program(program: Program) -> dict[str, str]:
    """Return what reads a module's tensors other than a module of torch's in its place: its class, or who does."""
    found: dict[str, str] = {}
    for node in program.nodes:
        for value in node.reads():
            path = program.tensors.get(value, "").rpartition(".")[0]
            cls = next((one.cls for one in node.inside if one.path == path), "")
            by = f"function that {node.inside[-1].cls} calls" if node.inside else "function"
            if value in program.tensors and not cls.startswith("torch."):
                found[path] = cls or by
    return found


def fields_of_program(layers: Mapping[str, Layer], program: Program) -> dict[str, Fields]:
    """Return the fields with which a program runs layers.

    Of a layer whose runs differ, or do anything else besides, nothing is said; one without fields is there with none.
    """
    found: dict[str, Fields | None] = {}
    program = _with_derived(program, layers)
    for run in _runs(program, layers):
        for layer in _layers_of(run, program, layers):
            try:
                fields = layer.kind.fields_of_run([(one.name, one.arguments) for one in run], layer.shapes)
            except (ConvtoolError, TypeError, ValueError, OverflowError):
                fields = None
            found[layer.name] = fields if found.get(layer.name, fields) == fields else None
    return {name: fields for name, fields in found.items() if fields is not None}


def _with_derived(program: Program, layers: Mapping[str, Layer]) -> Program:
    """Return the program with the weights that weight norms make as tensors of their layers, and without the norms."""
    infos = (info for layer in layers.values() for info in layer.tensors.values())
    derived = {info.derived_from: info.name for info in infos if info.derived_from}
    nodes, tensors = list[Node](), dict(program.tensors)
    for node in program.nodes:
        v_g = [program.tensors.get(value, "") for value in node.reads()] if node.name == WEIGHT_NORM else []
        name = derived.get(tuple(reversed(v_g)))
        if name is not None and len(node.gives) == 1:
            tensors[node.gives[0]] = name
        else:
            nodes.append(node)
    return replace(program, nodes=nodes, tensors=tensors)


def _runs(program: Program, layers: Mapping[str, Layer]) -> Iterator[list[Node]]:
    """Yield the operations of each run of a layer's module; operations outside of these are by themselves."""
    runs: dict[Any, list[Node]] = {}
    for number, node in enumerate(program.nodes):
        inside = node.inside[-1] if node.inside and node.inside[-1].path in layers else number
        runs.setdefault(inside, []).append(node)
    yield from runs.values()


def _layers_of(run: list[Node], program: Program, layers: Mapping[str, Layer]) -> Iterator[Layer]:
    """Yield the layer that operations run: the one whose tensors they read, or those, none of which they are."""
    names = [program.tensors[value] for node in run for value in node.reads() if value in program.tensors]
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        if path in layers:
            yield layers[path]
