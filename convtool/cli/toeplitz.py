"""`convtool toeplitz`: the matrix of a layer, or of a chain of layers, as a file."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convtool.cli import complete, shared
from convtool.cli.command import Command
from convtool.cli.document import HIDDEN, INLINE, Count, Dtype, Sizes, fill, to_json
from convtool.cli.layer import LayerOptions, LayersAtSize, OfLayers, find_layers, more_layers
from convtool.cli.options import flag, option, parse_rows
from convtool.cli.output import Reporter
from convtool.cli.saved import Files, show_files
from convtool.core.tree import Tree, leaves
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.core.toeplitz import ToeplitzMatrix
    from convtool.matrix import MatrixPlan

EXAMPLES = """
convtool toeplitz resnet.safetensors conv1 --input-size 32,32 --stride 2 --padding 3 -o conv1.npz
python -c 'import scipy.sparse; print(scipy.sparse.load_npz("conv1.npz").shape)'
# of a chain, exact at the borders
convtool toeplitz net.pt conv1 bn1 'avg_pool(2)' conv2 --input-size 3,32,32 --set conv1.padding=1 -o chain.npz
# of what a recipe fuses: branches, their batch norms and the sum
convtool toeplitz repvgg.pt stage1.rbr_reparam --recipe repvgg --input-size 16,8,8 -o block.npz
# for row vectors, x @ B, with the bias as the last row
convtool toeplitz net.pt conv1 --input-size 3,8,8 --transpose --affine -o conv1.npy
# in parts, by four processes; without torchrun the same files
torchrun --nproc-per-node 4 -m convtool toeplitz net.pt conv1 --input-size 3,512,512 --shards 4 -o conv1.safetensors
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The layer, and how its matrix is to be written."""

    out: Path = shared.out(
        "The matrix file: .npz (scipy), .npy (dense), .safetensors, .pt or .mtx (text).", required=True
    )
    wanted: LayerOptions
    more: list[str] | None = more_layers()
    recipe: str | None = option(
        "NAME|FILE|auto", "The layers that a recipe fuses into one called LAYER.", completion=complete.recipes
    )
    layout: Literal["csr", "coo", "dense"] | None = option(
        "LAYOUT", "csr, coo or dense; by default csr, dense for .npy, coo for .mtx."
    )
    dtype: Any = shared.dtype()
    transpose: bool = flag("Write B for row vectors, y = x @ B, instead of T for y = T @ x.")
    affine: bool = flag("Append the bias as the last column, for inputs extended by a 1.")
    order: Literal["CHW", "HWC"] = option(
        "ORDER", "How x and y are flattened: CHW, or HWC for channels last.", default="CHW"
    )
    rows: tuple[int, int] | None = option("A:B", "Only rows A to B-1.", parse=parse_rows)
    columns: tuple[int, int] | None = option("A:B", "Only columns A to B-1.", parse=parse_rows)
    shards: int | None = option(
        "N",
        "Write N .safetensors files, each a part of the rows, and an index; under torchrun the processes share them.",
    )
    show: bool = flag("Draw the matrix in the terminal as well.")
    plot: Path | None = option("PNG", "Draw the matrix as well (needs matplotlib).")
    sources: shared.Sources
    writing: shared.Writing


@dataclass(frozen=True, slots=True)
class Record:
    """What the file notes of its matrix.

    Attributes:
        tree: their names, where they aren't a plain chain.
        order: how inputs and outputs are flattened.
        rows, columns: from, and to but not with.
    """

    of: OfLayers = field(metadata=INLINE)
    tree: Tree[str] | None
    transpose: bool
    affine: bool
    order: Literal["CHW", "HWC"]
    rows: Sizes | None
    columns: Sizes | None
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class Result:
    """A matrix that was written.

    Attributes:
        shards: how many files; then `out` is their index, and `bytes` counts them all.
        written: false after --dry-run.
        bytes: of all its files together, the picture left out.
        plot: the picture of --plot.
        bias: none; beside the matrix; part of it (--affine); there is one, and the format has no room for it.
        drawing: of the matrix, in lines.
    """

    record: Record = field(metadata=INLINE)
    source: Path
    out: Path
    shards: Count | None
    layout: Literal["csr", "coo", "dense"]
    shape: Sizes
    nnz: Count
    written: bool
    bytes: Count
    files: Files
    plot: Path | None
    bias: Literal["vector", "column", "missing"] | None
    assumed: tuple[str, ...]
    drawing: tuple[str, ...] = field(metadata=HIDDEN)


OWN_READER = "convtool.load_matrix"  # to everybody else the other files are checkpoints


def run(options: Options, reporter: Reporter) -> Result:
    """Write the matrix T of a layer or of a chain, so that T @ x.reshape(-1) is the output without the bias.

    Rows are (output channel, output position), columns (input channel, input position), row-major: the layout of
    nn.Linear.weight. The bias is stored beside it as its own vector, except in .npy, which has no room for one. The
    matrix of a chain is exact at the borders, and the biases become one vector.
    """
    from convtool.core.rounding import dtype_name
    from convtool.core.toeplitz import toeplitz
    from convtool.matrix import plan_matrix
    from convtool.matrix.ranks import speaks
    from convtool.matrix.shards import index_path

    if not speaks():
        reporter.silence()
    _check_outputs(options)
    found = find_layers(options.wanted, options.more, options.sources, reporter, options.recipe)
    form = {name: getattr(options, name) for name in ("transpose", "affine", "order")}
    matrix = toeplitz(found.layers, found.spatial, dtype=options.dtype or found.dtype, **form)
    plan = plan_matrix(matrix, options.out, layout=options.layout, rows=options.rows, columns=options.columns)
    record = fill(Record, plan, found, options, tree=found.of.tree, dtype=dtype_name(matrix.dtype))
    write = _write_file if options.shards is None else _write_shards
    with _plotted(options, found, matrix, plan):
        files = write(options, matrix, plan, to_json(record), reporter)
    bias = _bias(options, matrix, plan)
    _remark(options, found, plan, bias, reporter)
    return fill(
        Result,
        plan,
        found,
        options,
        options.writing,
        record=record,
        out=options.out if options.shards is None else index_path(options.out),
        bytes=sum(files.values()),
        files=files,
        bias=bias,
        drawing=_drawing(matrix, plan) if options.show and not (reporter.silent or reporter.as_json) else (),
    )


def _check_outputs(options: Options) -> None:
    """See that nothing is in the way of what is to be written, before anything is read."""
    from convtool.formats.atomic import check_target
    from convtool.matrix.shards import check_shards

    shared.check_not_source(options.out, options.wanted.checkpoint)
    if options.shards is None:
        check_target(options.out, force=options.writing.overwrite)
    elif options.rows is not None or options.columns is not None:
        raise UsageError("--shards cuts all of the matrix into parts; it doesn't go with --rows or --columns")
    else:
        check_shards(options.out, options.shards, force=options.writing.overwrite)
    if options.plot is not None:
        from convtool.matrix.plot import check_plot

        check_plot(options.plot)
        check_target(options.plot, force=options.writing.overwrite)


def _plotted(
    options: Options, found: LayersAtSize, matrix: ToeplitzMatrix, plan: MatrixPlan
) -> AbstractContextManager[None]:
    """Return the block in which the matrix is to be written, so that its picture comes into being with it."""
    from convtool.matrix.ranks import speaks

    if options.plot is None or not (options.writing.written and speaks()):
        return nullcontext()
    from convtool.matrix.plot import Part, plotted

    name = found.of.name
    title = name if found.of.chain else f"{name}, {next(leaves(found.layers)).geometry.describe()}"
    how: dict[str, Any] = {"force": options.writing.force, "by_channel": options.order == "CHW"}
    part = Part.of(matrix, plan.rows, plan.columns)
    return plotted(matrix, options.plot, title=title.removeprefix(", "), part=part, **how)


def _write_file(
    options: Options, matrix: ToeplitzMatrix, plan: MatrixPlan, record: dict[str, Any], reporter: Reporter
) -> dict[Path, int]:
    """Write the matrix as one file, unless it's a dry run, and return its path and size."""
    from convtool.matrix import matrix_file, write_matrix

    out = options.out
    files = {out: matrix_file(matrix, plan, record).size}
    if options.writing.written:
        with reporter.progress(f"writing {out.name}", files[out]) as advance:
            write_matrix(matrix, plan, out, force=options.writing.force, record=record, progress=advance)
    return files


