"""`convtool fuse`: a chain of layers becomes one layer of a new checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli.options import (
    CheckpointPath,
    Dtype,
    Force,
    GeometryFile,
    InputSize,
    Json,
    Quiet,
    Root,
    Settings,
    parse_dtype,
    parse_input_size,
)
from convtool.cli.output import Reporter
from convtool.cli.run import run

if TYPE_CHECKING:
    from convtool.checkpoint.chain import LoweredLayer
    from convtool.checkpoint.edit import Edit
    from convtool.core.fuse import Fusion

NAME = "fuse"
EXAMPLES = """[bold]Examples[/bold]

convtool fuse resnet.safetensors layer1.0.conv1 layer1.0.bn1 -o fused.safetensors --set layer1.0.conv1.padding=1

convtool fuse net.pt reduce spread gather -o fused.pt --set gather.stride=2 --dry-run

convtool fuse net.pt a b -o out.pt --input-size 32,32   (exact for that size is enough)
"""


def command(
    checkpoint: CheckpointPath,
    layers: Annotated[
        list[str], typer.Argument(metavar="LAYER LAYER...", help="The chain, first to last.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The new checkpoint.", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the fused layer is called; the first layer's name by default."),
    ] = None,
    input_size: InputSize = None,
    allow_border: Annotated[
        bool, typer.Option("--allow-border", help="Fuse even where outputs near the border would differ.")
    ] = False,
    dtype: Dtype = None,
    geometry: GeometryFile = None,
    settings: Settings = None,
    root: Root = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Replace a chain of linear layers by the one layer that computes the same, and write the checkpoint.

    Convolutions, batch norms and linear layers that follow each other with nothing in between become one. The fusion
    has to be exact for every input size, or for --input-size where that is given; otherwise it is refused, with the
    rows and columns that would differ and the ways out.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> None:
        from convtool.checkpoint import open_checkpoint
        from convtool.checkpoint.chain import lower_chain, stored_dtype
        from convtool.checkpoint.write import check_output, write_edited
        from convtool.cli.options import check_used, field_sources
        from convtool.core.fuse import fuse_chain
        from convtool.core.geometry import format_sizes
        from convtool.errors import UsageError

        if len(layers) < 2:
            raise UsageError(f"fuse takes two layers or more, first to last; got only {format_sizes(layers)}")
        rounded, size = parse_dtype(dtype), parse_input_size(input_size)
        opened = open_checkpoint(checkpoint, root)
        check_output(out, force=force or dry_run)
        sources = field_sources(geometry, settings, {})
        check_used(sources, list(opened.layers))
        axes = [opened.layer(layer).spatial_axes for layer in layers]
        chain = lower_chain(opened, layers, sources, _channels(size, axes))
        for lowered in chain:
            if lowered.assumed:
                reporter.remark(f"assumed: {lowered.assumed}")
        convs = [lowered.conv for lowered in chain]
        names = [lowered.layer.name for lowered in chain]
        fusion = fuse_chain(
            convs,
            input_size=_spatial(size, convs[0].in_channels, convs[0].spatial_axes),
            allow_border=allow_border,
            dtype=rounded or stored_dtype(chain),
            names=names,
        )
        fused_name = names[0] if name is None else name
        edit = _edit(chain, fusion, fused_name)
        list(edit.order(opened.infos))  # finds a name that is taken before anything is written
        document = _document(opened.path, out, chain, fusion, fused_name, edit, dry_run)
        if not dry_run:
            from convtool import __version__
            from convtool.checkpoint.record import Record

            history = opened.record or Record(__version__)
            record = history.appended(__version__, [_record(chain, fusion, fused_name)])
            write_edited(opened, edit, out, record, force=force)
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, body)


def _channels(size: tuple[int, ...] | None, axes: list[int | None]) -> int | None:
    """The channels, where --input-size has them in front of the spatial sizes."""
    known = next((count for count in axes if count is not None), 0)
    return size[0] if size is not None and len(size) == known + 1 else None


def _spatial(size: tuple[int, ...] | None, channels: int, axes: int) -> tuple[int, ...] | None:
    from convtool.core.verify import split_input_size

    return None if size is None else split_input_size(size, channels, axes)


def _edit(chain: list[LoweredLayer], fusion: Fusion, name: str) -> Edit:
    from convtool.checkpoint.edit import Edit

    prefix = f"{name}." if name else ""
    insert = {f"{prefix}weight": fusion.conv.torch_weight().contiguous()}
    if fusion.conv.bias is not None:
        insert[f"{prefix}bias"] = fusion.conv.bias
    remove = [key for lowered in chain for key in lowered.layer.tensor_names()]
    return Edit(frozenset(remove), insert, anchor=remove[0])


def _record(chain: list[LoweredLayer], fusion: Fusion, name: str) -> Any:
    from convtool.checkpoint.record import FusionRecord
    from convtool.core.fields import geometry_fields

    verdict = fusion.verdict
    return FusionRecord(
        name=name,
        sources=tuple(lowered.source() for lowered in chain),
        fields=geometry_fields(fusion.conv.geometry) if fusion.conv.spatial_axes else {},
        dtype=str(fusion.conv.weight.dtype).removeprefix("torch."),
        exact=verdict.exact,
        input_size=verdict.input_size,
        rim=verdict.rim,
    )


def _document(
    source: Path, out: Path, chain: list[LoweredLayer], fusion: Fusion, name: str, edit: Edit, dry_run: bool
) -> dict[str, Any]:
    conv, verdict = fusion.conv, fusion.verdict
    return {
        "source": str(source),
        "out": str(out),
        "written": not dry_run,
        "fusion": _record(chain, fusion, name).to_json(),
        "assumed": [lowered.assumed for lowered in chain if lowered.assumed],
        "kernel_size": list(conv.geometry.kernel_size),
        "smallest_input": list(verdict.smallest),
        "differs": None if verdict.exact else verdict.describe_rim(),
        "edits": _module_edits(chain, fusion, name),
        "parameters": {
            "before": sum(_numel(lowered.conv) for lowered in chain),
            "after": _numel(conv),
        },
        "tensors": {
            "removed": sorted(edit.remove - edit.insert.keys()),
            "written": {key: list(tensor.shape) for key, tensor in edit.insert.items()},
        },
    }


def _numel(conv: Any) -> int:
    return int(conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel()))


def _module_edits(chain: list[LoweredLayer], fusion: Fusion, name: str) -> list[str]:
    """The lines that make the model's code fit the new checkpoint."""
    lines = [f"{name} = {_module_text(fusion)}"]
    return lines + [f"{lowered.layer.name} = nn.Identity()" for lowered in chain if lowered.layer.name != name]


