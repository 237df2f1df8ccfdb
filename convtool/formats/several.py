"""Several files and an index that names them: whoever reads the index finds all of the old ones or all of the new.

The files come first, each whole and checked, under names that nothing has. The index is last, and then the files go
that the old one named. A run that is killed in between leaves files that no index names, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from convtool.errors import OutputError
from convtool.formats.account import Account, accounting
from convtool.formats.atomic import FilePlan, Progress, check_space, check_target, discard, lock_file, replacing
from convtool.formats.indexes import INDEX_SUFFIX, named_beside
from convtool.formats.resources import asked

ATTEMPTS = 100  # at a folder that others make and remove


class Ranks:
    """The processes that write one set of files together: one by itself, where nothing else is said.

    Attributes:
        rank: which of them this is, from 0.
        count: how many there are.
    """

    rank = 0
    count = 1

    def wait(self) -> None:
        """Go on when all have come here; OutputError where one of them is gone."""


def free_names(index: Path, suffix: str, count: int) -> list[str]:
    """Return names for an index's files, as huggingface_hub makes them, and numbered anew where there are such."""
    stem = index.name.removesuffix(INDEX_SUFFIX).removesuffix(suffix)
    for generation in itertools.count(1):
        more = "" if generation == 1 else f"-{generation}"
        names = [f"{stem}-{number:05}-of-{count:05}{more}{suffix}" for number in range(1, count + 1)]
        if all(_is_free(index.parent / name) for name in names):
            return names
    raise AssertionError


def _is_free(path: Path) -> bool:
    return not (path.exists() or path.is_symlink())


@dataclass(frozen=True, slots=True)
class SeveralPlan:
    """Files that are to be written, and the index that names them.

    Attributes:
        index: where it will be; its folder is made where it isn't there.
        text: of the index.
        plans: of the files beside it, by names that are free (`free_names`).
    """

    index: Path
    text: bytes
    plans: Mapping[str, FilePlan]

    def files(self) -> dict[Path, int]:
        """Return all files that will be written, the index first, with their sizes in bytes."""
        files = {self.index.with_name(name): plan.size for name, plan in self.plans.items()}
        return {self.index: len(self.text), **files}

    def write(self, *, force: bool, progress: Progress | None = None, ranks: Ranks | None = None) -> None:
        """Write all of them, or nothing.

        Args:
            progress: is told of this process's files.
            ranks: the processes that write them together, each every so many-th file and the first the index.

        Raises:
            OutputError: as of `replacing`; they don't fit their file system; another process is writing to the folder,
                or has done so since they were planned, or one of those that write together is gone.
        """
        check_space(self.index, sum(self.files().values()))
        ranks = Ranks() if ranks is None else ranks
        with accounting() as noted, alone_in(self.index.parent) if ranks.rank == 0 else contextlib.nullcontext():
            noted.began = True
            if not all(_is_free(self.index.with_name(name)) for name in self.plans):
                raise OutputError(f"{self.index.parent}: another process has written to it meanwhile")
            ranks.wait()  # until nobody looks any more whether a name is free
            self._write(noted, ranks, force, progress)

    def _write(self, noted: Account, ranks: Ranks, force: bool, progress: Progress | None) -> None:
        target = check_target(self.index, force=force)
        paths = [self.index.with_name(name) for name in self.plans]
        mine, arrived = paths[ranks.rank :: ranks.count], False
        old = named_beside(target) - self.plans.keys() if ranks.rank == 0 else set()
        try:
            for path in mine:
                self.plans[path.name].write(path, force=False, progress=progress)
                noted.unfinished[path.absolute()] = None
            arrived = True
            ranks.wait()
            if ranks.rank == 0:
                self._check_there()
                with replacing(self.index, force=force, progress=progress, size=len(self.text)) as file:
                    file.write(self.text)
            ranks.wait()
        except BaseException:
            if ranks.rank == 0 and noted.has_written(target):  # its files belong to it
                self._finish(noted, old)
            elif ranks.rank == 0 or not arrived:
                # Who has told the first that its files are there leaves them to it: the index may be there any moment.
                others = set(paths) - set(mine) if ranks.rank == 0 else ()
                discard(*filter(noted.has_written, mine), *others)
            raise
        self._finish(noted, old)

    def _check_there(self) -> None:
        """See that every file is there, whichever process has written it."""
        for path, size in list(self.files().items())[1:]:
            if not path.is_file() or path.stat().st_size != size:
                raise OutputError(f"{path}: isn't there as it was written")

    def _finish(self, noted: Account, old: set[str]) -> None:
        """Remove files that no index names any more; one that stays does no harm, and is noted."""
        noted.finishes(self.index.with_name(name).absolute() for name in self.plans)
        paths = [self.index.with_name(name) for name in sorted(old)]
        noted.unfinished.update(dict.fromkeys(path.absolute() for path in paths))
        discard(*paths)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and keep other processes from replacing several files of it meanwhile.

    One that was made goes again where nothing came of it. Of processes that come at once, one has it, always: a folder
    is removed by none but who has it, and who has it sees that it is still the one of that name. Systems without locks
    leave it to the names of the files, which only one process can take.

    Raises:
        OutputError: another process is writing to it, or it cannot be made.
    """
    made, descriptor = False, None
    with asked(folder, "written", OutputError):
        for attempt in itertools.count():
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made = True
            try:
                descriptor = _opened(folder)
                break
            except FileNotFoundError:  # whoever had made it has removed it; or it is a link to nowhere
                if attempt == ATTEMPTS:
                    raise
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty: the index is there
                folder.rmdir()
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _opened(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock; None on a system without locks."""
    if not hasattr(os, "O_DIRECTORY"):
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if lock_file(descriptor) is False:
            raise OutputError(f"{folder}: another process is writing to it")
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, "it was replaced by another process")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
