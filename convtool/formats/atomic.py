"""The one way in which a file comes into being: its name holds what was there before, or the whole, checked new one.

Whatever is written goes this way:
- a file whose size is known before its bytes are made is a `FilePlan`, and `FilePlan.write` writes it;
- any other (a picture, a loader, a small text) is written inside of `with replacing(path, force=...) as file`;
- where two files belong together, the `with` of one stands inside the other's: both are complete before one has a name;
- several files and the index that names them go through `convtool.formats.several`.

An error says what went wrong. What is there now is noted as it happens (`convtool.formats.account`), and said once, by
the command line: no message here claims anything about it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from convtool.errors import ConvtoolError, OutputError, human_bytes
from convtool.formats.account import account
from convtool.formats.resources import asked, reason

WRITE_BACK_BYTES = 16 << 20  # written between two nudges to the disk
TEMPORARY = ".convtool-{}.tmp"  # what an unfinished file is called; one left over (by SIGKILL) can be deleted
RANDOM_BYTES = 8  # in its name, as hexadecimal digits
STALE = 3600  # seconds; some network file systems keep locks to one machine, but tell all when a file was written to

Progress: TypeAlias = Callable[[int], None]  # is told how many bytes were written since it was told last
Advice: TypeAlias = Callable[[int, int], str]  # what to do where so many bytes don't fit into so many free ones


def check_target(path: Path, *, force: bool) -> Path:
    """Return where a write to `path` will go, symlinks followed; called early, so that nothing is computed in vain.

    Raises:
        OutputError: it exists (without `force`), isn't a regular file, or its folder isn't there.
    """
    with asked(path, "written", OutputError):
        if "\0" in str(path):
            raise OutputError(f"{path}: cannot be written: no file name holds a null character")
        target = path.resolve() if path.is_symlink() else path
        if target.is_symlink():  # since Python 3.13 resolving a circle is no error
            raise OutputError(f"{path}: cannot be written: its links lead in a circle")
        if not target.parent.is_dir():
            raise OutputError(f"{path}: the folder {target.parent} doesn't exist; create it first")
        if target.is_dir():
            raise OutputError(f"{path}: is a folder; name a file in it")
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise OutputError(f"{path}: is not a regular file, and only a regular file can be replaced as a whole")
        if target.exists() and not force:
            raise OutputError(f"{path}: exists already; use --force to overwrite it")
    return target


def check_space(path: Path, size: int, advice: Advice | None = None) -> None:
    """Refuse to write `size` bytes for `path` where its file system hasn't as many left; one that doesn't tell passes.

    Args:
        path: of the file that will have them; where its folder is yet to be made, the nearest one above it counts.
        advice: what to add to the message.

    Raises:
        OutputError: it hasn't, or the folder cannot be looked at.
    """
    with asked(path, "written", OutputError):
        folder = (path.resolve() if path.is_symlink() else path).parent
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        usage = shutil.disk_usage(there)
    if usage.total and size > usage.free:
        needs = f"{path}: needs {human_bytes(size)}, and its file system has {human_bytes(usage.free)} free"
        raise OutputError(needs + (advice(size, usage.free) if advice else ""))


@dataclass(frozen=True)
class FilePlan:
    """A file that is to be written; nothing of it is, yet.

    Attributes:
        size: in bytes, exactly.
        fill: writes all of it to a file from the start.
        check: opens what was written with another reader than the one who wrote it; OutputError where it isn't what it
            was to be.
    """

    size: int
    fill: Callable[[Written], None]
    check: Callable[[Path], None]

    def write(self, path: Path, *, force: bool, progress: Progress | None = None, advice: Advice | None = None) -> None:
        """Write it, wholly and checked, or not at all.

        Args:
            progress: the numbers that it is told add up to `size`.
            advice: as of `check_space`.

        Raises:
            OutputError: as of `replacing`, it doesn't fit its file system, or what was written isn't what was to be.
        """

        def check(at: Path) -> None:
            found = at.stat().st_size
            try:
                if found != self.size:
                    raise OutputError(f"{found} bytes were written instead of {self.size}")
                self.check(at)
            except OutputError as error:
                raise OutputError(f"{path}: {error}") from None
            except (ConvtoolError, ValueError, zipfile.BadZipFile) as error:  # what a reader says of it
                raise OutputError(f"{path}: the file read back is damaged ({error})") from None

        check_target(path, force=force)
        check_space(path, self.size, advice)
        with replacing(path, force=force, check=check, progress=progress, size=self.size) as file:
            self.fill(file)


@contextlib.contextmanager
def replacing(
    path: Path,
    *,
    force: bool,
    check: Callable[[Path], None] = lambda path: None,
    progress: Progress | None = None,
    size: int | None = None,
) -> Iterator[Written]:
    """Open a binary file that becomes `path` when the block ends well, and vanishes if not.

    It is written beside the target, synced, handed to `check` (which raises where it is not what it should be), and
    renamed, if the files that were read are still what they were; then the folder is synced. A target's mode is kept;
    without `force`, one that appeared is left alone. `size`, in bytes, is for the message where there is no room.

    Raises:
        OutputError: `check_target`'s reasons, or the write failed (full disk, no permission, ...).
        InputError: a file that was read has changed.
    """
    target = check_target(path, force=force)
    temporary, ours, lock = _begun(target), None, None
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with Written(descriptor, progress) as file:
            ours, lock = os.fstat(descriptor), os.dup(descriptor)
            lock_file(lock)  # until the file has its name
            yield file
            _seal(file, temporary, target)
        check(temporary)
        account().writes(target, ours)
        _publish(temporary, target, force=force)
    except BaseException as error:
        if not force and ours is not None:
            _take_back(target, ours)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written: {reason(error, size)}") from None
        raise
    finally:
        discard(temporary)
        if lock is not None:
            os.close(lock)


def _begun(target: Path) -> Path:
    """Return the name of an unfinished file beside a target, noted as one; what killed writes have left there goes."""
    _remove_stale(target.parent)
    path = target.with_name(TEMPORARY.format(secrets.token_hex(RANDOM_BYTES))).absolute()
    noted = account()
    noted.began, noted.unfinished[path] = True, None
    return path


def _seal(file: Written, temporary: Path, target: Path) -> None:
    """Give a file that is written the mode of the target, or a new file's, and bring it to the disk."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
    file.flush()
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), mode)
    else:
        temporary.chmod(mode)
    os.fsync(file.fileno())


