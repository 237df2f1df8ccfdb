"""`convtool convert --as-linear, --as-toeplitz, --as-conv`: what was asked for, as changes of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.options import SourceOptions, check_used
from convtool.cli.output import Reporter
from convtool.cli.written import tensors_document
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint
    from convtool.checkpoint.record import FusionRecord, Record
    from convtool.fusing.lowering import LoweredLayer
    from convtool.fusing.reexpress import Reexpression
    from convtool.kinds.stated import FieldSources


@dataclass(frozen=True, slots=True)
class Wanted:
    """The layers that are to be written in another form: as typed."""

    as_linear: Annotated[
        list[str] | None,
        typer.Option(
            "--as-linear",
            metavar="LAYER",
            help="Write a patch convolution (kernel = stride) as the linear layer that it is on a patch. Repeatable.",
            show_default=False,
            autocompletion=complete.layers,
        ),
    ] = None
    as_toeplitz: Annotated[
        list[str] | None,
        typer.Option(
            "--as-toeplitz",
            metavar="LAYER=[C,]H,W",
            help="Write a convolution as the linear layer that it is at one input size. Repeatable.",
            show_default=False,
        ),
    ] = None
    as_conv: Annotated[
        list[str] | None,
        typer.Option(
            "--as-conv",
            metavar="LAYER=C,H,W[/KH,KW]",
            help="Write a linear layer as the convolution that its weight is the matrix of, for an input of that size"
            " and that kernel (as large as the input by default); stride, padding, ... by --set. Repeatable.",
            show_default=False,
        ),
    ] = None


def reexpressions(reporter: Reporter, opened: Checkpoint, wanted: Wanted, given: SourceOptions) -> list[Reexpression]:
    """The changes that the options ask for; what was assumed is remarked.

    Raises:
        UsageError: values that can't be read, or don't fit the layers; fields of layers that aren't converted.
        RefusedError: a layer that has no such form.
    """
    from convtool.fusing.reexpress import as_linear, as_toeplitz

    sources = given.fields(given.of_model(opened, reporter))
    check_used(sources, list(opened.layers))
    changes = [as_linear(_lowered(reporter, opened, name, sources)) for name in wanted.as_linear or ()]
    for text in wanted.as_toeplitz or ():
        name, sizes = _split(text, "--as-toeplitz", "LAYER=[C,]H,W")
        changes.append(_toeplitz(reporter, opened, name, sizes, sources, as_toeplitz))
    changes += [_conv(reporter, opened, text, sources) for text in wanted.as_conv or ()]
    for number, change in enumerate(changes):
        if change.name in {other.name for other in changes[:number]}:
            raise UsageError(f"{change.name}: is to be written in two forms; a layer has one")
    if given.settings and not changes:
        raise UsageError("--set: is for layers that are re-expressed: --as-linear, --as-toeplitz or --as-conv")
    return changes


def record_of(before: Record | None, changes: list[Reexpression]) -> Record | None:
    """The record of the new checkpoint."""
    from convtool import __version__
    from convtool.checkpoint.record import Record

    if not changes:
        return before
    return (before or Record(__version__)).appended(__version__, [change.record for change in changes])


def change_document(change: Reexpression) -> dict[str, Any]:
    """One change for --json."""
    residual = change.residual
    return {
        "name": change.name,
        "module": change.module,
        "input_size": list(change.record.input_size or ()),
        "fields": change.record.fields,
        "tensors": tensors_document(change.edit),
        "residual": None
        if residual is None
        else {"largest": residual.largest, "relative": residual.relative, "unmet": residual.unmet},
    }


def _lowered(
    reporter: Reporter, opened: Checkpoint, name: str, sources: FieldSources, size: tuple[int, ...] | None = None
) -> LoweredLayer:
    from convtool.fusing.lowering import lower_chain

    layer = opened.layer(name)
    if layer.axes() is None:
        raise UsageError(f"{layer.name}: is a {layer.kind.label}, not a convolution; it stays as it is")
    lowered = lower_chain(opened, [name], sources, size)[0]
    if lowered.assumed:
        reporter.remark(f"assumed: {lowered.assumed}")
    return lowered


def _toeplitz(
    reporter: Reporter, opened: Checkpoint, name: str, sizes: str, sources: FieldSources, make: Any
) -> Reexpression:
    from convtool.core.fields import parse_sizes
    from convtool.core.sizes import split_input_size

    size = parse_sizes(sizes, "--as-toeplitz")
    lowered = _lowered(reporter, opened, name, sources, size)
    made: Reexpression = make(lowered, split_input_size(size, lowered.conv.in_channels, lowered.conv.spatial_axes))
    return made


def _conv(reporter: Reporter, opened: Checkpoint, text: str, sources: FieldSources) -> Reexpression:
    from convtool.core.fields import parse_sizes
    from convtool.fusing.reexpress import as_conv

    name, _, given = text.rpartition("=") if "=" in text else (text, "", "")
    layer = opened.layer(name)
    known = _recorded(opened, layer.name)
    fields = sources.fields(layer.name)
    if given:
        sizes, slash, kernel_text = given.partition("/")
        size = parse_sizes(sizes, "--as-conv")
        kernel = parse_sizes(kernel_text, "--as-conv") if slash else size[1:]
    elif known is not None and known.before and not known.after and known.input_size is not None:
        size, kernel = known.input_size, known.input_size[1:]  # a patch convolution before convtool made it linear
        fields = known.sources[0].fields | fields
    else:
        raise UsageError(
            f"--as-conv {text}: expected LAYER=C,H,W/KH,KW, the size of what is flattened and the kernel, such as"
            f" {layer.name}=3,32,32/5,5"
        )
    if len(size) < 2 or len(kernel) != len(size) - 1:
        raise UsageError(f"--as-conv {text}: expected C,H,W/KH,KW, as many kernel sizes as spatial ones, got {given!r}")
    if "stride" not in fields and tuple(kernel) == tuple(size[1:]):
        fields = fields | {"stride": tuple(kernel)}
        reporter.remark(f"assumed: {layer.name}: stride = kernel, patches beside one another")
    return as_conv(opened, layer, size, kernel, fields)


def _recorded(opened: Checkpoint, name: str) -> FusionRecord | None:
    fusions = opened.record.fusions if opened.record else ()
    return next((fusion for fusion in reversed(fusions) if fusion.name == name), None)


def _split(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, sizes = text.rpartition("=")
    if not (name and equals and sizes):
        raise UsageError(f"{option}: expected {form}, got {text!r}")
    return name, sizes
