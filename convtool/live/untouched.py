"""A model kept as it is while its own code runs: whatever a run changes, and Python can see, is put back afterwards.

A copy of the model would not do: what its code refers to besides it (closures, caches of its class or of its file)
is the original's. So everything that can be reached from the model is looked at before, and restored in place, so that
who holds a container or a tensor of it goes on to hold the same one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LEAVES = (type, types.BuiltinFunctionType, types.ModuleType, str, bytes, int, float, complex)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Kept]:
    """Put back, at the end, all that happens to a model meanwhile; also where something fails.

    That is: parameters and buffers, their bits; attributes, of modules and of other objects that they hold; containers,
    those of the modules' classes and files too; hooks and modes; generators of random numbers. A cache of functools
    that grew is emptied, as what it holds may be no values but shapes.
    """
    kept = Kept(model)
    try:
        yield kept
    finally:
        kept.restore()


class Guard(TorchDispatchMode):
    """See to it that numbers are kept before an operation writes to them."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            # Batch norms' statistics are written to by operations that don't say so.
            if isinstance(value, Tensor) and (writes or argument.name.startswith("running_")):
                self.kept.before_writing(value)
        return func(*args, **(kwargs or {}))


class Kept:
    """What a model was like."""

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Callable[[], object]] = []
        self.seen: dict[int, Any] = {}  # held, so that no other object takes an id
        self.numbers: dict[int, tuple[Tensor, Tensor]] = {}  # before they were written to, by memory
        self._keep_generators()
        self._walk(model)
        for owner in {cls for module in model.modules() for cls in type(module).__mro__}:
            if owner.__module__.partition(".")[0] not in ("torch", "builtins"):
                self._keep_containers(vars(owner))
                self._keep_containers(vars(sys.modules.get(owner.__module__, owner)))

    def before_writing(self, tensor: Tensor) -> None:
        """Keep the numbers of a tensor that is about to be written to."""
        memory = int(tensor.untyped_storage()._cdata)
        if memory not in self.numbers and not tensor.is_meta:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self.numbers[memory] = whole, whole.clone()

    def restore(self) -> None:
        """Put everything back."""
        for undo in reversed(self.undo):
            undo()
        for whole, numbers in self.numbers.values():
            whole.copy_(numbers)

    def _keep_generators(self) -> None:
        self.undo.append(functools.partial(torch.set_rng_state, torch.get_rng_state()))
        self.undo.append(functools.partial(random.setstate, random.getstate()))
        self.undo.append(functools.partial(np.random.set_state, np.random.get_state()))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.undo.append(functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))

    def _keep_containers(self, owner: Any) -> None:
        """Keep what a class or a file holds to put things into."""
        for name, value in list(owner.items()):
            if not name.startswith("__") and isinstance(value, dict | list | set | deque):
                self._walk(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                self.undo.append(functools.partial(_empty_if_grown, value, value.cache_info().currsize))

    def _walk(self, root: Any) -> None:
        ahead = [root]
        while ahead:
            value = ahead.pop()
            if value is None or isinstance(value, _LEAVES) or id(value) in self.seen:
                continue
            self.seen[id(value)] = value
            ahead += self._keep(value)

    def _keep(self, value: Any) -> list[Any]:
        """Keep one object, and return those that it holds."""
        if isinstance(value, Tensor):
            self.undo.append(functools.partial(_reset_tensor, value, value.data, value.grad, value.requires_grad))
        elif isinstance(value, np.ndarray):
            self.undo.append(functools.partial(_reset_array, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.undo.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.undo.append(functools.partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.undo.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        elif isinstance(value, types.FunctionType):
            return [*map(_content, value.__closure__ or ()), *(value.__defaults__ or ())]
        elif isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        return [*self._keep_items(value), *self._keep_attributes(value)]

    def _keep_items(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            counters = {key: copy.copy(one) for key, one in value.items() if isinstance(one, itertools.count)}
            self.undo.append(functools.partial(_reset_dict, value, list(value.items()), counters))
            return list(value.values())
        if isinstance(value, list | deque | set):
            self.undo.append(functools.partial(_reset_items, value, list(value)))
        return list(value) if isinstance(value, list | deque | set | tuple | frozenset) else []

    def _keep_attributes(self, value: Any) -> list[Any]:
        attributes = getattr(value, "__dict__", None)
        slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
        held = {name: one for name in slots if (one := getattr(value, name, None)) is not None}
        for name, one in held.items():
            self.undo.append(functools.partial(_reset_slot, value, name, one))
        return [*([attributes] if isinstance(attributes, dict) else []), *held.values()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _names(slots: Any) -> tuple[str, ...]:
    return tuple(name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))


def _reset_tensor(tensor: Tensor, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    same = tensor.data_ptr() == data.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and not data.is_meta else True
    if not same or tensor.shape != data.shape or tensor.stride() != data.stride() or tensor.dtype != data.dtype:
        tensor.data = data
    if tensor.grad is not grad:
        tensor.grad = grad
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _reset_array(array: Any, before: Any) -> None:
    if array.flags.writeable:
        array[...] = before


def _reset_dict(one: dict[Any, Any], items: list[tuple[Any, Any]], counters: dict[Any, Any]) -> None:
    # One that counted can't be set back; what takes its place counts on from where it was.
    items = [(key, counters[key] if key in counters and repr(counters[key]) != repr(v) else v) for key, v in items]
    if len(one) == len(items) and all(
        key is old and value is kept for (key, value), (old, kept) in zip(one.items(), items, strict=True)
    ):
        return
    one.clear()
    one.update(items)


def _reset_items(one: Any, items: list[Any]) -> None:
    if len(one) != len(items) or any(value is not kept for value, kept in zip(one, items, strict=True)):
        one.clear()
        (one.update if isinstance(one, set) else one.extend)(items)


def _reset_slot(owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name, None) is not value:
        with contextlib.suppress(AttributeError):
            object.__setattr__(owner, name, value)


def _empty_if_grown(cache: Any, size: int) -> None:
    if cache.cache_info().currsize > size:
        cache.cache_clear()
