"""What a command is: options in, a result out, which is shown, or printed as one JSON document; and as typer has it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from convtool.cli import exit_codes
from convtool.cli.complete import one_of
from convtool.cli.document import whole_document
from convtool.cli.help import option_sections, page, rows, summary
from convtool.cli.options import OUTPUT, TYPER, Size, flag, option, spelled
from convtool.cli.output import Colour, Reporter, print_document
from convtool.cli.run import run, stdout_kept
from convtool.core.fields import parse_sizes
from convtool.errors import UsageError, did_you_mean
from convtool.formats.account import account

NUMBERS: dict[Any, str] = {int: "an integer", float: "a number"}

CONTEXT = "context"  # the parameter by which typer hands over its own,
TYPED = "convtool.typed"  # which has the words behind the command's name

Options = TypeVar("Options")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Command(Generic[Options, Result]):
    """A command.

    Attributes:
        usage: its arguments, for the help.
        examples: lines of shell, and comments.
        options: a frozen dataclass whose annotations are typer's; a field that is a dataclass in turn stands for its
            own fields, so that options which several commands have are declared once.
        run: does it; its docstring is the command's help, and what it returns, a frozen dataclass or one of several,
            is all that is said of the JSON document.
        show: prints a result for people.
        exit_code: of a result.
    """

    usage: str
    examples: str
    options: type[Options]
    run: Callable[[Options, Reporter], Result]
    show: Callable[[Result, Reporter], None]
    exit_code: Callable[[Result], int] = lambda result: exit_codes.OK

    def __call__(self, options: Options, reporter: Reporter) -> int:
        """Run the command and say what came of it."""
        with stdout_kept():
            result = self.run(options, reporter)
        account().check_unchanged()
        code = self.exit_code(result)
        if reporter.as_json:
            print_document(whole_document(reporter.command, result, code))
        elif not reporter.silent:
            reporter.lines(reporter.notes)
            self.show(result, reporter)
        return code

    def register(self, application: typer.Typer, name: str) -> None:
        """Make it a command of the application."""
        application.command(
            name, cls=Subcommand, options_metavar=f"{self.usage} [OPTIONS]", help=self.run.__doc__, epilog=self.examples
        )(self._function(name))

    def _function(self, name: str) -> Callable[..., int]:
        """Return a function with every option in its signature, which is where typer reads them."""

        def function(**given: Any) -> int:
            speech = _gathered(_Speech, given)
            typed = given[CONTEXT].meta[TYPED]
            reporter = Reporter(name, speech.as_json, speech.quiet, speech.color, typed=typed)
            return run(reporter, lambda: self(_gathered(self.options, given), reporter))

        function.declared = dict([*_declared(self.options), *_declared(_Speech)])  # type: ignore[attr-defined]
        parameters = [_parameter(one, *declared) for one, declared in function.declared.items()]  # type: ignore[attr-defined]
        parameters.append(inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        function.__annotations__ = {one.name: one.annotation for one in parameters}
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function


@dataclass(frozen=True, slots=True)
class _Speech:
    """How every command speaks."""

    as_json: bool = flag("Print one JSON document on stdout, also on failure.", "--json", panel=OUTPUT)
    quiet: bool = flag("Print no remarks on stderr. Results and assumptions are still printed.", "-q", panel=OUTPUT)
    color: Colour | None = option(
        "WHEN", "Whether a verdict is green or red: auto (on a terminal), always or never.", panel=OUTPUT
    )


@cache
def _hints(options: Any) -> Mapping[str, Any]:
    return get_type_hints(options)


def _declared(options: Any) -> Iterator[tuple[str, tuple[Any, list[Any]]]]:
    """Yield each option's name, and what typer is to know of it and the types that its value may have."""
    for field in fields(options):
        hint = _hints(options)[field.name]
        if is_dataclass(hint):
            yield from _declared(hint)
        else:
            yield field.name, (field.metadata[TYPER], _types(hint))


def _types(hint: Any) -> list[Any]:
    """Return a type, and what it is a union or a list of."""
    return [hint, *(one for part in get_args(hint) if get_origin(hint) is not tuple for one in _types(part))]


def _choices(kinds: list[Any]) -> tuple[str, ...]:
    return next((get_args(one) for one in kinds if get_origin(one) is Literal), ())


def _parameter(name: str, info: Any, kinds: list[Any]) -> inspect.Parameter:
    """Return an option as typer reads it, to whom all that isn't a flag is text."""
    info = copy.copy(info)
    if bool in kinds and not any(one.startswith("--") for one in info.param_decls):  # typer would add a --no-NAME
        info.param_decls = (spelled(name), *info.param_decls)
    if choices := _choices(kinds):
        info.autocompletion = one_of(*choices)
    listed = any(get_origin(one) is list for one in kinds)
    hint: Any = bool if bool in kinds else list[str] if listed else str
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=hint)


