"""`convtool fuse`: chains and sums of layers become single layers of a new checkpoint."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.options import (
    Dtype,
    Force,
    GeometryFile,
    InputSize,
    Json,
    Model,
    ModelArgs,
    NoMmap,
    Quiet,
    Root,
    Settings,
    With,
    parse_dtype,
    parse_input_size,
)
from convtool.cli.output import Reporter, human_bytes, tree_text
from convtool.cli.plan import FixedSize, Measure
from convtool.cli.run import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from convtool.checkpoint import Checkpoint
    from convtool.checkpoint.fusion import PlannedLayer
    from convtool.core.tree import LayerRef, Tree
    from convtool.core.verify import EquivalenceReport
    from convtool.model.plan import Plan
    from convtool.recipe import Known, PlannedFusion, Recipe

NAME = "fuse"
MOST_LINES = 3  # layers named one by one before the rest is only counted
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


def command(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="A .safetensors or torch (.pt, .pth, .bin) file.", show_default=False),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LAYER LAYER...",
            help="The chain, first to last; also identity(), scale(X), pad(P), avg_pool(K; stride=S; padding=P),"
            " upsample(N), and flatten(H,W) before a linear layer; a scale per channel by its tensor's full name.",
            show_default=False,
            autocompletion=complete.layers,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The new checkpoint.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the fused layer is called; the first layer's name by default."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help="Fuse by a recipe instead of LAYERs; - for one on stdin.",
            show_default=False,
            autocompletion=complete.recipes,
        ),
    ] = None,
    normalize: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--normalize",
            metavar="mean=M,M,M std=S,S,S",
            help="Fold (x - mean) / std of the input into the first layer.",
            show_default=False,
        ),
    ] = None,
    input_scale: Annotated[
        str | None,
        typer.Option(
            "--input-scale",
            metavar="X",
            help="Fold x * X, such as 1/255, into the first layer; before --normalize.",
            show_default=False,
        ),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="List the recipes that ship with it.")] = False,
    input_size: InputSize = None,
    allow_border: Annotated[
        bool, typer.Option("--allow-border", help="Fuse even where outputs near the border would differ.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Write what was fused without running it against its layers first.")
    ] = False,
    bias_map: Annotated[
        bool,
        typer.Option(
            "--bias-map",
            help="Where padding hides a bias, store one for each output (NAME.bias_map): exact at --input-size.",
        ),
    ] = False,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Fuse what `convtool plan` finds; with --model, and --input-size of its input."),
    ] = False,
    fixed_size: FixedSize = False,
    measure: Measure = False,
    only_if_cheaper: Annotated[
        bool, typer.Option("--only-if-cheaper", help="Leave alone what would take more multiply-adds fused.")
    ] = False,
    dtype: Dtype = None,
    geometry: GeometryFile = None,
    model: Model = None,
    model_args: ModelArgs = None,
    settings: Settings = None,
    sources_given: With = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", metavar="X", help="How much a LoRA recipe adds: X * alpha / rank.", show_default=False
        ),
    ] = None,
    root: Root = None,
    no_mmap: NoMmap = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Replace chains of linear layers by the one layer that computes the same, and write the checkpoint.

    Convolutions, batch norms and linear layers that follow each other with nothing in between become one; with a
    recipe, branches that are added do too. A fusion has to be exact for every input size, or for --input-size where
    that is given; otherwise it is refused, with the rows and columns that would differ and the ways out.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> None:
        from convtool.checkpoint import open_checkpoint
        from convtool.checkpoint.chain import full_name
        from convtool.checkpoint.edit import Edit
        from convtool.checkpoint.fusion import check_ties, lower_for, plan_layer
        from convtool.checkpoint.write import check_output, write_edited
        from convtool.cli.model import model_fields, plan_for
        from convtool.cli.options import check_used, field_sources, open_others
        from convtool.core.tree import BASE
        from convtool.errors import UsageError

        rounded, size = parse_dtype(dtype), parse_input_size(input_size)
        before = _input_layers(normalize, input_scale)
        if checkpoint is None:
            raise UsageError("expected CKPT, the checkpoint to fuse layers of")
        if out is None:
            raise UsageError("expected -o OUT, the new checkpoint")
        found = None if recipe is None else _find_recipe(recipe)
        chain = [*before, *(layers or ())]
        if found is None and not auto and (len(chain) < 2 or not layers):
            raise UsageError("expected two layers or more, first to last, a --recipe, or --auto with --model")
        if auto and (found is not None or chain or name or model is None or allow_border or bias_map):
            raise UsageError("--auto: fuses what is exact in a --model; no LAYERs, --recipe or --allow-border with it")
        if (fixed_size or measure) and not auto:
            raise UsageError(f"{'--fixed-size' if fixed_size else '--measure'}: goes with --auto")
        if found is not None and (chain or name):
            raise UsageError("--recipe names the layers; LAYERs, --name and --normalize don't go with it")
        if strength is not None and (found is None or not isfinite(strength)):
            raise UsageError("--strength: expected a number, and a --recipe that adds a LoRA")
        if bias_map and (allow_border or size is None):
            raise UsageError("--bias-map: is exact at one size; give --input-size, and not --allow-border")
        opened = open_checkpoint(checkpoint, root, mapped=not no_mmap)
        checkpoints = {BASE: opened, **open_others(sources_given)}
        check_output(out, force=force or dry_run, source=opened)
        plan = None
        if auto and model is not None:
            plan = plan_for(
                opened,
                model,
                model_args,
                size,
                reporter,
                fixed_size=fixed_size,
                only_if_cheaper=only_if_cheaper,
                measure=measure,
            )
            size = None  # that of the model's input; each fusion has its own
        known = model_fields(model, model_args, opened, reporter) if plan is None else plan.geometry
        sources = field_sources(geometry, settings, {}, known)
        check_used(sources, [full_name(layer, one) for one, other in checkpoints.items() for layer in other.layers])
        if found is not None:
            sources = sources.with_first(found.geometry)
            for pattern in _without_effect(found, checkpoints):
                reporter.remark(f"{found.origin}: geometry: {pattern!r} fits no layer")
        named = (
            _planned(plan)
            if plan
            else _fusions(found, chain, name or "", checkpoints, sources.fields, 1.0 if strength is None else strength)
        )
        if size is not None and len(named) > 1:
            raise UsageError(
                f"--input-size: is the size of one input, and the recipe makes {len(named)} fusions; leave it out"
            )
        fusions = [(one.name, lower_for(checkpoints, one.tree, sources, one.input_size or size)) for one in named]
        # Before anything is refused: what was assumed may be why.
        for text in _assumed(tree for _, tree in fusions):
            reporter.remark(f"assumed: {text}")
        alone = _left_alone(checkpoints, [one.tree for one in named]) if found is not None or plan else []
        for text in alone:
            reporter.remark(f"left alone: {text}")
        planned = [
            plan_layer(
                opened,
                fused,
                tree,
                input_size=one.input_size or size,
                allow_border=allow_border,
                bias_map=bias_map,
                dtype=rounded,
            )
            for one, (fused, tree) in zip(named, fusions, strict=True)
        ]
        planned, dearer = _by_cost(planned, size, only_if_cheaper and not measure)
        for text in dearer:
            reporter.remark(text)
        edits = [layer.edit for layer in planned]
        check_ties(opened, edits)
        edit = Edit.together(edits)
        order = edit.order(opened.infos)  # finds a name that is taken before anything is written
        reports = [[] for _ in planned] if no_verify else _verified(reporter, planned, checkpoints)
        if not dry_run:
            from convtool import __version__
            from convtool.checkpoint.record import Record

            history = opened.record or Record(__version__)
            record = history.appended(__version__, [layer.record for layer in planned])
            write_edited(opened, edit, out, record, force=force)
        document = {
            "source": str(opened.path),
            "out": str(out),
            "written": not dry_run,
            "tensors": len(order),
            "bytes": sum(opened.infos[key].nbytes if new is None else new.nbytes for key, new in order),
            "fusions": [_describe(layer, size) | _proof(found) for layer, found in zip(planned, reports, strict=True)],
            "left_alone": alone + (dearer if only_if_cheaper else []),
        }
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, (lambda: _list_recipes(reporter)) if list_recipes else body)


def _input_layers(normalize: tuple[str, str] | None, input_scale: str | None) -> list[str]:
    """--normalize and --input-scale as the layer that they are, in front of the chain."""
    from convtool.errors import UsageError

    arguments: list[str] = []
    for text in normalize or ():
        key, equals, value = text.partition("=")
        if key not in ("mean", "std") or not equals or any(one.startswith(f"{key}=") for one in arguments):
            raise UsageError(f"--normalize: expected mean=M,M,M std=S,S,S, got {' '.join(normalize or ())!r}")
        arguments.append(f"{key}={value}")
    if input_scale is not None:
        arguments.append(f"scale={input_scale}")
    return [f"normalize({'; '.join(arguments)})"] if arguments else []


def _find_recipe(text: str) -> Recipe:
    """A recipe by its name, or by the path of its file."""
    from convtool.cli.options import STREAM, read_toml
    from convtool.errors import UsageError, did_you_mean
    from convtool.recipe import parse_recipe
    from convtool.recipes import shipped

    known = shipped()
    if text in known:
        return known[text]
    if not text.endswith(".toml") and text != STREAM:
        near = did_you_mean(text, known, f"; expected one of {', '.join(known)}, or a .toml file")
        raise UsageError(f"--recipe: no recipe {text!r}{near}")
    return parse_recipe(read_toml(Path(text)), text)


def _fusions(
    found: Recipe | None,
    layers: list[str],
    name: str,
    checkpoints: Mapping[str, Checkpoint],
    fields: Any,
    strength: float,
) -> list[PlannedFusion]:
    from convtool.checkpoint.fusion import check_nothing_missed
    from convtool.core.tree import Chain, LayerRef
    from convtool.recipe import PlannedFusion, resolve

    if found is None:
        return [PlannedFusion(name, Chain(tuple(_layer_ref(layer, checkpoints, LayerRef) for layer in layers)))]
    asked: set[tuple[str, str]] = set()
    planned = resolve(found, replace(_known(checkpoints, fields, asked), strength=strength))
    check_nothing_missed(checkpoints, [one.tree for one in planned], asked)
    return planned


def _without_effect(found: Recipe, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Patterns of a user's recipe that state geometry of no layer; those that ship are for many networks."""
    from convtool.checkpoint.chain import full_name
    from convtool.recipes import shipped

    if found.origin in {recipe.origin for recipe in shipped().values()}:
        return []
    layers = [full_name(layer, one) for one, opened in checkpoints.items() for layer in opened.layers]
    return [text for text in found.geometry.tables if not any(found.geometry.matches(text, name) for name in layers)]


