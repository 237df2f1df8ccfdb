"""Weights that a run computes of a layer's tensors alone, in the forms that are known: weight standardisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from convtool.core.fields import Fields
from convtool.graph.recorded_run import Operation

# Operations that give a tensor's numbers in their order, in another shape.
_RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "contiguous.default"),
        *("reshape_as.default", "view_as.default"),
    )
)
_BATCH_NORM = "aten.batch_norm.default"
_PRODUCTS = ("aten.mul.Tensor", "aten.mul.Scalar")


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


def with_own_weight(operations: Sequence[Operation], operation: Operation) -> Seen:
    """Return an operation as it would read the tensors that its weight is standardised of; else as it is."""
    as_it_is, used = Seen(operation, {}, frozenset()), set[int]()
    weight = operations[operation.computed["weight"]].shape if operation.computed.get("weight", -1) >= 0 else ()
    norm = _made_by(operations, operation, "weight", used)
    if norm is None or norm.name != _BATCH_NORM or norm.arguments.get("training") is not True:
        return as_it_is
    read, eps = {*norm.operands, *norm.computed}, norm.arguments.get("eps", 1e-5)
    name, shape = _tensor(operations, norm, "input", used)
    # A batch of one whose channels are the weight's first axis, and nothing else that the norm reads.
    if not read <= {"input", "weight"} or shape[:2] != (1, *weight[:1]) or math.prod(shape) != math.prod(weight):
        return as_it_is
    fields: Fields = {"standardized": float(eps)}
    operands = {"weight": (name, weight)}
    if "weight" in read:
        product, key = _made_by(operations, norm, "weight", used), "self"
        if product is None or product.name not in _PRODUCTS:
            product, key = norm, "weight"
        else:
            fields["gain_scale"] = product.arguments.get("other")
        operands["gain"] = _tensor(operations, product, key, used)
    known = all(name for name, _ in operands.values()) and all(isinstance(one, int | float) for one in fields.values())
    if not known or not all(0 < one < math.inf for one in fields.values()):
        return as_it_is
    others = {key: value for key, value in operation.computed.items() if key != "weight"}
    seen = replace(operation, operands={**operation.operands, **operands}, computed=others)
    return Seen(seen, fields, frozenset(used))


def _made_by(operations: Sequence[Operation], operation: Operation, key: str, used: set[int]) -> Operation | None:
    """Return the operation that an argument is of before it is given other shapes; None where that is a tensor itself.

    Args:
        used: the operations down to that one are added.
    """
    while (number := operation.computed.get(key, -1)) >= 0:
        used.add(number)
        operation, key = operations[number], "self"
        if operation.name not in _RESHAPES:
            return operation
    return None


def _tensor(
    operations: Sequence[Operation], operation: Operation, key: str, used: set[int]
) -> tuple[str, tuple[int, ...]]:
    """Return the model's tensor that an argument is, and the shape that it is read in; no name where it is none."""
    shape: tuple[int, ...] | None = None
    while key not in operation.operands:
        number = operation.computed.get(key, -1)
        if number < 0 or operations[number].name not in _RESHAPES:
            return "", ()
        used.add(number)
        operation, key = operations[number], "self"
        shape = operation.shape if shape is None else shape
    name, own = operation.operands[key]
    return name, own if shape is None else shape
