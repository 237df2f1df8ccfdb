"""The application: a line per command."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from convtool import __version__
from convtool.cli import exit_codes
from convtool.cli.command import Command, Group
from convtool.cli.output import StdoutError, print_error
from convtool.cli.run import bug, flushed
from convtool.errors import UsageError, did_you_mean
from convtool.formats.resources import ran_out

PROGRAM = "convtool"
COMPLETE = "_CONVTOOL_COMPLETE"  # set by the shell when it asks for completions

# In the order of --help; each is the COMMAND of the module of its name.
NAMES = ("inspect", "toeplitz", "unfold", "spectrum", "plan", "fuse", "verify", "convert", "manual")
COMMANDS = {name: f"convtool.cli.{name}" for name in NAMES}


def find_command(name: str) -> Command[Any, Any]:
    """Return the command of that name."""
    found: Command[Any, Any] = importlib.import_module(COMMANDS[name]).COMMAND
    return found


def application(names: Iterable[str]) -> typer.Typer:
    """Return the application with these commands, each of which takes time to import and to build."""
    # A command's exit code is its return value; errors have been dealt with by then (convtool.cli.run).
    made = typer.Typer(
        name=PROGRAM,
        cls=Group,
        options_metavar="COMMAND ...",
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,  # importing rich would take longer than all the rest of --help
        pretty_exceptions_enable=False,
        epilog="convtool help fuse\nconvtool manual\nconvtool inspect model.safetensors",
    )
    made.callback()(convtool)
    for name in names:
        find_command(name).register(made, name)
    return made


def _version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def convtool(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact linear algebra on the convolutions inside saved checkpoints.

    Writes a layer's Toeplitz matrix, fuses linear chains into one layer, proves that two checkpoints compute the same,
    and writes the new checkpoint: from the checkpoint alone.
    """


def run_app(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    return flushed(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:  # as git and others have it
        arguments = [*arguments[1:2], "--help"]
    alone = arguments[:1] if arguments[:1] and arguments[0] in COMMANDS and COMPLETE not in os.environ else None
    try:
        return _parse_and_call(typer.main.get_command(application(alone or COMMANDS)), arguments)
    except (OSError, StdoutError):
        raise  # of stdout: whatever a command runs into has been dealt with
    except Exception as error:
        if outside := ran_out(error):  # while an option's value was read
            return print_error(arguments[0], "input", outside, as_json="--json" in arguments)
        return bug(error, None, as_json="--json" in arguments)


def _parse_and_call(command: Any, arguments: list[str]) -> int:
    if COMPLETE in os.environ:
        return _complete(command)
    if not arguments:
        with contextlib.redirect_stdout(sys.stderr):
            _parse_and_call(command, ["--help"])
        return exit_codes.USAGE
    try:
        # What `command.main` does, less its own ways with errors, which exit with 1 on a broken pipe.
        with command.make_context(PROGRAM, list(arguments)) as context:
            result: Any = command.invoke(context)
    except typer.Exit as stop:
        return exit_codes.USAGE if stop.exit_code else exit_codes.OK
    except (typer.Abort, KeyboardInterrupt):
        return exit_codes.INTERRUPTED
    except UsageError as error:  # of an option's value
        return print_error(arguments[0], "usage", str(error), as_json="--json" in arguments)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage(error, arguments)
    return result if isinstance(result, int) else exit_codes.OK


def _complete(command: Any) -> int:
    try:
        command.main(args=[], prog_name=PROGRAM, complete_var=COMPLETE)
    except SystemExit as stop:
        return exit_codes.USAGE if stop.code else exit_codes.OK
    return exit_codes.OK


def _usage(error: Any, arguments: list[str]) -> int:
    """Say what typer found wrong with the command line; it does in a message of its own, which loses --json."""
    message = _message(error)
    command = next((word for word in arguments if not word.startswith("-")), None)
    path = f"{PROGRAM} {command}" if command in COMMANDS else PROGRAM
    text = f"{message[:1].lower()}{message[1:].rstrip('.')} (see `{path} --help`)"
    return print_error(command, "usage", text, as_json="--json" in arguments)


def _message(error: Any) -> str:
    if type(error).__name__ == "NoSuchOption":
        from convtool.kinds import field_types

        options = [name for param in error.ctx.command.params for name in param.opts if name.startswith("--")]
        field = error.option_name.lstrip("-").replace("-", "_")
        if field in field_types() and "--set" in options:
            return f"no such option: {error.option_name}; say --set LAYER.{field}=VALUE, for each layer that it is of"
        return f"no such option: {error.option_name}" + did_you_mean(error.option_name, options, cutoff=0.75)
    return str(error.format_message())
