"""`convtool fuse`: chains and sums of layers become single layers of a new checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convtool.cli.fuse_options import FuseOptions
from convtool.cli.fuse_text import describe, print_lines
from convtool.cli.options import (
    DryRun,
    Dtype,
    Force,
    SourceOptions,
    Speech,
    With,
    check_used,
    open_others,
    parse_dtype,
)
from convtool.cli.output import Reporter, table, tree_text
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.cli.written import write, written_document
from convtool.errors import RefusedError, UsageError

if TYPE_CHECKING:
    import torch

    from convtool.checkpoint import Checkpoint
    from convtool.core.verify import EquivalenceReport
    from convtool.fusing.fusion import PlannedLayer
    from convtool.fusing.recipe import PlannedFusion, Recipe
    from convtool.graph.planned import Plan
    from convtool.kinds.stated import FieldSources

NAME = "fuse"
USAGE = "CKPT LAYER LAYER... -o OUT"
EXAMPLES = """
convtool fuse resnet.safetensors layer1.0.conv1 layer1.0.bn1 -o fused.safetensors --set layer1.0.conv1.padding=1
convtool fuse net.pt reduce spread gather -o fused.pt --set gather.stride=2 --dry-run
# exact for inputs of that size is enough
convtool fuse net.pt a b -o out.pt --input-size 32,32
# layers without tensors are given by what they do
convtool fuse net.pt stem 'avg_pool(2)' mix -o out.pt
convtool fuse repvgg.pt --recipe repvgg -o deploy.pt

convtool fuse unet.safetensors --recipe lora-kohya --with lora=style.safetensors -o styled.safetensors

convtool fuse net.pt conv1 --normalize mean=.49,.46,.41 std=.23,.22,.23 --input-scale 1/255 -o raw.pt
"""


@grouped
def command(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="A .safetensors or torch (.pt, .pth, .bin) file.", show_default=False),
    ] = None,
    *,
    wanted: FuseOptions,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The new checkpoint.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    sources: SourceOptions,
    sources_given: With = None,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="List the recipes that ship with it.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Write what was fused without running it against its layers first.")
    ] = False,
    dry_run: DryRun = False,
    force: Force = False,
    speech: Speech,
) -> int:
    """Replace chains of linear layers by the one layer that computes the same, and write the checkpoint.

    Convolutions, batch norms and linear layers that follow each other with nothing in between become one; with a
    recipe, branches that are added do too. A fusion has to be exact for every input size, or for --input-size where
    that is given; otherwise it is refused, with the rows and columns that would differ and the ways out.
    """
    reporter = speech.reporter(NAME)

    def body() -> None:
        from convtool import __version__
        from convtool.checkpoint.edit import Edit
        from convtool.checkpoint.record import Record
        from convtool.checkpoint.write import check_output, plan_edited
        from convtool.core.tree import BASE
        from convtool.fusing.fusion import check_ties

        rounded = parse_dtype(dtype)
        if checkpoint is None:
            raise UsageError("expected CKPT, the checkpoint to fuse layers of")
        if out is None:
            raise UsageError("expected -o OUT, the new checkpoint")
        wanted.check(sources.model)
        recipe = wanted.find_recipe()
        opened = sources.open(checkpoint, reporter)
        checkpoints = {BASE: opened, **open_others(reporter, sources_given, mapped=not sources.no_mmap)}
        check_output(out, force=force or dry_run, source=opened)
        found = _find(reporter, wanted, recipe, checkpoints, sources)
        planned, left_alone = _plan(reporter, wanted, found, checkpoints, rounded)
        edits = [layer.edit for layer in planned]
        check_ties(opened, edits)
        edit = Edit.together(edits)
        history = opened.record or Record(__version__)
        record = history.appended(__version__, [layer.record for layer in planned])
        plan = plan_edited(opened, edit, out, record, force=force or dry_run)
        reports = [[] for _ in planned] if no_verify else _verified(reporter, planned, checkpoints)
        if not dry_run:
            write(reporter, plan)
        document = {
            **written_document(opened, edit, plan, dry_run=dry_run),
            "fusions": [describe(layer, one, found.size) for layer, one in zip(planned, reports, strict=True)],
            "left_alone": left_alone,
        }
        reporter.result(document, lambda: print_lines(reporter, document))

    def listing() -> None:
        others = (checkpoint, out, dtype, sources_given, no_verify, dry_run, force)
        if any(others) or wanted != FuseOptions() or sources != SourceOptions():
            raise UsageError("--list-recipes: lists what there is, and fuses nothing; nothing else goes with it")
        _list_recipes(reporter)

    return run(reporter, listing if list_recipes else body)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is to be fused, by name.

    Attributes:
        fields: where what is known of the layers comes from.
        size: of each fusion's input, where it was given and is the same for all.
        surveyed: whether the whole checkpoint was looked through, so that what is left alone is worth saying.
    """

    fusions: list[PlannedFusion]
    fields: FieldSources
    size: tuple[int, ...] | None
    surveyed: bool


