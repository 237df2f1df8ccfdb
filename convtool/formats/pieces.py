"""What files are made of: named pieces of bytes whose size is known before any of them is made."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convtool.errors import OutputError
from convtool.formats.source import CHUNK, Chunk

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.formats.atomic import Written


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A tensor, an array, or a small file in an archive, on its way into a file.

    Attributes:
        name: of the tensor in full, or of the file in the archive.
        dtype: torch's name, or a format's own of a dtype that torch lacks; uint8 of what isn't numbers.
        nbytes: its size.
        chunks: makes its bytes, row-major and little-endian, from the start at each call; each chunk is valid until the
            next is asked for.
        memory: the same for pieces that are the same elements of the same memory (tied tensors); None for one that has
            its memory to itself.
        place: where its bytes come among the others', where that isn't the order of the names.
        copy: writes all of it to a file, where there is a faster way than chunk by chunk.
        verified: whether it is compared to the bit when the file is read back; what is only copied isn't.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[Chunk]]
    memory: Hashable = None
    place: int = 0
    copy: Callable[[Written], None] | None = None
    verified: bool = False

    @classmethod
    def of(cls, name: str, data: bytes) -> Piece:
        """Return the piece that holds these bytes."""
        return cls(name, "uint8", (len(data),), len(data), lambda: iter((Chunk(data),)))

    @classmethod
    def of_tensor(cls, name: str, tensor: Tensor) -> Piece:
        """Return the piece that holds a tensor, whatever its strides; it is compared when it is read back."""
        dtype, chunks = str(tensor.dtype).removeprefix("torch."), lambda: map(Chunk, tensor_chunks(tensor))
        return cls(name, dtype, tuple(tensor.shape), tensor.nbytes, chunks, verified=True)

    @property
    def identity(self) -> Hashable:
        """The same for pieces of which a file needs the bytes once."""
        return ("its own", self.name) if self.memory is None else self.memory

    def counted(self) -> Iterator[Chunk]:
        """Yield its chunks.

        Raises:
            RuntimeError: they don't add up to its size, so that all behind it would stand in the wrong place.
        """
        came = 0
        for chunk in self.chunks():
            came += chunk.data.nbytes
            yield chunk
        if came != self.nbytes:
            raise RuntimeError(f"{self.name}: {came} bytes came, {self.nbytes} were announced")

    def write(self, file: Written) -> None:
        """Write it to a file; raises what `counted` does."""
        if self.copy is not None:
            self.copy(file)
            return
        for chunk in self.counted():
            file.write(chunk.data)

    def check(self, back: Iterable[memoryview]) -> None:
        """Compare it with its bytes as they are read back from a file; OutputError where they differ."""
        if not same_bytes((chunk.data for chunk in self.chunks()), back):
            raise OutputError(f"{self.name} read back differs from what was written")


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in pieces, row-major, however it lies in memory."""
    import torch

    from convtool.core.flat import tensor_bits

    tensor = tensor.detach().cpu()
    if tensor.itemsize == 1:  # torch has no way to copy pairs of 4 bits
        tensor = tensor.view(torch.uint8)
    for block in [tensor] if tensor.is_contiguous() else _blocks(tensor):
        view = tensor_bits(block).numpy().data
        yield from (view[start : start + CHUNK] for start in range(0, len(view), CHUNK))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into parts that follow one another row-major, of about `CHUNK` bytes, put in order at once."""
    if tensor.nbytes <= CHUNK or not tensor.dim():
        yield tensor
    elif tensor[0].nbytes <= CHUNK:
        yield from tensor.split(CHUNK // tensor[0].nbytes)
    else:
        for part in tensor:
            yield from _blocks(part)


def same_bytes(one: Iterable[memoryview], other: Iterable[memoryview]) -> bool:
    """Tell whether two rows of pieces hold the same bytes, however each is cut."""
    ones, others, empty = filter(len, one), filter(len, other), memoryview(b"")
    a = b = empty
    while True:
        a, b = a or next(ones, empty), b or next(others, empty)
        if not (a and b):
            return not (a or b)
        size = min(len(a), len(b))
        # One as a bytearray, since memoryviews are compared number by number, which takes ten times as long.
        if bytearray(a[:size]) != b[:size]:
            return False
        a, b = a[size:], b[size:]
