"""`convtool plan`: what could be fused in a whole model, where that is exact, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from convtool.cli import shared
from convtool.cli.command import Command
from convtool.cli.document import HIDDEN, Count, Sizes, fill
from convtool.cli.options import argument, option
from convtool.cli.output import Reporter, amount, change, emit, table
from convtool.core.tree import Tree, leaves, map_leaves
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.graph.flow import LeftAlone
    from convtool.graph.judge import Cost, Exact, Merge

EXAMPLES = """
convtool plan resnet.safetensors --model torchvision.models:resnet50 --model-input 3,224,224
convtool plan net.pt --model net.py:Net --model-args '{"width": 32}' --model-input 3,64,64 -o plan.toml
convtool fuse net.pt --recipe plan.toml -o fused.pt
convtool plan net.pt --model net.py:Net --model-input 3,64,64 -o - | convtool fuse net.pt --recipe - -o fused.pt
# an exported program says by itself what its data flow is
convtool plan net.pt2 -o plan.toml
# a folder as Hugging Face lays it out
convtool plan folder/model.safetensors --model folder --model-input 3,224,224 --everything
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The model, and which of its fusions are wanted."""

    checkpoint: Path | None = argument("[CKPT]", "The model's checkpoint, whose names and biases then count.")
    model: str | None = option(
        "CODE",
        "The model's code: pkg.mod:callable, file.py:callable, or a Hugging Face folder. This runs your code. A .pt2"
        " file needs none.",
    )
    model_args: str | None = shared.model_args()
    model_input: list[str] | None = shared.model_input()
    out: Path | None = shared.out("Write the plan as a recipe (.toml; - for stdout).")
    fixed_size: bool = shared.fixed_size()
    everything: bool = shared.everything()
    batch_norms_only: bool = shared.batch_norms_only()
    measure: bool = shared.measure()
    root: str | None = shared.root()
    writing: shared.Writing


@dataclass(frozen=True, slots=True)
class Part:
    """A layer."""

    name: str


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a fusion takes on this machine."""

    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Fusion:
    """Layers that can be one.

    Attributes:
        name: of the fused layer.
        layers: the leaves of sources.
        input_size: of the fusion's own input, channels in front.
        seconds: with --measure.
    """

    name: str
    layers: tuple[str, ...]
    sources: Tree[Part]
    exact: Exact
    input_size: Sizes
    before: Cost
    after: Cost
    seconds: Seconds | None

    @classmethod
    def of(cls, merge: Merge) -> Fusion:
        """Return what there is to say of one."""
        layers = tuple(leaf.name for leaf in leaves(merge.tree))
        sources = map_leaves(lambda leaf: Part(leaf.name), merge.tree)
        seconds = None if merge.seconds is None else Seconds(*merge.seconds)
        return fill(cls, merge, layers=layers, sources=sources, seconds=seconds)


@dataclass(frozen=True, slots=True)
class Total:
    """What the whole model takes: its convolutions, linear layers, batch norms and scales.

    Attributes:
        uncounted: parameters of its other layers.
        unfused: the checkpoint was fused already; the costs are those of the model as its code builds it.
    """

    before: Cost
    after: Cost
    uncounted: Count
    unfused: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What can be fused in a model.

    Attributes:
        source: the checkpoint.
        remarks: what to know of how the model's run was followed.
        total: of the whole model.
        out: the recipe; null where none was wanted, or nothing can be fused.
        bytes: of the recipe.
        piped: the recipe, where it goes to stdout.
    """

    source: Path | None
    remarks: tuple[str, ...]
    fusions: tuple[Fusion, ...]
    left_alone: tuple[LeftAlone, ...]
    total: Total
    out: Path | None
    written: bool
    bytes: Count | None
    piped: str | None = field(metadata=HIDDEN)


def run(options: Options, reporter: Reporter) -> Result:
    """Find every exact fusion in a model, and what each saves.

    One run of the model is followed, in which nothing is computed: convolutions, batch norms, linear layers and scales
    with nothing in between, branches that are added, and what comes behind a flatten. What is exact for every input
    size is listed, and written as a recipe with -o; what was left alone, and why, is listed after it.
    """
    from convtool.cli.model import plan_for
    from convtool.formats.atomic import check_target, replacing

    out = options.out
    piped = out is not None and str(out) == "-"
    if piped and reporter.as_json:
        raise UsageError("--out -: stdout holds the recipe or the document of --json; name a file for one of them")
    if out is not None and not piped:
        check_target(out, force=options.writing.overwrite)
    opened = None if options.checkpoint is None else shared.open_reporting(options.checkpoint, reporter, options.root)
    wanted = {name: getattr(options, name) for name in shared.PLANNING}
    found = plan_for(opened, options, options.model_input, reporter, **wanted)
    recipe = found.recipe().encode() if out is not None and found.fusions else None
    written = out is not None and recipe is not None and not piped and not options.writing.dry_run
    if out is not None and recipe is not None and written:
        with replacing(out, force=options.writing.force) as file:
            file.write(recipe)
    return fill(
        Result,
        found,
        source=options.checkpoint,
        fusions=tuple(map(Fusion.of, found.fusions)),
        total=Total(found.total, found.total_after, found.uncounted, found.unfused),
        out=None if recipe is None else out,
        written=written,
        bytes=None if recipe is None else len(recipe),
        piped=found.recipe() if piped else None,
    )


def show(result: Result, reporter: Reporter) -> None:
    """Print the plan: the recipe where it goes to stdout, else a table of fusions, and what they save."""
    from convtool.graph.planned import grouped_reasons

    if result.piped is not None:
        emit(result.piped, end="")
        return
    measured = any(fusion.seconds for fusion in result.fusions)
    columns = ["layers", "exact", "parameters", "multiply-adds", *(["ms"] if measured else [])]
    if result.fusions:
        rows = [_row(fusion)[: len(columns)] for fusion in result.fusions]
        table(columns, rows, right=("parameters", "multiply-adds", "ms"))
    reporter.lines([f"left alone: {names}: {reason}" for names, reason in grouped_reasons(result.left_alone)])
    count = len(result.fusions)
    parameters, work = _costs(result.total)
    others = result.total.uncounted
    whole = "the model as its code builds it, unfused" if result.total.unfused else "the whole model"
    reporter.line(
        f"{count} fusion{'' if count == 1 else 's'}; {whole}: {parameters} parameters, {work}"
        " multiply-adds for one input"
        + (f", without {amount(others)} parameters of layers of other kinds" if others else "")
    )
    if result.written:
        reporter.line(f"wrote {result.out}")
    elif result.out:
        reporter.line(f"would write {result.out}, {result.bytes} bytes")


def _row(fusion: Fusion) -> list[str]:
    from convtool.graph.planned import tree_in_short

    seconds = fusion.seconds
    time = "" if seconds is None else f"{seconds.before * 1e3:.3g} → {seconds.after * 1e3:.3g}"
    return [tree_in_short(fusion.sources), fusion.exact.value, *_costs(fusion), time]


def _costs(one: Fusion | Total) -> tuple[str, str]:
    """Return how parameters and multiply-adds change."""
    before, after = one.before, one.after
    return change(before.parameters, after.parameters), change(before.multiply_adds, after.multiply_adds)


COMMAND = Command("[CKPT] --model CODE --model-input C,H,W", EXAMPLES, Options, run, show)
