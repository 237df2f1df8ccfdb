"""torch's own files (.pt, .pth, .bin, .ckpt): a pickled state dict, read without ever running a pickle's code."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtool.checkpoint.base import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.info import TensorInfo
from convtool.checkpoint.record import Record, loads
from convtool.errors import ConvtoolError, InputError, OutputError, RefusedError, UsageError

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
RECORD_SUFFIX = ".convtool.json"


class TorchCheckpoint(Checkpoint):
    """A file that torch.save wrote; storages are mapped from zip files, and read from the older format.

    Args:
        root: keys, joined by dots, that lead to the state dict inside of the saved dict; needed only where there
            are several.
    """

    format = "torch"

    def __init__(self, path: Path, root: str | None = None) -> None:
        super().__init__(path)
        self.top = _load(path)
        self.root = _find_root(self.top, root, path)
        self.state = _descend(self.top, self.root)
        self.infos = {
            name: TensorInfo(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), value.nbytes)
            for name, value in self.state.items()
            if isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        }

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.state[name]
        return tensor.detach()

    def bits(self, name: str) -> Tensor:
        flat = self.tensor(name).contiguous().reshape(-1)
        return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)

    @cached_property
    def record(self) -> Record | None:
        path = record_path(self.path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        return loads(text, str(path))

    def edited(self, edit: Edit) -> Any:
        """The saved object with its state dict edited, entries that aren't tensors and everything else as it was."""
        state = copy.copy(self.state)  # keeps the class and the attributes, torch's `_metadata` among them
        state.clear()
        for name, tensor in edit.order(self.state):
            state[name] = self.state[name] if tensor is None else tensor
        return _replace(self.top, self.root, state)


def record_path(path: Path) -> Path:
    """Where the record of a torch file stands."""
    return path.with_name(path.name + RECORD_SUFFIX)


def check_written(path: Path, expected: Mapping[str, tuple[int, ...]], new: Mapping[str, Tensor], root: str) -> None:
    """Read back what was written: the same tensors, and the new ones bit for bit; OutputError where not."""
    try:
        back = TorchCheckpoint(path, root or None)
    except ConvtoolError as error:
        raise OutputError(f"the file read back is damaged ({error}); nothing was changed") from None
    if {name: info.shape for name, info in back.infos.items()} != dict(expected):
        raise OutputError("the file read back holds other tensors than were written; nothing was changed")
    for name, tensor in new.items():
        if not torch.equal(back.tensor(name), tensor):
            raise OutputError(f"{name} read back differs from what was written; nothing was changed")


def shared_storages(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors share memory (tied weights)."""
    owners: dict[int, str] = {}
    pairs = []
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        key = tensor.untyped_storage()._cdata
        if key in owners:
            pairs.append((owners[key], name))
        else:
            owners[key] = name
    return pairs


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == ZIP_MAGIC
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about formats is for its callers, not for ours
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error))
        if asked:
            raise RefusedError(
                f"{path}: its pickle asks for {asked[1]}, that is code, and convtool runs no code from a checkpoint;"
                " save the state dict alone: torch.save(model.state_dict(), PATH)"
            ) from None
        if "Unsupported operand" in str(error) or "weights_only" in str(error):
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: is not a plain pickled state dict ({reason[:200]})") from None
        raise InputError(f"{path}: is damaged: its pickle cannot be read") from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is truncated or damaged: {reason[:200]}") from None


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items()
    )


def _candidates(value: object, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if _is_state(value):
        yield prefix
    elif isinstance(value, dict) and len(prefix) < 4:
        for name, item in value.items():
            if isinstance(name, str):
                yield from _candidates(item, (*prefix, name))


def _find_root(top: object, root: str | None, path: Path) -> tuple[str, ...]:
    found = list(_candidates(top))
    if root is not None:
        named = tuple(root.split(".")) if root else ()
        try:
            if _is_state(_descend(top, named)):
                return named
        except (KeyError, TypeError):
            pass
        known = ", ".join(".".join(one) for one in found if one) or "none"
        raise UsageError(f"{path}: --root {root}: there is no state dict; state dicts found: {known}")
    if not found:
        raise InputError(f"{path}: holds no state dict (a dict of tensors by name), but a {type(top).__name__}")
    if len(found) > 1:
        names = ", ".join(".".join(one) for one in found)
        raise UsageError(f"{path}: holds several state dicts ({names}); choose one with --root")
    return found[0]


def _descend(value: Any, root: tuple[str, ...]) -> Any:
    for name in root:
        value = value[name]
    return value


def _replace(top: Any, root: tuple[str, ...], state: Any) -> Any:
    if not root:
        return state
    changed = copy.copy(top)
    changed[root[0]] = _replace(top[root[0]], root[1:], state)
    return changed


def record_text(record: Record) -> bytes:
    """The record as the file beside a torch file holds it, indented for people."""
    return (json.dumps(json.loads(record.dumps()), indent=2) + "\n").encode()
