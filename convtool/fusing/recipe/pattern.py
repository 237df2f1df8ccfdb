"""The patterns of a recipe, and which layers of a checkpoint each fits with which values of its variables.

Patterns see through what wrappers left in names (DistributedDataParallel's module., torch.compile's _orig_mod., ...),
as everything does that people name layers with. Variables are bound to names without them, and names that come out are
written as the checkpoint writes them.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from convtool.core.names import WRAPPERS, is_written, unwrap
from convtool.core.tree import BASE
from convtool.errors import UsageError
from convtool.kinds import names_of, stored_kinds
from convtool.kinds.kind import Layer

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


def parse_pattern(text: str, like: Pattern | None = None) -> Pattern:
    """Return a pattern from its text; UsageError where it is malformed."""
    if is_written(text):
        check_text(text)
        return Pattern(text)
    match = _MARKS.fullmatch(text)
    assert match is not None
    name, marks, kind = match["text"], match["marks"], match["kind"] or ""
    source, colon, name = name.rpartition(":")
    if not name:
        raise UsageError(f"expected the name of a layer, got {text!r}" if text else "an empty name")
    check_text(text)
    if kind and kind not in (one.name for one in stored_kinds()):
        raise UsageError(f"{shortened(text)}: expected a kind of {names_of(stored_kinds())}, got {shortened(kind)!r}")
    if len(marks) > 1:
        raise UsageError(f"{shortened(text)}: expected one ? or ! at most")
    return Pattern(name, source if colon else BASE, kind, "?" in marks, "!" in marks, like, text)


def check_text(text: str) -> None:
    """UsageError where a name or a pattern is too long, holds what no name does, or has malformed variables."""
    if len(text) > LONGEST:
        raise UsageError(f"{shortened(text)}: expected at most {LONGEST} characters, got {len(text)}")
    if not text.isprintable():
        raise UsageError(f"{shortened(text)!r}: expected a name without control characters")
    plain = VARIABLE.sub("", text)
    if "{" in plain or "}" in plain:
        raise UsageError(f"{shortened(text)}: expected variables as {{block}} or {{i+1}}")


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


EFFORT = 200_000_000  # steps of matching that resolving a recipe may take at most: seconds
_COMPILING = 5000  # steps that making a regular expression takes as long as
_LOOKING = 100  # and looking at a name
_LAST = "\U0010ffff"
_TOKEN = re.compile(rf"{VARIABLE.pattern}|(\*)|([^{{*]+)")

_WHOLE = r"[^.]++(?:\.[^.]*+)*"  # components; possessive, so that they are the only places where it can be cut
_PERHAPS = r"(?:[^.]*+\.)*"  # perhaps none, and then without the dot that goes with them
_REST = "[^.]*"  # of a component
_NUMBER = "[0-9]{1,18}"


# Layers by the source that they come from, and by name.
Layers: TypeAlias = Mapping[str, Mapping[str, Layer]]


class Effort:
    """What matching may still cost: patterns can be written that would run for years."""

    def __init__(self, limit: int = EFFORT) -> None:
        self.left = limit

    def spend(self, steps: int, pattern: Pattern) -> None:
        """UsageError where it has come to too much."""
        self.left -= steps
        if self.left < 0:
            raise UsageError(
                f"{pattern}, with the patterns before it, can fit the layers' names in too many ways to try; use fewer"
                " variables in a pattern, more text around them, and fewer rules"
            )


class Names:
    """The names of one checkpoint's layers."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        bare = {name: unwrap(name) for name in layers}
        times = Counter(bare.values())
        # Two names that only wrappers tell apart stay as they are written.
        self._written = {short if times[short] == 1 else name: name for name, short in bare.items()}
        self._layers = {short: layers[name] for short, name in self._written.items()}
        self._place = {short: number for number, short in enumerate(self._written)}
        self._sorted = sorted(self._written)

    def find(self, name: str) -> str | None:
        """Return the layer of that name as the checkpoint writes it; None where there is none."""
        key = self._key(name)
        return None if key is None else self._written[key]

    def fits(
        self, pattern: Pattern, binding: Binding, numbers: Collection[str], effort: Effort
    ) -> list[tuple[str, dict[str, str]]]:
        """Return layers that a pattern fits under a binding, each with the values of its variables and its *.

        Args:
            numbers: those variables that stand for numbers.

        Raises:
            UsageError: trying all ways in which it may fit would take too long.
        """
        if "*" not in pattern.text and variables_of(pattern.text) <= binding.keys():  # one name: no need to search
            name = filled(pattern.text, binding)
            key = self._key(name)
            fits = key is not None and pattern.kind in ("", self._layers[key].kind.name)
            return [(self._written[key], {})] if key is not None and fits else []
        found: dict[str, dict[str, str]] = {}
        for text in dict.fromkeys((unwrap(pattern.text), pattern.text)):
            expression = _Expression(text, binding, numbers)
            effort.spend(_COMPILING, pattern)
            for key in self._starting_with(expression.beginning):
                effort.spend(_LOOKING, pattern)
                if pattern.kind not in ("", self._layers[key].kind.name):
                    continue
                effort.spend(expression.ways(key), pattern)
                values = expression.values(key)
                if values is not None:
                    found.setdefault(key, values)
        return [(self._written[key], found[key]) for key in sorted(found, key=self._place.__getitem__)]

    def write(self, name: str, near: Iterable[str]) -> str:
        """Return a name for a layer as the checkpoint would write it: with the wrappers of what stands beside it.

        Args:
            near: written names to look at first.
        """
        known, bare = self.find(name), unwrap(name)
        if known is not None:
            return known
        if name.rpartition(".")[2] in WRAPPERS:  # it is about the wrapper
            return name
        parent, _, last = bare.rpartition(".")
        beside = self._starting_with(f"{parent}." if parent else "")
        for written in (*near, *(self._written[key] for key in beside)):
            prefix = _as_written(parent, written)
            if prefix is not None:
                return f"{prefix}.{last}" if prefix else last
        return name

    def _key(self, name: str) -> str | None:
        return next((one for one in (name, unwrap(name)) if one in self._written), None)

    def _starting_with(self, text: str) -> Iterator[str]:
        start, end = bisect_left(self._sorted, text), bisect_right(self._sorted, text + _LAST)
        return (self._sorted[number] for number in range(start, end))