def _find(
    reporter: Reporter,
    wanted: FuseOptions,
    recipe: Recipe | None,
    checkpoints: Mapping[str, Checkpoint],
    sources: SourceOptions,
) -> _Found:
    """The fusions that are wanted: by a plan of the model, by a recipe, or the one chain that was named."""
    from convtool.core.tree import BASE
    from convtool.fusing.lowering import full_name
    from convtool.fusing.named import by_recipe, named_chain, without_effect

    plan = _plan_model(reporter, wanted, checkpoints[BASE], sources) if wanted.auto else None
    known = sources.of_model(checkpoints[BASE], reporter) if plan is None else plan.geometry
    fields = sources.fields(known)
    check_used(fields, [full_name(layer, one) for one, opened in checkpoints.items() for layer in opened.layers])
    if plan is not None:
        return _Found(_planned(plan), fields, None, surveyed=True)  # each has an input size of its own
    if recipe is None:
        return _Found([named_chain(wanted.chain, wanted.name or "", checkpoints)], fields, wanted.size, surveyed=False)
    fields = fields.with_first(recipe.geometry)
    for pattern in without_effect(recipe, checkpoints):
        reporter.remark(f"{recipe.origin}: geometry: {pattern!r} fits no layer")
    strength = 1.0 if wanted.strength is None else wanted.strength
    fusions = by_recipe(recipe, checkpoints, fields.fields, strength)
    if wanted.size is not None and len(fusions) > 1:
        raise UsageError(
            f"--input-size: is the size of one input, and the recipe makes {len(fusions)} fusions; leave it out"
        )
    return _Found(fusions, fields, wanted.size, surveyed=True)


def _plan_model(reporter: Reporter, wanted: FuseOptions, opened: Checkpoint, sources: SourceOptions) -> Plan:
    from convtool.cli.model import plan_for

    assert sources.model is not None  # as `FuseOptions.check` has it
    plan = plan_for(
        opened,
        sources.model,
        sources.model_args,
        wanted.size,
        reporter,
        fixed_size=wanted.fixed_size,
        only_if_cheaper=wanted.only_if_cheaper,
        measure=wanted.measure,
    )
    if not plan.fusions:
        raise RefusedError("--auto: found nothing to fuse; `convtool plan` says what was left alone, and why")
    return plan


def _planned(plan: Plan) -> list[PlannedFusion]:
    from convtool.fusing.recipe import PlannedFusion
    from convtool.graph.judge import Exact

    pieces = [(one.name, one.piece) for one in plan.fusions]
    return [
        PlannedFusion(name, piece.tree, piece.input_size if piece.exact is Exact.THIS_SIZE else None)
        for name, piece in pieces
    ]


def _plan(
    reporter: Reporter,
    wanted: FuseOptions,
    found: _Found,
    checkpoints: Mapping[str, Checkpoint],
    dtype: torch.dtype | None,
) -> tuple[list[PlannedLayer], list[str]]:
    """Every fusion as a value, before anything is written; and what was left alone, in words."""
    from convtool.core.tree import BASE
    from convtool.fusing.fusion import plan_layer
    from convtool.fusing.lowering import lower_tree
    from convtool.fusing.remarks import assumed, left_alone

    trees = [lower_tree(checkpoints, one.tree, found.fields, one.input_size or found.size) for one in found.fusions]
    # Before anything is refused: what was assumed may be why.
    for text in assumed(trees):
        reporter.remark(f"assumed: {text}")
    alone = left_alone(checkpoints, [one.tree for one in found.fusions]) if found.surveyed else []
    for text in alone:
        reporter.remark(f"left alone: {text}")
    planned = [
        plan_layer(
            checkpoints[BASE],
            one.name,
            tree,
            input_size=one.input_size or found.size,
            allow_border=wanted.allow_border,
            bias_map=wanted.bias_map,
            dtype=dtype,
        )
        for one, tree in zip(found.fusions, trees, strict=True)
    ]
    kept, dear = _by_cost(reporter, planned, found.size, wanted.only_if_cheaper and not wanted.measure)
    return kept, alone + (dear if wanted.only_if_cheaper else [])


def _by_cost(
    reporter: Reporter, planned: list[PlannedLayer], size: tuple[int, ...] | None, only_if_cheaper: bool
) -> tuple[list[PlannedLayer], list[str]]:
    """The fusions to carry out, and a line for each that takes more multiply-adds than its layers apart."""
    from convtool.fusing.remarks import dearer

    found = dearer(planned, size)
    dear = [id(layer) for layer, _ in found]
    kept = [layer for layer in planned if not only_if_cheaper or id(layer) not in dear]
    said = [f"{tree_text(layer.record.to_json()['sources'])}: fused it takes {times}" for layer, times in found]
    if not kept:
        raise RefusedError(f"nothing is cheaper fused: {said[0]}")
    lines = [f"left alone: {text}" if only_if_cheaper else f"slower: {text}" for text in said]
    for line in lines:
        reporter.remark(line)
    return kept, lines


def _list_recipes(reporter: Reporter) -> None:
    from convtool.recipes import shipped

    found = shipped()
    document = {"recipes": [{"name": name, "about": recipe.about} for name, recipe in found.items()]}
    reporter.result(document, lambda: table(("recipe", "fuses"), [(name, r.about) for name, r in found.items()]))


def _verified(
    reporter: Reporter, planned: Sequence[PlannedLayer], checkpoints: Mapping[str, Checkpoint]
) -> list[list[EquivalenceReport]]:
    """Each fusion run against the layers that it stands for, before a file takes its name."""
    from convtool.fusing.proof import check_planned

    found = []
    with reporter.progress("verifying", len(planned), "share") as advance:
        for layer in planned:
            found.append(check_planned(layer, checkpoints, advance))
    return found
