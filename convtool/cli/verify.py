"""`convtool verify`: do two checkpoints, or a layer and its matrix, or two matrices compute the same?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete, exit_codes
from convtool.cli.options import (
    FLOATS,
    SourceOptions,
    Speech,
    With,
    check_used,
    field_sources,
    open_others,
    open_reporting,
    parse_dtype,
    parse_input_size,
)
from convtool.cli.output import Reporter
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.cli.verify_text import assumed, describe, hints, narrowed, print_lines, statement
from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from convtool.checkpoint import Checkpoint
    from convtool.core.verify import EquivalenceReport
    from convtool.fusing.compare import Pairing
    from convtool.kinds.stated import FieldSource, FieldSources

NAME = "verify"
USAGE = "BEFORE AFTER"
EXAMPLES = """
convtool verify resnet.safetensors fused.safetensors --input-size 64,56,56
convtool verify net.safetensors fused.safetensors --exhaustive --json
# fused by another program, which left no record
convtool verify net.pt other.pt --before conv1,bn1 --after conv1 --input-size 32,32 --set conv1.padding=1
# a layer and the matrix that `convtool toeplitz` wrote, which says what it is of
convtool verify net.safetensors conv1.npz
"""


@dataclass(frozen=True, slots=True)
class _Sources(SourceOptions):
    """The same for two checkpoints."""

    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="LAYER.FIELD=VALUE",
            help="A field of a layer, in both checkpoints; before:LAYER... or after:LAYER... for one. Repeatable.",
            show_default=False,
        ),
    ] = None

    def of_both(self, model: FieldSource | None) -> tuple[FieldSources, FieldSources]:
        """Fields for BEFORE and for AFTER; a --set with before: or after: in front goes to one of them only."""
        both = self.settings or []
        first = [text.removeprefix("before:") for text in both if not text.startswith("after:")]
        second = [text.removeprefix("after:") for text in both if not text.startswith("before:")]
        return field_sources(self.geometry, first, {}, model), field_sources(self.geometry, second, {})


@grouped
def command(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="The original checkpoint, or a matrix file.", show_default=False)
    ],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", help="The fused checkpoint, or a matrix file.", show_default=False)
    ],
    *,
    input_size: Annotated[
        list[str] | None,
        typer.Option(
            "--input-size",
            metavar="[C,]H,W",
            help="Size of the input to the first layer; repeatable. By default sizes that show border and interior.",
            show_default=False,
        ),
    ] = None,
    before_layers: Annotated[
        str | None,
        typer.Option(
            "--before",
            metavar="A,B",
            help="The chain in BEFORE, or the matrix's layer, where AFTER has no record.",
            show_default=False,
            autocompletion=complete.chain_of("before"),
        ),
    ] = None,
    after_layers: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="C",
            help="The chain in AFTER that stands for it.",
            show_default=False,
            autocompletion=complete.chain_of("after"),
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="Random inputs for each chain and size.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random inputs.")] = 0,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Run every basis vector: settles equality for all inputs.")
    ] = False,
    rtol: Annotated[
        float | None,
        typer.Option("--rtol", help="A relative tolerance instead of the derived bound.", show_default=False),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option("--atol", help="An absolute tolerance instead of the derived bound.", show_default=False),
    ] = None,
    computed_in: Annotated[
        str | None,
        typer.Option(
            "--computed-in",
            metavar="DTYPE",
            help="Precision in which another program fused AFTER; float64 by default, as convtool does.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where to run it, such as cuda; the verdict is the same.")
    ] = "cpu",
    sources: _Sources,
    model_input: Annotated[
        str | None,
        typer.Option(
            "--model-input",
            metavar="C,H,W",
            help="With --model: also run the whole model on inputs of that size, before and after.",
            show_default=False,
        ),
    ] = None,
    sources_given: With = None,
    speech: Speech,
) -> int:
    """Prove that AFTER computes what BEFORE does, up to the rounding that storing it must bring.

    Goes by the record that convtool leaves in AFTER: every fused layer is run against the layers it stands for, and
    every other tensor must be the same bit for bit; a matrix is held against its layer entry by entry. Exit code 0:
    equivalent, 1: not equivalent.

    There is no tolerance to choose: each output is held against a bound derived from the weights, the input and the
    dtype, and the largest ratio of error to bound is reported; at most 1 passes.
    """
    reporter = speech.reporter(NAME)

    def body() -> int:
        import torch

        from convtool.matrix.read import is_matrix_file

        sizes = [size for text in input_size or () if (size := parse_input_size(text)) is not None]
        if model_input is not None and sources.model is None:
            raise UsageError("--model-input: goes with --model")
        if trials < 1 and not exhaustive:
            raise UsageError(f"--trials: expected at least 1, got {trials}; no comparison is no proof")
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seed: expected an integer from 0 to 2**63 - 1, got {seed}")
        options: dict[str, Any] = {
            "trials": trials,
            "seed": seed,
            "computed_in": parse_dtype(computed_in, "--computed-in", FLOATS) or torch.float64,
        }
        if is_matrix_file(after) or is_matrix_file(before):
            given = {"--rtol": rtol, "--atol": atol, "--after": after_layers, "--with": sources_given}
            for option, value in given.items():
                if value is not None:
                    raise UsageError(f"{option}: doesn't go with a matrix file")
            return _matrices(reporter, before, after, before_layers, sizes, sources, options)
        if (before_layers is None) != (after_layers is None):
            raise UsageError("--before and --after go together: the chain in BEFORE and the one that stands for it")
        options |= {"exhaustive": exhaustive, "rtol": rtol, "atol": atol, "device": _device(device)}
        sides = _open(reporter, before, after, sources, sources_given)
        if before_layers is not None and after_layers is not None:
            pairings = [sides.named(before_layers, after_layers)]
            tensors = None
        else:
            pairings = sides.recorded(reporter)
            tensors = _compare_tensors(reporter, sides, pairings)
        for text in assumed(pairings):
            reporter.remark(f"assumed: {text}")
        results = _run(reporter, pairings, sides, sizes, options)
        if not results and not sides.before.infos:
            raise UsageError("there is nothing to compare: no fusion and no tensor")
        for text in hints(results, bool(sizes), computed_in):
            reporter.remark(text)
        whole = _whole_model(reporter, sides, sources, model_input, seed)
        equal = not (tensors and tensors["differing"]) and (whole is None or whole["equal"])
        document = {
            "before": str(before),
            "after": str(after),
            "equivalent": equal and all(report.equivalent for _, report in results),
            "statement": statement([report for _, report in results], exhaustive)
            + ("" if sizes else narrowed(results)),
            "exhaustive": exhaustive,
            "seed": seed,
            "trials": trials,
            "computed_in": computed_in or "float64",
            "tolerance": {"rtol": rtol, "atol": atol} if rtol is not None or atol is not None else "derived bound",
            "assumed": assumed(pairings),
            "input_sizes": "given" if sizes else "chosen",
            "fusions": [describe(pairing, report) for pairing, report in results],
            "other_tensors": tensors,
            "whole_model": whole,
        }
        reporter.result(document, lambda: print_lines(reporter, document))
        return exit_codes.OK if document["equivalent"] else exit_codes.NOT_EQUIVALENT

    return run(reporter, body)


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both checkpoints, and those that other layers of BEFORE's fusions came from; and the fields of their layers."""

    before: Checkpoint
    after: Checkpoint
    others: Mapping[str, Checkpoint]
    fields: tuple[FieldSources, FieldSources]

    def named(self, before: str, after: str) -> Pairing:
        """The chains of --before and --after."""
        from convtool.fusing.trials import named_pairing

        return named_pairing(self.before, self.after, (split_names(before), split_names(after)), self.fields)

    def recorded(self, reporter: Reporter) -> list[Pairing]:
        """The fusions that AFTER records and BEFORE lacks."""
        from convtool.fusing.compare import recorded_pairings

        pairings = recorded_pairings(self.before, self.after, self.fields[0], self.others)
        if not pairings:
            reporter.remark("AFTER records no fusion that BEFORE lacks; only their tensors were compared")
        return pairings


