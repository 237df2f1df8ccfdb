"""`convtool convert`: a checkpoint in another format or dtype, or with layers in another form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.options import (
    CheckpointPath,
    Force,
    GeometryFile,
    Json,
    Model,
    ModelArgs,
    NoMmap,
    Quiet,
    Root,
    Settings,
)
from convtool.cli.output import Reporter, human_bytes
from convtool.cli.run import run

if TYPE_CHECKING:
    from torch import Tensor

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
    as_linear: Annotated[
        list[str] | None,
        typer.Option(
            "--as-linear",
            metavar="LAYER",
            help="Write a patch convolution (kernel = stride) as the linear layer that it is on a patch. Repeatable.",
            show_default=False,
            autocompletion=complete.layers,
        ),
    ] = None,
    as_toeplitz: Annotated[
        list[str] | None,
        typer.Option(
            "--as-toeplitz",
            metavar="LAYER=[C,]H,W",
            help="Write a convolution as the linear layer that it is at one input size. Repeatable.",
            show_default=False,
        ),
    ] = None,
    as_conv: Annotated[
        list[str] | None,
        typer.Option(
            "--as-conv",
            metavar="LAYER=C,H,W[/KH,KW]",
            help="Write a linear layer as the convolution that its weight is the matrix of, for an input of that size"
            " and that kernel (as large as the input by default); stride, padding, ... by --set. Repeatable.",
            show_default=False,
        ),
    ] = None,
    geometry: GeometryFile = None,
    model: Model = None,
    model_args: ModelArgs = None,
    settings: Settings = None,
    root: Root = None,
    no_mmap: NoMmap = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a checkpoint in another format or dtype, or with layers in another form.

    Tensors keep their names, order and, without --dtype, every bit; tied tensors stay tied. What the new format has no
    room for is refused, except what --root leaves out on purpose.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> None:
        from convtool.checkpoint import open_checkpoint
        from convtool.checkpoint.dtypes import FLOATS
        from convtool.checkpoint.edit import Edit
        from convtool.checkpoint.write import check_output, is_folder, write_edited
        from convtool.cli.model import model_fields
        from convtool.cli.reexpress import Wanted, change_document, record_of, reexpressions

        _check_dtype(dtype)
        size = None if shard_size is None else _parse_size(shard_size)
        opened = open_checkpoint(checkpoint, root, mapped=not no_mmap)
        check_output(out, force=force, source=opened, shard_size=size)
        flat = out.suffix == ".safetensors" or is_folder(out, opened, size)
        left_out = opened.left_out if root is not None and flat else []
        wanted = Wanted(as_linear or [], as_toeplitz or [], as_conv or [])
        known = model_fields(model, model_args, opened, reporter)
        changes = reexpressions(reporter, opened, wanted, geometry, settings, known)
        edit = Edit.together([change.edit for change in changes])
        write_edited(
            opened,
            edit,
            out,
            record_of(opened.record, changes),
            force=force,
            dtype=dtype,
            state_only=root is not None,
            shard_size=size,
        )
        cast = [] if dtype is None else [i.name for i in opened.infos.values() if i.dtype in FLOATS - {dtype}]
        document: dict[str, Any] = {
            "source": str(checkpoint),
            "out": str(out),
            "tensors": len(edit.order(opened.infos)),
            "dtype": dtype,
            "cast": cast,
            "left_out": left_out,
            "reexpressed": [change_document(change) for change in changes],
            "bytes": sum(_bytes(info, dtype) for name, info in opened.infos.items() if name not in edit.remove)
            + sum(_tensor_bytes(tensor, dtype) for tensor in edit.insert.values()),
        }
        if left_out:
            reporter.remark(f"left out, beside the state dict: {_some(left_out)}")
        reporter.result(document, lambda: _print(reporter, document))

    return run(reporter, body)


def _check_dtype(name: str | None) -> None:
    from convtool.checkpoint.dtypes import FLOATS
    from convtool.errors import UsageError

    if name is not None and name not in FLOATS:
        raise UsageError(f"--dtype: expected one of {', '.join(sorted(FLOATS))}, got {name!r}")


def _bytes(info: TensorInfo, dtype: str | None) -> int:
    """Of a tensor as it is written."""
    from convtool.checkpoint.dtypes import FLOATS, ITEMSIZE

    return info.nbytes if dtype is None or info.dtype not in FLOATS else info.count * ITEMSIZE[dtype]


def _tensor_bytes(tensor: Tensor, dtype: str | None) -> int:
    """Of a new one as it is written."""
    from convtool.checkpoint.dtypes import FLOATS, ITEMSIZE

    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.numel() * (ITEMSIZE[dtype] if dtype is not None and name in FLOATS else tensor.element_size())


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _parse_size(text: str) -> int:
    """'500MB' as a number of bytes."""
    from convtool.errors import UsageError

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
        if residual is not None and residual["unmet"]:
            reporter.line(f"  {residual['unmet']} kernel entries that no such input meets are zero")
    if document["dtype"] is not None:
        reporter.line(f"{len(document['cast'])} of {document['tensors']} tensors rounded to {document['dtype']}")
    reporter.line(f"wrote {document['out']}, {document['tensors']} tensors, {human_bytes(document['bytes'])}")
