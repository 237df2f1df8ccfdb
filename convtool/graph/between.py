"""What a run of a model has between layers that a chain names one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from convtool.graph.flow import Flow, Step


def contradiction(flow: Flow, chain: Sequence[str]) -> str:
    """Return where a run contradicts a chain, in words; '' where each layer reads what the one before it gives.

    Args:
        chain: names of layers with tensors, and whatever is written between them, for which the run has layers without.
    """
    places = {layer.name: flow.steps.index(step) for step, layer in reversed(list(flow.calls()))}
    readers = Counter(number for step in flow.steps for number in step.reads)
    readers.update(flow.outputs)
    known = [number for number, name in enumerate(chain) if name in places]
    for one, other in pairwise(known):
        first, second = chain[one], chain[other]
        stands, came_to = _between(flow, places[first], places[second], written=other > one + 1)
        if not came_to:
            return f"{second} reads nothing that {first} gives"
        if stands:
            return f"between {first} and {second} it has {', '.join(stands)}"
        if readers[places[first]] > 1:
            return f"what {first} gives is read {readers[places[first]]} times"
    return ""


def _between(flow: Flow, first: int, second: int, *, written: bool) -> tuple[list[str], bool]:
    """Return what stands between two steps, the way back from the second, and whether the first was come to."""
    stands: list[str] = []
    ahead, seen = list(flow.steps[second].reads), set[int]()
    while ahead:
        number = ahead.pop(0)
        if number == first:
            return stands[::-1], True
        step = flow.steps[number]
        if number in seen or number < first:
            continue
        seen.add(number)
        ahead = [*ahead, *step.reads]
        free = written and bool(step.stacks)
        free |= step.layer is not None and (step.layer.kind.neutral or (written and step.written))
        # What channels go through whole (a flatten of the other axes) is no contradiction: a plan fuses across it too.
        stands += [] if free or step.moves else [_name(step)]
    return stands[::-1], False


def _name(step: Step) -> str:
    if step.layer is not None:
        return step.layer.name
    return "an addition" if step.adds else step.about or "another operation"
