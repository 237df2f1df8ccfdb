"""What reaches the user: data on stdout, everything else on stderr, one JSON document where asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
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
NOTHING = "-"  # in a table's cell; without its column it says nothing
KEPT = "\u00a0"  # a blank at which no line ends; what is printable has none of its own
AT_NUMBERS = re.compile(r" (?=[\d→]|[KMGT]?i?B\b)|(?<=\d →) ")  # 'padding 1', '1.5 KiB', '8 → 4'
COMMAND = re.compile(r"(?<=: )convtool \w+ .*")  # at the end of a message or of a clause, to be pasted
CLAUSE = re.compile(r"; (?![^()]*\))")  # not those in 'normalize(mean=.5; std=.2)'
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


def change(before: float, after: float) -> str:
    """Return a number before and after; in full where the short forms would be the same, or nearly."""
    if before == after:
        return amount(before)
    short, full = (amount(before), amount(after)), (f"{before:.0f}", f"{after:.0f}")
    near = 10**5 <= before < 10**7 and 10 * abs(before - after) <= before  # three digits would hide by how much
    return " → ".join(full if near or len({*short}) == 1 else short)


def amount(number: float) -> str:
    """Return a number up to 99999 in full, to two places where it isn't whole; then with three digits and a unit."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 100 * max(size, 1000) or (number >= size and number >= 10**6):
            return f"{number / size:.3g} {unit}"
    return str(int(number)) if number == int(number) else f"{number:.2f}"


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
        typed: the words behind the command's name.
    """

    command: str
    as_json: bool = False
    quiet: bool = False
    colour: Colour | None = None
    silent: bool = False
    notes: list[str] = field(default_factory=list)
    typed: Sequence[str] = ()

    def silence(self) -> None:
        """Say nothing but errors from now on: another process of the same launch speaks for all."""
        self.silent, self.quiet, self.as_json = True, True, False

    def remark(self, *texts: str) -> None:
        """Lines for people, on stderr."""
        for text in () if self.quiet or self.as_json else texts:
            say(printable(text))

    def note(self, *texts: str) -> None:
        """Keep what a result rests on or leaves undone: it is printed with the result, also where remarks aren't."""
        self.notes.extend(texts)

    def again(self, options: str) -> str:
        """Return the whole command line with more options."""
        words, end = list(self.typed), self.typed.index("--") if "--" in self.typed else len(self.typed)
        parts = (f"convtool {self.command}", shlex.join(words[:end]), options, shlex.join(words[end:]))
        return " ".join(part for part in parts if part)

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
        coloured = self.colour == "always" or (self.colour != "never" and stdout_styled())
        emit(f"\x1b[{32 if good else 31}m{line}\x1b[0m" if coloured else line)

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
    """A line on stderr, its clauses on a terminal below each other where it is too long for one.

    Where it can't be written, what is being done goes on all the same.
    """
    try:
        lines = [text]
        if sys.stderr.isatty() and len(text) >= window_columns():
            lines = CLAUSE.sub(";\n  ", text).split("\n")
        print("\n".join(_fitting(line, sys.stderr) for line in lines), file=sys.stderr)
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

    What all rows have in common is said once below it, where that makes room. A pipe gets whole lines, however long,
    and all of them; a terminal `most` rows and the number of the others.
    """
    window = window_columns() - 1 if sys.stdout.isatty() else None
    cells = [[printable(cell) for cell in row] for row in [columns, *rows[: None if window is None else most]]]
    same = [] if window is None or sum(_widths(cells)) <= window else _same([columns, *rows])
    shown = [[cell for i, cell in enumerate(row) if i not in same] for row in cells]
    for line in _aligned(shown, right, window) or _paragraphs(shown):
        emit(line)
    if said := "; ".join(f"{cells[0][i]} {cells[1][i]}" for i in same if cells[1][i] != NOTHING):
        emit(_folded(f"of all: {said}", window_columns(), "  "))
    if len(cells) - 1 < len(rows):
        emit(f"... and {len(rows) - len(cells) + 1} more; {ALL}")


def _same(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the columns, apart from the first, that have one value in all of several rows."""
    body = cells[1:]
    return [i for i in range(1, len(cells[0])) if len(body) > 2 and body[0][i] and len({row[i] for row in body}) == 1]


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the columns' widths, with the gap after all but the last."""
    *widths, last = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [*(width + GAP for width in widths), last]


