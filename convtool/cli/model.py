"""--model on the command line: the one option behind which the user's own code is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from convtool.checkpoint import Checkpoint
    from convtool.cli.output import Reporter
    from convtool.graph.judge import LayerRun
    from convtool.graph.planned import Plan
    from convtool.live.agreement import Agreement


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
    from convtool.live.load import load_model

    built = load_model(model, arguments)
    return built, _agreement(built, model, checkpoint, reporter)


def _agreement(model: nn.Module, spec: str, checkpoint: Checkpoint, reporter: Reporter) -> Agreement:
    """Hold the model against the checkpoint; what disagrees is remarked."""
    from convtool.live.agreement import agree

    found = agree(model, checkpoint, f"--model {spec}")
    found.check(model, spec)
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
    runs = layer_runs(built, input_size)
    return {agreed.names[name]: each for name, each in runs.items() if name in agreed.names}


def plan_for(checkpoint: Checkpoint | None, spec: str, arguments: str | None, how: Any, reporter: Reporter) -> Plan:
    """Return the fusions of a model, by the names of the checkpoint and for what it holds, where there is one.

    Args:
        how: options, with an input_size, fixed_size, everything and measure.

    Raises:
        UsageError: no input size, a model that cannot be built or doesn't run on it, or of another checkpoint.
        RefusedError: the model's data flow cannot be followed.
    """
    from convtool.live.load import load_model
    from convtool.live.plan import plan

    if how.input_size is None:
        raise UsageError("expected --input-size, the size of the model's input, such as 3,224,224")
    model = load_model(spec, arguments)
    found = None if checkpoint is None else _agreement(model, spec, checkpoint, reporter)
    with reporter.progress("following the model", None):
        made = plan(
            model,
            how.input_size,
            fixed_size=how.fixed_size,
            everything=how.everything,
            measure=how.measure,
            barred=None if found is None else found.unlike,
            is_biased=None if found is None else found.is_biased,
        )
    for line in made.remarks:
        reporter.remark(f"note: {line}")
    return made if found is None else made.renamed(found.names)
