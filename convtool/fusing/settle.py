"""What becomes of fields that nobody states: left open, assumed and said to be, or asked for, all in one message."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from convtool.checkpoint import Checkpoint
from convtool.core.names import some_of
from convtool.core.tree import Sum, Tree, leaves, map_leaves
from convtool.errors import UsageError
from convtool.fusing.dependence import BORDER, KERNEL, depends, infer_strides, probes, taps_alone
from convtool.fusing.leaf import LoweredLayer, spatial_size
from convtool.kinds.kind import format_value

NUMBERS, MATRIX = "for the numbers", "for the matrix"
MOST_SETTINGS = 6  # fields that are spelled out to be stated one by one
# What hides the least behind it is settled first: without padding, most else doesn't matter.
_ORDER = ("padding", "stride", "dilation", "transposed", "groups", "padding_mode", "output_padding")


@dataclass(frozen=True, slots=True)
class Missing:
    """A field that nobody states, and what depends on it."""

    layer: LoweredLayer
    field: str
    what: str


def settle(
    trees: Sequence[Tree[LoweredLayer]],
    checkpoints: Mapping[str, Checkpoint],
    assume: Collection[str],
    *,
    sizes: Sequence[Sequence[int] | None] = (),
    border: bool | None = None,
) -> list[Tree[LoweredLayer]]:
    """Return trees that are to become single layers, with everything known on which these depend.

    Args:
        checkpoints: by the origin that layers name.
        assume: the fields for which torch's default is accepted.
        sizes: of each tree's input, for those that have to be exact for one size only.
        border: they may differ at the border, and what differs there is said; None where nobody is asked.

    Raises:
        UsageError: what matters is stated nowhere; the message names all of it.
    """
    missing: list[Missing] = []
    sizes = sizes or [None] * len(trees)
    made = [_settled(tree, assume, size, bool(border), missing) for tree, size in zip(trees, sizes, strict=True)]
    if border is False and any((one.what, one.field) == (BORDER, "padding") for one in missing):
        hint = "where padding makes the border differ, --allow-border accepts that; "
    else:
        hint = ""
    _check(missing, checkpoints, hint)
    return made


def settle_alone(
    layers: Iterable[LoweredLayer],
    checkpoints: Mapping[str, Checkpoint],
    assume: Collection[str],
    *,
    weight_only: bool = False,
) -> list[LoweredLayer]:
    """Return layers of which matrices are to be made, with everything known on which these depend; see `settle`.

    Args:
        weight_only: they aren't for one input size, and of where the taps read nothing is said.
    """
    missing: list[Missing] = []
    made = []
    for leaf in layers:
        for name in _ordered(leaf):
            ruled = name in leaf.computed.kind.by_rule
            if _changes(leaf, name) and (ruled or not (weight_only and leaf.open[name])):
                if ruled or name in assume:
                    leaf = _assumed(leaf, name)
                else:
                    missing.append(Missing(leaf, name, MATRIX))
        made.append(leaf)
    _check(missing, checkpoints)
    return made


def _settled(
    tree: Tree[LoweredLayer],
    assume: Collection[str],
    input_size: Sequence[int] | None,
    border: bool,
    missing: list[Missing],
) -> Tree[LoweredLayer]:
    """Return the tree with what matters assumed where that is accepted; the rest of it is added to `missing`."""
    tree = infer_strides(tree)
    begun, size = len(missing), spatial_size(tree, input_size)
    places = [(number, name, leaf) for number, leaf in enumerate(leaves(tree)) for name in _ordered(leaf)]
    ruled = {leaf.variable(name): (n, name) for n, name, leaf in reversed(places) if name in leaf.computed.kind.by_rule}
    others = {leaf.variable(name): (n, name, leaf) for n, name, leaf in places if leaf.variable(name) not in ruled}
    chosen = set(ruled)  # what has torch's default: what is assumed by rule, while the rest is looked at
    looked_at = _with_defaults(tree, chosen)
    for variable, (number, name, leaf) in sorted(others.items(), key=lambda one: -one[1][0]):
        what = _what_depends(looked_at, number, name, size, border)
        if what and name in assume:
            chosen.add(variable)
            looked_at = _with_defaults(tree, chosen)
        elif what:
            whose = next((one for one in leaves(tree) if variable == f"{one.name}.{name}"), leaf)
            missing.insert(begun, Missing(whose, name, what))
    for variable, (number, name) in reversed(ruled.items()):
        # It is left open again where nothing depends on it then.
        if not _what_depends(_with_defaults(tree, chosen - {variable}), number, name, size, border):
            chosen.remove(variable)
    return _with_defaults(tree, chosen)


def _with_defaults(tree: Tree[LoweredLayer], chosen: Collection[str]) -> Tree[LoweredLayer]:
    """Return the tree with torch's default for the open fields that these variables are."""

    def assumed(leaf: LoweredLayer) -> LoweredLayer:
        return reduce(_assumed, [name for name in _ordered(leaf) if leaf.variable(name) in chosen], leaf)

    return map_leaves(assumed, tree)


