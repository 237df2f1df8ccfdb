"""`convtool spectrum` of a pattern, or of a whole network: a row for each layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli import shared
from convtool.cli.document import Count, LayerKind, Sizes
from convtool.cli.output import Reporter, table, times
from convtool.core.tree import BASE, LayerRef, leaves
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint
    from convtool.core.conv import Conv
    from convtool.core.singular import SingularValue
    from convtool.fusing.leaf import LoweredLayer
    from convtool.kinds.stated import FieldSources
    from convtool.live.agreement import Agreement
    from convtool.live.sequence import Sequenced

BETWEEN = "nothing in between that may make differences larger"


@dataclass(frozen=True, slots=True)
class Row:
    """Both ends of the spectrum of one layer at one input size.

    Attributes:
        runs: how often the network runs it at that size; 1 without --model.
        input_size: channels first.
        shape: of its matrix.
        smallest: null with --largest.
    """

    layer: str
    kind: LayerKind
    runs: Count
    input_size: Sizes
    shape: Sizes
    largest: SingularValue
    smallest: SingularValue | None


@dataclass(frozen=True, slots=True)
class TableResult:
    """The layers of a pattern or of a network.

    Attributes:
        product: what the largest are at most, multiplied: what the network lengthens a difference of two inputs by at
            most. Null where that is no such bound.
        no_product: why there is none; null where there is one.
    """

    source: Path
    rows: tuple[Row, ...]
    product: float | None
    no_product: str | None
    tolerance: float
    assumed: tuple[str, ...]


def is_pattern(name: str, layers: Mapping[str, Any]) -> bool:
    """Return whether a name is a pattern for names, and not a layer's own."""
    return name not in layers and any(sign in name for sign in "*?[")


def run_table(options: Any, sources: shared.Sources, opened: Checkpoint, reporter: Reporter) -> TableResult:
    """Find both ends of each layer that the pattern fits, and with --model of how the network runs them."""
    from convtool.core.spectrum import spectrum
    from convtool.fusing.leaf import said_of
    from convtool.fusing.settle import settle_alone

    wanted = options.wanted
    names = [name for name, layer in opened.layers.items() if layer.kind.tensors and fnmatchcase(name, wanted.layer)]
    if not names:
        raise UsageError(f"{wanted.checkpoint}: no layer that has a matrix matches {wanted.layer!r}")
    if wanted.fields or options.more or options.count is not None or options.vectors is not None:
        raise UsageError("--stride and the like, --count, --vectors and further layers don't go with a pattern")
    found = sources.read_model(opened, reporter)
    fields = sources.fields(found, opened.layers)
    network = None if found is None else _sequence(found, options.model_input)
    at = _at_sizes(names, wanted.input_size, network)
    found_layers = [_lowered(opened, name, fields, size, network is not None) for name, size in at]
    layers = settle_alone(found_layers, {BASE: opened}, fields.assume)
    rows = []
    with reporter.progress("computing singular values", len(at)) as advance:
        for ((name, size), runs), leaf in zip(at.items(), layers, strict=True):
            conv = leaf.conv
            ends = spectrum(conv, _spatial(conv, size), **options.how)
            inputs = conv.in_channels, *_spatial(conv, size)
            kind = opened.layers[name].kind.name
            rows.append(Row(name, kind, runs, inputs, ends.shape, ends.largest, ends.smallest))
            advance(1)
    reporter.note(*said_of(layers))
    product, why = _product(rows, network, set(names))
    kept = tuple(dict.fromkeys(f"{name}: {what}" for leaf in layers for name, what in leaf.assumptions()))
    return TableResult(wanted.checkpoint, tuple(rows), product, why or None, options.tolerance, kept)


