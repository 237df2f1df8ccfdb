"""A change to a checkpoint as a value: which tensors go, which come, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """Tensors to take out and tensors to put in.

    Attributes:
        remove: full names of the tensors that go.
        insert: new tensors by full name; they stand where `anchor` stood.
        anchor: the first of `remove`, whose place the new ones take.
    """

    remove: frozenset[str]
    insert: Mapping[str, Tensor]
    anchor: str

    def order(self, names: Iterable[str]) -> list[tuple[str, Tensor | None]]:
        """The edited checkpoint's tensors in order: (name, None) as it was, (name, tensor) new.

        Raises:
            UsageError: a new name is taken by a tensor that stays.
        """
        result: list[tuple[str, Tensor | None]] = []
        for name in names:
            if name == self.anchor:
                result += self.insert.items()
            if name in self.remove:
                continue
            if name in self.insert:
                raise UsageError(f"the name {name!r} is taken by a tensor that stays; choose another with --name")
            result.append((name, None))
        return result
