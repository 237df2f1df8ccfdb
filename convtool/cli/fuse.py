"""`convtool fuse`: chains and sums of layers become single layers of a new checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli import complete, saved, shared
from convtool.cli.command import Command
from convtool.cli.fuse_text import Change, Fusion, KnownRecipe, Recipes, Result, Total, Work, show
from convtool.cli.options import CHECKING, DTYPES, INPUT, OUTPUT, Size, argument, flag, option, parse_dtype, spelled
from convtool.cli.output import Reporter
from convtool.core.geometry import format_sizes
from convtool.core.names import some_of
from convtool.core.tree import BASE, chains
from convtool.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint
    from convtool.fusing.fusion import PlannedLayer
    from convtool.fusing.proof import Proof
    from convtool.fusing.recipe import PlannedFusion, Recipe
    from convtool.kinds.stated import FieldSources

EXAMPLES = """
convtool fuse resnet.safetensors layer1.0.conv1 layer1.0.bn1 -o fused.safetensors --set layer1.0.conv1.padding=1
convtool fuse net.pt reduce spread gather -o fused.pt --set gather.stride=2 --dry-run
# exact for inputs of that size is enough
convtool fuse net.pt a b -o out.pt --input-size 32,32
# layers without tensors are given by what they do
convtool fuse net.pt stem 'avg_pool(2)' mix -o out.pt
convtool fuse repvgg.pt --recipe repvgg -o deploy.pt

convtool fuse unet.safetensors --with style=lora.safetensors --strength 0.8 -o styled.safetensors

