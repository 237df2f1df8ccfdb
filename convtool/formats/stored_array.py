"""An array of a matrix file that is read when it is asked for, part by part, so that it may be larger than memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from convtool.formats.source import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array: TypeAlias = "Tensor | StoredArray"  # what a matrix is made of


class StoredArray:
    """An array that stands in a file as it is: row-major, in this machine's byte order.

    Attributes:
        start: where its first byte stands.
    """

    def __init__(self, source: Source, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.source, self.start, self.dtype, self.shape = source, start, dtype, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice, /) -> Tensor:
        """Return rows of it, read from the file."""
        import torch

        first, last, _ = part.indices(len(self))
        rows, inner = max(0, last - first), self.shape[1:]
        row = math.prod(inner) * self.dtype.itemsize
        if not rows * row:
            return torch.empty(rows, *inner, dtype=self.dtype)
        view = self.source.view(self.start + first * row, self.start + (first + rows) * row)
        read: Tensor = torch.frombuffer(view, dtype=self.dtype).reshape(rows, *inner)
        return read

    def numel(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)

    def unbind(self) -> tuple[StoredArray, ...]:
        """Return its rows, each an array by itself."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        starts = range(self.start, self.start + size * len(self), size or 1)
        return tuple(StoredArray(self.source, start, self.dtype, self.shape[1:]) for start in starts)

    def mapped(self) -> Tensor:
        """Return it as a tensor over the file, mapped into memory; the file has to stay as it is meanwhile."""
        import torch

        if not self.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        view = self.source.mapped(self.start, self.start + self.numel() * self.dtype.itemsize)
        if self.start % self.dtype.itemsize:  # torch wants aligned memory
            return self[:]
        made: Tensor = torch.frombuffer(view, dtype=self.dtype).reshape(self.shape)
        return made


def mapped(array: Array) -> Tensor:
    """Return an array as a tensor; over the file where it stands in one."""
    return array.mapped() if isinstance(array, StoredArray) else array[:]
