"""`convtool toeplitz`: a layer's matrix as a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from convtool.cli import complete
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
from convtool.cli.ranks import launched_ranks, speaks
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.cli.written import print_files

if TYPE_CHECKING:
    from convtool.core.toeplitz import ToeplitzMatrix

NAME = "toeplitz"
USAGE = "CKPT LAYER -o OUT"
EXAMPLES = """
convtool toeplitz resnet.safetensors conv1 --input-size 32,32 --stride 2 --padding 3 -o conv1.npz
python -c 'import scipy.sparse; print(scipy.sparse.load_npz("conv1.npz").shape)'
# for row vectors, x @ B, with the bias as the last row
convtool toeplitz net.pt conv1 --input-size 3,8,8 --transpose --affine -o conv1.npy
# in parts, by four processes; without torchrun the same files
torchrun --nproc-per-node 4 -m convtool toeplitz net.pt conv1 --input-size 3,512,512 --shards 4 -o conv1.safetensors
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
            help="The matrix file: .npz (scipy), .npy (dense), .safetensors, .pt or .mtx (text).",
            show_default=False,
        ),
    ],
    wanted: LayerOptions,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="csr, coo or dense; by default csr, dense for .npy, coo for .mtx.",
            show_default=False,
            autocompletion=complete.one_of("csr", "coo", "dense"),
        ),
    ] = None,
    dtype: Dtype = None,
    transpose: Annotated[
        bool, typer.Option("--transpose", help="Write B for row vectors, y = x @ B, instead of T for y = T @ x.")
    ] = False,
    affine: Annotated[
        bool, typer.Option("--affine", help="Append the bias as the last column, for inputs extended by a 1.")
    ] = False,
    order: Annotated[
        str,
        typer.Option(
            "--order",
            metavar="ORDER",
            help="How x and y are flattened: CHW, or HWC for channels last.",
            autocompletion=complete.one_of("CHW", "HWC"),
        ),
    ] = "CHW",
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="A:B", help="Only rows A to B-1.", show_default=False)
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            "--shards",
            metavar="N",
            help="Write N .safetensors files, each a part of the rows, and an index; under torchrun the processes share"
            " them.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Draw the matrix in the terminal as well.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="PNG", help="Draw the matrix as well (needs matplotlib).", show_default=False),
    ] = None,
    sources: SourceOptions,
    dry_run: DryRun = False,
    force: Force = False,
    speech: Speech,
) -> int:
    """Write the matrix T of a layer, so that T @ x.reshape(-1) is the layer's output, less the bias.

    Rows are (output channel, output position), columns (input channel, input position), row-major: the layout of
    nn.Linear.weight. The bias is stored beside it as its own vector, except in .npy, which has no room for one.
    """
    reporter = speech.reporter(NAME) if speaks() else Reporter(NAME, quiet=True)

    def body() -> None:
        import torch

        from convtool.core.order import MATRICES, Order
        from convtool.errors import UsageError
        from convtool.formats.atomic import check_target
        from convtool.matrix import plan_matrix, planned_size, write_matrix
        from convtool.matrix.shards import check_shards, index_path, plan_shards, write_shards

        value_dtype = parse_dtype(dtype)
        check_not_source(out, wanted.checkpoint)
        if shards is None:
            check_target(out, force=force or dry_run)
        else:
            if rows is not None:
                raise UsageError("--shards cuts all rows into parts; it doesn't go with --rows")
            check_shards(out, shards, force=force or dry_run)
        if plot is not None:
            from convtool.matrix.plot import check_plot

            check_plot(plot)
            check_target(plot, force=force or dry_run)
        found = lower_layer(reporter, wanted, sources)
        conv = found.conv
        if order not in get_args(Order):
            raise UsageError(f"--order: expected CHW or HWC, got {order!r}")
        form = MATRICES["HWC" if order == "HWC" else "CHW"]
        matrix = form(conv, found.spatial or (), dtype=value_dtype, transpose=transpose, affine=affine)
        plan = plan_matrix(matrix, out, layout=_layout(layout), rows=_rows(rows))
        rows_written = None if plan.rows is None else list(plan.rows)
        record = found.record | {"transpose": transpose, "affine": affine, "order": order, "rows": rows_written}
        record["dtype"] = str(matrix.dtype).removeprefix("torch.")  # which a text file wouldn't tell
        if shards is None:
            files = {out: planned_size(matrix, plan, record)}
            if not dry_run:
                with reporter.progress(f"writing {out.name}", files[out]) as advance:
                    write_matrix(matrix, plan, out, force=force, record=record, progress=advance)
        else:
            parts = plan_shards(matrix, out, shards, layout=plan.layout, record=record)
            files = dict(parts.files)
            if not dry_run:
                with launched_ranks() as ranks:
                    share = [files[path] for path in parts.shards][ranks.rank :: ranks.count]
                    with reporter.progress(f"writing {out.name}", sum(share)) as advance:
                        write_shards(matrix, parts, force=force, ranks=ranks, progress=advance)
        if plot is not None and not dry_run:
            from convtool.matrix.plot import write_plot

            write_plot(matrix, plot, force=force, title=f"{found.name}, {conv.geometry.describe()}", rows=plan.rows)
        missing_bias = conv.bias is not None and not affine and not plan.stores_bias
        document = record | {
            "source": str(wanted.checkpoint),
            "out": str(out if shards is None else index_path(out)),
            "shards": shards,
            "layout": plan.layout,
            "shape": list(plan.shape),
            "nnz": plan.nnz,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "written": not dry_run,
            "bytes": sum(files.values()),
            "files": {str(path): size for path, size in files.items()},
            "plot": None if plot is None else str(plot),
            "bias": "column" if affine else "missing" if missing_bias else "vector" if conv.bias is not None else None,
            "assumed": found.assumed,
        }
        if missing_bias:
            reporter.remark(f"{out} has no room for the bias of {found.name}; --affine makes it part of the matrix")
        if plan.index_dtype == torch.int64 and plan.layout == "csr":
            reporter.remark(
                "indices are int64, since int32 ends at 2147483647; scipy keeps them, and its direct solvers"
                " (spsolve, splu) take int32 alone"
            )
        if speaks():
            reporter.result(document, lambda: _print(reporter, document, _drawing(matrix, plan.rows) if show else []))

    return run(reporter, body)


