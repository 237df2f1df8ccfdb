"""Every layer of a model accounted for: those that no fusion has, each with one reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from convtool.graph.flow import Flow, LeftAlone, Step
from convtool.kinds.kind import Layer

ALONE = "nothing next to it could be one layer with it"
NEVER = "it doesn't run"
COMPUTED = "its weight is computed from others (parametrized)"
# Operations that a layer could do as well, were they not in the model's own code.
_LINEAR = frozenset({"add", "sub", "mul", "div", "pad", "chunk", "split", "slice", "flip", "roll", "index_select"})


def left_over(flow: Flow, layers: Iterable[Layer], said: Collection[str]) -> Iterator[LeftAlone]:
    """Yield the convolutions, linear layers and batch norms that nothing was said of yet, with the reason.

    Args:
        layers: of the model.
        said: names of layers that are fused, or left alone for a reason.
    """
    barred = flow.barred()
    steps = {layer.name: step for step, layer in flow.calls()}
    for layer in layers:
        if layer.name in said or not (layer.kind.main or layer.kind.spare):
            continue
        step = steps.get(layer.name)
        if layer.name in barred:
            yield LeftAlone((layer.name,), barred[layer.name])
        elif step is None:
            yield LeftAlone((layer.name,), NEVER)
        else:
            yield LeftAlone((layer.name,), _behind(flow, step) if layer.kind.spare else _in_code(flow, step))


def _in_code(flow: Flow, step: Step) -> str:
    """Return what of the model's own code stands before a layer, if that is linear: it goes on to do it."""
    before = flow.steps[step.reads[0]]
    what = _called(before)
    if before.written and before.layer is not None and before.layer.kind.code == "model":
        what = before.layer.name
    elif what not in _LINEAR or len(before.reads) != 1:
        return ALONE
    return f"what it reads is made by {what} in the model's own code, which goes on to do it"


def _behind(flow: Flow, step: Step) -> str:
    """Return what a layer stands behind that no layer in front of it could take it in through."""
    before = flow.steps[step.reads[0]]
    channels = step.channels
    while before.reads and (before.moves or before.written):
        ahead = [axis for axis, behind in before.moves.items() if behind == channels]
        if not ahead and not before.written:
            return f"a {_called(before)} that mixes channels with other axes stands between"
        channels = ahead[0] if ahead else channels
        before = flow.steps[before.reads[0]]
    if before.adds:
        return "what it reads is a sum that no layer makes alone"
    if not before.reads:
        return "what it reads is the model's input"
    what = _called(before)
    return f"what it reads is made by {what}" if what and before.layer is None else ALONE


def _called(step: Step) -> str:
    return step.about.removeprefix("aten.").partition(".")[0].rstrip("_")
