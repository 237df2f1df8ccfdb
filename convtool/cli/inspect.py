"""`convtool inspect`: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.options import CheckpointPath, Force, SourceOptions, Speech, check_used, parse_input_size
from convtool.cli.output import Reporter, table, tree_text
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.errors import UsageError, human_bytes
from convtool.kinds import kind_named
from convtool.kinds.kind import UNKNOWN, Kind

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint, Layer

NAME = "inspect"
USAGE = "CKPT [PATTERN]"
EXAMPLES = """
convtool inspect model.safetensors
convtool inspect model.safetensors 'layer1.*' --tensors
convtool inspect model.pt --model net.py:Net --input-size 3,64,64 --write-geometry net.toml
convtool inspect model.pt --json | jq -r '.layers[].name'
"""


@grouped
def command(
    checkpoint: CheckpointPath,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            help="Only layers whose name matches, such as 'layer1.*'.",
            autocompletion=complete.layers,
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    *,
    input_size: Annotated[
        str | None,
        typer.Option(
            "--input-size",
            metavar="C,H,W",
            help="With --model: the size of its input, to show what each layer reads and gives, and its multiply-adds.",
            show_default=False,
        ),
    ] = None,
    write_geometry: Annotated[
        Path | None,
        typer.Option(
            "--write-geometry",
            metavar="FILE",
            help="Write what is known of the layers' geometry as TOML for --geometry.",
            show_default=False,
        ),
    ] = None,
    sources: SourceOptions,
    force: Force = False,
    speech: Speech,
) -> int:
    """List a checkpoint's layers: kind, shapes, dtype, bytes, and the geometry where it is known."""
    reporter = speech.reporter(NAME)

    def body() -> None:
        from fnmatch import fnmatchcase

        from convtool.cli.model import read_model, runs_of_layers
        from convtool.kinds.stated import FieldSource

        opened = sources.open(checkpoint, reporter)
        record = opened.record
        found = read_model(sources.model, sources.model_args, opened, reporter)
        fields = sources.fields(None if found is None else found[1].geometry)
        check_used(fields, list(opened.layers))
        fields = fields.with_first(FieldSource("record", record.fields() if record else {}, exact_names=True))
        layers = [
            layer
            for layer in opened.layers.values()
            if pattern is None or layer.name == pattern or fnmatchcase(layer.name, pattern)
        ]
        if pattern is not None and not layers:
            raise UsageError(f"{checkpoint}: no layer matches {pattern!r}; without a pattern all are listed")
        described = [_describe(opened, layer, fields.fields(layer.name), tensors) for layer in layers]
        runs = runs_of_layers(sources.model, found, parse_input_size(input_size))
        if input_size is not None:
            for one in described:
                one["runs"] = runs.get(one["name"], [])
        if write_geometry is not None:
            _write_geometry(write_geometry, {one["name"]: one["geometry"] for one in described}, force)
        document: dict[str, Any] = {
            "file": str(checkpoint),
            "format": opened.format,
            "bytes": sum(info.nbytes for info in opened.infos.values()),
            "tensors": len(opened.infos),
            "record": None if record is None else {"fusions": [fusion.to_json() for fusion in record.fusions]},
            "layers": described,
        }
        reporter.result(document, lambda: _print(reporter, document, tensors))

    return run(reporter, body)


def _write_geometry(path: Path, geometry: dict[str, dict[str, Any] | None], force: bool) -> None:
    from convtool.formats.atomic import replacing
    from convtool.kinds.stated import geometry_toml

    known = {name: fields for name, fields in geometry.items() if fields}
    if not known:
        raise UsageError("--write-geometry: nothing is known of any layer's geometry; --model reads it off the model")
    with replacing(path, force=force) as file:
        file.write(geometry_toml(known).encode())


