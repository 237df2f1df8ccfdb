"""Nothing is lost, whatever ends a write: at OUT stands what was there before, or the whole new checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoints import files_in, save, small_network

from convtool import open_checkpoint
from convtool.cli.app import run_app


class Usage(NamedTuple):
    total: int
    used: int
    free: int


SHARED_MEMORY = Path("/dev/shm")  # without a disk to wait for; what a killed process has written stays all the same


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        yield Path(name)


@pytest.mark.parametrize(("how", "least"), [("kill", 150), ("term", 150), ("fail", 80), ("random", 100), ("race", 24)])
def test_interrupted_writes_leave_the_old_or_the_new(how: str, least: int, fast_folder: Path) -> None:
    """See `interruptions`; the number of interruptions is there so that none of them can quietly stop happening."""
    script = Path(__file__).with_name("interruptions.py")
    done = subprocess.run(
        [sys.executable, str(script), how, str(fast_folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["interruptions"] >= least


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