def _write_shards(
    options: Options, matrix: ToeplitzMatrix, plan: MatrixPlan, record: dict[str, Any], reporter: Reporter
) -> dict[Path, int]:
    """Write this process's share of the parts, unless it's a dry run, and return all of them with their sizes."""
    from convtool.matrix.ranks import launched_ranks
    from convtool.matrix.shards import plan_shards

    parts = plan_shards(matrix, options.out, options.shards or 1, layout=plan.layout, record=record)
    if options.writing.written:
        with launched_ranks() as ranks:
            share = [plan.size for plan in parts.plans.values()][ranks.rank :: ranks.count]
            with reporter.progress(f"writing {options.out.name}", sum(share)) as advance:
                parts.write(force=options.writing.force, ranks=ranks, progress=advance)
    return parts.files()


def _bias(options: Options, matrix: ToeplitzMatrix, plan: MatrixPlan) -> Literal["vector", "column", "missing"] | None:
    """Return where the bias is."""
    if options.affine:
        return "column"
    if not matrix.has_bias:
        return None
    return "vector" if plan.stores_bias else "missing"


def _remark(options: Options, found: LayersAtSize, plan: MatrixPlan, bias: str | None, reporter: Reporter) -> None:
    """Say what the file lacks, and what its readers may stumble over."""
    import torch

    if bias == "missing":
        lost = f"the bias of {found.of.name}"
        reporter.remark(f"{options.out} has no room for {lost}; --affine makes it part of the matrix")
    if plan.index_dtype == torch.int64 and plan.layout == "csr":
        reporter.remark(
            "indices are int64, since int32 ends at 2147483647; scipy keeps them, and its direct solvers"
            " (spsolve, splu) take int32 alone"
        )


