"""Fusions put into the model for a moment, to see whether its code runs with them: shapes alone, nothing computed.

A forward that reshapes to a fixed number of channels, or that can't do without a scale, shows here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

from torch import nn

from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.tree import Tree, leaves
from convtool.errors import ConvtoolError
from convtool.graph.recorded_run import INPUT
from convtool.live.apply import Applying
from convtool.live.modules import Zeros
from convtool.live.recorder import Recorded, record
from convtool.live.trace import error_line, nowhere

Fused: TypeAlias = tuple[str, Tree[SourceLayer], Conv]  # a layer's name, what it stands for, and the layer


class Rehearsal:
    """A model whose code has to do the same with fusions.

    It does the same where it runs the operations that it ran before with the same arguments, but for those of the fused
    layers, and gives outputs of the same shapes. Code that looks at what kind of module it calls may not.

    Args:
        before: the run without them.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], before: Recorded, fusions: Sequence[Fused]) -> None:
        self.model, self.inputs, self.before, self.fusions = model, inputs, before, fusions
        self.names = {source.name for _, tree, _ in fusions for source in leaves(tree)}
        # A scale is named by the module that holds it, which may hold all else as well.
        modules = dict(model.named_modules(remove_duplicate=False))
        self.whole = {name for name in self.names if name in modules and not list(modules[name].children())}

    def failing(self, chosen: Sequence[int]) -> dict[int, str]:
        """Return those of the fusions, by number, that it doesn't do the same with, and why; by halves, as most do."""
        reason = self._wrong(chosen) if chosen else ""
        if not reason or len(chosen) == 1:
            return dict.fromkeys(chosen, reason) if reason else {}
        middle = len(chosen) // 2
        found = self.failing(chosen[:middle]) | self.failing(chosen[middle:])
        left = [number for number in chosen if number not in found]
        reason = self._wrong(left) if left else ""
        return found | dict.fromkeys(left if reason else (), f"of all fusions together: {reason}")

    def _wrong(self, chosen: Sequence[int]) -> str:
        """Return what is otherwise with some of the fusions, in words; '' where nothing is."""
        try:
            with nowhere(self.model) as (mode, kept):
                # What the layers are is known; only their places count here.
                applying = Applying(self.model, check=False, making=mode)
                for number in chosen:
                    applying.put(*self.fusions[number])
                self.model.eval()
                zeros = {name for name, module in self.model.named_modules() if isinstance(module, Zeros)}
                after = record(self.model, self.inputs, (), mode, kept, held=False)
                applying.undo()
        except ConvtoolError as error:
            return str(error)
        if after.failure is not None and type(after.failure) is not type(self.before.failure):
            return f"the model's code doesn't run without the layers: {error_line(after.failure)}"
        if after.shapes != self.before.shapes:
            return "the model's code gives outputs of another shape without the layers"
        same = self._told(after, zeros) == self._told(self.before)
        return "" if same else "the model's code does something else without the layers"

    def _told(self, recorded: Recorded, zeros: Collection[str] = ()) -> list[str]:
        """Return the operations of a run that aren't those of the layers, or of what gives zeros in their place."""
        silent = self.whole.union(zeros)
        return [
            f"{one.name} {one.arguments}"
            for one in recorded.run.operations
            if one.name != INPUT
            and silent.isdisjoint(name for name, _ in one.within)
            and self.names.isdisjoint(name.rpartition(".")[0] for name in one.tensors)
        ]
