"""Another dtype for tensors, piece by piece: each number rounded once, and none of them lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from convtool.core.rounding import Rounding
from convtool.formats.dtypes import FLOATS, ITEMSIZE
from convtool.formats.pieces import Piece
from convtool.formats.source import Chunk

ROUNDED = 1 << 16  # numbers that are rounded together, which takes ten times their memory


def cast_piece(piece: Piece, after: str) -> Piece:
    """Return a piece in another dtype; as it is where it isn't of floating-point numbers of 16 bits and more.

    Where the new dtype doesn't hold its numbers, the error comes when its bytes are made (`cast_chunks`).
    """
    if piece.dtype not in FLOATS - {after}:
        return piece
    nbytes = piece.nbytes // ITEMSIZE[piece.dtype] * ITEMSIZE[after]
    return replace(piece, dtype=after, nbytes=nbytes, chunks=lambda: cast_chunks(piece, after), copy=None)


def cast_chunks(piece: Piece, after: str) -> Iterator[Chunk]:
    """Yield a tensor's bytes in another dtype; its own come in chunks of whole elements.

    Raises:
        RefusedError: the new dtype doesn't hold the tensor's numbers.
    """
    old: torch.dtype = getattr(torch, piece.dtype)
    new: torch.dtype = getattr(torch, after)
    rounding = Rounding(new, piece.name, piece.shape)
    for chunk in piece.chunks():
        for numbers in torch.frombuffer(chunk.data, dtype=old).split(ROUNDED):
            yield Chunk(rounding.piece(numbers).view(torch.uint8).numpy().data)
    rounding.end()
