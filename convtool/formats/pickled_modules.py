"""A pickled nn.Module, read as data: its tensors under the names that `state_dict()` gives, and what it says of itself.

What a module is made of stands in its attributes: `_parameters`, `_buffers` and `_modules`, and beside them stride,
padding or eps. What it computes stands in its class's code, which is not run: a class is a name here, and what the
attributes mean is known for torch's own classes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from convtool.formats.pickle_values import Call, Global, OrderedItems, PickleError, plain_tensor, why_unusable
from convtool.formats.tensor_file import SavedModule

# Names of modules, all together; modules that hold each other twice have more of them than any memory.
MOST_CHARACTERS = 1 << 24
_LONGEST = 100  # of a plain text, or of a list of numbers
_OWN_FORWARD = ("forward", "_conv_forward", "__call__")
_GRAPH_MODULES = "torch.fx.graph_module"
_COMPILED = "torch._dynamo.eval_frame"  # torch.compile's module, pickled as a call with the module in it


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
