"""`convtool unfold`: a layer in its im2col form, as matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.layer import lower_layer
from convtool.cli.options import (
    CheckpointPath,
    Dilation,
    Dtype,
    Force,
    GeometryFile,
    Groups,
    InputSize,
    Json,
    Model,
    ModelArgs,
    OutputPadding,
    Padding,
    PaddingModeOption,
    Quiet,
    Root,
    Settings,
    Stride,
    Transposed,
    check_not_source,
    parse_dtype,
)
from convtool.cli.output import Reporter, human_bytes
from convtool.cli.run import run

NAME = "unfold"
USAGE = "CKPT LAYER -o OUT"
EXAMPLES = """
# W alone: the kernel as a matrix
convtool unfold net.safetensors conv1 -o w.npy
# W and the gather matrix U of an input size
convtool unfold net.safetensors conv1 --input-size 32,32 --padding 1 -o conv1.npz
python -c 'import numpy, scipy.sparse; print(numpy.load("conv1.npz")["weight"].shape)'
"""


def command(
    checkpoint: CheckpointPath,
    layer: Annotated[
        str,
        typer.Argument(
            metavar="LAYER", help="Module path of the layer.", show_default=False, autocompletion=complete.layers
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="The file: .npz, .npy, .safetensors or .pt; with --input-size .npz or .safetensors.",
            show_default=False,
        ),
    ],
    input_size: InputSize = None,
    stride: Stride = None,
    padding: Padding = None,
    dilation: Dilation = None,
    groups: Groups = None,
    padding_mode: PaddingModeOption = None,
    transposed: Transposed = False,
    output_padding: OutputPadding = None,
    dtype: Dtype = None,
    geometry: GeometryFile = None,
    settings: Settings = None,
    model: Model = None,
    model_args: ModelArgs = None,
    root: Root = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a layer as im2col has it: its kernel as a matrix W, and what each tap reads as a gather matrix U.

    W is C_out x (C_in * taps), in the array `weight`. With --input-size, U is a sparse matrix of ones whose rows are
    (input channel, tap, output position): the layer's matrix is T = kron(W, I) @ U, I the identity over the output
    positions, and U @ x.reshape(-1) is what torch.nn.functional.unfold gives.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> None:
        from convtool.core.unfold import GatherMatrix
        from convtool.files.atomic import check_target
        from convtool.matrix.unfolding import unfolding_contents, write_unfolding

        value_dtype = parse_dtype(dtype)
        check_not_source(out, checkpoint)
        check_target(out, force=force)
        found = lower_layer(
            reporter,
            checkpoint,
            layer,
            root=root,
            input_size=input_size,
            fields={
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "groups": groups,
                "padding_mode": padding_mode,
                "transposed": transposed,
                "output_padding": output_padding,
            },
            geometry=geometry,
            settings=settings,
            model=model,
            model_args=model_args,
            needs_size=False,
        )
        conv = found.conv
        values = conv.weight.dtype if value_dtype is None else value_dtype
        gather = None
        if input_size is not None and found.spatial is not None:
            gather = GatherMatrix(conv.geometry, conv.in_channels, found.spatial, values)
        record = found.record | {"form": "unfold"}
        contents = unfolding_contents(conv, gather, out, values, record)
        with reporter.progress(f"writing {out.name}", sum(array.nbytes for array in contents.arrays)) as advance:
            write_unfolding(contents, out, force=force, progress=advance)
        arrays = {array.name: list(array.shape) for array in contents.arrays}
        document: dict[str, Any] = found.record | {
            "source": str(checkpoint),
            "out": str(out),
            "weight": arrays["weight"],
            "gather": None if gather is None else list(gather.shape),
            "nnz": None if gather is None else gather.nnz,
            "dtype": str(values).removeprefix("torch."),
            "bias": None if conv.bias is None else "vector" if "bias" in arrays else "missing",
            "bytes": out.stat().st_size,
            "assumed": found.assumed,
        }
        if document["bias"] == "missing":
            reporter.remark(f"{out} has no room for the bias of {found.name}")
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, body)


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    rows, columns = document["weight"]
    reporter.line(f"{document['layer']}: W {rows} x {columns}, {document['dtype']}")
    if document["gather"] is not None:
        rows, columns = document["gather"]
        sizes = ("x".join(map(str, document[name])) for name in ("input_size", "output_size"))
        reporter.line(f"  {' -> '.join(sizes)}: U {rows} x {columns}, {document['nnz']} ones")
    reporter.line(f"wrote {document['out']}, {human_bytes(document['bytes'])}")
