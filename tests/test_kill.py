"""Nothing is lost, whatever ends a write: at OUT stands what was there before, or the whole new checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import faults
import pytest
import torch
from checkpoints import files_in, save, small_network
from faults import in_folder

from convtool import open_checkpoint
from convtool.cli.app import run_app


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def found(action: Callable[[], tuple[int, list[str]]]) -> tuple[int, list[str]]:
    """Return how many runs there were and what was wrong of them, found in a process of its own."""
    ended = in_folder(Path("/"), lambda: print(json.dumps(action())) or 0)
    assert ended.code == 0, ended
    runs, wrong = json.loads(ended.out)
    return runs, wrong


def test_a_fault_at_any_step_leaves_the_old_or_the_new() -> None:
    """A sample of `make faults`; the number of faults is there so that none of them can quietly stop happening."""
    runs, wrong = found(lambda: faults.table(sample=100, quiet=True))
    assert wrong == []
    assert runs >= 70


def test_of_two_processes_that_write_the_same_one_wins() -> None:
    assert found(lambda: faults.race(2)) == (20, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk that can be filled takes the right to mount one")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out/model.safetensors.index.json"])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_said_and_changes_nothing(
    small_disk: Path,
    tmp_path: Path,
    out: str,
    existing: bool,
    foreseen: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that only fills up while it is written to."""
    small = save(small_network(), tmp_path / "small.pt")
    large = save(small_network() | {f"more{n}": torch.rand(2500) for n in range(8)}, tmp_path / "large.pt")
    flags = ["--force", *(["--shard-size", "30KB"] if "/" in out else [])]
    if existing:
        assert run_app(["convert", str(small), str(small_disk / out), *flags]) == 0
    before = files_in(small_disk)
    capsys.readouterr()
    if not foreseen:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    assert run_app(["convert", str(large), str(small_disk / out), *flags]) == 5
    assert ("and its file system has" if foreseen else "No space left on device") in capsys.readouterr().err
    assert files_in(small_disk) == before
    assert not existing or list(open_checkpoint(small_disk / out).infos) == list(small_network())
