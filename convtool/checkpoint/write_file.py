"""One file of an edited checkpoint, planned: what it will hold, or why the format has no room for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.cast import cast_piece
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.errors import RefusedError, UsageError
from convtool.formats import CHECKPOINTS, CheckpointFormat, checkpoint_format
from convtool.formats.atomic import FilePlan
from convtool.formats.pieces import Piece

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """What becomes of the tensors that an edit doesn't touch.

    Attributes:
        dtype: of every floating-point tensor of 16 bits and more; None for what it has.
        state_only: leave out what a torch file holds beside its state dict, where the format has no room for it.
        tensors_only: leave all out that isn't tensors.
        shard_size: bytes of tensors in a file of a folder; None for the files that the source has.
    """

    dtype: str | None = None
    state_only: bool = False
    tensors_only: bool = False
    shard_size: int | None = None

    def cast(self, piece: Piece) -> Piece:
        """Return a tensor as it is to be stored."""
        return piece if self.dtype is None else cast_piece(piece, self.dtype)

    def new(self, name: str, tensor: Tensor) -> Piece:
        """Return a new tensor as it is to be stored."""
        return self.cast(Piece.of_tensor(name, tensor))


def format_of(path: Path) -> CheckpointFormat:
    """Return the format of a checkpoint of that name."""
    if path.suffix not in CHECKPOINTS:
        raise UsageError(
            f"{path}: expected a name that ends in {', '.join(CHECKPOINTS)}; or for a folder the name of its index,"
            f" such as {path}/model.safetensors.index.json"
        )
    return checkpoint_format(path.suffix)


def plan_file(
    source: Checkpoint, edit: Edit, path: Path, form: CheckpointFormat, record: Record | None, options: Options
) -> FilePlan:
    """Plan a file of all tensors of `source`, edited.

    Args:
        path: for messages.

    Raises:
        RefusedError: the format cannot hold what the source holds.
        UsageError: a new name is taken.
    """
    text = None if record is None else record.dumps()
    if source.format == form.NAME:
        (file,) = source.files.values()
        order = edit.order(file.entries)
        entries = [(name, None if tensor is None else options.new(name, tensor)) for name, tensor in order]
        plan = file.rewritten(entries, text, options.cast, alone=options.tensors_only)
        if plan is not None:
            return plan
    check_flat(source, path, options)
    return form.plan_state(pieces_of(source, edit, options), source.metadata, text)


def pieces_of(source: Checkpoint, edit: Edit, options: Options) -> list[Piece]:
    """Return the edited checkpoint's tensors, in order."""
    places = {name: place for place, (name, _) in enumerate(edit.order(source.in_order_of_bytes()))}
    kept_or_new = (
        options.cast(source.piece(name)) if tensor is None else options.new(name, tensor)
        for name, tensor in edit.order(source.infos)
    )
    return [replace(piece, place=places[piece.name]) for piece in kept_or_new]


def check_flat(source: Checkpoint, path: Path, options: Options) -> None:
    """Refuse what wouldn't survive in a new file of nothing but separate tensors."""
    for name, reason in source.unusable.items():
        raise RefusedError(f"{path}: there is no room for {name}, which {reason}")
    overlap = source.overlapping()
    if overlap is not None:
        raise RefusedError(
            f"{path}: {overlap[0]} and {overlap[1]} share a part of their memory, which can be kept only from one .pt"
            " file to another"
        )
    if options.state_only or options.tensors_only:
        return
    other = "write a .pt file instead, or " if source.format == "torch" else ""
    if source.root:
        root = ".".join(source.root)
        raise RefusedError(
            f"{path}: {source.path} holds more than the state dict at {root!r}, and there is no room for it;"
            f" {other}leave the rest out with --root {root} or --tensors-only"
        )
    if source.others:
        raise RefusedError(
            f"{path}: {source.path} holds entries that aren't tensors, and there is no room for them"
            f" ({', '.join([*source.others][:3])}); {other}leave them out with --tensors-only"
        )
