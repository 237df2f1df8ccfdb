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
        places: new tensors by full name, under the name of the removed tensor whose place they take.
        shared: those that go which other edits take out as well, as each has taken in some of their channels.
    """

    remove: frozenset[str]
    places: Mapping[str, Mapping[str, Tensor]]
    shared: frozenset[str] = frozenset()

    @classmethod
    def of(cls, remove: Iterable[str], insert: Mapping[str, Tensor], anchor: str, shared: Iterable[str] = ()) -> Edit:
        """Return all of `insert` in the place of one removed tensor, `anchor`."""
        return cls(frozenset(remove), {anchor: insert}, frozenset(shared))

    @classmethod
    def together(cls, edits: Iterable[Edit]) -> Edit:
        """Several edits at once.

        Raises:
            UsageError: two of them take out or put in a tensor of the same name.
        """
        remove: set[str] = set()
        places: dict[str, Mapping[str, Tensor]] = {}
        inserted: set[str] = set()
        for edit in edits:
            twice = (remove & edit.remove - edit.shared) | (inserted & edit.insert.keys())
            if twice:
                raise UsageError(f"two fusions claim {sorted(twice)[0]!r}")
            remove |= edit.remove
            inserted |= edit.insert.keys()
            places.update(edit.places)
        return cls(frozenset(remove), places)

    @classmethod
    def nothing(cls) -> Edit:
        """Everything as it is."""
        return cls(frozenset(), {})

    @property
    def insert(self) -> dict[str, Tensor]:
        """Return all new tensors by full name."""
        return {name: tensor for tensors in self.places.values() for name, tensor in tensors.items()}

    def order(self, names: Iterable[str]) -> list[tuple[str, Tensor | None]]:
        """Return the edited checkpoint's tensors in order: (name, None) as it was, (name, tensor) new.

        Raises:
            UsageError: a new name is taken by a tensor that stays.
        """
        result: list[tuple[str, Tensor | None]] = []
        insert = self.insert
        for name in names:
            result += self.places.get(name, {}).items()
            if name in self.remove:
                continue
            if name in insert:
                raise UsageError(f"the name {name!r} is taken by a tensor that stays; choose another with --name")
            result.append((name, None))
        return result
