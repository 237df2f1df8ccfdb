"""A matrix held against its layer, or another: the comparison, its verdict, and the words of all verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convtool.cli.document import Dtype, Sizes, fill
from convtool.cli.output import Reporter, table, times
from convtool.errors import UsageError, of_bound

if TYPE_CHECKING:
    from convtool.core.tally import Region
    from convtool.fusing.matrix_proof import Compared

BOUND: Literal["derived bound"] = "derived bound"
EVERY_ENTRY = "every entry compared: this holds for all inputs of this size"


@dataclass(frozen=True, slots=True)
class Matrix:
    """How a matrix did.

    Attributes:
        of: the layer, or the file in BEFORE.
        form: T @ x or x @ B, and where the bias is.
        mismatch: why nothing could be compared.
        ratio: largest error by its bound.
        entries: where: row and column; positions: entries.
        products: with some inputs, against torch's convolution; where: output.
        bias: where: output.
        bias_missing: the file has no room for the layer's bias, or --no-bias left it out.
    """

    of: str
    form: str
    shape: Sizes
    dtype: Dtype
    mismatch: str | None
    ratio: float
    entries: Region | None
    products: Region | None
    bias: Region | None
    bias_missing: bool

    @classmethod
    def made_of(cls, found: Compared) -> Matrix:
        """Return what there is to say of a comparison."""
        report = found.report
        regions = {name: compared(getattr(report, name)) for name in ("entries", "products", "bias")}
        return fill(cls, found, report, mismatch=report.mismatch or None, **regions)


@dataclass(frozen=True, slots=True)
class MatrixResult:
    """The verdict on a matrix file and its layer, or another matrix.

    Attributes:
        equivalent: exit code 0 or 1.
        statement: what was shown, apart from the verdict.
    """

    before: Path
    after: Path
    equivalent: bool
    statement: str
    seed: int
    tolerance: Literal["derived bound"]
    assumed: tuple[str, ...]
    matrix: Matrix


def verify_matrices(options: Any, how: dict[str, Any], names: Sequence[str] | None, reporter: Reporter) -> MatrixResult:
    """Return the verdict on a layer and its matrix, or on two matrices.

    Args:
        options: of `convtool verify`.
        how: trials, seed and computed_in, as of `convtool.core.verify_matrix.verify_matrix`.
        names: the layers of --before.
    """
    from convtool.fusing.matrix_proof import compare_with_layer, compare_with_matrix, open_numbers
    from convtool.matrix.read import is_matrix_file

    before, after, sources = options.before, options.after, options.sources
    sizes = options.input_size or []
    opened = None if is_matrix_file(before) else sources.open(before, reporter)
    model = None if opened is None else sources.read_model(opened, reporter)
    fields, _ = sources.of_both(model, None if opened is None else opened.layers)
    if not is_matrix_file(after):
        raise UsageError(f"{before} is a matrix file and {after} is none; the matrix is AFTER, its layer in BEFORE")
    found = open_numbers(after)
    if opened is None and (names is not None or sizes or options.rows or options.columns or options.no_bias):
        raise UsageError(
            "--before, --input-size, --rows, --columns and --no-bias are for a layer; BEFORE is a matrix file too"
        )
    with reporter.progress("comparing matrices", None):
        if opened is None:
            compared = compare_with_matrix(found, open_numbers(before))
        else:
            part = {name: getattr(options, name) for name in ("rows", "columns", "no_bias")}
            compared = compare_with_layer(found, opened, names, sizes, fields, **part, **how)
            if not compared.report.equivalent and found.bias is None and compared.report.bias.differing:
                reporter.remark(f"{after} holds no bias; --no-bias compares the matrix alone")
    reporter.note(*(f"assumed: {text}" for text in compared.assumed))
    made = Matrix.made_of(compared)
    return fill(MatrixResult, options, compared.report, compared, statement=EVERY_ENTRY, matrix=made)


def compared(region: Region) -> Region | None:
    """Return a region, or None where it is empty."""
    return region if region.positions else None


def in_words(equivalent: bool) -> str:
    """Return a verdict."""
    return "equivalent" if equivalent else "NOT equivalent"


def show_matrix(result: MatrixResult, reporter: Reporter) -> None:
    """Print a table of what was compared, and what differs."""
    part = result.matrix
    regions = (part.entries, part.products, part.bias)
    row = (part.of, part.form, times(part.shape), *map(_region, regions), in_words(result.equivalent))
    table(("of", "form", "matrix", "entries", "products", "bias", "verdict"), [row])
    if part.mismatch:
        reporter.line(part.mismatch)
    whats = (("entries", "row, column"), ("products", "output"), ("bias", "output"))
    for (name, what), region in zip(whats, regions, strict=True):
        if region and not region.equal:
            where = f"; worst at {what} {', '.join(map(str, region.where))}" if region.where else ""
            reporter.line(
                f"{name}: {region.differing} of {region.positions} differ{where}:"
                f" error {region.error:.3g}, bound {region.bound:.3g};"
                f" relative to the largest {region.relative_error:.3g}"
            )
    if part.bias_missing:
        reporter.line("the layer has a bias, which the file does not hold; the matrix alone was compared")


def _region(region: Region | None) -> str:
    if region is None:
        return "-"
    return f"{'equal' if region.equal else 'differs'}, error {of_bound(region.ratio)}"
