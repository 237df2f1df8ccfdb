"""`convtool fuse`: chains and sums of layers become single layers of a new checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli.options import (
    Dtype,
    Force,
    GeometryFile,
    InputSize,
    Json,
    Quiet,
    Root,
    Settings,
    With,
    parse_dtype,
    parse_input_size,
)
from convtool.cli.output import Reporter, tree_text
from convtool.cli.run import run

if TYPE_CHECKING:
    from convtool.checkpoint.fusion import PlannedLayer
    from convtool.recipe import PlannedFusion, Recipe

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
            " upsample(N), and flatten(H,W) before a linear layer.",
            show_default=False,
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
        typer.Option("--recipe", metavar="NAME|FILE", help="Fuse by a recipe instead of LAYERs.", show_default=False),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="List the recipes that ship with it.")] = False,
    input_size: InputSize = None,
    allow_border: Annotated[
        bool, typer.Option("--allow-border", help="Fuse even where outputs near the border would differ.")
    ] = False,
    dtype: Dtype = None,
    geometry: GeometryFile = None,
    settings: Settings = None,
    sources_given: With = None,
    root: Root = None,
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
        from convtool.checkpoint.edit import Edit
        from convtool.checkpoint.fusion import assumptions, lower_for, plan_layer
        from convtool.checkpoint.write import check_output, write_edited
        from convtool.cli.options import check_used, field_sources, open_others
        from convtool.core.tree import BASE
        from convtool.errors import UsageError

        rounded, size = parse_dtype(dtype), parse_input_size(input_size)
        if checkpoint is None:
            raise UsageError("expected CKPT, the checkpoint to fuse layers of")
        if out is None:
            raise UsageError("expected -o OUT, the new checkpoint")
        found = None if recipe is None else _find_recipe(recipe)
        if found is None and len(layers or ()) < 2:
            raise UsageError("expected two layers or more, first to last, or a --recipe")
        if found is not None and (layers or name):
            raise UsageError("--recipe names the layers; LAYERs and --name don't go with it")
        opened = open_checkpoint(checkpoint, root)
        checkpoints = {BASE: opened, **open_others(sources_given)}
        check_output(out, force=force or dry_run)
        sources = field_sources(geometry, settings, {})
        check_used(sources, [layer for one in checkpoints.values() for layer in one.layers])
        if found is not None:
            sources = sources.with_first(found.geometry)
        fusions = [
            (fusion.name, lower_for(checkpoints, fusion.tree, sources, size))
            for fusion in _fusions(found, layers or [], name or "", checkpoints)
        ]
        # Before anything is refused: what was assumed may be why.
        for assumed in dict.fromkeys(text for _, tree in fusions for text in assumptions(tree)):
            reporter.remark(f"assumed: {assumed}")
        planned = [
            plan_layer(opened, fused, tree, input_size=size, allow_border=allow_border, dtype=rounded)
            for fused, tree in fusions
        ]
        edit = Edit.together(layer.edit for layer in planned)
        edit.order(opened.infos)  # finds a name that is taken before anything is written
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
            "fusions": [_describe(layer) for layer in planned],
        }
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, (lambda: _list_recipes(reporter)) if list_recipes else body)


def _find_recipe(text: str) -> Recipe:
    """A recipe by its name, or by the path of its file."""
    from convtool.cli.options import read_toml
    from convtool.errors import UsageError
    from convtool.recipe import parse_recipe
    from convtool.recipes import shipped

    known = shipped()
    if text in known:
        return known[text]
    if not text.endswith(".toml"):
        raise UsageError(f"--recipe: no recipe {text!r}; expected one of {', '.join(known)}, or a .toml file")
    return parse_recipe(read_toml(Path(text)), text)


def _fusions(found: Recipe | None, layers: list[str], name: str, checkpoints: dict[str, Any]) -> list[PlannedFusion]:
    from convtool.core.tree import Chain, LayerRef
    from convtool.recipe import PlannedFusion, resolve

    if found is None:
        return [PlannedFusion(name, Chain(tuple(_layer_ref(layer, checkpoints, LayerRef) for layer in layers)))]
    kinds = {
        source: {layer.name: layer.kind for layer in opened.layers.values()} for source, opened in checkpoints.items()
    }
    return resolve(found, kinds)


def _layer_ref(text: str, checkpoints: dict[str, Any], make: Any) -> Any:
    source, colon, layer = text.partition(":")
    return make(layer, source) if colon and source in checkpoints and "(" not in source else make(text)


def _list_recipes(reporter: Reporter) -> None:
    from convtool.cli.output import table
    from convtool.recipes import shipped

    found = shipped()
    document = {"recipes": [{"name": name, "about": recipe.about} for name, recipe in found.items()]}
    reporter.result(document, lambda: table(("recipe", "fuses"), [(name, r.about) for name, r in found.items()]))


def _describe(layer: PlannedLayer) -> dict[str, Any]:
    verdict = layer.fusion.verdict
    before, after = layer.parameters
    return {
        **layer.record.to_json(),
        "layers": [one.layer.name for one in layer.layers],
        "kernel_size": list(layer.fusion.conv.geometry.kernel_size),
        "smallest_input": list(verdict.smallest),
        "differs": None if verdict.exact else verdict.describe_rim(),
        "assumed": layer.assumed,
        "edits": layer.module_edits,
        "parameters": {"before": before, "after": after},
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
        before, after = fusion["parameters"]["before"], fusion["parameters"]["after"]
        reporter.line(f"  {before} -> {after} parameters, {fusion['dtype']}")
    verb = "wrote" if document["written"] else "would write"
    reporter.line(f"{verb} {document['out']}")


def _exactness(fusion: dict[str, Any]) -> str:
    if not fusion["exact"]:
        return f"NOT exact: {fusion['differs']} of the output differ"
    if fusion["input_size"] is not None:
        return f"exact at input size {_sizes(fusion['input_size'])}"
    smallest = fusion["smallest_input"]
    if fusion["fields"].get("padding_mode", "zeros") != "zeros" and smallest:
        return f"exact at every input size from {_sizes(smallest)} up"
    return "exact at every input size"


def _sizes(values: list[int]) -> str:
    return ",".join(map(str, values))
