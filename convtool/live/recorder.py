"""A run of a model, recorded as it happens: hooks on the layers, and every operation between them.

Values are told apart by the memory that they lie in. What is changed in place is another value from then on, for
whoever reads that memory, under whatever name.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convtool.errors import RefusedError
from convtool.graph.flow import Op, Step
from convtool.graph.operations import classify
from convtool.live.layers import ModuleLayer, layer_axes

# Operations that hand a tensor's numbers to Python, which may go another way for others.
_DECIDING = frozenset({"_local_scalar_dense.default", "equal.default", "nonzero.default", "is_nonzero.default"})


def record_run(
    run: Callable[..., Any],
    model: nn.Module,
    inputs: Sequence[Any],
    layers: Mapping[str, ModuleLayer],
) -> tuple[list[Step], frozenset[int], dict[str, str]]:
    """Run it once.

    Args:
        run: what to call: the model, or a graph of it that calls the same modules.
        layers: of the model, those that are one step each.

    Returns:
        The steps, the numbers of those whose values are the run's outputs or are kept somewhere, and the layers whose
        tensors are read outside of their own run, with the tensor.

    Raises:
        RefusedError: its control flow depends on values.
    """
    recorder = _Recorder(model, layers)
    recorder.begin(inputs)
    with recorder.hooked(), recorder:
        output = run(*inputs)
    # Whatever is alive while the output is may be in it, however deep, or be kept by the model.
    return recorder.steps, recorder.leaving(output) | recorder.still_alive(), recorder.read_outside


def kept_layers(model: nn.Module, inputs: Sequence[Any], layers: Mapping[str, ModuleLayer]) -> set[str]:
    """The layers whose values are still held after a run, by the model's own code or by hooks, once its output is gone.

    Also those whose values went into such a one with nothing but copies, additions and flattens in between.
    """
    recorder = _Recorder(model, layers)
    recorder.begin(inputs)
    with recorder.hooked(), recorder:
        model(*inputs)
    ahead, seen, kept = list(recorder.still_alive()), set[int](), set[str]()
    while ahead:
        number = ahead.pop()
        step = recorder.steps[number]
        if step.op is Op.LAYER:
            kept.add(step.name)
        elif step.op is not Op.OTHER and number not in seen:
            ahead += step.reads
        seen.add(number)
    return kept


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, layers: Mapping[str, ModuleLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.layers = model, layers
        self.steps: list[Step] = []
        self.alive: list[Tensor] = []  # every value, so that no memory is used twice while the run lasts
        self.values: dict[int, int] = {}  # the step that made a tensor object
        self.memory: dict[int, list[int]] = {}  # the steps whose values lie in a piece of memory, oldest first
        self.changed: dict[int, int] = {}  # the step that changed a piece of memory last
        self.inside: list[str] = []  # the layers that are running
        self.pending: list[Tensor] = []
        self.extra: dict[int, set[int]] = {}  # values that a step reads through another name of their memory
        self.read_outside: dict[str, str] = {}
        self.tensors = {
            _memory(tensor): name
            for kind in (model.named_parameters, model.named_buffers)
            for name, tensor in kind(remove_duplicate=False)
        }

    def begin(self, inputs: Sequence[Any]) -> None:
        """The run's inputs are values too."""
        for value in pytree.tree_leaves(list(inputs)):
            if isinstance(value, Tensor):
                self.new(Step(Op.OTHER, "input", (), tuple(value.shape)), [value])

    # --- hooks

    def hooked(self) -> _Hooks:
        return _Hooks(self)

    def enter(self, name: str, args: Sequence[Any]) -> None:
        self.inside.append(name)
        if len(self.inside) == 1:
            self.pending = [value for value in args if isinstance(value, Tensor)]

    def leave(self, name: str, output: Any) -> None:
        self.inside.pop()
        if self.inside:
            return
        reads = self.pending
        axes = None
        if len(reads) == 1 and isinstance(output, Tensor):
            axes = layer_axes(self.layers[name], reads[0].dim())
        op = Op.OTHER if axes is None else Op.LAYER
        flattens = self.layers[name].kind.channels_last
        tensors = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]
        shape = tuple(tensors[0].shape) if tensors else ()
        self.new(Step(op, name, self._reads(reads), shape, axes or 0, flattens), tensors)

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside:
            self._operation(func, args, kwargs, out)
        return out

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = str(func).removeprefix("aten.")
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        read = [value for value in given if self._is_value(value)]
        for value in given:
            tensor = self.tensors.get(_memory(value))
            if tensor is not None and tensor.rpartition(".")[0] in self.layers:
                self.read_outside.setdefault(tensor.rpartition(".")[0], tensor)
        if name in _DECIDING and read:
            raise RefusedError("its control flow depends on the values of its input")
        made = [value for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]
        if not made or not (read or given):
            return
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        shape = tuple(made[0].shape)
        plain = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        op = Op.OTHER if writes else classify(name, [tuple(v.shape) for v in read], shape, args, plain)
        step = self.new(Step(op, name, self._reads(read), shape), made)
        if writes:
            for value in read:
                self.changed[_memory(value)] = step

    def new(self, step: Step, made: Sequence[Tensor]) -> int:
        number = len(self.steps)
        self.steps.append(step)
        for value in made:
            self.alive.append(value)
            self.values[id(value)] = number
            self.memory.setdefault(_memory(value), []).append(number)
        return number

    def _is_value(self, value: Tensor) -> bool:
        return id(value) in self.values or _memory(value) in self.memory

    def _reads(self, values: Sequence[Tensor]) -> tuple[int, ...]:
        """The steps that the values come from; also those whose values lie in the same memory under another name."""
        found: list[int] = []
        for value in values:
            if not self._is_value(value):
                continue
            memory = _memory(value)
            number = self.values.get(id(value), self.memory[memory][-1] if memory in self.memory else 0)
            number = max(number, self.changed.get(memory, number))
            found.append(number)
            # A value that shares this memory is read as well, unless it led here, which is a read already.
            for other in self.memory.get(memory, ()):
                if other != number and not self._leads(other, number):
                    found.append(other)
        return tuple(found)

    def _leads(self, first: int, last: int) -> bool:
        """Whether the value of step `last` was made out of that of step `first`."""
        ahead = [last]
        while ahead:
            number = ahead.pop()
            if number == first:
                return True
            ahead += [before for before in self.steps[number].reads if before >= first]
        return False

    # --- what leaves

    def leaving(self, output: Any) -> frozenset[int]:
        found = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]
        found += [value for value in _attributes(output) if isinstance(value, Tensor)]
        return frozenset(number for value in found for number in self._reads([value]))

    def still_alive(self) -> frozenset[int]:
        """The steps whose values somebody keeps after the run."""
        references = [(weakref.ref(value), self.values[id(value)]) for value in self.alive]
        self.alive.clear()
        self.pending = []

        def alive() -> frozenset[int]:
            return frozenset(n for reference, n in references if reference() is not None and self.steps[n].reads)

        found = alive()
        if not found:
            return found
        gc.collect()  # what only a cycle holds is held by nobody
        return alive()


class _Hooks:
    """The recorder's hooks on the layers, for as long as the run lasts."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name in self.recorder.layers:
            module = self.recorder.model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after(name)))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.recorder.enter(name, [*args, *kwargs.values()])

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.recorder.leave(name, output)

        return hook


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attributes(output: Any) -> list[Any]:
    return list(vars(output).values()) if hasattr(output, "__dict__") else []
