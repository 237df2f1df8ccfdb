"""A recipe held against the layers of checkpoints: which layers are to become one, all of them by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from convtool.core.fields import Fields
from convtool.core.geometry import format_sizes
from convtool.core.tree import BASE, Chain, LayerRef, Stack, Sum, Tree, leaves, map_leaves
from convtool.errors import UsageError, about
from convtool.fusing.recipe.language import Plan, Recipe, Rule, anchors_of, texts_of
from convtool.fusing.recipe.pattern import (
    Binding,
    Effort,
    Layers,
    Names,
    Pattern,
    counted_in,
    filled,
    shortened,
    shown,
    variables_of,
)
from convtool.kinds.kind import Kind
from convtool.kinds.shares import shares

Ref: TypeAlias = Tree[LayerRef]

_SHOWN = 8  # parts of a chain or a sum that a message repeats
_ASKED = re.compile(r"\b(kernel|half|stride)\(([^()]*)\)")


class NothingFitsError(UsageError):
    """A recipe is of another family than the checkpoint."""


@dataclass(frozen=True, slots=True)
class PlannedFusion:
    """One fusion with every name resolved; `input_size` where it has to be exact for that one only."""

    name: str
    tree: Ref
    input_size: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What a recipe is resolved against.

    Attributes:
        layers: of every checkpoint.
        fields: what is stated of a layer's geometry.
        ordered: whether the checkpoint has its layers in the model's order.
    """

    layers: Layers
    fields: Callable[[str], Fields] = lambda name: {}
    ordered: bool = False


def resolve(recipe: Recipe, known: Known) -> list[PlannedFusion]:
    """Return the fusions that a recipe means for these layers, in the order of the checkpoint.

    Raises:
        UsageError: a pattern fits nothing, a branch is only partly there, or two fusions claim one layer.
    """
    planned: list[PlannedFusion] = []
    names, effort = {source: Names(layers) for source, layers in known.layers.items()}, Effort()
    order = {name: number for number, name in enumerate(known.layers[BASE])}

    def place(fusion: PlannedFusion) -> int:
        return min(order.get(ref.name, len(order)) if ref.source == BASE else len(order) for ref in leaves(fusion.tree))

    with about(recipe.origin):
        for rule in recipe.rules:
            found = list(_Resolution(rule, known, names, effort).fusions())
            if rule.rest:
                taken = {_claim(ref) for fusion in planned for ref in leaves(fusion.tree) if not ref.written}
                found = [one for one in found if not taken & {_claim(ref) for ref in leaves(one.tree)}]
            if not found and not rule.optional:
                raise NothingFitsError(f"{_text(rule.tree)} fits no layer")
            planned += found
        planned.sort(key=place)
        _check_claims(planned, known.layers)
    if not planned:
        raise NothingFitsError(f"{recipe.origin} fits no layer")
    return planned


