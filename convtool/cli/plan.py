"""`convtool plan`: what could be fused in a whole model, where that is exact, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli.options import (
    STREAM,
    DryRun,
    FixedSize,
    Force,
    Measure,
    ModelArgs,
    Root,
    Speech,
    open_reporting,
    parse_input_size,
)
from convtool.cli.output import Reporter, emit, table
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.core.tree import LayerRef, Tree
    from convtool.graph.planned import Plan, PlannedPiece

NAME = "plan"
USAGE = "[CKPT] --model CODE --input-size C,H,W"
EXAMPLES = """
convtool plan resnet.safetensors --model torchvision.models:resnet50 --input-size 3,224,224
convtool plan net.pt --model net.py:Net --model-args '{"width": 32}' --input-size 3,64,64 -o plan.toml
convtool fuse net.pt --recipe plan.toml -o fused.pt
convtool plan net.pt --model net.py:Net --input-size 3,64,64 -o - | convtool fuse net.pt --recipe - -o fused.pt
# a folder as Hugging Face lays it out
convtool plan folder/model.safetensors --model folder --input-size 3,224,224 --only-if-cheaper
"""

ModelInput = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="C,H,W",
        help="Size of the model's input, the channels in front; without the batch.",
        show_default=False,
    ),
]


@grouped
def command(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CKPT]",
            help="The model's checkpoint, whose names and biases then count.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="CODE",
            help="The model's code: pkg.mod:callable, file.py:callable, or a Hugging Face folder. This runs that code,"
            " your own, and nothing else in convtool does. Required.",
            show_default=False,
        ),
    ] = None,
    model_args: ModelArgs = None,
    input_size: ModelInput = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Write the plan as a recipe (.toml; - for stdout).", show_default=False
        ),
    ] = None,
    fixed_size: FixedSize = False,
    only_if_cheaper: Annotated[
        bool,
        typer.Option("--only-if-cheaper", help="Cut each chain so that it takes the fewest multiply-adds."),
    ] = False,
    measure: Measure = False,
    root: Root = None,
    dry_run: DryRun = False,
    force: Force = False,
    speech: Speech,
) -> int:
    """Find every exact fusion in a model, and what each saves.

    One run of the model is followed, in which nothing is computed: convolutions, batch norms, linear layers and scales
    with nothing in between, branches that are added, and what comes behind a flatten. What is exact for every input
    size is listed, and written as a recipe with -o; what was left alone, and why, is listed after it.
    """
    reporter = speech.reporter(NAME)

    def body() -> None:
        from convtool.cli.model import plan_for
        from convtool.formats.atomic import check_target, replacing

        size = parse_input_size(input_size)
        if model is None:
            raise UsageError("expected --model, the code that builds the model: pkg.mod:callable or file.py:callable")
        piped = out is not None and str(out) == STREAM
        if piped and reporter.as_json:
            raise UsageError("--out -: stdout holds the recipe or the document of --json; name a file for one of them")
        if out is not None and not piped:
            check_target(out, force=force or dry_run)
        opened = None if checkpoint is None else open_reporting(reporter, checkpoint, root)
        found = plan_for(
            opened,
            model,
            model_args,
            size,
            reporter,
            fixed_size=fixed_size,
            only_if_cheaper=only_if_cheaper,
            measure=measure,
        )
        recipe = found.recipe().encode() if out is not None and found.fusions else None
        written = False
        if out is not None and recipe is not None and not piped and not dry_run:
            with replacing(out, force=force) as file:
                file.write(recipe)
            written = True
        document = describe(found, None if checkpoint is None else str(checkpoint)) | {
            "out": None if recipe is None else str(out),
            "written": written,
            "bytes": None if recipe is None else len(recipe),
        }
        reporter.result(document, lambda: emit(found.recipe(), end="") if piped else _print(reporter, document, found))

    return run(reporter, body)


def describe(plan: Plan, checkpoint: str | None) -> dict[str, Any]:
    """A plan as a JSON document."""
    return {
        "source": checkpoint,
        "traced_by": plan.tracer,
        "remarks": list(plan.remarks),
        "fusions": [_describe(one) for one in plan.fusions],
        "left_alone": [{"layers": list(one.layers), "reason": one.reason} for one in plan.left_alone],
        "total": {"before": _cost(plan.total), "after": _cost(plan.total_after)},
    }


def _describe(one: PlannedPiece) -> dict[str, Any]:
    from convtool.core.tree import leaves

    piece = one.piece
    return {
        "name": one.name,
        "layers": [leaf.name for leaf in leaves(piece.tree)],
        "sources": _tree(piece.tree),
        "exact": piece.exact.value,
        "input_size": list(piece.input_size),
        "before": _cost(piece.before),
        "after": _cost(piece.after),
        "seconds": None if one.seconds is None else {"before": one.seconds[0], "after": one.seconds[1]},
    }


def _cost(cost: Any) -> dict[str, int]:
    return {"parameters": cost.parameters, "multiply_adds": cost.multiply_adds}


def _tree(tree: Tree[LayerRef]) -> dict[str, Any]:
    from convtool.core.tree import Chain, Sum

    if isinstance(tree, Chain):
        return {"chain": [_tree(part) for part in tree.parts]}
    if isinstance(tree, Sum):
        return {"sum": [_tree(part) for part in tree.parts]}
    return {"name": tree.name}


def _print(reporter: Reporter, document: dict[str, Any], plan: Plan) -> None:
    from convtool.graph.planned import tree_in_short

    measured = any(fusion["seconds"] for fusion in document["fusions"])
    columns = ["layers", "exact", "parameters", "multiply-adds", *(["ms"] if measured else [])]
    rows = [
        [
            tree_in_short(one.piece.tree),
            fusion["exact"].removeprefix("at "),
            _change(fusion["before"]["parameters"], fusion["after"]["parameters"]),
            _change(fusion["before"]["multiply_adds"], fusion["after"]["multiply_adds"]),
            *([_milliseconds(fusion["seconds"])] if measured else []),
        ]
        for one, fusion in zip(plan.fusions, document["fusions"], strict=True)
    ]
    if rows:
        table(columns, rows, right=("parameters", "multiply-adds", "ms"))
    for names, reason in _grouped(document["left_alone"]):
        reporter.line(f"left alone: {names}: {reason}")
    before, after = document["total"]["before"], document["total"]["after"]
    count = len(rows)
    reporter.line(
        f"{count} fusion{'' if count == 1 else 's'}, data flow by {document['traced_by']}; the whole model:"
        f" {_change(before['parameters'], after['parameters'])} parameters,"
        f" {_change(before['multiply_adds'], after['multiply_adds'])} multiply-adds"
    )
    if document["written"]:
        reporter.line(f"wrote {document['out']}")
    elif document["out"]:
        reporter.line(f"would write {document['out']}, {document['bytes']} bytes")


def _grouped(left_alone: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Layers that are left alone for one reason, in one line."""
    from convtool.graph.planned import names_in_short

    grouped: dict[str, list[str]] = {}
    for one in left_alone:
        grouped.setdefault(one["reason"], []).append(names_in_short(one["layers"]))
    return [(f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}", why) for why, names in grouped.items()]


def _milliseconds(seconds: dict[str, float] | None) -> str:
    return "" if seconds is None else f"{seconds['before'] * 1e3:.3g} -> {seconds['after'] * 1e3:.3g}"


def _change(before: int, after: int) -> str:
    return f"{_count(before)} -> {_count(after)}" if before != after else _count(before)


def _count(number: int) -> str:
    """Up to 99999 in full, then with three digits and a unit."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 100 * max(size, 1000) or (number >= size and number >= 10**6):
            return f"{number / size:.3g} {unit}"
    return str(number)
