"""Running a model for its shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def nowhere(model: nn.Module) -> Iterator[None]:
    """Where tensors have shapes and no numbers, on whatever device the model is; it may be run on what it is run on."""
    if all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        with torch.device("meta"):
            yield
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
