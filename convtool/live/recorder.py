"""A run of a model, recorded as it happens: every operation, and in the runs of which modules.

What the input goes into is run on shapes alone, so that nothing is computed and no way is taken because of a value. All
else, such as a table of positions, is computed as ever: code may look at it, and keep it for the next run.

Values are told apart by the memory that they lie in. What is changed in place is another value from then on, for
whoever reads that memory, under whatever name.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convtool.graph.operations import OF_SHAPE
from convtool.graph.recorded_run import INPUT, UNKNOWN, Made, Operation, Run
from convtool.live.untouched import Guard, Kept

# Operations that hand a tensor's numbers to Python, which may go another way for others.
_DECIDING = {
    *(f"aten.{name}.default" for name in ("item", "_local_scalar_dense", "equal", "nonzero", "is_nonzero")),
    *(f"aten.{name}.default" for name in ("masked_select", "allclose", "unique_dim", "_unique2")),
}
# Operations that make a tensor like another and don't read the other's numbers.
_LIKE = {
    f"aten.{name}.default"
    for name in (
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty"),
    )
}
_NUMBERS = frozenset({torch.float64, torch.float32, torch.int64})
_CONSTANT = -1  # the number of what nothing of the run's input goes into


class DecidedByValuesError(Exception):
    """The model's code looks at a number that hangs on its input, and may go another way for another."""


