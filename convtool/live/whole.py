"""A whole network before and after its fusions, output against output.

What a fusion does to its own layers is proved layer by layer (`convtool.core.verify`). This shows the rest: that the
layers stand in the network where the fusions took them to stand. A network isn't linear, so there is no bound on what
rounding the fused weights may do to its outputs. It is measured: every number of the original is changed by as much as
rounding it to its dtype would change it, at random, and what that does to the outputs is the scale for the difference.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convtool.checkpoint import Checkpoint
from convtool.errors import InputError, UsageError
from convtool.live.agreement import agree
from convtool.live.given import describe_given, random_inputs
from convtool.live.state import COUNTERS, load_tensors, tensors_of
from convtool.live.trace import Inputs, error_line, shapes_of

# Times the effect of rounding every weight once that a difference may have: fused weights are rounded once as well,
# but the maxima of a few random draws are compared. A layer in the wrong place differs by a million times and more.
MOST = 8.0
DRAWS = 4  # times that every number is changed at random


@dataclass(frozen=True, slots=True)
class WholeReport:
    """Both networks on the same inputs, in float64.

    Attributes:
        inputs: what the networks ran on, in words.
        outputs: numbers compared.
        difference: the largest, of all outputs and inputs.
        largest_output: of the original.
        rounding: the largest change of an output when every number of the original is changed by a rounding.
        ratio: difference by rounding; 0 where there is no difference.
        most: the largest ratio that is called equal.
        equal: the networks differ by no more than rounding does.
    """

    inputs: str
    outputs: int
    difference: float
    largest_output: float
    rounding: float
    ratio: float = field(init=False)
    most: float = MOST
    equal: bool = field(init=False)

    def __post_init__(self) -> None:
        ratio = self.difference / self.rounding if self.rounding else math.inf
        ratio = ratio if self.difference else 0.0
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "equal", ratio <= self.most)  # false of NaN


def compare(
    original: nn.Module,
    before: Checkpoint,
    fused: nn.Module,
    after: Checkpoint,
    inputs: Sequence[str],
    *,
    trials: int = 2,
    seed: int = 0,
) -> WholeReport:
    """Run two networks, loaded, on the same inputs.

    Args:
        inputs: of both, as --model-input has them.
        trials: random normal ones.

    Raises:
        UsageError: one doesn't run on them.
        InputError: their outputs are of other shapes.
    """
    dtypes = {name: value.dtype for name, value in tensors_of(original).items()}
    original, generator = original.double(), torch.Generator().manual_seed(seed)
    arguments = random_inputs(original, inputs, trials, generator)
    expected, got = _outputs(original, arguments, before), _outputs(fused.double(), arguments, after)
    if [value.shape for value in expected] != [value.shape for value in got]:
        raise InputError(f"{after.path}: the network with the fusions gives outputs of other shapes")
    rounding = 0.0
    for _ in range(DRAWS):
        with _rounded(original, dtypes, generator):
            rounding = max(rounding, _distance(expected, _outputs(original, arguments, before)))
    largest, count = max(float(value.abs().max()) for value in expected), sum(value.numel() for value in expected)
    return WholeReport(describe_given(inputs), count, _distance(expected, got), largest, rounding)


def loaded(model: nn.Module, checkpoint: Checkpoint, *, strict: bool = False) -> nn.Module:
    """Return the model in eval mode with a checkpoint's tensors in it, each under the name that the model has for it.

    Args:
        strict: whether it has to have a place for each of them.

    Raises:
        UsageError: the two don't fit each other.
    """
    names, own, state = agree(model, checkpoint).names, tensors_of(model), {}
    left = dict.fromkeys(checkpoint.infos)
    for key, tensor in own.items():
        path, _, parameter = key.rpartition(".")
        theirs = names.get(path, path)
        full = f"{theirs}.{parameter}" if theirs else parameter
        if full in checkpoint.infos:
            state[key] = checkpoint.tensor(full)
            left.pop(full, None)
        elif parameter not in COUNTERS:
            raise UsageError(f"{checkpoint.path}: has no {full!r}, which the model has; it is another model's")
        if key in state and state[key].shape != tensor.shape:
            raise UsageError(
                f"{checkpoint.path}: {key} is of shape {tuple(state[key].shape)}, and the model's of"
                f" {tuple(tensor.shape)}; it is another model's"
            )
    if strict and (unread := [name for name in left if name.rpartition(".")[2] not in COUNTERS]):
        raise UsageError(
            f"{checkpoint.path}: the model has no place for {unread[0]!r}, and all of its tensors are to be run; it is"
            " another model's"
        )
    model = model.to(next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32))
    load_tensors(model, state)
    return model.eval()


def _outputs(model: nn.Module, inputs: Inputs, checkpoint: Checkpoint) -> list[Tensor]:
    """Return the floating-point outputs of a network."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output: Any = model(*inputs)
    except Exception as error:  # the user's code
        raise UsageError(
            f"the model with the tensors of {checkpoint.path} doesn't run on inputs of shape {shapes_of(inputs)}:"
            f" {error_line(error)}"
        ) from None
    found = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise UsageError("the model gives no floating-point output to compare")
    return found


def _distance(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the largest difference; NaN where there is one on either side."""
    differences = [float((a - b).abs().max()) for a, b in zip(expected, got, strict=True) if a.numel()]
    return next((value for value in differences if value != value), max(differences, default=0.0))


@contextlib.contextmanager
def _rounded(model: nn.Module, dtypes: Mapping[str, torch.dtype], generator: torch.Generator) -> Iterator[None]:
    """Put every number of a model, for a while, as far off as rounding it to its dtype may put it."""
    state = tensors_of(model)
    kept = {name: tensor.clone() for name, tensor in state.items() if dtypes[name].is_floating_point}
    for name, tensor in kept.items():
        sides = torch.rand(tensor.shape, dtype=torch.float64, generator=generator) * 2 - 1
        state[name].data.copy_(tensor * (1 + torch.finfo(dtypes[name]).eps / 2 * sides))
    try:
        yield
    finally:
        for name, tensor in kept.items():
            state[name].data.copy_(tensor)
