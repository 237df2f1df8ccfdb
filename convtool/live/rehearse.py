"""Fusions put into the model for a moment, to see whether its code runs with them: shapes alone, nothing computed.

A forward that reshapes to a fixed number of channels, or that can't do without a scale, shows here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convtool.checkpoint.record import FusionRecord
from convtool.core.conv import Conv
from convtool.live.apply import Applying
from convtool.live.state import StateCheckpoint
from convtool.live.trace import nowhere


class _OneLayer(StateCheckpoint):
    """A checkpoint of fused layers whose numbers nobody will ask for."""

    def __init__(self, fused: dict[str, Conv]) -> None:
        super().__init__({f"{name}.weight": conv.weight for name, conv in fused.items()})
        self._fused = fused

    def conv(self, name: str, **fields: Any) -> Conv:
        return self._fused[name]


def failures(
    model: nn.Module, inputs: Sequence[Any], fusions: Sequence[tuple[FusionRecord, Conv]]
) -> tuple[dict[int, str], str]:
    """The fusions with which the model's code doesn't do the same, by their number, with the reason.

    It does the same where it runs every operation that it ran before, but for those of the fused layers, and gives
    outputs of the same shapes. Code that looks at what kind of module it calls may not.

    Also why nothing could be seen, in words; '' where something could.
    """
    names = {source.name for record, _ in fusions for source in record.sources}
    before = _run(model, inputs, [], names)
    if isinstance(before, str):
        return {}, f"whether the model's code runs with the fused layers could not be tried: {before}"
    shapes, operations = before

    def wrong(chosen: Sequence[tuple[FusionRecord, Conv]]) -> str:
        after = _run(model, inputs, chosen, names)
        if isinstance(after, str):
            return f"the model's code doesn't run without the layers: {after}"
        if after[0] != shapes:
            return "the model's code gives outputs of another shape without the layers"
        return "" if after[1] == operations else "the model's code does something else without the layers"

    together = wrong(fusions) if fusions else ""
    if not together:
        return {}, ""
    found = {number: reason for number, fusion in enumerate(fusions) if (reason := wrong([fusion]))}
    return found or dict.fromkeys(range(len(fusions)), f"of all fusions together: {together}"), ""


_Seen: TypeAlias = tuple[list[tuple[int, ...]], list[str]]  # shapes of the outputs, and the operations


def _run(
    model: nn.Module, inputs: Sequence[Any], fusions: Sequence[tuple[FusionRecord, Conv]], names: set[str]
) -> _Seen | str:
    """What a run shows with these fusions in the model; an error in words where it doesn't run.

    Args:
        names: of layers whose operations aren't told, and of scales whose multiplications aren't.
    """
    # What the layers are has been seen to; only their places count here.
    applying = Applying(model, _OneLayer({record.name: conv for record, conv in fusions}), check=False)
    training = [module for module in model.modules() if module.training]
    try:
        with nowhere(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for record, _ in fusions:
                applying.put(record)
            model.eval()
            with _Log(model, names) as log:
                output = model(*inputs)
    except Exception as error:  # the user's code
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
    finally:
        applying.undo()
        for module in training:
            module.training = True
    return [tuple(value.shape) for value in pytree.tree_leaves(output) if isinstance(value, Tensor)], log.operations


class _Log(TorchDispatchMode):
    """The names of the operations that a model's code runs outside of some layers."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.inside = 0
        self.handles: list[Any] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        # A scale is named by the module that holds it, which may hold all else as well.
        whole = [modules[name] for name in names if name in modules and not list(modules[name].children())]
        self.whole = {id(module): module for module in whole}
        self.scales = {
            id(tensor)
            for name in names
            if name in modules and id(modules[name]) not in self.whole
            for tensor in modules[name].parameters(recurse=False)
        }

    def __enter__(self) -> _Log:
        for module in self.whole.values():
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scaled = any(id(value) in self.scales for value in args)
        if not self.inside and not scaled:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.inside += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inside -= 1