def lock_file(descriptor: int) -> bool | None:
    """Lock a file for as long as its descriptor, or a copy of it, is open.

    Returns:
        False where another process has; None where the system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):  # a file system without locks, or Windows
        return None
    return True


def _remove_stale(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder: nobody holds it, nor has written to it for long."""
    with contextlib.suppress(OSError):
        for path in folder.glob(TEMPORARY.format("[0-9a-f]" * 2 * RANDOM_BYTES)):  # not what others name alike
            with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
                if stat.S_ISREG(path.lstat().st_mode) and time.time() - path.lstat().st_mtime >= STALE:
                    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                    opened.callback(os.close, descriptor)
                    if lock_file(descriptor):
                        path.unlink()


class Written(io.BufferedRandom):
    """A file that has the disk work while it is written: the final fsync then has little left to wait for.

    Args:
        descriptor: of the file, open for reading and writing; closed with it.
        progress: what is written a second time, after a seek back, counts once.
    """

    def __init__(self, descriptor: int, progress: Progress | None = None) -> None:
        super().__init__(io.FileIO(descriptor, "r+"))
        self._progress = progress
        self._position = self._reported = 0
        self._waiting = self._started = 0  # bytes written since the disk was last told, and up to where it was

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]  # Buffer is 3.12's
        return self._counted(super().write(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = super().seek(offset, whence)
        return self._position

    def send(self, descriptor: int, start: int, count: int, /) -> int:
        """Write up to `count` bytes of another file from `start`, copied within the kernel.

        Returns:
            how many bytes were written; 0 where the systems of the two files can't, or at the end of the other one.
        """
        self.flush()
        position = self.tell()
        try:
            sent = os.sendfile(self.fileno(), descriptor, start, count)
        except (OSError, AttributeError):  # AttributeError: a system without it
            sent = 0
        super().seek(position + sent)  # the kernel has moved on without telling
        return self._counted(sent)

    def _counted(self, written: int) -> int:
        self._position += written
        if self._progress is not None and self._position > self._reported:
            self._progress(self._position - self._reported)
            self._reported = self._position
        self._waiting += written
        if self._waiting >= WRITE_BACK_BYTES:
            self._start_writing_back()
        return written

    def _start_writing_back(self) -> None:
        # To Linux, "not needed" of bytes not on disk yet means to start writing them, without waiting for it.
        advise, position = getattr(os, "posix_fadvise", None), self._position
        if advise is not None and position > self._started:
            with contextlib.suppress(OSError):  # a file system that takes no advice
                advise(self.fileno(), self._started, position - self._started, os.POSIX_FADV_DONTNEED)
        self._waiting, self._started = 0, position


def discard(*paths: Path) -> None:
    """Remove files that are there and can be removed; a signal that comes meanwhile is heard afterwards."""
    try:
        for path in paths:
            _unlink(path)
    except BaseException:  # which comes once
        for path in paths:
            _unlink(path)
        raise


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        account().removes(path)


def _take_back(target: Path, ours: os.stat_result) -> None:
    """Remove a new file that has its name already, and only that; one that was replaced could not be put back."""
    with contextlib.suppress(OSError):
        if os.path.samestat(target.lstat(), ours):
            discard(target)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk.

    Raises:
        OutputError: the disk refused.
    """
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps its names by itself
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):  # a file system that syncs its folders by itself
            return
        raise OutputError(
            f"{folder}: the folder could not be synced ({reason(error)});"
            " a power failure now might undo the writing of a file in it"
        ) from None


def _publish(temporary: Path, target: Path, *, force: bool) -> None:
    """Give a file its name, on the disk too; without `force`, only where nothing has it."""
    try:
        if not force:
            os.link(temporary, target)  # unlike a rename, this never replaces a file
    except (OSError, AttributeError):  # it exists; or a file system, or a system, without hard links
        if target.exists():
            raise OutputError(f"{target}: was created by another program meanwhile; it was left alone") from None
        force = True
    if force:
        temporary.replace(target)
    sync_folder(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