class Recorded(NamedTuple):
    """A run, as far as it went.

    Attributes:
        failure: what ended it before it was through.
        running: the modules whose runs had begun by then and not ended.
        calls: every run of a module, with the number of operations before it.
        shapes: of the tensors in the output.
    """

    run: Run
    failure: Exception | None = None
    running: tuple[str, ...] = ()
    calls: tuple[tuple[str, int], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()


def record(
    run: Callable[..., Any],
    model: nn.Module,
    inputs: Sequence[Any],
    layers: Iterable[str],
    mode: FakeTensorMode,
    kept: Kept,
    *,
    held: bool = True,
) -> Recorded:
    """Run a model once, as far as that goes, and return its operations.

    Args:
        run: what to call: the model, or what calls the same modules.
        layers: of the model, by module path, those whose runs are told apart.
        mode: that shapes are computed in.
        kept: told what numbers the run is about to change.
        held: whether to find out which values anybody holds afterwards.
    """
    recorder = _Recorder(model, frozenset(layers), kept)
    inputs = pytree.tree_map_only(Tensor, partial(_without_numbers, mode), list(inputs))
    recorder.begin(inputs)
    failure: Exception | None = None
    output = None
    try:
        with recorder.entering(), mode, enable_python_dispatcher(), recorder:
            output = run(*inputs)
    except Exception as error:  # whatever the model's code raises; its frames hold what the rest of it could read
        failure = error
    del inputs
    shapes = tuple(tuple(value.shape) for value in _tensors(output))
    outputs = kept_values = frozenset[int]()
    recorder.constants.clear()
    if held:  # whatever is alive while the output is may be in it, however deep
        expected = frozenset(map(recorder.number, _tensors(output))) - {_CONSTANT}
        outputs = expected | recorder.alive(expected)
        del output
        kept_values = recorder.alive(frozenset()) if failure is None else kept_values
    followed = Run(recorder.operations, outputs, kept_values)
    return Recorded(followed, failure, recorder.running(), tuple(recorder.called), shapes)


class _Recorder(
    SchemaCheckMode
):  # the one class for which torch lets others see operations before they are taken apart
    def __init__(self, model: nn.Module, layers: frozenset[str], kept: Kept) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)
        self.layers, self.guard = layers, Guard(kept)
        self.operations: list[Operation] = []
        self.held: list[Tensor] = []  # every value, so that no memory is used twice while the run lasts
        self.constants: list[Tensor] = []  # for the same reason
        self.values: dict[int, int] = {}  # the operation that made a tensor object
        self.memory: dict[int, int] = {}  # the last one whose value lies in a piece of memory
        self.changed: dict[int, int] = {}  # the last one that changed a piece of memory
        self.made_of: dict[int, tuple[str, ...]] = {}  # the model's tensors that a constant is computed of, by memory
        self.constant: dict[int, Made] = {}  # what made a constant of the model's tensors, by object
        self.overwritten: dict[int, int] = {}  # the last one that changed a constant in place, by memory
        self.calls: list[tuple[str, int]] = []  # the modules that are running
        self.called: list[tuple[str, int]] = []  # those, and the ones that ran before
        self.references: list[tuple[weakref.ref[Tensor], int, int]] = []  # to values: with operation and memory
        own = [one for named in (model.named_parameters, model.named_buffers) for one in named(remove_duplicate=False)]
        self.tensors = {_memory(tensor): name for name, tensor in own}
        self.whole = dict(own)
        self.names = {id(module): name for name, module in model.named_modules()}

    def begin(self, inputs: Sequence[Any]) -> None:
        """See what the run is given, which are values too."""
        for value in _tensors(inputs):
            self._add(Operation(INPUT, shape=tuple(value.shape)), [value])

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """See, for a while, which modules are running."""
        handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.calls.append((self.names.get(id(module), ""), len(self.operations)))
        self.called.append(self.calls[-1])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls.pop()

    def running(self) -> tuple[str, ...]:
        """Return the modules whose runs have begun and not ended."""
        return tuple(name for name, _ in self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        names = (argument.name for argument in func._schema.arguments)
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if name in _LIKE and isinstance(given["self"], FakeTensor):
            given["self"] = _stand_in(given["self"])
            args = (given["self"], *args[1:])
        read = _tensors({key: value for key, value in given.items() if key != OF_SHAPE.get(name)})
        reads = tuple(number for value in read if (number := self.number(value)) != _CONSTANT)
        if name in _DECIDING and reads:
            raise DecidedByValuesError
        if reads or any(isinstance(value, FakeTensor) for value in _tensors(given)):
            out = func(*args, **(kwargs or {}))
        else:
            with unset_fake_temporarily(), self.guard:
                out = func(*args, **(kwargs or {}))
        self._see(func, given, read, reads, _tensors(out))
        return out

    def _see(
        self,
        func: Any,
        given: Mapping[str, Any],
        read: Sequence[Tensor],
        reads: tuple[int, ...],
        made: Sequence[Tensor],
    ) -> None:
        writes = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        if not made and not writes:
            return
        tensors = tuple(name for value in read for name in self._model_tensors(value))
        for value in made if tensors and not reads else ():  # a constant
            self.constants.append(value)  # a view of a model's tensor too: what comes later could get its id
            if _memory(value) not in self.tensors:
                self.made_of[_memory(value)] = tensors
        operands = {
            key: (self.tensors[_memory(value)], tuple(value.shape))
            for key, value in given.items()
            if isinstance(value, Tensor) and self._is_whole(value) and self.number(value) == _CONSTANT
        }
        arguments = pytree.tree_map_only(Tensor, self._argument, dict(given))
        layer = next((call for call in self.calls if call[0] in self.layers), ("", 0))
        shape = tuple(made[0].shape) if made else ()
        computed = {
            key: self._made_by(value)
            for key, value in given.items()
            if isinstance(value, Tensor) and key not in operands and self.number(value) == _CONSTANT
        }
        operation = Operation(str(func), reads, shape, tensors, arguments, layer, operands, tuple(self.calls), computed)
        number = self._add(operation, made)
        self.constant |= {id(one): Made(number, place) for place, one in enumerate(made) if tensors and not reads}
        for value in _tensors([given.get(one) for one in writes]):
            self.overwritten[_memory(value)] = number
        if reads:  # whoever reads that memory from now on, by whatever name, reads the new value
            written = [value for one in writes for value in _tensors(given.get(one))]
            self.changed |= {_memory(value): number for value in written}
            self.constants += [value for value in written if not isinstance(value, FakeTensor)]

    def _argument(self, value: Tensor) -> int | float | None:
        """Return a number that Python made a tensor of; None for every other tensor."""
        if (
            value.dim()
            or isinstance(value, FakeTensor)
            or self._model_tensors(value)
            or self.number(value) != _CONSTANT
        ):
            return None
        with unset_fake_temporarily():
            return value.item() if value.dtype in _NUMBERS and not value.is_meta else None

    def _is_whole(self, value: Tensor) -> bool:
        """Return whether a value is all of one of the model's tensors, its numbers in their order, in any shape."""
        own = self.whole.get(self.tensors.get(_memory(value), ""))
        if own is None or (value.numel(), value.storage_offset()) != (own.numel(), own.storage_offset()):
            return False
        same = (value.shape, value.stride()) == (own.shape, own.stride())
        return same or (value.is_contiguous() and own.is_contiguous())

    def _made_by(self, value: Tensor) -> Made:
        """Return what a constant comes from, as far as it is made of the model's tensors."""
        made = self.constant.get(id(value), UNKNOWN)
        return UNKNOWN if self.overwritten.get(_memory(value), _CONSTANT) > made.number else made

    def _model_tensors(self, value: Tensor) -> tuple[str, ...]:
        """Return the model's tensor that a value is, or those that it is computed of."""
        memory = _memory(value)
        return (self.tensors[memory],) if memory in self.tensors else self.made_of.get(memory, ())

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


def _without_numbers(mode: FakeTensorMode, value: Tensor) -> Tensor:
    if isinstance(value, FakeTensor):
        return value
    return FakeTensor(mode, value, torch.device("cpu")) if value.is_meta else mode.from_tensor(value)


def _stand_in(value: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, Tensor)]
