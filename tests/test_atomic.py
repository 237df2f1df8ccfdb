"""A file's name holds what was there before or the whole new file, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convtool.errors import InputError, OutputError
from convtool.formats.atomic import check_target, replacing
from convtool.formats.source import File

NOBODY = 65534


def write(path: Path, data: bytes = b"new", *, force: bool = False) -> None:
    with replacing(path, force=force) as file:
        file.write(data)


def write_then(path: Path, step: Callable[[], None], *, force: bool) -> None:
    """Write, with something happening before the file is complete."""
    with replacing(path, force=force) as file:
        file.write(b"ours")
        step()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_file_gets_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(previous)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert left_in(tmp_path) == {"out"}


def test_an_existing_file_is_left_alone_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already; use --force"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert left_in(tmp_path) == {"out"}


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_force_replaces_the_file_and_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    (tmp_path / "out").write_bytes(b"the old one")
    (tmp_path / "out").chmod(mode)
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_the_file_is_another_one_so_that_a_reader_of_the_old_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with (tmp_path / "out").open("rb") as reader:
        write(tmp_path / "out", force=True)
        assert reader.read() == b"old"


def test_a_symlink_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "real").write_bytes(b"old")
    (tmp_path / "out").symlink_to(Path("elsewhere") / "real")
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert (folder / "real").read_bytes() == b"new"
    assert left_in(folder) == {"real"}
    assert left_in(tmp_path) == {"out", "elsewhere"}


def test_a_symlink_to_a_file_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path / "out")
    assert (tmp_path / "real").read_bytes() == b"old"


def test_a_dangling_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("later")
    write(tmp_path / "out")
    assert (tmp_path / "later").read_bytes() == b"new"
    assert (tmp_path / "out").is_symlink()


def test_symlinks_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "a", force=True)


def test_a_folder_a_fifo_and_a_device_are_refused_and_stay(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path / "folder", force=True)
    for special in (tmp_path / "fifo", Path(os.devnull)):
        with pytest.raises(OutputError, match="not a regular file"):
            write(special, force=True)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    assert left_in(tmp_path) == {"folder", "fifo"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/such/folder/out", "doesn't exist"), ("file/out", "doesn't exist"), ("a\0b", "null"), ("x" * 300, "too long")],
)
def test_names_that_cannot_be_written_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=message):
        check_target(tmp_path / name, force=True)
    with pytest.raises(OutputError, match=message):
        write(tmp_path / name, force=True)
    assert left_in(tmp_path) == {"file"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError(), OutputError("no room")], ids=repr)
def test_an_exception_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "out").write_bytes(b"old")

    def fail() -> None:
        raise failure

    with pytest.raises(type(failure)):
        write_then(tmp_path / "out", fail, force=True)
    assert (tmp_path / "out").read_bytes() == b"old"
    assert left_in(tmp_path) == {"out"}


def test_a_check_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    seen = []

    def check(path: Path) -> None:
        seen.append(path.read_bytes())
        raise OutputError("not what it should be")

    with pytest.raises(OutputError, match="not what"), replacing(tmp_path / "out", force=True, check=check) as file:
        file.write(b"new")
    assert seen == [b"new"]
    assert (tmp_path / "out").read_bytes() == b"old"
    assert left_in(tmp_path) == {"out"}


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("step", ["open", "fchmod", "fsync", "replace"])
def test_a_system_call_that_fails_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, reason: int, force: bool
) -> None:
    if force:
        (tmp_path / "out").write_bytes(b"old")

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(reason, os.strerror(reason))

    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(os, "link", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match=os.strerror(reason)):
        write(tmp_path / "out", force=force)
    monkeypatch.undo()
    assert left_in(tmp_path) == ({"out"} if force else set())
    assert not force or (tmp_path / "out").read_bytes() == b"old"


def test_a_file_that_another_program_created_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def appear() -> None:
        (tmp_path / "out").write_bytes(b"theirs")

    with pytest.raises(OutputError, match="created by another program"):
        write_then(tmp_path / "out", appear, force=False)
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert left_in(tmp_path) == {"out"}


@pytest.mark.parametrize("appeared", [False, True])
def test_a_file_system_without_hard_links_does_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appeared: bool
) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    if appeared:
        with pytest.raises(OutputError, match="another program"), replacing(tmp_path / "out", force=False):
            (tmp_path / "out").write_bytes(b"theirs")
        assert (tmp_path / "out").read_bytes() == b"theirs"
    else:
        write(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"new"
    assert left_in(tmp_path) == {"out"}


@pytest.mark.parametrize("force", [True, False])
def test_a_folder_that_cannot_be_synced_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """What was replaced cannot be put back; what is new can be taken back."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="the folder could not be synced"):
        write(tmp_path / "out", force=force)
    assert files_of(tmp_path) == ({"out": b"new"} if force else {})