convtool fuse net.pt 'normalize(mean=.49,.46,.41; std=.23,.22,.23; scale=1/255)' conv1 -o raw.pt
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to fuse, of which checkpoint, where that has to be exact, and where to write it: as typed."""

    checkpoint: Path | None = shared.checkpoint(required=False)
    layers: list[str] | None = argument(
        "LAYER LAYER...",
        "The chain, first to last; also layers that are written, such as avg_pool(2), normalize(mean=.5) or"
        " kernel(TENSOR) (`convtool manual layers`), and a scale per channel by its tensor's full name.",
        complete.layers,
    )
    name: str | None = option("NAME", "What the fused layer is called; the first layer's name by default.", panel=INPUT)
    recipe: str | None = option(
        "NAME|FILE|auto",
        "Fuse by a recipe instead of LAYERs; auto takes the one that fits, - reads one from stdin.",
        completion=complete.recipes,
        panel=INPUT,
    )
    list_recipes: bool = flag("List the recipes that ship with convtool.", panel=INPUT)
    auto: bool = flag(
        "Fuse what `convtool plan` finds; with --model and --model-input, or in a .pt2 file.", panel=INPUT
    )
    model_input: list[str] | None = shared.model_input(panel=INPUT)
    fixed_size: bool = shared.fixed_size(panel=INPUT)
    measure: bool = shared.measure(panel=INPUT)
    everything: bool = shared.everything(panel=INPUT)
    batch_norms_only: bool = shared.batch_norms_only(panel=INPUT)
    others: list[str] | None = shared.others(panel=INPUT)
    strength: list[str] | None = shared.strength(panel=INPUT)
    leave: list[str] | None = shared.leave(panel=INPUT)
    sources: shared.Sources = field(default_factory=shared.Sources)
    input_size: Size | None = shared.input_size(panel=CHECKING)
    allow_border: bool = flag("Fuse even where outputs near the border would differ.", panel=CHECKING)
    bias_map: bool = flag(
        "Where padding hides a bias, store one for each output (NAME.bias_map): exact at --input-size.",
        panel=CHECKING,
    )
    no_verify: bool = flag("Write without the proof.", panel=CHECKING)
    out: Path | None = shared.out("The new checkpoint: a file; or for several a folder that exists, or an index.")
    dtype: Any = option(
        "DTYPE",
        "dtype of the fused layers, such as float32 or bf16. Other tensors keep theirs; convert --dtype changes all.",
        completion=complete.one_of(*DTYPES),
        parse=parse_dtype,
        panel=OUTPUT,
    )
    tensors_only: bool = shared.tensors_only()
    loader: Path | None = option(
        "FILE.py", "Write plain torch code that makes the edits in a model and loads OUT.", panel=OUTPUT
    )
    details: bool = flag("Print everything about each of several fusions, not one line.", panel=OUTPUT)
    writing: shared.Writing = field(default_factory=shared.Writing)

    @property
    def adapts(self) -> bool:
        """Whether what the --with files hold is to be merged."""
        return bool(self.others) and self.recipe is None and not self.auto and not self.layers

    @property
    def size(self) -> Size | None:
        """The input size of the one fusion; with --auto, each has one of its own."""
        return None if self.auto else self.input_size

    @property
    def as_matrix(self) -> str:
        """The command that writes the matrix of the layers in place of one layer, of which all are in CKPT."""
        words = ["convtool", "toeplitz", str(self.checkpoint), *(self.layers or ())]
        for one in fields(self.sources):
            value = getattr(self.sources, one.name)
            name = "--set" if one.name == "settings" else spelled(one.name)
            for given in value if isinstance(value, list) else () if value in (None, False) else (value,):
                words += [name] if given is True else [name, str(given)]
        size = format_sizes(self.input_size or ("SIZE",))
        return f"{shlex.join(words)} --input-size {size} -o OUT.npz"

    def named(self) -> tuple[Path, Path]:
        """Return CKPT and OUT; raise UsageError where anything is missing, or where options don't go together."""
        path, out = self.checkpoint, self.out
        said = bool(self.layers and len(self.layers) > 1) or self.recipe is not None or self.auto or self.adapts
        expected = {
            "CKPT, the checkpoint to fuse layers of": path is not None,
            "two layers or more, first to last, a --recipe, --auto with --model, or adapters --with NAME=FILE": said,
            "-o OUT, the new checkpoint": out is not None,
        }
        if not said and self.layers and Path(self.layers[0]).is_file():
            (file,) = self.layers
            words = (path, "--with", f"{Path(file).name.partition('.')[0]}={file}", "-o", out or "OUT")
            whole = shlex.join(map(str, ("convtool", "fuse", *words)))
            raise UsageError(f"{file}: expected layers, not a file; adapters have a name: {whole}")
        if not said or path is None or out is None:
            raise UsageError(f"expected {'; and '.join(what for what, there in expected.items() if not there)}")
        self._check()
        return path, out

    def _check(self) -> None:
        """Raise UsageError where the options don't go together."""
        if self.auto and self.sources.model is not None and not self.model_input:
            raise UsageError("--auto: expected --model-input, the size of the model's input, such as 3,224,224")
        own = ("input_size", "layers", "recipe", "name", "allow_border", "bias_map")
        if other := [name for name in own if self.auto and getattr(self, name)]:
            said = "LAYERs" if other[0] == "layers" else spelled(other[0])
            raise UsageError(f"--auto: fuses what is exact in the --model; {said} doesn't go with it")
        if self.recipe is not None and (self.layers or self.name):
            raise UsageError("--recipe names the layers; LAYERs and --name don't go with it")
        if extra := [name for name in shared.PLANNING if getattr(self, name) and not self.auto]:
            raise UsageError(f"{spelled(extra[0])}: goes with --auto")
        if self.strength and not self.adapts:
            raise UsageError("--strength: goes with adapters given as --with NAME=FILE; a recipe says scale = NUMBER")
        if self.leave and self.recipe is None and not self.adapts:
            raise UsageError("--leave: goes with adapters given as --with NAME=FILE, alone or with a --recipe")
        if self.bias_map and (self.allow_border or self.input_size is None):
            raise UsageError("--bias-map: is exact at one size; give --input-size, and not --allow-border")


