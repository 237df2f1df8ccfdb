"""A matrix file held against the layer that it is of, or against another matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convtool.checkpoint import Checkpoint
from convtool.core.expression import Expression, joined, split_input_size
from convtool.core.kernels import ORDERS
from convtool.core.names import is_written
from convtool.core.rounding import dtype_name
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves, map_leaves, tree_text
from convtool.core.verify_matrix import MatrixForm, MatrixReport, verify_matrices, verify_matrix
from convtool.errors import InputError, UsageError
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree
from convtool.fusing.settle import settle_alone
from convtool.kinds import parse_field
from convtool.kinds.kind import Kind
from convtool.kinds.stated import FieldSource, FieldSources
from convtool.matrix import FORMATS
from convtool.matrix.read import MatrixFile, open_matrix

USES = {  # (transpose, affine): what the matrix is for
    (False, False): "T @ x",
    (False, True): "T @ x with the bias as its last column",
    (True, False): "x @ B",
    (True, True): "x @ B with the bias as its last row",
}
MOST_TRIALS = 2  # the entries settle it; products are only to witness the tables


@dataclass(frozen=True, slots=True)
class Compared:
    """A matrix file, compared.

    Attributes:
        of: the layer that it was held against, or the other file.
        form: which of the layer's matrices it is, in words.
        assumed: what was taken for granted, in words.
    """

    of: str
    form: str
    report: MatrixReport
    assumed: tuple[str, ...]


def _said(form: MatrixForm) -> str:
    return USES[form.transpose, form.affine] + (", channels last" if form.order == "HWC" else "")


def open_numbers(path: Path) -> MatrixFile:
    """Open a matrix file; raise InputError where its entries aren't floating-point numbers."""
    opened = open_matrix(path)
    if not (opened.dtype.is_floating_point or opened.dtype.is_complex):
        raise InputError(f"{opened.path}: expected a matrix of floating-point numbers, got {opened.dtype}")
    return opened


def compare_with_matrix(found: MatrixFile, other: MatrixFile) -> Compared:
    """Hold a matrix against another one."""
    report = verify_matrices(other, found, bias_before=other.bias, bias_after=found.bias)
    return Compared(str(other.path), "entry by entry", report, ())


def compare_with_layer(
    found: MatrixFile,
    checkpoint: Checkpoint,
    names: Sequence[str] | None,
    sizes: Sequence[tuple[int, ...]],
    sources: FieldSources,
    *,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    no_bias: bool = False,
    **how: Any,
) -> Compared:
    """Hold a matrix against the layer or the chain that it is of.

    Args:
        names: of the layers, where the file has no record or to overrule it.
        sizes: of the first layer's input: one, where the file has no record.
        sources: fields of the layer, overruling the record.
        rows, columns: the ranges A:B of the whole matrix that the file holds, where it has no record of them.
        no_bias: compare the matrix alone, whatever bias is missing.
        how: trials, seed and computed_in, as of `verify_matrix`.
    """
    lowered, size = _lowered(found, checkpoint, names, sizes, sources)
    tree = map_leaves(lambda leaf: leaf.conv, joined(lowered))
    forms = list(_forms(found, tree, size, rows, columns))
    kind = FORMATS.get(found.path.suffix)
    how |= {"digits": found.digits, "trials": min(how["trials"], MOST_TRIALS), "bias": None if no_bias else found.bias}
    how["stores_bias"] = not no_bias and (kind is None or kind.STORES_BIAS)
    tried = ((form, verify_matrix(tree, size, found, form, **how)) for form in forms)  # until one is equal
    first = form, report = next(tried)
    if not report.equivalent:
        form, report = next((one for one in tried if one[1].equivalent), first)
    report = _with_dtype(report, found)
    assumed = [f"{name}: {what}" for leaf in leaves(lowered) for name, what in leaf.assumptions()]
    if found.record is None:
        others = "".join(f"; it isn't {_said(other)} either" for other in forms[1:] if not report.equivalent)
        assumed.append(f"{found.path}: {_said(form)}{others}")
    if found.digits is not None:
        assumed.append(f"{found.path}: its numbers are rounded to {found.digits} decimal digits")
    return Compared(tree_text(lowered, lambda leaf: leaf.name), _said(form), report, tuple(assumed))


def _with_dtype(report: MatrixReport, found: MatrixFile) -> MatrixReport:
    """Return the report, a mismatch where the matrix isn't stored in the dtype that its record says."""
    stored, said = dtype_name(found.dtype), (found.record or {}).get("dtype")
    wrong = said not in (None, stored)
    return replace(report, mismatch=f"it is stored in {stored}, and its record says {said!r}") if wrong else report