def _planned(plan: Plan) -> list[PlannedFusion]:
    from convtool.errors import RefusedError
    from convtool.model.judge import Exact
    from convtool.recipe import PlannedFusion

    if not plan.fusions:
        raise RefusedError("--auto: found nothing to fuse; `convtool plan` says what was left alone, and why")
    return [
        PlannedFusion(one.name, one.piece.tree, one.piece.input_size if one.piece.exact is Exact.THIS_SIZE else None)
        for one in plan.fusions
    ]


def _known(checkpoints: Mapping[str, Checkpoint], fields: Any, asked: set[tuple[str, str]]) -> Known:
    """What recipes are resolved against; the tensors whose numbers they ask for are added to `asked`."""
    from convtool.core.tree import BASE
    from convtool.errors import InputError
    from convtool.recipe import Known, LayerFacts

    def number(source: str, name: str) -> float | None:
        asked.add((source, name))
        info = checkpoints[source].infos.get(name) if source in checkpoints else None
        if info is None or prod(info.shape) != 1:
            return None
        value = float(checkpoints[source].tensor(name))
        if not isfinite(value):
            raise InputError(f"{checkpoints[source].path}: {name}: holds {value}; nothing exact can be said of it")
        return value

    return Known(
        {
            source: {
                layer.name: LayerFacts(layer.kind, layer.tensors["weight"].shape if "weight" in layer.tensors else ())
                for layer in opened.layers.values()
            }
            for source, opened in checkpoints.items()
        },
        number,
        fields,
        ordered=_keeps_order(checkpoints[BASE]),
    )


