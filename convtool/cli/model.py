"""--model on the command line: the one option behind which the user's own code is run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from convtool.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from convtool.checkpoint import Checkpoint
    from convtool.cli.output import Reporter
    from convtool.fusing.recipe import PlannedFusion
    from convtool.graph.flow import Flow
    from convtool.graph.judge import LayerRun
    from convtool.graph.planned import Plan
    from convtool.live.agreement import Agreement


def read_model(spec: str, arguments: str | None, checkpoint: Checkpoint, reporter: Reporter) -> Agreement:
    """Return what the model of --model says of a checkpoint's layers; what disagrees is remarked.

    Raises:
        UsageError: the model cannot be built, or has no layer in common with the checkpoint.
    """
    from convtool.live.agreement import agree
    from convtool.live.load import load_model

    found = agree(load_model(spec, arguments), checkpoint, f"--model {spec}")
    found.check(spec)
    reporter.remark(*(f"model and checkpoint compared: {line}" for line in found.differences))
    return found


def runs_of_layers(
    found: Agreement | None, model_input: Sequence[str] | None
) -> Mapping[str, Sequence[LayerRun]] | None:
    """Return what each layer reads and gives while the model runs once, by the checkpoint's names; None without input.

    Raises:
        UsageError: an input and no model.
    """
    if not model_input:
        return None
    flow, agreed = _run_of(found, model_input)
    from convtool.graph.judge import Judge

    runs = Judge(flow, agreed.is_biased).runs()
    return {agreed.names[name]: each for name, each in runs.items() if name in agreed.names}


def _run_of(found: Agreement | None, model_input: Sequence[str]) -> tuple[Flow, Agreement]:
    """Return a run of the model on an input, and what the model says; raise UsageError without a model."""
    if found is None:
        raise UsageError("--model-input: goes with --model")
    from convtool.live.given import model_inputs
    from convtool.live.trace import trace

    return trace(found.model, model_inputs(found.model, model_input))[0], found


def check_chains(
    chains: Iterable[Sequence[str]],
    opened: Checkpoint,
    found: Agreement | None,
    model_input: Sequence[str] | None,
) -> None:
    """Raise RefusedError where a run has something between layers that a chain names one after the other.

    Args:
        chains: by the checkpoint's names.
        found: the model, which is run where there is an input; else what the file describes is looked at, if it does.
    """
    flow, ours = _flow(opened, found, model_input)
    if flow is None:
        return
    from convtool.graph.between import contradiction

    for chain in chains:
        if against := contradiction(flow, [ours.get(name, name) for name in chain]):
            raise RefusedError(
                f"the model's run is against {' → '.join(chain)}: {against}; fuse layers with nothing in between"
            )


def _flow(
    opened: Checkpoint, found: Agreement | None, model_input: Sequence[str] | None
) -> tuple[Flow | None, Mapping[str, str]]:
    """Return what is known of the network's run, and its names by those of the checkpoint."""
    if model_input:
        flow, agreed = _run_of(found, model_input)
        return flow, {theirs: name for name, theirs in agreed.names.items()}
    if opened.program is not None:
        from convtool.graph.exported import read_exported

        with contextlib.suppress(UsageError):  # of an input without a batch: a run that can't be followed says nothing
            return read_exported(opened, opened.program), {}
    return None, {}


def plan_for(
    checkpoint: Checkpoint | None, given: Any, model_input: Sequence[str] | None, reporter: Reporter, **wanted: bool
) -> Plan:
    """Return the fusions of a model, by the names of the checkpoint and for what it holds, where there is one.

    Args:
        given: options, with a model and its model_args; no model where the checkpoint says what its data flow is.
        wanted: some of fixed_size, everything, batch_norms_only and measure.

    Raises:
        UsageError: no input, a model that cannot be built or doesn't run on it, or of another checkpoint.
        RefusedError: the model's data flow cannot be followed.
    """
    from convtool.live.given import model_inputs
    from convtool.live.load import load_model
    from convtool.live.plan import plan

    spec, arguments = given.model, given.model_args
    if spec is None:
        return _plan_of_file(checkpoint, model_input, **wanted)
    if not model_input:
        raise UsageError("expected --model-input, the size of the model's input, such as 3,224,224")
    found = None if checkpoint is None else read_model(spec, arguments, checkpoint, reporter)
    model = load_model(spec, arguments) if found is None else found.model
    with reporter.progress("following the model", None):
        made = plan(
            model,
            None,
            inputs=model_inputs(model, model_input),
            barred=None if found is None else found.unlike,
            is_biased=None if found is None else found.is_biased,
            **wanted,
        )
    reporter.remark(*(f"note: {line}" for line in made.remarks))
    return made if found is None else made.renamed(found.names, unfused=found.was_fused)


def planned_fusions(plan: Plan) -> list[PlannedFusion]:
    """Return the fusions of a plan, by name."""
    from convtool.fusing.recipe import PlannedFusion

    return [PlannedFusion(one.name, one.tree, one.only_size) for one in plan.fusions]


def _plan_of_file(
    checkpoint: Checkpoint | None, model_input: Sequence[str] | None, measure: bool = False, **wanted: bool
) -> Plan:
    """Return the fusions of a network whose checkpoint describes it."""
    from convtool.graph.exported import plan_exported

    if checkpoint is None:
        raise UsageError(
            "expected --model, the code that builds the model: pkg.mod:callable or file.py:callable; or a .pt2 file"
        )
    if checkpoint.program is not None and (measure or model_input):
        raise UsageError(f"{'--measure' if measure else '--model-input'}: goes with --model")
    return plan_exported(checkpoint, **wanted)
