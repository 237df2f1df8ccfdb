"""A layer held number by number against what the layers that it stands for make of impulses, by `convtool.core.bound`.

Where the tables say that the borders agree as well, this is a proof for all inputs: two layers of one geometry are
equal exactly if their numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from convtool.core.bound import Allowance, fused_geometry, half_ulp, less_inwards
from convtool.core.conv import Conv
from convtool.core.expression import Expression
from convtool.core.response import ROWS, Response, check_plain, constant, regrouped, responses
from convtool.core.tree import map_leaves
from convtool.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Numbers:
    """How the numbers of a layer did.

    Attributes:
        compared: how many.
        differing: how many are beyond their bounds.
        ratio: the largest error by its bound.
        where: (output channel, input channel of its group, *tap) of it; the channel alone of a bias.
        error, bound: there.
    """

    compared: int = 0
    differing: int = 0
    ratio: float = 0.0
    where: tuple[int, ...] | None = None
    error: float = 0.0
    bound: float = 0.0

    @property
    def equal(self) -> bool:
        """Return whether there was something to compare and all of it was within its bound."""
        return self.compared > 0 and self.differing == 0


def compare_numbers(
    before: Expression,
    after: Conv,
    bound: Allowance,
    dtype: torch.dtype,
    read: Sequence[Sequence[int]] | None = None,
) -> Numbers:
    """Hold each number of a layer against what the tree that it stands for gives.

    Args:
        before: its numbers are taken as exact.
        dtype: that `after` is stored in.
        read: on each axis the taps to compare; all of them by default.

    Raises:
        RefusedError: it can't be done so, and has to be run: see `responses`.
    """
    return _Comparison(before, after, bound, dtype, read).run()


class _Comparison:
    """The numbers of a layer while they are compared; see `compare_numbers`."""

    def __init__(
        self,
        before: Expression,
        after: Conv,
        bound: Allowance,
        dtype: torch.dtype,
        read: Sequence[Sequence[int]] | None,
    ) -> None:
        self.before, self.after, self.bound, self.dtype = before, after, bound, dtype
        self.found, geometry, one = Numbers(), after.geometry, fused_geometry(before)
        check_plain(after)
        if one.stride != geometry.stride:
            raise RefusedError("the layer has another stride than those that it stands for")
        self.groups = math.gcd(one.groups, geometry.groups)
        self.weight = regrouped(after.weight, geometry.groups, self.groups)  # (C_out, C_in/groups, *kernel)
        self.read = [list(range(k)) for k in geometry.kernel_size] if read is None else [list(taps) for taps in read]

    def run(self) -> Numbers:
        """Compare all of them."""
        met = torch.zeros(self.after.geometry.kernel_size, dtype=torch.bool)
        for number, (residue, response) in enumerate(responses(self.before)):
            self._response(number, residue, response.regrouped(self.groups), met)
        read = torch.zeros_like(met)
        read[_grid(self.read)] = True
        for tap in (read & ~met).nonzero().tolist():  # what no impulse meets has to be zero
            found = self.weight[..., *tap]
            self._judge(torch.zeros_like(found, dtype=torch.float64), found, None, (0, [[at] for at in tap]))
        self._bias()
        return self.found

    def _response(self, number: int, residue: tuple[int, ...], response: Response, met: Tensor) -> None:
        """Compare the taps that one impulse meets, and mark them."""
        kept: list[list[int]] = []
        taps: list[list[int]] = []
        for axis, at, places, read in zip(self.after.geometry.axes, residue, response.places, self.read, strict=True):
            there = [divmod(at + axis.before - place * axis.stride, axis.dilation) for place in places]
            if not all(0 <= tap < axis.kernel and not rest for tap, rest in there):
                raise RefusedError("the layers reach beyond the one that stands for them")
            kept.append([number for number, (tap, _) in enumerate(there) if tap in read])
            taps.append([there[number][0] for number in kept[-1]])
        if not all(taps):
            return
        met[_grid(taps)] = True
        rows = max(1, ROWS // max(1, math.prod(self.weight.shape[1:])))
        for start in range(0, len(self.weight), rows):
            stop = start + rows

            def size(start: int = start, stop: int = stop) -> Tensor:
                return _at(self._absolute[number].regrouped(self.groups).numbers(start, stop), kept)

            expected = _at(response.numbers(start, stop), kept)
            self._judge(expected, _at(self.weight[start:stop], taps), size, (start, taps))

    @cached_property
    def _absolute(self) -> list[Response]:
        return [response for _, response in responses(map_leaves(Conv.absolute, self.before))]

    def _bias(self) -> None:
        expected, found = constant(self.before), self.after.bias
        if expected is None and found is None:
            return
        nothing = torch.zeros(len(self.weight), dtype=torch.float64)
        size = constant(map_leaves(Conv.absolute, self.before))
        given = nothing.to(self.dtype) if found is None else found
        expected = nothing if expected is None else expected
        self._judge(expected, given, lambda: nothing if size is None else size, (0, None))

    def _judge(
        self,
        expected: Tensor,
        found: Tensor,
        size: Callable[[], Tensor] | None,
        place: tuple[int, list[list[int]] | None],
    ) -> None:
        """Hold numbers against what storing alone can do, and where that isn't enough against the whole bound.

        Args:
            size: gives what absolute values of the layers make of the impulse; None for nothing.
            place: the first row, and the tap on each axis for each place; None for a bias.
        """
        if not expected.numel():
            return
        error = (found.to(torch.float64) - expected).abs_()
        most = half_ulp(found, self.dtype)
        less = less_inwards(found, self.dtype)
        if less is not None:
            most = most - torch.where(expected.abs() < found.to(torch.float64).abs(), less, 0.0)
        ratio = error / most
        if not float(ratio.max()) <= 1:
            most = self.bound.around(most, torch.zeros_like(expected) if size is None else size(), found)
            ratio = ratios(error, most)
        at = int(ratio.argmax())
        worst, now = float(ratio.reshape(-1)[at]), self.found
        now = replace(
            now,
            compared=now.compared + error.numel(),
            differing=now.differing + (int((ratio > 1).sum()) if worst > 1 else 0),
        )
        if now.where is None or worst > now.ratio:
            row, *rest = (int(i) for i in np.unravel_index(at, tuple(error.shape)))
            taps = place[1] or []
            where = (
                row + place[0],
                *rest[:1],
                *(tap[i] for tap, i in zip(taps, rest[1:] or (0,) * len(taps), strict=True)),
            )
            off, limit = float(error.reshape(-1)[at]), float(most.reshape(-1)[at])
            now = replace(now, ratio=worst, where=where, error=off, bound=limit)
        self.found = now


def ratios(error: Tensor, most: Tensor) -> Tensor:
    """Return error by bound; inf where one isn't finite."""
    ratio = torch.where(error == 0, 0.0, error / most)
    return torch.where((error + most).isfinite(), ratio, math.inf)


def _grid(places: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Return the index of every place that is one of these on each axis."""
    each = [torch.tensor(one, dtype=torch.int64) for one in places]
    return tuple(torch.meshgrid(*each, indexing="ij")) if each else ()


def _at(numbers: Tensor, chosen: Sequence[Sequence[int]]) -> Tensor:
    """Return the chosen places on each axis behind the first two."""
    for axis, places in enumerate(chosen, 2):
        if list(places) == list(range(numbers.shape[axis])):
            continue
        numbers = numbers.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return numbers