class _Resolution:
    """One rule held against the layers of the checkpoints."""

    def __init__(self, rule: Rule, known: Known, names: Mapping[str, Names], effort: Effort) -> None:
        self.rule, self.known, self.names, self.effort = rule, known, names, effort
        self.numbers = {variable for text in texts_of(rule) for variable in counted_in(text)}
        self.places = {name: number for number, name in enumerate(known.layers[BASE])}

    def fusions(self) -> Iterator[PlannedFusion]:
        for binding in self._bindings():
            if not all(self._fits(pattern, binding) for pattern in self.rule.where):
                continue
            if any(self._fits(pattern, binding) for pattern in self.rule.unless):
                continue
            tree = self._tree(self.rule.tree, binding)
            if tree is not None and (not self.rule.same_shape or self._keeps_shape(tree)):
                tree = self._in_order(tree) if self.rule.in_order else tree
                near = (ref.name for ref in leaves(tree) if ref.source == BASE and not ref.written)
                name = self.names[BASE].write(filled(self.rule.name, binding), near)
                yield PlannedFusion(name, tree, self.rule.input_size)

    def _keeps_shape(self, tree: Ref) -> bool:
        """Return whether a tree's first layer gives as many channels as it takes, at stride 1."""
        ref = next(ref for ref in leaves(tree) if not ref.written)
        layer, fields = self.known.layers[ref.source][ref.name], self.known.fields(ref.name)
        strided = "groups" in layer.kind.settable and self._stated("groups", ref.name, ref.name)
        takes, gives = layer.kind.takes(layer.shapes, fields, None), layer.kind.gives(layer.shapes, fields, None)
        stride = self._stated("stride", ref.name, ref.name) if strided and takes == gives else 1
        return takes == gives and (stride == 1 if isinstance(stride, int) else set(stride) == {1})

    def _stated(self, field: str, layer: str, whose: str) -> Any:
        """Return a field that is 1 by torch's default; UsageError, that it is needed, where nobody states it."""
        value = self.known.fields(layer).get(field)
        if value is None:
            raise UsageError(
                f"not stated, and needed: for {shortened(whose)}, {field} of {layer}. To state it:"
                f" --set {layer}.{field}=VALUE"
            )
        return value

    def _in_order(self, tree: Ref) -> Ref:
        """Return the tree, held against the order of the layers; where nobody knows that, it says so of them."""
        if not self.known.ordered:
            first = next(leaves(tree))
            return map_leaves(lambda ref: ref if ref is first or ref.written else replace(ref, unplaced=True), tree)
        places = self.places
        names = [ref.name for ref in leaves(tree) if ref.source == BASE and ref.name in places]
        for one, other in itertools.pairwise(names):
            if places[other] < places[one]:
                raise UsageError(
                    f"{other} stands before {one} in the checkpoint or the model's code, as in"
                    f" networks that normalise first; where it runs after {one}, name the two by hand"
                )
        return tree

    def _bindings(self) -> list[dict[str, str]]:
        """Return every value of the variables that some anchor fits; one empty binding where there are none."""
        anchors = anchors_of(self.rule)
        named = (pattern.text for pattern in leaves(self.rule.tree) if not pattern.is_function)
        variables = {variable for text in named for variable in variables_of(text)}
        if not variables:
            return [{}] if any(self._fits(pattern, {}) for pattern in anchors) else []
        found: dict[tuple[tuple[str, str], ...], None] = {}
        for pattern in anchors:
            if variables_of(pattern.text) != variables:
                continue
            for _, values in self._fits(pattern, {}):
                plain = {key: value for key, value in values.items() if key != "*"}
                found[tuple(sorted(plain.items()))] = None
        return [dict(items) for items in found]

    def _tree(self, plan: Plan, binding: Binding) -> Ref | None:
        """Return the plan with names filled in; None where all of it is optional and absent."""
        if isinstance(plan, Pattern):
            return self._required(plan, binding)
        if isinstance(plan, Sum):
            parts = [part for branch in plan.parts for part in self._branches(branch, binding)]
            together = Stack if isinstance(plan, Stack) else Sum
            return together(tuple(parts)) if parts else None
        chains = list(self._branches(plan, binding))
        if len(chains) > 1:
            raise UsageError(f"{_text(plan)}: * fits several layers, which only a sum has room for")
        return chains[0] if chains else None

    def _branches(self, branch: Plan, binding: Binding) -> Iterator[Ref]:
        """Yield one instance of a branch, or one for each value of its *."""
        starred = [pattern for pattern in _direct_layers(branch) if "*" in pattern.text and not pattern.is_function]
        bindings: list[Binding] = [binding]
        if starred and "*" not in binding:
            values = {found["*"] for pattern in starred for _, found in self._fits(pattern, binding)}
            if not values and not all(pattern.optional for pattern in starred):
                raise UsageError(f"{_text(branch)}{_where(binding)} fits no layer")
            bindings = [{**binding, "*": value} for value in sorted(values, key=_natural)]
        for bound in bindings:
            if isinstance(branch, Chain):
                yield from self._chain(branch, bound)
            else:
                tree = self._tree(branch, bound)
                if tree is not None:
                    yield tree

    def _chain(self, chain: Chain[Pattern], binding: Binding) -> Iterator[Ref]:
        # Where a layer is missing altogether, the chain says so.
        parts = [
            (part, self._layer(part, binding) if isinstance(part, Pattern) else self._tree(part, binding))
            for part in chain.parts
        ]
        there = [made for part, made in parts if made is not None and not _is_function(part)]
        missing = [part for part, made in parts if made is None]
        if not there and missing:
            return
        required = [part for part in missing if not _optional(part)]
        if required:
            raise UsageError(f"{_text(chain)}{_where(binding)} is only partly there: {_text(required[0])} is not")
        yield Chain(tuple(made for _, made in parts if made is not None))

    def _required(self, pattern: Pattern, binding: Binding) -> LayerRef | None:
        """Return the layer that a pattern fits; UsageError where there is none, and there has to be one."""
        ref = self._layer(pattern, binding)
        if ref or pattern.optional:
            return ref
        there = [name for anchor in anchors_of(self.rule) for name, _ in self._fits(anchor, binding)]
        raise UsageError(
            f"{str(pattern)!r}{_where(binding)} fits no layer, though other layers of its fusion are"
            f" there ({', '.join(there[:2])}); a ! behind a pattern has it alone say where fusions are"
        )

    def _layer(self, pattern: Pattern, binding: Binding) -> LayerRef | None:
        if pattern.is_function:
            return LayerRef(self._asked(filled(pattern.text, binding)))
        names = [name for name, _ in self._fits(pattern, binding)]
        if len(names) > 1:
            raise UsageError(f"{str(pattern)!r}{_where(binding)} fits several layers: {', '.join(names[:4])}")
        if not names:
            return None
        liked = self._fits(pattern.like, binding) if pattern.like else [("", {})]
        if len(liked) != 1:
            raise UsageError(f"like = {str(pattern.like)!r}{_where(binding)} fits {len(liked)} layers, expected one")
        return LayerRef(names[0], pattern.source, liked[0][0])

    def _asked(self, text: str) -> str:
        """kernel(LAYER), half(LAYER) and stride(LAYER) inside of a function's arguments, as numbers."""

        def answer(match: re.Match[str]) -> str:
            question, name = match.groups()
            layer = self.names[BASE].find(name)
            if layer is None or not (axes := self.known.layers[BASE][layer].axes()):
                raise UsageError(f"{shortened(text)}: there is no convolution {shortened(name)}")
            if question == "stride":
                stride = self._stated("stride", layer, text)
                return str(stride) if isinstance(stride, int) else format_sizes(stride)
            kernel = self.known.layers[BASE][layer].shapes["weight"][-axes:]
            return format_sizes((k // 2 for k in kernel) if question == "half" else kernel)

        name, opened, inside = text.partition("(")
        return f"{name}{opened}{_ASKED.sub(answer, inside)}"

    def _fits(self, pattern: Pattern, binding: Binding) -> list[tuple[str, dict[str, str]]]:
        """Return layers that a pattern fits under a binding, each with the values of its variables and its *."""
        if pattern.source not in self.names:
            source = shortened(pattern.source)
            raise UsageError(f"{pattern}: no checkpoint of that name; give one with --with {source}=FILE")
        return self.names[pattern.source].fits(pattern, binding, self.numbers, self.effort)


def _direct_layers(plan: Plan) -> list[Pattern]:
    """Return the layers of a branch that share its *: those not inside of a sum, whose branches have their own."""
    if isinstance(plan, Pattern):
        return [plan]
    if isinstance(plan, Sum):
        return []
    return [pattern for part in plan.parts for pattern in _direct_layers(part)]


def _is_function(plan: Plan) -> bool:
    return isinstance(plan, Pattern) and plan.is_function


def _optional(plan: Plan) -> bool:
    return all(pattern.optional for pattern in leaves(plan) if not pattern.is_function)


def _claim(ref: LayerRef) -> tuple[str, str]:
    return ref.source, ref.name


def _check_claims(planned: Sequence[PlannedFusion], layers: Layers) -> None:
    def owned(ref: LayerRef) -> tuple[str, Kind] | None:
        own = ref.source == BASE and not ref.written
        return (ref.name, layers[BASE][ref.name].kind) if own else None

    owners: dict[tuple[str, str], str] = {}
    for fusion in planned:
        parts = shares(fusion.tree, owned)
        for ref in leaves(fusion.tree):
            if ref.written or ref.name in parts:
                continue
            owner = owners.setdefault((ref.source, ref.name), "")
            if owner:
                both = f"{owner} and {fusion.name}" if owner != fusion.name else f"{fusion.name}, twice"
                raise UsageError(f"{ref.name} is claimed by {both}; a layer can go into one fusion only once")
            owners[ref.source, ref.name] = fusion.name
    for one, other in itertools.pairwise(sorted(fusion.name for fusion in planned)):
        if one == other:
            raise UsageError(f"two fusions would both be called {one}")


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts '10' behind '9'."""
    parts = re.split(r"([0-9]+)", text)
    # Numbers by their length first, so that none has to be made of a thousand digits.
    return tuple(
        (len(part.lstrip("0")), part.lstrip("0")) if part.isascii() and part.isdigit() else (-1, part) for part in parts
    )


def _where(binding: Binding) -> str:
    values = ", ".join(f"{name} = {shown(value)}" for name, value in binding.items())
    return f" ({values})" if values else ""


def _text(plan: Plan) -> str:
    """Return a part of a recipe in words: all of it, or its beginning."""
    if isinstance(plan, Pattern):
        return str(plan)
    inner = ", ".join(_text(part) for part in plan.parts[:_SHOWN])
    more = ", ..." if len(plan.parts) > _SHOWN else ""
    name = "" if isinstance(plan, Chain) else "stack" if isinstance(plan, Stack) else "sum"
    return f"{name}[{inner}{more}]"
