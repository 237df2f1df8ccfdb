"""Weight standardisation: a convolution whose weight is made of its tensors each time that it runs.

Of each output channel's weights w it takes (w - mean) / sqrt(var + eps), times the channel's gain and one number for
all. The variance is the mean of the squares, as a batch norm in training has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convtool.core.fields import POSITIVE, Fields
from convtool.errors import InputError, UsageError
from convtool.kinds.kind import Tensors

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = {"standardized": POSITIVE, "gain_scale": POSITIVE}  # eps, and what the gain is multiplied by


def without(fields: Fields) -> Fields:
    """Return the fields that are the geometry's."""
    return {name: value for name, value in fields.items() if name not in FIELDS}


def only(fields: Fields) -> Fields:
    """Return the fields that say how a weight is made."""
    return {name: value for name, value in fields.items() if name in FIELDS}


def say(name: str, value: Any) -> str:
    """Return one of the fields in words."""
    return f"weight standardized with eps {value:g}" if name == "standardized" else f"gain times {value:g}"


def convolution_weight(tensors: Tensors, fields: Fields) -> Tensor:
    """Return the weight that a convolution runs with: in float64 where it is standardised, and else its own.

    Raises:
        UsageError, InputError: the tensors aren't such as a standardised convolution has.
    """
    import torch

    weight, gain = tensors["weight"], tensors.get("gain")
    eps, factor = fields.get("standardized"), fields.get("gain_scale", 1.0)
    if eps is None:
        if gain is not None or "gain_scale" in fields:
            raise InputError("has a gain, and nothing says that its weight is standardised; expected standardized=EPS")
        return weight
    if not eps > 0:
        raise UsageError(f"standardized: expected an eps above 0, got {eps:g}")
    if fields.get("transposed") or weight.is_complex():
        raise UsageError("standardized: is known of real convolutions that aren't transposed")
    if gain is not None and gain.numel() != len(weight):
        raise UsageError(f"expected a gain of {len(weight)} numbers, got shape {tuple(gain.shape)}")
    rows = weight.to(torch.float64).flatten(1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    spread = torch.sqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    gains = 1.0 if gain is None else gain.to(torch.float64).reshape(-1, 1)
    made: Tensor = centred / spread * (gains * factor)
    return made.reshape(weight.shape)
