"""`convtool verify`: do two checkpoints, or a layer and its matrix, or two matrices compute the same?"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convtool.cli import exit_codes, matrix_verdict, verify_text
from convtool.cli.command import Command
from convtool.cli.document import fill
from convtool.cli.output import Reporter
from convtool.cli.verify_options import Options
from convtool.core.names import grouped
from convtool.core.tree import BASE
from convtool.errors import InputError, RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from convtool.checkpoint import Checkpoint
    from convtool.fusing.compare import Pairing
    from convtool.fusing.proof import Explained, Results
    from convtool.kinds.stated import FieldSources
    from convtool.live.whole import WholeReport

EXAMPLES = """
convtool verify resnet.safetensors fused.safetensors --input-size 64,56,56
convtool verify net.safetensors fused.safetensors --exhaustive --json
# fused by another program, which left no record
convtool verify net.pt other.pt --before conv1,bn1 --after conv1 --input-size 32,32 --set conv1.padding=1
# a layer and the matrix that `convtool toeplitz` wrote, which says what it is of
convtool verify net.safetensors conv1.npz
"""


def run(options: Options, reporter: Reporter) -> verify_text.Result | matrix_verdict.MatrixResult:
    """Prove or disprove that AFTER computes the same as BEFORE, apart from the rounding that storing brings.

    The record that convtool left in AFTER says what was fused. Every fused layer is compared with the layers that it
    stands for, and every other tensor has to be the same bit for bit. A matrix is compared with its layer entry by
    entry. Exit code 0: equivalent, 1: not equivalent.

    There is no tolerance to choose: each number is compared with a bound that follows from the weights, the input and
    the dtype. The largest error is printed as a share of its bound; up to 100% passes.
    """
    import torch

    from convtool.matrix.read import is_matrix_file

    with_matrix = is_matrix_file(options.after) or is_matrix_file(options.before)
    options.check(with_matrix)
    how = {name: getattr(options, name) for name in ("trials", "seed")}
    how["computed_in"] = getattr(torch, options.computed_in or "float64")
    if not with_matrix:
        return _verify_checkpoints(options, how, reporter)
    named = next(map(split_names, options.before_layers or ()), None)
    return matrix_verdict.verify_matrices(options, how, named, reporter)


def _verify_checkpoints(options: Options, how: dict[str, Any], reporter: Reporter) -> verify_text.Result:
    """Return the verdict on two checkpoints."""
    from convtool.fusing import proof as verdict

    sides, sized = _open(options, reporter), bool(options.input_size)
    pairings = _pairings(sides)
    tensors = None if options.only else _compare_tensors(sides, pairings)
    assumed = verdict.assumed(pairings)
    reporter.note(*(f"assumed: {text}" for text in assumed))
    how |= {name: getattr(options, name) for name in ("exhaustive", "rtol", "atol", "device")}
    results, explained = _run(sides, pairings, how)
    if not results and not sides.before.infos:
        raise UsageError("there is nothing to compare: no fusion and no tensor")
    reporter.remark(*verdict.hints(results, sized, options.computed_in is not None))
    whole = _whole_model(sides)
    claimed = verdict.claims(results, run=whole is not None and whole.equal)
    differing = set(() if tensors is None else tensors.differing.values())
    covered = {"changed", "missing", "new"} if options.model_after is not None else set()
    elsewhere = differing <= covered and (whole is None or whole.equal)
    return fill(
        verify_text.Result,
        options,
        equivalent=elsewhere and all(report.equivalent for _, report in results),
        statement=verdict.statement(results, options.exhaustive, sized, options.only)
        + ("; what no pair covers, by random inputs" if differing & covered else "")
        + (f"; held to what computing in {options.computed_in} allows" if options.computed_in else ""),
        computed_in=options.computed_in or "float64",
        assumed=assumed,
        claims=tuple(grouped(claimed)),
        claimed=claimed,
        explained=explained.said,
        unless=explained.dtype if elsewhere and explained.all else "",
        way_out=_way_out(sides, results, explained, differing),
        input_sizes="given" if sized else "chosen",
        fusions=tuple(verify_text.Report.of(*result) for result in results),
        other_tensors=tensors,
        whole_model=whole,
    )


def _way_out(sides: _Sides, results: Results, explained: Explained, differing: set[str]) -> tuple[str, str]:
    """Return when more options would make the verdict another one, and those options; ('', '') where none would."""
    from convtool.fusing.unrecorded import in_lower_precision, new_floats

    options = sides.options
    if explained.dtype:
        return f"if AFTER was computed in {explained.dtype}", f"--computed-in {explained.dtype}"
    if differing and options.rounded_to is None and len(new := new_floats(sides.before, sides.after)) == 1:
        return "if AFTER's tensors were rounded once", f"--rounded-to {new.pop()}"
    if sides.after.record is not None or options.recipe or options.model_input or options.before_layers:
        return "", ""
    lower = "" if options.computed_in else in_lower_precision(sides.after)
    if sides.others and not options.strength and not all(report.equivalent for _, report in results):
        return "if the strength wasn't 1", f"--strength X{lower}"
    if not sides.others and differing:
        return "if adapters were merged", f"--with NAME=FILE --strength X{lower}"
    return "", ""


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both checkpoints, and those that other layers of BEFORE's fusions came from; and the fields of their layers.

    Attributes:
        options, reporter: of the run that compares them.
    """

    options: Options
    reporter: Reporter
    before: Checkpoint
    after: Checkpoint
    others: Mapping[str, Checkpoint]
    fields: tuple[FieldSources, FieldSources]

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """BEFORE, and where else its fusions' layers came from, by what their names say."""
        return {BASE: self.before, **self.others}


