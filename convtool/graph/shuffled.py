"""Channel shuffles that a model's code writes out: a view as groups, these and their channels turned, a view back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from convtool.graph.passing import VIEWS, new_order
from convtool.graph.recorded_run import Operation, Run

_COPIES = frozenset({"aten.contiguous.default", "aten.clone.default"})


def with_shuffles(run: Run) -> Run:
    """Return a run with one operation for each shuffle; of the others that it is made of, nothing is read any more."""
    readers = Counter(value for operation in run.operations for value in operation.reads)
    readers.update(run.outputs | run.kept)
    operations = list(run.operations)
    for number, last in enumerate(run.operations):
        inside = list(_made_by(run.operations, number, readers)) if last.name in VIEWS else []
        steps = [run.operations[one] for one in inside if run.operations[one].name not in _COPIES]
        groups = _groups(run.operations, steps) if len(steps) == 2 else 0
        if groups and last.shape == run.operations[steps[1].reads[0]].shape:
            operations[number] = replace(
                last, name="aten.channel_shuffle.default", reads=steps[1].reads, arguments={"groups": groups}
            )
            for one in inside:
                operations[one] = replace(run.operations[one], reads=())
    return replace(run, operations=operations)


def _made_by(operations: Sequence[Operation], number: int, readers: Counter[int]) -> Iterator[int]:
    """Yield the operations that a view is made by, back to another view; each is read by the next one alone."""
    while len(operations[number].reads) == 1:
        (number,) = operations[number].reads
        if readers[number] != 1 or len(operations[number].reads) != 1:
            return
        yield number
        if operations[number].name in VIEWS:
            return


def _groups(operations: Sequence[Operation], steps: Sequence[Operation]) -> int:
    """Return the groups of the shuffle that a turn of axes and a view before it are a part of; 0 where they aren't."""
    turn, view = steps
    whole, parts = operations[view.reads[0]].shape, view.shape
    order = new_order(turn.name, turn.arguments, len(parts)) if len(parts) > 2 else []
    grouped = view.name in VIEWS and len(whole) > 1 and parts[0] == whole[0] and parts[1] * parts[2] == whole[1]
    return parts[1] if grouped and order == [0, 2, 1, *range(3, len(parts))] else 0
