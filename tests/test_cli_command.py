"""A command defined here, and nowhere else, has its help, its document with a schema, its exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jsonschema import Draft202012Validator
from schemas import forget
from shell import cli

from convtool.cli import exit_codes, shared
from convtool.cli.app import COMMANDS
from convtool.cli.command import Command
from convtool.cli.document import HIDDEN, INLINE, OPTIONAL, Count
from convtool.cli.options import argument, flag, option
from convtool.cli.output import Reporter
from convtool.cli.schemas import schema
from convtool.errors import OutputError, RefusedError, UsageError

if TYPE_CHECKING:
    from convtool.core.tally import Region  # imports torch, which neither help nor a short command may wait for


@dataclass(frozen=True, slots=True)
class Least:
    """Options that several commands might have."""

    at_least: int = option("N", "Only words of so many letters.", default=1)
    force: bool = shared.force()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to count."""

    words: list[str] | None = argument("WORD...", "The words.")
    least: Least
    loud: bool = flag("In capitals.", "-l")
    out: Path | None = option("OUT", "Where to.", "--out", "-o")


@dataclass(frozen=True, slots=True)
class Word:
    """A word.

    Attributes:
        letters: how many,
            all of them.
    """

    text: str
    letters: Count


@dataclass(frozen=True, slots=True)
class Result:
    """The words that were counted."""

    longest: Word = field(metadata=INLINE)
    share: float
    words: tuple[Word, ...]
    shouted: str | None = field(metadata=OPTIONAL)
    out: Path | None
    region: Region | None
    screen: str = field(metadata=HIDDEN)


def run(options: Options, reporter: Reporter) -> Result:
    """Count the letters of words.

    All of them.
    """
    words = tuple(Word(text, len(text)) for text in options.words or () if len(text) >= options.least.at_least)
    if not words:
        raise UsageError("expected a word")
    if "no" in [word.text for word in words]:
        raise RefusedError("no is no word")
    if options.out is not None and not options.least.force:
        raise OutputError(f"{options.out}: exists already")
    reporter.remark(f"{len(words)} words")
    shouted = words[0].text.upper() if options.loud else None
    longest = max(words, key=lambda word: word.letters)
    return Result(longest, float("inf"), words, shouted, options.out, None, "; ".join(word.text for word in words))


def show(result: Result, reporter: Reporter) -> None:
    """Print them."""
    reporter.line(f"{result.shouted or result.screen}: {result.longest.letters}")


COMMAND = Command("WORD...", "convtool count a few words", Options, run, show, lambda result: len(result.words) // 3)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(COMMANDS, "count", __name__)
    yield
    forget()


def test_it_is_listed_and_shows_its_own_help() -> None:
    assert "  count     Count the letters of words.\n" in cli("--help").out
    assert "did you mean count" in cli("coun a").message
    shown = cli("count --help")
    assert (shown.code, shown.err) == (0, "")
    for line in (
        "Usage: convtool count WORD... [OPTIONS]\n\nCount the letters of words.\n\nAll of them.\n",
        "Arguments:\n  WORD...  The words.\n",
        "Only words of so many letters. Default: 1.\n",
        "Options:\n  --at-least N   Only",
        "  -l, --loud     In capitals.\n  -o, --out OUT  Where to.\n\nOutput:\n",
        "Output:\n  -f, --force   Overwrite OUT if it exists.\n  --json        Print",
        "Examples:\n  convtool count a few words\n",
    ):
        assert line in shown.out


def test_its_result_is_shown_or_printed_as_a_document_that_its_schema_describes() -> None:
    plain = cli("count ab abc --loud")
    assert (plain.code, plain.out, plain.err) == (0, "AB: 3\n", "2 words\n")
    assert cli("count ab abc d --at-least 2 -q").out == "ab; abc: 3\n"
    assert cli("count ab abc -q").err == ""
    found = cli("count ab -o x --force --json")
    assert found.err == ""
    assert found.document == {
        "schema": 1,
        "command": "count",
        "ok": True,
        "text": "ab",
        "letters": 2,
        "share": "inf",
        "words": [{"text": "ab", "letters": 2}],
        "out": "x",
        "region": None,
    }
    assert cli("count ab --loud --json").document["shouted"] == "AB"


def test_its_schema_is_made_of_the_result() -> None:
    made = schema("count")
    Draft202012Validator.check_schema(made)
    own = made["$defs"]["result"]
    assert own["properties"]["letters"] == {"type": "integer", "minimum": 0, "description": "how many, all of them."}
    assert set(own["properties"]) - set(own["required"]) == {"shouted"}
    assert "screen" not in own["properties"]
    assert "largest_error" in made["$defs"]["region"]["properties"]
    assert made["$defs"]["word"]["description"] == "A word."


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("count a b c", 1, None),
        ("count", exit_codes.USAGE, "expected a word"),
        ("count a --at-least many", exit_codes.USAGE, "--at-least: expected an integer, got 'many' (see"),
        (
            "count a --lout",
            exit_codes.USAGE,
            "no such option: --lout; did you mean --out or --loud? (see `convtool count --help`)",
        ),
        ("count no", 4, "no is no word"),
        ("count a -o x", 5, "x: exists already"),
    ],
)
def test_its_exit_codes_are_those_of_every_command(line: str, code: int, message: str | None) -> None:
    found = cli(f"{line} --json")
    assert found.code == code
    assert found.document["ok"] is (code == 0)
    assert (message or "") in found.err
