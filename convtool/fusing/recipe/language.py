"""Recipes: patterns over layer names, resolved into the fusions of one checkpoint.

A recipe is TOML. Each [[fuse]] table names the fused layer and gives a `chain` or a `sum`; a part is the pattern of a
layer, a list (a chain), or a table:

    { chain = [...] }, { sum = [...] } or, for outputs side by side, { stack = [...] }; and perhaps
        scale = 0.5          the part's output times a number
    { layer = PATTERN, like = PATTERN }   a layer that has the stride, padding, dilation and padding mode of another
                                          one, as far as it says nothing of its own

In a pattern

    {block}   stands for whole leading components, and one fusion is made for each value that fits; next to other text
              within a component (conv{i}) for the rest of the component
    {i+1}     is the number bound by {i}, plus 1
    *         stands for one component, the same one throughout a branch; one branch for each match
    ?         at the end: the layer may be missing; a branch is left out where all its layers are
    !         at the end: the layers that this fits say what is to be fused, and not those that the others fit
    @kind     at the very end: only layers of that kind (conv, linear, batch_norm, scale)
    file:     in front: a layer of the checkpoint given as --with file=PATH
    name(...) a layer without tensors, such as avg_pool(2): taken as it is, but for kernel(PATTERN), half(PATTERN) and
              stride(PATTERN) inside of it, which are the kernel size of a layer, half of it, and its stride

A rule with `where = [PATTERN, ...]` is for those values of its variables for which each of these fits a layer, and one
with `unless` for those for which none does. A rule with `optional = true` may fit nothing. One with `in_order = true`
refuses layers that stand in the checkpoint in another order than in its chain, where the file keeps the model's order.
The fusions of one with `input_size = [C, H, W]` have to be exact for inputs of that size only.
One with `rest = true` is for what the rules before it have left, and one with `same_shape = true` for those values of
its variables for which its first layer gives as many channels as it takes, at stride 1: where blocks have a branch
without tensors, such as an identity.

In [geometry], a layer's pattern may hold variables too, which stand for a part of a component, and its fields use them:
"*.dil_conv_k{k}_{d}" = { dilation = "{d}" }.

A pattern that fits nothing, a branch that is partly there and a layer used twice are errors, never skips.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from convtool.core.geometry import LARGEST
from convtool.core.names import unwrap
from convtool.core.tree import Chain, Stack, Sum, Tree, leaves
from convtool.errors import UsageError, about
from convtool.fusing.recipe.pattern import (
    VARIABLE,
    Pattern,
    check_text,
    filled,
    parse_pattern,
    shortened,
    shown,
    variables_of,
)
from convtool.kinds.stated import FieldSource, parse_tables

Plan: TypeAlias = Tree[Pattern]

DEEPEST = 32  # lists and tables inside of each other
MOST_LAYERS = 1000  # of one fusion
_TREES: Mapping[str, type[Chain[Pattern] | Sum[Pattern]]] = {"chain": Chain, "sum": Sum, "stack": Stack}
_FLAGS = ("optional", "in_order", "rest", "same_shape")
_ABOUT = ("where", "unless", "input_size", *_FLAGS)  # what a rule says besides its layers


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[fuse]] table.

    Attributes:
        name: of the fused layer, with variables.
        tree: the patterns, in chains and sums.
        optional: whether it may fit nothing.
        where: patterns that have to fit something besides.
        unless: patterns that must not fit anything.
        input_size: (C, *sizes) for which it has to be exact, or None for every size.
        in_order: whether the checkpoint has to have the layers in this order.
        rest: whether it passes over layers that rules before it have taken.
        same_shape: whether its first layer has to give as many channels as it takes, at stride 1.
    """

    name: str
    tree: Plan
    optional: bool = False
    where: tuple[Pattern, ...] = ()
    unless: tuple[Pattern, ...] = ()
    input_size: tuple[int, ...] | None = None
    in_order: bool = False
    rest: bool = False
    same_shape: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe."""

    origin: str
    about: str
    rules: tuple[Rule, ...]
    geometry: FieldSource
    varied: Mapping[str, Any] = field(default_factory=dict)

    def stated(self, layers: Iterable[str]) -> FieldSource:
        """Return what it says of these layers, those among it whose names tell their fields."""
        tables = dict(self.geometry.tables)
        for pattern, table in self.varied.items():
            regex, at = "", 0
            for match in VARIABLE.finditer(pattern):
                regex += f"{_literal(pattern[at : match.start()])}(?P<{match[1]}>[^.]*?)"
                at = match.end()
            regex += _literal(pattern[at:])
            for layer in layers:
                if found := re.fullmatch(regex, unwrap(layer)):
                    tables |= parse_tables({layer: _filled_table(table, found.groupdict())}, self.origin).tables
        return replace(self.geometry, tables=tables)


def _literal(text: str) -> str:
    return re.escape(text).replace(r"\*", ".*")


def parse_recipe(document: Mapping[str, Any], origin: str) -> Recipe:
    """Return a recipe from its TOML document; UsageError where it is malformed."""
    with about(origin):
        if unknown := document.keys() - {"fuse", "geometry", "about"}:
            raise UsageError(f"unknown key {shortened(min(unknown))!r}; expected [[fuse]] tables and [geometry]")
        tables, geometry = document.get("fuse", []), document.get("geometry", {})
        if not isinstance(tables, list) or not tables:
            raise UsageError("expected at least one [[fuse]] table")
        if not isinstance(geometry, dict):
            raise UsageError("geometry: expected a table")
        rules = []
        for number, table in enumerate(tables, 1):
            with about(f"[[fuse]] {number}"):
                rules.append(_parse_rule(table))
    where = f"{origin}: [geometry]"
    plain = {name: table for name, table in geometry.items() if not variables_of(name)}
    varied = {name: table for name, table in geometry.items() if name not in plain}
    for name, table in varied.items():
        tried = _filled_table(table, dict.fromkeys(variables_of(name), "1"))
        parse_tables({name: tried}, where)  # so that a mistake is seen now
    return Recipe(origin, str(document.get("about", "")), tuple(rules), parse_tables(plain, where), varied)


def _filled_table(table: Any, binding: Mapping[str, str]) -> Any:
    if not isinstance(table, dict):
        return table
    return {field: filled(value, binding) if isinstance(value, str) else value for field, value in table.items()}


def _parse_rule(table: object) -> Rule:
    if not isinstance(table, dict):
        raise UsageError("expected a table")
    if unknown := table.keys() - {"name", *_TREES, "scale", *_ABOUT}:
        raise UsageError(
            f"unknown key {shortened(min(unknown))!r}; expected name, chain, sum or stack, scale, {', '.join(_ABOUT)}"
        )
    name, flags = table.get("name"), {key: table.get(key, False) for key in _FLAGS}
    if not isinstance(name, str) or not name:
        raise UsageError(f"expected name = the fused layer's name{_in_quotes(name)}")
    with about("name"):
        check_text(name)
        if "*" in name:
            raise UsageError(f"{shortened(name)}: * stands for several; expected a name for one layer")
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise UsageError(f"{key}: expected true or false")
    tree = _parse_part({key: value for key, value in table.items() if key != "name" and key not in _ABOUT})
    where_fits, unless_fits = (_parse_patterns(key, table.get(key, [])) for key in ("where", "unless"))
    size = _parse_input_size(table.get("input_size"))
    rule = Rule(name, tree, where=where_fits, unless=unless_fits, input_size=size, **flags)
    _check_variables(rule)
    return rule


def _parse_input_size(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    if not sizes or not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
        raise UsageError(f"input_size: expected sizes from 1 to {LARGEST} such as [3, 32, 32], got {shown(value)}")
    return tuple(sizes)


def _parse_part(part: object, depth: int = 0) -> Plan:
    if depth > DEEPEST:
        raise UsageError(f"lists and tables more than {DEEPEST} deep inside of each other")
    if isinstance(part, str):
        return parse_pattern(part)
    if isinstance(part, list):
        if not part:
            raise UsageError("expected at least one layer in each chain")
        return Chain(tuple(_parse_part(item, depth + 1) for item in part))
    if isinstance(part, dict):
        return _parse_like(part) if "layer" in part else _parse_table(part, depth)
    raise UsageError(f"expected a layer, a list or a table, got {shown(part)}{_in_quotes(part)}")


def _in_quotes(value: object) -> str:
    """Return what to do about a name that TOML takes for a number."""
    return f'; a name that is a number is written in quotes: "{value}"' if type(value) in (int, float) else ""


def _parse_like(part: Mapping[str, object]) -> Pattern:
    layer, like = part["layer"], part.get("like", "")
    if part.keys() - {"layer", "like"} or not isinstance(layer, str) or not isinstance(like, str):
        raise UsageError(f"expected {{ layer = PATTERN, like = PATTERN }}, got {_keys(part)}")
    return parse_pattern(layer, parse_pattern(like) if "like" in part else None)


def _parse_table(part: Mapping[str, object], depth: int) -> Plan:
    keys = [key for key in _TREES if key in part]
    if len(keys) != 1 or part.keys() - {*_TREES, "scale"}:
        raise UsageError(f"expected a table with chain, sum or stack, and perhaps scale, got {_keys(part)}")
    items = part[keys[0]]
    if not isinstance(items, list) or not items:
        raise UsageError(f"{keys[0]}: expected a list of layers or branches")
    tree: Plan = _TREES[keys[0]](tuple(_parse_part(item, depth + 1) for item in items))
    return Chain((tree, Pattern(f"scale({_factor(part['scale'])!r})"))) if "scale" in part else tree


def _factor(value: object) -> float:
    """Return a finite number of float64, of which no digit is lost as of a subnormal one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        info = sys.float_info
        if value == 0 or info.min <= abs(value) <= info.max:
            return float(value)
    raise UsageError(f"scale: expected a finite number, got {shown(value)}")


