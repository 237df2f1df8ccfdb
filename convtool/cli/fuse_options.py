"""What `convtool fuse` is to fuse, as typed: the options that say so, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convtool.cli import complete
from convtool.cli.options import STREAM, FixedSize, InputSize, Measure, parse_input_size, read_toml
from convtool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from convtool.fusing.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """Layers by name, a recipe, or what a plan finds; and where that has to be exact."""

    layers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LAYER LAYER...",
            help="The chain, first to last; also identity(), scale(X), pad(P), avg_pool(K; stride=S; padding=P),"
            " upsample(N), and flatten(H,W) before a linear layer; a scale per channel by its tensor's full name.",
            show_default=False,
            autocompletion=complete.layers,
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the fused layer is called; the first layer's name by default."),
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help="Fuse by a recipe instead of LAYERs; - for one on stdin.",
            show_default=False,
            autocompletion=complete.recipes,
        ),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", metavar="X", help="How much a LoRA recipe adds: X * alpha / rank.", show_default=False
        ),
    ] = None
    normalize: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--normalize",
            metavar="mean=M,M,M std=S,S,S",
            help="Fold (x - mean) / std of the input into the first layer.",
            show_default=False,
        ),
    ] = None
    input_scale: Annotated[
        str | None,
        typer.Option(
            "--input-scale",
            metavar="X",
            help="Fold x * X, such as 1/255, into the first layer; before --normalize.",
            show_default=False,
        ),
    ] = None
    input_size: InputSize = None
    allow_border: Annotated[
        bool, typer.Option("--allow-border", help="Fuse even where outputs near the border would differ.")
    ] = False
    bias_map: Annotated[
        bool,
        typer.Option(
            "--bias-map",
            help="Where padding hides a bias, store one for each output (NAME.bias_map): exact at --input-size.",
        ),
    ] = False
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Fuse what `convtool plan` finds; with --model, and --input-size of its input."),
    ] = False
    fixed_size: FixedSize = False
    measure: Measure = False
    only_if_cheaper: Annotated[
        bool, typer.Option("--only-if-cheaper", help="Leave alone what would take more multiply-adds fused.")
    ] = False

    @property
    def size(self) -> tuple[int, ...] | None:
        """--input-size as numbers."""
        return parse_input_size(self.input_size)

    @property
    def chain(self) -> list[str]:
        """The layers by name, --normalize and --input-scale in front of them as the layer that they are."""
        return [*self._input_layer(), *(self.layers or ())]

    def check(self, model: str | None) -> None:
        """UsageError where the options don't go together.

        Args:
            model: what --model says.
        """
        chain = self.chain
        if self.recipe is None and not self.auto and (len(chain) < 2 or not self.layers):
            raise UsageError("expected two layers or more, first to last, a --recipe, or --auto with --model")
        if self.auto:
            self._check_auto(model)
        if self.recipe is not None and (chain or self.name):
            raise UsageError("--recipe names the layers; LAYERs, --name and --normalize don't go with it")
        if (self.fixed_size or self.measure) and not self.auto:
            raise UsageError(f"{'--fixed-size' if self.fixed_size else '--measure'}: goes with --auto")
        if self.strength is not None and (self.recipe is None or not isfinite(self.strength)):
            raise UsageError("--strength: expected a number, and a --recipe that adds a LoRA")
        if self.bias_map and (self.allow_border or self.size is None):
            raise UsageError("--bias-map: is exact at one size; give --input-size, and not --allow-border")

    def _check_auto(self, model: str | None) -> None:
        if model is None or self.size is None:
            raise UsageError("--auto: expected --model, and --input-size of the model's input, such as 3,224,224")
        others = {
            "LAYERs": self.layers,
            "--recipe": self.recipe,
            "--name": self.name,
            "--normalize": self.normalize,
            "--input-scale": self.input_scale,
            "--allow-border": self.allow_border,
            "--bias-map": self.bias_map,
        }
        for option, value in others.items():
            if value:
                raise UsageError(f"--auto: fuses what is exact in the --model; {option} doesn't go with it")

    def find_recipe(self) -> Recipe | None:
        """--recipe by its name or the path of its file; None where there is none."""
        if self.recipe is None:
            return None
        from convtool.fusing.recipe import parse_recipe
        from convtool.recipes import shipped

        known = shipped()
        if self.recipe in known:
            return known[self.recipe]
        if not self.recipe.endswith(".toml") and self.recipe != STREAM:
            near = did_you_mean(self.recipe, known, f"; expected one of {', '.join(known)}, or a .toml file")
            raise UsageError(f"--recipe: no recipe {self.recipe!r}{near}")
        return parse_recipe(read_toml(Path(self.recipe)), self.recipe)

    def _input_layer(self) -> list[str]:
        arguments: list[str] = []
        for text in self.normalize or ():
            key, equals, value = text.partition("=")
            again = any(one.startswith(f"{key}=") for one in arguments)
            if key not in ("mean", "std") or not equals or ";" in value or again:
                given = " ".join(self.normalize or ())
                raise UsageError(f"--normalize: expected mean=M,M,M std=S,S,S, got {given!r}")
            arguments.append(f"{key}={value}")
        if self.input_scale is not None:
            if ";" in self.input_scale:  # would go on as another argument of the layer
                raise UsageError(f"--input-scale: expected a number, such as 1/255, got {self.input_scale!r}")
            arguments.append(f"scale={self.input_scale}")
        return [f"normalize({'; '.join(arguments)})"] if arguments else []
