"""What `convtool verify` says: its results, and their lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from convtool.cli.document import HIDDEN, Count, Dtype, Sizes, fill
from convtool.cli.matrix_verdict import MatrixResult, compared, in_words, show_matrix, times
from convtool.cli.output import Reporter, table
from convtool.core.geometry import format_sizes
from convtool.core.tree import leaves, tree_text

if TYPE_CHECKING:
    from convtool.core.tally import Region
    from convtool.core.verify import EquivalenceReport, StoredError
    from convtool.fusing.compare import Pairing
    from convtool.fusing.leaf import LoweredLayer
    from convtool.live.whole import WholeReport

KINDS = {
    "normal": "a random input",
    "zero": "an input of zeros",
    "constant": "an input of ones",
    "basis": "a basis vector",
}
MOST_NAMES = 20  # tensors named one by one before the rest is only counted


@dataclass(frozen=True, slots=True)
class Read:
    """Of AFTER's taps, those that outputs read at this size; nothing is said of the others.

    Attributes:
        of: 0 where AFTER is several layers.
    """

    read: Count
    of: Count


@dataclass(frozen=True, slots=True)
class Report:
    """Layers of BEFORE and those of AFTER that stand for them, at one input size.

    Attributes:
        ratio: largest error by its bound.
        mismatch: why nothing could be compared.
        numbers: AFTER's, each held against BEFORE's, those in taps that an output reads; `where` is output channel,
            input channel and tap.
        inputs: by kind.
        run_as_stored: both sides in the dtype they are stored in, relative to the largest output; no part of the
            verdict.
    """

    name: str
    layers: str = field(metadata=HIDDEN)
    before: tuple[str, ...]
    after: tuple[str, ...]
    equivalent: bool
    ratio: float
    mismatch: str | None
    input_size: Sizes
    output_size: Sizes
    dtype: Dtype
    numbers: Region | None
    inputs: dict[str, Count]
    taps_read: Read
    interior: Region | None
    rim: Region | None
    run_as_stored: StoredError | None

    @classmethod
    def of(cls, pairing: Pairing, report: EquivalenceReport) -> Report:
        """Return what there is to say of a comparison."""
        return fill(
            cls,
            report,
            pairing,
            layers=f"{tree_text(pairing.before, _name)} = {tree_text(pairing.after, _name)}",
            before=tuple(one.name for one in leaves(pairing.before)),
            after=tuple(one.name for one in leaves(pairing.after)),
            mismatch=report.mismatch or None,
            numbers=compared(report.numbers),
            taps_read=Read(*report.taps),
            interior=compared(report.interior),
            rim=compared(report.rim),
            run_as_stored=report.stored_error,
        )


@dataclass(frozen=True, slots=True)
class OtherTensors:
    """What became of the tensors that went into no fusion.

    Attributes:
        differing: by full name.
        by_random_inputs: with --model-after: those that differ are covered by running both networks.
    """

    compared: Count
    differing: dict[str, Annotated[str, ("enum", ("changed", "missing", "new", "dtype", "digest"))]]
    by_random_inputs: bool


@dataclass(frozen=True, slots=True)
class Whole:
    """Both networks' outputs, held against each other.

    Attributes:
        outputs: numbers compared.
        difference: the largest.
        rounding: what rounding every weight changes.
        ratio: difference by rounding.
        most: the largest ratio that is called equal.
    """

    inputs: str
    outputs: Count
    difference: float
    largest_output: float
    rounding: float
    ratio: float
    most: float
    equal: bool

    @classmethod
    def of(cls, report: WholeReport) -> Whole:
        """Return what there is to say of a comparison."""
        from convtool.live.whole import MOST

        return fill(cls, report, largest_output=report.largest, most=MOST)

    def __str__(self) -> str:
        return (
            f"the whole model, on inputs of {self.inputs}: outputs"
            f" {'equal' if self.equal else 'DIFFER'}; they differ by {self.difference:.3g}, rounding every weight"
            f" changes them by {self.rounding:.3g}, the largest is {self.largest_output:.3g}"
        )


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What stands in the place of the derived bound."""

    rtol: float | None
    atol: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on two checkpoints.

    Attributes:
        equivalent: exit code 0 or 1.
        statement: what was shown, apart from the verdict.
        claims: what AFTER's record says of BEFORE's layers that BEFORE's tensors don't, and the verdict rests on.
        explained: what of a difference computing in a lower precision would explain.
        other_tensors: null with --only.
        whole_model: with --model-input: the outputs of both networks; null without.
    """

    before: Path
    after: Path
    equivalent: bool
    statement: str
    exhaustive: bool
    seed: int
    trials: Count
    computed_in: Dtype
    rounded_to: Dtype | None
    tolerance: Tolerance | Literal["derived bound"]
    assumed: tuple[str, ...]
    claims: tuple[str, ...]
    explained: tuple[str, ...]
    input_sizes: Literal["given", "chosen"]
    fusions: tuple[Report, ...]
    other_tensors: OtherTensors | None
    whole_model: Whole | None


def _name(layer: LoweredLayer) -> str:
    return layer.name


def show(result: Result | MatrixResult, reporter: Reporter) -> None:
    """Print a table of what was compared, what differs, and the verdict."""
    if isinstance(result, MatrixResult):
        show_matrix(result, reporter)
    else:
        _show_fusions(result.fusions, reporter)
        for claim in result.claims:
            reporter.line(f"as AFTER records: {claim}")
        for text in result.explained:
            reporter.line(text)
        if result.other_tensors is not None:
            _show_tensors(result.other_tensors, result.rounded_to, reporter)
        if result.whole_model is not None:
            reporter.line(str(result.whole_model))
    said = f", {result.statement}" if result.statement else ""
    reporter.verdict(f"equivalent{said}" if result.equivalent else "NOT equivalent", good=result.equivalent)


def _show_fusions(reports: Sequence[Report], reporter: Reporter) -> None:
    if reports:
        columns = ("layers", "input", "error/bound: numbers", "interior", "rim", "verdict")
        table(columns, list(map(_row, reports)))
    stored = [report.run_as_stored for report in reports if report.run_as_stored is not None]
    for dtype in dict.fromkeys(one.dtype for one in stored):
        most = max(one.difference for one in stored if one.dtype == dtype)
        reporter.line(f"run in {dtype}, as stored, outputs differ by up to {most:.2g} of the largest")
    for report in reports:
        if report.mismatch:
            reporter.line(f"{report.name}: {report.mismatch}")
        taps = report.taps_read
        if taps.read < taps.of and not report.mismatch:
            reporter.line(
                f"{report.name}: at {times(report.input_size)} outputs read {taps.read} of {taps.of} taps; "
                "nothing is said of the others, which larger inputs meet"
            )
        if report.numbers is not None and report.numbers.differing:
            reporter.line(f"{report.name}, {_worst_number(report.numbers)}")
        for name, region in (("interior", report.interior), ("rim", report.rim)):
            if region and not region.equal:
                reporter.line(f"{report.name}, {name}: {_worst(region)}")


TOLD = {
    "dtype": "isn't stored in the dtype that AFTER records",
    "digest": "isn't the tensor that AFTER records, by its digest",
}


def _show_tensors(others: OtherTensors, rounded_to: str | None, reporter: Reporter) -> None:
    differing = list(others.differing.items())
    for name, what in differing[:MOST_NAMES]:
        reporter.line(f"{name}: {TOLD.get(what, f'{what}, and no fusion accounts for it')}")
    if len(differing) > MOST_NAMES:
        reporter.line(f"... and {len(differing) - MOST_NAMES} more")
    if differing:
        covered = "; they went into the networks that were run on random inputs" if others.by_random_inputs else ""
        reporter.line(f"other tensors that differ, are missing or are new: {len(differing)}{covered}")
    else:
        rounded = f", or rounded once to {rounded_to}" if rounded_to else ""
        tensors = "tensor" if others.compared == 1 else "tensors"
        reporter.line(f"{others.compared} other {tensors}: bit for bit the same{rounded}")


def _row(report: Report) -> tuple[str, ...]:
    return (
        report.layers,
        times(report.input_size),
        "-" if (numbers := report.numbers) is None else _ratio(numbers.ratio, equal=not numbers.differing),
        *("-" if one is None else _ratio(one.ratio, equal=one.equal) for one in (report.interior, report.rim)),
        in_words(report.equivalent),
    )


def _ratio(ratio: float, *, equal: bool) -> str:
    return f"{ratio:.3g}" if equal else f"DIFFERS: {ratio:.3g}"


def _worst_number(numbers: Region) -> str:
    """Return where a number differs most, in words."""
    channel, *place = numbers.where or ()
    at = f"input channel {place[0]}{_at(place[1:])}" if place else "its bias"
    return (
        f"numbers: {numbers.differing} of {numbers.elements} differ; worst in output channel {channel}, {at}:"
        f" error {numbers.error:.3g}, bound {numbers.bound:.3g}"
    )


def _worst(region: Region) -> str:
    """Return where a region differs most, in words."""
    channel, *position = region.where or ()
    return (
        f"{region.differing} of {region.positions} output positions differ; worst in channel {channel}"
        f"{_at(position)}, for {KINDS[region.kind]}: error {region.error:.3g}, bound {region.bound:.3g};"
        f" relative to the largest output {region.relative_error:.3g}"
    )


def _at(position: Sequence[int]) -> str:
    return f" at {format_sizes(position)}" if position else ""
