"""A model is after `plan` what it was before, whatever its code does to it when it runs, also where that fails."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from live import filled
from torch import Tensor, nn

import convtool
from convtool.errors import UsageError

TABLES: dict[Any, Tensor] = {}  # what a file keeps beside its classes


@functools.lru_cache
def positions(count: int) -> Tensor:
    """A table that is made once."""
    return torch.arange(count, dtype=torch.float64)


class Base(nn.Module):
    """A convolution and a batch norm, and what some code does besides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """The two layers."""
        result: Tensor = self.bn(self.a(self.besides(x)))
        return result

    def besides(self, x: Tensor) -> Tensor:
        """What this class does."""
        return x


class SetsItselfUp(Base):
    def besides(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.randn(x.shape[1], 1, 1, dtype=x.dtype))
            self.register_buffer("mean", x.mean())
        return x * self.scale


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.numbers, self.log = 0, itertools.count(), [0]
        self.array = np.zeros(3)
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def besides(self, x: Tensor) -> Tensor:
        self.calls += 1
        next(self.numbers)
        self.log.append(self.calls)
        self.array += 1
        self.count += 1
        return x


class Keeps(Base):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.store: dict[str, Any] = {"inner": {}, "seen": set()}

    def besides(self, x: Tensor) -> Tensor:
        self.last = x
        self.store["inner"]["x"] = x
        self.store["seen"].add(x.shape)
        TABLES[x.shape] = x + 1
        return x + positions(x.shape[-1])


class Draws(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def besides(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype) * random.random() * np.random.rand()
        return x + noise + torch.randn_like(x) * 1e-3


class WritesToItself(Base):
    def besides(self, x: Tensor) -> Tensor:
        self.a.weight.data.mul_(0.5)
        self.bn.running_mean.copy_(x.mean((0, 2, 3)).new_zeros(4))  # type: ignore[union-attr]
        self.a.bias = nn.Parameter(torch.zeros(4, dtype=x.dtype))
        self.bn.eval()
        self.a.register_forward_hook(lambda module, args, output: output)
        return F.batch_norm(x, torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype), training=True)


class Fails(Counts):
    def besides(self, x: Tensor) -> Tensor:
        super().besides(x)
        raise ValueError("no")


def state(value: Any, depth: int = 0) -> Any:
    """All that an object holds, comparable."""
    if isinstance(value, Tensor):
        return type(value), id(value), value.dtype, tuple(value.shape), value.detach().flatten().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return [(str(key), state(one, depth + 1)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [state(one, depth + 1) for one in value]
    if isinstance(value, nn.Module):
        return type(value), id(value), state(vars(value), depth + 1)
    return repr(value)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [SetsItselfUp, Counts, Keeps, Draws, WritesToItself, Fails])
def test_a_fragile_model_is_left_as_it_was(make: Callable[[], Base], training: bool) -> None:
    TABLES.clear()
    model = filled(make())
    model.a.train(training)
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    before, cached = state(model), positions.cache_info().currsize
    for _ in range(2):
        with pytest.raises(UsageError, match="ValueError: no") if make is Fails else contextlib.nullcontext():
            found = convtool.plan(model, (3, 6, 5))
            assert bool(found.fusions) == (make is not WritesToItself)  # whose code can't do without its layers
        assert state(model) == before
        assert not TABLES
        assert positions.cache_info().currsize == cached
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert (random.getstate(), str(np.random.get_state())) == generators[1:]
    if make is not Fails:
        model(torch.randn(1, 3, 6, 5, dtype=torch.float64))
        assert all(type(one) is Tensor for one in TABLES.values())


def test_a_model_that_set_itself_up_before_is_fused_with_what_it_has() -> None:
    model = filled(SetsItselfUp())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = model(x)
    fused = convtool.fuse_model(copy.deepcopy(model), (3, 6, 5))
    assert torch.allclose(fused(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(fused.bn, nn.Identity)