def _lowered(
    found: MatrixFile,
    checkpoint: Checkpoint,
    names: Sequence[str] | None,
    sizes: Sequence[tuple[int, ...]],
    sources: FieldSources,
) -> tuple[Tree[LoweredLayer], tuple[int, ...]]:
    """Return the layers that the matrix is of, and the spatial size of their input, by its record or as given."""
    record = _record(found)
    recorded = record.get("chain") or ([record] if "layer" in record else [])
    names = names or ([] if record.get("tree") else [one["layer"] for one in recorded])
    if not names and not record.get("tree"):
        raise UsageError(f"{found.path}: doesn't say which layer it is of; name it with --before")
    tree: Tree[str] = Chain(tuple(names)) if names else _tree(record["tree"])
    if len(sizes) > 1:
        raise UsageError("--input-size: a matrix is for one input size")
    size = sizes[0] if sizes else tuple(record.get("input_size") or ())
    named = {name: checkpoint.layer(name) for name in leaves(tree) if not is_written(name)}
    if not size and not all(layer.kind.channels_last for layer in named.values()):
        raise UsageError(f"{found.path}: doesn't say its input size; give --input-size, such as 32,32")
    own = [(layer, one) for one in recorded if (layer := named.get(one["layer"]))]
    known = FieldSource(
        f"the record of {found.path}",
        {layer.name: _fields(found.path, one, layer.kind) for layer, one in own},
        exact_names=True,
        assumed={layer.name: one.get("unstated") or () for layer, one in own},
    )
    try:
        at = {BASE: checkpoint}
        lowered = lower_tree(at, map_leaves(LayerRef, tree), sources.with_first(known), size or None)
        settled = settle_alone(leaves(lowered), at, sources.assume)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{found.path}: its record is damaged: {error}") from None
    each, first = iter(settled), settled[0].conv
    return map_leaves(lambda _: next(each), lowered), split_input_size(size, first.in_channels, first.spatial_axes)


def _tree(value: Any) -> Tree[str]:
    """Return a record's tree of names; TypeError or ValueError where it isn't one."""
    if isinstance(value, str):
        return value
    ((kind, parts),) = value.items()
    made = tuple(map(_tree, parts))
    return Sum(made) if {"chain": False, "sum": True}[kind] else Chain(made)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _is_layer(value: Any) -> bool:
    return isinstance(value["layer"], str) and isinstance(value["fields"], dict)


# What each key of a record holds, if it is there; what is no document at all raises an error instead.
_SOUND: dict[str, Callable[[Any], bool]] = {
    "layer": lambda name: isinstance(name, str),
    "fields": lambda fields: isinstance(fields, dict),
    "chain": lambda chain: isinstance(chain, list) and all(map(_is_layer, chain)),
    "tree": lambda tree: bool(_tree(tree)),
    "input_size": _are_counts,
    **dict.fromkeys(("rows", "columns"), lambda span: _are_counts(span) and len(span) == 2),
    "unstated": lambda names: all(isinstance(name, str) for name in names),
    "order": lambda order: order in ORDERS,
    **dict.fromkeys(("transpose", "affine"), lambda flag: isinstance(flag, bool)),
}
_ALWAYS_SAID = ("order", "transpose", "affine")  # where they are there at all; of the others null is as good as nothing


def _record(found: MatrixFile) -> dict[str, Any]:
    """Return what the file says of its matrix, if anything; raise InputError where convtool writes no such record."""
    record = {key: one for key, one in (found.record or {}).items() if one is not None or key in _ALWAYS_SAID}
    for name, is_sound in _SOUND.items():
        sound = name not in record
        with suppress(TypeError, ValueError, KeyError, AttributeError, UsageError):
            sound = sound or is_sound(record[name])
        if not sound:
            raise InputError(f"{found.path}: its record is damaged: {name} {str(record[name])[:80]!r}")
    return record


def _fields(path: Path, record: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Return the fields of a record that its layer's kind has."""
    try:
        fields = {key: parse_field(key, value) for key, value in (record.get("fields") or {}).items()}
    except UsageError as error:
        raise InputError(f"{path}: its record is damaged: {error}") from None
    return {key: value for key, value in fields.items() if key in kind.settable}


def _forms(
    found: MatrixFile,
    tree: Expression,
    size: tuple[int, ...],
    rows: tuple[int, int] | None,
    columns: tuple[int, int] | None,
) -> Iterator[MatrixForm]:
    """Yield which of the layer's matrices it may be: the one that its record says, else those of its shape.

    Without a record, the comparison tells: it is the one that it is equal to, entry by entry. The likeliest is first.
    """
    given: dict[str, Any] = {"rows": rows, "columns": columns}
    if found.record is not None:
        record = _record(found)
        spans = {name: tuple(record[name]) if name in record else None for name in given}
        for name, span in given.items():
            if span not in (None, spans[name]):
                raise UsageError(f"--{name}: {found.path} says itself which {name} it holds")
        yield MatrixForm(
            record.get("transpose", False), record.get("affine", False), record.get("order", "CHW"), **spans
        )
        return
    matrices = {use: ToeplitzMatrix(tree, size, transpose=use[0], affine=use[1]) for use in USES}
    for axis, (name, span) in enumerate(given.items()):
        if span is not None and not 0 <= span[0] < span[1] <= max(one.shape[axis] for one in matrices.values()):
            raise UsageError(
                f"--{name}: expected A:B with A below B, and {name} that the matrix has, got {span[0]}:{span[1]}"
            )
    fitting = [use for use, matrix in matrices.items() if _shape_of(matrix, (rows, columns)) == found.shape]
    yield from [MatrixForm(*use, order, **given) for use in fitting for order in ORDERS] or [
        MatrixForm(False, False, **given)
    ]


def _shape_of(matrix: ToeplitzMatrix, part: Sequence[tuple[int, int] | None]) -> tuple[int, ...]:
    """Return the shape of a matrix, or of some of its rows and columns."""
    spans = (span or (0, size) for span, size in zip(part, matrix.shape, strict=True))
    return tuple(min(stop, size) - start for (start, stop), size in zip(spans, matrix.shape, strict=True))
