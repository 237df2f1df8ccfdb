"""--model on the command line: the one option behind which the user's own code is run."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from convtool.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from convtool.checkpoint import Checkpoint
    from convtool.cli.output import Reporter
    from convtool.core.fields import FieldSource
    from convtool.model.agreement import Agreement


def load(model: str, arguments: str | None) -> nn.Module:
    """The model of --model; what its code prints goes to stderr, so that stdout holds results alone."""
    from convtool.model.load import load_model

    with contextlib.redirect_stdout(sys.stderr):
        return load_model(model, arguments)


def model_fields(
    model: str | None, arguments: str | None, checkpoint: Checkpoint, reporter: Reporter
) -> FieldSource | None:
    """The geometry that --model tells of a checkpoint's layers, or None without it; what disagrees is remarked.

    Raises:
        UsageError: the model cannot be built, or has no layer in common with the checkpoint.
    """
    if model is None:
        if arguments is not None:
            raise UsageError("--model-args: goes with --model")
        return None
    return agreement(load(model, arguments), model, checkpoint, reporter).geometry


def agreement(model: nn.Module, spec: str, checkpoint: Checkpoint, reporter: Reporter) -> Agreement:
    """The model held against the checkpoint; what disagrees is remarked.

    Raises:
        UsageError: they have no layer in common.
    """
    from convtool.model.agreement import agree

    found = agree(model, checkpoint, f"--model {spec}")
    if not found.names:
        ours = ", ".join(name for name, _ in list(model.named_parameters())[:2])
        theirs = ", ".join(list(checkpoint.infos)[:2])
        raise UsageError(
            f"--model: {spec} and {checkpoint.path} have no layer in common: the model has {ours or 'no tensors'}, ...,"
            f" the checkpoint {theirs or 'none'}, ..."
        )
    for line in found.differences:
        reporter.remark(f"model and checkpoint disagree: {line}")
    return found
