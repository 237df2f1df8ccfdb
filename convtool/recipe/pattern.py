"""One pattern of a recipe: how it is written, and which names it fits with which values of its variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from convtool.core.functions import is_function
from convtool.core.tree import BASE
from convtool.errors import UsageError

Binding: TypeAlias = Mapping[str, str]

KINDS = ("conv", "linear", "batch_norm", "scale")
VARIABLE = re.compile(r"\{(\w+)(?:\+(\d+)|\|(\w+))?\}")
_TOKEN = re.compile(r"\{(\w+)(?:\+(\d+)|\|(\w+))?\}|(\*)|([^{*]+)|(\{)")
_MARKS = re.compile(r"(?P<text>.*?)(?P<marks>[?!]*)(?:@(?P<kind>\w+))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One layer of a rule.

    Attributes:
        text: what names are held against, its marks taken off; of a layer without tensors, all of it.
        source: the checkpoint that it is from.
        kind: of the layers that it fits; '' for any.
        optional: marked with ?.
        anchor: marked with !.
        like: the pattern of the layer whose geometry it takes, or ''.
        written: as it stands in the recipe.
    """

    text: str
    source: str = BASE
    kind: str = ""
    optional: bool = False
    anchor: bool = False
    like: str = ""
    written: str = ""

    @property
    def is_function(self) -> bool:
        return is_function(self.text)

    def __str__(self) -> str:
        return self.written or self.text


def parse_pattern(text: str, where: str, like: str = "") -> Pattern:
    if is_function(text):
        return Pattern(text)
    match = _MARKS.fullmatch(text)
    assert match is not None
    name, marks, kind = match["text"], match["marks"], match["kind"] or ""
    source, colon, name = name.rpartition(":")
    if not name:
        raise UsageError(f"{where}: expected the name of a layer, got {text!r}" if text else f"{where}: an empty name")
    if kind and kind not in KINDS:
        raise UsageError(f"{where}: {text}: expected a kind of {', '.join(KINDS)}, got {kind!r}")
    if len(set(marks)) < len(marks) or len(marks) > 1:
        raise UsageError(f"{where}: {text}: expected one ? or ! at most")
    if "{" in VARIABLE.sub("", name) or "}" in VARIABLE.sub("", name):
        raise UsageError(f"{where}: {text}: expected variables as {{block}}, {{i+1}} or {{block|underscored}}")
    return Pattern(name, source if colon else BASE, kind, "?" in marks, "!" in marks, like, text)


def variables_of(text: str) -> set[str]:
    return {match[1] for match in VARIABLE.finditer(text)}


def filled(text: str, binding: Binding) -> str:
    """A text with the values of its variables in their places."""

    def value(match: re.Match[str]) -> str:
        bound = binding[match[1]]
        if match[2]:
            return str(int(bound) + int(match[2]))
        return bound.replace(".", "_") if match[3] else bound

    return VARIABLE.sub(value, text)


def values_of(match: re.Match[str], shifts: Sequence[tuple[str, int]]) -> dict[str, str] | None:
    """The variables' values in a match; None where {i+1} doesn't go with {i}."""
    values = {"*" if key == "_star" else key: value for key, value in match.groupdict().items()}
    for variable, shift in shifts:
        number = int(values.pop(f"_{shift}_{variable}")) - shift
        if number < 0 or values.setdefault(variable, str(number)) != str(number):
            return None
    return values


def expression(text: str, binding: Binding, numbers: set[str]) -> tuple[re.Pattern[str], list[tuple[str, int]]]:
    """The pattern as a regular expression with a group per unbound variable, and the variables met with an offset."""
    parts: list[str] = []
    seen: set[str] = set()
    shifts: list[tuple[str, int]] = []
    for match in _TOKEN.finditer(text):
        variable, shift, form, star, literal, brace = match.groups()
        if literal is not None or brace is not None:
            parts.append(re.escape(literal or brace))
        elif star:
            parts.append(_group("_star", "[^.]+", seen) if "*" not in binding else re.escape(binding["*"]))
        elif variable in binding:
            value = binding[variable]
            value = str(int(value) + int(shift)) if shift else value.replace(".", "_") if form else value
            parts.append(re.escape(value))
        elif shift:
            parts.append(_group(f"_{int(shift)}_{variable}", r"\d+", seen))
            shifts.append((variable, int(shift)))
        else:
            inner = r"\d+" if variable in numbers else ".+" if form else _stands_for(text, match)
            parts.append(_group(variable, inner, seen))
    return re.compile("".join(parts), re.DOTALL), shifts


def _stands_for(text: str, match: re.Match[str]) -> str:
    """What a variable can be, by what stands beside it."""
    before, after = text[: match.start()][-1:], text[match.end() :][:1]
    if before not in ("", "."):
        return "[^.]*"  # the rest of a component: conv{i}
    # Whole components; where text follows directly, perhaps none, and then without the dot that goes with them.
    return ".+" if after in ("", ".") else r"(?:.+\.)?"


def _group(name: str, inner: str, seen: set[str]) -> str:
    if name in seen:
        return f"(?P={name})"
    seen.add(name)
    return f"(?P<{name}>{inner})"