def _module_text(fusion: Fusion) -> str:
    conv, geometry = fusion.conv, fusion.conv.geometry
    arguments = [str(conv.in_channels), str(conv.out_channels)]
    before = ""
    if conv.spatial_axes:
        arguments.append(_tuple(geometry.kernel_size))
        if set(geometry.stride) != {1}:
            arguments.append(f"stride={_tuple(geometry.stride)}")
        if geometry.padded:
            if any(start != end for start, end in geometry.padding):
                before = f"  # after F.pad(x, {[side for pair in reversed(geometry.padding) for side in pair]})"
            else:
                arguments.append(f"padding={_tuple(tuple(start for start, _ in geometry.padding))}")
        if set(geometry.dilation) != {1}:
            arguments.append(f"dilation={_tuple(geometry.dilation)}")
        if geometry.groups != 1:
            arguments.append(f"groups={geometry.groups}")
    if conv.bias is None:
        arguments.append("bias=False")
    if geometry.padded and geometry.padding_mode != "zeros":
        arguments.append(f"padding_mode={geometry.padding_mode!r}")
    kind = f"Conv{conv.spatial_axes}d" if conv.spatial_axes else "Linear"
    return f"nn.{kind}({', '.join(arguments)}){before}"


def _tuple(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values)


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    fusion = document["fusion"]
    names = " + ".join(source["name"] for source in fusion["sources"])
    reporter.line(f"{names} -> {fusion['name']}")
    for line in document["edits"]:
        reporter.line(f"  {line}")
    if fusion["exact"]:
        where = (
            "at every input size" if fusion["input_size"] is None else f"at input size {_sizes(fusion['input_size'])}"
        )
        smallest = document["smallest_input"]
        if fusion["fields"].get("padding_mode", "zeros") != "zeros" and smallest:
            where += f" from {_sizes(smallest)} up"
        reporter.line(f"  exact {where}")
    else:
        reporter.line(f"  NOT exact: {document['differs']} of the output differ")
    before, after = document["parameters"]["before"], document["parameters"]["after"]
    reporter.line(f"  {before} -> {after} parameters, {fusion['dtype']}")
    verb = "wrote" if document["written"] else "would write"
    reporter.line(f"{verb} {document['out']}")


def _sizes(values: list[int]) -> str:
    return ",".join(map(str, values))
