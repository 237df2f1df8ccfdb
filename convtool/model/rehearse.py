"""Fusions put into the model for a moment, to see whether its code runs with them: shapes alone, nothing computed.

A forward that reshapes to a fixed number of channels, or that can't do without a scale, shows here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from convtool.api import Applying
from convtool.checkpoint.record import FusionRecord
from convtool.core.conv import Conv
from convtool.model.state import StateCheckpoint


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
    """The fusions with which the model doesn't run or gives other shapes, by their number, with the reason.

    Also why nothing could be seen, in words; '' where something could.
    """
    expected = _shapes(model, inputs, [])
    if isinstance(expected, str):
        return {}, f"whether the model's code runs with the fused layers could not be tried: {expected}"
    if not fusions or _shapes(model, inputs, fusions) == expected:
        return {}, ""
    found = {}
    for number, fusion in enumerate(fusions):
        got = _shapes(model, inputs, [fusion])
        if isinstance(got, str):
            found[number] = f"the model's code doesn't run without the layers: {got}"
        elif got != expected:
            found[number] = "the model's code gives outputs of another shape without the layers"
    return found or dict.fromkeys(range(len(fusions)), "the model's code doesn't run with these fusions together"), ""


def _shapes(
    model: nn.Module, inputs: Sequence[Any], fusions: Sequence[tuple[FusionRecord, Conv]]
) -> list[tuple[int, ...]] | str:
    """Shapes of the model's outputs with these fusions in it; an error in words where it doesn't run."""
    # What the layers are has been seen to; only their places count here.
    applying = Applying(model, _OneLayer({record.name: conv for record, conv in fusions}), check=False)
    training = [module for module in model.modules() if module.training]
    try:
        with _nowhere(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for record, _ in fusions:
                applying.put(record)
            model.eval()
            output = model(*inputs)
    except Exception as error:  # the user's code
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
    finally:
        applying.undo()
        for module in training:
            module.training = True
    return [tuple(value.shape) for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]


@contextlib.contextmanager
def _nowhere(model: nn.Module) -> Iterator[None]:
    """Where tensors have shapes and no numbers, on whatever device the model is."""
    if all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        with torch.device("meta"):
            yield
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
