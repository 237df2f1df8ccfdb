"""The checkpoint in a folder: the one that is there, or where to look instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from convtool.errors import InputError, UsageError
from convtool.formats import CHECKPOINTS
from convtool.formats.dcp import METADATA
from convtool.formats.indexes import is_index, plain_index

# What transformers and diffusers look for in a folder; other names are considered only where none of these is there.
# Names of one model's weights in both formats stand together, and the safer format is the one meant.
_USUAL = (
    ("model.safetensors", "pytorch_model.bin"),
    *((f"{stem}_model.safetensors", f"{stem}_model.bin") for stem in ("diffusion_pytorch", "adapter")),
)
DEEP = 4  # folders in folders that are looked through for a checkpoint
MOST = 2000  # entries that are looked at
MOST_NAMES = 5


def find_in_folder(folder: Path) -> Path:
    """Return the one checkpoint of a folder: an index, a file, or the table of contents of torch.distributed's.

    Raises:
        InputError: there is none; says where there are some.
        UsageError: there are several.
    """
    names = sorted(path.name for path in folder.iterdir())
    indexes = [name for name in names if is_index(name)]
    found = _usual(names) or indexes or [name for name in names if name.endswith(tuple(CHECKPOINTS))]
    if METADATA in names and not found:
        return folder / METADATA
    if not found:
        raise InputError(f"{folder}: is a folder without a checkpoint{_where(folder, names)}")
    if len(found) > 1:
        raise UsageError(f"{folder}: holds several checkpoints ({', '.join(found)}); give one of these")
    return folder / found[0]


def _usual(names: list[str]) -> list[str]:
    found = []
    for safer, other in _USUAL:
        of_model = [name for name in names if _weights(name) == safer]
        found += of_model or [name for name in names if _weights(name) == other]
    return found


def _weights(name: str) -> str:
    """Return the name of the weights that a file's name is of: its own, or what an index is of."""
    return plain_index(name).removesuffix(".index.json") if is_index(name) else name


def _where(folder: Path, names: list[str]) -> str:
    """Say where in a folder there are checkpoints, and what kind of folder it is where that tells what to do."""
    near: list[str] = []
    parts = False  # of weights that several processes have
    for path in _folders(folder):
        if len(near) > MOST_NAMES:
            break
        inside = [one.name for one in path.iterdir()]
        parts = parts or any(name.startswith("zero_pp_rank") for name in inside)
        if METADATA in inside or any(name.endswith(tuple(CHECKPOINTS)) or is_index(name) for name in inside):
            near.append(str(path.relative_to(folder)))
    hint = ""
    if parts or "zero_to_fp32.py" in names:
        hint = "; it is a run of DeepSpeed: its zero_to_fp32.py puts the weights of all processes into one file"
    if near:
        some = ", ".join(near[:MOST_NAMES]) + (", ..." if len(near) > MOST_NAMES else "")
        return f"{hint}; there are some in {some}: give one of these folders, or a file of it"
    return hint or f" (a {', '.join(CHECKPOINTS)} file, an index, or a folder of torch.distributed.checkpoint)"


def _folders(folder: Path) -> Iterator[Path]:
    """Yield the folders inside of one, the nearest first, as far as that doesn't take long."""
    level, looked = [folder], 0
    for _ in range(DEEP):
        inside = []
        for one in level:
            try:
                entries = sorted(one.iterdir())
            except OSError:
                continue
            looked += len(entries)
            if looked > MOST:
                return
            inside += [path for path in entries if path.is_dir() and not path.is_symlink()]
        yield from inside
        level = inside
