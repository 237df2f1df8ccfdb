"""The promises about disk, signals and resources, a case for each way in which one was broken once."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import files_in, save, small_network, write_edited
from damage import good_files
from faults import TICK, Ended, in_folder
from hypothesis import given
from hypothesis import strategies as st
from shell import cli
from torch import Tensor

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.cli.app import run_app
from convtool.errors import InputError, OutputError
from convtool.formats import pieces, several, source
from convtool.formats.account import accounting
from convtool.formats.pieces import same_bytes, tensor_chunks
from convtool.formats.several import alone_in
from convtool.matrix.read import load_matrix
from convtool.matrix.shards import index_path

FAR = (
    "fuse wide.pt a b -o out.pt --allow-border --set b.dilation={}"
    " --set '*.stride=1' --set '*.padding=0' --set '*.groups=1' --set a.dilation=1"
)
MATRIX = "toeplitz net.pt stem.first --input-size 7,6 --padding 1 -q -o"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a checkpoint in both formats."""
    monkeypatch.chdir(tmp_path)
    for suffix in ("pt", "safetensors"):
        save(small_network(), Path(f"net.{suffix}"))
    save({"a.weight": torch.ones(3, 2, 3, 3), "b.weight": torch.ones(4, 3, 3, 3)}, Path("wide.pt"))
    return tmp_path


def failing_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Have something happen before the given call of a function, counted from 1."""
    real, count = getattr(module, name), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- the output is the old one or the new one


@pytest.mark.parametrize("step", range(1, 7))
def test_a_failed_replacement_of_a_matrix_in_shards_keeps_the_old_one(
    here: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(f"{MATRIX} m.safetensors --shards 2").code == 0
    before, old = files_in(here), load_matrix("m.safetensors.index.json").to_dense()
    failing_at(monkeypatch, os, "fsync", step, full)
    run = cli(f"{MATRIX.replace('--padding 1', '--padding 2')} m.safetensors --shards 2 --force")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    if step < 6:
        assert (run.code, files_in(here)) == (5, before)
        assert run.message.endswith("No space left on device; it takes 4.5 KiB; nothing was changed") or (
            "No space left" in run.message and run.message.endswith("nothing was changed")
        )
    else:  # the last is of the folder, after the index has its name
        assert (run.code, "written before that: m.safetensors.index.json" in run.message) == (5, True)
        assert not torch.equal(load_matrix("m.safetensors.index.json").to_dense(), old)


def test_a_picture_that_cannot_be_written_keeps_the_matrix_from_being_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    before = files_in(here)
    failing_at(monkeypatch, os, "fsync", 1, full)
    run = cli(f"{MATRIX} m.npz --plot m.png")
    assert (run.code, files_in(here)) == (5, before)
    assert run.message.endswith("nothing was changed")


def test_a_message_names_what_was_written_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    failing_at(monkeypatch, os, "fsync", 3, full)  # the matrix's, its folder's, the picture's
    run = cli(f"{MATRIX} m.npz --plot m.png")
    assert (run.code, run.message.endswith("; written before that: m.npz")) == (5, True)
    assert (here / "m.npz").exists()
    assert not (here / "m.png").exists()


@pytest.mark.parametrize("raced", ["made", "removed"])
def test_a_folder_that_another_process_makes_or_removes_meanwhile(
    here: Path, raced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two processes that come at once has it; once, both gave up."""
    real, calls = Path.mkdir, 0

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        real(self, *arguments, **options)
        if calls == 1 and raced == "made":
            raise FileExistsError(errno.EEXIST, "File exists")
        if calls == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert cli("convert net.pt out --shard-size 100B").code == 0
    assert calls == (1 if raced == "made" else 2)
    assert list(open_checkpoint("out").infos) == list(small_network())


