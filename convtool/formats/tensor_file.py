"""A file of named tensors, as the module of its format opens it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convtool.formats.atomic import FilePlan
from convtool.formats.pieces import Piece
from convtool.formats.program import Program
from convtool.formats.source import Source

if TYPE_CHECKING:
    from torch import Tensor


class Place(NamedTuple):
    """A stretch of memory: bytes start to stop of a storage, between which all of a tensor's elements lie."""

    storage: Hashable
    start: int
    stop: int

    def meets(self, other: Place) -> bool:
        return self.storage == other.storage and self.start < other.stop and other.start < self.stop


class SavedModule(NamedTuple):
    """What a file says of a module.

    Attributes:
        cls: its class, dotted.
        attributes: those of plain numbers and words; of its tensors, whether they are there.
    """

    cls: str
    attributes: Mapping[str, Any]


class TensorFile(abc.ABC):
    """An open file of named tensors: its table of contents at once, their bytes when asked for.

    Attributes:
        format: the name of its format, as `inspect` shows it.
        tensors: by full name, in the file's order, what has the tensor's `dtype` (torch's name for it, or one of the
            format's own), `shape` and `nbytes`.
        unusable: entries that are tensors and can't be computed with: what they are, and what to do.
        metadata: the texts that a .safetensors file made of this one has.
        root: the keys that lead to the tensors, in a file of dicts in dicts.
        modules: what the file says of the modules that the tensors are in, by their paths.
        program: a run of the model, where the file has one.
        others: entries that stand among the tensors and aren't ones of plain numbers, and what they are.
        beside: what stands beside the tensors, and what it is.
        replaced: what a new file of the same format can't hold either, by name, and what it is.
        optimizers: names of entries beside the tensors that hold what optimizers keep of each parameter.
        classes: classes and functions that it names, dotted, and no state dict is made of; nothing is done with them.
    """

    format: str
    tensors: Mapping[str, Any]
    unusable: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {"format": "pt"}
    root: tuple[str, ...] = ()
    modules: Mapping[str, SavedModule] = {}
    program: Program | None = None
    others: Mapping[str, str] = {}
    beside: Mapping[str, str] = {}
    replaced: Mapping[str, str] = {}
    optimizers: Sequence[str] = ()
    classes: tuple[str, ...] = ()

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path: Path = source.path

    @property
    def entries(self) -> Iterable[Any]:
        """The keys of all that stands where the tensors stand, in order."""
        return self.tensors

    @property
    def left_out(self) -> Mapping[str, str]:
        """All that a file of the tensors alone would not hold, and what it is."""
        return {**self.beside, **self.replaced, **self.others}

    def in_order_of_bytes(self) -> list[str]:
        """Return the tensors' names in the order of their bytes, where a new file is to keep that."""
        return list(self.tensors)

    def record(self) -> str | None:
        """Return convtool's record as it stands in the file; None where there is none.

        Raises:
            InputError: there is one, and its bytes are damaged.
        """
        return None

    @abc.abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor, read from the file.

        Raises:
            InputError: its bytes are damaged, or of a dtype that torch doesn't have.
        """

    @abc.abstractmethod
    def piece(self, name: str) -> Piece:
        """Return a tensor as it goes into another file."""

    @abc.abstractmethod
    def place(self, name: str) -> Place:
        """Return where a tensor's elements lie."""

    def rewritten(
        self,
        entries: Sequence[tuple[Any, Piece | None]],
        record: str | None,
        cast: Callable[[Piece], Piece],
        *,
        alone: bool = False,
    ) -> FilePlan | None:
        """Plan a file of the same format that holds all else that this one holds, where the format has anything else.

        Args:
            entries: what stands where the tensors stand, in order: None for what is as it was.
            cast: gives the numbers that stay another dtype.
            alone: leave all out that isn't tensors.
        """
        return None
