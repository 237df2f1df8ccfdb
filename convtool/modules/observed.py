"""What a live module computes, found by running a small copy of it on numbers of our own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

FROZEN = frozenset({"weight", "bias", "running_mean", "running_var"})  # the tensors of a frozen batch norm


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that a module holds itself."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _materialised(module: nn.Module) -> nn.Module:
    """A copy of a small module with float64 ones for its tensors, whatever device they are on."""
    tensors = [tensor for _, tensor in own_tensors(module)]
    memo: dict[int, Any] = {
        id(tensor): (
            nn.Parameter(torch.ones(tensor.shape, dtype=torch.float64, device="cpu"), requires_grad=False)
            if isinstance(tensor, nn.Parameter)
            else torch.ones(tensor.shape, dtype=torch.float64, device="cpu")
        )
        for tensor in tensors
    }
    return copy.deepcopy(module, memo).eval()


def frozen_eps(module: nn.Module) -> float | None:
    """The eps of a batch norm in other code than torch's (torchvision, DETR), found by running it; None if it is none.

    With a variance of 0 and all else neutral, it multiplies by 1 / sqrt(eps); then all of it is held against the
    formula.
    """
    if dict(own_tensors(module)).keys() - {"num_batches_tracked"} != FROZEN or list(module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        norm: Any = _materialised(module)
        channels = norm.running_mean.shape[0]
        x = torch.randn(2, channels, 3, 4, dtype=torch.float64, generator=generator)
        norm.running_mean.zero_()
        norm.bias.zero_()
        norm.running_var.zero_()
        gain = norm(torch.ones_like(x))[0, 0, 0, 0]
        eps = float(f"{float(gain**-2):.12g}") if float(gain) > 0 else 0.0
        for name in FROZEN:
            getattr(norm, name).copy_(torch.rand(channels, dtype=torch.float64, generator=generator) + 0.5)
        mean, var, weight, bias = (
            getattr(norm, name).reshape(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        expected = (x - mean) / torch.sqrt(var + eps) * weight + bias
        return eps if torch.allclose(norm(x), expected, rtol=1e-9, atol=1e-9) else None
    except Exception:  # it is the user's code, and takes what it takes
        return None


def only_scales(module: nn.Module) -> bool:
    """Whether a module of one tensor multiplies the last axis by it, and does nothing else."""
    generator = torch.Generator().manual_seed(0)
    try:
        copied = _materialised(module)
        ((_, factors),) = own_tensors(copied)
        if factors.dim() != 1:
            return False
        with torch.no_grad():
            factors.copy_(torch.rand(factors.shape, dtype=torch.float64, generator=generator) + 0.5)
        x = torch.randn(2, 3, len(factors), dtype=torch.float64, generator=generator)
        with torch.no_grad():
            return bool(torch.equal(copied(x), x * factors))
    except Exception:
        return False
