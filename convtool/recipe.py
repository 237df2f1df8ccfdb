"""Recipes: patterns over layer names, resolved into the fusions of one checkpoint.

A recipe is TOML. Each [[fuse]] table names the fused layer and gives a `chain` or a `sum`; a part is the pattern of a
layer, a list (a chain), or a table with `chain` or `sum` and perhaps `scale`. In a pattern

    {block}   stands for whole leading components, and one fusion is made for each value that fits
    {i+1}     is the number bound by {i}, plus 1
    *         stands for one component, the same one throughout a branch; one branch for each match
    ?         at the end: the layer may be missing; a branch is left out where all its layers are
    @kind     at the end: only layers of that kind (conv, linear, batch_norm)
    file:     in front: a layer of the checkpoint given as --with file=PATH
    name(...) a layer without tensors, such as avg_pool(2): taken as it is

A pattern that fits nothing, a branch that is partly there and a layer used twice are errors, never skips.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from convtool.core.fields import FieldSource, parse_tables
from convtool.core.functions import is_function
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import UsageError

Ref: TypeAlias = Tree[LayerRef]


@dataclass(frozen=True, slots=True)
class PlannedFusion:
    """One fusion with every name resolved."""

    name: str
    tree: Ref


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[fuse]] table.

    Attributes:
        name: of the fused layer, with variables.
        tree: Chain or Sum whose names are patterns.
        optional: whether it may fit nothing.
    """

    name: str
    tree: Ref
    optional: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe."""

    origin: str
    about: str
    rules: tuple[Rule, ...]
    geometry: FieldSource


# Names of layers by the source that they come from, each with its kind.
Layers: TypeAlias = Mapping[str, Mapping[str, str]]

_VARIABLE = re.compile(r"\{(\w+)(?:\+(\d+))?\}")
_TOKEN = re.compile(r"\{(\w+)(?:\+(\d+))?\}|(\*)|([^{*]+)")


def parse_recipe(document: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from its TOML document; UsageError where it is malformed."""
    unknown = document.keys() - {"fuse", "geometry", "about"}
    if unknown:
        raise UsageError(f"{origin}: unknown key {sorted(unknown)[0]!r}; expected [[fuse]] tables and [geometry]")
    tables = document.get("fuse", [])
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{origin}: expected at least one [[fuse]] table")
    geometry = document.get("geometry", {})
    if not isinstance(geometry, dict):
        raise UsageError(f"{origin}: geometry: expected a table")
    rules = tuple(_parse_rule(table, f"{origin}: [[fuse]] {number}") for number, table in enumerate(tables, 1))
    return Recipe(origin, str(document.get("about", "")), rules, parse_tables(geometry, f"{origin}: [geometry]"))


def resolve(recipe: Recipe, layers: Layers) -> list[PlannedFusion]:
    """The fusions that a recipe means for these layers, in their order.

    Raises:
        UsageError: a pattern fits nothing, a branch is only partly there, or two fusions claim one layer.
    """
    planned: list[PlannedFusion] = []
    for rule in recipe.rules:
        found = list(_resolve_rule(rule, layers, recipe.origin))
        if not found and not rule.optional:
            raise UsageError(f"{recipe.origin}: {_text(rule.tree)} fits no layer")
        planned += found
    if not planned:
        raise UsageError(f"{recipe.origin}: nothing in it fits any layer")
    order = {name: number for number, name in enumerate(layers[BASE])}
    planned.sort(key=lambda fusion: min(order.get(ref.name, len(order)) for ref in leaves(fusion.tree)))
    _check_claims(planned, recipe.origin)
    return planned


def _parse_rule(table: object, where: str) -> Rule:
    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table")
    unknown = table.keys() - {"name", "chain", "sum", "scale", "optional"}
    if unknown:
        raise UsageError(f"{where}: unknown key {sorted(unknown)[0]!r}; expected name, chain or sum, scale, optional")
    name, optional = table.get("name"), table.get("optional", False)
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: expected name = the fused layer's name")
    if not isinstance(optional, bool):
        raise UsageError(f"{where}: optional: expected true or false")
    tree = _parse_part({key: value for key, value in table.items() if key not in ("name", "optional")}, where)
    if isinstance(tree, LayerRef):
        tree = Chain((tree,))
    return Rule(name, tree, optional)


def _parse_part(part: object, where: str) -> Ref:
    if isinstance(part, str):
        return _parse_layer(part, where)
    if isinstance(part, list):
        if not part:
            raise UsageError(f"{where}: expected at least one layer in each chain")
        return Chain(tuple(_parse_part(item, where) for item in part))
    if isinstance(part, dict):
        keys = [key for key in ("chain", "sum") if key in part]
        if len(keys) != 1 or part.keys() - {"chain", "sum", "scale"}:
            raise UsageError(f"{where}: expected a table with chain or sum, and perhaps scale, got {sorted(part)}")
        items = part[keys[0]]
        if not isinstance(items, list) or not items:
            raise UsageError(f"{where}: {keys[0]}: expected a list of layers or branches")
        parts = tuple(_parse_part(item, where) for item in items)
        tree: Ref = Chain(parts) if keys[0] == "chain" else Sum(parts)
        if "scale" in part:
            factor = part["scale"]
            if isinstance(factor, bool) or not isinstance(factor, int | float):
                raise UsageError(f"{where}: scale: expected a number, got {factor!r}")
            tree = Chain((tree, LayerRef(f"scale({float(factor)!r})")))
        return tree
    raise UsageError(f"{where}: expected a layer, a list or a table, got {part!r}")


