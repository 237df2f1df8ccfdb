"""A run of a model, recorded as it happens: every operation, and in the runs of which modules.

What the input goes into is run on shapes alone, so that nothing is computed and no way is taken because of a value. All
else, such as a table of positions, is computed as ever: code may look at it, and keep it for the next run.

Values are told apart as objects, and by the memory that they lie in.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
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

from convtool.graph.recorded_run import CONSTANT, Following, Run
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
        layers: of the model, by module path, those whose runs are told apart.
        mode: that shapes are computed in.
        kept: told what numbers the run is about to change.
        held: whether to find out which values anybody holds afterwards.
    """
    recorder = _Recorder(model, frozenset(layers), kept)
    inputs = pytree.tree_map_only(Tensor, partial(_without_numbers, mode), list(inputs))
    recorder.held += recorder.values(inputs)
    for value in recorder.held:
        recorder.begin(value)
    failure: Exception | None = None
    output = None
    try:
        with recorder.entering(), mode, enable_python_dispatcher(), recorder:
            output = model(*inputs)
    except Exception as error:  # whatever the model's code raises; its frames hold what the rest of it could read
        failure = error
    del inputs
    shapes = tuple(map(recorder.shape, recorder.values(output)))
    outputs = kept_values = frozenset[int]()
    recorder.constants.clear()
    if held:  # whatever is alive while the output is may be in it, however deep
        expected = frozenset(map(recorder.number, recorder.values(output))) - {CONSTANT}
        outputs = expected | recorder.alive(expected)
        del output
        kept_values = recorder.alive(frozenset()) if failure is None else kept_values
    followed = Run(recorder.operations, outputs, kept_values)
    return Recorded(followed, failure, recorder.running(), tuple(recorder.called), shapes)


class _Recorder(
    Following, SchemaCheckMode
):  # the one class for which torch lets others see operations before they are taken apart
    def __init__(self, model: nn.Module, layers: frozenset[str], kept: Kept) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)
        own = [one for named in (model.named_parameters, model.named_buffers) for one in named(remove_duplicate=False)]
        Following.__init__(self, Tensor, {self.home(tensor): name for name, tensor in own}, layers)
        self.guard, self.own = Guard(kept), dict(own)
        self.held: list[Tensor] = []  # every value, so that no memory is used twice while the run lasts
        self.constants: list[Tensor] = []  # for the same reason
        self.calls: list[tuple[str, int]] = []  # the modules that are running
        self.called: list[tuple[str, int]] = []  # those, and the ones that ran before
        self.references: list[tuple[weakref.ref[Tensor], int, int]] = []  # to values: with operation and memory
        self.names = {id(module): name for name, module in model.named_modules()}

    def key(self, value: Tensor) -> int:
        return id(value)

    def home(self, value: Tensor) -> int:
        return int(value.untyped_storage()._cdata)

    def shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(value.shape)

    def is_whole(self, value: Tensor) -> bool:
        own = self.own.get(self.tensors.get(self.home(value), ""))
        if own is None or (value.numel(), value.storage_offset()) != (own.numel(), own.storage_offset()):
            return False
        same = (value.shape, value.stride()) == (own.shape, own.stride())
        return same or (value.is_contiguous() and own.is_contiguous())

    def number_in(self, value: Tensor) -> int | float | None:
        # One that Python made a tensor of.
        known = value.dim() or isinstance(value, FakeTensor) or self.model_tensors(value)
        if known or self.number(value) != CONSTANT:
            return None
        with unset_fake_temporarily():
            return value.item() if value.dtype in _NUMBERS and not value.is_meta else None

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
        read, reads = self.read_by(name, given)
        if name in _DECIDING and reads:
            raise DecidedByValuesError
        if reads or any(isinstance(value, FakeTensor) for value in self.values(given)):
            out = func(*args, **(kwargs or {}))
        else:
            with unset_fake_temporarily(), self.guard:
                out = func(*args, **(kwargs or {}))
        changes = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        made, writes = self.values(out), self.values([given.get(one) for one in changes])
        if made or changes:
            tensors = self.see(name, given, (read, reads), self.calls, made, writes).tensors
            # Of what nothing of the input goes into nobody has to know where it is read. But what comes later could get
            # the id of what is made of a model's tensor, or of what the input was written to.
            self.held += made if reads else ()
            self.constants += made if tensors and not reads else ()
            self.constants += [value for value in writes if reads and not isinstance(value, FakeTensor)]
        return out

    def alive(self, expected: frozenset[int]) -> frozenset[int]:
        """Return the operations whose values somebody holds; of those in one memory, whose views hold it, the last.

        Args:
            expected: those of which that is known.
        """
        if not self.references:
            self.references = [(weakref.ref(one), self.made[id(one)], self.home(one)) for one in self.held]
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
