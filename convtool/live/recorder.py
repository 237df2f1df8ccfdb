"""A run of a model, recorded as it happens: every operation, and in the run of which layer.

Values are told apart by the memory that they lie in. What is changed in place is another value from then on, for
whoever reads that memory, under whatever name.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convtool.errors import RefusedError
from convtool.graph.operations import INPUT, Operation, Run

# Operations that hand a tensor's numbers to Python, which may go another way for others.
_DECIDING = frozenset(f"aten.{name}.default" for name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"))
_CONSTANT = -1  # the number of what nothing of the run's input goes into


def record(run: Callable[..., Any], model: nn.Module, inputs: Sequence[Any], layers: Iterable[str]) -> Run:
    """Run a model once, and return its operations.

    Args:
        run: what to call: the model, or what calls the same modules.
        layers: of the model, by module path, those whose runs are told apart.

    Raises:
        RefusedError: its control flow depends on values.
    """
    recorder = _Recorder(model)
    recorder.begin(inputs)
    with recorder.entering(layers), recorder:
        output = run(*inputs)
    # Whatever is alive while the output is may be in it, however deep.
    outputs = recorder.alive(frozenset(map(recorder.number, _tensors(output))))
    del output
    return Run(recorder.operations, outputs, recorder.alive(frozenset()))


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.operations: list[Operation] = []
        self.held: list[Tensor] = []  # every value, so that no memory is used twice while the run lasts
        self.values: dict[int, int] = {}  # the operation that made a tensor object
        self.memory: dict[int, int] = {}  # the last one whose value lies in a piece of memory
        self.changed: dict[int, int] = {}  # the last one that changed a piece of memory
        self.calls: list[tuple[str, int]] = []  # the layers that are running
        self.references: list[tuple[weakref.ref[Tensor], int, int]] = []  # to values: with operation and memory
        self.tensors = {
            _memory(tensor): name
            for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }

    def begin(self, inputs: Sequence[Any]) -> None:
        """See what the run is given, which are values too."""
        for value in _tensors(list(inputs)):
            self._add(Operation(INPUT, shape=tuple(value.shape)), [value])

    @contextlib.contextmanager
    def entering(self, layers: Iterable[str]) -> Iterator[None]:
        """See, for a while, which layers are running."""
        handles: list[Any] = []
        try:
            for name in layers:
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(partial(self._enter, name), prepend=True))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.calls.append((name, len(self.operations)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = (argument.name for argument in func._schema.arguments)
        self._see(func, dict(zip(names, args, strict=False)) | (kwargs or {}), _tensors(out))
        return out

    def _see(self, func: Any, given: Mapping[str, Any], made: Sequence[Tensor]) -> None:
        name, read = str(func), _tensors(dict(given))
        reads = tuple(number for value in read if (number := self.number(value)) != _CONSTANT)
        if name in _DECIDING and reads:
            raise RefusedError("its control flow depends on the values of its input")
        writes = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        if not made and not writes:
            return
        tensors = tuple(self.tensors[_memory(value)] for value in read if _memory(value) in self.tensors)
        arguments = pytree.tree_map(lambda value: None if isinstance(value, Tensor) else value, dict(given))
        shape, call = tuple(made[0].shape) if made else (), self.calls[0] if self.calls else ("", 0)
        number = self._add(Operation(name, reads, shape, tensors, arguments, call), made)
        if reads:  # whoever reads that memory from now on, by whatever name, reads the new value
            self.changed |= {_memory(value): number for one in writes for value in _tensors(given.get(one))}

    def _add(self, operation: Operation, made: Sequence[Tensor]) -> int:
        number = len(self.operations)
        self.operations.append(operation)
        # Of what nothing of the input goes into nobody has to know where it is read.
        for value in made if operation.reads or operation.name == INPUT else ():
            self.held.append(value)
            self.values[id(value)] = self.memory[_memory(value)] = number
        return number

    def number(self, value: Tensor) -> int:
        """Return the operation that a value comes from: the last one that changed its memory, if that is later."""
        memory = _memory(value)
        return max(self.values.get(id(value), self.memory.get(memory, _CONSTANT)), self.changed.get(memory, _CONSTANT))

    def alive(self, expected: frozenset[int]) -> frozenset[int]:
        """Return the operations whose values somebody holds; of those in one memory, whose views hold it, the last.

        Args:
            expected: those of which that is known.
        """
        if not self.references:
            self.references = [(weakref.ref(value), self.values[id(value)], _memory(value)) for value in self.held]
            self.held.clear()

        def alive() -> frozenset[int]:
            there = {memory: number for reference, number, memory in self.references if reference() is not None}
            return frozenset(number for number in there.values() if self.operations[number].reads)

        if alive() <= expected:
            return alive()
        gc.collect()  # what only a cycle holds is held by nobody
        return alive()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, Tensor)]