def _keeps_order(checkpoint: Checkpoint) -> bool:
    """Whether a file has its tensors in the model's order: not where they are sorted, as in safetensors files."""
    weights: dict[str, list[str]] = {}
    for info in checkpoint.infos.values():
        if info.name.endswith("weight"):
            weights.setdefault(info.dtype, []).append(info.name)
    return checkpoint.format.startswith("torch") and any(names != sorted(names) for names in weights.values())


def _assumed(trees: Iterable[Any]) -> list[str]:
    """What nobody stated, in words; said once where it is the same of many layers."""
    from convtool.checkpoint.fusion import assumptions

    layers: dict[str, list[str]] = {}
    for text in dict.fromkeys(text for tree in trees for text in assumptions(tree)):
        layer, _, what = text.rpartition(": ")
        layers.setdefault(what, []).append(layer)
    return [line for what, names in layers.items() for line in _one_or_many(names, what)]


def _one_or_many(names: list[str], what: str) -> list[str]:
    if len(names) <= MOST_LINES:
        return [f"{name}: {what}" for name in names]
    return [f"{', '.join(names[:MOST_LINES])} and {len(names) - MOST_LINES} more: {what}"]


def _left_alone(checkpoints: Mapping[str, Checkpoint], trees: Sequence[Tree[LayerRef]]) -> list[str]:
    """What a recipe might have been expected to take and didn't: batch norms, and layers of the other checkpoints."""
    from convtool.checkpoint.chain import full_name
    from convtool.core.tree import BASE, leaves

    used = {(ref.source, ref.name) for tree in trees for ref in leaves(tree)}
    around = {(source, name.rpartition(".")[0]) for source, name in used if source}  # hold an alpha, say
    lines = []
    for source, opened in checkpoints.items():
        names = [
            full_name(layer.name, source)
            for layer in opened.layers.values()
            if (layer.kind == "batch_norm" or source != BASE) and (source, layer.name) not in used | around
        ]
        kind = "batch norm" if source == BASE else f"layer of {source}"
        if names:
            more = f" and {len(names) - MOST_LINES} more" if len(names) > MOST_LINES else ""
            plural = kind.replace("layer", "layers") if source else f"{kind}s"
            lines.append(f"{len(names)} {kind if len(names) == 1 else plural}: {', '.join(names[:MOST_LINES])}{more}")
    return lines