def _as_written(parent: str, written: str) -> str | None:
    """Return the first components of a written name that are `parent`, with all wrappers; None where there are none."""
    wanted, parts = parent.split(".") if parent else [], written.split(".")
    met = 0
    for number, part in enumerate(parts):
        if part in WRAPPERS:
            continue
        if met == len(wanted):
            return ".".join(parts[:number])
        if part != wanted[met]:
            return None
        met += 1
    return None


class _Expression:
    """A pattern under a binding as a regular expression, with a group for each variable that isn't bound."""

    def __init__(self, text: str, binding: Binding, numbers: Collection[str]) -> None:
        self._groups: dict[str, str] = {}  # what each stands for
        self._shifts: list[tuple[str, int]] = []
        parts: list[str] = []
        literal = ""  # what the name begins with, up to the first group
        for match in _TOKEN.finditer(text):
            known = self._known(match, binding)
            if known is None:
                parts.append(self._group(text, match, numbers))
            else:
                parts.append(re.escape(known))
                literal += known if not self._groups else ""
        self.beginning = literal
        self._regex = re.compile("".join(parts), re.DOTALL)

    def ways(self, name: str) -> int:
        """Return the most steps that matching takes."""
        components = name.split(".")
        ways = 1 + len(name) // 64  # comparing what was met before
        for inner in self._groups.values():
            if inner in (_WHOLE, _PERHAPS):
                ways *= len(components) + 1
            else:
                ways *= 1 + max(map(len, components))
        return ways

    def values(self, name: str) -> dict[str, str] | None:
        """Return the variables' values where the name fits; None where it doesn't, or {i+1} doesn't go with {i}."""
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        values = {"*" if key == "_star" else key: value for key, value in match.groupdict().items()}
        for variable, shift in self._shifts:
            number = int(values.pop(f"_{shift}_{variable}")) - shift
            if number < 0 or values.setdefault(variable, str(number)) != str(number):
                return None
        return values

    def _known(self, match: re.Match[str], binding: Binding) -> str | None:
        """Return what a token stands for; None where that is to be found."""
        variable, _, star, literal = match.groups()
        if literal is not None:
            return literal
        return binding.get("*") if star else filled(match[0], binding) if variable in binding else None

    def _group(self, text: str, match: re.Match[str], numbers: Collection[str]) -> str:
        variable, shift, star, _ = match.groups()
        if star:
            return self._named("_star", "[^.]+")
        if shift:
            name = f"_{int(shift)}_{variable}"
            if name not in self._groups:
                self._shifts.append((variable, int(shift)))
            return self._named(name, _NUMBER)
        if variable in numbers:
            return self._named(variable, _NUMBER)
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        if before not in ("", "."):
            return self._named(variable, _REST)  # conv{i}
        return self._named(variable, _WHOLE if after in ("", ".") else _PERHAPS)

    def _named(self, name: str, inner: str) -> str:
        if name in self._groups:
            return f"(?P={name})"
        self._groups[name] = inner
        return f"(?P<{name}>{inner})"