def _open(options: Options, reporter: Reporter) -> _Sides:
    sources = options.sources
    before, after = sources.open(options.before, reporter), sources.open(options.after, reporter, second=True)
    for opened in () if options.only else (before, after):
        if opened.unknown_record:
            raise InputError(opened.unknown_record)
    others = sources.open_others(options.others, reporter)
    known = [name for opened in (before, after, *others.values()) for name in opened.layers]
    fields = sources.of_both(sources.read_model(before, reporter), known)
    return _Sides(options, reporter, before, after, others, fields)


def _pairings(sides: _Sides) -> list[Pairing]:
    """Return the chains of --before and --after, the fusions of --recipe, and those of other layers that AFTER records.

    Without a record, they are those of the model.
    """
    from convtool.fusing.compare import named_pairing
    from convtool.fusing.recorded import recorded_pairings
    from convtool.fusing.unrecorded import check_recorded

    options = sides.options
    chains = zip(options.before_layers or (), options.after_layers or (), strict=True)
    named = [named_pairing(sides.before, sides.after, split_names(a), split_names(b), sides.fields) for a, b in chains]
    named += _claimed(sides, named)
    if options.only or (sides.after.record is None and (named or options.recipe or options.model_input)):
        return named
    check_recorded(sides.before, sides.after, sides.fields[0], options.sources.model is not None)
    recorded = recorded_pairings(sides.before, sides.after, sides.fields[0], sides.others, named)
    if not (named or recorded):
        sides.reporter.remark("AFTER records no fusion that BEFORE lacks; only their tensors were compared")
    return named + recorded


def _claimed(sides: _Sides, named: list[Pairing]) -> list[Pairing]:
    """Return what --recipe says that another program fused; without a record, what the model or adapters say."""
    from convtool.cli.model import plan_for, planned_fusions
    from convtool.fusing.adapters import adapted
    from convtool.fusing.named import by_name, chosen, in_order
    from convtool.fusing.recorded import claimed_pairings, not_named

    options, reporter, checkpoints, fields = sides.options, sides.reporter, sides.checkpoints, sides.fields[0]
    adapters = (options.strength or (), options.leave or ())
    if options.recipe is not None:
        recipe, which = chosen(options.recipe, checkpoints, fields)
        if which:
            reporter.note(f"recipe: {which}")
        fusions, fields = by_name(recipe, checkpoints, fields, adapters[1], in_order(sides.before, None))
        origin = f"--recipe {options.recipe}"
    elif sides.after.record is not None and any(adapters):
        raise UsageError("--strength and --leave: AFTER records what was merged, and how much; leave them out")
    elif options.model_input is not None and sides.after.record is None:
        plan = plan_for(sides.before, options.sources, options.model_input, reporter, everything=True)
        fields, origin = fields.with_first(plan.geometry), f"--model {options.sources.model}"
        fusions = planned_fusions(plan)
    elif sides.others and sides.after.record is None and not named:
        fusions, fields = adapted(checkpoints, fields, *adapters)
        origin = "--with"
    else:
        return []
    covered = options.model_after is not None
    return claimed_pairings(checkpoints, sides.after, not_named(fusions, named), fields, origin, skip=covered)


