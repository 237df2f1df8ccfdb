"""Another dtype for tensors, piece by piece: each number rounded once, and none of them lost to an overflow."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from convtool.core.rounding import rounded
from convtool.errors import InputError


def cast_chunks(name: str, chunks: Iterator[memoryview], before: str, after: str) -> Iterator[memoryview]:
    """A tensor's bytes in another dtype.

    Args:
        name: of the tensor, for messages.
        chunks: its bytes, in pieces of whole elements.
        before, after: dtypes by torch's names.

    Raises:
        InputError: a finite number is too large for the new dtype.
    """
    old: torch.dtype = getattr(torch, before)
    new: torch.dtype = getattr(torch, after)
    for chunk in chunks:
        numbers = torch.frombuffer(chunk, dtype=old)
        changed = rounded(numbers, new)
        lost = numbers.isfinite() & ~changed.isfinite()
        if bool(lost.any()):
            raise InputError(
                f"{name}: holds {numbers[lost][0].item():g}, which {after} cannot hold (its largest is"
                f" {torch.finfo(new).max:g}); choose a dtype of more range"
            )
        yield changed.view(torch.uint8).numpy().data
