"""Which layers of two checkpoints are run against each other, on inputs of which sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from convtool.checkpoint import Checkpoint
from convtool.core.expression import Expression, in_channels
from convtool.core.names import some_of
from convtool.core.sizes import alike_size, default_sizes, split_input_size
from convtool.core.stored import Stored
from convtool.core.tree import BASE, Tree, leaves, map_leaves
from convtool.core.verify import EquivalenceReport, verify
from convtool.errors import InputError, UsageError
from convtool.formats.dtypes import FLOATS
from convtool.fusing.compare import Pairing
from convtool.fusing.proof import exact_tree, stored_tree


@dataclass(frozen=True, slots=True)
class Trial:
    """A pairing at one input size.

    Attributes:
        before, after: the layers' numbers; those of AFTER with what storing them can have moved them by.
        size: spatial sizes of the input.
    """

    pairing: Pairing
    before: Expression
    after: Tree[Stored]
    size: tuple[int, ...]

    def run(self, **options: Any) -> EquivalenceReport:
        """Return what `convtool.core.verify.verify` finds; `options` are its own."""
        between = [_dtype(name, self.pairing) for name in self.pairing.dtypes]
        return verify(self.before, self.after, self.size, stored_between=between, **options)


def explanations(trials: Iterable[tuple[Trial, EquivalenceReport]], options: dict[str, Any]) -> tuple[str, ...]:
    """Say in which precision AFTER may have been computed, where it differs by no more than that explains.

    Args:
        options: as of `Trial.run`; the precision in them is replaced.
    """
    found: dict[str, list[tuple[str, float, float]]] = {}
    for trial, report in trials:
        for dtype in () if report.equivalent or report.mismatch else _lower(report.dtype):
            with contextlib.suppress(UsageError):  # sums so long that it bounds nothing
                again = trial.run(**{**options, "computed_in": getattr(torch, dtype)})
                if again.equivalent:
                    found.setdefault(dtype, []).append((trial.pairing.name, report.ratio, again.ratio))
                    break
    return tuple(
        f"{some_of(list(dict.fromkeys(name for name, _, _ in each)))}: error/bound up to"
        f" {max(ratio for _, ratio, _ in each):.3g} is beyond what storing can do; computing in {dtype} explains it"
        f" (error/bound {max(ratio for _, _, ratio in each):.2g}): --computed-in {dtype}, if AFTER was made so"
        for dtype, each in found.items()
    )


def _lower(stored: str) -> list[str]:
    """Return the precisions in which what is stored in a dtype may have been computed, the higher first."""
    return ["float32", *([stored] if stored in ("float16", "bfloat16") else ())]


def _dtype(name: str, pairing: Pairing) -> torch.dtype:
    """Return what a record says that a layer was stored in."""
    if name not in FLOATS | {"complex64", "complex128"}:
        raise InputError(
            f"{pairing.path}: its convtool record is damaged: a part of {pairing.name} was stored in {name!r}"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def trials(
    pairing: Pairing, before: Mapping[str, Checkpoint], after: Checkpoint, sizes: Sequence[tuple[int, ...]]
) -> Iterator[Trial]:
    """Yield a pairing at each size; where none is given, at the one that it was fused for or those that show most.

    Args:
        before: by the origin that the layers name.
        sizes: of the input, with or without the channels in front.

    Raises:
        UsageError: a size doesn't fit the layers.
        InputError: they were fused for sizes that don't go together.
    """
    chain = exact_tree(pairing.before, before)
    fused = stored_tree(pairing.after, {BASE: after})
    axes = next(leaves(chain)).spatial_axes
    chosen = [split_input_size(size, in_channels(chain), axes) for size in sizes]
    if not chosen:
        fixed = pairing.input_size()
        kept = map_leaves(lambda leaf: leaf.conv, fused)
        chosen = default_sizes(chain, kept) if fixed is None else [alike_size((chain, kept), fixed)]
    for size in chosen:
        yield Trial(pairing, chain, fused, size)
