"""The kinds of command that the application is made of: how they take their values, and what their help shows."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from convtool.cli import exit_codes
from convtool.cli.help import argument_rows, option_rows, page, summary
from convtool.errors import did_you_mean

NUMBERS: dict[Any, str] = {int: "an integer", float: "a number"}


class Command(TyperCommand):
    """A subcommand.

    Values are turned into what the function's annotations say here and not by typer, which imports pydantic for it:
    that takes as long as all the rest of listing a checkpoint.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        arguments = [param.name for param in self.params if param.param_type_name == "argument"]
        if ctx.resilient_parsing and not given.keys() & set(arguments):
            # The option that is being typed lacks its value, which ends the parser before it gets to the arguments.
            given |= dict(zip(arguments, rest, strict=False))
        wanted = get_type_hints(inspect.unwrap(self.callback)) if self.callback else {}
        for param in sorted(self.get_params(ctx), key=lambda param: not param.is_eager):
            value, source = param.consume_value(ctx, given)
            ctx.set_parameter_source(param.name, source)
            if not ctx.resilient_parsing:  # as it is while the shell asks for completions
                value = _value(ctx, param, value, wanted.get(param.name, bool))
            if param.callback is not None:
                value = param.callback(ctx, param, value)
            if param.expose_value:
                ctx.params[param.name] = value
        if rest and not ctx.resilient_parsing:
            ctx.fail(f"expected no more arguments, got {' '.join(rest)}")
        ctx.args = rest
        return rest

    def get_help(self, ctx: typer.Context) -> str:  # type: ignore[override]
        sections = [("Arguments", argument_rows(self.params)), ("Options", option_rows(self.get_params(ctx)))]
        return page(f"{ctx.command_path} {self.options_metavar}", self.help or "", sections, self.epilog or "")


class Group(TyperGroup):
    """The program itself: it names the nearest command for one that doesn't exist."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        for param in self.get_params(ctx):
            if param.default is None:  # of the flags for completion; typer would have pydantic look at it
                param.default = False
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"no command {name!r}{did_you_mean(name, self.commands)}")
        return super().resolve_command(ctx, args)

    def get_help(self, ctx: typer.Context) -> str:  # type: ignore[override]
        commands = [(name, summary(command.help)) for name, command in self.commands.items()]
        codes = [(str(code), meaning) for code, meaning in exit_codes.MEANINGS.items()]
        sections = [("Commands", commands), ("Options", option_rows(self.get_params(ctx))), ("Exit codes", codes)]
        return page(f"{ctx.command_path} {self.options_metavar}", self.help or "", sections, self.epilog or "")


def _value(ctx: typer.Context, param: Any, given: Any, wanted: Any) -> Any:
    """What was given, as the annotation wants it; ends with a usage error where it can't be."""
    name = max(param.opts, key=len) if param.param_type_name == "option" else param.metavar or param.name.upper()
    if given is None or given == ():
        if param.required:
            ctx.fail(f"expected {name}: {param.help}")
        return None
    said = given if isinstance(given, list | tuple) else (given,)
    if "" in said and (param.param_type_name == "option" or wanted in (Path, Path | None)):
        # As a path it would be the current folder, and what else it should mean nobody can tell.
        form = (param.metavar or param.name.upper()).strip("[]")
        ctx.fail(f"{f'{name}: ' if param.param_type_name == 'option' else ''}expected {form}, got an empty string")
    if get_origin(wanted) in (Union, types.UnionType):
        wanted = next(one for one in get_args(wanted) if one is not type(None))
    if get_origin(wanted) is list:
        return [_converted(ctx, name, item, get_args(wanted)[0]) for item in given]
    if get_origin(wanted) is tuple:
        return tuple(_converted(ctx, name, item, one) for item, one in zip(given, get_args(wanted), strict=True))
    return _converted(ctx, name, given, wanted)


def _converted(ctx: typer.Context, name: str, given: Any, wanted: Callable[[Any], Any]) -> Any:
    if wanted in (Path, int, float):
        try:
            return wanted(given)
        except ValueError:
            ctx.fail(f"{name}: expected {NUMBERS[wanted]}, got {given!r}")
    return given
