"""`convtool convert`: a checkpoint in another format or dtype, or with layers in another form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from convtool.cli import complete, saved, shared
from convtool.cli.command import Command
from convtool.cli.document import INLINE, Dtype, LayerFields, Sizes, fill
from convtool.cli.options import Size, argument, option, parse_bytes, parse_float
from convtool.cli.output import Reporter
from convtool.core.fields import parse_sizes
from convtool.core.geometry import format_sizes
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint
    from convtool.core.recover import Residual
    from convtool.fusing.reexpress import Reexpression
    from convtool.kinds.stated import FieldSources

EXAMPLES = """
convtool convert model.pt model.safetensors
# every floating-point tensor, each number rounded once
convtool convert model.safetensors half.safetensors --dtype float16
# of a training checkpoint the weights alone
convtool convert training.ckpt weights.safetensors --root state_dict
# a folder of files with an index, and back into one file
convtool convert model.safetensors sharded --shard-size 2GB
convtool convert sharded model.safetensors
# a patch embedding as a linear layer, and back
convtool convert vit.safetensors linear.safetensors --as-linear patch_embed.proj --set patch_embed.proj.stride=16
convtool convert linear.safetensors vit2.safetensors --as-conv patch_embed.proj
# a convolution as nn.Linear for inputs of one size
convtool convert net.safetensors fc.safetensors --as-toeplitz conv1=3,8,8 --set conv1.padding=1
"""


def _parse_sized(text: str, option: str) -> tuple[str, Size]:
    name, equals, sizes = text.rpartition("=")
    if not (name and equals and sizes):
        raise UsageError(f"{option}: expected LAYER=[C,]H,W, got {text!r}")
    return name, parse_sizes(sizes, option)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The checkpoint, and how its copy is to differ."""

    checkpoint: Path = shared.checkpoint()
    out: Path = argument(
        "OUT",
        "The new checkpoint: a file, whose suffix chooses the format; or a folder or index for several files.",
        required=True,
    )
    dtype: str | None = option(
        "DTYPE",
        "Of every floating-point tensor of 16 bits or more: float64, float32, float16 (fp16) or bfloat16 (bf16).",
        parse=parse_float,
    )
    shard_size: int | None = option("SIZE", "Write files of at most 500MB, 5GB, ... and an index.", parse=parse_bytes)
    as_linear: list[str] | None = option(
        "LAYER",
        "Write a patch convolution (kernel = stride) as the linear layer that it is on a patch. Repeatable.",
        completion=complete.layers,
    )
    as_toeplitz: list[tuple[str, Size]] | None = option(
        "LAYER=[C,]H,W",
        "Write a convolution as the linear layer that it is at one input size. Repeatable.",
        parse=_parse_sized,
    )
    as_conv: list[str] | None = option(
        "LAYER=C,H,W[/KH,KW]",
        "Write a linear layer as the convolution that its weight is the matrix of, for an input of that size"
        " and that kernel (as large as the input by default); stride, padding, ... by --set. Repeatable.",
    )
    tensors_only: bool = shared.tensors_only()
    sources: shared.Sources
    writing: shared.Writing


@dataclass(frozen=True, slots=True)
class Reexpressed:
    """A layer in another form.

    Attributes:
        module: what loads it, as code.
        input_size: on which both are the same; channels first.
        fields: of the new layer; none of a linear one.
        residual: of a kernel recovered from a matrix.
    """

    name: str
    module: str
    input_size: Sizes
    fields: LayerFields
    tensors: saved.ChangedTensors
    residual: Residual | None

    @classmethod
    def of(cls, change: Reexpression) -> Reexpressed:
        """Return what there is to say of a change."""
        size = change.record.input_size or ()
        return fill(cls, change, change.record, input_size=size, tensors=saved.changed_tensors(change.edit))


@dataclass(frozen=True, slots=True)
class Result:
    """A new checkpoint.

    Attributes:
        cast: tensors that were rounded to dtype.
        reexpressed: layers in another form.
    """

    checkpoint: saved.Written = field(metadata=INLINE)
    dtype: Dtype | None
    cast: tuple[str, ...]
    reexpressed: tuple[Reexpressed, ...]


