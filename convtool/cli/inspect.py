"""`convtool inspect`: what is in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.options import CheckpointPath, GeometryFile, Json, Model, ModelArgs, Quiet, Root, Settings
from convtool.cli.output import Reporter, human_bytes, table, tree_text
from convtool.cli.run import run

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint, Layer

NAME = "inspect"
USAGE = "CKPT [PATTERN]"
EXAMPLES = """
convtool inspect model.safetensors
convtool inspect model.safetensors 'layer1.*' --tensors
convtool inspect model.pt --json | jq -r '.layers[].name'
"""


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
    geometry: GeometryFile = None,
    model: Model = None,
    model_args: ModelArgs = None,
    settings: Settings = None,
    root: Root = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """List a checkpoint's layers: kind, shapes, dtype, bytes, and the geometry where it is known."""
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> None:
        from fnmatch import fnmatchcase

        from convtool.checkpoint import open_checkpoint
        from convtool.cli.model import model_fields
        from convtool.cli.options import check_used, field_sources
        from convtool.core.fields import FieldSource
        from convtool.errors import UsageError

        opened = open_checkpoint(checkpoint, root)
        record = opened.record
        sources = field_sources(geometry, settings, {}, model_fields(model, model_args, opened, reporter))
        check_used(sources, list(opened.layers))
        sources = sources.with_first(FieldSource("record", record.fields() if record else {}, exact_names=True))
        layers = [
            layer
            for layer in opened.layers.values()
            if pattern is None or layer.name == pattern or fnmatchcase(layer.name, pattern)
        ]
        if pattern is not None and not layers:
            raise UsageError(f"{checkpoint}: no layer matches {pattern!r}; without a pattern all are listed")
        described = [_describe(opened, layer, sources.fields(layer.name), tensors) for layer in layers]
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


def _describe(checkpoint: Checkpoint, layer: Layer, fields: dict[str, Any], tensors: bool) -> dict[str, Any]:
    weight = layer.tensors.get("weight") or next(iter(layer.tensors.values()))
    described: dict[str, Any] = {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(weight.shape),
        "bias": "bias" in layer.tensors,
        "dtype": weight.dtype,
        "bytes": sum(info.nbytes for info in layer.stored()),
        "geometry": _geometry(layer, fields),
    }
    if tensors:
        described["tensors"] = [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for info in layer.stored()
        ]
    return described


def _geometry(layer: Layer, fields: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the layer's geometry; None where nothing is, since defaults would be a guess."""
    if layer.kind == "batch_norm":
        return fields or None
    if layer.kind != "conv" or not fields:
        return None
    from convtool.core.fields import geometry_fields
    from convtool.core.geometry import Geometry

    known = geometry_fields(Geometry.of(tuple(layer.tensors["weight"].shape[2:]), **fields))
    return {name: value for name, value in known.items() if name in fields}


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
    rows = [
        (
            layer["name"] or "(bare module)",
            layer["kind"],
            _shape(layer["shape"]) + (" + bias" if layer["bias"] and layer["kind"] in ("conv", "linear") else ""),
            layer["dtype"],
            human_bytes(layer["bytes"]),
            _fields_text(layer["geometry"]) if layer["kind"] in ("conv", "batch_norm") else "",
        )
        for layer in document["layers"]
    ]
    table(("layer", "kind", "weight", "dtype", "size", "geometry"), rows, right=("size",))
    for fusion in (document["record"] or {"fusions": []})["fusions"]:
        reporter.remark(f"{fusion['name']} was fused by convtool from {tree_text(fusion['sources'])}")


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
