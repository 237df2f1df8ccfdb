"""What the shell completes: layer names from the checkpoint that the line names already, fields, recipes.

Nothing here may fail or print: a line that is still being typed is no error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from convtool.errors import ConvtoolError
from convtool.kinds import field_types

Completion = Callable[[typer.Context, list[str], str], list[str]]
SHELL = frozenset(" '\"\\$`;&|<>()*?![]{}~#^")  # characters that mean something in bash, zsh or fish
CHECKPOINTS = ("checkpoint", "before", "after")  # what commands call the checkpoints that they take


def layers(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Layers of the line's first checkpoint that begin as typed."""
    return _beginning(incomplete, _layers(ctx, CHECKPOINTS))


def chain_of(checkpoint: str) -> Completion:
    """Layers of one of the line's checkpoints, in a list with commas: the last one is being typed."""

    def complete(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
        done, comma, _ = incomplete.rpartition(",")
        return _beginning(incomplete, (f"{done}{comma}{name}" for name in _layers(ctx, (checkpoint,))))

    return complete


def settings(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """LAYER.FIELD= of the line's first checkpoint."""
    return _beginning(incomplete, (f"{name}.{field}=" for name in _layers(ctx, CHECKPOINTS) for field in field_types()))


def recipes(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Recipes that ship with convtool; a file's name is the shell's to complete."""
    from convtool.fusing.shipped import shipped

    return _beginning(incomplete, shipped())


def topics(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Pages of the manual."""
    from convtool.manual import topics

    return _beginning(incomplete, topics())


def one_of(*choices: str) -> Completion:
    """Some fixed words."""
    return lambda ctx, args, incomplete: _beginning(incomplete, choices)


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    # What is completed goes into a command line as it is, and zsh has it run through eval: a name with what a shell
    # takes apart or carries out, or that would pass for an option, is for the user to type and quote.
    return [
        name
        for name in names
        if name.startswith(incomplete) and name.isprintable() and not set(name) & SHELL and name[:1] not in ("-", "=")
    ]


def _layers(ctx: typer.Context, which: Iterable[str]) -> list[str]:
    from convtool.checkpoint import open_checkpoint

    given = next((path for name in which if (path := ctx.params.get(name))), None)
    with contextlib.suppress(ConvtoolError, OSError):
        opened = None if given is None else open_checkpoint(Path(given), ctx.params.get("root"))
        return [name for name in opened.layers if name] if opened is not None else []
    return []