def run(options: Options, reporter: Reporter) -> Result:
    """Write a checkpoint in another format or dtype, or with layers in another form.

    Tensors keep their names, order and, without --dtype, every bit; tied tensors stay tied. What the new format has no
    room for is refused, except what --root or --tensors-only leaves out on purpose.
    """
    from convtool.checkpoint.write import check_output, is_folder
    from convtool.formats.dtypes import FLOATS as CASTABLE

    out, size, dtype = options.out, options.shard_size, options.dtype
    opened = options.sources.open(options.checkpoint, reporter)
    check_output(out, force=options.writing.overwrite, source=opened, shard_size=size)
    to_folder = is_folder(out, opened, size)
    if size is not None and not to_folder:
        raise UsageError(f"--shard-size: {out} is one file; name a folder, or an index, for several")
    changes = _reexpressions(options, opened, reporter)
    edit, plan = saved.plan_changed(opened, changes, options, dtype=dtype, shard_size=size)
    new = saved.write(plan, opened, edit, reporter, dry_run=options.writing.dry_run)
    if options.writing.dry_run and dtype is not None:
        reporter.remark(f"not looked at: whether every number has its place in {dtype}; that is found when writing")
    rounded = set() if dtype is None else CASTABLE - {dtype}
    cast = tuple(info.name for info in opened.infos.values() if info.dtype in rounded)
    return Result(new, dtype, cast, tuple(map(Reexpressed.of, changes)))


# --- layers in another form


def _reexpressions(options: Options, opened: Checkpoint, reporter: Reporter) -> list[Reexpression]:
    """Return the changes that the options ask for; what was assumed is remarked.

    Raises:
        UsageError: values that can't be read, or don't fit the layers; fields of layers that aren't converted.
        RefusedError: a layer that has no such form.
    """
    from convtool.fusing.leaf import said_of
    from convtool.fusing.reexpress import as_linear, as_toeplitz, lower_convolution

    given = options.sources
    sources = given.fields(given.read_model(opened, reporter), opened.layers)
    changes = []
    for name, size in [*((name, None) for name in options.as_linear or ()), *(options.as_toeplitz or ())]:
        lowered = lower_convolution(opened, name, sources, size)
        reporter.note(*said_of([lowered]))
        changes.append(as_linear(lowered) if size is None else as_toeplitz(lowered, size))
    changes += [_as_conv(opened, text, sources, reporter) for text in options.as_conv or ()]
    for number, change in enumerate(changes):
        if change.name in {other.name for other in changes[:number]}:
            raise UsageError(f"{change.name}: is to be written in two forms; a layer has one")
    if given.settings and not changes:
        raise UsageError("--set: is for layers that are re-expressed: --as-linear, --as-toeplitz or --as-conv")
    return changes


def _as_conv(opened: Checkpoint, text: str, sources: FieldSources, reporter: Reporter) -> Reexpression:
    from convtool.fusing.reexpress import as_conv, made_linear

    name, _, given = text.rpartition("=") if "=" in text else (text, "", "")
    layer = opened.layer(name)
    made, fields = made_linear(opened, layer.name), sources.fields(layer.name)
    if given:
        sizes, slash, kernel_text = given.partition("/")
        size = parse_sizes(sizes, "--as-conv")
        kernel = parse_sizes(kernel_text, "--as-conv") if slash else size[1:]
    elif made is not None:
        size, kernel, fields = made[0], made[0][1:], made[1] | fields
    else:
        raise UsageError(
            f"--as-conv {text}: expected LAYER=C,H,W/KH,KW, the size of what is flattened and the kernel, such as"
            f" {layer.name}=3,32,32/5,5"
        )
    if len(size) < 2 or len(kernel) != len(size) - 1:
        raise UsageError(f"--as-conv {text}: expected C,H,W/KH,KW, as many kernel sizes as spatial ones, got {given!r}")
    if "stride" not in fields and tuple(kernel) == tuple(size[1:]):
        fields = fields | {"stride": tuple(kernel)}
        reporter.note(f"assumed: {layer.name}: stride = kernel, patches beside one another")
    return as_conv(opened, layer, size, kernel, fields)


def show(result: Result, reporter: Reporter) -> None:
    """Print each layer in its new form, what was rounded, and what was written."""
    for change in result.reexpressed:
        reporter.line(f"{change.name} = {change.module}")
        residual = change.residual
        near = "" if residual is None else f"; residual {residual.largest:.3g}, {residual.relative:.3g} relative"
        reporter.line(f"  the same on inputs of {format_sizes(change.input_size)}{near}")
        if not result.checkpoint.written:
            saved.show_tensors(change.tensors, reporter)
        if residual is not None and residual.unmet:
            reporter.line(f"  {residual.unmet} kernel entries that no such input meets are zero")
    if result.dtype is not None:
        reporter.line(f"{len(result.cast)} of {result.checkpoint.tensors} tensors rounded to {result.dtype}")
    saved.show(result.checkpoint, reporter)


COMMAND = Command("CKPT OUT", EXAMPLES, Options, run, show)