def _layout(text: str | None) -> Any:
    from convtool.errors import UsageError

    if text not in (None, "csr", "coo", "dense"):
        raise UsageError(f"--layout: expected csr, coo or dense, got {text!r}")
    return text


def _rows(text: str | None) -> tuple[int, int] | None:
    from convtool.errors import UsageError

    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal() or int(start) >= int(stop):
        raise UsageError(f"--rows: expected A:B with A below B, such as 0:100, got {text!r}")
    return int(start), int(stop)


def _drawing(matrix: ToeplitzMatrix, rows: tuple[int, int] | None) -> list[str]:
    from convtool.matrix.plot import drawn

    columns, lines = shutil.get_terminal_size()
    return drawn(matrix, columns - 1, max(10, lines - 6), rows)


def _print(reporter: Reporter, document: dict[str, Any], drawing: list[str]) -> None:
    rows, columns = document["shape"]
    reporter.line(
        f"{document['layer']}: {'x'.join(map(str, document['input_size']))} ->"
        f" {'x'.join(map(str, document['output_size']))}"
    )
    density = document["nnz"] / max(1, rows * columns)
    reporter.line(
        f"  {rows} x {columns}, {document['nnz']} entries ({density:.3%}), {document['dtype']}, {document['layout']}"
    )
    for line in drawing:
        reporter.line(line.rstrip())
    parts = "" if document["shards"] is None else f" and {document['shards']} shards"
    print_files(reporter, document, parts)
