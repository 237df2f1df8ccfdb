"""What `convtool fuse` says: its results, and their lines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convtool.cli import saved
from convtool.cli.document import HIDDEN, INLINE, Count, Sizes
from convtool.cli.output import Reporter, change, table
from convtool.core.geometry import format_sizes
from convtool.core.tree import LayerRef, leaves, map_leaves, tree_text

if TYPE_CHECKING:
    from convtool.fusing.adapters import Merged
    from convtool.fusing.proof import Proof

MOST_ROWS = 40  # of a table on a terminal, before the rest is only counted


@dataclass(frozen=True, slots=True)
class Change:
    """A number before and after."""

    before: Count
    after: Count


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds before and after."""

    before: float
    after: float
    per: Literal["input position", "input", "output position"]


@dataclass(frozen=True, slots=True)
class Fusion:
    """A fused layer.

    Attributes:
        layers: the leaves of sources.
        differs: the rim in words; null where exact.
        smallest_input: null where it depends on a padding that nobody states.
        assumed: what it rests on that nobody stated.
        inferred: what follows from other layers.
        overruled: what a source says otherwise.
        edits: lines that make a model's code fit the new checkpoint.
        parameters: before, those of an adapter's own tensors, alpha left out.
        multiply_adds: null where they depend on a stride that nobody states, and of layers with an adapter.
        verified: held against its layers before it was written, the border apart where not exact; null with
            --no-verify.
    """

    record: saved.Recorded = field(metadata=INLINE)
    layers: tuple[str, ...]
    kernel_size: Sizes
    smallest_input: Sizes | None
    differs: str | None
    assumed: tuple[str, ...]
    inferred: tuple[str, ...]
    overruled: tuple[str, ...]
    edits: tuple[str, ...]
    bias_map: bool
    parameters: Change
    multiply_adds: Work | None
    tensors: saved.ChangedTensors
    verified: Proof | None


@dataclass(frozen=True, slots=True)
class Total:
    """All fusions together.

    Attributes:
        multiply_adds: null unless all of them are counted per input: positions of different layers don't add up.
    """

    parameters: Change
    multiply_adds: Work | None

    @classmethod
    def of(cls, fusions: Sequence[Fusion]) -> Total:
        """Return the sum."""
        numbers, works = [one.parameters for one in fusions], [one.multiply_adds for one in fusions]
        counted = [work for work in works if work is not None and work.per == "input"]
        work = Work(sum(one.before for one in counted), sum(one.after for one in counted), "input")
        parameters = Change(sum(one.before for one in numbers), sum(one.after for one in numbers))
        return cls(parameters, work if len(counted) == len(works) else None)


@dataclass(frozen=True, slots=True)
class Result:
    """A new checkpoint.

    Attributes:
        adapters: those that were merged.
        left_alone: what might have been fused and wasn't, in words.
        loader: the module that makes the edits in a model, and loads the checkpoint.
    """

    checkpoint: saved.Written = field(metadata=INLINE)
    fusions: tuple[Fusion, ...]
    total: Total
    adapters: tuple[Merged, ...]
    left_alone: tuple[str, ...]
    loader: Path | None
    details: bool = field(metadata=HIDDEN)


@dataclass(frozen=True, slots=True)
class KnownRecipe:
    """A recipe that ships with convtool."""

    name: str
    about: str


@dataclass(frozen=True, slots=True)
class Recipes:
    """What --list-recipes lists."""

    recipes: tuple[KnownRecipe, ...]


