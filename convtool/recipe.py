"""Recipes: patterns over layer names, resolved into the fusions of one checkpoint.

A recipe is TOML. Each [[fuse]] table names the fused layer and gives a `chain` or a `sum`; a part is the pattern of a
layer, a list (a chain), or a table:

    { chain = [...] }  or  { sum = [...] }, and perhaps
        scale = 0.5          the part's output times a number
        alpha = "TENSOR"     times that number of a checkpoint over the rank, the output channels of the part's first
                             layer, as LoRA is scaled; with ? at the end a missing tensor stands for a factor of 1
    { layer = PATTERN, like = PATTERN }   a layer that has the stride, padding, dilation and padding mode of another
                                          one, as far as it says nothing of its own

In a pattern

    {block}   stands for whole leading components, and one fusion is made for each value that fits; next to other text
              within a component (conv{i}) for the rest of the component
    {i+1}     is the number bound by {i}, plus 1
    {block|underscored}  is the value of {block} with _ in place of each dot
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

A pattern that fits nothing, a branch that is partly there and a layer used twice are errors, never skips.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from convtool.core.fields import Fields, FieldSource, parse_tables
from convtool.core.functions import is_function
from convtool.core.geometry import format_sizes
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import UsageError


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


Plan: TypeAlias = Tree[Pattern]
Ref: TypeAlias = Tree[LayerRef]
Binding: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PlannedFusion:
    """One fusion with every name resolved; `input_size` where it has to be exact for that one only."""

    name: str
    tree: Ref
    input_size: tuple[int, ...] | None = None


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
    """

    name: str
    tree: Plan
    optional: bool = False
    where: tuple[Pattern, ...] = ()
    unless: tuple[Pattern, ...] = ()
    input_size: tuple[int, ...] | None = None
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe."""

    origin: str
    about: str
    rules: tuple[Rule, ...]
    geometry: FieldSource


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a recipe asks about a layer: its kind, and the shape of its weight ((C_out, C_in, *kernel); () for none)."""

    kind: str
    shape: tuple[int, ...] = ()


# Layers by the source that they come from, and by name.
Layers: TypeAlias = Mapping[str, Mapping[str, LayerFacts]]


@dataclass(frozen=True, slots=True)
class Known:
    """What a recipe is resolved against.

    Attributes:
        layers: of every checkpoint.
        number: the one number that a tensor (source, full name) holds; None where there is no such tensor.
        fields: what is stated of a layer's geometry.
        ordered: whether the checkpoint has its layers in the model's order.
        strength: a factor for every part that has an alpha.
    """

    layers: Layers
    number: Callable[[str, str], float | None] = lambda source, name: None
    fields: Callable[[str], Fields] = lambda name: {}
    ordered: bool = False
    strength: float = 1.0


_VARIABLE = re.compile(r"\{(\w+)(?:\+(\d+)|\|(\w+))?\}")
_TOKEN = re.compile(r"\{(\w+)(?:\+(\d+)|\|(\w+))?\}|(\*)|([^{*]+)|(\{)")
_MARKS = re.compile(r"(?P<text>.*?)(?P<marks>[?!]*)(?:@(?P<kind>\w+))?", re.DOTALL)
_ALPHA = "alpha"
_ASKED = re.compile(r"\b(kernel|half|stride)\(([^()]*)\)")
_ABOUT = ("optional", "where", "unless", "input_size", "in_order")  # what a rule says besides its layers
KINDS = ("conv", "linear", "batch_norm", "scale")


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


def resolve(recipe: Recipe, known: Known) -> list[PlannedFusion]:
    """The fusions that a recipe means for these layers, in the order of the checkpoint.

    Raises:
        UsageError: a pattern fits nothing, a branch is only partly there, or two fusions claim one layer.
    """
    if known.strength != 1 and not any(_is_alpha(part) for rule in recipe.rules for part in leaves(rule.tree)):
        raise UsageError(f"{recipe.origin}: nothing in it has an alpha that a strength could go with")
    planned: list[PlannedFusion] = []
    for rule in recipe.rules:
        found = list(_Resolution(rule, known, recipe.origin).fusions())
        if not found and not rule.optional:
            raise UsageError(f"{recipe.origin}: {_text(rule.tree)} fits no layer")
        planned += found
    if not planned:
        raise UsageError(f"{recipe.origin}: nothing in it fits any layer")
    order = {name: number for number, name in enumerate(known.layers[BASE])}
    planned.sort(key=lambda fusion: min(order.get(ref.name, len(order)) for ref in _base_layers(fusion.tree)))
    _check_claims(planned, recipe.origin)
    return planned


