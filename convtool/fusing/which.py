"""Which of the recipes that ship fit a checkpoint, and what each would fuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import full_name
from convtool.core.tree import leaves
from convtool.errors import ConvtoolError, UsageError
from convtool.fusing.named import by_recipe
from convtool.fusing.recipe import NothingFitsError, PlannedFusion, Recipe
from convtool.fusing.shipped import shipped
from convtool.kinds.stated import FieldSources


def fitting(checkpoints: Mapping[str, Checkpoint], fields: FieldSources) -> dict[str, list[PlannedFusion]]:
    """Return what each recipe would fuse, of those that fit; not those of which another does the same, or more."""
    found: dict[str, list[PlannedFusion]] = {}
    done: list[object] = []  # what each fuses, and what it says of the layers
    names = [name for opened in checkpoints.values() for name in opened.layers]
    for name, recipe in shipped().items():
        with suppress(ConvtoolError):
            stated = recipe.stated(names)
            made = by_recipe(recipe, checkpoints, fields.with_first(stated).fields)
            if (made, stated.tables) not in done:
                done.append((made, stated.tables))
                found[name] = made
    return {name: made for name, made in found.items() if not any(_does_more(other, made) for other in found.values())}


def the_one(checkpoints: Mapping[str, Checkpoint], fields: FieldSources) -> tuple[str, Recipe]:
    """Return the recipe that fits, with its name; UsageError, with the list, where there are several or none."""
    found = fitting(checkpoints, fields)
    if not found:
        raise UsageError("--recipe auto: none of the recipes that ship fits; `convtool fuse --list-recipes` lists them")
    if len(found) > 1:
        raise UsageError(
            f"--recipe auto: several recipes fit: {in_words(found)}; name the one of the library or the authors whose"
            " code builds the network, or give --auto with --model, which needs no recipe"
        )
    (name,) = found
    return name, shipped()[name]


def by_name(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    fields: FieldSources,
    leave: Sequence[str] = (),
    order: Sequence[str] | None = None,
) -> tuple[list[PlannedFusion], FieldSources]:
    """Return the fusions that a recipe means, and where fields come from then; see `by_recipe`."""
    names = [full_name(layer, one) for one, opened in checkpoints.items() for layer in opened.layers]
    stated = fields.with_first(recipe.stated(names))
    try:
        return by_recipe(recipe, checkpoints, stated.fields, leave, order), stated
    except NothingFitsError as error:
        fit = fitting(checkpoints, fields)
        raise UsageError(
            f"{error}; of the recipes that ship, {in_words(fit)} would fit" if fit else str(error)
        ) from None


def doing_more(
    chosen: Sequence[PlannedFusion], checkpoints: Mapping[str, Checkpoint], fields: FieldSources
) -> dict[str, list[PlannedFusion]]:
    """Return the recipes that would make fewer layers of what another one takes."""
    return {name: made for name, made in fitting(checkpoints, fields).items() if _does_more(made, chosen)}


def in_words(fusions: Mapping[str, Sequence[PlannedFusion]]) -> str:
    """Return recipes and what each would fuse."""
    several = (f"{name} ({len(made)} fusions, such as {made[0].name})" for name, made in fusions.items())
    return ", ".join(several).replace("(1 fusions, such as", "(1 fusion,")


def _does_more(one: Sequence[PlannedFusion], other: Sequence[PlannedFusion]) -> bool:
    """Return whether one takes more layers than another, or makes fewer of as many."""
    mine, its = ({ref.name for fusion in fusions for ref in leaves(fusion.tree)} for fusions in (one, other))
    written = {name for name in mine | its if "(" in name}
    mine, its = mine - written, its - written
    return mine > its or (mine == its and len(one) < len(other))
