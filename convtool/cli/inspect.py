"""`convtool inspect`: what is in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from convtool.cli import complete, shared
from convtool.cli.command import Command
from convtool.cli.document import HIDDEN, OPTIONAL, Count, Dtype, LayerFields, LayerKind, Sizes
from convtool.cli.options import argument, flag, option
from convtool.cli.output import Reporter, table, times
from convtool.cli.saved import Recorded
from convtool.core.names import grouped, some_of
from convtool.core.tree import tree_text
from convtool.errors import UsageError, human_bytes
from convtool.kinds import kind_named
from convtool.kinds.kind import UNKNOWN, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convtool.checkpoint import Checkpoint
    from convtool.graph.judge import LayerRun
    from convtool.kinds.scaling import Scaling
    from convtool.kinds.stated import Known

EXAMPLES = """
convtool inspect model.safetensors
convtool inspect model.safetensors 'layer1.*' head --tensors
convtool inspect model.pt --model net.py:Net --model-input 3,64,64 --write-geometry net.toml
convtool inspect model.pt --json | jq -r '.layers[].name'
"""

USUAL = {"padding_mode zeros", "not transposed", "output_padding 0", "groups 1", "dilation 1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to list, and where what a checkpoint doesn't hold comes from."""

    checkpoint: Path = shared.checkpoint()
    patterns: list[str] | None = argument(
        "[PATTERN...]", "Only layers whose names match one of these, such as 'layer1.*'.", complete.layers
    )
    tensors: bool = flag("List every tensor.")
    model_input: list[str] | None = shared.model_input()
    write_geometry: Path | None = option("FILE", "Write what is known of the layers' geometry as TOML for --geometry.")
    sources: shared.Sources
    force: bool = shared.force()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in the file."""

    name: str
    dtype: Dtype
    shape: Sizes
    bytes: Count


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors that share a module path.

    Attributes:
        name: module path; '' for a bare module.
        shape: of its weight, or else of its largest tensor.
        scaling: of an adapter.
        module: its class, where the file names one that isn't torch's own; what that computes isn't known.
        geometry: what is known of it; null where nothing is.
        origins: by field, who says so.
        assumed: those of the fields that nobody stated when convtool wrote them down.
        rests_on: what was assumed of the layers that it was made of.
        tensors: with --tensors.
        runs: with --model-input: each time that the layer runs; none where the model's run doesn't show it.
    """

    name: str
    kind: LayerKind
    shape: Sizes
    bias: bool
    dtype: Dtype
    bytes: Count
    geometry: LayerFields | None
    module: str | None
    origins: dict[str, str] | None
    assumed: tuple[str, ...]
    rests_on: tuple[str, ...]
    tensors: tuple[Tensor, ...] | None = field(metadata=OPTIONAL)
    runs: Sequence[LayerRun] | None = field(metadata=OPTIONAL)
    scaling: Scaling | None = field(metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class Record:
    """What convtool wrote down when it wrote the file."""

    fusions: tuple[Recorded, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A checkpoint's layers.

    Attributes:
        bytes: of all tensors together.
        others: what isn't tensors, among them and beside them, by name, and what it is.
        classes: classes and functions that a pickle names and no state dict is made of; none of them is run.
        record: what convtool recorded when it wrote the file.
    """

    file: Path
    format: Annotated[str, ("enum", ("safetensors", "torch", "torchscript", "pt2", "dcp"))]
    bytes: Count
    tensors: Count
    record: Record | None
    layers: tuple[Layer, ...]
    others: dict[str, str]
    classes: tuple[str, ...]
    by_tensor: bool = field(metadata=HIDDEN)


def run(options: Options, reporter: Reporter) -> Result:
    """List a checkpoint's layers: kind, shapes, dtype, bytes, and the geometry where it is known."""
    from fnmatch import fnmatchcase

    from convtool.checkpoint.record import field_source
    from convtool.cli.model import runs_of_layers

    path, patterns, sources = options.checkpoint, options.patterns, options.sources
    opened = sources.open(path, reporter)
    record = opened.record
    found = sources.read_model(opened, reporter)
    fields = sources.fields(found, opened.layers).with_first(field_source(opened))
    fitting = {one: {name for name in opened.layers if name == one or fnmatchcase(name, one)} for one in patterns or ()}
    for pattern, some in fitting.items():
        if not some:
            raise UsageError(f"{path}: no layer matches {pattern!r}; without a pattern all are listed")
    names = [name for name in opened.layers if not patterns or any(name in some for some in fitting.values())]
    known = {name: fields.known(name, opened.layers[name]) for name in names}
    runs = runs_of_layers(found, options.model_input)
    ran = {name: None if runs is None else runs.get(name, ()) for name in names}
    layers = [_layer(opened, name, known[name], options.tensors, ran[name]) for name in names]
    if options.write_geometry is not None:
        _write_geometry(options.write_geometry, layers, options.force)
    return Result(
        path,
        opened.format,
        sum(info.nbytes for info in opened.infos.values()),
        len(opened.infos),
        None if record is None else Record(tuple(map(Recorded.of, record.fusions))),
        tuple(layers),
        opened.left_out,
        tuple(opened.classes),
        options.tensors,
    )


def _write_geometry(path: Path, layers: Sequence[Layer], force: bool) -> None:
    from convtool.formats.atomic import replacing
    from convtool.kinds.stated import geometry_toml

    known = {layer.name: layer.geometry for layer in layers if layer.geometry}
    if not known:
        raise UsageError("--write-geometry: nothing is known of any layer's geometry; --model reads it off the model")
    with replacing(path, force=force) as file:
        file.write(geometry_toml(known).encode())


def _layer(opened: Checkpoint, name: str, known: Known, tensors: bool, runs: Sequence[LayerRun] | None) -> Layer:
    layer, record = opened.layers[name], opened.record
    # None where nothing is known, since defaults would be a guess.
    geometry = layer.kind.written_out(known.fields, layer.shapes) if known.fields and layer.kind.settable else None
    weight = layer.tensors.get("weight") or max(layer.tensors.values(), key=lambda info: info.count)
    scaled = None
    if layer.kind.adapts:
        from convtool.fusing.adapters import scaling

        scaled = scaling(opened, name, known.fields)
    return Layer(
        layer.name,
        layer.kind.name,
        weight.shape,
        "bias" in layer.tensors,
        weight.dtype,
        sum(info.nbytes for info in layer.stored()),
        geometry,
        opened.other_classes.get(name),
        {field: known.origins[field] for field in geometry} if geometry else None,
        tuple(field for field in geometry or () if field in known.assumed),
        tuple(f"{one}: {what}" for one, what in (record.rests_on().get(name, ()) if record else ())),
        tuple(Tensor(info.name, info.dtype, info.shape, info.nbytes) for info in layer.stored()) if tensors else None,
        runs,
        scaled,
    )


def show(result: Result, reporter: Reporter) -> None:
    """Print a table of layers, of their runs, or of tensors."""
    reporter.remark(f"{result.file}: {result.format}, {result.tensors} tensors, {human_bytes(result.bytes)}")
    if result.by_tensor:
        tensors = [one for layer in result.layers for one in layer.tensors or ()]
        rows = [(one.name, one.dtype, _shape(one.shape), human_bytes(one.bytes)) for one in tensors]
        table(("tensor", "dtype", "shape", "size"), rows, right=("size",))
    elif result.layers and result.layers[0].runs is not None:
        _show_runs(result, reporter)
    else:
        _show_layers(result, reporter)
    if result.others:
        reporter.remark(f"not tensors: {some_of([f'{name} ({what})' for name, what in result.others.items()])}")
    if result.classes:
        reporter.remark(f"names classes and functions, none of which is run: {some_of(result.classes)}")


def _show_layers(result: Result, reporter: Reporter) -> None:
    """Print a line for each layer, and what convtool did to it."""
    rows: list[tuple[str, ...]] = []
    for layer in result.layers:
        bias = " + bias" if layer.bias and _kind(layer).main else ""
        rows.append((*_head(layer, bias), layer.dtype, human_bytes(layer.bytes)))
    _show_table(("layer", "kind", "weight", "dtype", "size"), rows, result.layers, reporter)
    said = (text.partition(": ") for layer in result.layers for text in layer.rests_on)
    assumed = grouped((name, what) for name, _, what in said)
    reporter.lines([f"assumed when the fused layers were made: {text}" for text in assumed])
    listed = {layer.name for layer in result.layers}
    for fusion in result.record.fusions if result.record else ():
        if fusion.name in listed:
            reporter.remark(f"{fusion.name} was fused by convtool from {tree_text(fusion.sources)}")


def _show_runs(result: Result, reporter: Reporter) -> None:
    """Print a line for each run of a layer, in place of its tensors' sizes."""
    rows: list[tuple[str, ...]] = []
    layers: list[Layer] = []
    for layer in result.layers:
        seen = [(_shape(one.input_size), _shape(one.output_size), str(one.multiply_adds)) for one in layer.runs or ()]
        rows += [(*_head(layer), *one) for one in seen or [("-", "-", "-")]]
        layers += [layer] * max(1, len(seen))
    _show_table(("layer", "kind", "weight", "input", "output", "multiply-adds"), rows, layers, reporter)
    total = sum(one.multiply_adds for layer in result.layers for one in layer.runs or ())
    reporter.line(f"{total} multiply-adds for one input")


def _show_table(
    columns: tuple[str, ...], rows: list[tuple[str, ...]], layers: Sequence[Layer], reporter: Reporter
) -> None:
    """Print rows with the geometry of each one's layer; who says so once, where it is the same for all."""
    origins = {(layer.origins or {})[name] for layer in layers for name in _worth_saying(layer)}
    cells = [(*row, _fields_text(layer, len(origins) > 1)) for row, layer in zip(rows, layers, strict=True)]
    table((*columns, "geometry"), cells, right=("size", "multiply-adds"))
    if len(origins) == 1:
        reporter.line(f"geometry by {origins.pop()}")


def _kind(layer: Layer) -> Kind:
    return kind_named(layer.kind) or UNKNOWN


def _head(layer: Layer, bias: str = "") -> tuple[str, str, str]:
    return layer.name or "(bare module)", layer.kind, _shape(layer.shape) + bias


def _shape(shape: Sequence[int]) -> str:
    return times(shape) or "scalar"


def _worth_saying(layer: Layer) -> dict[str, str]:
    """Return what is known of a layer's fields, in words by field, but for what is so of most layers."""
    said = {name: _kind(layer).say(name, value) for name, value in (layer.geometry or {}).items()}
    return {name: text for name, text in said.items() if text not in USUAL}


def _fields_text(layer: Layer, with_origins: bool) -> str:
    """Return what is known of a layer's fields, and who says so."""
    kind = _kind(layer)
    if layer.scaling is not None:
        return str(layer.scaling)
    if not kind.settable:
        return ""
    if not layer.geometry:
        return f"not in the file (a {layer.module})" if layer.module else "not in the file"
    by_origin: dict[str, list[str]] = {}
    for name, text in _worth_saying(layer).items():
        assumed = " (assumed)" if name in layer.assumed else ""
        by_origin.setdefault((layer.origins or {})[name], []).append(text + assumed)
    return "; ".join(", ".join(said) + f", by {by}" * with_origins for by, said in by_origin.items())


COMMAND = Command("CKPT [PATTERN...]", EXAMPLES, Options, run, show)