def show(result: Result | Recipes, reporter: Reporter) -> None:
    """Print each fusion and what was written; or the recipes."""
    if isinstance(result, Recipes):
        table(("recipe", "fuses"), [(one.name, one.about) for one in result.recipes])
        return
    fusions = result.fusions
    works = {fusion.multiply_adds.per for fusion in fusions if fusion.multiply_adds is not None}
    if len(fusions) == 1 or result.details:
        for fusion in fusions:
            _show_one(fusion, reporter, dry_run=not result.checkpoint.written)
    else:
        columns = ["layers", "become", "exact", "parameters", "multiply-adds"][: 5 if works else 4]
        rows = [_row(fusion, "" if len(works) == 1 else " per {}")[: len(columns)] for fusion in fusions]
        table(columns, rows, right=("parameters", "multiply-adds"), most=MOST_ROWS)
        reporter.line(_proved(fusions))
    if len(fusions) > 1:
        reporter.line(f"{len(fusions)} fusions, {_total(result, works)}; --details lists the edits of each")
    for one in result.adapters:
        modules = f"{one.modules} module{'' if one.modules == 1 else 's'}"
        reporter.line(f"{one.source}: {modules}, {one.scaling}")
    saved.show(result.checkpoint, reporter)
    out, did = result.checkpoint.out, "wrote" if result.checkpoint.written else "would write"
    if result.loader is not None:
        edits = "its load(model) edits a model of torch's own layers or timm's batch norms, and loads"
        reporter.line(f"{did} {result.loader}: {edits} {out.name}")
    elif result.checkpoint.written and not any(fusion.edits for fusion in fusions):
        reporter.remark("it loads as before: the model's code stays as it is")
    elif result.checkpoint.written:
        reporter.remark(f"to load it: {_ways_to_load([fusion.record for fusion in fusions], out)}")


def _ways_to_load(records: Sequence[saved.Recorded], out: Path) -> str:
    new = [one.name for one in records if one.name not in map(str, leaves(one.sources))]
    apply = f'convtool.apply(model, "{out}")'
    if new:  # as a rule the deployed form of a block
        return f"load_state_dict of a network that has {new[0]}; {apply}, if its code calls that once it is there"
    return f"{apply}, or the code that --loader FILE.py writes"


def _total(result: Result, works: Collection[str]) -> str:
    """Return what all fusions save together, in words.

    Args:
        works: what their multiply-adds are of.
    """
    total = result.total
    saved = f"{change(total.parameters.before, total.parameters.after)} parameters"
    if total.multiply_adds is not None:
        return f"{saved}, {change(total.multiply_adds.before, total.multiply_adds.after)} multiply-adds for one input"
    return f"{saved}; multiply-adds are per {next(iter(works))}" if len(works) == 1 else saved


def _row(fusion: Fusion, per: str) -> tuple[str, ...]:
    from convtool.graph.planned import less, shared_path, tree_in_short

    record, numbers, work = fusion.record, fusion.parameters, fusion.multiply_adds
    sources = map_leaves(lambda one: LayerRef(str(one)), record.sources)
    return (
        tree_in_short(sources),
        less(record.name, shared_path([leaf.name for leaf in leaves(sources) if not leaf.written])),
        _exactness(fusion).removeprefix("exact "),
        change(numbers.before, numbers.after),
        "" if work is None else f"{change(work.before, work.after)}{per.format(work.per)}",
    )


def _show_one(fusion: Fusion, reporter: Reporter, *, dry_run: bool) -> None:
    record, numbers, work = fusion.record, fusion.parameters, fusion.multiply_adds
    reporter.line(f"{tree_text(record.sources)} becomes {record.name}")
    reporter.lines([f"  {line}" for line in (*fusion.edits, _exactness(fusion), _proved([fusion]))])
    per = "" if work is None or work.per == "input" else f" per {work.per}"
    cost = "" if work is None else f" {change(work.before, work.after)} multiply-adds{per},"
    reporter.line(f"  {numbers.before} → {numbers.after} parameters,{cost} {record.dtype}")
    if dry_run:
        saved.show_tensors(fusion.tensors, reporter)


def _proved(fusions: Sequence[Fusion]) -> str:
    """Return what was proved of fusions, in a line."""
    proofs = [fusion.verified for fusion in fusions if fusion.verified is not None]
    if not proofs:
        return "not proved, as --no-verify was given"
    where = "" if all(fusion.record.exact for fusion in fusions) else ", the border apart"
    numbers = sum(proof.numbers for proof in proofs)
    return f"proved number by number{where}: none of {numbers} is further off than rounding can put it"


def _exactness(fusion: Fusion) -> str:
    record = fusion.record
    if not record.exact:
        return f"NOT exact: {fusion.differs} of the output differ"
    if record.input_size is not None:
        return f"exact at input size {format_sizes(record.input_size)}"
    if record.fields.get("padding_mode", "zeros") != "zeros" and fusion.smallest_input:
        return f"exact at every input size from {format_sizes(fusion.smallest_input)} up"
    return "exact at every input size"
