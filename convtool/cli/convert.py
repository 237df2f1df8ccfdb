"""`convtool convert`: a checkpoint in another format or dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli.options import CheckpointPath, Force, Json, Quiet, Root
from convtool.cli.output import Reporter, human_bytes
from convtool.cli.run import run

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint

NAME = "convert"
USAGE = "CKPT OUT"
EXAMPLES = """
convtool convert model.pt model.safetensors
# every floating-point tensor, each number rounded once
convtool convert model.safetensors half.safetensors --dtype float16
# of a training checkpoint the weights alone
convtool convert training.ckpt weights.safetensors --root state_dict
"""


def command(
    checkpoint: CheckpointPath,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The new checkpoint; its suffix chooses the format.", show_default=False),
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
    root: Root = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a checkpoint in another format or dtype.

    Tensors keep their names, order and, without --dtype, every bit; tied tensors stay tied. What the new format has no
    room for is refused, except what --root leaves out on purpose.
    """
    reporter = Reporter(NAME, as_json=as_json, quiet=quiet)

    def body() -> None:
        from convtool.checkpoint import open_checkpoint
        from convtool.checkpoint.dtypes import FLOATS
        from convtool.checkpoint.edit import Edit
        from convtool.checkpoint.write import check_output, write_edited

        _check_dtype(dtype)
        opened = open_checkpoint(checkpoint, root)
        check_output(out, force=force)
        left_out = _left_out(opened, out) if root is not None else []
        write_edited(opened, Edit.nothing(), out, opened.record, force=force, dtype=dtype, state_only=root is not None)
        cast = [] if dtype is None else [i.name for i in opened.infos.values() if i.dtype in FLOATS - {dtype}]
        document: dict[str, Any] = {
            "source": str(checkpoint),
            "out": str(out),
            "tensors": len(opened.infos),
            "dtype": dtype,
            "cast": cast,
            "left_out": left_out,
            "bytes": out.stat().st_size,
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


def _left_out(opened: Checkpoint, out: Path) -> list[str]:
    from convtool.checkpoint.torch_file import TorchCheckpoint

    return opened.left_out if isinstance(opened, TorchCheckpoint) and out.suffix == ".safetensors" else []


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _print(reporter: Reporter, document: dict[str, Any]) -> None:
    if document["dtype"] is not None:
        reporter.line(f"{len(document['cast'])} of {document['tensors']} tensors rounded to {document['dtype']}")
    reporter.line(f"wrote {document['out']}, {document['tensors']} tensors, {human_bytes(document['bytes'])}")