def _describe(checkpoint: Checkpoint, layer: Layer, fields: dict[str, Any], tensors: bool) -> dict[str, Any]:
    weight = layer.tensors.get("weight") or next(iter(layer.tensors.values()))
    described: dict[str, Any] = {
        "name": layer.name,
        "kind": layer.kind.name,
        "shape": list(weight.shape),
        "bias": "bias" in layer.tensors,
        "dtype": weight.dtype,
        "bytes": sum(info.nbytes for info in layer.stored()),
        "geometry": layer.kind.written_out(fields, layer.shapes) if fields and layer.kind.settable else None,
    }
    if tensors:
        described["tensors"] = [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for info in layer.stored()
        ]
    return described


def _print(reporter: Reporter, document: dict[str, Any], tensors: bool) -> None:
    reporter.remark(
        f"{document['file']}: {document['format']}, {document['tensors']} tensors, {human_bytes(document['bytes'])}"
    )
    if tensors:
        listed = [
            (tensor["name"], tensor["dtype"], _shape(tensor["shape"]), human_bytes(tensor["bytes"]))
            for layer in document["layers"]
            for tensor in layer["tensors"]
        ]
        table(("tensor", "dtype", "shape", "size"), listed, right=("size",))
        return
    if document["layers"] and "runs" in document["layers"][0]:
        _print_runs(reporter, document["layers"])
        return
    rows = [
        (
            layer["name"] or "(bare module)",
            layer["kind"],
            _shape(layer["shape"]) + (" + bias" if layer["bias"] and _kind(layer).main else ""),
            layer["dtype"],
            human_bytes(layer["bytes"]),
            _fields_text(layer["geometry"]) if _kind(layer).settable else "",
        )
        for layer in document["layers"]
    ]
    table(("layer", "kind", "weight", "dtype", "size", "geometry"), rows, right=("size",))
    for fusion in (document["record"] or {"fusions": []})["fusions"]:
        reporter.remark(f"{fusion['name']} was fused by convtool from {tree_text(fusion['sources'])}")


def _kind(layer: dict[str, Any]) -> Kind:
    return kind_named(layer["kind"]) or UNKNOWN


def _print_runs(reporter: Reporter, layers: list[dict[str, Any]]) -> None:
    """A line for each run of a layer, in place of its tensors' sizes."""
    rows = []
    for layer in layers:
        fields = _fields_text(layer["geometry"]) if _kind(layer).settable else ""
        start = (layer["name"] or "(bare module)", layer["kind"], _shape(layer["shape"]))
        rows += [(*start, *_seen(one), fields) for one in layer["runs"] or [None]]
    columns = ("layer", "kind", "weight", "input", "output", "multiply-adds", "geometry")
    table(columns, rows, right=("multiply-adds",))
    total = sum(one["multiply_adds"] for layer in layers for one in layer["runs"])
    reporter.line(f"{total} multiply-adds for one input")


def _seen(one: dict[str, Any] | None) -> tuple[str, str, str]:
    """Input, output and multiply-adds of one run of a layer."""
    if one is None:
        return "-", "-", "-"
    return _shape(one["input_size"]), _shape(one["output_size"]), str(one["multiply_adds"])


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _fields_text(fields: dict[str, Any] | None) -> str:
    if not fields:
        return "not in the file"
    return ", ".join(f"{name} {_value(value)}" for name, value in fields.items() if _worth_saying(name, value))


def _worth_saying(name: str, value: Any) -> bool:
    return not (
        (name == "padding_mode" and value == "zeros")
        or (name == "transposed" and not value)
        or (name == "output_padding" and not any(value))
        or (name == "groups" and value == 1)
        or (name == "dilation" and all(d == 1 for d in value))
    )


def _value(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:g}" if isinstance(value, float) else str(value)
    entries = [str(v) if not isinstance(v, list) else str(v[0]) if v[0] == v[1] else f"{v[0]}:{v[1]}" for v in value]
    return entries[0] if len(set(entries)) == 1 else ",".join(entries)