def test_a_folder_that_is_replaced_while_it_is_locked_is_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on the one that is gone would keep nobody from the one that has its name."""
    folder = tmp_path / "out"

    def replace() -> None:
        folder.rmdir()
        folder.mkdir()

    failing_at(monkeypatch, several, "lock_file", 1, replace)
    with alone_in(folder), pytest.raises(OutputError, match="another process is writing to it"), alone_in(folder):
        pass


def test_a_link_to_nowhere_is_no_folder(here: Path) -> None:
    (here / "out").symlink_to("nowhere")
    run = cli("convert net.pt out --shard-size 100B")
    assert (run.code, "out: cannot be written" in run.message) == (5, True)


# --- a source that changes


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 8)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rename_over(path: Path) -> None:
    shutil.copyfile(path, path.with_name("theirs"))
    path.with_name("theirs").replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "was written to": rewrite,
    "was cut short": cut,
    "is another file": rename_over,
    "is gone": Path.unlink,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("existing", [True, False])
def test_what_rests_on_a_file_that_changed_meanwhile_is_not_written(
    here: Path, how: str, suffix: str, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"fuse net.{suffix} stem.first stem.second -o out.{suffix} --assume-defaults -q --no-verify"
    line = f"convert net.{suffix} out.{suffix}" if existing else line
    line = f"convert net.{suffix} out.{suffix}"
    if existing:
        assert cli(line).code == 0
        (here / f"out.{suffix}").write_bytes(b"old")
    before = files_in(here)
    time.sleep(0.02)  # the file system's clock has ticks
    failing_at(monkeypatch, os, "fsync", 1, lambda: CHANGES[how](here / f"net.{suffix}"))
    run = cli(f"{line}{' --force' if existing else ''}")
    said = "was written to" if how == "was cut short" else how
    assert (run.code, f"net.{suffix}: changed while it was read: it {said};" in run.message) == (3, True), run
    assert run.message.endswith("; nothing was changed")
    after = files_in(here)
    assert {name for name in after if name.startswith("out")} == {name for name in before if name.startswith("out")}
    assert after.get(f"out.{suffix}") == before.get(f"out.{suffix}")


def test_what_a_run_replaces_or_removes_itself_has_not_changed(here: Path) -> None:
    assert cli("convert net.pt out --shard-size 100B").code == 0
    assert cli("convert out out --shard-size 200B --force").code == 0
    assert cli("convert net.pt net.pt --force").code == 0
    assert list(open_checkpoint("out").infos) == list(open_checkpoint("net.pt").infos) == list(small_network())


@pytest.mark.parametrize(
    "line", ["inspect net.pt --json", "verify net.pt net.safetensors --json", "spectrum net.pt head --json"]
)
def test_no_verdict_rests_on_a_file_that_changed_meanwhile(
    here: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(0.02)
    failing_at(monkeypatch, os, "preadv", 3, lambda: os.utime(here / "net.pt"))
    run = cli(line)
    assert (run.code, run.document["error"]["kind"]) == (3, "input")
    assert "net.pt: changed while it was read" in run.document["error"]["message"]


@pytest.mark.parametrize("line", ["convert net.safetensors out.pt", "toeplitz {} stem.first --input-size 5,5 -o m.npz"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_file_that_is_cut_short_ends_nothing_but_the_run(here: Path, line: str, at: int) -> None:
    """A mapped one ended the process by SIGBUS."""

    def action() -> int:
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_at(monkeypatch, os, "preadv", at, lambda: os.truncate("net.safetensors", 100))
            return run_app(line.format("net.safetensors").split())

    ended = in_folder(here, action)
    assert ended.code == 3, ended
    assert "net.safetensors: " in ended.err


def test_a_matrix_is_read_without_being_mapped(here: Path) -> None:
    """As of a checkpoint: what it is cut short by is an error, in the midst of being compared."""
    assert cli("toeplitz net.pt stem.first --input-size 40,40 --padding 1 -q -o m.safetensors").code == 0

    def action() -> int:
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_at(monkeypatch, os, "preadv", 40, lambda: os.truncate("m.safetensors", 5000))
            return run_app(["verify", "net.pt", "m.safetensors", "-q"])

    ended = in_folder(here, action)
    assert (ended.code, "m.safetensors: " in ended.err) == (3, True), ended


# --- signals


def stalled(number: int) -> Callable[[], int]:
    """A run that a signal comes to while its output is synced."""

    def action() -> int:
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_at(monkeypatch, os, "fsync", 1, lambda: os.kill(os.getpid(), number))
            return run_app(["convert", "net.pt", "out", "--shard-size", "100B"])

    return action


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGHUP, "hangup"),
        (signal.SIGINT, "interrupted"),
        (signal.SIGQUIT, "quit"),
        (signal.SIGALRM, "alarm"),
        (signal.SIGTERM, "terminated"),
    ],
)
def test_every_signal_that_ends_a_run_leaves_nothing(here: Path, number: int, said: str) -> None:
    before = files_in(here)
    ended = in_folder(here, stalled(number))
    assert ended == Ended(128 + number, "", f"convtool: {said}; nothing was changed\n")
    assert files_in(here) == before
    assert not (here / "out").exists()


def test_a_signal_in_the_midst_of_a_finalizer_is_not_lost(here: Path) -> None:
    """Nothing is raised out of one: Python prints what was, and goes on."""

    class Closed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def finalize() -> None:
        Closed()
        time.sleep(60)

    def action() -> int:
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_at(monkeypatch, os, "fsync", 1, finalize)
            return run_app(["convert", "net.pt", "out.pt"])

    before = files_in(here)
    ended = in_folder(here, action)
    assert ended == Ended(143, "", "convtool: terminated; nothing was changed\n")
    assert files_in(here) == before


def test_a_signal_that_is_ignored_stays_so(here: Path) -> None:
    def action() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        return stalled(signal.SIGHUP)()

    assert in_folder(here, action).code == 0


def test_a_library_that_does_not_hear_a_signal_is_not_waited_for(here: Path) -> None:
    before = files_in(here)

    def deaf() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # another thread hears it, and this one sleeps on
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    def action() -> int:
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_at(monkeypatch, os, "fsync", 1, deaf)
            return run_app(["convert", "net.pt", "out.pt"])

    ended = in_folder(here, action)
    assert ended == Ended(143, "", "convtool: terminated; nothing was changed\n")
    assert files_in(here) == before


def test_runs_outside_of_the_main_thread_leave_signals_alone(here: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_app(["convert", "net.pt", "out.pt", "-q"])))
    thread.start()
    thread.join()
    assert codes == [0]


# --- what runs out


@pytest.mark.parametrize(
    ("limit", "most", "line", "code", "said"),
    [
        ("RLIMIT_FSIZE", 1000, "convert net.pt out.pt", 5, "File too large (the limit here is 1000 B); it takes "),
        ("RLIMIT_NOFILE", 9, "convert sharded out.pt", 3, "too many open files (the limit here is "),
        ("RLIMIT_AS", 64 << 20, FAR.format(2000), 3, "not enough memory: "),
    ],
)  # fmt: skip
def test_what_ran_out_has_a_name(here: Path, limit: str, most: int, line: str, code: int, said: str) -> None:
    state = {f"t{number}": torch.ones(3) for number in range(30)}
    save(state, here / "many.safetensors")
    assert cli("convert many.safetensors sharded --shard-size 12B").code == 0
    before = files_in(here)

    def action() -> int:
        taken = {"RLIMIT_NOFILE": len(os.listdir("/proc/self/fd")), "RLIMIT_AS": memory()}.get(limit, 0)  # noqa: PTH208
        resource.setrlimit(getattr(resource, limit), (taken + most,) * 2)
        return run_app(shlex.split(line))

    ended = in_folder(here, action)
    assert (ended.code, said in ended.err) == (code, True), ended
    assert files_in(here) == before


def memory() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("toeplitz net.pt stem.first --input-size 7,6 --padding 1000000 -o m.npz", 5, "needs 174.6 TiB"),
        (FAR.format(100000), 4, "check dilation, stride and padding"),
    ],
)  # fmt: skip
def test_hostile_sizes_are_refused_before_any_work(here: Path, line: str, code: int, said: str) -> None:
    run = cli(line)
    assert (run.code, said in run.message) == (code, True), run.message


# --- tensors however they lie in memory


@given(st.data())
def test_a_tensor_in_pieces_is_its_bytes_row_major(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    halved: bool = data.draw(st.booleans())
    if shape and halved:
        tensor = tensor[..., ::2]
    chunk = data.draw(st.integers(1, 6)) * 8
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pieces, "CHUNK", chunk)
        found = [bytes(piece) for piece in tensor_chunks(tensor)]
    assert b"".join(found) == tensor.contiguous().numpy().tobytes()
    assert all(len(piece) <= chunk for piece in found)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 1 << 18).t(),
        torch.zeros(1).expand(1 << 18, 4),
        torch.zeros(1 << 10, 2, 1 << 9).permute(2, 0, 1),
        torch.zeros(2, 1 << 19)[:, ::2],
    ],
    ids=["transposed", "expanded", "permuted", "every other"],
)
def test_pieces_are_few_however_a_tensor_lies(tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transposed one took 400 times as long as one in order: a piece for each of its rows."""
    monkeypatch.setattr(pieces, "CHUNK", 1 << 16)
    assert sum(1 for _ in tensor_chunks(tensor)) <= 2 * tensor.nbytes / (1 << 16) + 1