def _drawing(matrix: ToeplitzMatrix, plan: MatrixPlan) -> tuple[str, ...]:
    from convtool.matrix.plot import Part, drawn

    columns, lines = shutil.get_terminal_size()
    return tuple(drawn(Part.of(matrix, plan.rows, plan.columns), columns - 1, max(10, lines - 6)))


def show(result: Result, reporter: Reporter) -> None:
    """Print the layer, its matrix, and what was written."""
    rows, columns = result.shape
    of, dtype = result.record.of, result.record.dtype
    reporter.line(f"{of.name}: {of.sizes_text}")
    reporter.lines(of.fields_lines)
    density = result.nnz / max(1, rows * columns)
    reporter.line(f"  {rows} x {columns}, {result.nnz} entries ({density:.3%}), {dtype}, {result.layout}")
    reporter.lines([line.rstrip() for line in result.drawing])
    parts = "" if result.shards is None else f" and {result.shards} shards"
    show_files(result, reporter, parts)
    if result.plot is not None and not result.written:
        reporter.line(f"would draw {result.plot}")
    if result.written:
        reader = "numpy.load" if result.layout == "dense" else "scipy.sparse.load_npz"
        reader = {".npz": reader, ".npy": "numpy.load", ".mtx": "scipy.io.mmread"}.get(result.out.suffix, OWN_READER)
        reporter.remark(f'to read it: {reader}("{result.out}")')


COMMAND = Command("CKPT LAYER [LAYER...] -o OUT", EXAMPLES, Options, run, show)
