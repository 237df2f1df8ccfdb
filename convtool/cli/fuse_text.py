"""What `convtool fuse` says: its results, and their lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convtool.cli import saved
from convtool.cli.document import HIDDEN, INLINE, Count, Sizes
from convtool.cli.output import Reporter, table
from convtool.core.geometry import format_sizes
from convtool.core.tree import LayerRef, map_leaves, tree_text

if TYPE_CHECKING:
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
        multiply_adds: null where they depend on a stride that nobody states.
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
class Result:
    """A new checkpoint.

    Attributes:
        left_alone: what might have been fused and wasn't, in words.
        loader: the module that makes the edits in a model, and loads the checkpoint.
    """

    checkpoint: saved.Written = field(metadata=INLINE)
    fusions: tuple[Fusion, ...]
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
    if len(fusions) == 1 or result.details:
        for fusion in fusions:
            _show_one(fusion, reporter, dry_run=not result.checkpoint.written)
    else:
        columns = ("layers", "become", "exact", "error/bound", "parameters", "multiply-adds")
        table(columns, list(map(_row, fusions)), right=("parameters", "multiply-adds"), most=MOST_ROWS)
    if len(fusions) > 1:
        before = sum(fusion.parameters.before for fusion in fusions)
        after = sum(fusion.parameters.after for fusion in fusions)
        works = dict.fromkeys(fusion.multiply_adds.per for fusion in fusions if fusion.multiply_adds is not None)
        per = f"; multiply-adds are per {' or '.join(works)}" if works else ""
        reporter.line(f"{len(fusions)} fusions, {before} → {after} parameters{per}; --details lists the edits of each")
    saved.show(result.checkpoint, reporter)
    out, did = result.checkpoint.out, "wrote" if result.checkpoint.written else "would write"
    if result.loader is not None:
        edits = "its load(model) edits a model of torch's own layers or timm's batch norms, and loads"
        reporter.line(f"{did} {result.loader}: {edits} {out.name}")
    elif result.checkpoint.written:
        reporter.remark(f'to load it: convtool.apply(model, "{out}"), or the code that --loader FILE.py writes')


def _row(fusion: Fusion) -> tuple[str, ...]:
    from convtool.graph.planned import tree_in_short

    record, proof, numbers, work = fusion.record, fusion.verified, fusion.parameters, fusion.multiply_adds
    return (
        tree_in_short(map_leaves(lambda one: LayerRef(str(one)), record.sources)),
        record.name,
        _exactness(fusion).removeprefix("exact "),
        "not verified" if proof is None else f"{proof.ratio:.3g}",
        f"{numbers.before} → {numbers.after}",
        "" if work is None else f"{_count(work.before)} → {_count(work.after)}",
    )


def _show_one(fusion: Fusion, reporter: Reporter, *, dry_run: bool) -> None:
    record, proof, numbers, work = fusion.record, fusion.verified, fusion.parameters, fusion.multiply_adds
    reporter.line(f"{tree_text(record.sources)} becomes {record.name}")
    for line in (*fusion.edits, _exactness(fusion)):
        reporter.line(f"  {line}")
    if proof is not None:
        where = "" if record.exact else ", the border apart"
        reporter.line(f"  proved number by number, {proof.numbers} of them{where}: error/bound {proof.ratio:.3g}")
    per = "" if work is None or work.per == "input" else f" per {work.per}"
    cost = "" if work is None else f" {_count(work.before)} → {_count(work.after)} multiply-adds{per},"
    reporter.line(f"  {numbers.before} → {numbers.after} parameters,{cost} {record.dtype}")
    if dry_run:
        saved.show_tensors(fusion.tensors, reporter)


def _exactness(fusion: Fusion) -> str:
    record = fusion.record
    if not record.exact:
        return f"NOT exact: {fusion.differs} of the output differ"
    if record.input_size is not None:
        return f"exact at input size {format_sizes(record.input_size)}"
    if record.fields.get("padding_mode", "zeros") != "zeros" and fusion.smallest_input:
        return f"exact at every input size from {format_sizes(fusion.smallest_input)} up"
    return "exact at every input size"


def _count(number: float) -> str:
    """Return whole numbers as they are, others to two places."""
    return str(int(number)) if number == int(number) else f"{number:.2f}"
