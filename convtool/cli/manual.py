"""`convtool manual`: the manual's pages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from convtool.cli import complete
from convtool.cli.command import Command
from convtool.cli.document import HIDDEN
from convtool.cli.options import argument
from convtool.cli.output import Reporter, markdown, table
from convtool.errors import UsageError, did_you_mean
from convtool.manual import page, topics

EXAMPLES = """
convtool manual
convtool manual geometry
convtool manual recipes | less
"""


_HEADING = re.compile(r"\A# .*|^## .*", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which page to print."""

    topic: str | None = argument("TOPIC", "A page; without one, the list of pages.", complete.topics)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the manual.

    Attributes:
        text: Markdown.
    """

    topic: str
    title: str
    text: str = field(metadata=HIDDEN)


@dataclass(frozen=True, slots=True)
class Result:
    """Pages: the one asked for, or all."""

    pages: tuple[Page, ...]
    text: str | None


def run(options: Options, reporter: Reporter) -> Result:
    """Print a page of the manual, or the list of its pages."""
    known = topics()
    if options.topic is None:
        return Result(tuple(map(_page, known)), None)
    if options.topic not in known:
        near = did_you_mean(options.topic, known, _treated(options.topic), cutoff=0.75)
        raise UsageError(f"no page {options.topic!r}{near}; `convtool manual` lists them")
    found = _page(options.topic)
    return Result((found,), found.text)


def _treated(word: str) -> str:
    """Return which pages have a heading with a word, or else the one that has it most often; '' where none has it."""
    whole = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    texts = {topic: page(topic) for topic in topics()}
    headed = [topic for topic, text in texts.items() if whole.search("\n".join(_HEADING.findall(text)))]
    often = max(texts, key=lambda topic: len(whole.findall(texts[topic])))
    found = headed or ([often] if whole.search(texts[often]) else [])
    return f"; it is treated in: {', '.join(found)}" if found else ""


def _page(topic: str) -> Page:
    text = page(topic)
    return Page(topic, text.partition("\n")[0].removeprefix("# "), text)


def show(result: Result, reporter: Reporter) -> None:
    """Print the page, or a table of pages."""
    if result.text is None:
        table(("page", "about"), [(one.topic, one.title) for one in result.pages])
    else:
        markdown(result.text)


COMMAND = Command("[TOPIC]", EXAMPLES, Options, run, show)