def _open(reporter: Reporter, before: Path, after: Path, sources: _Sources, sources_given: list[str] | None) -> _Sides:
    from convtool.checkpoint import is_flat

    one = sources.open(before, reporter)
    mapped = not sources.no_mmap
    other = open_reporting(reporter, after, None if is_flat(after) else sources.root, mapped=mapped)
    others = open_others(reporter, sources_given, mapped=mapped)
    fields = sources.of_both(sources.of_model(one, reporter))
    known = [name for opened in (one, other, *others.values()) for name in opened.layers]
    for each in fields:
        check_used(each, known)
    return _Sides(one, other, others, fields)


def _matrices(
    reporter: Reporter,
    before: Path,
    after: Path,
    layer: str | None,
    sizes: list[tuple[int, ...]],
    sources: _Sources,
    options: dict[str, Any],
) -> int:
    """The verdict on a layer and its matrix, or on two matrices."""
    from convtool.cli.verify_matrix import verify_matrix_files
    from convtool.matrix.read import is_matrix_file

    one = None if is_matrix_file(before) else sources.open(before, reporter)
    fields, _ = sources.of_both(None if one is None else sources.of_model(one, reporter))
    if one is not None:
        check_used(fields, list(one.layers))
    document = verify_matrix_files(reporter, one or before, after, layer, sizes, fields, options)
    return exit_codes.OK if document["equivalent"] else exit_codes.NOT_EQUIVALENT


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # 'meta' has no numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device: torch cannot compute in float64 on {name!r} here ({reason})") from None
    return device


