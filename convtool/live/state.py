"""A live model's tensors, and what convtool made of them, as a checkpoint that is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from convtool.checkpoint import Checkpoint, TensorInfo
from convtool.checkpoint.record import Record
from convtool.core.flat import tensor_bits
from convtool.kinds import KINDS

COUNTERS = frozenset(name for kind in KINDS for name in kind.counters)  # tensors that nothing is computed with


class StateCheckpoint(Checkpoint):
    """Tensors by full name, in order, that are already in memory (or on the meta device).

    Args:
        tensors: as a state dict has them.
        record: what was fused, where anything was.
    """

    format = "memory"

    def __init__(self, tensors: Mapping[str, Tensor], record: Record | None = None) -> None:
        super().__init__(Path("the model"))
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._known_record = record
        self.infos = {name: tensor_info(name, tensor) for name, tensor in self._tensors.items()}

    @classmethod
    def of(cls, model: nn.Module) -> StateCheckpoint:
        """Return a model's state dict; the tensors are the model's own."""
        return cls(tensors_of(model))

    def stored_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        yield memoryview(tensor_bits(self._tensors[name]).numpy().tobytes())

    @property
    def record(self) -> Record | None:
        return self._known_record


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors as torch's own state_dict() has them, whatever the model's classes make of that."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = {name: one for name, one in module._buffers.items() if name not in module._non_persistent_buffers_set}
        own = {**module._parameters, **kept}
        found |= {f"{path}.{name}" if path else name: one for name, one in own.items() if one is not None}
    return found


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put numbers into a model's tensors, by name; what its classes do when they load would be done to others."""
    own = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def tensor_info(name: str, tensor: Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())
