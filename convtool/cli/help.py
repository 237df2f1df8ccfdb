"""What `--help` prints: laid out here, since it has to start fast, fit narrow windows, and show whole examples."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from convtool.cli.options import OUTPUT
from convtool.cli.output import bold, window_columns

WIDEST = 100  # longer lines are hard to read
WIDEST_TERM = 24  # that an explanation stands beside, and not under;
NARROW = 64  # in a window of fewer columns than this,
SHORT = 10  # a term of no more than this
HYPHEN = "\u2011"  # in place of -, at which the formatter would break an option's name

# A word of a shell's line, or an option with its value.
_WORD = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+"""
_UNIT = re.compile(rf"-{_WORD} (?!-){_WORD}|{_WORD}")

Rows = Sequence[tuple[str, str]]


def summary(text: str | None) -> str:
    """The first paragraph of a command's help: its line in lists."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def page(command: Any, ctx: Any, sections: Iterable[tuple[str, Rows]]) -> str:
    """A page of help for the window: usage, the command's docstring, sections that aren't empty, and its examples.

    Args:
        command, ctx: as typer has them.
        sections: titles with their terms and explanations.
    """
    formatter, width = ctx.make_formatter(), min(window_columns(), WIDEST) - 1
    formatter.width = width
    usage = _folded(f"{ctx.command_path} {command.options_metavar}", width, " " * 7, " " * 9)
    formatter.write(f"{bold('Usage:')}{usage[6:]}\n\n")
    formatter.write_text(inspect.cleandoc(command.help))
    for title, rows in sections:
        if rows:
            under = width < NARROW and max(len(term) for term, _ in rows) > SHORT
            with formatter.section(bold(title)):
                whole = [(term, text.replace("-", HYPHEN)) for term, text in rows]
                formatter.write_dl(whole, 2 if under else WIDEST_TERM)
    with formatter.section(bold("Examples")):
        formatter.write("\n".join(_example(line, width) for line in command.epilog.strip().splitlines() if line))
    return str(formatter.getvalue()).replace(HYPHEN, "-").rstrip("\n")


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


def rows(params: Iterable[Any], kind: str) -> Rows:
    """The arguments among a command's parameters as ('CKPT', what it is), its options as ('-o, --out OUT', ...)."""
    shown = [param for param in params if param.param_type_name == kind and not param.hidden]
    if kind == "argument":
        return [(param.metavar or param.name.upper(), param.help or "") for param in shown]
    return [(_option_term(param), _option_text(param)) for param in shown]


def option_sections(params: Iterable[Any]) -> list[tuple[str, Rows]]:
    """The options among a command's parameters by the section that each is declared for; what is printed comes last."""
    sections: dict[str, list[Any]] = {}
    for param in params:
        panel = getattr(param, "rich_help_panel", None) or (OUTPUT if param.name == "help" else "Options")
        sections.setdefault(panel, []).append(param)
    return [(panel, rows(sections[panel], "option")) for panel in sorted(sections, key=OUTPUT.__eq__)]


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
