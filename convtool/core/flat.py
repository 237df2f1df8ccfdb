"""A tensor as the bytes that it has in a file: row-major, one number after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, row-major, as a flat uint8 tensor; over its own memory where that is in this order already."""
    import torch

    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not dense.numel():
        return torch.empty(0, dtype=torch.uint8)
    # One element is contiguous to torch with any stride, and keeps it through a reshape; a view wants it to be 1.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
