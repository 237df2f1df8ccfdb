"""Writing a file so that its name holds either what was there before or the whole, checked new one."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from convtool.errors import OutputError

if sys.platform != "win32":
    import fcntl

WRITE_BACK_BYTES = 16 << 20  # written between two nudges to the disk
TEMPORARY = ".convtool-{}.tmp"  # what an unfinished file is called; one left over (by SIGKILL) can be deleted
RANDOM_BYTES = 8  # in its name, as hexadecimal digits
STALE = 3600  # seconds; some network file systems keep locks to one machine, but tell all when a file was written to


def check_target(path: Path, *, force: bool) -> Path:
    """Where a write to `path` will go, symlinks followed; called early, so that nothing is computed in vain.

    Raises:
        OutputError: it exists (without `force`), isn't a regular file, or its folder isn't there.
    """
    try:
        if "\0" in str(path):
            raise OutputError(f"{path}: cannot be written: no file name holds a null character")
        target = path.resolve() if path.is_symlink() else path
        if not target.parent.is_dir():
            raise OutputError(f"{path}: the folder {target.parent} doesn't exist; create it first")
        if target.is_dir():
            raise OutputError(f"{path}: is a folder; name a file in it")
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise OutputError(f"{path}: is not a regular file, and only a regular file can be replaced as a whole")
        if target.exists() and not force:
            raise OutputError(f"{path}: exists already; use --force to overwrite it")
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from None
    return target


@contextlib.contextmanager
def replacing(path: Path, *, force: bool, check: Callable[[Path], None] | None = None) -> Iterator[Written]:
    """A binary file, open for writing and reading, that becomes `path` when the block ends well, and vanishes if not.

    It is written beside the target, synced, handed to `check` (which re-reads it and raises where it is not what it
    should be), and renamed; then the folder is synced. An existing target's mode is kept. Without `force` a target
    that appeared meanwhile is left alone.

    Raises:
        OutputError: `check_target`'s reasons, or the write failed (full disk, no permission, ...).
    """
    target = check_target(path, force=force)
    _remove_stale(target.parent)
    temporary = target.with_name(TEMPORARY.format(secrets.token_hex(RANDOM_BYTES)))
    ours: os.stat_result | None = None
    lock: int | None = None
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with Written(descriptor) as file:
            ours = os.fstat(descriptor)
            lock = os.dup(descriptor)  # holds it until the file has its name
            _locked(lock)
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        _publish(temporary, target, force=force)
        sync_folder(target.parent)
    except BaseException as error:
        if not force and ours is not None:
            _take_back(target, ours)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written: {_reason(error)}; nothing was changed") from None
        raise
    finally:
        discard(temporary)
        if lock is not None:
            os.close(lock)


def _locked(descriptor: int) -> bool:
    """Lock a file for as long as its descriptor, or a copy of it, is open; False where another process has."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # or a file system without locks
        return False
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A folder in which no other process replaces several files at once meanwhile; not so on systems without locks.

    Raises:
        OutputError: another process does already.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {_reason(error)}; nothing was changed") from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{folder}: another process is writing to it; nothing was changed") from None
        yield
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder: nobody holds it, nor has written to it for long."""
    with contextlib.suppress(OSError):
        for path in folder.glob(TEMPORARY.format("[0-9a-f]" * 2 * RANDOM_BYTES)):  # not what others name alike
            with contextlib.suppress(OSError):
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode) or time.time() - path.lstat().st_mtime < STALE:
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if _locked(descriptor):
            path.unlink()
    finally:
        os.close(descriptor)


class Written(io.BufferedRandom):
    """A file that has the disk work while it is written: the final fsync then has little left to wait for.

    Args:
        descriptor: of the file, open for reading and writing; closed with it.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(io.FileIO(descriptor, "r+"))
        self._waiting = self._started = 0  # bytes written since the disk was last told, and up to where it was

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]  # Buffer is 3.12's
        return self._counted(super().write(data))

    def send(self, descriptor: int, start: int, count: int, /) -> int:
        """Write up to `count` bytes of another file from `start`, copied within the kernel.

        Returns:
            how many bytes were written; 0 where the systems of the two files can't, or at the end of the other one.
        """
        if not hasattr(os, "sendfile"):
            return 0
        self.flush()
        position = self.tell()
        try:
            sent = os.sendfile(self.fileno(), descriptor, start, count)
        except OSError:
            sent = 0
        self.seek(position + sent)  # the kernel has moved on without telling
        return self._counted(sent)

    def _counted(self, written: int) -> int:
        self._waiting += written
        if self._waiting >= WRITE_BACK_BYTES:
            self._start_writing_back()
        return written

    def _start_writing_back(self) -> None:
        # To Linux, "not needed" of bytes not on disk yet means to start writing them, without waiting for it.
        advise, position = getattr(os, "posix_fadvise", None), self.tell()
        if advise is not None and position > self._started:
            with contextlib.suppress(OSError):  # a file system that takes no advice
                advise(self.fileno(), self._started, position - self._started, os.POSIX_FADV_DONTNEED)
        self._waiting, self._started = 0, position


def discard(path: Path) -> None:
    """Remove a file if it is there and can be removed; a signal that comes meanwhile is heard afterwards."""
    try:
        with contextlib.suppress(OSError):
            path.unlink()
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


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
            f"{folder}: the folder could not be synced ({_reason(error)});"
            " a power failure now might undo the writing of a file in it"
        ) from None


def _publish(temporary: Path, target: Path, *, force: bool) -> None:
    if force:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, this never replaces a file
    except FileExistsError:
        raise OutputError(f"{target}: was created by another program meanwhile; it was left alone") from None
    except OSError:  # a file system without hard links
        if target.exists():
            raise OutputError(f"{target}: was created by another program meanwhile; it was left alone") from None
        temporary.replace(target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
