"""Another dtype for tensors, piece by piece: each number rounded once, and none of them lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from convtool.core.rounding import Rounding
from convtool.formats.dtypes import FLOATS, ITEMSIZE
from convtool.formats.pieces import Chunk, Piece

ROUNDED = 1 << 16  # numbers that are rounded together, which takes ten times their memory


def cast_piece(piece: Piece, after: str) -> Piece:
    """Return a piece in another dtype; as it is where it isn't of floating-point numbers of 16 bits and more.

    Where the new dtype doesn't hold its numbers, the error comes when its bytes are made (`cast_chunks`).
    """
    before = piece.dtype
    if before not in FLOATS - {after}:
        return piece
    nbytes = piece.nbytes // ITEMSIZE[before] * ITEMSIZE[after]
    chunks = lambda: cast_chunks(piece.name, piece.chunks(), before, after, piece.shape)  # noqa: E731
    return replace(piece, dtype=after, nbytes=nbytes, chunks=chunks, copy=None)


def cast_chunks(
    name: str, chunks: Iterable[Chunk], before: str, after: str, shape: tuple[int, ...] = ()
) -> Iterator[Chunk]:
    """Yield a tensor's bytes in another dtype.

    Args:
        name: of the tensor, for messages.
        chunks: its bytes, in chunks of whole elements.
        before, after: dtypes by torch's names.
        shape: of the tensor; the numbers of a row belong together.

    Raises:
        RefusedError: the new dtype doesn't hold the tensor's numbers.
    """
    old: torch.dtype = getattr(torch, before)
    new: torch.dtype = getattr(torch, after)
    rounding = Rounding(new, name, shape)
    for chunk in chunks:
        for numbers in torch.frombuffer(chunk.data, dtype=old).split(ROUNDED):
            yield Chunk(rounding.piece(numbers).view(torch.uint8).numpy().data)
    rounding.end()
