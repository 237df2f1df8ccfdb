"""Each number of the one layer that stands for a tree, a second way: the tree's impulse response with its padding off.

An impulse at input position q reaches the outputs o of a layer where q = o*s - p + t*d for a tap t, and there it meets
that tap alone. Layer by layer, and by matrix products over what is reached and nothing else, this gives what the tree
makes of the impulse: at output o the number that the one layer has to have in the tap t with q = o*S - P + t*D. One
impulse for each residue of the stride S, on each axis, meets every tap. Nothing of `convtool.core.compose` is used.

Factors per channel, as batch norms are, stay apart until numbers are asked for, so that a layer and its batch norm take
one product for each number, and no copy of the weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from convtool.core.bound import fused_geometry
from convtool.core.conv import Conv
from convtool.core.expression import Expression, in_channels
from convtool.core.geometry import Axis
from convtool.core.tree import Chain, Sum, leaves
from convtool.errors import RefusedError

ROWS = 1 << 16  # numbers that are made together; they stay in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What an impulse in each channel becomes.

    Attributes:
        weight: (C_out, C_in/groups, *places), as stored or in float64; None for what passes through unchanged.
        factors: (C_out,) in float64, by which it is still to be multiplied; None for none.
        places: on each axis, the outputs that it reaches.
        channels: of the input.
    """

    weight: Tensor | None
    factors: Tensor | None
    places: tuple[tuple[int, ...], ...]
    channels: int
    groups: int

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the response of the output channels start:stop, in float64."""
        size = (1,) * len(self.places)
        if self.weight is None:
            ones = torch.ones(self.channels, dtype=torch.float64) if self.factors is None else self.factors
            return ones[start:stop].reshape(-1, 1, *size)
        found = self.weight[start:stop].to(torch.float64)
        return found if self.factors is None else found * self.factors[start:stop].reshape(-1, 1, *size)

    def regrouped(self, groups: int) -> Response:
        """Return it with fewer groups, zeros written out between those that it has."""
        if groups == self.groups:
            return self
        return replace(self, weight=regrouped(self.numbers(), self.groups, groups), factors=None, groups=groups)


def regrouped(weight: Tensor, old: int, groups: int) -> Tensor:
    """Return (C_out, C_in/old, *places) as (C_out, C_in/groups, *places), with zeros between the old groups."""
    if old == groups:
        return weight
    rows, inner = len(weight) // old, weight.shape[1]
    out = weight.new_zeros(len(weight), old // groups, inner, *weight.shape[2:])
    for group in range(old):
        part = slice(group * rows, (group + 1) * rows)
        out[part, group % (old // groups)] = weight[part]
    return out.flatten(1, 2)


def responses(tree: Expression) -> Iterator[tuple[tuple[int, ...], Response]]:
    """Yield the residues of the stride, an input position on each axis, and what an impulse there becomes.

    Raises:
        RefusedError: no single layer stands for the tree, or it isn't made of real layers that aren't transposed.
    """
    for conv in leaves(tree):
        check_plain(conv)
    for residue in itertools.product(*map(range, fused_geometry(tree).stride)):
        channels = in_channels(tree)
        yield residue, _through(tree, Response(None, None, tuple((at,) for at in residue), channels, channels))


def check_plain(conv: Conv) -> None:
    """Raise RefusedError for a layer whose impulse response isn't taken here."""
    if conv.geometry.transposed or conv.has_bias_map or conv.dtype.is_complex:
        raise RefusedError("the response of a transposed or complex layer, or one of a bias map, isn't taken")


def constant(tree: Expression) -> Tensor | None:
    """Return what the tree makes of zeros, far from any border: (C_out,) in float64; None for nothing."""

    def through(part: Expression, given: Tensor | None) -> Tensor | None:
        if isinstance(part, Chain):
            return reduce(lambda value, one: through(one, value), part.parts, given)
        if isinstance(part, Sum):
            found = [value for one in part.parts if (value := through(one, given)) is not None]
            return reduce(torch.add, found) if found else None
        made = None if given is None else _of_constant(part, given)
        bias = None if part.bias is None else part.bias.to(torch.float64)
        return bias if made is None else made if bias is None else made + bias

    return through(tree, None)


