"""`convtool spectrum`: the singular values at both ends of a layer's matrix, without making it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from convtool.cli.layer import LayerOptions, lower_layer
from convtool.cli.options import (
    SourceOptions,
    Speech,
)
from convtool.cli.output import Reporter
from convtool.cli.run import run
from convtool.cli.signature import grouped

NAME = "spectrum"
USAGE = "CKPT LAYER"
EXAMPLES = """
convtool spectrum resnet.safetensors layer1.0.conv1 --input-size 56,56 --padding 1
# how far the answers may be off, relative to the largest
convtool spectrum net.pt conv1 --input-size 3,32,32 --tolerance 1e-4
"""

METHODS = {
    "fourier": "by Fourier transform, exact to rounding",
    "dense": "by a dense SVD, exact to rounding",
    "cholesky": "by Lanczos, and with a factored Gram matrix",
    "lanczos": "by Lanczos bidiagonalisation",
}

PROVED = {"largest": "larger", "smallest": "smaller"}


@grouped
def command(
    *,
    wanted: LayerOptions,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", metavar="T", help="How far off the values may be, relative to the largest."),
    ] = 1e-6,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            help="Steps of each iteration at most; by default what usually does.",
            show_default=False,
        ),
    ] = None,
    sources: SourceOptions,
    speech: Speech,
) -> int:
    """The largest and the smallest singular value of a layer's matrix, and its condition number.

    A large matrix isn't built. Where the product with its transpose can be factored in a few minutes (64 to 64
    channels, 3x3, up to about 28x28), that is done, which finds the smallest and proves the answers. Each value is
    given with how far off it may be; where one isn't settled, it says so and gives what it is at least or at most.
    """
    reporter = speech.reporter(NAME)

    def body() -> None:
        from convtool.core.spectrum import spectrum
        from convtool.errors import UsageError

        if not 0 < tolerance < 1:
            raise UsageError(f"--tolerance: expected a number between 0 and 1, got {tolerance:g}")
        if steps is not None and steps < 1:
            raise UsageError(f"--steps: expected a number of at least 1, got {steps}")
        found = lower_layer(reporter, wanted, sources)
        with reporter.progress("computing singular values", None):
            ends = spectrum(found.conv, found.spatial or (), tolerance=tolerance, steps=steps)
        known = ends.largest.converged and ends.smallest.converged
        document: dict[str, Any] = {
            "source": str(wanted.checkpoint),
            **found.record,
            "shape": list(ends.shape),
            "largest": _value(ends.largest),
            "smallest": _value(ends.smallest),
            "condition": ends.condition if known else None,
            "condition_error": ends.condition_error if known else None,
            "condition_at_least": ends.condition_at_least,
            "tolerance": ends.tolerance,
            "methods": list(ends.methods),
            "steps": ends.steps,
            "assumed": found.assumed,
        }
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, body)


def _value(value: Any) -> dict[str, Any]:
    return {"value": value.value, "error": value.error, "converged": value.converged, "proved": value.proved}


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    rows, columns = document["shape"]
    how = ", ".join(METHODS[method] for method in document["methods"])
    after = f", {document['steps']} steps" if document["steps"] else ""
    reporter.line(
        f"{document['layer']}: {'x'.join(map(str, document['input_size']))} ->"
        f" {'x'.join(map(str, document['output_size']))}, matrix {rows} x {columns}"
    )
    largest, smallest = document["largest"], document["smallest"]
    reporter.line(f"  largest singular value   {_shown(largest, 'at least')}")
    reporter.line(f"  smallest singular value  {_shown(smallest, 'at most')}")
    condition = document["condition"]
    if condition is None:
        reporter.line(f"  condition number         at least {document['condition_at_least']:.6g}")
    elif condition == float("inf"):
        reporter.line("  condition number         infinite: to the accuracy above, the smallest is zero")
    else:
        vague = document["condition_error"] > 1e-6 * condition
        error = f" (+- {document['condition_error']:.1g})" if vague else ""
        reporter.line(f"  condition number         {condition:.6g}{error}")
    reporter.line(f"  {how}{after}{_proved(document)}")
    if not (largest["converged"] and smallest["converged"]):
        reporter.remark(
            f"not settled to {document['tolerance']:g} in {document['steps']} steps; --steps takes it further"
        )


def _shown(value: dict[str, Any], bound: str) -> str:
    if not value["converged"]:
        return f"{bound} {value['value']:.6g}"
    return f"{value['value']:.9g} (+- {value['error']:.1g})"


def _proved(document: dict[str, Any]) -> str:
    """What of an iteration's answer is certain; what is exact to rounding needs no word."""
    if not document["steps"]:
        return ""
    proved = [end for end in ("largest", "smallest") if document[end]["proved"]]
    if not proved:
        return ""
    return "; proved: none is larger or smaller" if len(proved) == 2 else f"; proved: none is {PROVED[proved[0]]}"