def _parse_layer(text: str, where: str) -> LayerRef:
    if not text:
        raise UsageError(f"{where}: expected the name of a layer, got an empty one")
    if is_function(text):
        return LayerRef(text)
    source, colon, name = text.rpartition(":")
    return LayerRef(name, source) if colon else LayerRef(text)


def _resolve_rule(rule: Rule, layers: Layers, origin: str) -> Iterator[PlannedFusion]:
    for binding in _bindings(rule, layers):
        tree = _instantiate(rule.tree, binding, layers, origin)
        if tree is not None:
            yield PlannedFusion(_fill(rule.name, binding), tree)


def _bindings(rule: Rule, layers: Layers) -> list[dict[str, str]]:
    """Every value of the variables that fits some pattern of the rule; one empty binding where it has none."""
    patterns = [ref for ref in leaves(rule.tree) if not is_function(ref.name)]
    variables = {match[1] for ref in patterns for match in _VARIABLE.finditer(ref.name)}
    if not variables:
        present = any(_fits(ref, layers, {}) for ref in patterns)
        return [{}] if present else []
    numbers = {match[1] for ref in patterns for match in _VARIABLE.finditer(ref.name) if match[2]}
    found: dict[tuple[tuple[str, str], ...], None] = {}
    for ref in patterns:
        for _, values in _fits(ref, layers, {}, numbers):
            if values.keys() - {"*"} == variables:
                found[tuple(sorted((key, value) for key, value in values.items() if key != "*"))] = None
    return [dict(items) for items in found]


def _instantiate(tree: Ref, binding: dict[str, str], layers: Layers, origin: str) -> Ref | None:
    """The tree with names filled in; None where all of it is optional and absent."""
    if isinstance(tree, LayerRef):
        return _instantiate_layer(tree, binding, layers, origin)
    if isinstance(tree, Sum):
        parts = [part for branch in tree.parts for part in _branches(branch, binding, layers, origin)]
        return Sum(tuple(parts)) if parts else None
    chains = list(_branches(tree, binding, layers, origin))
    if len(chains) > 1:
        raise UsageError(f"{origin}: {_text(tree)}: * fits several layers, which only a sum has room for")
    return chains[0] if chains else None


def _branches(branch: Ref, binding: dict[str, str], layers: Layers, origin: str) -> Iterator[Ref]:
    """One instance of a branch, or one for each value of its *."""
    own = [branch] if isinstance(branch, LayerRef) else _direct_layers(branch)
    starred = [ref for ref in own if "*" in ref.name and not is_function(ref.name)]
    stars: list[dict[str, str]] = [binding]
    if starred and "*" not in binding:
        values = {found["*"] for ref in starred for _, found in _fits(ref, layers, binding) if "*" in found}
        if not values and not all(ref.name.partition("@")[0].endswith("?") for ref in starred):
            raise UsageError(f"{origin}: {_text(branch)}{_where(binding)} fits no layer")
        stars = [binding | {"*": value} for value in sorted(values, key=_natural)]
    for bound in stars:
        if isinstance(branch, LayerRef):
            layer = _instantiate_layer(branch, bound, layers, origin)
            if layer is not None:
                yield layer
        elif isinstance(branch, Sum):
            tree = _instantiate(branch, bound, layers, origin)
            if tree is not None:
                yield tree
        else:
            yield from _instantiate_chain(branch, bound, layers, origin)


def _instantiate_chain(chain: Chain[LayerRef], binding: dict[str, str], layers: Layers, origin: str) -> Iterator[Ref]:
    parts = [(part, _instantiate(part, binding, layers, origin)) for part in chain.parts]
    present = [
        made for part, made in parts if made is not None and not (isinstance(part, LayerRef) and is_function(part.name))
    ]
    if not present and any(made is None for _, made in parts):
        return
    missing = [part for part, made in parts if made is None]
    required = [part for part in missing if not _optional_alone(part)]
    if required:
        raise UsageError(f"{origin}: {_text(chain)}{_where(binding)} is only partly there: {_text(required[0])} is not")
    yield Chain(tuple(made for _, made in parts if made is not None))


def _optional_alone(part: Ref) -> bool:
    return all(ref.name.partition("@")[0].endswith("?") for ref in leaves(part))