@given(st.binary(max_size=40), st.binary(max_size=40), st.data())
def test_rows_of_pieces_are_compared_however_they_are_cut(one: bytes, other: bytes, data: st.DataObject) -> None:
    def cut_up(text: bytes) -> list[memoryview]:
        places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
        return [memoryview(text)[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]

    assert same_bytes(cut_up(one), cut_up(other)) == (one == other)
    assert same_bytes(cut_up(one), cut_up(bytes(one)))


# --- names and indexes


@pytest.mark.parametrize(
    "out", ["o\udcff.safetensors", "o\udcff.pt", "f\udcff", "f\udcff/m\udcfe.safetensors.index.json"]
)
def test_names_that_are_not_unicode_are_names(here: Path, out: str) -> None:
    folder = here / "\udcff"
    folder.mkdir()
    for line in (
        ["convert", "net.pt", f"\udcff/{out}", *(["--shard-size", "100B"] if out[0] == "f" else [])],
        ["verify", "net.pt", f"\udcff/{out}"],
        ["convert", f"\udcff/{out}", "back.safetensors", "--force"],
    ):
        assert run_app(line) == 0
    assert list(open_checkpoint("back.safetensors").infos) == list(small_network())


@pytest.mark.parametrize("total", [float("nan"), -1, "many", 10**9, True, 1e400])
def test_an_index_with_an_impossible_size_is_damaged(here: Path, total: object) -> None:
    assert cli("convert net.pt out --shard-size 100B").code == 0
    index = here / "out" / "pytorch_model.bin.index.json"
    document = json.loads(index.read_text())
    document["metadata"]["total_size"] = total
    index.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"is damaged"):
        open_checkpoint("out")