def split_names(text: str) -> list[str]:
    """'conv,flatten(7,7),head' as ['conv', 'flatten(7,7)', 'head']: at commas, but not at those in parentheses."""
    names, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names]


def _compare_tensors(reporter: Reporter, sides: _Sides, pairings: list[Pairing]) -> dict[str, Any]:
    """What became of every tensor that went into no fusion."""
    from convtool.core.tree import leaves
    from convtool.fusing.compare import differing_tensors

    fused = {
        name
        for pairing in pairings
        for lowered in leaves(pairing.before)
        if not lowered.origin
        for name in lowered.layer.tensor_names()
    }
    kept = [info for name, info in sides.before.infos.items() if name not in fused]
    with reporter.progress("comparing tensors", sum(info.nbytes for info in kept)) as advance:
        differing = differing_tensors(sides.before, sides.after, pairings, advance)
    return {"compared": len(kept), "differing": differing}


def _run(
    reporter: Reporter,
    pairings: list[Pairing],
    sides: _Sides,
    sizes: list[tuple[int, ...]],
    options: dict[str, Any],
) -> list[tuple[Pairing, EquivalenceReport]]:
    """Every pairing at every input size."""
    from convtool.core.tree import BASE
    from convtool.fusing.trials import trials

    checkpoints = {BASE: sides.before, **sides.others}
    runs = [trial for pairing in pairings for trial in trials(pairing, checkpoints, sides.after, sizes)]
    results = []
    with reporter.progress("verifying", len(runs), "share") as advance:
        for trial in runs:
            results.append((trial.pairing, trial.run(progress=advance, **options)))
    return results


def _whole_model(
    reporter: Reporter, sides: _Sides, sources: _Sources, model_input: str | None, seed: int
) -> dict[str, Any] | None:
    from convtool.cli.model import whole_model

    size = parse_input_size(model_input, "--model-input")
    return whole_model(sources.model, sources.model_args, size, sides.before, sides.after, seed, reporter)
