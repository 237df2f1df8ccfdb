"""`convtool verify` where one side or both are matrix files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli.output import Reporter, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from convtool.checkpoint import Checkpoint
    from convtool.core.order import Order
    from convtool.core.verify_matrix import MatrixReport
    from convtool.fusing.lowering import LoweredLayer
    from convtool.kinds.kind import Kind
    from convtool.kinds.stated import FieldSources
    from convtool.matrix.read import MatrixFile

COMPARING = "comparing matrices"
FORMS = {  # (transpose, affine): what the matrix is for
    (False, False): "T @ x",
    (False, True): "T @ x with the bias as its last column",
    (True, False): "x @ B",
    (True, True): "x @ B with the bias as its last row",
}


@dataclass(frozen=True, slots=True)
class _Form:
    """Which of a layer's matrices one is."""

    transpose: bool
    affine: bool
    order: Order = "CHW"
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        return FORMS[self.transpose, self.affine] + (", channels last" if self.order == "HWC" else "")


def verify_matrix_files(
    reporter: Reporter,
    before: Checkpoint | Path,
    after: Path,
    layer: str | None,
    sizes: list[tuple[int, ...]],
    sources: FieldSources,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compare, report, and give the report as a document.

    Args:
        before: the checkpoint that the layer is in; or another matrix file.
        after: the matrix file.
        layer: its name, where the file has no record or to overrule it.
        sizes: of the layer's input: one, where the file has no record.
        sources: fields of the layer, overruling the record.
        options: trials, seed, computed_in, as `convtool.core.verify_matrix.verify_matrix` takes them.
    """
    from convtool.core.verify_matrix import verify_matrices
    from convtool.errors import UsageError
    from convtool.matrix.read import is_matrix_file, open_matrix

    if not is_matrix_file(after):
        raise UsageError(f"{before} is a matrix file and {after} is none; the matrix is AFTER, its layer in BEFORE")
    found = _checked(open_matrix(after))
    assumed: list[str] = []
    if isinstance(before, Path):
        if layer is not None or sizes:
            raise UsageError("--before and --input-size are for a layer; BEFORE is a matrix file as well")
        other = _checked(open_matrix(before))
        with reporter.progress(COMPARING, None):
            report = verify_matrices(other, found, bias_before=other.bias, bias_after=found.bias)
        name, form = str(before), "entry by entry"
    else:
        lowered, size = _lowered(before, found, layer, sizes, sources)
        if lowered.assumed:
            assumed.append(lowered.assumed)
        forms = _forms(found, lowered, size)
        reports = ((shape, _verify(found, lowered, size, shape, options)) for shape in forms)
        with reporter.progress(COMPARING, None):
            tried = list(_until_equivalent(reports))
        shape, report = tried[-1] if tried[-1][1].equivalent else tried[0]
        if found.record is None:
            others = "".join(f"; it isn't {other} either" for other in forms[1:] if not report.equivalent)
            assumed.append(f"{after}: {shape}{others}")
        name, form = lowered.layer.name, str(shape)
    for text in assumed:
        reporter.remark(f"assumed: {text}")
    document = _document(before, after, name, form, report, assumed)
    reporter.result(document, lambda: _print(reporter, document))
    return document


def _checked(opened: MatrixFile) -> MatrixFile:
    from convtool.errors import InputError

    if not (opened.dtype.is_floating_point or opened.dtype.is_complex):
        raise InputError(f"{opened.path}: expected a matrix of floating-point numbers, got {opened.dtype}")
    return opened


def _lowered(
    checkpoint: Checkpoint, found: MatrixFile, layer: str | None, sizes: list[tuple[int, ...]], sources: FieldSources
) -> tuple[LoweredLayer, tuple[int, ...]]:
    """The layer that the matrix is of, and the spatial size of its input, by the file's record or as given."""
    from convtool.core.sizes import split_input_size
    from convtool.errors import InputError, UsageError
    from convtool.fusing.lowering import lower_chain
    from convtool.kinds.stated import FieldSource

    record = _record(found)
    name = layer or record.get("layer")
    if name is None:
        raise UsageError(f"{found.path}: doesn't say which layer it is of; name it with --before")
    if len(sizes) > 1:
        raise UsageError("--input-size: a matrix is for one input size")
    size = sizes[0] if sizes else tuple(record.get("input_size") or ())
    named = checkpoint.layer(str(name))
    if not size and not named.kind.channels_last:
        raise UsageError(f"{found.path}: doesn't say its input size; give --input-size, such as 32,32")
    fields = _fields(found.path, record, named.kind)
    known = FieldSource("record", {named.name: fields}, exact_names=True)
    try:
        lowered = lower_chain(checkpoint, [named.name], sources.with_first(known), size or None)[0]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{found.path}: its record is damaged: {error}") from None
    return lowered, split_input_size(size or (), lowered.conv.in_channels, lowered.conv.spatial_axes)


def _record(found: MatrixFile) -> dict[str, Any]:
    """What the file says of its matrix, nothing if it doesn't; InputError where it isn't what convtool writes."""
    from convtool.core.order import MATRICES
    from convtool.errors import InputError

    record = found.record or {}
    layer, fields, size, rows = (record.get(name) for name in ("layer", "fields", "input_size", "rows"))
    sound = {
        "layer": layer is None or isinstance(layer, str),
        "fields": fields is None or isinstance(fields, dict),
        "input_size": size is None or _are_counts(size),
        "rows": rows is None or (_are_counts(rows) and len(rows) == 2),
        "order": record.get("order", "CHW") in tuple(MATRICES),
        **{flag: isinstance(record.get(flag, False), bool) for flag in ("transpose", "affine")},
    }
    wrong = next((name for name, good in sound.items() if not good), None)
    if wrong is not None:
        raise InputError(f"{found.path}: its record is damaged: {wrong} {str(record[wrong])[:80]!r}")
    return record


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _fields(path: Path, record: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The fields of a record that its layer's kind has."""
    from convtool.errors import InputError, UsageError
    from convtool.kinds import parse_field

    fields = record.get("fields") or {}
    try:
        return {key: parse_field(key, value) for key, value in fields.items() if key in kind.settable}
    except UsageError as error:
        raise InputError(f"{path}: its record is damaged: {error}") from None


def _forms(found: MatrixFile, lowered: LoweredLayer, size: tuple[int, ...]) -> list[_Form]:
    """Which of the layer's matrices it is: the one that its record says, else all of that shape, likeliest first.

    Without a record, the comparison tells: it is the one that it is equal to, entry by entry.
    """
    from convtool.core.order import MATRICES

    if found.record is not None:
        record = _record(found)
        span = None if record.get("rows") is None else (record["rows"][0], record["rows"][1])
        return [_Form(record.get("transpose", False), record.get("affine", False), record.get("order", "CHW"), span)]
    shapes = {form: MATRICES["CHW"](lowered.conv, size, transpose=form[0], affine=form[1]).shape for form in FORMS}
    fitting = [form for form in FORMS if tuple(shapes[form]) == found.shape]
    return [_Form(*form, order) for form in fitting for order in MATRICES] or [_Form(False, False)]


def _until_equivalent(reports: Iterable[tuple[_Form, MatrixReport]]) -> Iterator[tuple[_Form, MatrixReport]]:
    for form, report in reports:
        yield form, report
        if report.equivalent:
            return


def _verify(
    found: MatrixFile, lowered: LoweredLayer, size: tuple[int, ...], form: _Form, options: dict[str, Any]
) -> MatrixReport:
    from convtool.core.verify_matrix import verify_matrix
    from convtool.matrix import FORMATS

    form_of_file = FORMATS.get(found.path.suffix)
    stores_bias = form_of_file is None or form_of_file.STORES_BIAS
    trials = min(options["trials"], 2)  # the entries settle it; products are only to witness the tables
    return verify_matrix(
        lowered.conv,
        size,
        found,
        bias=found.bias,
        stores_bias=stores_bias,
        **asdict(form),
        **(options | {"trials": trials}),
    )


def _document(
    before: Checkpoint | Path, after: Path, name: str, form: str, report: MatrixReport, assumed: list[str]
) -> dict[str, Any]:
    from convtool.cli.verify_text import region_document

    return {
        "before": str(before if isinstance(before, Path) else before.path),
        "after": str(after),
        "equivalent": report.equivalent,
        "statement": "every entry compared: this holds for all inputs of this size",
        "seed": report.seed,
        "tolerance": "derived bound",
        "assumed": assumed,
        "matrix": {
            "of": name,
            "form": form,
            "shape": list(report.shape),
            "dtype": report.dtype,
            "mismatch": report.mismatch or None,
            "ratio": report.ratio,
            "entries": region_document(report.entries),
            "products": region_document(report.products),
            "bias": region_document(report.bias),
            "bias_missing": report.bias_missing,
        },
    }


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    part = document["matrix"]
    row = (
        part["of"],
        part["form"],
        "x".join(map(str, part["shape"])),
        *(_region(part[name]) for name in ("entries", "products", "bias")),
        "equivalent" if document["equivalent"] else "NOT equivalent",
    )
    table(("of", "form", "matrix", "entries", "products", "bias", "verdict"), [row])
    if part["mismatch"]:
        reporter.line(part["mismatch"])
    for name, what in (("entries", "row, column"), ("products", "output"), ("bias", "output")):
        region = part[name]
        if region and not region["equal"]:
            where = f"; worst at {what} {', '.join(map(str, region['where']))}" if region["where"] else ""
            reporter.line(
                f"{name}: {region['differing']} of {region['positions']} differ{where}:"
                f" error {region['error']:.3g}, bound {region['bound']:.3g};"
                f" relative to the largest {region['relative_error']:.3g}"
            )
    if part["bias_missing"]:
        reporter.line("the layer has a bias, which the file has no room for; the matrix alone was compared")
    reporter.line(f"equivalent, {document['statement']}" if document["equivalent"] else "NOT equivalent")


def _region(region: dict[str, Any] | None) -> str:
    return "-" if region is None else f"{'equal' if region['equal'] else 'differs'}, error/bound {region['ratio']:.3g}"
