"""What `convtool fuse` says of what it did, or would do: its document, and its lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convtool.cli.output import Reporter, tree_text
from convtool.cli.written import print_tensors, print_written, tensors_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convtool.core.verify import EquivalenceReport
    from convtool.fusing.fusion import PlannedLayer


def describe(layer: PlannedLayer, reports: Sequence[EquivalenceReport], size: tuple[int, ...] | None) -> dict[str, Any]:
    """One fusion for the JSON document.

    Args:
        reports: of running it against its layers; none where nobody did.
        size: of the input, for those that are exact at every size.
    """
    verdict = layer.fusion.verdict
    before, after = layer.parameters
    at = verdict.input_size or size
    work_before, work_after = layer.multiply_adds(at)
    return {
        **layer.record.to_json(),
        "layers": [one.layer.name for one in layer.layers],
        "kernel_size": list(layer.fusion.conv.geometry.kernel_size),
        "smallest_input": list(verdict.smallest),
        "differs": None if verdict.exact else verdict.describe_rim(),
        "assumed": layer.assumed,
        "edits": layer.module_edits,
        "bias_map": layer.fusion.conv.has_bias_map,
        "parameters": {"before": before, "after": after},
        "multiply_adds": {
            "before": work_before,
            "after": work_after,
            "per": "input position" if at is None else "input",
        },
        "tensors": tensors_document(layer.edit),
        "verified": _proof(reports),
    }


def _proof(reports: Sequence[EquivalenceReport]) -> dict[str, Any] | None:
    if not reports:
        return None
    ratio = max(report.interior.ratio for report in reports)
    return {"ratio": ratio, "input_sizes": [list(report.input_size) for report in reports]}


def print_lines(reporter: Reporter, document: dict[str, Any]) -> None:
    """The document for people."""
    for fusion in document["fusions"]:
        reporter.line(f"{tree_text(fusion['sources'])} -> {fusion['name']}")
        for line in fusion["edits"]:
            reporter.line(f"  {line}")
        reporter.line(f"  {_exactness(fusion)}")
        if fusion["verified"]:
            sizes = " and ".join("x".join(map(str, one)) for one in fusion["verified"]["input_sizes"])
            where = "" if fusion["exact"] else ", the border apart"
            reporter.line(f"  verified at {sizes}{where}: error/bound {fusion['verified']['ratio']:.3g}")
        numbers, work = fusion["parameters"], fusion["multiply_adds"]
        per = " per input position" if work["per"] == "input position" else ""
        reporter.line(
            f"  {numbers['before']} -> {numbers['after']} parameters,"
            f" {_count(work['before'])} -> {_count(work['after'])} multiply-adds{per}, {fusion['dtype']}"
        )
        if not document["written"]:
            print_tensors(reporter, fusion["tensors"])
    if len(document["fusions"]) > 1:
        totals = [sum(fusion["parameters"][key] for fusion in document["fusions"]) for key in ("before", "after")]
        reporter.line(f"{len(document['fusions'])} fusions, {totals[0]} -> {totals[1]} parameters")
    print_written(reporter, document)


def _exactness(fusion: dict[str, Any]) -> str:
    if not fusion["exact"]:
        return f"NOT exact: {fusion['differs']} of the output differ"
    if fusion["input_size"] is not None:
        return f"exact at input size {_sizes(fusion['input_size'])}"
    smallest = fusion["smallest_input"]
    if fusion["fields"].get("padding_mode", "zeros") != "zeros" and smallest:
        return f"exact at every input size from {_sizes(smallest)} up"
    return "exact at every input size"


def _count(number: float) -> str:
    """Whole numbers as they are, others to two places."""
    return str(int(number)) if number == int(number) else f"{number:.2f}"


def _sizes(values: list[int]) -> str:
    return ",".join(map(str, values))