def _of_constant(conv: Conv, value: Tensor) -> Tensor:
    groups, inner = conv.geometry.groups, conv.weight.shape[1]
    gain = conv.weight.to(torch.float64).reshape(groups, conv.out_channels // groups, inner, *conv.weight.shape[2:])
    gain = gain.sum(tuple(range(3, gain.dim()))) if gain.dim() > 3 else gain  # (groups, C_out/groups, C_in/groups)
    each = gain @ value.reshape(groups, inner, 1)
    return each.flatten()


def _through(tree: Expression, response: Response) -> Response:
    if isinstance(tree, Chain):
        return reduce(lambda at, part: _through(part, at), tree.parts, response)
    if isinstance(tree, Sum):
        return _total([_through(part, response) for part in tree.parts])
    if tree.only_scales:
        factors = tree.weight.to(torch.float64).flatten()
        return replace(response, factors=factors if response.factors is None else response.factors * factors)
    if response.weight is None:
        return _first(tree, response)
    return _behind(tree, response)


def _reached(axis: Axis, places: Sequence[int]) -> dict[int, tuple[list[int], list[int]]]:
    """Return the outputs that read one of the places: the taps that do so, and which places these read."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for tap, (number, place) in itertools.product(range(axis.kernel), enumerate(places)):
        output, apart = divmod(place + axis.before - tap * axis.dilation, axis.stride)
        if not apart:
            taps, numbers = found.setdefault(output, ([], []))
            taps.append(tap)
            numbers.append(number)
    return found


def _first(conv: Conv, response: Response) -> Response:
    """Return the response behind the first layer that isn't a factor: its taps, each at the output that reads so."""
    weight, places = conv.weight, []
    for number, (axis, at) in enumerate(zip(conv.geometry.axes, response.places, strict=True), 2):
        found = _reached(axis, at)
        taps = sorted(taps[0] for taps, _ in found.values())
        outputs = {taps[0]: output for output, (taps, _) in found.items()}
        places.append(tuple(outputs[tap] for tap in taps))
        if len(taps) < axis.kernel:
            step = taps[1] - taps[0] if len(taps) > 1 else 1
            weight = weight[(slice(None),) * number + (slice(*(taps[0], taps[-1] + 1, step) if taps else (0, 0)),)]
    groups = conv.geometry.groups
    if response.factors is not None:
        each = response.factors.reshape(groups, 1, -1, *(1,) * len(places))  # of a group's input channels
        grouped = weight.to(torch.float64).reshape(groups, len(weight) // groups, *weight.shape[1:])
        weight = (grouped * each).flatten(0, 1)
    return Response(weight, None, tuple(places), response.channels, groups)


def _behind(conv: Conv, response: Response) -> Response:
    """Return the response behind a further layer, by a matrix product for each output that it reaches."""
    groups = math.gcd(conv.geometry.groups, response.groups)
    before = response.regrouped(groups).numbers()  # (C_mid, C_in/groups, *places)
    weight = regrouped(conv.weight.to(torch.float64), conv.geometry.groups, groups)  # (C_out, C_mid/groups, *kernel)
    reached = [_reached(axis, at) for axis, at in zip(conv.geometry.axes, response.places, strict=True)]
    outputs = [sorted(found) for found in reached]
    total = weight.new_zeros(len(weight), before.shape[1], *map(len, outputs))
    for where in itertools.product(*(range(len(found)) for found in outputs)):
        left, right = weight, before
        for axis, (found, at) in enumerate(zip(reached, where, strict=True), 2):
            taps, numbers = found[outputs[axis - 2][at]]
            left, right = (
                x.index_select(axis, torch.tensor(i, dtype=torch.int64)) for x, i in ((left, taps), (right, numbers))
            )
        left = left.reshape(groups, len(weight) // groups, math.prod(left.shape[1:]))
        right = right.reshape(groups, len(before) // groups, before.shape[1], math.prod(right.shape[2:]))
        here: tuple[slice | int, ...] = (slice(None), slice(None), *where)
        total[here] = (left @ right.transpose(2, 3).reshape(groups, left.shape[2], before.shape[1])).flatten(0, 1)
    return Response(total, None, tuple(map(tuple, outputs)), response.channels, groups)


def _total(parts: Sequence[Response]) -> Response:
    """Return the sum of responses, each at the places that it reaches."""
    groups = math.gcd(*(part.groups for part in parts))
    places = [sorted(set().union(*each)) for each in zip(*(part.places for part in parts), strict=True)]
    rows = len(parts[0].numbers())
    total = torch.zeros(rows, parts[0].channels // groups, *map(len, places), dtype=torch.float64)
    for part in parts:
        met = ([all_of.index(one) for one in own] for all_of, own in zip(places, part.places, strict=True))
        at = [torch.tensor(own, dtype=torch.int64) for own in met]  # of a branch that isn't reached, none
        grid: tuple[slice | Tensor, ...] = tuple(torch.meshgrid(*at, indexing="ij")) if at else ()
        total[(slice(None), slice(None), *grid)] += part.regrouped(groups).numbers()
    return Response(total, None, tuple(map(tuple, places)), parts[0].channels, groups)