def _keys(part: Mapping[str, object]) -> str:
    return shortened(", ".join(sorted(part)))


def _parse_patterns(key: str, texts: object) -> tuple[Pattern, ...]:
    with about(key):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UsageError("expected a list of patterns")
        return tuple(map(parse_pattern, texts))


def _check_variables(rule: Rule) -> None:
    """Raise UsageError unless one layer binds all of a rule's variables, and the name uses no others."""
    layers = list(leaves(rule.tree))
    if len(layers) > MOST_LAYERS:
        raise UsageError(f"{len(layers)} layers in one fusion; expected at most {MOST_LAYERS}")
    named = [pattern for pattern in layers if not pattern.is_function]
    if not named:
        raise UsageError("expected the name of a layer")
    variables = {variable for pattern in named for variable in variables_of(pattern.text)}
    for text in texts_of(rule):
        unbound = sorted(variables_of(text) - variables)
        if unbound:
            raise UsageError(f"{shortened(text)!r}: {{{unbound[0]}}} is bound by none of the rule's layers")
    if not any(variables_of(pattern.text) == variables for pattern in anchors_of(rule)):
        raise UsageError(f"expected a layer that holds all of {', '.join(sorted(variables))}")


def texts_of(rule: Rule) -> list[str]:
    """Everything in a rule that may hold variables."""
    patterns = [*leaves(rule.tree), *rule.where, *rule.unless]
    liked = [pattern.like.text for pattern in patterns if pattern.like is not None]
    return [rule.name, *(pattern.text for pattern in patterns), *liked]


def anchors_of(rule: Rule) -> list[Pattern]:
    """Return the layers that say what is to be fused."""
    named = [pattern for pattern in leaves(rule.tree) if not pattern.is_function]
    return [pattern for pattern in named if pattern.anchor] or named
