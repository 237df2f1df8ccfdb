"""`convtool convert`: a checkpoint in another format or dtype, or with layers in another form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli.options import FLOATS, CheckpointPath, DryRun, Force, SourceOptions, Speech, parse_dtype
from convtool.cli.output import Reporter
from convtool.cli.reexpress import Wanted, change_document, record_of, reexpressions
from convtool.cli.run import run
from convtool.cli.signature import grouped
from convtool.cli.written import print_tensors, print_written, write, written_document
from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convtool.checkpoint import TensorInfo

NAME = "convert"
USAGE = "CKPT OUT"
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


@grouped
def command(
    checkpoint: CheckpointPath,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The new checkpoint: a file, whose suffix chooses the format; or a folder or index for several files.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Of every floating-point tensor of 16 bits or more: float64, float32, float16 or bfloat16.",
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size",
            metavar="SIZE",
            help="Write files of at most 500MB, 5GB, ... and an index.",
            show_default=False,
        ),
    ] = None,
    *,
    wanted: Wanted,
    sources: SourceOptions,
    dry_run: DryRun = False,
    force: Force = False,
    speech: Speech,
) -> int:
    """Write a checkpoint in another format or dtype, or with layers in another form.

    Tensors keep their names, order and, without --dtype, every bit; tied tensors stay tied. What the new format has no
    room for is refused, except what --root leaves out on purpose.
    """
    reporter = speech.reporter(NAME)

    def body() -> None:
        from convtool.checkpoint.edit import Edit
        from convtool.checkpoint.write import check_output, is_folder, plan_edited

        parse_dtype(dtype, "--dtype", FLOATS)
        size = None if shard_size is None else _parse_size(shard_size)
        opened = sources.open(checkpoint, reporter)
        check_output(out, force=force or dry_run, source=opened, shard_size=size)
        if size is not None and not is_folder(out, opened, size):
            raise UsageError(f"--shard-size: {out} is one file; name a folder, or an index, for several")
        flat = out.suffix == ".safetensors" or is_folder(out, opened, size)
        left_out = opened.left_out if sources.root is not None and flat else []
        changes = reexpressions(reporter, opened, wanted, sources)
        edit = Edit.together([change.edit for change in changes])
        plan = plan_edited(
            opened,
            edit,
            out,
            record_of(opened.record, changes),
            force=force or dry_run,
            dtype=dtype,
            state_only=sources.root is not None,
            shard_size=size,
        )
        if not dry_run:
            write(reporter, plan)
        elif dtype is not None:
            reporter.remark(f"not looked at: whether every number has its place in {dtype}; that is found when writing")
        document = {
            **written_document(opened, edit, plan, dry_run=dry_run),
            "dtype": dtype,
            "cast": [] if dtype is None else _cast(opened.infos.values(), dtype),
            "left_out": left_out,
            "reexpressed": [change_document(change) for change in changes],
        }
        if left_out:
            reporter.remark(f"left out, beside the state dict: {_some(left_out)}")
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, body)


def _cast(infos: Iterable[TensorInfo], dtype: str) -> list[str]:
    """The tensors that are rounded."""
    from convtool.formats.dtypes import FLOATS as CASTABLE

    return [info.name for info in infos if info.dtype in CASTABLE - {dtype}]


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _parse_size(text: str) -> int:
    """'500MB' as a number of bytes."""
    number = text.rstrip("BKMGIbkmgi")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or unit not in _UNITS or len(number) > 15 or int(number) == 0:
        raise UsageError(f"--shard-size: expected a number of bytes such as 500MB, 5GB or 2GiB, got {text!r}")
    return int(number) * _UNITS[unit]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    for change in document["reexpressed"]:
        reporter.line(f"{change['name']} = {change['module']}")
        at = ",".join(map(str, change["input_size"]))
        residual = change["residual"]
        near = "" if residual is None else f"; residual {residual['largest']:.3g}, {residual['relative']:.3g} relative"
        reporter.line(f"  the same on inputs of {at}{near}")
        if not document["written"]:
            print_tensors(reporter, change["tensors"])
        if residual is not None and residual["unmet"]:
            reporter.line(f"  {residual['unmet']} kernel entries that no such input meets are zero")
    if document["dtype"] is not None:
        reporter.line(f"{len(document['cast'])} of {document['tensors']} tensors rounded to {document['dtype']}")
    print_written(reporter, document)
