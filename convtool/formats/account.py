"""An account of one run: which files it has read, and what it has done to the disk.

The first is for refusing what rests on a file that changed meanwhile, and the second for saying after a failure what is
there now: never a claim of whoever happened to fail, always what was noted as it was done. Without an account nothing
is noted, as in a program that uses convtool for one thing among others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from convtool.errors import InputError

Version = tuple[int, ...]


def version_of(status: os.stat_result) -> Version:
    """Return what differs once a file has been written to, cut short, or replaced.

    A change that leaves all of these as they were goes unnoticed: one within a tick of the file system's clock (some
    milliseconds) after the one before, or through a mapping that isn't written back yet.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def version_at(path: Path) -> Version:
    """Return the version of the file at a path; () where there is none."""
    try:
        return version_of(path.stat())
    except (OSError, ValueError):
        return ()


@dataclass
class Account:
    """What a run has done so far.

    Attributes:
        seen: files that were read, as they were when they were opened.
        outputs: files that were about to get their names, and which file each is: its device and inode.
        removed: files that aren't needed any more, and went.
        unfinished: files beside the outputs that are no output yet.
        began: whether anything was to be written yet.
    """

    seen: dict[tuple[Path, Version], None] = field(default_factory=dict)
    outputs: dict[Path, Version] = field(default_factory=dict)
    removed: set[Path] = field(default_factory=set)
    unfinished: dict[Path, None] = field(default_factory=dict)
    began: bool = False

    def reads(self, path: Path, status: os.stat_result) -> None:
        """Note a file that is read, but for what this run is about to write and looks at again."""
        if path.absolute() not in self.unfinished:
            self.seen[path.absolute(), version_of(status)] = None

    def check_unchanged(self) -> None:
        """Raise InputError where a file that was read isn't what it was, but for what this run itself has changed.

        Raises:
            InputError: it was written to, cut short, replaced or deleted.
        """
        ours = self.removed.union(self.written())
        for path, version in self.seen:
            now = version_at(path)
            if now != version and path.resolve() not in ours:
                how = "is gone" if not now else "is another file" if now[:2] != version[:2] else "was written to"
                raise InputError(f"{path}: changed while it was read: it {how}; run this again once it stays as it is")

    def writes(self, path: Path, ours: os.stat_result) -> None:
        """Note that a file is about to get its name; InputError where one that was read isn't what it was."""
        self.check_unchanged()
        self.outputs[path.resolve()] = version_of(ours)[:2]

    def removes(self, path: Path) -> None:
        """Note that a file is gone."""
        self.unfinished.pop(path.absolute(), None)
        if self.outputs.pop(path.resolve(), None) is None:
            self.removed.add(path.resolve())

    def finishes(self, paths: Iterable[Path]) -> None:
        """Note that files are complete, together with what they are parts of, which is what counts from now on."""
        for path in paths:
            self.unfinished.pop(path, None)
            self.outputs.pop(path.resolve(), None)

    def has_written(self, path: Path) -> bool:
        """Tell whether what has a name by now is an output of this run: that is looked at, not remembered."""
        ours = self.outputs.get(path.resolve())
        return ours is not None and version_at(path)[:2] == ours

    def written(self) -> list[Path]:
        """Return the outputs that have their names by now."""
        return [path for path in self.outputs if self.has_written(path)]

    def outcome(self) -> str:
        """Return what is there now, in a few words."""
        there = [path.name for path in self.written() if path not in self.unfinished]
        said = f"written before that: {', '.join(there)}" if there else "nothing was changed"
        left = self.left_over()
        return f"{said}; {left}" if left else said

    def left_over(self) -> str:
        """Return which files are left that should have gone; '' for none."""
        left = [path.name for path in self.unfinished if version_at(path)]
        return f"left over, and can be deleted: {', '.join(left)}" if left else ""


_current: ContextVar[Account | None] = ContextVar("account", default=None)


@contextlib.contextmanager
def accounting() -> Iterator[Account]:
    """Keep an account of what is done in the block: the one that is kept already, or else one of its own."""
    token = _current.set(account())
    try:
        yield account()
    finally:
        _current.reset(token)


def account() -> Account:
    """Return the account that is kept; one that nobody looks at, where none is."""
    return _current.get() or Account()