def _instantiate_layer(ref: LayerRef, binding: dict[str, str], layers: Layers, origin: str) -> LayerRef | None:
    if is_function(ref.name):
        return LayerRef(_fill(ref.name, binding), ref.source)
    names = [name for name, _ in _fits(ref, layers, binding)]
    if len(names) > 1:
        raise UsageError(f"{origin}: {ref.name!r}{_where(binding)} fits several layers: {', '.join(names[:4])}")
    if names:
        return LayerRef(names[0], ref.source)
    if _optional_alone(ref):
        return None
    raise UsageError(
        f"{origin}: {ref.name!r}{_where(binding)} fits no layer, though other layers of its fusion are there"
    )


def _fits(
    ref: LayerRef, layers: Layers, binding: Mapping[str, str], numbers: frozenset[str] | set[str] = frozenset()
) -> list[tuple[str, dict[str, str]]]:
    """Layers that a pattern fits under a binding, each with the values of its variables and its *."""
    if ref.source not in layers:
        raise UsageError(f"{ref.source}:{ref.name}: no checkpoint of that name; give one with --with {ref.source}=FILE")
    text, _, kind = ref.name.partition("@")
    text = text.removesuffix("?")
    expression, shifts = _regex(text, binding, numbers)
    found = []
    for name, layer_kind in layers[ref.source].items():
        match = expression.fullmatch(name)
        if match is None or (kind and kind != layer_kind):
            continue
        values = {"*" if key == "_star" else key: value for key, value in match.groupdict().items()}
        if all(int(values[f"_{n}_{v}"]) - n >= 0 for v, n in shifts):
            for variable, shift in shifts:
                number = str(int(values.pop(f"_{shift}_{variable}")) - shift)
                if values.setdefault(variable, number) != number:
                    break
            else:
                found.append((name, values))
    return found


def _regex(
    text: str, binding: Mapping[str, str], numbers: frozenset[str] | set[str]
) -> tuple[re.Pattern[str], list[tuple[str, int]]]:
    """The pattern as a regular expression with a group per unbound variable, and the variables met with an offset."""
    parts: list[str] = []
    seen: set[str] = set()
    shifts: list[tuple[str, int]] = []
    for match in _TOKEN.finditer(text):
        variable, shift, star, literal = match.groups()
        if literal is not None:
            parts.append(re.escape(literal))
        elif star:
            parts.append(_group("_star", "[^.]+", seen) if "*" not in binding else re.escape(binding["*"]))
        elif variable in binding:
            value = binding[variable]
            parts.append(re.escape(str(int(value) + int(shift)) if shift else value))
        elif shift:
            parts.append(_group(f"_{int(shift)}_{variable}", r"\d+", seen))
            shifts.append((variable, int(shift)))
        else:
            # A variable takes whole components: it may be empty, and then brings its dot along, where text follows.
            whole = r"\d+" if variable in numbers else ".+" if text[match.end() :][:1] in (".", "") else r"(?:.+\.)?"
            parts.append(_group(variable, whole, seen))
    return re.compile("".join(parts)), shifts


def _group(name: str, inner: str, seen: set[str]) -> str:
    if name in seen:
        return f"(?P={name})"
    seen.add(name)
    return f"(?P<{name}>{inner})"


def _direct_layers(tree: Ref) -> list[LayerRef]:
    """The layers of a branch that share its *: those not inside of a sum, whose branches have their own."""
    if isinstance(tree, LayerRef):
        return [tree]
    if isinstance(tree, Sum):
        return []
    return [ref for part in tree.parts for ref in _direct_layers(part)]


def _fill(text: str, binding: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in binding:
            raise UsageError(f"{text!r}: {{{match[1]}}} is bound by none of the rule's layers")
        bound = binding[match[1]]
        return str(int(bound) + int(match[2])) if match[2] else bound

    return _VARIABLE.sub(value, text)


def _check_claims(planned: Sequence[PlannedFusion], origin: str) -> None:
    owners: dict[LayerRef, str] = {}
    for fusion in planned:
        for ref in leaves(fusion.tree):
            if is_function(ref.name):
                continue
            if ref in owners:
                both = f"{owners[ref]} and {fusion.name}" if owners[ref] != fusion.name else f"{fusion.name}, twice"
                raise UsageError(f"{origin}: {ref.name} is claimed by {both}; a layer can go into one fusion only once")
            owners[ref] = fusion.name
    for one, other in itertools.pairwise(sorted(fusion.name for fusion in planned)):
        if one == other:
            raise UsageError(f"{origin}: two fusions would both be called {one}")


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts '10' behind '9'."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text))


def _where(binding: Mapping[str, str]) -> str:
    values = ", ".join(f"{name} = {value!r}" for name, value in binding.items())
    return f" ({values})" if values else ""


def _text(tree: Ref) -> str:
    if isinstance(tree, LayerRef):
        return str(tree)
    inner = ", ".join(_text(part) for part in tree.parts)
    return f"[{inner}]" if isinstance(tree, Chain) else f"sum[{inner}]"