def _sequence(found: Agreement, input_size: Sequence[int] | None) -> Sequenced:
    """Return how the model runs its layers, by the checkpoint's names."""
    from convtool.live.sequence import Sequenced, sequence_of

    if input_size is None:
        raise UsageError("--model: of a network, --model-input says the size of its input, such as 3,224,224")
    made = sequence_of(found.model, input_size)
    strange = [call.name for call in made.calls if not call.written and call.name not in found.names]
    known = tuple(call._replace(name=found.names.get(call.name, call.name)) for call in made.calls)
    return Sequenced(known, made.broken or (f"{strange[0]} isn't in the checkpoint" if strange else ""))


def _at_sizes(
    names: Sequence[str], size: Sequence[int] | None, network: Sequenced | None
) -> dict[tuple[str, tuple[int, ...]], int]:
    """Return the layers with the sizes of their inputs, and how often each runs."""
    if network is None:
        if size is None:
            raise UsageError(
                "spectrum needs --input-size, the size of each layer's input, or the network's --model-input"
            )
        return {(name, tuple(size)): 1 for name in names}
    if size is not None:
        raise UsageError("--input-size: with --model, --model-input says the size of the network's input")
    counts = Counter((one.name, one.input_size) for one in network.calls if one.name in names and not one.written)
    if not counts:
        raise UsageError("--model: the network runs none of these layers")
    return counts


def _lowered(
    opened: Checkpoint, name: str, fields: FieldSources, size: tuple[int, ...], channels: bool
) -> LoweredLayer:
    """Return a layer with what is known of its fields.

    Args:
        channels: whether the size has them in front, where the layer doesn't tell its axes.
    """
    from convtool.fusing.lowering import lower_tree

    layer = opened.layers[name]
    axes = layer.axes()
    if axes is None:
        axes = 0 if layer.kind.channels_last else len(size) - channels
    known = size if len(size) == axes + 1 else None
    return next(leaves(lower_tree({BASE: opened}, LayerRef(name), fields, known, axes=axes)))


def _spatial(conv: Conv, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the spatial sizes of an input size with or without the channels in front."""
    return size[len(size) - conv.spatial_axes :]


def _product(rows: Sequence[Row], network: Sequenced | None, names: set[str]) -> tuple[float | None, str]:
    """Return what the largest are at most, multiplied, where that bounds the network; else why it doesn't."""
    from convtool.kinds.written import read_layer

    if network is None:
        return None, "without --model nothing says in which order the layers run"
    if network.broken:
        return None, f"{network.broken}; a product bounds only layers that run one after the other, with {BETWEEN}"
    # What only reshapes lengthens nothing either.
    left = [
        call.name
        for call in network.calls
        if not (read_layer(call.name).kind.reshapes if call.written else call.name in names)
    ]
    if left:
        return None, f"{left[0]} is part of the network and not of this table"
    return math.prod((row.largest.value + row.largest.error) ** row.runs for row in rows), ""


def show_table(result: TableResult, reporter: Reporter) -> None:
    """Print a row for each layer, and the product of the largest, or why there is none."""
    columns = ("layer", "input", "matrix", "runs", "largest", "smallest")
    table(columns, list(map(_cells, result.rows)), right=("runs",))
    if result.product is not None:
        reporter.line(f"product of the largest: at most {result.product * (1 + 5e-6):.6g}, which bounds the network")
    else:
        reporter.line(f"no product of the largest: {result.no_product}")


def _cells(row: Row) -> tuple[str, ...]:
    ends = value_text(row.largest, 1), value_text(row.smallest, -1)
    return row.layer, times(row.input_size), times(row.shape), str(row.runs), *ends


def value_text(value: SingularValue | None, side: int) -> str:
    """Return a value or its bounds; the side is 1 where the value is below what it stands for, and -1 where above."""
    if value is None:
        return "not asked for"
    if value.proved:
        return f"{value.value:.9g} (+- {value.error:.1g})"
    first, second = ("at least", "at most")[::side]
    beyond = value.value + side * value.error
    # Six digits, rounded away from what is held in between.
    bounds = f"{first} {value.value * (1 - side * 5e-6):.6g}"
    return f"{bounds}, {second} {beyond * (1 + side * 5e-6):.6g}" if beyond > 0 else bounds
