"""--model on the command line: the one option behind which the user's own code is run."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from convtool.checkpoint import Checkpoint
    from convtool.cli.output import Reporter
    from convtool.graph.judge import LayerRun
    from convtool.graph.planned import Plan
    from convtool.live.agreement import Agreement
    from convtool.live.whole import WholeReport


def load(model: str, arguments: str | None, *, in_memory: bool = False) -> nn.Module:
    """Return the model of --model; what its code prints goes to stderr, so that stdout holds results alone."""
    from convtool.live.load import load_model

    with contextlib.redirect_stdout(sys.stderr):
        return load_model(model, arguments, in_memory=in_memory)


def read_model(
    model: str | None, arguments: str | None, checkpoint: Checkpoint, reporter: Reporter
) -> tuple[nn.Module, Agreement] | None:
    """Return the model of --model and what it says of a checkpoint's layers, or None without it.

    Raises:
        UsageError: the model cannot be built, or has no layer in common with the checkpoint.
    """
    if model is None:
        if arguments is not None:
            raise UsageError("--model-args: goes with --model")
        return None
    built = load(model, arguments)
    return built, agreement(built, model, checkpoint, reporter)


def agreement(model: nn.Module, spec: str, checkpoint: Checkpoint, reporter: Reporter) -> Agreement:
    """Hold the model against the checkpoint; what disagrees is remarked.

    Raises:
        UsageError: they have no layer in common.
    """
    from convtool.live.agreement import agree

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


def runs_of_layers(
    found: tuple[nn.Module, Agreement] | None, input_size: Sequence[int] | None
) -> Mapping[str, Sequence[LayerRun]] | None:
    """Return what each layer reads and gives while the model runs once, by the checkpoint's names; None without a size.

    Raises:
        UsageError: a size and no model.
    """
    if input_size is None:
        return None
    if found is None:
        raise UsageError("--input-size: is the size of the model's input, and goes with --model")
    from convtool.live.plan import layer_runs

    built, agreed = found
    with contextlib.redirect_stdout(sys.stderr):
        runs = layer_runs(built, input_size)
    return {agreed.names[name]: each for name, each in runs.items() if name in agreed.names}


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
    """Return the fusions of a model, by the names of the checkpoint and for what it holds, where there is one.

    Raises:
        UsageError: no input size, a model that cannot be built or doesn't run on it, or of another checkpoint.
        RefusedError: the model's data flow cannot be followed.
    """
    from convtool.live.plan import plan

    if input_size is None:
        raise UsageError("expected --input-size, the size of the model's input, such as 3,224,224")
    model = load(spec, arguments)
    found = None if checkpoint is None else agreement(model, spec, checkpoint, reporter)

    def is_biased(name: str) -> bool:
        assert checkpoint is not None
        assert found is not None
        bias = checkpoint.layer(found.names[name]).tensors.get("bias") if name in found.names else None
        return bias is None or bool(checkpoint.tensor(bias.name).count_nonzero())

    with reporter.progress("following the model", None), contextlib.redirect_stdout(sys.stderr):
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


def whole_model(
    model: str,
    arguments: str | None,
    input_size: Sequence[int],
    before: Checkpoint,
    after: Checkpoint,
    seed: int,
    reporter: Reporter,
) -> WholeReport:
    """Hold both networks' outputs against each other.

    Raises:
        UsageError: an input size on which the model doesn't run.
    """
    from convtool.live.whole import compare_whole

    with reporter.progress("running the model", None), contextlib.redirect_stdout(sys.stderr):
        return compare_whole(lambda: load(model, arguments, in_memory=True), before, after, input_size, seed=seed)
