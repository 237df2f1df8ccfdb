"""One pattern of a recipe as it is written: the layer's name with variables, and its marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from convtool.core.names import is_written
from convtool.core.tree import BASE
from convtool.errors import UsageError
from convtool.kinds import names_of, stored_kinds

Binding: TypeAlias = Mapping[str, str]

LONGEST = 1000  # characters of a pattern or a name
VARIABLE = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)(?:\+([0-9]{1,9}))?\}")
_MARKS = re.compile(r"(?P<text>.*?)(?P<marks>[?!]*)(?:@(?P<kind>\w+))?", re.DOTALL)
_SHOWN = 100  # characters of what a recipe says that a message repeats


@dataclass(frozen=True, slots=True)
class Pattern:
    """One layer of a rule.

    Attributes:
        text: what names are held against, its marks taken off; of a layer without tensors, all of it.
        source: the checkpoint that it is from.
        kind: of the layers that it fits; '' for any.
        optional: marked with ?.
        anchor: marked with !.
        like: the layer whose geometry it takes, or None.
        written: as it stands in the recipe.
    """

    text: str
    source: str = BASE
    kind: str = ""
    optional: bool = False
    anchor: bool = False
    like: Pattern | None = None
    written: str = ""

    @property
    def is_function(self) -> bool:
        return is_written(self.text)

    def __str__(self) -> str:
        return shortened(self.written or self.text)


def parse_pattern(text: str, where: str, like: Pattern | None = None) -> Pattern:
    """Return a pattern from its text; UsageError, which begins with `where`, where it is malformed."""
    if is_written(text):
        check_text(text, where)
        return Pattern(text)
    match = _MARKS.fullmatch(text)
    assert match is not None
    name, marks, kind = match["text"], match["marks"], match["kind"] or ""
    source, colon, name = name.rpartition(":")
    if not name:
        raise UsageError(f"{where}: expected the name of a layer, got {text!r}" if text else f"{where}: an empty name")
    check_text(text, where)
    if kind and kind not in (one.name for one in stored_kinds()):
        raise UsageError(
            f"{where}: {shortened(text)}: expected a kind of {names_of(stored_kinds())}, got {shortened(kind)!r}"
        )
    if len(marks) > 1:
        raise UsageError(f"{where}: {shortened(text)}: expected one ? or ! at most")
    return Pattern(name, source if colon else BASE, kind, "?" in marks, "!" in marks, like, text)


def check_text(text: str, where: str) -> None:
    """UsageError where a name or a pattern is too long, holds what no name does, or has malformed variables."""
    if len(text) > LONGEST:
        raise UsageError(f"{where}: {shortened(text)}: expected at most {LONGEST} characters, got {len(text)}")
    if not text.isprintable():
        raise UsageError(f"{where}: {shortened(text)!r}: expected a name without control characters")
    plain = VARIABLE.sub("", text)
    if "{" in plain or "}" in plain:
        raise UsageError(f"{where}: {shortened(text)}: expected variables as {{block}} or {{i+1}}")


def shortened(text: str) -> str:
    """Return the text, or its beginning and '...' where a message would be all of it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shown(value: object) -> str:
    """Return a value of a recipe as a message repeats it."""
    try:
        return shortened(repr(value))
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"


def variables_of(text: str) -> set[str]:
    """Return the variables in a text."""
    return {match[1] for match in VARIABLE.finditer(text)}


def counted_in(text: str) -> set[str]:
    """Return those of them that are numbers, as something is added to them."""
    return {match[1] for match in VARIABLE.finditer(text) if match[2]}


def filled(text: str, binding: Binding) -> str:
    """Return a text with the values of its variables in their places."""

    def value(match: re.Match[str]) -> str:
        bound = binding[match[1]]
        return str(int(bound) + int(match[2])) if match[2] else bound

    return VARIABLE.sub(value, text)
