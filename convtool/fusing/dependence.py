"""What a fusion depends on among the fields that nobody states, found by trying values.

Which taps meet in a fused kernel, and whether padding hides anything, hangs on geometry and on which layers have a
bias, not on channels or numbers. So layers of one channel, an axis at a time, are fused with one value of a field and
then with another, all else the same, by the code that fuses the layers themselves: where the kernel or the verdict
differs, the field matters. The other open fields are held at several values meanwhile, as a padding may matter only
where the next layer pads. A field on which nothing depends may have any value, and is given none.

What stands at the end of a chain and reads one position for each that it gives, as a batch norm does, moves no tap and
hides none, so that a chain is looked at without it. Of a convolution and its batch norm one layer is left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch

from convtool.core.conv import Conv
from convtool.core.expression import fused_geometry
from convtool.core.fields import Fields, geometry_fields
from convtool.core.fuse import NamedConv, fuse_tree
from convtool.core.geometry import Geometry
from convtool.core.tree import Chain, Sum, Tree, fold, leaves, map_leaves
from convtool.errors import RefusedError, UsageError
from convtool.fusing.leaf import LoweredLayer
from convtool.kinds.kind import Kind

KERNEL, BORDER = "for the fused kernel", "for where the fusion is exact"

Value: TypeAlias = tuple[str, object]
Values: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Open:
    """A field that nobody states.

    Attributes:
        variable: what it is called among all fields of a tree; layers that share a value share it.
        values: to try; the first is the default.
    """

    field: str
    variable: str
    values: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A layer of one channel, over all axes of the layer that it stands for or over one of them.

    Attributes:
        geometry: with the defaults of what is open.
        fields: what is known, as the kind takes it.
        axis: the one that it is looked at on; None for all.
    """

    kind: Kind
    geometry: Geometry
    fields: tuple[Value, ...]
    open: tuple[Open, ...]
    biased: bool
    axis: int | None = None

    def lowered(self, number: int, values: Values) -> NamedConv:
        """Return the layer with these values of what is open, its taps made up and whole numbers."""
        geometry = self.geometry
        if self.open:
            given = {one.field: values[one.variable] for one in self.open if one.variable in values}
            geometry = replace(self.kind.with_fields(geometry, dict(self.fields) | given), groups=1)
        if self.axis is not None:
            geometry = Geometry.from_axes([geometry.axes[self.axis]], 1)
        count = torch.Size(geometry.kernel_size).numel()
        taps = (torch.arange(count, dtype=torch.float64) * (2 * number + 3)) % 11 + 1
        bias = torch.ones(1, dtype=torch.float64) if self.biased else None
        return NamedConv(f"{number}", Conv(taps.reshape(1, 1, *geometry.kernel_size), bias, geometry))


def taps_alone(tree: Tree[LoweredLayer]) -> Tree[LoweredLayer]:
    """Return a tree without the layers at its end that read one position for each that they give."""
    if not isinstance(tree, Chain):
        return tree
    parts = list(tree.parts)
    while len(parts) > 1 and isinstance(parts[-1], LoweredLayer) and _is_point(parts[-1]):
        parts.pop()
    return Chain(tuple(parts)) if len(parts) > 1 else taps_alone(parts[0])


def _is_point(leaf: LoweredLayer) -> bool:
    """Return whether a layer's output reads the input at its own position, whatever is open of it."""
    geometry = leaf.conv.geometry
    return not leaf.open.keys() - leaf.computed.kind.channelwise - {"eps"} and geometry == Geometry.of(
        (1,) * len(geometry.kernel_size), groups=geometry.groups
    )