def _aligned(cells: Sequence[Sequence[str]], right: Sequence[str], window: int | None) -> list[str] | None:
    """Return a table's lines, the last column folded; None where it has no room, or paragraphs are shorter."""
    columns, widths = cells[0], _widths(cells)
    room = widths[-1] if window is None else window - sum(widths[:-1])
    words = [cell for row in cells for cell in ([row[-1]] if columns[-1] in right else row[-1].split())]
    if room < max(map(len, words)):
        return None
    lines = []
    for row in cells:
        before = "".join(
            (cell.rjust(width - GAP) if name in right else cell).ljust(width)
            for cell, width, name in zip(row[:-1], widths, columns, strict=False)
        )
        last = row[-1].rjust(widths[-1]) if columns[-1] in right else row[-1]
        for line in _folded(last, room, "").splitlines() or [""]:
            lines.append(f"{before}{line}".rstrip())
            before = " " * len(before)
    if len(lines) > len(cells) and len(lines) > len(_paragraphs(cells)) + 1:
        return None
    return [bold(lines[0]), *lines[1:]]


def _paragraphs(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's rows, each of which is its first cell and, below, what each of the others is and says."""
    lines, width = [], window_columns() - 1
    for name, *others in cells[1:]:
        lines += [bold(line) for line in _folded(name, window_columns(), "  ").splitlines()]
        each = [
            f"{column} {cell}" for column, cell in zip(cells[0][1:], others, strict=True) if cell not in ("", NOTHING)
        ]
        said = "; ".join(one.replace(" ", KEPT) if len(one) < width - 4 else one for one in each)
        lines += _folded(f"  {said}", width, "    ").splitlines()
    return lines


def markdown(text: str) -> None:
    """Markdown on stdout: laid out on a terminal, as it is in a pipe."""
    if not sys.stdout.isatty():
        emit(text, end="")
        return
    import io

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.markdown import Markdown, TableElement
    from rich.table import Table

    class Folded(TableElement):
        """A table that folds long words, which would be cut."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for shown in super().__rich_console__(console, options):
                for column in shown.columns if isinstance(shown, Table) else ():
                    column.overflow = "fold"
                yield shown

    class Page(Markdown):
        elements = Markdown.elements | {"table_open": Folded}

    console = Console(file=io.StringIO(), width=window_columns(), force_terminal=stdout_styled(), no_color=True)
    console.print(Page(text, code_theme="bw", hyperlinks=False))
    emit(console.file.getvalue(), end="")  # type: ignore[attr-defined]


def _fitting(line: str, stream: TextIO) -> str:
    """The line, on a terminal folded between words instead of anywhere."""
    return _folded(line, window_columns(), " " * (len(line) - len(line.lstrip()) + 2)) if stream.isatty() else line


def _folded(text: str, width: int, indent: str) -> str:
    """The text in lines of a width, between words but at no number and in no command, all but the first indented."""
    how = {"break_long_words": False, "break_on_hyphens": False}
    kept = COMMAND.sub(lambda match: match[0].replace(" ", KEPT), AT_NUMBERS.sub(KEPT, text))
    return textwrap.fill(kept, max(width, 1), subsequent_indent=indent, **how).replace(KEPT, " ")  # type: ignore[arg-type]


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


def bold(text: str) -> str:
    """The text, in bold type where stdout takes it."""
    return f"\x1b[1m{text}\x1b[0m" if stdout_styled() else text