def _what_depends(tree: Tree[LoweredLayer], number: int, name: str, size: tuple[int, ...] | None, border: bool) -> str:
    """Return what depends on an open field of the tree's layer of that number; '' where nothing does."""
    leaf = list(leaves(tree))[number]
    if name in leaf.computed.kind.channelwise:
        # A transposed layer's weight has its input channels first, so that those are cut where its groups cut them.
        return KERNEL if leaf in _mixed(tree, False, before=leaf.conv.geometry.transposed) else ""
    if not leaf.open[name]:
        return NUMBERS
    looked_at = probes(taps_alone(tree))
    variable = next(one.variable for one in list(leaves(looked_at))[number].open if one.field == name)
    return depends(looked_at, variable, size, border)


def _mixed(tree: Tree[LoweredLayer], mixed: bool, *, before: bool) -> list[LoweredLayer]:
    """Return the layers behind which, or before which, another one mixes channels.

    Args:
        mixed: something behind (or before) the tree does.
    """
    if isinstance(tree, LoweredLayer):
        return [tree] if mixed else []
    if isinstance(tree, Sum):
        return [leaf for part in tree.parts for leaf in _mixed(part, mixed, before=before)]
    found = []
    for part in tree.parts if before else reversed(tree.parts):
        found += _mixed(part, mixed, before=before)
        mixed = mixed or any(leaf.conv.in_channels > leaf.conv.geometry.groups for leaf in leaves(part))
    return found


def _ordered(leaf: LoweredLayer) -> list[str]:
    return sorted(leaf.open, key=lambda name: _ORDER.index(name) if name in _ORDER else -1)


def _changes(leaf: LoweredLayer, name: str) -> bool:
    """Return whether a layer's matrix depends on an open field, by the values to try of it."""
    values = leaf.open[name]
    if not values:
        return True
    seen = set()
    for value in values:
        try:
            geometry = leaf.computed.kind.with_fields(leaf.conv.geometry, {**leaf.own_fields, name: value})
        except UsageError:
            continue
        seen.add(geometry if geometry.padded else replace(geometry, padding_mode="zeros"))
    return len(seen) > 1


def _assumed(leaf: LoweredLayer, name: str) -> LoweredLayer:
    return leaf.with_field(name, leaf.computed.kind.defaults[name], assumed=True)


# --- the message


def _check(missing: Sequence[Missing], checkpoints: Mapping[str, Checkpoint], hint: str = "") -> None:
    """Raise UsageError where anything is missing.

    Args:
        hint: what else to think of, ending in '; '.
    """
    if not missing:
        return
    needed: dict[str, dict[str, list[str]]] = {}
    for one in missing:
        needed.setdefault(one.what, {}).setdefault(one.field, []).append(one.layer.name)
    said = "; ".join(
        f"{what}, {', '.join(_named(name, layers, missing, checkpoints) for name, layers in fields.items())}"
        for what, fields in needed.items()
    )
    defaults = {one.field: one.layer.computed.kind.defaults[one.field] for one in missing}
    names, values = ",".join(defaults), ", ".join(f"{name} {format_value(value)}" for name, value in defaults.items())
    to_paste = _to_paste(missing)
    raise UsageError(
        f"nothing states what the result depends on: {said}; --model CODE reads it off the model; --assume {names}"
        f" accepts torch's default{'s' if ',' in names else ''} ({values}); {hint}to state"
        f" {'them' if len(missing) > 1 else 'it'}: {to_paste}",
        to_paste,
    )


def _named(name: str, layers: list[str], missing: Sequence[Missing], checkpoints: Mapping[str, Checkpoint]) -> str:
    """Return a field and the layers of which it is missing, with what hangs on it where the tensors tell."""
    same = [one.layer for one in missing if one.field == name]
    found = [leaf.computed.kind.apart(name, checkpoints[leaf.origin].tensors_of(leaf.layer)) for leaf in same]
    told = max((one for one in found if one is not None), default=None)
    return f"{name} of {some_of(layers)}" + (
        "" if told is None else f" ({told[1]}: weights up to {told[0]:.2g}% apart)"
    )


def _to_paste(missing: Sequence[Missing]) -> str:
    """Return the options that state what is missing, with a word where the values go: nobody knows these."""
    said = (
        "--eps VALUE" if one.field == "eps" else f"--set {shlex.quote(f'{one.layer.name}.{one.field}=VALUE')}"
        for one in missing
    )
    settings = list(dict.fromkeys(said))
    if len(settings) > MOST_SETTINGS:
        return "--geometry FILE"
    return " ".join(settings)