def probes(tree: Tree[LoweredLayer]) -> Tree[Probe]:
    """Return the tree of the layers' probes."""
    shared: dict[str, str] = {}
    _shared_strides(tree, shared)
    numbers: dict[str, str] = {}  # so that layers alike are looked at once, whatever they are called

    def variable(leaf: LoweredLayer, name: str) -> str:
        return numbers.setdefault(_one(leaf.variable(name), shared), f"{len(numbers)}")

    def probe(leaf: LoweredLayer) -> Probe:
        found = [Open(name, variable(leaf, name), tuple(some)) for name, some in leaf.open.items() if some]
        channelwise = leaf.computed.kind.channelwise
        known = tuple((name, _frozen(value)) for name, value in leaf.own_fields.items() if name not in channelwise)
        geometry = replace(leaf.conv.geometry, groups=1)
        return Probe(leaf.computed.kind, geometry, known, tuple(found), leaf.conv.has_bias)

    return map_leaves(probe, tree)


def depends(tree: Tree[Probe], variable: str, size: tuple[int, ...] | None, border: bool) -> str:
    """Return what about the one layer in place of a tree depends on a variable; '' where nothing does.

    Args:
        size: the one that it has to be exact for.
        border: what differs where it isn't exact counts as well.
    """
    if isinstance(tree, Probe):  # then it stands for itself
        return ""
    found = set()
    for axis, alone in _axes(tree):
        here = None if size is None else (size[axis],)
        values = next(one.values for leaf in leaves(alone) for one in leaf.open if one.variable == variable)
        for context in _contexts(alone):
            every = (tuple(sorted((context | {variable: one}).items())) for one in values)
            outcomes = [_outcome(alone, chosen, here, border) for chosen in every]
            ran = [one for one in outcomes if one is not None]
            if len({one.kernel for one in ran if one.kernel}) > 1:
                return KERNEL
            found |= {BORDER} if any(one != ran[0] for one in ran) else set()
    return next(iter(found), "")


def fused_fields(tree: Tree[LoweredLayer], geometry: Geometry) -> tuple[Fields, tuple[str, ...]]:
    """Return what is known of the geometry of the one layer in place of a tree, and which of it nobody stated.

    Args:
        geometry: of that layer, with the defaults of what is open.
    """
    full, layers = geometry_fields(geometry), list(leaves(tree))
    if not any(leaf.open or leaf.assumed for leaf in layers):
        return full, ()
    looked_at = probes(taps_alone(map_leaves(_reopened, tree)))
    # The default doesn't pad, and so has no mode; a layer that may pad has.
    full["padding_mode"] = (_geometry(looked_at, {}) or full)["padding_mode"]
    variables = [
        (one.variable, one.field in leaf.assumed)
        for leaf, probe in zip(layers, leaves(looked_at), strict=False)  # what is left out stands at the end
        for one in probe.open
    ]
    known = fixed_fields(looked_at, frozenset(name for name, assumed in variables if not assumed))
    sure = fixed_fields(looked_at, frozenset(name for name, _ in variables))
    for name in {name for leaf in layers for name in leaf.computed.kind.channelwise}:
        known -= {name} if any(name in leaf.open for leaf in layers) else set()
        sure -= {name} if any(name in leaf.open or name in leaf.assumed for leaf in layers) else set()
    # What has no value to be varied to, as an output padding hasn't while nobody knows of a transposed layer.
    for leaf in layers:
        known -= {name for name, values in leaf.open.items() if len(values) == 1} & leaf.computed.kind.by_rule
    return {name: value for name, value in full.items() if name in known}, tuple(sorted(known - sure))


def changed_fields(tree: Tree[LoweredLayer], leaf: LoweredLayer) -> frozenset[str]:
    """Return the geometry fields in which the one layer in place of a tree may be another than a layer of the tree.

    Those of which nothing is known count where they differ for some value of what is open.
    """
    bare = taps_alone(tree)
    kept = bare if any(one is leaf for one in leaves(bare)) else tree
    return _changed(probes(kept), next(n for n, one in enumerate(leaves(kept)) if one is leaf))


