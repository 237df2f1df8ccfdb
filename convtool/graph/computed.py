"""Weights that a run computes of a layer's tensors alone, in the forms that are known: weight standardisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from convtool.core.fields import Fields
from convtool.graph.recorded_run import UNKNOWN, Made, Operation

# Operations that give a tensor's numbers in their order, in another shape.
_RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "contiguous.default"),
        *("reshape_as.default", "view_as.default", "unsqueeze.default"),
    )
)
_BATCH_NORM = "aten.batch_norm.default"
_PRODUCTS = ("aten.mul.Tensor", "aten.mul.Scalar")
_STATISTICS = {"aten.var_mean.dim": ("unbiased", False), "aten.var_mean.correction": ("correction", 0)}


class Seen(NamedTuple):
    """A convolution with the tensors in place of what is computed of them.

    Attributes:
        operation: its operands are the layer's own tensors.
        fields: that say what is computed.
        inside: the operations that compute it.
    """

    operation: Operation
    fields: Fields
    inside: frozenset[int]


class _Given(NamedTuple):
    """What an argument is before it is given other shapes.

    Attributes:
        by: the operation and which of its values; unknown of a tensor itself.
        tensor: the model's tensor that it is, by its full name; '' of a value.
        first, last: its shape, and the one that it is read in.
    """

    by: Made
    tensor: str
    first: tuple[int, ...]
    last: tuple[int, ...]


class _Form(NamedTuple):
    """How a weight is standardised: the tensor, and eps; where there is a gain, its tensor and what it is times."""

    weight: str
    eps: object
    gain: tuple[str, tuple[int, ...]] | None = None
    gain_scale: object = None


def with_own_weight(operations: Sequence[Operation], operation: Operation) -> Seen:
    """Return an operation as it would read the tensors that its weight is standardised of; else as it is."""
    as_it_is, reader = Seen(operation, {}, frozenset()), _Reader(operations)
    weight = reader.given(operation, "weight")
    form = reader.by_batch_norm(weight) or reader.by_variance(weight)
    if form is None:
        return as_it_is
    fields: Fields = {"standardized": form.eps, **({} if form.gain_scale is None else {"gain_scale": form.gain_scale})}
    gain = {} if form.gain is None else {"gain": form.gain}
    if not all(isinstance(one, int | float) and 0 < one < math.inf for one in fields.values()):
        return as_it_is
    operands = {**operation.operands, "weight": (form.weight, weight.last), **gain}
    others = {key: value for key, value in operation.computed.items() if key != "weight"}
    tensors = tuple(name for name, _ in operands.values())
    seen = replace(operation, operands=operands, tensors=tensors, computed=others)
    return Seen(seen, fields, frozenset(reader.used))


class _Reader:
    """Goes back from values to what they are made of.

    Attributes:
        used: the operations that it came through.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations, self.used = operations, set[int]()

    def given(self, operation: Operation, key: str) -> _Given:
        """Return what an argument is."""
        made, last = operation.computed.get(key, UNKNOWN), None
        while key not in operation.operands and made != UNKNOWN:
            self.used.add(made.number)
            operation, key = self.operations[made.number], "self"
            last = operation.shape if last is None else last
            if operation.name not in _RESHAPES:
                return _Given(made, "", operation.shape, last)
            made = operation.computed.get(key, UNKNOWN)
        name, own = operation.operands.get(key, ("", ()))
        return _Given(UNKNOWN, name, own, own if last is None else last)

    def made_by(self, given: _Given, *names: str) -> Operation | None:
        """Return the operation that something is the only value of; None unless it is one of these."""
        found = None if given.by == UNKNOWN or given.by.place else self.operations[given.by.number]
        return found if found is not None and found.name in names else None

    def by_batch_norm(self, weight: _Given) -> _Form | None:
        """Return the form of a weight that is the batch norm of a batch of one, whose channels are its first axis."""
        norm = self.made_by(weight, _BATCH_NORM)
        if norm is None or norm.arguments.get("training") is not True:
            return None
        read = {*norm.operands, *norm.computed}
        rows = self.given(norm, "input")
        alike = rows.last[:2] == (1, *weight.last[:1]) and math.prod(rows.last) == math.prod(weight.last)
        if not read <= {"input", "weight"} or not rows.tensor or not alike:
            return None
        form = _Form(rows.tensor, norm.arguments.get("eps", 1e-5))
        if "weight" not in read:
            return form
        gain, factor = self.given(norm, "weight"), None
        product = self.made_by(gain, *_PRODUCTS)
        if product is not None:
            gain, factor = self.given(product, "self"), product.arguments.get("other")
            if not isinstance(factor, int | float):  # a tensor, which may be the gain itself
                return None
        return form._replace(gain=(gain.tensor, gain.last), gain_scale=factor) if gain.tensor else None

    def by_variance(self, weight: _Given) -> _Form | None:
        """Return the form of a weight that is (w - mean) / sqrt(var + eps), with both over all axes but the first."""
        quotient = self.made_by(weight, "aten.div.Tensor")
        if quotient is None:
            return None
        difference, root = self.given(quotient, "self"), self.given(quotient, "other")
        less, rooted = self.made_by(difference, "aten.sub.Tensor"), self.made_by(root, "aten.sqrt.default")
        added = None if rooted is None else self.made_by(self.given(rooted, "self"), "aten.add.Tensor")
        if less is None or added is None or {less.arguments.get("alpha", 1), added.arguments.get("alpha", 1)} != {1}:
            return None
        own, mean, variance = self.given(less, "self"), self.given(less, "other"), self.given(added, "self")
        if (variance.by.place, mean.by) != (0, Made(variance.by.number, 1)) or variance.by == UNKNOWN:
            return None
        each = (len(own.last) and own.last[0], *(1,) * (len(own.last) - 1))  # a number for each output channel
        statistics = self.operations[variance.by.number]
        of_same = self.given(statistics, "self")[1:] == own[1:] and own.tensor and _over_rows(statistics, len(own.last))
        fits = difference.last == own.last and mean.last == root.last == each and own.last[:1] == weight.last[:1]
        return _Form(own.tensor, added.arguments.get("other")) if of_same and fits else None


def _over_rows(statistics: Operation, rank: int) -> bool:
    """Return whether an operation gives variance and mean of all but the first axis, the squares' mean the former."""
    given = statistics.arguments
    key, value = _STATISTICS.get(statistics.name, ("", None))
    over = {axis % rank for axis in given.get("dim") or ()}
    return bool(key) and given.get(key) == value and over == set(range(1, rank))