@pytest.mark.parametrize(("tied", "off"), [(True, -1), (False, -1), (True, 0), (True, 1), (False, 1), (True, 2)])
def test_an_index_may_count_as_any_writer_does_and_less_is_said(here: Path, tied: bool, off: int) -> None:
    """The least is what is stored; a writer that counts tied tensors each comes to more than the files have."""
    state = {f"w{n}": torch.ones(500) for n in range(2)} | {"v": torch.ones(500)}
    if tied:
        state["w1"] = state["w0"]
    stored, each = 2000 * len({one.data_ptr() for one in state.values()}), 6000
    torch.save(state, "a.bin")
    total = {-1: stored - 1, 0: stored, 1: max(each, Path("a.bin").stat().st_size), 2: 9000}[off]
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(state, "a.bin")}
    Path("a.bin.index.json").write_text(json.dumps(index))
    if off == 2:
        with pytest.raises(InputError, match=r"is damaged: its total_size is 9000, and its files have"):
            open_checkpoint("a.bin.index.json")
        return
    assert each > Path("a.bin").stat().st_size or not tied
    run = cli("inspect a.bin.index.json")
    assert (run.code, f"its total_size is {total}, and the tensors" in run.err) == (0, off < 0)


@pytest.mark.parametrize("change", ["total_size", "bytes"])
def test_a_matrix_index_with_a_wrong_size_is_damaged(here: Path, change: str) -> None:
    assert cli(f"{MATRIX} m.safetensors --shards 2").code == 0
    index = index_path(here / "m.safetensors")
    document = json.loads(index.read_text())
    (document["metadata"] if change == "total_size" else document["shards"][0])[change] += 1
    index.write_text(json.dumps(document))
    with pytest.raises(InputError, match="is damaged"):
        load_matrix(index)


def test_bytes_are_read_in_pieces_and_no_more_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK", 7)
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    opened = source.File(path)
    for start, stop in itertools.combinations(range(0, 30, 3), 2):
        assert b"".join(map(bytes, opened.chunks(start, stop))) == bytes(range(start, stop))
    with opened.opened() as file:
        assert file.read(1 << 60) == bytes(range(100))  # for which there would be no room


