"""The only place that opens checkpoints: one module per format, one way to write."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.safetensors_file import SafetensorsCheckpoint, looks_like_safetensors
from convtool.checkpoint.sharded import INDEX_SUFFIX, ShardedCheckpoint, find_in_folder
from convtool.errors import InputError, UsageError
from convtool.kinds.kind import Layer, TensorInfo

__all__ = ["Checkpoint", "Layer", "TensorInfo", "is_flat", "open_checkpoint"]


_Opener: TypeAlias = Callable[[Path, str | None, bool], Checkpoint]


def _open_torch(path: Path, root: str | None, mapped: bool) -> Checkpoint:
    from convtool.checkpoint.torch_file import TorchCheckpoint  # a .safetensors file doesn't pay for its import

    return TorchCheckpoint(path, root, mapped=mapped)


def _open_safetensors(path: Path, root: str | None, mapped: bool) -> Checkpoint:
    if root is not None:
        raise UsageError(f"{path}: --root is for nested torch files; a safetensors file is flat")
    return SafetensorsCheckpoint(path, mapped=mapped)


# How a file begins tells its format; its name is only asked where that doesn't.
_MAGIC: tuple[tuple[Callable[[bytes], bool], _Opener], ...] = (
    (lambda start: start.startswith(b"PK\x03\x04"), _open_torch),
    (looks_like_safetensors, _open_safetensors),
    (lambda start: start.startswith(b"\x80"), _open_torch),
)
_SUFFIXES: dict[str, _Opener] = {
    ".safetensors": _open_safetensors,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".bin": _open_torch,
    ".ckpt": _open_torch,
}
_NOT_A_CHECKPOINT = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<!DOCTYPE", "a web page, not a checkpoint; the download went wrong"),
    (b"<html", "a web page, not a checkpoint; the download went wrong"),
    (b"\x89HDF", "an HDF5 file, which convtool doesn't read; load it and save its weights with safetensors or torch"),
    (b"GGUF", "a GGUF file, which convtool doesn't read; convert from the checkpoint that it was made of"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
)
_TAR_AT = 257  # where a tar archive says "ustar"
_TEXT = frozenset(range(32, 127)) | set(b"\t\r\n\f")


def open_checkpoint(path: str | Path, root: str | None = None, *, mapped: bool = True) -> Checkpoint:
    """Open a .safetensors or torch file, an index of several, or a folder; no tensor is read yet, and no code runs.

    Args:
        path: a file; a .index.json; or a folder that holds one checkpoint.
        root: in a nested torch file with several state dicts, the dotted keys of the one meant.
        mapped: map files into memory; where False, what is asked for is read (for file systems that can't map).

    Raises:
        InputError: the file is missing, damaged, or of no supported format.
        RefusedError: it is a pickle that holds code.
        UsageError: several state dicts and no `root`, or several checkpoints in a folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = find_in_folder(path, tuple(_SUFFIXES))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.name.endswith(INDEX_SUFFIX):
        if root is not None:
            raise UsageError(f"{path}: --root is for nested torch files; the files of an index are flat")
        return ShardedCheckpoint(path, lambda shard: _open_file(shard, None, mapped))
    return _open_file(path, root, mapped)


def is_flat(path: Path) -> bool:
    """Whether a checkpoint of that name has no dicts in dicts, so that there is no `root` to choose in it."""
    return path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX) or path.is_dir()


def _open_file(path: Path, root: str | None, mapped: bool) -> Checkpoint:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked first: to open a pipe would wait for its other end
            raise InputError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            start = file.read(64)
            tar = file.seek(_TAR_AT) == _TAR_AT and file.read(5) == b"ustar"
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for beginning, what in _NOT_A_CHECKPOINT:
        if start[: len(beginning)].lower() == beginning.lower():
            raise InputError(f"{path}: is {what}")
    if tar:
        raise InputError(
            f"{path}: is a tar archive, which convtool doesn't read; if torch before 0.2 saved it, and you trust it,"
            " load it with torch.load(PATH, weights_only=False) and save its state dict again; else unpack it first"
        )
    if not start:
        raise InputError(f"{path}: is empty")
    if not start.strip(b"\0"):
        raise InputError(f"{path}: begins with zeros only; it was never written completely")
    if _TEXT.issuperset(start):
        raise InputError(
            f"{path}: is text, not a checkpoint (it begins {start[:32].decode()!r}); was it downloaded whole?"
        )
    for matches, opener in _MAGIC:
        if matches(start):
            return opener(path, root, mapped)
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix](path, root, mapped)
    raise InputError(f"{path}: is neither a safetensors nor a torch file")
