"""What `convtool verify` says: its results, and their lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from convtool.cli.document import HIDDEN, Count, Dtype, Sizes, fill
from convtool.cli.matrix_verdict import BOUND, MatrixResult, compared, in_words, show_matrix
from convtool.cli.output import Reporter, table, times
from convtool.core.geometry import format_sizes
from convtool.core.names import some_of
from convtool.core.tree import leaves
from convtool.errors import of_bound

if TYPE_CHECKING:
    from convtool.core.tally import Region
    from convtool.core.verify import EquivalenceReport, StoredError
    from convtool.fusing.compare import Pairing
    from convtool.live.whole import WholeReport

KINDS = {
    "normal": "a random input",
    "zero": "an input of zeros",
    "constant": "an input of ones",
    "basis": "a basis vector",
}
# Lines on a terminal before the rest is only counted.
MOST_NAMES = 20  # of tensors
MOST_ROWS = 40  # of the table
MOST_DIFFERENCES = 8
FEW = 5  # of rows and differences that lower precision explains
FUSED = "the fused "  # begins a claim about a layer of AFTER


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
        from convtool.graph.planned import tree_in_short

        return fill(
            cls,
            report,
            pairing,
            layers=tree_in_short(pairing.before, pairing.after),
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
        unless: the lower precision that explains all that differs; '' where none does.
        way_out: when more options would make the verdict another one, and those options.
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
    whole_model: WholeReport | None
    claimed: Sequence[tuple[str, str]] = field(metadata=HIDDEN)
    unless: str = field(metadata=HIDDEN)
    way_out: tuple[str, str] = field(metadata=HIDDEN)
    details: bool = field(metadata=HIDDEN)


def show(result: Result | MatrixResult, reporter: Reporter) -> None:
    """Print a table of what was compared, what differs, and the verdict."""
    if isinstance(result, MatrixResult):
        show_matrix(result, reporter)
    else:
        reporter.lines(result.explained)
        if all(result.way_out):
            when, options = result.way_out
            reporter.line(f"{when}: {reporter.again(options)}")
        _show_fusions(result, reporter, None if result.details else FEW if result.unless else MOST_ROWS)
        claims = result.claims if result.details else min(result.claims, by_field(result.claimed), key=len)
        if claims:
            reporter.line("AFTER's record says, and no tensor of BEFORE shows:")
        reporter.lines([f"  {one}" for one in claims])
        if result.other_tensors is not None:
            _show_tensors(result.other_tensors, "other " if result.fusions else "", result.rounded_to, reporter)
        if (whole := result.whole_model) is not None:
            outputs = "the same up to rounding" if whole.equal else "DIFFERENT"
            reporter.line(
                f"the whole model, on inputs of {whole.inputs}: outputs are {outputs}; largest difference"
                f" {whole.difference:.3g}, by rounding every weight {whole.rounding:.3g}, largest output"
                f" {whole.largest_output:.3g}"
            )
    said = f", {result.statement}" if result.statement else ""
    lower = result.unless if isinstance(result, Result) else ""
    unless = f", unless AFTER was computed in {lower} (--computed-in)" if lower else ""
    reporter.verdict(f"equivalent{said}" if result.equivalent else f"NOT equivalent{unless}", good=result.equivalent)


def by_field(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return what is said of layers, (layer, what), as a line for each set of them that has the same fields."""
    layers: dict[tuple[bool, str], list[str]] = {}
    for layer, what in dict.fromkeys(said):
        for part in what.split(", "):
            layers.setdefault((layer.startswith(FUSED), part), []).append(layer.removeprefix(FUSED))
    parts: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for (fused, part), names in layers.items():
        parts.setdefault((fused, tuple(names)), []).append(part)
    return [f"{FUSED * fused}{some_of(names)}: {', '.join(each)}" for (fused, names), each in parts.items()]


def _show_fusions(result: Result, reporter: Reporter, most: int | None) -> None:
    reports = result.fusions
    if reports:
        columns = ("layers", "input", "numbers", "interior", "rim", "verdict")
        table(columns, list(map(_row, sorted(reports, key=lambda one: one.equivalent))), most=most)
        lower = "" if result.computed_in == "float64" else f"computing in {result.computed_in} and "
        allowed = f"{lower}rounding" if result.tolerance == BOUND else "the given tolerance"
        reporter.line(f"percentages: the largest error, as a share of what {allowed} allows; up to 100% is equivalent")
    stored = [report.run_as_stored for report in reports if report.run_as_stored is not None]
    for dtype in dict.fromkeys(one.dtype for one in stored):
        largest = max(one.difference for one in stored if one.dtype == dtype)
        reporter.line(f"run in {dtype}, as stored, outputs differ by up to {largest:.2g} of the largest")
    reporter.lines(
        [text for report in reports for text in _differences(report)], most=most and min(most, MOST_DIFFERENCES)
    )


def _differences(report: Report) -> Iterator[str]:
    """Yield what differs in a comparison, and what it says nothing of."""
    taps = report.taps_read
    if report.mismatch:
        yield f"{report.name}: {report.mismatch}"
    elif taps.read < taps.of:
        yield (
            f"{report.name}: at {times(report.input_size)} outputs read {taps.read} of {taps.of} taps; "
            "nothing is said of the others, which larger inputs meet"
        )
    if report.numbers is not None and report.numbers.differing:
        yield f"{report.name}, {_worst_number(report.numbers)}"
    for name, region in (("interior", report.interior), ("rim", report.rim)):
        if region and not region.equal:
            yield f"{report.name}, {name}: {_worst(region)}"


TOLD = {
    "dtype": "isn't stored in the dtype that AFTER records",
    "digest": "isn't the tensor that AFTER records, by its digest",
}


def _show_tensors(others: OtherTensors, other: str, rounded_to: str | None, reporter: Reporter) -> None:
    told = [
        f"{name}: {TOLD.get(what, f'{what}, and no fusion accounts for it')}" for name, what in others.differing.items()
    ]
    reporter.lines(told, most=MOST_NAMES)
    if told:
        covered = "; they went into the networks that were run on random inputs" if others.by_random_inputs else ""
        reporter.line(f"{other}tensors that differ, are missing or are new: {len(told)}{covered}")
    elif others.compared:
        rounded = f", or rounded once to {rounded_to}" if rounded_to else ""
        tensors = "tensor" if others.compared == 1 else "tensors"
        reporter.line(f"{others.compared} {other}{tensors}: bit for bit the same{rounded}")


def _row(report: Report) -> tuple[str, ...]:
    return (
        report.layers,
        times(report.input_size),
        "-" if (numbers := report.numbers) is None else _ratio(numbers.ratio, equal=not numbers.differing),
        *("-" if one is None else _ratio(one.ratio, equal=one.equal) for one in (report.interior, report.rim)),
        in_words(report.equivalent),
    )


def _ratio(ratio: float, *, equal: bool) -> str:
    share = of_bound(ratio).removesuffix(" of bound").replace(" times the bound", "x")
    return share if equal else f"DIFFERS: {share}"


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
