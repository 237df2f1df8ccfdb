"""Rounding once: torch itself goes from float64 to 16 bits and fewer by way of float32, and so rounds twice."""

from __future__ import annotations

import torch
from torch import Tensor

from convtool.errors import RefusedError


def check_room(stored: torch.dtype, wanted: torch.dtype) -> None:
    """RefusedError where numbers of the one dtype have no room in the other: complex ones in a real one.

    torch would drop the imaginary parts.
    """
    if stored.is_complex and not wanted.is_complex:
        name = str(wanted).removeprefix("torch.")
        raise RefusedError(f"the numbers are complex, and {name} has no room for imaginary parts; use a complex dtype")


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in another dtype, each the nearest there is (of two as near, the one with the even last bit).

    From float64 to 16 bits or fewer: rounding to float32 'to odd' (towards zero, last bit set where anything was lost)
    keeps what the second rounding has to know, since float32 has more than two bits to spare (Boldo and Melquiond
    2008, https://doi.org/10.1109/TC.2007.70819). Other pairs of dtypes are torch's own, which round once.
    """
    short = dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
    if numbers.dtype != torch.float64 or not short:
        return numbers.to(dtype)
    nearest = numbers.to(torch.float32)
    back = nearest.to(torch.float64)
    lost = (back != numbers) & back.isfinite()
    bits = nearest.view(torch.int32)  # sign and magnitude: one less is one step towards zero
    bits = torch.where(lost & (back.abs() > numbers.abs()), bits - 1, bits)
    bits = torch.where(lost, bits | 1, bits)
    return bits.view(torch.float32).to(dtype)
