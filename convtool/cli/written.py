"""What commands say of a checkpoint that they wrote, or would write: its tensors, its files, their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convtool.cli.output import Reporter
from convtool.errors import human_bytes

if TYPE_CHECKING:
    from convtool.checkpoint import Checkpoint
    from convtool.checkpoint.edit import Edit
    from convtool.checkpoint.write import WritePlan


def write(reporter: Reporter, plan: WritePlan) -> None:
    """Write it, with a bar where that takes long."""
    with reporter.progress(f"writing {plan.path.name}", plan.size) as advance:
        plan.write(advance)
    if plan.left_behind:
        names = ", ".join(plan.left_behind[:5]) + (" ..." if len(plan.left_behind) > 5 else "")
        reporter.remark(f"left where they were: {names}; copy those that fit the new checkpoint too")


def written_document(opened: Checkpoint, edit: Edit, plan: WritePlan, *, dry_run: bool) -> dict[str, Any]:
    """Where it is, its size, and of how many tensors it is made."""
    return {
        "source": str(opened.path),
        "out": str(plan.path),
        "written": not dry_run,
        "tensors": len(edit.order(opened.infos)),
        "bytes": plan.size,
        "files": {str(path): size for path, size in plan.files.items()},
    }


def tensors_document(edit: Edit) -> dict[str, Any]:
    """The tensors that go, and those that come with their shapes."""
    return {
        "removed": sorted(edit.remove - edit.insert.keys()),
        "written": {key: list(tensor.shape) for key, tensor in edit.insert.items()},
    }


def print_tensors(reporter: Reporter, tensors: dict[str, Any]) -> None:
    """What a dry run says beyond a run: the tensors that go and come, by name."""
    for name in tensors["removed"]:
        reporter.line(f"  - {name}")
    for name, shape in tensors["written"].items():
        reporter.line(f"  + {name} {'x'.join(map(str, shape))}")


def print_written(reporter: Reporter, document: dict[str, Any]) -> None:
    """The last line of what a command says of a checkpoint."""
    print_files(reporter, document, f", {document['tensors']} tensors")


def print_files(reporter: Reporter, document: dict[str, Any], made_of: str = "") -> None:
    """What was written, of what and how large; a dry run says bytes as they would be, of each file where there are
    several, and what would be drawn.
    """
    if document["written"]:
        reporter.line(f"wrote {document['out']}{made_of}, {human_bytes(document['bytes'])}")
        return
    reporter.line(f"would write {document['out']}{made_of}, {document['bytes']} bytes")
    if len(document["files"]) > 1:
        for path, size in document["files"].items():
            reporter.line(f"  {path}, {size} bytes")
    if document.get("plot") is not None:
        reporter.line(f"would draw {document['plot']}")
