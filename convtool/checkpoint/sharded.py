"""Checkpoints in several files: Hugging Face's folders, with an index that names each tensor's file."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeAlias

from convtool.checkpoint.base import Checkpoint, Place
from convtool.checkpoint.record import Record, loads
from convtool.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.formats.source import Receiver

INDEX_SUFFIX = ".index.json"
RECORD_KEY = "convtool"
MAX_INDEX = 100_000_000  # bytes, as of a safetensors header

# What transformers and diffusers look for in a folder; other names are considered only where none of these is there.
_USUAL = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

_Opener: TypeAlias = Callable[[Path], Checkpoint]


class ShardedCheckpoint(Checkpoint):
    """The files that an index names, as one checkpoint.

    Attributes:
        index: the index as it was read: `weight_map` and `metadata`.
        shards: the files, by the names that the index gives them, in its order.
    """

    def __init__(self, path: Path, open_file: _Opener) -> None:
        super().__init__(path)
        before = _version(path)
        self.index = read_index(path)
        try:
            self.shards = {name: open_file(_inside(path.parent, name, path)) for name in self.shard_names}
        finally:
            if _version(path) != before:  # files of the one and of the other would be taken together
                raise InputError(f"{path}: was replaced while its files were opened; try again")
        self._homes: Mapping[str, str] = self.index["weight_map"]
        self._check()
        self.infos = {name: self._home(name).infos[name] for name in self._homes}
        self.unusable = {key: reason for shard in self.shards.values() for key, reason in shard.unusable.items()}
        kinds = {shard.format for shard in self.shards.values()}
        files = "1 file" if len(self.shards) == 1 else f"{len(self.shards)} files"
        self.format = f"{' and '.join(sorted(kinds))} in {files}"

    @property
    def shard_names(self) -> list[str]:
        """Names of the files, as the index gives them."""
        return list(dict.fromkeys(self.index["weight_map"].values()))

    def stored_tensor(self, name: str) -> Tensor:
        return self._home(name).stored_tensor(name)

    def bits(self, name: str) -> Tensor:
        return self._home(name).bits(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return self._home(name).chunks(name)

    def copy_to(self, name: str, file: Receiver) -> None:
        self._home(name).copy_to(name, file)

    def memory(self, name: str) -> Hashable:
        return self._homes[name], self._home(name).memory(name)

    def place(self, name: str) -> Place:
        place = self._home(name).place(name)
        return place._replace(storage=(self._homes[name], place.storage))

    @property
    def others(self) -> list[str]:
        return [name for shard in self.shards.values() for name in shard.others]

    @cached_property
    def record(self) -> Record | None:
        text = self.index.get("metadata", {}).get(RECORD_KEY)
        if text is None:
            return None
        if not isinstance(text, str):
            raise InputError(f"{self.path}: its convtool record is damaged (expected text)")
        return loads(text, str(self.path))

    def _home(self, name: str) -> Checkpoint:
        return self.shards[self._homes[name]]

    def _check(self) -> None:
        """The index and the files name the same tensors."""
        for name, home in self._homes.items():
            if name not in self.shards[home].infos and name not in self.shards[home].unusable:
                raise InputError(f"{self.path}: is damaged: {name!r} is not in {home}, where the index has it")
        for home, shard in self.shards.items():
            for name in shard.infos:
                if self._homes.get(name) != home:
                    raise InputError(
                        f"{self.path}: is damaged: {home} holds {name!r}, which the index doesn't have there"
                    )


def _version(path: Path) -> tuple[int, ...]:
    """What differs once a file has been replaced; nothing of one that can't be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_index(path: Path) -> dict[str, Any]:
    """An index file, checked; the names in it are not yet those of files that may be opened.

    Raises:
        InputError: it is missing, or not an index.
    """
    try:
        if path.stat().st_size > MAX_INDEX:
            raise InputError(f"{path}: is larger than any index")
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _TwiceError as error:
        raise InputError(f"{path}: is damaged: it has the key {error.args[0]!r:.100} twice") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is damaged: it is not JSON") from None
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(homes, dict) or not all(isinstance(home, str) for home in homes.values()):
        raise InputError(f"{path}: is not an index: expected a weight_map from names of tensors to names of files")
    if not isinstance(index.setdefault("metadata", {}), dict):
        raise InputError(f"{path}: is damaged: its metadata is not a table")
    if not homes:
        raise InputError(f"{path}: names no tensors")
    return index


class _TwiceError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def is_plain_name(name: str) -> bool:
    """Whether a file's name in an index stays in the index's folder, on every system."""
    if not name or "\0" in name or "\\" in name or PureWindowsPath(name).drive or PurePosixPath(name).is_absolute():
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The path of a file that an index names.

    A link out of the folder is followed only into the store of the cache that huggingface_hub keeps
    (`snapshots/REVISION/NAME` -> `blobs/HASH`).

    Raises:
        InputError: the name leads out of the folder.
    """
    if not is_plain_name(name):
        raise InputError(f"{index}: refused: it names the file {name!r}, which is not one in its folder")
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{index}: refused: {name} is a link out of its folder")
    return path


def find_in_folder(folder: Path, suffixes: tuple[str, ...]) -> Path:
    """The one checkpoint of a folder: an index, or a file.

    Args:
        suffixes: of checkpoint files.

    Raises:
        InputError: there is none.
        UsageError: there are several.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from None
    usual = [name for name in names if name.removesuffix(INDEX_SUFFIX) in _USUAL]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(suffixes)]
    found = usual or indexes or files
    if not found:
        raise InputError(f"{folder}: is a folder without a checkpoint (a {', '.join(suffixes)} file, or an index)")
    if len(found) > 1:
        raise UsageError(f"{folder}: holds several checkpoints ({', '.join(found)}); give one of these")
    return folder / found[0]
