"""State dicts in a saved object: dicts of tensors by name, and modules, which have one; found and never guessed.

A pickled nn.Module is read as data. What it is made of stands in its attributes: `_parameters`, `_buffers` and
`_modules`, and beside them stride, padding or eps. What it computes stands in its class's code, which is not run: a
class is a name here, and what the attributes mean is known for torch's own classes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from convtool.errors import UsageError
from convtool.formats.pickle_values import (
    Call,
    Global,
    OrderedItems,
    PickleError,
    TensorRef,
    describe,
    plain_tensor,
    why_unusable,
)
from convtool.formats.source import Source
from convtool.formats.tensor_file import SavedModule

DEPTH = 4  # how many dicts deep a state dict is looked for
# Names of modules, all together; modules that hold each other twice have more of them than any memory.
MOST_CHARACTERS = 1 << 24
_LONGEST = 100  # of a plain text, or of a list of numbers
_OWN_FORWARD = ("forward", "_conv_forward", "__call__")
_GRAPH_MODULES = "torch.fx.graph_module"
_COMPILED = "torch._dynamo.eval_frame"  # torch.compile's module, pickled as a call with the module in it
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


# Modules


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of a module; None of whatever isn't one."""
    if not isinstance(value, Call):
        return None
    states = value.state if isinstance(value.state, tuple) else (value.state,)  # with slots, (attributes, slots)
    if value.calls(_GRAPH_MODULES):
        states += value.arguments
    if value.calls(_COMPILED) == "OptimizedModule" and value.arguments:
        states += ({"_parameters": {}, "_buffers": {}, "_modules": {"_orig_mod": value.arguments[0]}},)
    for state in states:
        if isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ("_parameters", "_modules")):
            return state
    return None


class Module(NamedTuple):
    """A module in a pickle: what it says of itself, its tensors of a state dict, and the modules in it, by name."""

    about: SavedModule
    tensors: Mapping[Any, Any]
    parts: Mapping[Any, Any]


def module_of(value: Any) -> Module | None:
    """Return the module that a value of a pickle is; None of whatever isn't one."""
    attributes = attributes_of(value)
    if attributes is None:
        return None
    buffers, transient = attributes.get("_buffers"), _names(attributes.get("_non_persistent_buffers_set"))
    buffers = buffers if isinstance(buffers, dict) else {}
    plain = plain_attributes(attributes)
    plain |= {name: one is not None or None for name, one in (attributes["_parameters"] | buffers).items()}
    cls = str(value.function) if isinstance(value.function, Global) else "a class made by a call"
    # A forward among the attributes is called in the place of the class's.
    own = next((name for name in _OWN_FORWARD if name in attributes), None)
    about = SavedModule(cls if own is None else f"{cls} with a {own} of its own", plain)
    kept = {name: one for name, one in buffers.items() if name not in transient}
    return Module(about, attributes["_parameters"] | kept, attributes["_modules"])


def read_module(
    top: Any, find: Callable[[Any], Module | None] = module_of
) -> tuple[OrderedItems, dict[str, SavedModule]]:
    """Return the state dict that a module would give, in its order, and what each module in it says of itself, by path.

    Raises:
        PickleError: the modules have more names than any network.
    """
    state, modules = OrderedItems(), dict[str, SavedModule]()
    left = MOST_CHARACTERS
    ahead: list[tuple[str, Any]] = [("", top)]
    while ahead:
        path, value = ahead.pop()
        left -= len(path) + 16
        if left < 0:
            raise PickleError("its pickle holds modules in modules without an end")
        module = find(value)
        if module is None:
            continue
        prefix = f"{path}." if path else ""
        for name, one in module.tensors.items():
            tensor = plain_tensor(one)
            if tensor is not None or why_unusable(one) is not None:
                state[f"{prefix}{name}"] = one if tensor is None else tensor
        modules[path] = module.about
        ahead += reversed([(f"{prefix}{name}", one) for name, one in module.parts.items()])
    return state, modules


def _names(value: Any) -> Any:
    """Return the names in a set, which the older protocols of pickle make of a list."""
    if isinstance(value, Call) and value.calls("builtins", "__builtin__") == "set" and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, set | list) else ()


def plain_attributes(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return those attributes that are numbers, words, or rows of numbers."""
    return {name: value for name, value in attributes.items() if isinstance(name, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= _LONGEST and all(type(one) in (int, float, bool) for one in value)
    return isinstance(value, int | float | bool | None) or (isinstance(value, str) and len(value) <= _LONGEST)
