"""Weights that a module computes of other tensors: how they are recognised, and what they come to.

A new way is one more entry of `DERIVATIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from convtool.kinds.kind import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

PARAMETRIZATIONS = "parametrizations"  # torch.nn.utils.parametrize's module, between a layer's name and its tensors'

WEIGHT_NORM = "aten._weight_norm.default"  # of v and g, where a program computes one


class WeightNorm:
    """g * v / |v|, as torch.nn.utils.weight_norm has it.

    Attributes:
        parts: the names of magnitude and direction, g and v.
    """

    def __init__(self, magnitude: str, direction: str) -> None:
        self.parts = (magnitude, direction)

    def weight(self, path: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
        """Return the description of the weight that a module's tensors make; None where they don't, or don't fit."""
        g, v = (tensors.get(part) for part in self.parts)
        if g is None or v is None:
            return None
        axes = len(v.shape)
        fits = len(g.shape) == axes and all(g.shape[axis] in (1, v.shape[axis]) for axis in range(axes))
        if not (fits or g.shape == ()) or g.dtype != v.dtype:
            return None
        name = f"{path}.weight" if path else "weight"
        return TensorInfo(name, v.dtype, v.shape, v.nbytes, (g.name, v.name), self.compute)

    @staticmethod
    def compute(g: Tensor, v: Tensor) -> Tensor:
        """Return the weight, computed in float64 and rounded to its dtype once.

        Args:
            g: of v's shape with 1 on every axis that the norm runs over; or one number for all.
        """
        import torch

        from convtool.core.rounding import held

        exact = torch.complex128 if v.is_complex() else torch.float64
        g, direction = g.to(exact), v.to(exact)
        over = [axis for axis in range(v.dim()) if g.dim() == 0 or g.shape[axis] == 1]
        norm = torch.linalg.vector_norm(direction, dim=over, keepdim=True) if over else direction.abs()
        return held(direction * (g / norm), v.dtype, "the weight that a weight norm makes")


DERIVATIONS = (
    WeightNorm("weight_g", "weight_v"),
    WeightNorm(f"{PARAMETRIZATIONS}.weight.original0", f"{PARAMETRIZATIONS}.weight.original1"),
)


def derived_weight(path: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """Return the weight that a module's tensors make, where none stands in the file and they make one."""
    if "weight" in tensors:
        return None
    return next((info for one in DERIVATIONS if (info := one.weight(path, tensors)) is not None), None)