@lru_cache(maxsize=1024)
def _changed(looked_at: Tree[Probe], number: int) -> frozenset[str]:
    own = list(leaves(looked_at))[number]
    opened = [one for probe in leaves(looked_at) for one in probe.open]
    changed: set[str] = set()
    for base in ({}, _seconds(looked_at)):
        for values in (base, *({**base, one.variable: value} for one in opened for value in one.values)):
            fused = _geometry(looked_at, values)
            before = _geometry(own, values) or _told(own.geometry)
            names = {name for name, value in (fused or {}).items() if value != before[name]}
            padded = any(sum(sides) for sides in before["padding"])
            if fused and fused["padding_mode"] == "zeros" and not padded:  # then a mode of its own was nobody's
                names.discard("padding_mode")
            changed |= names
    return frozenset(changed)


def _reopened(leaf: LoweredLayer) -> LoweredLayer:
    """Return a layer without what was assumed of it."""
    fields = {name: value for name, value in leaf.fields.items() if name not in leaf.assumed}
    tried = leaf.computed.kind.trials(leaf.computed.shapes, fields, None) if leaf.layer.tensors else {}
    return replace(leaf, fields=fields, open={**{name: tried.get(name, ()) for name in leaf.assumed}, **leaf.open})


@lru_cache(maxsize=1024)
def fixed_fields(tree: Tree[Probe], varied: frozenset[str]) -> frozenset[str]:
    """Return the fields of the one layer in place of a tree that are the same whatever the varied ones are."""
    opened = {one.variable: one for leaf in leaves(tree) for one in leaf.open}
    same: set[str] | None = None
    for base in ({}, _seconds(tree)):
        first = _geometry(tree, base)
        if first is None:
            continue
        same = set(first) if same is None else same
        for name in varied & opened.keys():
            tried = (_geometry(tree, {**base, name: value}) for value in opened[name].values)
            others = [one for one in tried if one is not None]
            same -= {field for field, one in first.items() if any(other[field] != one for other in others)}
            if len(others) == 1 < len(opened[name].values):  # alone it can't be otherwise, and so says nothing
                same.discard(opened[name].field)
    return frozenset(same or ())


class _Outcome(NamedTuple):
    kernel: tuple[float, ...]
    verdict: tuple[object, ...]


@lru_cache(maxsize=1 << 14)
def _outcome(
    tree: Tree[Probe], values: tuple[Value, ...], size: tuple[int, ...] | None, border: bool
) -> _Outcome | None:
    """Return kernel and verdict of the tree as one layer; None where no such layers can be."""
    try:
        fusion = fuse_tree(_lowered(tree, dict(values)), input_size=size, allow_border=True, dtype=torch.float64)
    except UsageError:
        return None
    except RefusedError:
        return _Outcome((), ("refused",))
    verdict = fusion.verdict
    return _Outcome(
        tuple(fusion.conv.weight.flatten().tolist()),
        (verdict.exact, verdict.inside, *((verdict.rim,) if border else ())),
    )


def _lowered(tree: Tree[Probe], values: Values) -> Tree[NamedConv]:
    numbers = itertools.count()
    return map_leaves(lambda leaf: leaf.lowered(next(numbers), values), tree)


def _geometry(tree: Tree[Probe], values: Values) -> Fields | None:
    try:
        return _told(fused_geometry(map_leaves(lambda leaf: leaf.conv, _lowered(tree, values))))
    except (UsageError, RefusedError):
        return None


def _seconds(tree: Tree[Probe]) -> dict[str, object]:
    """Return the second value to try of everything open that isn't assumed by rule: a layer that pads, and so on."""
    return {
        one.variable: one.values[min(1, len(one.values) - 1)]
        for leaf in leaves(tree)
        for one in leaf.open
        if one.field not in leaf.kind.by_rule
    }


def _told(geometry: Geometry) -> Fields:
    """Return a geometry's fields; a kernel of one tap has any dilation, and so the same as all others."""
    pairs = zip(geometry.kernel_size, geometry.dilation, strict=True)
    return geometry_fields(replace(geometry, dilation=tuple(1 if k == 1 else d for k, d in pairs)))


