"""State dicts in a saved object: dicts of tensors by name, and modules, which have one; found and never guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convtool.errors import UsageError
from convtool.formats.pickle_values import Call, PickleError, TensorRef, describe, plain_tensor, why_unusable
from convtool.formats.pickled_modules import attributes_of, module_of, read_module
from convtool.formats.source import Source
from convtool.formats.tensor_file import SavedModule

DEPTH = 4  # how many dicts deep a state dict is looked for
Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StateDict:
    """A state dict that was found.

    Attributes:
        root: the keys that lead to it.
        value: what stands there: a dict, or a module.
        entries: its own.
        modules: what modules say of themselves, by path; of a dict, nothing.
        beside: what else there is in the saved object, by name, and what that is.
    """

    root: Keys
    value: Any
    entries: dict[Any, Any]
    modules: Mapping[str, SavedModule] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """The tensors of plain numbers by name; arrays of numpy only where there are no tensors of torch's."""
        found = tensors_of(self.entries)
        torch = {name: tensor for name, tensor in found.items() if not tensor.storage.is_array}
        return torch or found

    @property
    def unusable(self) -> dict[str, str]:
        """What is a tensor and can't be computed with, by name: what it is, and what to do."""
        reasons = ((str(name), why_unusable(value)) for name, value in self.entries.items())
        return {name: reason for name, reason in reasons if reason is not None}


def tensors_of(entries: Mapping[Any, Any]) -> dict[str, TensorRef]:
    """Return the tensors of a dict by name."""
    named = ((name, plain_tensor(value)) for name, value in entries.items() if isinstance(name, str))
    return {name: tensor for name, tensor in named if tensor is not None}


def find_state(source: Source, top: Any, root: str | None) -> StateDict:
    """Return the state dict in a saved object.

    Args:
        root: the keys that lead to it, joined by dots ('.' for the saved object itself), needed only where there are
            several.

    Raises:
        InputError: there is none.
        UsageError: several, and no `root`.
    """
    candidates = _candidates(top)
    keys = _chosen(source, top, candidates, root)
    value = descend(top, keys)
    if attributes_of(value) is None:
        return StateDict(keys, value, value, {}, _beside(top, keys))
    try:
        return StateDict(keys, value, *read_module(value), _beside(top, keys))
    except PickleError as error:
        raise source.error(str(error)) from None


def descend(value: Any, root: Keys) -> Any:
    """Return what keys lead to in a saved object."""
    for name in root:
        value = value[name]
    return value


def _chosen(source: Source, top: Any, candidates: Mapping[Keys, _Candidate], root: str | None) -> Keys:
    found = [keys for keys, one in candidates.items() if one.more]
    if not found:
        found = [()] if root is None and () in candidates else list(candidates)
    first = {id(candidates[keys].value): keys for keys in reversed(found)}  # one state dict under two keys is one
    names = ", ".join(map(_dotted, found))
    if root is not None:
        named = [keys for keys in found if _dotted(keys) == root]
        named = named or [keys for keys in candidates if _dotted(keys) == root]
        if len(named) == 1:
            return named[0]
        known = names or "none"
        raise UsageError(f"{source.path}: --root {root}: there is no such state dict; state dicts found: {known}")
    if not found:
        raise source.error(f"holds no state dict (a dict of tensors by name), but {_kind(top)}")
    if len(first) > 1:
        raise UsageError(f"{source.path}: holds several state dicts ({names}); choose one with --root")
    return found[0]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A dict of tensors by name, or a module; and whether it holds more than numbers and bytes of generators.

    An accuracy or a counter alone don't make a state dict, nor does a generator's state.
    """

    value: Any
    more: bool


def _candidates(top: Any) -> dict[Keys, _Candidate]:
    """Return what may be meant, by the keys that lead there; the inside of each dict is looked at once."""
    found: dict[Keys, _Candidate] = {}
    judged: dict[int, _Candidate | None] = {}
    level: list[tuple[Keys, Any]] = [((), top)]
    for _ in range(DEPTH + 1):
        following: list[tuple[Keys, Any]] = []
        for keys, value in level:
            if not isinstance(value, dict | Call):
                continue
            if id(value) not in judged:
                judged[id(value)] = _judged(value)
                if isinstance(value, dict):
                    following += [((*keys, name), item) for name, item in value.items() if isinstance(name, str)]
            one = judged[id(value)]
            if one is not None:
                found[keys] = one
        level = following
    return found


def _judged(value: dict[Any, Any] | Call) -> _Candidate | None:
    if isinstance(value, Call):
        return _Candidate(value, True) if attributes_of(value) is not None and any(_module_tensors(value)) else None
    tensors = tensors_of(value).values()
    broken = any(why_unusable(item) for name, item in value.items() if isinstance(name, str))
    of_bytes = [tensor for tensor in tensors if tensor.dtype == "uint8" and len(tensor.shape) == 1]
    more = any(tensor.shape and not tensor.storage.is_array and tensor not in of_bytes for tensor in tensors)
    return _Candidate(value, more or broken) if tensors or broken else None


def _module_tensors(module: Call) -> Iterator[Any]:
    """Yield the tensors of a module and its parts, each part looked at once."""
    ahead, seen = [module], set[int]()
    while ahead:
        one = ahead.pop()
        found = module_of(one) if id(one) not in seen else None
        seen.add(id(one))
        if found is not None:
            yield from (value for value in found.tensors.values() if plain_tensor(value) or why_unusable(value))
            ahead += found.parts.values()


def _beside(top: Any, root: Keys) -> dict[str, str]:
    """Return what stands beside the way to a state dict, by dotted names, and what it is."""
    beside: dict[str, str] = {}
    for depth, key in enumerate(root):
        inside = descend(top, root[:depth])
        known = descend(top, root)
        for name, value in inside.items():
            if name != key:
                also = " (the same state dict)" if value is known else ""
                beside[".".join((*root[:depth], str(name)))] = describe(value) + also
    return beside


def _dotted(keys: Keys) -> str:
    return ".".join(keys) or "."


def _kind(value: object) -> str:
    if plain_tensor(value) is not None:
        return "a single tensor; save it in a dict under its name"
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries without one"
    return describe(value)
