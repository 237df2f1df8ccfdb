"""`convtool verify`: do two checkpoints, or a layer and its matrix, or two matrices compute the same?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete, exit_codes
from convtool.cli.model import whole_text
from convtool.cli.options import GeometryFile, Json, Model, ModelArgs, NoMmap, Quiet, Root, With, parse_dtype
from convtool.cli.output import Reporter, table
from convtool.cli.run import run

if TYPE_CHECKING:
    import torch

    from convtool.checkpoint import Checkpoint
    from convtool.checkpoint.compare import Pairing
    from convtool.core.fields import FieldSource, FieldSources
    from convtool.core.tally import Region
    from convtool.core.verify import EquivalenceReport

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
KINDS = {"normal": "a random input", "zero": "an input of zeros", "constant": "an input of ones"}
MOST_NAMES = 20  # tensors named one by one before the rest is only counted


def command(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="The original checkpoint, or a matrix file.", show_default=False)
    ],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", help="The fused checkpoint, or a matrix file.", show_default=False)
    ],
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
    geometry: GeometryFile = None,
    model: Model = None,
    model_args: ModelArgs = None,
    model_input: Annotated[
        str | None,
        typer.Option(
            "--model-input",
            metavar="C,H,W",
            help="With --model: also run the whole model on inputs of that size, before and after.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="LAYER.FIELD=VALUE",
            help="A field of a layer, in both checkpoints; before:LAYER... or after:LAYER... for one. Repeatable.",
            show_default=False,
        ),
    ] = None,
    sources_given: With = None,
    root: Root = None,
    no_mmap: NoMmap = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Prove that AFTER computes what BEFORE does, up to the rounding that storing it must bring.

    Goes by the record that convtool leaves in AFTER: every fused layer is run against the layers it stands for, and
    every other tensor must be the same bit for bit; a matrix is held against its layer entry by entry. Exit code 0:
    equivalent, 1: not equivalent.

    There is no tolerance to choose: each output is held against a bound derived from the weights, the input and the
    dtype, and the largest ratio of error to bound is reported; at most 1 passes.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> int:
        import torch

        from convtool.checkpoint import is_flat, open_checkpoint
        from convtool.cli.model import model_fields, whole_model
        from convtool.cli.options import check_used, open_others, parse_input_size
        from convtool.cli.verify_matrix import verify_matrix_files
        from convtool.core.tree import BASE
        from convtool.errors import UsageError
        from convtool.matrix.read import is_matrix_file

        sizes = [size for text in input_size or () if (size := parse_input_size(text)) is not None]
        if model_input is not None and model is None:
            raise UsageError("--model-input: goes with --model")
        options: dict[str, Any] = {
            "trials": trials,
            "seed": seed,
            "computed_in": parse_dtype(computed_in) or torch.float64,
        }
        if is_matrix_file(after) or is_matrix_file(before):
            if rtol is not None or atol is not None or after_layers is not None or sources_given:
                raise UsageError("--rtol, --atol, --after and --with don't go with a matrix file")
            one = None if is_matrix_file(before) else open_checkpoint(before, root)
            from_model = None if one is None else model_fields(model, model_args, one, reporter)
            sources, _ = _sources(geometry, settings, from_model)
            if one is not None:
                check_used(sources, list(one.layers))
            document = verify_matrix_files(reporter, one or before, after, before_layers, sizes, sources, options)
            return exit_codes.OK if document["equivalent"] else exit_codes.NOT_EQUIVALENT
        if (before_layers is None) != (after_layers is None):
            raise UsageError("--before and --after go together: the chain in BEFORE and the one that stands for it")
        options |= {"exhaustive": exhaustive, "rtol": rtol, "atol": atol, "device": _device(device)}
        one = open_checkpoint(before, root, mapped=not no_mmap)
        other = open_checkpoint(after, None if is_flat(after) else root, mapped=not no_mmap)
        others = open_others(sources_given)
        from_model = model_fields(model, model_args, one, reporter)
        before_sources, after_sources = _sources(geometry, settings, from_model)
        known = [name for opened in (one, other, *others.values()) for name in opened.layers]
        check_used(before_sources, known)
        check_used(after_sources, known)
        if before_layers is not None and after_layers is not None:
            pairings = [_named(one, other, before_layers, after_layers, before_sources, after_sources)]
            tensors = None
        else:
            pairings, tensors = _recorded(reporter, one, other, before_sources, others)
        for assumed in _assumed(pairings):
            reporter.remark(f"assumed: {assumed}")
        results = _run(reporter, pairings, {BASE: one, **others}, other, sizes, options)
        if not results and not one.infos:
            raise UsageError("there is nothing to compare: no fusion and no tensor")
        for text in _hints(results, bool(sizes), computed_in):
            reporter.remark(text)
        whole = whole_model(model, model_args, parse_input_size(model_input), one, other, seed)
        equal = not (tensors and tensors["differing"]) and (whole is None or whole["equal"])
        document = {
            "before": str(before),
            "after": str(after),
            "equivalent": equal and all(report.equivalent for _, report in results),
            "statement": _statement([report for _, report in results], exhaustive)
            + ("" if sizes else _narrowed(results)),
            "exhaustive": exhaustive,
            "seed": seed,
            "trials": trials,
            "computed_in": computed_in or "float64",
            "tolerance": {"rtol": rtol, "atol": atol} if rtol is not None or atol is not None else "derived bound",
            "assumed": _assumed(pairings),
            "input_sizes": "given" if sizes else "chosen",
            "fusions": [_report(pairing, report) for pairing, report in results],
            "other_tensors": tensors,
            "whole_model": whole,
        }
        reporter.result(document, lambda: _print(reporter, document))
        return exit_codes.OK if document["equivalent"] else exit_codes.NOT_EQUIVALENT

    return run(reporter, body)


def _sources(
    geometry: Path | None, settings: list[str] | None, model: FieldSource | None
) -> tuple[FieldSources, FieldSources]:
    """Fields for BEFORE and for AFTER; a --set with before: or after: in front goes to one of them only."""
    from convtool.cli.options import field_sources

    both = settings or []
    first = [text.removeprefix("before:") for text in both if not text.startswith("after:")]
    second = [text.removeprefix("after:") for text in both if not text.startswith("before:")]
    return field_sources(geometry, first, {}, model), field_sources(geometry, second, {})


def _device(name: str) -> torch.device:
    import torch

    from convtool.errors import UsageError

    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device: torch cannot compute in float64 on {name!r} here ({reason})") from None
    return device


def _named(
    one: Checkpoint,
    other: Checkpoint,
    before: str,
    after: str,
    before_sources: FieldSources,
    after_sources: FieldSources,
) -> Pairing:
    from convtool.checkpoint.chain import lower_chain
    from convtool.checkpoint.compare import Pairing
    from convtool.core.tree import Chain

    first = lower_chain(one, split_names(before), before_sources)
    channels, axes = first[0].conv.in_channels, first[0].conv.spatial_axes
    second = lower_chain(other, split_names(after), after_sources, channels, axes)
    return Pairing(after, Chain(tuple(first)), Chain(tuple(second)))


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


def _recorded(
    reporter: Reporter, one: Checkpoint, other: Checkpoint, sources: FieldSources, others: dict[str, Checkpoint]
) -> tuple[list[Pairing], dict[str, Any]]:
    """The recorded fusions, and what became of every other tensor."""
    from convtool.checkpoint.compare import differing_tensors, recorded_pairings
    from convtool.core.tree import leaves

    pairings = recorded_pairings(one, other, sources, others)
    if not pairings:
        reporter.remark("AFTER records no fusion that BEFORE lacks; only their tensors were compared")
    fused = {
        name
        for pairing in pairings
        for lowered in leaves(pairing.before)
        if not lowered.origin
        for name in lowered.layer.tensor_names()
    }
    compared = len(one.infos.keys() - fused)
    return pairings, {"compared": compared, "differing": differing_tensors(one, other, pairings)}


def _run(
    reporter: Reporter,
    pairings: list[Pairing],
    checkpoints: dict[str, Checkpoint],
    after: Checkpoint,
    sizes: list[tuple[int, ...]],
    options: dict[str, Any],
) -> list[tuple[Pairing, EquivalenceReport]]:
    """Every pairing at every input size."""
    from convtool.checkpoint.proof import exact_tree, stored_tree
    from convtool.core.expression import in_channels
    from convtool.core.tree import BASE, leaves
    from convtool.core.verify import default_sizes, split_input_size, verify

    runs = []
    for pairing in pairings:
        chain = exact_tree(pairing.before, checkpoints)
        fused = stored_tree(pairing.after, {BASE: after})
        fixed = None if sizes else pairing.input_size()
        axes = next(leaves(chain)).spatial_axes
        chosen = [split_input_size(size, in_channels(chain), axes) for size in sizes]
        runs += [(pairing, chain, fused, size) for size in chosen or ([fixed] if fixed else default_sizes(chain))]
    results = []
    with reporter.progress("verifying", len(runs), "items") as advance:
        for pairing, chain, fused, size in runs:
            between = [dtype for name in pairing.dtypes if (dtype := parse_dtype(name)) is not None]
            results.append((pairing, verify(chain, fused, size, stored_between=between, **options)))
            advance(1)
    return results


def _assumed(pairings: list[Pairing]) -> list[str]:
    from convtool.core.tree import leaves

    found = [x.assumed for pairing in pairings for x in (*leaves(pairing.before), *leaves(pairing.after)) if x.assumed]
    return list(dict.fromkeys(found))


def _statement(reports: list[EquivalenceReport], exhaustive: bool) -> str:
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


def _hints(results: list[tuple[Pairing, EquivalenceReport]], sizes: bool, computed_in: str | None) -> list[str]:
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


def _narrowed(results: list[tuple[Pairing, EquivalenceReport]]) -> str:
    """What is said of one input size only, since the record knows of no other."""
    narrow = {pairing.name: report.input_size[1:] for pairing, report in results if pairing.input_size() is not None}
    if not narrow:
        return ""
    sizes = dict.fromkeys(",".join(map(str, size)) for size in narrow.values())
    which = "" if len(narrow) == len({pairing.name for pairing, _ in results}) else f"{', '.join(narrow)} "
    return f"; {which}at input size {' or '.join(sizes)} only, as the record says"


def _report(pairing: Pairing, report: EquivalenceReport) -> dict[str, Any]:
    from dataclasses import asdict

    from convtool.core.tree import leaves

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
    from dataclasses import asdict

    return asdict(region) | {"equal": region.equal} if region.positions else None


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
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
