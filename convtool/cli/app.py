"""The Typer application: one line per command."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from convtool import __version__
from convtool.cli import exit_codes, fuse, inspect, toeplitz, verify
from convtool.cli.output import print_error

# A command's exit code is its return value; errors have been dealt with by then (convtool.cli.run).
app = typer.Typer(
    name="convtool",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="[dim]Exit codes: "
    + "; ".join(f"{code} {meaning}" for code, meaning in exit_codes.MEANINGS.items())
    + ".[/dim]",
)

for module in (inspect, toeplitz, fuse, verify):
    app.command(module.NAME, epilog=module.EXAMPLES)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"convtool {__version__}")
        raise typer.Exit


@app.callback()
def convtool(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact linear algebra on the convolutions inside saved checkpoints.

    Writes a layer's Toeplitz matrix, fuses linear chains into one layer, proves that two checkpoints compute the same,
    and writes the new checkpoint: from the checkpoint alone.
    """


def run_app(arguments: list[str]) -> int:
    """Run the command line and give its exit code."""
    try:
        result: Any = app(args=arguments, prog_name="convtool", standalone_mode=False)
    except typer.Abort:
        return exit_codes.INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage(error, arguments)
    return result if isinstance(result, int) else exit_codes.OK


def _usage(error: Any, arguments: list[str]) -> int:
    """What typer found wrong with the command line; it says so in a message of its own, which loses --json."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return exit_codes.USAGE
    message = str(error.format_message())
    path = context.command_path if context else "convtool"
    text = f"{message[:1].lower()}{message[1:].rstrip('.')} (see `{path} --help`)"
    command = next((word for word in arguments if not word.startswith("-")), None)
    print_error(command, "usage", exit_codes.USAGE, text, as_json="--json" in arguments)
    return exit_codes.USAGE
