"""Checkpoints as named tensors, over the formats that they are kept in: opened, their layers found, edited, written."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.folder import find_in_folder
from convtool.errors import InputError, UsageError
from convtool.formats import CHECKPOINTS, checkpoint_format, dcp
from convtool.formats.account import version_at
from convtool.formats.indexes import is_index, named_file, read_index
from convtool.formats.resources import asked
from convtool.formats.source import File
from convtool.formats.tensor_file import TensorFile
from convtool.kinds.kind import Layer, TensorInfo

__all__ = ["Checkpoint", "Layer", "TensorInfo", "is_flat", "open_checkpoint"]

_TAR = (
    "a tar archive, which convtool doesn't read; if torch before 0.2 saved it, and you trust it, load it with"
    " torch.load(PATH, weights_only=False) and save its state dict again; else unpack it first"
)
# Where a file says so, with what bytes, and what it is then.
_NOT_A_CHECKPOINT = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (0, b"<!DOCTYPE", "a web page, not a checkpoint; the download went wrong"),
    (0, b"<html", "a web page, not a checkpoint; the download went wrong"),
    (0, b"\x89HDF", "an HDF5 file, which convtool doesn't read; load it and save its weights with torch"),
    (0, b"GGUF", "a GGUF file, which convtool doesn't read; convert from the checkpoint that it was made of"),
    (0, b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
    (0, b"\xfd7zXZ\0", "compressed by xz; unpack it first"),
    (0, b"BZh", "compressed by bzip2; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (0, b"\x93NUMPY", "an array of numpy; save it as a tensor under its name"),
    (64, b"\xef\xbe\xad\xde", "weights of Core ML, which convtool doesn't read; use the checkpoint behind them"),
    (257, b"ustar", _TAR),
)
_NOT_BY_NAME = {
    ".onnx": "ONNX, which convtool doesn't read; use the PyTorch checkpoint that it was exported from",
    ".tflite": "TensorFlow Lite, which convtool doesn't read; use the PyTorch checkpoint that it was made of",
    ".distcp": "a part of a folder of torch.distributed.checkpoint; give the folder",
}
_LOOKED_AT = 512  # bytes of a file that tell what it is
_HUB = re.compile(r"[\w-]+/[\w.-]+")  # OWNER/MODEL
_URL = re.compile(r"(https?|s3|gs|hf|ftp):/+(.*)")
_TEXT = frozenset(range(32, 127)) | set(b"\t\r\n\f")


def open_checkpoint(path: str | Path, root: str | None = None) -> Checkpoint:
    """Open a file of tensors, an index of several, or a folder; no tensor is read yet, and no code runs.

    Read are .safetensors, all that torch.save, torch.jit.save and torch.export.save write, and folders of Hugging Face
    and of torch.distributed.checkpoint; `convtool manual checkpoints` has what is read of each.

    Args:
        path: a file; a .index.json; or a folder that holds one checkpoint.
        root: in a nested torch file with several state dicts, the dotted keys of the one meant.

    Raises:
        InputError: the file is missing, damaged, or of no supported format.
        UsageError: several state dicts and no `root`, or several checkpoints in a folder.
    """
    path = Path(path)
    with asked(path, "read", InputError):
        if path.is_dir():
            path = find_in_folder(path)
    if not is_index(path.name):
        return Checkpoint(path, {"": _open_file(path, root)})
    if root is not None:
        raise UsageError(f"{path}: --root is for nested torch files; the files of an index are flat")
    return _open_index(path)


def _open_index(path: Path) -> Checkpoint:
    before = version_at(path)
    index = read_index(path)
    try:
        names = dict.fromkeys(index["weight_map"].values())
        files = {name: _open_file(named_file(path, name), None) for name in names}
    finally:
        if version_at(path) != before:  # files of the one and of the other would be taken together
            raise InputError(f"{path}: was replaced while its files were opened; try again")
    return Checkpoint(path, files, index)


def is_flat(path: Path) -> bool:
    """Tell whether a checkpoint of that name has no dicts in dicts, so that there is no `root` to choose in it."""
    flat_folder = path.is_dir() and not (path / dcp.METADATA).exists()
    return path.suffix == ".safetensors" or is_index(path.name) or flat_folder


def _open_file(path: Path, root: str | None) -> TensorFile:
    start = _beginning(path)
    if path.suffix in _NOT_BY_NAME:
        raise InputError(f"{path}: is {_NOT_BY_NAME[path.suffix]}")
    if path.name == dcp.METADATA:
        return dcp.open_folder(File(path), root)
    for at, mark, what in _NOT_A_CHECKPOINT:
        if start[at : at + len(mark)].lower() == mark.lower():
            raise InputError(f"{path}: is {what}")
    if not start:
        raise InputError(f"{path}: is empty")
    if not start[:64].strip(b"\0"):
        raise InputError(f"{path}: begins with zeros only; it was never written completely")
    # How a file begins tells its format; its name is only asked where that doesn't.
    for suffix in CHECKPOINTS:
        form = checkpoint_format(suffix)
        if form.recognises(start):
            return form.open_file(File(path), root)
    if _TEXT.issuperset(start[:64]):
        raise InputError(
            f"{path}: is text, not a checkpoint (it begins {start[:32].decode()!r}); was it downloaded whole?"
        )
    if path.suffix in CHECKPOINTS:
        return checkpoint_format(path.suffix).open_file(File(path), root)
    raise InputError(f"{path}: is neither a safetensors nor a torch file")


def _beginning(path: Path) -> bytes:
    """Return how a file begins."""
    with asked(path, "read", InputError):
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # asked first: to open a pipe would wait for its other end
                raise InputError(f"{path}: is not a regular file")
            with path.open("rb") as file:
                return file.read(_LOOKED_AT)
        except FileNotFoundError:
            if url := _URL.match(str(path)):
                raise InputError(f"{url[1]}://{url[2]}: is a URL; download it first") from None
            of_hub = _HUB.fullmatch(str(path)) and path.suffix not in CHECKPOINTS and not path.parent.exists()
            hint = f"; a model of the Hugging Face hub is downloaded first: hf download {path} --local-dir FOLDER"
            raise InputError(f"{path}: no such file{hint if of_hub else ''}") from None
