"""Digests of tensors: a record names by them what went into a fusion and what came out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.record import FusionRecord
from convtool.core.tree import BASE, LayerRef
from convtool.formats.pieces import Piece


def digest(piece: Piece) -> str:
    """Return the SHA-256 of a tensor's dtype, shape, and row-major little-endian bytes."""
    found = hashlib.sha256(f"{piece.dtype} {list(piece.shape)} ".encode())
    for chunk in piece.chunks():
        found.update(chunk.data)
    return found.hexdigest()


def digests_of(checkpoint: Checkpoint, names: Iterable[str], origin: str = BASE) -> dict[str, str]:
    """Return the digest of each tensor of a checkpoint, under its name as a record has it."""
    return {str(LayerRef(name, origin)): digest(checkpoint.piece(name)) for name in names}


def with_digests(record: FusionRecord, checkpoints: Mapping[str, Checkpoint], new: Sequence[Piece]) -> FusionRecord:
    """Return the record of a fusion with the digests of the tensors that it takes and of those that it gives.

    Args:
        checkpoints: by the origin that its sources name.
        new: the tensors that stand in the new checkpoint.
    """
    takes: dict[str, str] = {}
    for source in record.sources:
        opened = checkpoints[source.origin]
        takes |= digests_of(opened, opened.part(source.name).tensor_names(), source.origin)
    return replace(record, takes=takes, gives={piece.name: digest(piece) for piece in new})
