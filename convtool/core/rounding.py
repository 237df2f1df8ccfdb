"""Rounding once: torch itself goes from float64 to 16 bits and fewer by way of float32, and so rounds twice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convtool.errors import RefusedError


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that all arithmetic with numbers of another is done in; torch promotes no 8-bit ones."""
    return torch.complex128 if dtype.is_complex else torch.float64


def check_room(stored: torch.dtype, wanted: torch.dtype) -> None:
    """RefusedError where numbers of the one dtype have no room in the other: complex ones in a real one.

    torch would drop the imaginary parts.
    """
    if stored.is_complex and not wanted.is_complex:
        name = dtype_name(wanted)
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


def with_room_for(numbers: Tensor, others: torch.dtype) -> Tensor:
    """Return numbers that are to be multiplied by others: complex ones, where those are."""
    return numbers.to(numbers.dtype.to_complex()) if others.is_complex and not numbers.is_complex() else numbers


class Rounding:
    """Rounds a tensor's numbers, in one piece or several, and sees that the dtype holds them.

    Rounding moves a number by at most u of itself, u the dtype's unit roundoff, or by half of its smallest subnormal.
    The latter is nothing beside larger numbers that it is added to, and everything where there are none. So numbers
    that belong together (an output channel's weights, say) are held where none moves by more than u of the largest of
    them. What overflows, saturates or is flushed to zero moves by more.
    """

    def __init__(self, dtype: torch.dtype, what: str, shape: tuple[int, ...] = ()) -> None:
        """Begin with a tensor of that shape that messages call `what`; without rows all of it belongs together."""
        self.dtype, self.what = dtype, what
        # Integers hold what they are, and nothing else.
        self._unit = torch.finfo(dtype).eps / 2 if dtype.is_floating_point or dtype.is_complex else 0.0
        rows = max(1, shape[0]) if len(shape) > 1 else 1
        self._row, self._seen = max(1, math.prod(shape) // rows), 0  # numbers in a row, and so far
        self._largest, self._worst = torch.zeros(2, rows, dtype=torch.float64)
        self._example = (0.0, 0.0, 0.0)  # of what moves most: by how much, the number, and as it would be stored

    def piece(self, numbers: Tensor) -> Tensor:
        """Return the next numbers, rounded; RefusedError where one of them is beyond the dtype's range."""
        made = rounded(numbers, self.dtype)
        if self._has_room(numbers):
            return made
        exact, back = (one.flatten().to(torch.float64) for one in _both(numbers, made))
        moved = (exact - back).abs().nan_to_num(nan=0.0, posinf=math.inf)  # what was inf, and stays so, isn't moved
        size, at = exact.abs().nan_to_num(nan=0.0, posinf=0.0), int(moved.argmax())
        if len(self._largest) > 1:
            row = (torch.arange(len(exact)) // (len(exact) // numbers.numel()) + self._seen) // self._row
        else:
            row = torch.zeros(len(exact), dtype=torch.int64)
        self._largest.scatter_reduce_(0, row, size, "amax")
        self._worst.scatter_reduce_(0, row, moved, "amax")
        self._seen += numbers.numel()
        self._example = max(self._example, (float(moved[at]), float(exact[at]), float(back[at])))
        if self._example[0] == math.inf:
            self.end()
        return made

    def end(self) -> None:
        """Raise RefusedError where the dtype doesn't hold the numbers of a row."""
        lost = self._worst > self._unit * self._largest
        if not bool(lost.any()):
            return
        _, number, stored = self._example
        how = f"{number:g} would be {stored:g}"
        if len(lost) > 1 and self._example[0] < math.inf:
            largest = float(self._largest[lost].max())
            how = f"{int(lost.sum())} of {len(lost)} rows are lost, whose numbers are at most {largest:g}"
        raise self._refusal(how, float(self._largest.max()))

    def rows(self, numbers: Tensor) -> Tensor:
        """Return all of the numbers, rounded; those of each row (along the first of several axes) belong together."""
        made = rounded(numbers, self.dtype)
        if self._has_room(numbers) or self._all_normal(made):
            return made
        count = len(numbers) if numbers.dim() > 1 else 1
        exact, back = (one.reshape(count, -1) for one in _both(numbers, made))
        moved = (exact - back).abs().nan_to_num(nan=0.0, posinf=math.inf)
        size = exact.abs().nan_to_num(nan=0.0, posinf=0.0)
        lost = moved > self._unit * size.amax(1, keepdim=True)
        if bool(lost.any()):
            at = int(torch.where(lost, moved, 0.0).argmax())
            number, stored = float(exact.flatten()[at]), float(back.flatten()[at])
            how = f"{int(lost.sum())} of {lost.numel()} are lost, such as {number:g}, which would be {stored:g}"
            raise self._refusal(how, float(size.max()))
        return made

    def _all_normal(self, made: Tensor) -> bool:
        """Return whether every number became a normal one, which moves it by its own unit at most: the quick answer."""
        if not made.is_floating_point() or made.dtype.itemsize < 2:
            return False
        info, (least, most) = torch.finfo(made.dtype), torch.aminmax(made.abs())
        return float(least) >= info.smallest_normal and float(most) <= info.max

    def _has_room(self, numbers: Tensor) -> bool:
        """Return whether every number of that dtype is one of the wanted one as well; or there are none."""
        wider = self.dtype.itemsize > numbers.dtype.itemsize and bool(self._unit)
        return numbers.dtype == self.dtype or wider or not numbers.numel()

    def _refusal(self, what: str, largest: float) -> RefusedError:
        wide = [dtype for dtype in (torch.float32, torch.float64) if largest <= torch.finfo(dtype).max]
        wide = [dtype for dtype in wide if largest >= torch.finfo(dtype).tiny and dtype != self.dtype]
        advice = f"; {' or '.join(map(dtype_name, wide))} would hold them" if wide else ""
        return RefusedError(f"{self.what}: {dtype_name(self.dtype)} cannot hold its numbers: {what}{advice}")


def held(numbers: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return the numbers in another dtype; RefusedError where it doesn't hold those of a row. See `Rounding`."""
    return Rounding(dtype, what).rows(numbers)


def _both(numbers: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers and what they were rounded to in one dtype that holds both, complex ones as pairs."""
    if made.is_complex():
        numbers, made = (torch.view_as_real(one.to(torch.complex128)) for one in (numbers, made))
    wide = torch.float32 if numbers.dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float64
    return numbers.to(wide), made.to(wide)
