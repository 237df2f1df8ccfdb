"""What storing did to numbers: the most that each was moved by when it was rounded to a dtype, or printed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.moves import Selection

_EXPONENT = 0x7FF << 52  # the bits of a float64 that hold its exponent, and those behind them
_BEHIND_EXPONENT = (1 << 52) - 1


@dataclass(frozen=True, eq=False)
class Stored:
    """A layer whose numbers were rounded when they were stored.

    Attributes:
        conv: with the numbers as they are stored.
        given: with the most that storing moved each of them by, in float64, where that isn't what rounding it does.
        dtype: that each was rounded to; its own where None.
    """

    conv: Conv
    given: Conv | None = None
    dtype: torch.dtype | None = None

    @cached_property
    def error(self) -> Conv | None:
        """The most that storing moved each number by; None where they are stored nowhere."""
        if self.given is not None or isinstance(self.conv, Selection):
            return self.given
        return self.conv.changed(lambda numbers: half_ulp(numbers, self.dtype or numbers.dtype))

    @cached_property
    def less(self) -> Conv | None:
        """By how much less each can have been moved towards zero, with its sign; None where it can be as much."""
        if self.given is not None or isinstance(self.conv, Selection) or self.conv.dtype.is_complex:
            return None

        def inwards(numbers: Tensor) -> Tensor:
            less, zero = less_inwards(numbers, self.dtype or numbers.dtype), numbers.new_zeros((), dtype=torch.float64)
            return zero.expand(numbers.shape) if less is None else less * numbers.sign()

        return self.conv.changed(inwards)

    def to(self, dtype: torch.dtype, device: torch.device) -> Stored:
        """Return the layer with its numbers in `dtype` on the device; the errors stay in float64."""
        return Stored(self.conv.to(dtype, device), self.error and self.error.to(torch.float64, device), self.dtype)


def stored(conv: Conv, dtype: torch.dtype | None = None) -> Stored:
    """Return the layer with each number taken as rounded once to `dtype`; to its own where None."""
    return Stored(conv, None, dtype)


def less_inwards(numbers: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return by how much nearer to each number is what was rounded to it from the side of zero: only to powers of two.

    None where there is no power of two, and for complex numbers.
    """
    if numbers.is_complex() or dtype.is_complex:
        return None
    info, exact = torch.finfo(dtype), numbers.to(torch.float64)
    powers = (exact.view(torch.int64) & _BEHIND_EXPONENT) == 0
    if not bool(powers.any()):
        return None
    size = exact.abs()
    powers &= size > info.smallest_normal
    return torch.where(powers, size * (info.eps / 4), 0.0) if bool(powers.any()) else None


def half_ulp(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the most by which what was rounded to each of these numbers of `dtype` can differ from it, in float64.

    Of complex numbers, the modulus of what both parts can differ by.
    """
    if numbers.is_complex():
        parts = torch.view_as_real(numbers.to(torch.complex128))
        real = dtype.to_real() if dtype.is_complex else dtype
        return torch.hypot(*half_ulp(parts, real).unbind(-1))
    info, exact = torch.finfo(dtype), numbers.to(torch.float64)
    powers = (exact.view(torch.int64) & _EXPONENT).view(torch.float64)  # the power of two below each
    half = powers.mul_(info.eps / 2).clamp_(min=info.smallest_normal * info.eps / 2)
    return half + exact.abs() * 2.0**-24 if info.bits < 32 else half


def half_digit(values: Tensor, digits: int) -> Tensor:
    """Return half of the last of so many decimal digits of each number; of a complex one, of its larger part."""
    size = torch.view_as_real(values).abs().amax(-1) if values.is_complex() else values.abs().to(torch.float64)
    power = torch.where(size > 0, size, 1.0).log10().floor() - digits + 1
    # A number that was rounded up to a power of ten had smaller digits, never larger ones.
    return torch.where(size > 0, 0.5 * 10.0**power * (1 + 2.0**-40), 0.0)


def stored_within(wanted: Tensor, have: Tensor, half: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what storing may have moved each number of a dtype by, on its side: powers of two move less inwards."""
    less = less_inwards(have, dtype)
    return half if less is None else half - torch.where(wanted.abs() < have.abs(), less, 0.0)
