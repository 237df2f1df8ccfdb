"""Following one run of a model: which layer reads whose value, and what happens in between.

A run on shapes alone shows that the model's code takes the same way for every input of that size: where it looks at a
number that hangs on its input, the run ends, and so does what is known of the flow.
"""

from __future__ import annotations

import contextlib
import dis
import logging
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from convtool.errors import RefusedError, UsageError
from convtool.graph.flow import Flow
from convtool.graph.operations import read_flow
from convtool.live.layers import found_layers, module_layers
from convtool.live.recorder import DecidedByValuesError, Recorded, record
from convtool.live.state import tensors_of
from convtool.live.untouched import Guard, Kept, untouched

Inputs = tuple[Any, ...]


def example_input(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Return one input of that size (without the batch axis), on the model's device and in its dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    numbers = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *input_size, dtype=numbers.dtype, device=numbers.device)


@contextlib.contextmanager
def nowhere(model: nn.Module) -> Iterator[tuple[FakeTensorMode, Kept]]:
    """Let a model be run in eval mode and without gradients on shapes alone, and be afterwards what it was before.

    Tensors on the meta device look to its code as if they were in memory. It gives torch's mode for tensors without
    numbers, and what the model was like, which is put back.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _silent(), untouched(model) as kept, torch.no_grad():
        model.eval()
        memo: dict[int, Tensor] = {}
        for module in model.modules():
            owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for own in owned:
                for name, tensor in own.items():
                    if tensor is not None and tensor.is_meta and not isinstance(tensor, FakeTensor):
                        own[name] = memo.setdefault(id(tensor), _in_memory(mode, tensor))
        yield mode, kept


def _in_memory(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    made = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's warnings and log to itself: what there is to say of a run, convtool says."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def trace(model: nn.Module, inputs: Inputs) -> tuple[Flow, Recorded]:
    """Return the data flow of `model(*inputs)` in eval mode, as far as it can be followed, and what was recorded of it.

    Raises:
        RefusedError: it can't be followed at all.
        UsageError: the model doesn't run on these inputs.
    """
    known = module_layers(model)
    # Layers that aren't modules by themselves are found by the operations that read their tensors.
    layers = found_layers(model) | known.layers
    with nowhere(model) as (mode, kept):
        recorded = record(model, inputs, known.called(), mode, kept)
        why = "" if recorded.failure is None else _why_it_ended(model, inputs, recorded, kept)
        flow = read_flow(recorded.run, layers, known.bound, known.foreign)
    if why and not any(True for _ in flow.calls()):
        raise RefusedError(
            f"the model's data flow cannot be followed; name the layers to `convtool fuse` instead: {why}"
        )
    if why:
        remark = f"the data flow was followed up to {why}; what lies behind is left alone"
        apart = {**_may_run_again(model, recorded, layers), **flow.apart}
        flow = replace(flow, apart=apart, remarks=(remark,))
    return flow, recorded


def _may_run_again(model: nn.Module, recorded: Recorded, layers: Iterable[str]) -> dict[str, str]:
    """Return the layers that the code behind the end of a run may run again, as far as that can't be ruled out.

    The code of a module that was through will do the same again. That of one that wasn't names each of its children
    once, if it doesn't call them twice.
    """
    found = {}
    for name in layers:
        around = [one for one in recorded.running if not one or name.startswith(f"{one}.")]
        owner = max(around, key=len, default=None)
        if owner is None:
            continue
        child = name.removeprefix(f"{owner}." if owner else "").partition(".")[0]
        code = getattr(type(model.get_submodule(owner)).forward, "__code__", None)
        if code is None or list(_attributes(code)).count(child) != 1:
            found[name] = "the code behind the end of the flow may run it again"
    return found


def _attributes(code: types.CodeType) -> Iterator[str]:
    """Yield the names of attributes as often as code reads them."""
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield one.argval
        elif isinstance(one.argval, types.CodeType):
            yield from _attributes(one.argval)


def _why_it_ended(model: nn.Module, inputs: Inputs, recorded: Recorded, kept: Kept) -> str:
    """Return where and why a run ended, in words.

    Raises:
        UsageError: the model doesn't run on these inputs.
    """
    error = recorded.failure
    where = recorded.running[-1] if recorded.running else ""
    inside = f"the code of {where} ({type(model.get_submodule(where)).__name__})" if where else "the model's own code"
    if isinstance(error, (DecidedByValuesError, *_BY_VALUES)):
        return f"{inside}, which goes by the values of its input"
    if not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors_of(model).values()):
        try:
            with Guard(kept):
                model(*inputs)
        except Exception as error_in_memory:
            raise _does_not_run(inputs, error_in_memory) from None
    elif not _is_of_tracing(error):
        raise _does_not_run(inputs, error)
    return f"{inside}, which does what can't be followed on shapes alone"


# What a run on shapes alone raises where it needs a number.
_BY_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
)


def _is_of_tracing(error: BaseException | None) -> bool:
    """Return whether an error comes of there being no numbers, as far as it tells."""
    words = ("FakeTensor", "fake tensor", "tensor subclasses", "meta", "data-dependent", "data pointer")
    return isinstance(error, NotImplementedError) or any(word in str(error) for word in words)


def shapes_of(inputs: Inputs) -> str:
    """Return the shapes of inputs, and of what is no tensor the type, in words."""
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)


def _does_not_run(inputs: Inputs, error: BaseException | None) -> UsageError:
    return UsageError(
        f"the model doesn't run on an input of shape {shapes_of(inputs)} (the batch, then the size, channels first):"
        f" {error_line(error)}"
    )


def error_line(error: BaseException | None) -> str:
    """Return the first line of an error that says something, at most 200 characters of it."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"
