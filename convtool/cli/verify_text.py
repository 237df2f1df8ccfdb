"""What `convtool verify` says of two checkpoints: its document, and its lines."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from convtool.cli.model import whole_text
from convtool.cli.output import Reporter, table
from convtool.core.tree import leaves

if TYPE_CHECKING:
    from convtool.core.tally import Region
    from convtool.core.verify import EquivalenceReport
    from convtool.fusing.compare import Pairing

KINDS = {"normal": "a random input", "zero": "an input of zeros", "constant": "an input of ones"}
MOST_NAMES = 20  # tensors named one by one before the rest is only counted


def assumed(pairings: list[Pairing]) -> list[str]:
    found = [x.assumed for pairing in pairings for x in (*leaves(pairing.before), *leaves(pairing.after)) if x.assumed]
    return list(dict.fromkeys(found))


def statement(reports: list[EquivalenceReport], exhaustive: bool) -> str:
    """What was shown, apart from the verdict."""
    if not reports:
        return ""
    if exhaustive:
        return "every basis vector run: this holds for all inputs of these sizes"
    if all(report.complete for report in reports):
        return "every kernel entry met by itself"
    met = [report.met for report in reports if not report.complete]
    return (
        f"kernel entries met by themselves in {sum(n for n, _ in met)} of {sum(n for _, n in met)} input channels only"
        " where there are many; --exhaustive runs all"
    )


def hints(results: list[tuple[Pairing, EquivalenceReport]], sizes: bool, computed_in: str | None) -> list[str]:
    """What the record knows of a layer that differs: that it was made for other sizes, or rounded several times."""
    lines = []
    for pairing in {id(pairing): pairing for pairing, report in results if not report.equivalent}.values():
        said = " and ".join(dict.fromkeys(",".join(map(str, size)) for _, size in pairing.sizes))
        if sizes and said:
            lines.append(f"{pairing.name}: by the record it was fused for input size {said} only")
        between = sorted(set(pairing.dtypes) - {"float64"})
        if between and computed_in is None:
            lines.append(
                f"{pairing.name}: was fused in steps and stored in {' and '.join(between)} in between, for which one"
                " rounding each is allowed, and no underflow: verify each step by itself"
            )
    return lines


def narrowed(results: list[tuple[Pairing, EquivalenceReport]]) -> str:
    """What is said of one input size only, since the record knows of no other."""
    said = {pairing.name: size for pairing, _ in results if (size := pairing.input_size()) is not None}
    if not said:
        return ""
    which = "" if len(said) == len({pairing.name for pairing, _ in results}) else f"{', '.join(said)} "
    words = f"; {which}at input size {' or '.join(dict.fromkeys(map(_comma, said.values())))} only, as the record says"
    run = [report.input_size[1:] for pairing, report in results if pairing.name in said]
    smaller = dict.fromkeys(_comma(size) for size in run if size not in said.values())
    return f"{words}, run at {' or '.join(smaller)}, where the borders are the same" if smaller else words


def _comma(size: tuple[int, ...]) -> str:
    return ",".join(map(str, size))


def describe(pairing: Pairing, report: EquivalenceReport) -> dict[str, Any]:
    return {
        "name": pairing.name,
        "before": [x.layer.name for x in leaves(pairing.before)],
        "after": [x.layer.name for x in leaves(pairing.after)],
        "equivalent": report.equivalent,
        "ratio": report.ratio,
        "mismatch": report.mismatch or None,
        "input_size": list(report.input_size),
        "output_size": list(report.output_size),
        "dtype": report.dtype,
        "inputs": report.inputs,
        "input_channels_met": {"met": report.met[0], "of": report.met[1]},
        "taps_read": {"read": report.taps[0], "of": report.taps[1]},
        "interior": region_document(report.interior),
        "rim": region_document(report.rim),
        "run_as_stored": asdict(report.stored_error) if report.stored_error else None,
    }


def region_document(region: Region) -> dict[str, Any] | None:
    """A region for the JSON document; None where it is empty."""
    return asdict(region) | {"equal": region.equal} if region.positions else None


def print_lines(reporter: Reporter, document: dict[str, Any]) -> None:
    if document["fusions"]:
        columns = ("layers", "input", "interior", "rim", "relative error", "run as stored", "verdict")
        table(columns, [_row(part) for part in document["fusions"]])
    for part in document["fusions"]:
        if part["mismatch"]:
            reporter.line(f"{part['name']}: {part['mismatch']}")
        read, taps = part["taps_read"]["read"], part["taps_read"]["of"]
        if read < taps and not part["mismatch"]:
            reporter.line(
                f"{part['name']}: at {'x'.join(map(str, part['input_size']))} outputs read {read} of {taps} taps; "
                "nothing is said of the others, which larger inputs meet"
            )
        for name in ("interior", "rim"):
            if part[name] and not part[name]["equal"]:
                reporter.line(f"{part['name']}, {name}: {_worst(part[name])}")
    others = document["other_tensors"]
    if others is not None:
        for name, what in list(others["differing"].items())[:MOST_NAMES]:
            reporter.line(f"{name}: {what}, and no fusion accounts for it")
        reporter.line(
            f"{others['compared']} other tensors: "
            + (f"{len(others['differing'])} differ" if others["differing"] else "bit for bit the same")
        )
    if document["whole_model"] is not None:
        reporter.line(whole_text(document["whole_model"]))
    statement = f", {document['statement']}" if document["statement"] else ""
    reporter.line(f"equivalent{statement}" if document["equivalent"] else "NOT equivalent")


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    regions = [region for region in (part["interior"], part["rim"]) if region]
    relative = max((region["relative_error"] for region in regions), default=None)
    stored = part["run_as_stored"]
    return (
        " + ".join(part["before"]) + " = " + " + ".join(part["after"]),
        "x".join(map(str, part["input_size"])),
        _region(part["interior"]),
        _region(part["rim"]),
        "-" if relative is None else f"{relative:.2g}",
        "-" if stored is None else f"{stored['difference']:.2g} in {stored['dtype']}",
        "equivalent" if part["equivalent"] else "NOT equivalent",
    )


def _worst(region: dict[str, Any]) -> str:
    """Where a region differs most, in words."""
    channel, *position = region["where"]
    given = KINDS.get(region["kind"], "")
    if region["source"]:
        source, *at = region["source"]
        given = f"an impulse in input channel {source}{_at(at)}"
    return (
        f"{region['differing']} of {region['positions']} output positions differ; worst in channel {channel}"
        f"{_at(position)}, for {given}: error {region['error']:.3g}, bound {region['bound']:.3g};"
        f" relative to the largest output {region['relative_error']:.3g}"
    )


def _at(position: list[int]) -> str:
    return f" at {','.join(map(str, position))}" if position else ""


def _region(region: dict[str, Any] | None) -> str:
    if region is None:
        return "-"
    return f"{'equal' if region['equal'] else 'differs'}, error/bound {region['ratio']:.3g}"
