"""Checkpoints as named tensors, over the formats that they are kept in: opened, their layers found, edited, written."""

from __future__ import annotations

import stat
from pathlib import Path

from convtool.checkpoint.base import Checkpoint
from convtool.errors import InputError, UsageError
from convtool.formats import CHECKPOINTS, checkpoint_format
from convtool.formats.indexes import INDEX_SUFFIX, named_file, read_index
from convtool.formats.source import Source
from convtool.formats.tensor_file import TensorFile
from convtool.kinds.kind import Layer, TensorInfo

__all__ = ["Checkpoint", "Layer", "TensorInfo", "is_flat", "open_checkpoint"]

# What transformers and diffusers look for in a folder; other names are considered only where none of these is there.
_USUAL = (
    *("model.safetensors", "pytorch_model.bin"),
    *(f"{stem}_model.{kind}" for stem in ("diffusion_pytorch", "adapter") for kind in ("safetensors", "bin")),
)
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


def open_checkpoint(path: str | Path, root: str | None = None) -> Checkpoint:
    """Open a .safetensors or torch file, an index of several, or a folder; no tensor is read yet, and no code runs.

    Args:
        path: a file; a .index.json; or a folder that holds one checkpoint.
        root: in a nested torch file with several state dicts, the dotted keys of the one meant.

    Raises:
        InputError: the file is missing, damaged, or of no supported format.
        RefusedError: it is a pickle that holds code.
        UsageError: several state dicts and no `root`, or several checkpoints in a folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = _find_in_folder(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not path.name.endswith(INDEX_SUFFIX):
        return Checkpoint(path, {"": _open_file(path, root)})
    if root is not None:
        raise UsageError(f"{path}: --root is for nested torch files; the files of an index are flat")
    return _open_index(path)


def _open_index(path: Path) -> Checkpoint:
    before = _version(path)
    index = read_index(path)
    try:
        names = dict.fromkeys(index["weight_map"].values())
        files = {name: _open_file(named_file(path, name), None) for name in names}
    finally:
        if _version(path) != before:  # files of the one and of the other would be taken together
            raise InputError(f"{path}: was replaced while its files were opened; try again")
    return Checkpoint(path, files, index)


def _version(path: Path) -> tuple[int, ...]:
    """Return what differs once a file has been replaced; nothing of one that can't be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _find_in_folder(folder: Path) -> Path:
    """Return the one checkpoint of a folder: an index, or a file.

    Raises:
        InputError: there is none.
        UsageError: there are several.
    """
    suffixes = tuple(CHECKPOINTS)
    names = sorted(path.name for path in folder.iterdir())
    usual = [name for name in names if name.removesuffix(INDEX_SUFFIX) in _USUAL]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(suffixes)]
    found = usual or indexes or files
    if not found:
        raise InputError(f"{folder}: is a folder without a checkpoint (a {', '.join(suffixes)} file, or an index)")
    if len(found) > 1:
        raise UsageError(f"{folder}: holds several checkpoints ({', '.join(found)}); give one of these")
    return folder / found[0]


def is_flat(path: Path) -> bool:
    """Tell whether a checkpoint of that name has no dicts in dicts, so that there is no `root` to choose in it."""
    return path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX) or path.is_dir()


def _open_file(path: Path, root: str | None) -> TensorFile:
    start, tar = _beginning(path)
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
    # How a file begins tells its format; its name is only asked where that doesn't.
    for suffix in CHECKPOINTS:
        form = checkpoint_format(suffix)
        if form.recognises(start):
            return form.open_file(Source(path), root)
    if path.suffix in CHECKPOINTS:
        return checkpoint_format(path.suffix).open_file(Source(path), root)
    raise InputError(f"{path}: is neither a safetensors nor a torch file")


def _beginning(path: Path) -> tuple[bytes, bool]:
    """Return how a file begins, and whether it is a tar archive, which tells so further on."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked first: to open a pipe would wait for its other end
            raise InputError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            return file.read(64), file.seek(_TAR_AT) == _TAR_AT and file.read(5) == b"ustar"
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