def run(options: Options, reporter: Reporter) -> Result | Recipes:
    """Replace chains of linear layers by the one layer that computes the same, and write the checkpoint.

    Convolutions, batch norms and linear layers that follow each other with nothing in between become one; with a
    recipe, branches that are added do too. A fusion has to be exact for every input size, or for --input-size where
    that is given; otherwise it is refused, with the rows and columns that would differ and the ways out.
    """
    if not options.list_recipes:
        return _fuse(options, reporter)
    if options != Options(list_recipes=True):
        raise UsageError("--list-recipes: lists what there is, and fuses nothing; nothing else goes with it")
    from convtool.fusing.shipped import shipped

    return Recipes(tuple(KnownRecipe(name, recipe.about) for name, recipe in shipped().items()))


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run of the command begins with: its options, their recipe, and the checkpoints, opened, by name."""

    options: Options
    recipe: Recipe | None
    checkpoints: Mapping[str, Checkpoint]
    reporter: Reporter


def _fuse(options: Options, reporter: Reporter) -> Result:
    from convtool.checkpoint.write import check_output
    from convtool.fusing.adapters import merged
    from convtool.fusing.proof import check_planned
    from convtool.fusing.shipped import find_recipe

    path, out = options.named()
    recipe = find_recipe(options.recipe or "auto")  # so that a misspelt one is said before a file is read
    opened = options.sources.open(path, reporter)
    checkpoints = {BASE: opened, **options.sources.open_others(options.others, reporter)}
    check_output(out, force=options.writing.overwrite, source=opened)
    this = _Run(options, recipe, checkpoints, reporter)
    fusions, stated = _find(this)
    planned, left_alone = _planned(this, fusions, stated)
    edit, plan = saved.plan_changed(opened, planned, options, others=checkpoints)
    loader = _loader(this, planned, [name for name, _ in edit.order(opened.infos)])
    with reporter.progress("verifying", len(planned), "share") as advance:  # before a file takes its name
        proofs = [None if options.no_verify else check_planned(layer, checkpoints, advance) for layer in planned]
    with loader:
        new = saved.write(plan, opened, edit, reporter, dry_run=options.writing.dry_run)
    adapters = merged(checkpoints, (one.tree for one in fusions), stated.fields)
    made = [_fusion(layer, one, options.size) for layer, one in zip(planned, proofs, strict=True)]
    return Result(new, tuple(made), Total.of(made), tuple(adapters), tuple(left_alone), options.loader, options.details)


def _planned(this: _Run, fusions: list[PlannedFusion], stated: FieldSources) -> tuple[list[PlannedLayer], list[str]]:
    """Return the fusions as layers, and what was left alone; a refusal names the command for the matrix in full."""
    from convtool.core.fuse import MATRIX
    from convtool.fusing.plans import plan_all

    options, reporter = this.options, this.reporter
    how = {name: getattr(options, name) for name in ("allow_border", "bias_map", "dtype")}
    how |= {"input_size": options.size, "surveyed": not options.layers}
    try:
        planned, left_alone = plan_all(this.checkpoints, fusions, stated, reporter.remark, reporter.note, **how)
    except RefusedError as error:
        said = str(error).replace(MATRIX, options.as_matrix) if options.layers and not options.others else str(error)
        raise RefusedError(said, error.paste) from None
    if joined := [one.name for one in planned if options.auto and one.joins]:
        reporter.remark(
            f"convolutions that follow each other became one: {some_of(joined)}; --batch-norms-only keeps them apart"
        )
    return planned, left_alone


def _loader(this: _Run, planned: Sequence[PlannedLayer], names: Sequence[str]) -> AbstractContextManager[object]:
    """Return the block in which the checkpoint is to be written, so that its loader gets its name with it."""
    from os.path import relpath

    from convtool.formats.atomic import check_target
    from convtool.fusing.loader import beside, loader_text

    options = this.options
    if options.loader is None:
        return nullcontext()
    if options.loader.suffix != ".py" or options.out is None or not options.out.suffix or options.out.suffix == ".json":
        raise UsageError("--loader: expected a name that ends in .py, and OUT to be one file")
    check_target(options.loader, force=options.writing.overwrite)
    # With --root, what is written is the state dict alone.
    state = () if options.sources.root is not None else this.checkpoints[BASE].root
    text = loader_text(planned, names, relpath(options.out, options.loader.parent), state)
    return nullcontext() if options.writing.dry_run else beside(options.loader, text, force=options.writing.force)


def _find(this: _Run) -> tuple[list[PlannedFusion], FieldSources]:
    """Return the fusions that are wanted, by name, and where what is known of their layers comes from."""
    from convtool.checkpoint.record import full_name
    from convtool.cli.model import check_chains, plan_for, planned_fusions
    from convtool.fusing.adapters import adapted
    from convtool.fusing.named import against_order, in_order, named_chain
    from convtool.graph.planned import grouped_reasons

    options, checkpoints, reporter = this.options, this.checkpoints, this.reporter
    opened, sources = checkpoints[BASE], options.sources
    names = [full_name(layer, one) for one, each in checkpoints.items() for layer in each.layers]
    if options.auto:
        wanted = {name: getattr(options, name) for name in shared.PLANNING}
        plan = plan_for(opened, sources, options.model_input, reporter, **wanted)
        if not plan.fusions:
            why = "".join(f"; left alone: {names}: {reason}" for names, reason in grouped_reasons(plan.left_alone))
            raise RefusedError(f"--auto: found nothing to fuse{why}")
        return planned_fusions(plan), sources.fields(None, names).with_first(plan.geometry)
    found = sources.read_model(opened, reporter)
    fields = sources.fields(found, names)
    if options.adapts:
        return adapted(checkpoints, fields, options.strength or (), options.leave or ())
    order = in_order(opened, None if found is None else list(found.names.values()))
    if options.recipe is None:
        fusions = [named_chain(options.layers or (), options.name or "", checkpoints)]
        reporter.remark(*against_order(fusions[0], order))
    else:
        fusions, fields = _by_recipe(this, fields, order)
    own = [[ref for ref in chain if ref.source == BASE] for one in fusions for chain in chains(one.tree)]
    written = [[ref.name if ref.written else opened.part(ref.name).name for ref in refs] for refs in own]
    check_chains(written, opened, found, options.model_input)
    return fusions, fields


def _by_recipe(
    this: _Run, fields: FieldSources, order: Sequence[str] | None
) -> tuple[list[PlannedFusion], FieldSources]:
    """Return the fusions of a recipe; of the one that ships and fits, where none is given."""
    from convtool.fusing.named import by_name, doing_more, in_words, the_one, without_effect
    from convtool.fusing.shipped import is_file

    options, recipe, checkpoints, reporter = this.options, this.recipe, this.checkpoints, this.reporter
    if recipe is None:
        recipe, which = the_one(checkpoints, fields)
        reporter.note(f"recipe: {which}")
    own = is_file(str(options.recipe))
    idle = without_effect(recipe, checkpoints) if own else ()  # those that ship are for many networks
    reporter.remark(*(f"{recipe.origin}: geometry: {pattern!r} fits no layer" for pattern in idle))
    fusions, stated = by_name(recipe, checkpoints, fields, options.leave or (), order)
    if more := [] if own or this.recipe is None else doing_more(fusions, checkpoints, fields):
        reporter.note(f"left alone: what another recipe makes fewer layers of: {in_words(more)}")
    if options.input_size is not None and len(fusions) > 1:
        raise UsageError(
            f"--input-size: is the size of one input, and the recipe makes {len(fusions)} fusions; leave it out"
        )
    return fusions, stated


def _fusion(layer: PlannedLayer, found: Proof | None, size: tuple[int, ...] | None) -> Fusion:
    """Return what there is to say of a fusion.

    Args:
        found: how it did against its layers; None where nobody looked.
        size: of the input, for those that are exact at every size.
    """
    from convtool.fusing.edits import module_edits

    verdict, conv = layer.fusion.verdict, layer.fusion.conv
    work = layer.multiply_adds(verdict.input_size or size)
    return Fusion(
        record=saved.Recorded.of(layer.record),
        layers=tuple(one.layer.name for one in layer.layers),
        kernel_size=conv.geometry.kernel_size,
        smallest_input=verdict.smallest if layer.settled else None,
        differs=None if verdict.exact else verdict.describe_rim(),
        assumed=tuple(layer.assumed),
        inferred=tuple(f"{one.name}: {what}" for one in layer.layers for what in one.inferred),
        overruled=tuple(f"{one.name}: {what}" for one in layer.layers for what in one.overruled),
        edits=tuple(module_edits(layer)),
        bias_map=conv.has_bias_map,
        parameters=Change(*layer.parameters),
        multiply_adds=None if work is None else Work(*work),
        tensors=saved.changed_tensors(layer.edit),
        verified=found,
    )


COMMAND = Command("CKPT LAYER LAYER... -o OUT", EXAMPLES, Options, run, show)
