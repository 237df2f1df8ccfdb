"""`convtool unfold`: a layer in its im2col form, as matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from convtool.cli import shared
from convtool.cli.command import Command
from convtool.cli.document import INLINE, Count, Dtype, Sizes, fill, to_json
from convtool.cli.layer import LayerOptions, OfLayer, find_layers
from convtool.cli.output import Reporter
from convtool.cli.saved import Files, show_files
from convtool.core.tree import leaves

EXAMPLES = """
# W alone: the kernel as a matrix
convtool unfold net.safetensors conv1 -o w.npy
# W and the gather matrix U of an input size
convtool unfold net.safetensors conv1 --input-size 32,32 --padding 1 -o conv1.npz
python -c 'import numpy, scipy.sparse; print(numpy.load("conv1.npz")["weight"].shape)'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The layer, and where its matrices are to be written."""

    out: Path = shared.out(
        "The file: .npz, .npy, .safetensors or .pt; with --input-size .npz or .safetensors.", required=True
    )
    wanted: LayerOptions
    dtype: Any = shared.dtype()
    sources: shared.Sources
    writing: shared.Writing


@dataclass(frozen=True, slots=True)
class Result:
    """Matrices that were written.

    Attributes:
        weight: shape of W.
        gather: shape of U.
        nnz: ones in U.
        bias: none; beside the matrices; there is one, and the format has no room for it.
        written: false for --dry-run.
        bytes: of the file.
    """

    of: OfLayer = field(metadata=INLINE)
    source: Path
    out: Path
    weight: Sizes
    gather: Sizes | None
    nnz: Count | None
    dtype: Dtype
    bias: Literal["vector", "missing"] | None
    written: bool
    bytes: Count
    files: Files
    assumed: tuple[str, ...]


def run(options: Options, reporter: Reporter) -> Result:
    """Write a layer in its im2col form: the kernel as a matrix W, and what each entry reads as a gather matrix U.

    W is C_out x (C_in * taps), in the array `weight`. With --input-size, U is a sparse matrix of ones whose rows are
    (input channel, tap, output position): the layer's matrix is T = kron(W, I) @ U, I the identity over the output
    positions, and U @ x.reshape(-1) is what torch.nn.functional.unfold gives.
    """
    from convtool.core.rounding import dtype_name
    from convtool.core.unfold import GatherMatrix
    from convtool.formats import matrix_format
    from convtool.formats.atomic import check_target
    from convtool.matrix.unfolding import unfolding_contents

    out = options.out
    shared.check_not_source(out, options.wanted.checkpoint)
    check_target(out, force=options.writing.overwrite)
    found = find_layers(options.wanted, None, options.sources, reporter, needs_size=False)
    conv, values = next(leaves(found.layers)), options.dtype or found.dtype
    sized = options.wanted.input_size is not None
    gather = GatherMatrix(conv.geometry, conv.in_channels, found.spatial, values) if sized else None
    contents = unfolding_contents(conv, gather, out, values, to_json(found.of.first) | {"form": "unfold"})
    file = matrix_format(out.suffix).plan_matrix(contents)
    if options.writing.written:
        with reporter.progress(f"writing {out.name}", file.size) as advance:
            file.write(out, force=options.writing.force, progress=advance)
    arrays = {array.name: tuple(array.shape) for array in contents.arrays}
    if conv.bias is not None and "bias" not in arrays:
        reporter.remark(f"{out} has no room for the bias of {found.of.first.layer}")
    return fill(
        Result,
        found,
        options,
        options.writing,
        of=found.of.first,
        weight=arrays["weight"],
        gather=None if gather is None else gather.shape,
        nnz=None if gather is None else gather.nnz,
        dtype=dtype_name(values),
        bias=None if conv.bias is None else "vector" if "bias" in arrays else "missing",
        bytes=file.size,
        files={out: file.size},
    )


def show(result: Result, reporter: Reporter) -> None:
    """Print the shapes of both matrices, and what was written."""
    rows, columns = result.weight
    reporter.line(f"{result.of.layer}: W {rows} x {columns}, {result.dtype}")
    if result.of.fields:
        reporter.line(f"  {result.of.fields_text}")
    if result.gather is not None:
        rows, columns = result.gather
        reporter.line(f"  {result.of.sizes_text}: U {rows} x {columns}, {result.nnz} ones")
    show_files(result, reporter)


COMMAND = Command("CKPT LAYER -o OUT", EXAMPLES, Options, run, show)
