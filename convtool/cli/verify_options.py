"""The options of `convtool verify`: what is compared, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convtool.cli import complete, matrix_verdict, shared, verify_text
from convtool.cli.options import (
    CHECKING,
    INPUT,
    OUTPUT,
    STATED,
    Size,
    argument,
    flag,
    option,
    parse_device,
    parse_float,
    parse_rows,
    spelled,
)
from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convtool.kinds.stated import FieldSources
    from convtool.live.agreement import Agreement

MATRIX = "A matrix file"  # a section of the help
_input, _checking, _matrix = (partial(option, panel=panel) for panel in (INPUT, CHECKING, MATRIX))
SPELLED = {"after_layers": "--after", "others": "--with"}  # options that aren't called as their field is


@dataclass(frozen=True, slots=True)
class Sources(shared.Sources):
    """Where fields come from, for two checkpoints."""

    settings: list[str] | None = option(
        "LAYER.FIELD=VALUE",
        "A field of a layer, in both checkpoints; before:LAYER... or after:LAYER... for one. Repeatable.",
        "--set",
        panel=STATED,
    )

    def of_both(self, model: Agreement | None, layers: Iterable[str] | None) -> tuple[FieldSources, FieldSources]:
        """Return fields for BEFORE and for AFTER; a --set with before: or after: in front goes to one of them only."""
        both = self.settings or []
        first = [text.removeprefix("before:") for text in both if not text.startswith("after:")]
        second = [text.removeprefix("after:") for text in both if not text.startswith("before:")]
        before, after = replace(self, settings=first), replace(self, settings=second)
        return before.fields(model, layers), after.fields(None, layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is compared, on which inputs."""

    before: Path = argument("BEFORE", "The original checkpoint, or a matrix file.", required=True)
    after: Path = argument("AFTER", "The fused checkpoint, or a matrix file.", required=True)
    before_layers: list[str] | None = _input(
        "A,B",
        "A chain in BEFORE, in place of what AFTER records; or the matrix's layer. Repeatable, with --after.",
        "--before",
        completion=complete.chain_of("before"),
    )
    after_layers: list[str] | None = _input(
        "C", "The chain in AFTER that stands for it.", "--after", completion=complete.chain_of("after")
    )
    recipe: str | None = _input(
        "NAME|FILE|auto",
        "A recipe that says what another program fused, in place of AFTER's record; auto takes the one that fits.",
        completion=complete.recipes,
    )
    others: list[str] | None = shared.others(panel=INPUT)
    strength: list[str] | None = shared.strength(panel=INPUT)
    leave: list[str] | None = shared.leave(panel=INPUT)
    only: bool = flag(
        "Compare only the chains of --before and --after, or of --recipe, and no other tensor.", panel=INPUT
    )
    model_input: list[str] | None = shared.model_input(panel=INPUT)
    model_after: str | None = _input(
        "CODE", "The code of AFTER's network: run both on random inputs, which covers what no pair of layers does."
    )
    model_after_args: str | None = _input("JSON", "Arguments of that callable, as JSON.")
    sources: Sources
    computed_in: str | None = _checking(
        "DTYPE",
        "Precision in which another program fused AFTER; float64 by default, as convtool does.",
        parse=parse_float,
    )
    rounded_to: str | None = _checking(
        "DTYPE", "Tensors of AFTER may also be BEFORE's, rounded once to that dtype.", parse=parse_float
    )
    input_size: list[Size] | None = _checking(
        "[C,]H,W", "Size of the input to the first layer; repeatable. By default sizes that show border and interior."
    )
    trials: int = _checking("TRIALS", "Random inputs for each chain and size.", default=8)
    seed: int = _checking("SEED", "Seed of the random inputs.", default=0)
    exhaustive: bool = flag("Run every basis vector through torch as well.", panel=CHECKING)
    rtol: float | None = _checking("RTOL", "A relative tolerance instead of the derived bound.")
    atol: float | None = _checking("ATOL", "An absolute tolerance instead of the derived bound.")
    device: Any = _checking(
        "DEVICE", "Where to run it, such as cuda; the verdict is the same.", parse=parse_device, default="cpu"
    )
    rows: tuple[int, int] | None = _matrix(
        "A:B", "Which rows of the layer's matrix AFTER holds, where it doesn't say so itself.", parse=parse_rows
    )
    columns: tuple[int, int] | None = _matrix("A:B", "Which columns of it, likewise.", parse=parse_rows)
    no_bias: bool = flag("Compare the matrix alone, of a layer whose bias was not saved with it.", panel=MATRIX)
    details: bool = flag("Print all that AFTER records layer by layer, and every row and difference.", panel=OUTPUT)

    @property
    def tolerance(self) -> verify_text.Tolerance | Literal["derived bound"]:
        """What an error is held against."""
        given = self.rtol is not None or self.atol is not None
        return verify_text.Tolerance(self.rtol, self.atol) if given else matrix_verdict.BOUND

    def check(self, with_matrix: bool) -> None:
        """Raise UsageError for values that no comparison can have, and options that don't go with each other.

        Args:
            with_matrix: one side is a matrix file.
        """
        if self.trials < 1 and not self.exhaustive:
            raise UsageError(f"--trials: expected at least 1, got {self.trials}; no comparison is no proof")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: expected an integer from 0 to 2**63 - 1, got {self.seed}")
        if self.model_input is not None and self.sources.model is None:
            raise UsageError("--model-input: goes with --model")
        if self.model_after is not None and (self.model_input is None or self.only):
            raise UsageError("--model-after: goes with --model and --model-input, and not with --only")
        if self.model_after_args is not None and self.model_after is None:
            raise UsageError("--model-after-args: goes with --model-after")
        for_checkpoints = ("rtol", "atol", "after_layers", "others", "recipe", "rounded_to", "model_after")
        for name in for_checkpoints if with_matrix else ("rows", "columns", "no_bias"):
            if getattr(self, name) not in (None, False):
                does = "doesn't go with" if with_matrix else "is for"
                raise UsageError(f"{SPELLED.get(name) or spelled(name)}: {does} a matrix file")
        named, after = len(self.before_layers or ()), len(self.after_layers or ())
        if with_matrix and (self.only or named > 1):
            raise UsageError("--only and several --before are for two checkpoints; a matrix is of one layer")
        if not with_matrix and named != after:
            raise UsageError("--before and --after go together: a chain in BEFORE and the one that stands for it")
        if (self.strength and self.recipe is not None) or ((self.strength or self.leave) and not self.others):
            raise UsageError("--strength and --leave: go with adapters given as --with NAME=FILE; of a recipe, --leave")
        if self.only and not (named or self.recipe):
            raise UsageError("--only: compares the chains of --before and --after, or of --recipe; none are given")
