"""What `--help` prints: laid out here, since it has to start fast, fit narrow windows, and show whole examples."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from convtool.cli.output import bold, stdout_styled, window_columns

WIDEST = 100  # longer lines are hard to read
TERM_COLUMN = 28  # where explanations begin
NARROW = 64  # below this many columns an explanation stands under its term,
SHORT = 14  # unless the terms take no more than this

# A word of a shell's line, or an option with its value.
_WORD = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+"""
_UNIT = re.compile(rf"-{_WORD} (?!-){_WORD}|{_WORD}")

Rows = Sequence[tuple[str, str]]


def summary(text: str | None) -> str:
    """The first paragraph of a command's help: its line in lists."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def page(usage: str, text: str, sections: Iterable[tuple[str, Rows]], examples: str) -> str:
    """A page of help for the window.

    Args:
        usage: the command line in general.
        text: the command's docstring.
        sections: titles with their terms and explanations; empty ones are left out.
        examples: lines of shell, and comments.
    """
    width = min(window_columns(), WIDEST) - 1
    styled = stdout_styled()
    blocks = [bold("Usage:", styled) + _folded(usage, width, " " * 7, " " * 9)[6:]]
    blocks += [textwrap.fill(" ".join(part.split()), width) for part in inspect.cleandoc(text).split("\n\n")]
    blocks += [f"{bold(f'{title}:', styled)}\n{_definitions(rows, width)}" for title, rows in sections if rows]
    if examples:
        lines = "\n".join(_example(line, width) for line in examples.strip().splitlines() if line)
        blocks.append(f"{bold('Examples:', styled)}\n{lines}")
    return "\n\n".join(blocks)


def _definitions(rows: Rows, width: int) -> str:
    """Terms with their explanations beside them, or under them where the window is narrow."""
    lines = []
    column = min(TERM_COLUMN, max(len(term) for term, _ in rows) + 4)
    for term, text in rows:
        if width < NARROW and column > SHORT:
            lines += [f"  {term}", textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        elif len(term) + 4 > column:
            lines += [
                f"  {term}",
                textwrap.fill(text, width, initial_indent=" " * column, subsequent_indent=" " * column),
            ]
        else:
            lines.append(
                textwrap.fill(text, width, initial_indent=f"  {term}".ljust(column), subsequent_indent=" " * column)
            )
    return "\n".join(lines)


def _example(line: str, width: int) -> str:
    """A line of shell, or of comment, folded so that it can still be copied."""
    if line.startswith("#"):
        return textwrap.fill(line[1:].strip(), width, initial_indent="  # ", subsequent_indent="  # ")
    return _folded(line, width - 2, "  ", "      ", end=" \\")


def _folded(line: str, width: int, first: str, then: str, end: str = "") -> str:
    """A command line over as many lines as it takes: an option stays with its value, quotes stay whole."""
    lines = [first.rstrip(" ")]
    units = _UNIT.findall(line)
    fitting = [[unit] if len(then) + len(unit) <= width else re.findall(_WORD, unit) for unit in units]
    for unit in itertools.chain.from_iterable(fitting):
        if lines[-1].strip() and len(lines[-1]) + 1 + len(unit) > width:
            lines.append(then + unit)
        else:
            lines[-1] = f"{lines[-1]} {unit}" if lines[-1].strip() else (then if len(lines) > 1 else first) + unit
    return f"{end}\n".join(lines)


def argument_rows(params: Iterable[Any]) -> Rows:
    """The arguments among a command's parameters as ('CKPT', what it is)."""
    return [
        (param.metavar or param.name.upper(), param.help or "")
        for param in params
        if param.param_type_name == "argument" and not param.hidden
    ]


def option_rows(params: Iterable[Any]) -> Rows:
    """The options among a command's parameters as ('-o, --out OUT', what it does)."""
    return [
        (_option_term(param), _option_text(param))
        for param in params
        if param.param_type_name == "option" and not param.hidden
    ]


def _option_term(param: Any) -> str:
    names = sorted(param.opts, key=lambda name: name.startswith("--"))
    value = "" if param.is_flag else f" {param.metavar or names[-1].rpartition('-')[2].upper()}"
    return ", ".join(names) + value


def _option_text(param: Any) -> str:
    said = param.help or ""
    if param.required:
        return f"{said} Required."
    if param.show_default and not param.is_flag and param.default is not None:
        return f"{said} Default: {param.default}."
    return said
