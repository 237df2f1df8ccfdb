"""A tensor's bytes, row-major, however it lies in memory."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from convtool.core.flat import tensor_bits
from convtool.formats.source import CHUNK

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a tensor, and their CRC-32."""

    data: memoryview
    crc: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "crc", zlib.crc32(self.data))


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in pieces."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.nbytes > CHUNK and tensor.dim() > 0 and not tensor.is_contiguous():
        yield from itertools.chain.from_iterable(map(tensor_chunks, tensor))
    elif tensor.numel():
        view = tensor_bits(tensor).numpy().data
        yield from (view[start : start + CHUNK] for start in range(0, len(view), CHUNK))
