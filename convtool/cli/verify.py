"""`convtool verify`: do two checkpoints compute the same?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete, exit_codes
from convtool.cli.options import GeometryFile, Json, Model, ModelArgs, Quiet, Root, With, parse_dtype
from convtool.cli.output import Reporter, table
from convtool.cli.run import run

if TYPE_CHECKING:
    from convtool.checkpoint.compare import Pairing
    from convtool.core.fields import FieldSource
    from convtool.core.verify import EquivalenceReport

NAME = "verify"
USAGE = "BEFORE AFTER"
EXAMPLES = """
convtool verify resnet.safetensors fused.safetensors --input-size 64,56,56
convtool verify net.safetensors fused.safetensors --exhaustive --json
# fused by another program, which left no record
convtool verify net.pt other.pt --before conv1,bn1 --after conv1 --input-size 32,32 --set conv1.padding=1
"""


def command(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="The original checkpoint.", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The fused checkpoint.", show_default=False)],
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
            help="The chain in BEFORE, where AFTER has no record.",
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
    geometry: GeometryFile = None,
    model: Model = None,
    model_args: ModelArgs = None,
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Prove that AFTER computes what BEFORE does, up to the rounding that storing it must bring.

    Goes by the record that `convtool fuse` leaves in AFTER: every fused layer is run against the layers it stands for,
    and every other tensor must be the same bit for bit. Exit code 0: equivalent, 1: not equivalent.

    There is no tolerance to choose: each output is held against a bound derived from the weights, the input and the
    dtype, and the largest ratio of error to bound is reported; at most 1 passes.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> int:
        import torch

        from convtool.checkpoint import open_checkpoint
        from convtool.checkpoint.compare import differing_tensors, recorded_pairings
        from convtool.cli.model import model_fields
        from convtool.cli.options import check_used, open_others, parse_input_size
        from convtool.core.expression import in_channels
        from convtool.core.tree import leaves, map_leaves
        from convtool.core.verify import default_sizes, split_input_size, verify
        from convtool.errors import UsageError

        precision = parse_dtype(computed_in) or torch.float64
        sizes = [size for text in input_size or () if (size := parse_input_size(text)) is not None]
        if (before_layers is None) != (after_layers is None):
            raise UsageError("--before and --after go together: the chain in BEFORE and the one that stands for it")
        one, other = open_checkpoint(before, root), open_checkpoint(after, root)
        others = open_others(sources_given)
        from_model = model_fields(model, model_args, one, reporter)
        before_sources, after_sources = _sources(geometry, settings, from_model)
        known = [name for opened in (one, other, *others.values()) for name in opened.layers]
        check_used(before_sources, known)
        check_used(after_sources, known)
        changed: dict[str, str] = {}
        if before_layers is not None and after_layers is not None:
            pairings = [_named(one, other, before_layers, after_layers, before_sources, after_sources)]
        else:
            pairings = recorded_pairings(one, other, before_sources, others)
            changed = differing_tensors(one, other, pairings)
            if not pairings:
                reporter.remark("AFTER records no fusion that BEFORE lacks; only their tensors were compared")
        for assumed in _assumed(pairings):
            reporter.remark(f"assumed: {assumed}")
        results = []
        for pairing in pairings:
            chain, fused = (map_leaves(lambda x: x.conv, tree) for tree in (pairing.before, pairing.after))
            first = next(leaves(chain))
            fixed = pairing.fusion.input_size if pairing.fusion else None
            chosen = [split_input_size(size, in_channels(chain), first.spatial_axes) for size in sizes] or (
                [fixed] if fixed else default_sizes(chain)
            )
            results += [
                (
                    pairing,
                    verify(
                        chain,
                        fused,
                        size,
                        trials=trials,
                        seed=seed,
                        exhaustive=exhaustive,
                        computed_in=precision,
                        rtol=rtol,
                        atol=atol,
                    ),
                )
                for size in chosen
            ]
        if not results and not one.infos:
            raise UsageError("there is nothing to compare: no fusion and no tensor")
        equivalent = not changed and all(report.equivalent for _, report in results)
        document: dict[str, Any] = {
            "before": str(before),
            "after": str(after),
            "equivalent": equivalent,
            "exhaustive": exhaustive,
            "seed": seed,
            "tolerance": {"rtol": rtol, "atol": atol} if rtol is not None or atol is not None else "derived bound",
            "assumed": _assumed(pairings),
            "input_sizes": "given" if sizes else "chosen",
            "fusions": [_report(pairing, report) for pairing, report in results],
            "other_tensors": None
            if before_layers is not None
            else {
                "compared": len(one.infos)
                - sum(len(x.layer.tensors) for p in pairings for x in leaves(p.before) if not x.origin),
                "differing": changed,
            },
        }
        reporter.result(document, lambda: _print(reporter, document))
        return exit_codes.OK if equivalent else exit_codes.NOT_EQUIVALENT

    return run(reporter, body)


def _sources(geometry: Path | None, settings: list[str] | None, model: FieldSource | None) -> tuple[Any, Any]:
    """Fields for BEFORE and for AFTER; a --set with before: or after: in front goes to one of them only."""
    from convtool.cli.options import field_sources

    both = settings or []
    first = [text.removeprefix("before:") for text in both if not text.startswith("after:")]
    second = [text.removeprefix("after:") for text in both if not text.startswith("before:")]
    return field_sources(geometry, first, {}, model), field_sources(geometry, second, {})


def _named(one: Any, other: Any, before: str, after: str, before_sources: Any, after_sources: Any) -> Pairing:
    from convtool.checkpoint.chain import lower_chain
    from convtool.checkpoint.compare import Pairing
    from convtool.core.tree import Chain

    first = lower_chain(one, before.split(","), before_sources)
    second = lower_chain(other, after.split(","), after_sources, first[0].conv.in_channels, first[0].conv.spatial_axes)
    return Pairing(after, Chain(tuple(first)), Chain(tuple(second)), None)


def _assumed(pairings: list[Pairing]) -> list[str]:
    from convtool.core.tree import leaves

    found = [x.assumed for pairing in pairings for x in (*leaves(pairing.before), *leaves(pairing.after)) if x.assumed]
    return list(dict.fromkeys(found))


def _report(pairing: Pairing, report: EquivalenceReport) -> dict[str, Any]:
    from dataclasses import asdict

    from convtool.core.tree import leaves

    return {
        "name": pairing.name,
        "before": [x.layer.name for x in leaves(pairing.before)],
        "after": [x.layer.name for x in leaves(pairing.after)],
        "equivalent": report.equivalent,
        "ratio": report.ratio,
        "input_size": list(report.input_size),
        "output_size": list(report.output_size),
        "dtype": report.dtype,
        "inputs": report.inputs,
        "interior": asdict(report.interior) | {"equal": report.interior.equal},
        "rim": (asdict(report.rim) | {"equal": report.rim.equal}) if report.rim.positions else None,
    }


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    if document["fusions"]:
        rows = [
            (
                " + ".join(part["before"]) + " = " + " + ".join(part["after"]),
                "x".join(map(str, part["input_size"])),
                _region(part["interior"]),
                _region(part["rim"]),
                "equivalent" if part["equivalent"] else "NOT equivalent",
            )
            for part in document["fusions"]
        ]
        table(("layers", "input", "interior", "rim", "verdict"), rows)
    for part in document["fusions"]:
        for name in ("interior", "rim"):
            region = part[name]
            if region and region["elements"] and not region["equal"]:
                channel, *position = region["where"]
                reporter.line(
                    f"{part['name']}, {name}: {region['differing']} of {region['positions']} output positions differ;"
                    f" worst at channel {channel}, position {','.join(map(str, position)) or '0'}:"
                    f" error {region['error']:.3g}, bound {region['bound']:.3g};"
                    f" relative to the largest output {region['relative_error']:.3g}"
                )
    others = document["other_tensors"]
    if others is not None:
        for name, what in list(others["differing"].items())[:20]:
            reporter.line(f"{name}: {what}, and no fusion accounts for it")
        reporter.line(
            f"{others['compared']} other tensors: "
            + (f"{len(others['differing'])} differ" if others["differing"] else "bit for bit the same")
        )
    proof = ", every basis vector run: this holds for all inputs of these sizes" if document["exhaustive"] else ""
    reporter.line(f"equivalent{proof}" if document["equivalent"] else "NOT equivalent")


def _region(region: dict[str, Any] | None) -> str:
    if region is None or not region["elements"]:
        return "-"
    return f"{'equal' if region['equal'] else 'differs'}, error/bound {region['ratio']:.3g}"