def _axes(tree: Tree[Probe]) -> Iterator[tuple[int, Tree[Probe]]]:
    """Yield the tree on each axis on which it is another than on those before."""

    def on(axis: int) -> Tree[Probe]:
        return map_leaves(lambda leaf: replace(leaf, axis=axis), tree)

    seen = set()
    for axis, alone in enumerate(map(on, range(len(next(leaves(tree)).geometry.kernel_size)))):
        looks = map_leaves(lambda leaf: (leaf.lowered(0, {}).conv.geometry, leaf.open, leaf.biased), alone)
        if looks not in seen:
            seen.add(looks)
            yield axis, alone


def _contexts(tree: Tree[Probe]) -> Iterator[dict[str, object]]:
    """Yield values of everything open: of each field its first, its second, ... in all layers."""
    opened = [one for leaf in leaves(tree) for one in leaf.open]
    fields = {one.field: max(len(other.values) for other in opened if other.field == one.field) for one in opened}
    for numbers in itertools.product(*map(range, fields.values())):
        chosen = dict(zip(fields, numbers, strict=True))
        yield {one.variable: one.values[min(chosen[one.field], len(one.values) - 1)] for one in opened}


def _shared_strides(tree: Tree[LoweredLayer], shared: dict[str, str]) -> list[str]:
    """Return the open strides along a tree; those of branches are one, and go into `shared` under the name of it."""
    if isinstance(tree, LoweredLayer):
        return [_one(tree.variable("stride"), shared)] if "stride" in tree.open else []
    paths = [_shared_strides(part, shared) for part in tree.parts]
    if isinstance(tree, Chain):
        return [name for path in paths for name in path]
    if all(len(path) == 1 for path in paths):
        first = _one(paths[0][0], shared)
        shared |= {name: first for (other,) in paths if (name := _one(other, shared)) != first}
    return max(paths, key=len)


def _one(name: str, shared: Mapping[str, str]) -> str:
    """Return the name of a variable that is one with others."""
    return _one(shared[name], shared) if name in shared else name


def infer_strides(tree: Tree[LoweredLayer]) -> Tree[LoweredLayer]:
    """Return the tree with the strides known that follow from a parallel branch: all branches of a sum share theirs."""
    if isinstance(tree, LoweredLayer):
        return tree
    parts = tuple(map(infer_strides, tree.parts))
    if isinstance(tree, Chain):
        return Chain(parts)
    settled = next((part for part in parts if not any("stride" in leaf.open for leaf in leaves(part))), None)
    if settled is None or any(leaf.conv.geometry.transposed for part in parts for leaf in leaves(part)):
        return Sum(parts)
    return Sum(tuple(_with_stride(part, _stride(settled)) for part in parts))


def _with_stride(part: Tree[LoweredLayer], total: tuple[int, ...]) -> Tree[LoweredLayer]:
    opened = [leaf for leaf in leaves(part) if "stride" in leaf.open]
    own = _stride(part)  # the open ones' are 1
    if not opened or any(all_ % one for all_, one in zip(total, own, strict=True)):
        return part
    stride = tuple(all_ // one for all_, one in zip(total, own, strict=True))
    if len(opened) > 1 and set(stride) != {1}:
        return part
    said = f"{opened[0].computed.kind.say('stride', stride)} (as the branch beside it has it)"
    return map_leaves(lambda leaf: leaf.with_field("stride", stride, said=said) if leaf in opened else leaf, part)


def _stride(tree: Tree[LoweredLayer]) -> tuple[int, ...]:
    """Return the product of the strides along a branch."""

    def product(each: list[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(map(math.prod, zip(*each, strict=True)))

    return fold(tree, lambda leaf: leaf.conv.geometry.stride, product, lambda each: each[0])


def _frozen(value: Any) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