# --- systems that lack something

LACKING: dict[str, tuple[tuple[Any, str], ...]] = {
    "locks": ((sys.modules, "fcntl"),),
    "sendfile": ((os, "sendfile"),),
    "posix_fadvise": ((os, "posix_fadvise"),),
    "fchmod": ((os, "fchmod"),),
    "hard links": ((os, "link"),),
    "preadv": ((os, "preadv"),),
    "folders that can be opened": ((os, "O_DIRECTORY"),),
    "signals": ((signal, "SIGHUP"), (signal, "SIGQUIT"), (signal, "SIGALRM")),
    "limits": ((sys.modules, "resource"),),
}
LACKING["what macOS lacks"] = LACKING["posix_fadvise"]
LACKING["what Windows lacks"] = tuple(
    one for name, some in LACKING.items() if name != "what macOS lacks" for one in some
)


@pytest.mark.parametrize("what", LACKING)
def test_a_system_that_lacks_a_call_keeps_the_promises(here: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "convert net.pt out.safetensors --force",
        "convert net.safetensors folder --shard-size 100B --force",
        f"{MATRIX} m.safetensors --shards 2 --force",
    ]
    assert all(cli(line).code == 0 for line in lines)
    expected = sorted(files_in(here).values())
    (here / "out.safetensors").chmod(0o640)
    for place, name in LACKING[what]:
        if isinstance(place, dict):
            monkeypatch.setitem(place, name, None)
        else:
            monkeypatch.delattr(place, name)
    assert all(cli(line).code == 0 for line in lines)
    assert sorted(files_in(here).values()) != []
    assert len(files_in(here)) == len(expected)
    assert stat.S_IMODE((here / "out.safetensors").stat().st_mode) == 0o640
    assert cli("convert net.pt out.safetensors").code == 5
    assert cli("convert net.pt new.safetensors").code == 0
    before = files_in(here)
    failing_at(monkeypatch, os, "fsync", 1, full)
    assert [cli(line).code for line in lines[:1]] == [5]
    assert files_in(here) == before


def test_a_system_that_renames_over_no_open_file_keeps_the_old_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.exists():
            raise PermissionError(errno.EACCES, "Access is denied")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    before = files_in(here)
    run = cli("convert net.pt net.safetensors --force")
    assert (run.code, run.message.endswith("Access is denied; nothing was changed")) == (5, True)
    assert files_in(here) == before


def test_memory_that_runs_out_while_options_are_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "zeros", none_left)
    assert run_app(["verify", "before.pt", "after.pt"]) == 3
    assert "not enough memory" in capsys.readouterr().err


# --- a checkpoint that several processes write (torch.distributed's), which is only read here


@pytest.mark.parametrize("change", ["a part is written to", "a part is replaced", "the table is replaced"])
def test_a_folder_of_parts_that_is_saved_again_meanwhile_is_an_error(tmp_path: Path, change: str) -> None:
    for name, data in good_files("folder").items():
        (tmp_path / name).write_bytes(data)
    with accounting():
        opened = open_checkpoint(tmp_path)
        changed = tmp_path / (".metadata" if "table" in change else "__0_0.distcp")
        if "replaced" in change:
            shutil.copy(changed, tmp_path / "new")
            (tmp_path / "new").replace(changed)
        else:
            data = changed.read_bytes()
            with changed.open("r+b") as file:
                time.sleep(TICK)
                file.write(data)
        with pytest.raises(InputError, match="changed while it was read"):
            write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", force=False)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_of_parts_whose_writers_were_killed_is_no_checkpoint(tmp_path: Path) -> None:
    """The table of contents comes last; an older one over fewer or shorter parts is damage."""
    files = good_files("folder")
    (tmp_path / "__0_0.distcp").write_bytes(files["__0_0.distcp"])
    with pytest.raises(InputError, match="folder without a checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(files[".metadata"])
    (tmp_path / "__0_0.distcp").write_bytes(files["__0_0.distcp"][:-100])
    with pytest.raises(InputError, match=r"is damaged: a part of .* is not in __0_0\.distcp"):
        open_checkpoint(tmp_path)
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        open_checkpoint(tmp_path)
