"""AFTER without a record of what was fused: what is to be added to the command line, by what sets the files apart."""

from __future__ import annotations

import shlex
from contextlib import suppress

from convtool.checkpoint import Checkpoint
from convtool.core.names import some_of
from convtool.core.tree import BASE
from convtool.errors import UsageError
from convtool.formats.dtypes import FLOATS
from convtool.fusing.named import the_one
from convtool.kinds.stated import FieldSources


def check_recorded(before: Checkpoint, after: Checkpoint, sources: FieldSources, model: bool) -> None:
    """Raise UsageError, with the next command, where AFTER has no record and not the tensors that BEFORE has.

    Args:
        sources: fields of BEFORE's layers.
        model: the model's code is given.
    """
    if after.record is not None or (before.record is None and before.infos.keys() == after.infos.keys()):
        return
    what = f"{after.path}: holds no record of what was fused"
    if before.record is not None:
        swapped = shlex.join(("convtool", "verify", str(after.path), str(before.path)))
        raise UsageError(f"{what}, and {before.path} does; BEFORE comes first: {swapped}")
    gone = [name for name in before.layers if name not in after.layers]
    paste = "--model-input C,H,W" if model else _by_recipe(before, sources, gone) or "--model CODE --model-input C,H,W"
    paste += in_lower_precision(after)
    lacks = f", and lacks {some_of(gone)}" if gone else ", and has other tensors than BEFORE"
    raise UsageError(f"{what}{lacks}; name the layers with --before a,b --after c, or all at once: {paste}", paste)


def _by_recipe(before: Checkpoint, sources: FieldSources, gone: list[str]) -> str:
    """Return the options for the recipe that fits; '' where none does, or several do."""
    with suppress(UsageError):
        recipe = the_one({BASE: before}, sources)[0]
        stated = sources.with_first(recipe.stated(before.layers))
        norms = [name for name in gone if "eps" in before.layers[name].kind.fields]
        return "--recipe auto" + ("" if all("eps" in stated.fields(name) for name in norms) else " --eps VALUE")
    return ""


def in_lower_precision(after: Checkpoint) -> str:
    """Return the option for the precision in which other programs compute what AFTER stores; '' for float64."""
    stored = {info.dtype for info in after.infos.values()} & FLOATS
    return " --computed-in float32" if stored and "float64" not in stored else ""


def new_floats(before: Checkpoint, after: Checkpoint) -> set[str]:
    """Return the floating-point dtypes that AFTER has and BEFORE doesn't."""
    first, second = ({info.dtype for info in opened.infos.values()} for opened in (before, after))
    return (second - first) & FLOATS