def _gathered(options: Any, given: Mapping[str, Any]) -> Any:
    """Return the options as one value of what was given for each."""
    hints = [(field.name, _hints(options)[field.name]) for field in fields(options)]
    return options(**{name: _gathered(hint, given) if is_dataclass(hint) else given[name] for name, hint in hints})


class Subcommand(TyperCommand):
    """A command as typer has it.

    Values are turned into what the annotations say here and not by typer, which imports pydantic for it: that takes as
    long as all the rest of listing a checkpoint.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        arguments = [param.name for param in self.params if param.param_type_name == "argument"]
        if ctx.resilient_parsing and not given.keys() & set(arguments):
            # The option that is being typed lacks its value, which ends the parser before it gets to the arguments.
            given |= dict(zip(arguments, rest, strict=False))
        declared = getattr(inspect.unwrap(self.callback), "declared", {}) if self.callback else {}
        missing: list[Any] = []
        for param in sorted(self.get_params(ctx), key=lambda param: not param.is_eager):
            value, source = param.consume_value(ctx, given)
            ctx.set_parameter_source(param.name, source)
            if param.name in declared and not ctx.resilient_parsing:  # as it is while the shell asks for completions
                if param.required and value in (None, ()):
                    missing.append(param)
                    continue
                value = _value(ctx, param, value, *declared[param.name])
            if param.callback is not None:
                value = param.callback(ctx, param, value)
            if param.expose_value:
                ctx.params[param.name] = value
        if missing:
            *others, last = map(_form, sorted(missing, key=lambda param: param.param_type_name))
            ctx.fail(f"expected {', '.join(others)} and {last}" if others else f"expected {last}: {missing[0].help}")
        if not ctx.resilient_parsing:
            if rest:
                other = "others" in ctx.params and Path(rest[0]).is_file()
                hint = f"; another checkpoint has a name: --with NAME={rest[0]}" if other else ""
                ctx.fail(f"expected no more arguments, got {' '.join(rest)}{hint}")
            self._check_order(ctx, declared)
        ctx.args, ctx.meta[TYPED] = rest, tuple(args)
        return rest

    def _check_order(self, ctx: typer.Context, declared: Mapping[str, Any]) -> None:
        """End with a usage error where a layer's name stands in a file's place, and the file further on."""
        arguments = [param for param in self.params if param.param_type_name == "argument" and param.name in declared]
        paths = [param for param in arguments if Path in declared[param.name][1]]
        given = [ctx.params.get(param.name) for param in arguments if param not in paths]
        words = [word for one in given for word in (one if isinstance(one, list) else [one]) if word]
        for param in paths[:1]:
            path, file = ctx.params.get(param.name), next((word for word in words if Path(word).is_file()), None)
            if path and file and not path.exists():
                ctx.fail(f"expected {_form(param)} first: there is no file {path}, and {file} is one")

    def get_help(self, ctx: typer.Context) -> str:  # type: ignore[override]
        sections = [("Arguments", rows(self.params, "argument")), *option_sections(self.get_params(ctx))]
        return page(self, ctx, sections)


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
        # `convtool.cli.app` reads it.
        commands.append(("help", "Show this page, or that of a COMMAND, as --help does."))
        options, codes = rows(self.get_params(ctx), "option"), list(exit_codes.MEANINGS.items())
        sections = [("Commands", commands), ("Options", options), ("Exit codes", codes)]
        return page(self, ctx, sections)


def _form(param: Any) -> str:
    """Return what a message calls an option or an argument."""
    longest: str = max(param.opts, key=len)
    return longest if param.param_type_name == "option" else param.metavar or param.name.upper()


def _value(ctx: typer.Context, param: Any, given: Any, info: Any, kinds: list[Any]) -> Any:
    """Return the value of what was given; end with a usage error, or raise UsageError, where there is none."""
    is_option, form, name = param.param_type_name == "option", param.metavar or param.name.upper(), _form(param)
    if given is None or given == ():
        return None
    said = given if isinstance(given, list | tuple) else (given,)
    if "" in said and (is_option or Path in kinds):
        # As a path it would be the current folder, and what else it should mean nobody can tell.
        ctx.fail(f"{f'{name}: ' if is_option else ''}expected {form.strip('[]')}, got an empty string")
    values = [_read(ctx, name, one, info.parser or (parse_sizes if Size in kinds else None), kinds) for one in said]
    return values if any(get_origin(one) is list for one in kinds) else values[0]


def _read(ctx: typer.Context, name: str, text: Any, parse: Callable[[str, str], Any] | None, kinds: list[Any]) -> Any:
    choices, wanted = _choices(kinds), next((one for one in kinds if one in (Path, int, float)), None)
    if choices and text not in choices:
        raise UsageError(f"{name}: expected {', '.join(choices[:-1])} or {choices[-1]}, got {text!r}")
    if parse is not None:
        return parse(text, name)
    try:
        return text if wanted is None else wanted(text)
    except ValueError:
        ctx.fail(f"{name}: expected {NUMBERS[wanted]}, got {text!r}")
