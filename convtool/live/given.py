"""What a model is run on: sizes of its inputs, or what code of the user's returns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convtool.core.fields import BETWEEN_SIZES, parse_sizes
from convtool.core.geometry import format_sizes
from convtool.errors import UsageError
from convtool.live.load import run_code
from convtool.live.trace import Inputs, example_input

_SIZE = re.compile(rf"[0-9]+({BETWEEN_SIZES}[0-9]+)*")


def read_given(texts: Sequence[str]) -> tuple[tuple[int, ...], ...] | str:
    """Return --model-input as the sizes of the inputs, without the batch; or as the code that returns these.

    Raises:
        UsageError: neither, or both.
    """
    if all(map(_SIZE.fullmatch, texts)):
        return tuple(parse_sizes(text, "--model-input") for text in texts)
    if len(texts) == 1 and ":" in texts[0]:
        return texts[0]
    raise UsageError(
        "--model-input: expected sizes such as 3,224,224, once for each input of the model, or pkg.mod:callable, which"
        f" returns its arguments, got {' '.join(texts)!r}"
    )


def model_inputs(model: nn.Module, texts: Sequence[str]) -> Inputs:
    """Return the arguments of a model's forward.

    Raises:
        UsageError: the user's code fails, or returns what isn't the model's arguments.
    """
    given = read_given(texts)
    if isinstance(given, str):
        return _positional(model, run_code("--model-input", given))
    return tuple(example_input(model, size) for size in given)


def random_inputs(model: nn.Module, texts: Sequence[str], trials: int, generator: torch.Generator) -> Inputs:
    """Return arguments in float64: random normal numbers of the sizes, or what the user's code returns."""
    given = read_given(texts)
    if isinstance(given, str):
        made = model_inputs(model, texts)
        return tuple(one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in made)
    return tuple(torch.randn(trials, *size, dtype=torch.float64, generator=generator) for size in given)


def _positional(model: nn.Module, made: Any) -> Inputs:
    """Return what code gave as positional arguments: a tensor, several, or arguments by name."""
    if isinstance(made, Mapping):
        try:
            bound = inspect.signature(model.forward).bind(**made)
        except TypeError as error:
            raise UsageError(f"--model-input: the model's forward takes other arguments: {error}") from None
        bound.apply_defaults()
        if named := [name for name in bound.kwargs if name in made]:
            raise UsageError(f"--model-input: {', '.join(named)} can't be given by position")
        return bound.args
    return tuple(made) if isinstance(made, tuple | list) else (made,)


def describe_given(texts: Sequence[str]) -> str:
    """Return --model-input in words."""
    given = read_given(texts)
    return given if isinstance(given, str) else " and ".join(map(format_sizes, given))
