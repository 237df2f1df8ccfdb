"""`convtool unfold`: a layer in its im2col form, as matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convtool.cli.layer import LayerOptions, lower_layer
from convtool.cli.options import (
    DryRun,
    Dtype,
    Force,
    SourceOptions,
    Speech,
    check_not_source,
    parse_dtype,
)
from convtool.cli.output import Reporter
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.cli.written import print_files

NAME = "unfold"
USAGE = "CKPT LAYER -o OUT"
EXAMPLES = """
# W alone: the kernel as a matrix
convtool unfold net.safetensors conv1 -o w.npy
# W and the gather matrix U of an input size
convtool unfold net.safetensors conv1 --input-size 32,32 --padding 1 -o conv1.npz
python -c 'import numpy, scipy.sparse; print(numpy.load("conv1.npz")["weight"].shape)'
"""


@grouped
def command(
    *,
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
    wanted: LayerOptions,
    dtype: Dtype = None,
    sources: SourceOptions,
    dry_run: DryRun = False,
    force: Force = False,
    speech: Speech,
) -> int:
    """Write a layer as im2col has it: its kernel as a matrix W, and what each tap reads as a gather matrix U.

    W is C_out x (C_in * taps), in the array `weight`. With --input-size, U is a sparse matrix of ones whose rows are
    (input channel, tap, output position): the layer's matrix is T = kron(W, I) @ U, I the identity over the output
    positions, and U @ x.reshape(-1) is what torch.nn.functional.unfold gives.
    """
    reporter = speech.reporter(NAME)

    def body() -> None:
        from convtool.core.unfold import GatherMatrix
        from convtool.formats.atomic import check_target
        from convtool.matrix import contents_size, write_contents
        from convtool.matrix.unfolding import unfolding_contents

        value_dtype = parse_dtype(dtype)
        check_not_source(out, wanted.checkpoint)
        check_target(out, force=force or dry_run)
        found = lower_layer(reporter, wanted, sources, needs_size=False)
        conv = found.conv
        values = conv.weight.dtype if value_dtype is None else value_dtype
        gather = None
        if wanted.input_size is not None and found.spatial is not None:
            gather = GatherMatrix(conv.geometry, conv.in_channels, found.spatial, values)
        record = found.record | {"form": "unfold"}
        contents = unfolding_contents(conv, gather, out, values, record)
        size_in_bytes = contents_size(contents, out)
        if not dry_run:
            with reporter.progress(f"writing {out.name}", size_in_bytes) as advance:
                write_contents(contents, out, force=force, progress=advance)
        arrays = {array.name: list(array.shape) for array in contents.arrays}
        document: dict[str, Any] = found.record | {
            "source": str(wanted.checkpoint),
            "out": str(out),
            "weight": arrays["weight"],
            "gather": None if gather is None else list(gather.shape),
            "nnz": None if gather is None else gather.nnz,
            "dtype": str(values).removeprefix("torch."),
            "bias": None if conv.bias is None else "vector" if "bias" in arrays else "missing",
            "written": not dry_run,
            "bytes": size_in_bytes,
            "files": {str(out): size_in_bytes},
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
    print_files(reporter, document)