def split_names(text: str) -> list[str]:
    """Return 'conv,flatten(7,7),head' as ['conv', 'flatten(7,7)', 'head']: cut at commas, not those in parentheses."""
    names, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names]


def _compare_tensors(sides: _Sides, pairings: list[Pairing]) -> verify_text.OtherTensors:
    """Return what became of every tensor that went into no fusion."""
    from convtool.fusing.compare import differing_tensors, unfitting, untouched

    kept = untouched(sides.before, pairings)
    rounded_to = sides.options.rounded_to or ""
    with sides.reporter.progress("comparing tensors", sum(info.nbytes for info in kept)) as advance:
        differing = differing_tensors(sides.before, sides.after, pairings, advance, rounded_to)
    differing = unfitting(pairings, sides.checkpoints, sides.after, rounded_to) | differing
    return verify_text.OtherTensors(len(kept), differing, sides.options.model_after is not None)


def _run(sides: _Sides, pairings: list[Pairing], how: dict[str, Any]) -> tuple[Results, Explained]:
    """Run every pairing at every input size; return what lower precision would explain of what differs as well."""
    from convtool.fusing.proof import Explained, explanations, trials

    options, sizes = sides.options, sides.options.input_size or []
    runs = [trial for pairing in pairings for trial in trials(pairing, sides.checkpoints, sides.after, sizes)]
    with sides.reporter.progress("verifying", len(runs), "share") as advance:
        reports = [trial.run(progress=advance, **how) for trial in runs]
    given = {options.rtol, options.atol, options.computed_in} != {None}
    results = [(trial.pairing, report) for trial, report in zip(runs, reports, strict=True)]
    return results, Explained() if given else explanations(zip(runs, reports, strict=True), how)


def _second(original: nn.Module, sides: _Sides) -> nn.Module:
    """Return another model like BEFORE's: a copy, or where it can't be copied, one that is built by the same code."""
    from convtool.live.load import load_model
    from convtool.live.whole import loaded

    sources = sides.options.sources
    try:
        return deepcopy(original)
    except Exception as error:  # such as of a model that keeps a tensor which it computed, or a lock
        again = loaded(load_model(sources.model or "", sources.model_args, in_memory=True), sides.before)
        if again is original:
            raise UsageError(
                f"--model: {sources.model} is one model that can't be copied ({error!s:.100}), and two are compared; "
                "name a function that builds it"
            ) from None
        return again


def _whole_model(sides: _Sides) -> WholeReport | None:
    """Return how both networks' outputs compare; None where nobody asked for it, or nothing says what AFTER's is."""
    from convtool.live.apply import apply_checkpoint
    from convtool.live.load import load_model
    from convtool.live.whole import compare, loaded

    options, reporter = sides.options, sides.reporter
    model, arguments, size = options.sources.model, options.sources.model_args, options.model_input
    if model is None or size is None:
        return None
    if options.model_after is None and sides.after.record is None:
        reporter.note(
            "the whole model was not run: AFTER holds no record; --model-after CODE builds and runs its network"
        )
        return None
    with reporter.progress("running the model", None):
        in_code = options.model_after is not None
        original = loaded(load_model(model, arguments, in_memory=True), sides.before, strict=in_code)
        try:
            if in_code:
                built = load_model(options.model_after or "", options.model_after_args, in_memory=True)
                fused = loaded(built, sides.after, strict=True)
            else:
                fused = apply_checkpoint(_second(original, sides), sides.after)
            return compare(original, sides.before, fused, sides.after, size, seed=options.seed)
        except (RefusedError, UsageError) as error:
            if str(sides.before.path) in str(error) or options.model_after_args is not None:
                raise
            way = (
                "--model-after-args has arguments for it" if in_code else "AFTER's own code goes by --model-after CODE"
            )
            raise type(error)(f"{error}; {way}") from None


COMMAND = Command(
    *("BEFORE AFTER", EXAMPLES, Options, run, verify_text.show),
    exit_code=lambda result: exit_codes.OK if result.equivalent else exit_codes.NOT_EQUIVALENT,
)