def _by_cost(
    planned: list[PlannedLayer], size: tuple[int, ...] | None, only_if_cheaper: bool
) -> tuple[list[PlannedLayer], list[str]]:
    """The fusions to carry out, and a line for each that takes more multiply-adds than its layers apart."""
    from convtool.errors import RefusedError

    kept, lines = [], []
    for layer in planned:
        before, after = layer.multiply_adds(layer.fusion.verdict.input_size or size)
        if after <= before:
            kept.append(layer)
            continue
        what = f"{tree_text(layer.record.to_json()['sources'])}: fused it takes {_times(after, before)}"
        lines.append(f"left alone: {what}" if only_if_cheaper else f"slower: {what}")
        kept += [] if only_if_cheaper else [layer]
    if not kept:
        raise RefusedError(f"nothing is cheaper fused: {lines[0].partition(': ')[2]}")
    return kept, lines


def _times(after: float, before: float) -> str:
    return f"{after / before:.3g} times the multiply-adds" if before else "multiply-adds, and apart none"


def _layer_ref(text: str, checkpoints: Mapping[str, Checkpoint], make: Any) -> Any:
    source, colon, layer = text.partition(":")
    return make(layer, source) if colon and source in checkpoints and "(" not in source else make(text)


def _list_recipes(reporter: Reporter) -> None:
    from convtool.cli.output import table
    from convtool.recipes import shipped

    found = shipped()
    document = {"recipes": [{"name": name, "about": recipe.about} for name, recipe in found.items()]}
    reporter.result(document, lambda: table(("recipe", "fuses"), [(name, r.about) for name, r in found.items()]))


def _verified(
    reporter: Reporter, planned: list[PlannedLayer], checkpoints: Mapping[str, Checkpoint]
) -> list[list[EquivalenceReport]]:
    """Each fusion run against the layers that it stands for, before a file takes its name."""
    from convtool.checkpoint.proof import check_planned

    found = []
    with reporter.progress("verifying", len(planned), "items") as advance:
        for layer in planned:
            found.append(check_planned(layer, checkpoints))
            advance(1)
    return found


def _proof(reports: list[EquivalenceReport]) -> dict[str, Any]:
    if not reports:
        return {"verified": None}
    ratio = max(report.interior.ratio for report in reports)
    return {"verified": {"ratio": ratio, "input_sizes": [list(report.input_size) for report in reports]}}


def _describe(layer: PlannedLayer, size: tuple[int, ...] | None) -> dict[str, Any]:
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
        "tensors": {
            "removed": sorted(layer.edit.remove - layer.edit.insert.keys()),
            "written": {key: list(tensor.shape) for key, tensor in layer.edit.insert.items()},
        },
    }


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
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
            _print_tensors(reporter, fusion["tensors"])
    if len(document["fusions"]) > 1:
        totals = [sum(fusion["parameters"][key] for fusion in document["fusions"]) for key in ("before", "after")]
        reporter.line(f"{len(document['fusions'])} fusions, {totals[0]} -> {totals[1]} parameters")
    verb = "wrote" if document["written"] else "would write"
    reporter.line(f"{verb} {document['out']}, {document['tensors']} tensors, {human_bytes(document['bytes'])}")


def _print_tensors(reporter: Reporter, tensors: dict[str, Any]) -> None:
    """What a dry run says beyond a run: the tensors that go and come, by name."""
    for name in tensors["removed"]:
        reporter.line(f"  - {name}")
    for name, shape in tensors["written"].items():
        reporter.line(f"  + {name} {'x'.join(map(str, shape))}")


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
