"""--model on the command line: the one option behind which the user's own code is run."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from convtool.checkpoint import Checkpoint
    from convtool.cli.output import Reporter
    from convtool.core.fields import FieldSource
    from convtool.model.agreement import Agreement
    from convtool.model.plan import Plan


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


def plan_for(
    checkpoint: Checkpoint | None,
    spec: str,
    arguments: str | None,
    input_size: Sequence[int] | None,
    reporter: Reporter,
    *,
    fixed_size: bool,
    only_if_cheaper: bool,
    measure: bool,
) -> Plan:
    """The fusions of a model, by the names of the checkpoint and for what it holds, where there is one.

    Raises:
        UsageError: no input size, a model that cannot be built or doesn't run on it, or of another checkpoint.
        RefusedError: the model's data flow cannot be followed.
    """
    from convtool.model.plan import plan

    if input_size is None:
        raise UsageError("expected --input-size, the size of the model's input, such as 3,224,224")
    model = load(spec, arguments)
    found = None if checkpoint is None else agreement(model, spec, checkpoint, reporter)

    def is_biased(name: str) -> bool:
        assert checkpoint is not None
        assert found is not None
        bias = checkpoint.layer(found.names[name]).tensors.get("bias") if name in found.names else None
        return bias is None or bool(checkpoint.tensor(bias.name).count_nonzero())

    with contextlib.redirect_stdout(sys.stderr):
        made = plan(
            model,
            input_size,
            fixed_size=fixed_size,
            only_if_cheaper=only_if_cheaper,
            measure=measure,
            barred=None if found is None else found.unlike,
            is_biased=None if found is None else is_biased,
        )
    for line in made.remarks:
        reporter.remark(f"note: {line}")
    return made if found is None else made.renamed(found.names)