# --- reading


def _parse_rule(table: object, where: str) -> Rule:
    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table")
    unknown = table.keys() - {"name", "chain", "sum", "scale", "alpha", *_ABOUT}
    if unknown:
        raise UsageError(
            f"{where}: unknown key {sorted(unknown)[0]!r}; expected name, chain or sum, scale, alpha, optional, where,"
            " unless, input_size, in_order"
        )
    name, optional = table.get("name"), table.get("optional", False)
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: expected name = the fused layer's name")
    in_order = table.get("in_order", False)
    for key, value in (("optional", optional), ("in_order", in_order)):
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {key}: expected true or false")
    body = {key: value for key, value in table.items() if key != "name" and key not in _ABOUT}
    tree = _parse_part(body, where)
    where_fits, unless_fits = (_parse_patterns(table.get(key, []), f"{where}: {key}") for key in ("where", "unless"))
    size = _parse_input_size(table.get("input_size"), where)
    rule = Rule(name, tree, optional, where_fits, unless_fits, size, in_order)
    _check_variables(rule, where)
    return rule


def _parse_input_size(value: object, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or any(type(size) is not int or size < 1 for size in value):
        raise UsageError(f"{where}: input_size: expected sizes such as [3, 32, 32], got {value!r}")
    return tuple(value)


def _parse_part(part: object, where: str) -> Plan:
    if isinstance(part, str):
        return _parse_pattern(part, where)
    if isinstance(part, list):
        if not part:
            raise UsageError(f"{where}: expected at least one layer in each chain")
        return Chain(tuple(_parse_part(item, where) for item in part))
    if isinstance(part, dict):
        return _parse_like(part, where) if "layer" in part else _parse_table(part, where)
    raise UsageError(f"{where}: expected a layer, a list or a table, got {part!r}")


def _parse_like(part: Mapping[str, object], where: str) -> Pattern:
    layer, like = part["layer"], part.get("like", "")
    if part.keys() - {"layer", "like"} or not isinstance(layer, str) or not isinstance(like, str):
        raise UsageError(f"{where}: expected {{ layer = PATTERN, like = PATTERN }}, got {sorted(part)}")
    return _parse_pattern(layer, where, like)


def _parse_table(part: Mapping[str, object], where: str) -> Plan:
    keys = [key for key in ("chain", "sum") if key in part]
    if len(keys) != 1 or part.keys() - {"chain", "sum", "scale", "alpha"}:
        raise UsageError(f"{where}: expected a table with chain or sum, and perhaps scale, got {sorted(part)}")
    items = part[keys[0]]
    if not isinstance(items, list) or not items:
        raise UsageError(f"{where}: {keys[0]}: expected a list of layers or branches")
    parts = tuple(_parse_part(item, where) for item in items)
    tree: Plan = Chain(parts) if keys[0] == "chain" else Sum(parts)
    if "alpha" in part:
        tensor = part["alpha"]
        if not isinstance(tensor, str) or not tensor:
            raise UsageError(f"{where}: alpha: expected the name of a tensor, got {tensor!r}")
        tree = Chain((tree, Pattern(f"{_ALPHA}({tensor})", written=f"alpha({tensor})")))
    if "scale" in part:
        factor = part["scale"]
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise UsageError(f"{where}: scale: expected a number, got {factor!r}")
        tree = Chain((tree, Pattern(f"scale({float(factor)!r})")))
    return tree


def _parse_patterns(texts: object, where: str) -> tuple[Pattern, ...]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: expected a list of patterns")
    return tuple(_parse_pattern(text, where) for text in texts)


def _parse_pattern(text: str, where: str, like: str = "") -> Pattern:
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
    if "{" in _VARIABLE.sub("", name) or "}" in _VARIABLE.sub("", name):
        raise UsageError(f"{where}: {text}: expected variables as {{block}}, {{i+1}} or {{block|underscored}}")
    return Pattern(name, source if colon else BASE, kind, "?" in marks, "!" in marks, like, text)


def _check_variables(rule: Rule, where: str) -> None:
    """One layer alone has to bind all of a rule's variables, and the name may use no others."""
    named = [pattern for pattern in leaves(rule.tree) if not pattern.is_function]
    if not named:
        raise UsageError(f"{where}: expected the name of a layer")
    variables = {variable for pattern in named for variable in _variables(pattern.text)}
    for text in (rule.name, *(pattern.text for pattern in (*rule.where, *rule.unless))):
        unbound = sorted(_variables(text) - variables)
        if unbound:
            raise UsageError(f"{where}: {text!r}: {{{unbound[0]}}} is bound by none of the rule's layers")
    if not any(_variables(pattern.text) == variables for pattern in _anchors(rule)):
        raise UsageError(f"{where}: expected a layer that holds all of {', '.join(sorted(variables))}")


def _variables(text: str) -> set[str]:
    return {match[1] for match in _VARIABLE.finditer(text)}


def _anchors(rule: Rule) -> list[Pattern]:
    named = [pattern for pattern in leaves(rule.tree) if not pattern.is_function]
    return [pattern for pattern in named if pattern.anchor] or named


# --- resolving


class _Resolution:
    """One rule held against the layers of the checkpoints."""

    def __init__(self, rule: Rule, known: Known, origin: str) -> None:
        self.rule, self.known, self.origin = rule, known, origin
        self.spellings: dict[str, dict[str, set[str]]] = {}
        self.numbers = {match[1] for text in self._texts() for match in _VARIABLE.finditer(text) if match[2]}

    def fusions(self) -> Iterator[PlannedFusion]:
        for binding in self._bindings():
            if not all(self._fits(pattern, binding) for pattern in self.rule.where):
                continue
            if any(self._fits(pattern, binding) for pattern in self.rule.unless):
                continue
            tree = self._tree(self.rule.tree, binding)
            if tree is not None:
                if self.rule.in_order and self.known.ordered:
                    self._check_order(tree)
                yield PlannedFusion(self._filled(self.rule.name, binding), tree, self.rule.input_size)

    def _check_order(self, tree: Ref) -> None:
        places = {name: number for number, name in enumerate(self.known.layers[BASE])}
        names = [ref.name for ref in leaves(tree) if ref.source == BASE and ref.name in places]
        for one, other in itertools.pairwise(names):
            if places[other] < places[one]:
                raise UsageError(
                    f"{self.origin}: {other} stands before {one} in the checkpoint, and so it does in the model, as in"
                    f" networks that normalise first; where it runs after {one}, name the two by hand"
                )

    def _texts(self) -> Iterator[str]:
        yield from (pattern.text for pattern in leaves(self.rule.tree) if not pattern.is_function)

    def _bindings(self) -> list[dict[str, str]]:
        """Every value of the variables that some anchor fits; one empty binding where there are none."""
        anchors = _anchors(self.rule)
        variables = {variable for text in self._texts() for variable in _variables(text)}
        if not variables:
            return [{}] if any(self._fits(pattern, {}) for pattern in anchors) else []
        found: dict[tuple[tuple[str, str], ...], None] = {}
        for pattern in anchors:
            if _variables(pattern.text) != variables:
                continue
            for name, values in self._fits(pattern, {}):
                plain = {key: value for key, value in values.items() if key != "*"}
                found[tuple(sorted(self._with_dots(plain, pattern, name).items()))] = None
        return [dict(items) for items in found]

    def _with_dots(self, values: Mapping[str, str], pattern: Pattern, name: str) -> dict[str, str]:
        """Values that were read off a name with underscores, as the names of the checkpoint spell them."""
        plain = dict(values)
        for match in _VARIABLE.finditer(pattern.text):
            variable = match[1]
            if not match[3]:
                continue
            spelled = self._spellings(variable).get(values[variable], set())
            if len(spelled) != 1:
                where = f"{self.origin}: {pattern.source}:{name}"
                if not spelled:
                    raise UsageError(f"{where}: no layer is called {values[variable]!r}, with _ for dots")
                raise UsageError(f"{where}: {values[variable]!r} could be {' or '.join(sorted(spelled))}")
            (plain[variable],) = spelled
        return plain

    def _spellings(self, variable: str) -> dict[str, set[str]]:
        """Values of a variable, as other layers' names have them, by their form with underscores."""
        if variable not in self.spellings:
            found = self.spellings[variable] = {}
            for pattern in leaves(self.rule.tree):
                if not pattern.is_function and f"{{{variable}}}" in pattern.text:
                    for _, values in self._fits(pattern, {}):
                        found.setdefault(values[variable].replace(".", "_"), set()).add(values[variable])
        return self.spellings[variable]

    def _tree(self, plan: Plan, binding: Binding) -> Ref | None:
        """The plan with names filled in; None where all of it is optional and absent."""
        if isinstance(plan, Pattern):
            return self._layer(plan, binding)
        if isinstance(plan, Sum):
            parts = [part for branch in plan.parts for part in self._branches(branch, binding)]
            return Sum(tuple(parts)) if parts else None
        chains = list(self._branches(plan, binding))
        if len(chains) > 1:
            raise UsageError(f"{self.origin}: {_text(plan)}: * fits several layers, which only a sum has room for")
        return chains[0] if chains else None

    def _branches(self, branch: Plan, binding: Binding) -> Iterator[Ref]:
        """One instance of a branch, or one for each value of its *."""
        starred = [pattern for pattern in _direct_layers(branch) if "*" in pattern.text and not pattern.is_function]
        bindings: list[Binding] = [binding]
        if starred and "*" not in binding:
            values = {found["*"] for pattern in starred for _, found in self._fits(pattern, binding)}
            if not values and not all(pattern.optional for pattern in starred):
                raise UsageError(f"{self.origin}: {_text(branch)}{_where(binding)} fits no layer")
            bindings = [{**binding, "*": value} for value in sorted(values, key=_natural)]
        for bound in bindings:
            if isinstance(branch, Chain):
                yield from self._chain(branch, bound)
            else:
                tree = self._tree(branch, bound)
                if tree is not None:
                    yield tree

    def _chain(self, chain: Chain[Pattern], binding: Binding) -> Iterator[Ref]:
        parts = [(part, self._part(part, binding)) for part in chain.parts]
        there = [made for part, made in parts if made is not None and not _is_function(part)]
        missing = [part for part, made in parts if made is None]
        if not there and missing:
            return
        required = [part for part in missing if not _optional(part)]
        if required:
            raise UsageError(
                f"{self.origin}: {_text(chain)}{_where(binding)} is only partly there: {_text(required[0])} is not"
            )
        made_parts = [self._scaled(made, there) for _, made in parts if made is not None]
        yield Chain(tuple(part for part in made_parts if part is not None))

    def _part(self, part: Plan, binding: Binding) -> Ref | None:
        """A part of a chain; where it is missing altogether the chain says so."""
        if isinstance(part, Pattern) and not part.is_function:
            refs = self._layers(part, binding)
            return refs[0] if refs else None
        return self._tree(part, binding)

    def _layer(self, pattern: Pattern, binding: Binding) -> LayerRef | None:
        if pattern.is_function:
            return LayerRef(self._asked(self._filled(pattern.text, binding)))
        refs = self._layers(pattern, binding)
        if refs:
            return refs[0]
        if pattern.optional:
            return None
        raise UsageError(
            f"{self.origin}: {str(pattern)!r}{_where(binding)} fits no layer, though other layers of its fusion are"
            " there"
        )

    def _layers(self, pattern: Pattern, binding: Binding) -> list[LayerRef]:
        names = [name for name, _ in self._fits(pattern, binding)]
        if len(names) > 1:
            raise UsageError(
                f"{self.origin}: {str(pattern)!r}{_where(binding)} fits several layers: {', '.join(names[:4])}"
            )
        like = ""
        if names and pattern.like:
            liked = self._fits(_parse_pattern(pattern.like, self.origin), binding)
            if len(liked) != 1:
                raise UsageError(
                    f"{self.origin}: like = {pattern.like!r}{_where(binding)} fits {len(liked)} layers, expected one"
                )
            like = liked[0][0]
        return [LayerRef(name, pattern.source, like) for name in names]

    def _scaled(self, made: Ref, chain: Sequence[Ref]) -> Ref | None:
        """alpha(TENSOR) as the factor that it comes to in its chain; everything else as it is."""
        if not (isinstance(made, LayerRef) and made.name.startswith(f"{_ALPHA}(")):
            return made
        source, _, tensor = made.name.removeprefix(f"{_ALPHA}(").removesuffix(")").rpartition(":")
        optional = tensor.endswith("?")
        alpha = self.known.number(source, tensor.removesuffix("?"))
        if alpha is None and not optional:
            raise UsageError(f"{self.origin}: alpha: there is no tensor {source}:{tensor} of one number")
        first = next(ref for part in chain for ref in leaves(part) if not is_function(ref.name))
        rank = self.known.layers[first.source][first.name].shape[0]
        # An alpha of 0 is how the trainers that write these files say that none was set.
        factor = self.known.strength * (alpha / rank if alpha else 1.0)
        return None if factor == 1 and not alpha else LayerRef(f"scale({factor!r})")

    def _asked(self, text: str) -> str:
        """kernel(LAYER), half(LAYER) and stride(LAYER) inside of a function's arguments, as numbers."""

        def answer(match: re.Match[str]) -> str:
            question, name = match.groups()
            facts = self.known.layers[BASE].get(name)
            if facts is None or facts.kind != "conv":
                raise UsageError(f"{self.origin}: {text}: there is no convolution {name}")
            if question == "stride":
                stride = self.known.fields(name).get("stride", 1)
                return str(stride) if isinstance(stride, int) else format_sizes(stride)
            kernel = facts.shape[2:]
            return format_sizes(kernel if question == "kernel" else (k // 2 for k in kernel))

        return _ASKED.sub(answer, text)

    def _filled(self, text: str, binding: Binding) -> str:
        def value(match: re.Match[str]) -> str:
            bound = binding[match[1]]
            if match[2]:
                return str(int(bound) + int(match[2]))
            return bound.replace(".", "_") if match[3] else bound

        return _VARIABLE.sub(value, text)

    def _fits(self, pattern: Pattern, binding: Binding) -> list[tuple[str, dict[str, str]]]:
        """Layers that a pattern fits under a binding, each with the values of its variables and its *."""
        if pattern.source not in self.known.layers:
            raise UsageError(
                f"{self.origin}: {pattern}: no checkpoint of that name; give one with --with {pattern.source}=FILE"
            )
        layers = self.known.layers[pattern.source]
        if "*" not in pattern.text and _variables(pattern.text) <= binding.keys():  # one name: no need to search
            name = self._filled(pattern.text, binding)
            fits = name in layers and pattern.kind in ("", layers[name].kind)
            return [(name, {})] if fits else []
        expression, shifts = _regex(pattern.text, binding, self.numbers)
        found = []
        for name, facts in layers.items():
            if pattern.kind and pattern.kind != facts.kind:
                continue
            match = expression.fullmatch(name)
            values = None if match is None else _values(match, shifts)
            if values is not None:
                found.append((name, values))
        return found


def _values(match: re.Match[str], shifts: Sequence[tuple[str, int]]) -> dict[str, str] | None:
    """The variables' values in a match; None where {i+1} doesn't go with {i}."""
    values = {"*" if key == "_star" else key: value for key, value in match.groupdict().items()}
    for variable, shift in shifts:
        number = int(values.pop(f"_{shift}_{variable}")) - shift
        if number < 0 or values.setdefault(variable, str(number)) != str(number):
            return None
    return values


def _regex(text: str, binding: Binding, numbers: set[str]) -> tuple[re.Pattern[str], list[tuple[str, int]]]:
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


def _direct_layers(plan: Plan) -> list[Pattern]:
    """The layers of a branch that share its *: those not inside of a sum, whose branches have their own."""
    if isinstance(plan, Pattern):
        return [plan]
    if isinstance(plan, Sum):
        return []
    return [pattern for part in plan.parts for pattern in _direct_layers(part)]


def _is_alpha(pattern: Pattern) -> bool:
    return pattern.text.startswith(f"{_ALPHA}(")


def _is_function(plan: Plan) -> bool:
    return isinstance(plan, Pattern) and plan.is_function


def _optional(plan: Plan) -> bool:
    return all(pattern.optional for pattern in leaves(plan) if not pattern.is_function)


def _base_layers(tree: Ref) -> list[LayerRef]:
    return [ref for ref in leaves(tree) if ref.source == BASE] or list(leaves(tree))


def _check_claims(planned: Sequence[PlannedFusion], origin: str) -> None:
    owners: dict[tuple[str, str], str] = {}
    for fusion in planned:
        for ref in leaves(fusion.tree):
            if is_function(ref.name):
                continue
            owner = owners.setdefault((ref.source, ref.name), "")
            if owner:
                both = f"{owner} and {fusion.name}" if owner != fusion.name else f"{fusion.name}, twice"
                raise UsageError(f"{origin}: {ref.name} is claimed by {both}; a layer can go into one fusion only once")
            owners[ref.source, ref.name] = fusion.name
    for one, other in itertools.pairwise(sorted(fusion.name for fusion in planned)):
        if one == other:
            raise UsageError(f"{origin}: two fusions would both be called {one}")


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts '10' behind '9'."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text))


def _where(binding: Binding) -> str:
    values = ", ".join(f"{name} = {value!r}" for name, value in binding.items())
    return f" ({values})" if values else ""


def _text(plan: Plan) -> str:
    if isinstance(plan, Pattern):
        return str(plan)
    inner = ", ".join(_text(part) for part in plan.parts)
    return f"[{inner}]" if isinstance(plan, Chain) else f"sum[{inner}]"