def test_data_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with replacing(tmp_path / "out", force=True, check=lambda path: steps.append("check")) as file:
        file.write(b"new")
    assert steps == ["data", "check", "rename", "folder"]


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder that this process may not write to, also where the tests run as root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "old").write_bytes(b"old")
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_read_only_folder_is_refused_with_the_reason(read_only_folder: Path) -> None:
    for name in ("new", "old"):
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            write(read_only_folder / name, force=True)
    assert left_in(read_only_folder) == {"old"}
    assert (read_only_folder / "old").read_bytes() == b"old"


def sent(count: int | None) -> Callable[[int, int, int, int], int]:
    """os.sendfile as systems have it: at most so many bytes at a time, then an error; None for one that can't."""
    left = [0] if count is None else [count] * 3

    def sendfile(target: int, source: int, start: int, wanted: int) -> int:
        if not left:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        asked = min(wanted, left.pop())
        if not asked:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(target, source, start, asked)

    real = os.sendfile
    return sendfile


@pytest.mark.parametrize("system", ["as it is", "7 bytes at a time", "one that can't", "one without"])
def test_bytes_copied_within_the_kernel_are_the_same_as_those_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    data = bytes(range(256)) * 5
    (tmp_path / "in").write_bytes(data)
    if system == "one without":
        monkeypatch.delattr(os, "sendfile")
    elif system != "as it is":
        monkeypatch.setattr(os, "sendfile", sent(7 if system.startswith("7") else None))
    told: list[int] = []
    with replacing(tmp_path / "out", force=False, progress=told.append) as file:
        source = File(tmp_path / "in")
        file.write(b"head")
        source.copy_to(file, 3, 1000)
        file.write(b"between")
        source.copy_to(file, 900, 900)
        source.copy_to(file, 0, len(data))
        file.seek(1)
        file.write(b"E")
        file.seek(4 + 997 + 7 + len(data))
        file.write(b"tail")
    written = b"hEad" + data[3:1000] + b"between" + data + b"tail"
    assert (tmp_path / "out").read_bytes() == written
    assert sum(told) == len(written)


def test_a_source_that_becomes_shorter_while_it_is_copied_is_said(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(100))
    source = File(tmp_path / "in")
    os.truncate(tmp_path / "in", 60)
    with (
        pytest.raises(InputError, match="became shorter while it was read"),
        replacing(tmp_path / "out", force=False) as file,
    ):
        source.copy_to(file, 0, 100)
    assert left_in(tmp_path) == {"in"}


def left_over(path: Path, *, old: bool = True) -> Path:
    path.write_bytes(b"half of it")
    if old:
        os.utime(path, (0, 0))
    return path


def test_what_a_killed_write_left_is_removed_by_a_later_one_and_nothing_else_is(tmp_path: Path) -> None:
    left_over(tmp_path / ".convtool-0123456789abcdef.tmp")
    left_over(tmp_path / ".convtool-456789abcdef0123.tmp", old=False)  # somebody may be about to write to it
    held = left_over(tmp_path / ".convtool-89abcdef01234567.tmp")  # by a process that is stopped
    for name in ("convtool-0123456789abcdef.tmp", ".convtool-notes.tmp", ".convtool-0123456789ABCDEF.tmp"):
        left_over(tmp_path / name)
    left_over(tmp_path / "elsewhere")
    (tmp_path / ".convtool-00000000000000aa.tmp").symlink_to("elsewhere")
    (tmp_path / ".convtool-00000000000000bb.tmp").mkdir()
    before = left_in(tmp_path)
    with held.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        write(tmp_path / "out")
    assert left_in(tmp_path) == before - {".convtool-0123456789abcdef.tmp"} | {"out"}
    write(tmp_path / "again")
    assert not held.exists()


@pytest.mark.parametrize("force", [True, False])
def test_a_file_is_held_from_its_first_byte_until_it_has_its_name(tmp_path: Path, force: bool) -> None:
    """However slow the write is, another one in the folder leaves it alone."""

    def other(path: Path | None = None) -> None:
        for temporary in tmp_path.glob(".convtool-*.tmp"):
            os.utime(temporary, (0, 0))
        write(tmp_path / "other", force=True)

    with replacing(tmp_path / "out", force=force, check=other) as file:
        other()
        file.write(b"slow")
        other()
    assert files_of(tmp_path) == {"out": b"slow", "other": b"new"}


def test_a_file_system_without_locks_keeps_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left_over(tmp_path / ".convtool-0123456789abcdef.tmp")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(tmp_path / "out")
    assert left_in(tmp_path) == {".convtool-0123456789abcdef.tmp", "out"}
