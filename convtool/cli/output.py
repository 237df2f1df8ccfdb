"""What reaches the user: data on stdout, everything else on stderr, one JSON document where asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias

from convtool.cli import exit_codes
from convtool.cli.document import Error, Failure, to_json, whole_document
from convtool.errors import OutputError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

PATIENCE = 1.0  # seconds that work may take before a bar shows its progress
GAP = 2  # blanks between two columns of a table
NARROW = 64  # columns that a bar with all that it tells takes; below, it is percent and time
NARROWEST = 24  # columns that the last one of a table may be folded to
ALL = "a pipe gets all of them, such as | less"

Advance: TypeAlias = Callable[[float], None]
Unit: TypeAlias = Literal["bytes", "share"]
Colour: TypeAlias = Literal["auto", "always", "never"]


class StdoutError(OutputError):
    """What was to be printed could not be: there is nowhere left to say anything but stderr."""


def printable(text: str) -> str:
    """The text with everything that could steer a terminal (names in a file are anybody's) written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def times(size: Sequence[int] | None) -> str:
    """Return sizes as '3x8x8'."""
    return "x".join(map(str, size or ()))


@dataclass(slots=True)
class Reporter:
    """How one run of a command speaks.

    Attributes:
        command: its name, for the JSON document.
        as_json: print one document on stdout and nothing else there.
        quiet: print no remarks on stderr.
        colour: of a verdict; "auto" has it on a terminal, unless NO_COLOR or TERM says otherwise.
        silent: say nothing but errors.
        notes: what is printed before the result.
    """

    command: str
    as_json: bool = False
    quiet: bool = False
    colour: Colour | None = None
    silent: bool = False
    notes: list[str] = field(default_factory=list)

    def silence(self) -> None:
        """Say nothing but errors from now on: another process of the same launch speaks for all."""
        self.silent, self.quiet, self.as_json = True, True, False

    def remark(self, text: str) -> None:
        """A line for people, on stderr."""
        if not (self.quiet or self.as_json):
            say(printable(text))

    def note(self, text: str) -> None:
        """Keep what a result rests on or leaves undone: it is printed with the result, also where remarks aren't."""
        self.notes.append(text)

    def line(self, text: str) -> None:
        """A line of the result, on stdout."""
        emit(_fitting(printable(text), sys.stdout))

    def lines(self, texts: Sequence[str], most: int | None = None) -> None:
        """Lines of the result; on a terminal `most` of them and the number of the others."""
        some = texts[: most if sys.stdout.isatty() else None]
        for text in some:
            self.line(text)
        if len(some) < len(texts):
            self.line(f"... and {len(texts) - len(some)} more; {ALL}")

    def verdict(self, text: str, *, good: bool) -> None:
        """A line of the result on which the exit code rests: in green or red where colours are wanted."""
        line = _fitting(printable(text), sys.stdout)
        emit(f"\x1b[{32 if good else 31}m{line}\x1b[0m" if stdout_coloured(self.colour) else line)

    @contextlib.contextmanager
    def progress(self, what: str, total: float | None, unit: Unit = "bytes") -> Iterator[Advance]:
        """A bar with rate and remaining time, on a terminal's stderr, once the work has taken longer than a second.

        Args:
            what: is being done, in a word or two.
            total: how many units there are; None where nobody knows.
            unit: what is counted; a share is of so many pieces of work, and shown in percent.

        Yields:
            what to call with the number of units done since the last call.
        """
        if self.quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            yield lambda count: None
            return
        done = 0.0
        shown: list[tuple[Progress, TaskID]] = []

        def show() -> None:
            bar = _progress(unit, known=bool(total))
            shown.append((bar, bar.add_task(printable(what), total=total or None)))
            advance(0)
            bar.start()

        def advance(count: float) -> None:
            nonlocal done
            done += count
            for bar, task in shown:
                bar.update(task, completed=done)

        waiting = threading.Timer(PATIENCE, show)  # whatever the work does meanwhile
        waiting.daemon = True
        waiting.start()
        try:
            yield advance
        finally:
            waiting.cancel()
            waiting.join()  # a bar that is just appearing is stopped as well
            for bar, _ in shown:
                bar.stop()


def _progress(unit: Unit, *, known: bool) -> Progress:
    """Return a bar with what is done, how much of it, the rate where it is bytes, and the remaining time.

    In a narrow window it has what is done, percent and time. What else is printed meanwhile goes its own way: the
    streams are nobody's to replace in the midst of a run.
    """
    from rich import progress
    from rich.console import Console

    window = window_columns()
    percent = unit == "share" or window < NARROW
    size: list[ProgressColumn] = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    done = [progress.TaskProgressColumn()] if percent else size
    columns: list[ProgressColumn] = [progress.TextColumn("{task.description}", markup=False)]
    columns += [progress.BarColumn(20)] if window >= NARROW else []
    columns += [*done, progress.TimeRemainingColumn()] if known else [progress.TimeElapsedColumn()]
    # Without colours, none of which shows on every background.
    console = Console(file=sys.stderr, width=window, no_color=True)
    return progress.Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def emit(text: str, end: str = "\n") -> None:
    """Text on stdout.

    Raises:
        StdoutError: it could not be written, as to a full disk; a reader that went away is a BrokenPipeError as ever.
    """
    try:
        print(text, end=end)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(f"stdout: could not be written: {error.strerror or error}") from None


def say(text: str) -> None:
    """A line on stderr; where it can't be written, what is being done goes on all the same."""
    try:
        print(_fitting(text, sys.stderr), file=sys.stderr)
    except (OSError, ValueError):
        leave(sys.stderr)


def leave(stream: TextIO) -> None:
    """Let a stream that can't be written go nowhere: Python flushes it once more at exit, and would complain there."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_document(document: Mapping[str, Any]) -> None:
    """Print the one JSON document on stdout, in plain ASCII and without NaN or Infinity, which JSON doesn't have."""
    text = json.dumps(to_json(document), indent=2)
    # Shapes on one line: inside a string no line ends, so that what this finds are lists of numbers.
    emit(re.sub(r"\[\n\s*([-+.\de,\s]+?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text))


def print_error(command: str | None, kind: str, message: str, *, as_json: bool) -> int:
    """Print a failure, one line on stderr and with --json one document on stdout as well, and return its exit code."""
    code = exit_codes.FAILURES[kind]
    say(f"convtool: {printable(message)}")
    if as_json:
        print_document(whole_document(command, Failure(Error(kind, code, message)), code))
    return code


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), most: int | None = None
) -> None:
    """A table on stdout: aligned columns; in a window too narrow for them the last one is folded, or each row is.

    A pipe gets whole lines, however long, and all of them; a terminal `most` rows and the number of the others.
    """
    if most is not None and len(rows) > most and sys.stdout.isatty():
        table(columns, rows[:most], right=right)
        emit(f"... and {len(rows) - most} more; {ALL}")
        return
    cells = [[printable(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    left = window_columns() - 1 - sum(widths[:-1]) - GAP * (len(widths) - 1) if sys.stdout.isatty() else widths[-1]
    if left < min(NARROWEST, widths[-1]):
        for name, *others in cells[1:]:
            emit(bold(_folded(name, window_columns(), "  "), stdout_styled()))
            said = "; ".join(f"{column} {cell}" for column, cell in zip(columns[1:], others, strict=True) if cell)
            emit(_folded(f"  {said}", window_columns() - 1, "    "))
        return
    for number, row in enumerate(cells):
        aligned = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        before = "".join(cell + " " * GAP for cell in aligned[:-1])
        for line in textwrap.wrap(aligned[-1].rstrip(), left, break_on_hyphens=False) or [""]:
            emit(bold(f"{before}{line}".rstrip(), stdout_styled() and number == 0))
            before = " " * len(before)


def markdown(text: str) -> None:
    """Markdown on stdout: laid out on a terminal, as it is in a pipe."""
    if not sys.stdout.isatty():
        emit(text, end="")
        return
    import io

    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(file=io.StringIO(), width=window_columns(), force_terminal=stdout_styled(), no_color=True)
    console.print(Markdown(text, code_theme="bw", hyperlinks=False))
    emit(console.file.getvalue(), end="")  # type: ignore[attr-defined]


def _fitting(line: str, stream: TextIO) -> str:
    """The line, on a terminal folded between words instead of anywhere."""
    return _folded(line, window_columns(), " " * (len(line) - len(line.lstrip()) + 2)) if stream.isatty() else line


def _folded(text: str, width: int, indent: str) -> str:
    """The text in lines of a width, between words, all but the first indented."""
    how = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, max(width, 20), subsequent_indent=indent, **how)  # type: ignore[arg-type]


def window_columns() -> int:
    """The window's width: what COLUMNS says, or the terminal behind stdout, stderr or stdin; 80 without one."""
    with contextlib.suppress(ValueError):
        if (told := int(os.environ.get("COLUMNS", ""))) > 0:
            return told
    for descriptor in (1, 2, 0):
        with contextlib.suppress(OSError):
            if (columns := os.get_terminal_size(descriptor).columns) > 0:
                return columns
    return 80


def stdout_styled() -> bool:
    """Whether stdout takes bold type: a terminal that isn't dumb, and nobody asked for none (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def stdout_coloured(wanted: Colour | None) -> bool:
    """Whether a verdict has a colour."""
    return wanted == "always" or (wanted != "never" and stdout_styled())


def bold(text: str, styled: bool) -> str:
    """The text in bold type where `styled`."""
    return f"\x1b[1m{text}\x1b[0m" if styled else text
