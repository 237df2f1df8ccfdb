"""What reaches the user: data on stdout, everything else on stderr, one JSON document where asked for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1


def printable(text: str) -> str:
    """The text with everything that could steer a terminal (names in a file are anybody's) written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Reporter:
    """How one run of a command speaks.

    Args:
        command: its name, for the JSON document.
        as_json: print one document on stdout and nothing else there.
        quiet: print no remarks on stderr.
    """

    def __init__(self, command: str, *, as_json: bool = False, quiet: bool = False) -> None:
        self.command = command
        self.as_json = as_json
        self.quiet = quiet

    def remark(self, text: str) -> None:
        """A line for people, on stderr."""
        if not (self.quiet or self.as_json):
            print(printable(text), file=sys.stderr)

    def result(self, document: dict[str, Any], human: Callable[[], None]) -> None:
        """The command's result: the document with --json, else what `human` prints."""
        if self.as_json:
            print_document({"schema": SCHEMA, "command": self.command, "ok": True, **document})
        else:
            human()

    def line(self, text: str) -> None:
        """A line of the result, on stdout."""
        print(printable(text))


def print_document(document: dict[str, Any]) -> None:
    """One JSON document on stdout, in plain ASCII and without NaN or Infinity, which JSON doesn't have."""
    print(json.dumps(_finite(document), indent=2))


def print_error(command: str | None, kind: str, code: int, message: str, *, as_json: bool) -> None:
    """A failure: one line on stderr, and with --json one document on stdout as well."""
    print(f"convtool: {printable(message)}", file=sys.stderr)
    if as_json:
        error = {"kind": kind, "exit_code": code, "message": message}
        print_document({"schema": SCHEMA, "command": command, "ok": False, "error": error})


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout: ruled and folded to the window on a terminal, plain aligned columns into a pipe."""
    if not sys.stdout.isatty():
        cells = [[printable(cell) for cell in row] for row in [columns, *rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for line in cells:
            padded = [
                cell.rjust(width) if name in right else cell.ljust(width)
                for cell, width, name in zip(line, widths, columns, strict=True)
            ]
            print("  ".join(padded).rstrip())
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ruled = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        ruled.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        ruled.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(ruled)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def tree_text(tree: dict[str, Any]) -> str:
    """The layers of a fusion, as its record has them, in words: 'a + (b + c | d)'."""
    if "chain" in tree:
        return " + ".join(tree_text(part) for part in tree["chain"])
    if "sum" in tree:
        return "(" + " | ".join(tree_text(part) for part in tree["sum"]) + ")"
    return f"{tree['origin']}:{tree['name']}" if "origin" in tree else str(tree["name"])


def stdout_styled() -> bool:
    """Whether stdout takes bold type: a terminal that isn't dumb, and nobody asked for none (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def bold(text: str, styled: bool) -> str:
    """The text in bold type where `styled`."""
    return f"\x1b[1m{text}\x1b[0m" if styled else text


def human_bytes(count: int) -> str:
    """1536 as '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)  # 'nan', 'inf': a string says so, and stays valid JSON
    return value
