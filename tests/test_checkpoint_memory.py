"""However large a checkpoint is, changing a layer of it takes little memory: it is read in parts and streamed out."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import clean
import pytest
import torch
from checkpoints import raw_safetensors

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.write import plan_edited

SIZE = 400 << 20  # bytes of tensors that aren't touched
WRITTEN = (("out.safetensors", None), ("out.pt", None), ("again.pt", None), ("half.pt", "float16"))
MOST = 40 << 20  # bytes of memory that a write may take, beside what the process has before it


def anonymous() -> int:
    """Return how many bytes of memory are this process's own."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10


def grown_by_writes(folder: Path) -> dict[str, int]:
    """Write the large checkpoint in several forms; return by how many bytes the memory grew at its peak for each."""
    peak, done, grown, last = 0, False, {}, "large.safetensors"
    before = anonymous()

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    edit = Edit.of(["small.weight"], {"small.weight": torch.ones(2, 3, 4)}, "small.weight")
    for name, dtype in WRITTEN:
        peak = 0
        source = open_checkpoint(folder / last)
        plan_edited(source, edit, folder / name, None, force=False, dtype=dtype).write()
        assert len(open_checkpoint(folder / name).infos) == 5
        grown[name] = peak - before
        if last.endswith(".pt"):
            (folder / last).unlink()
        if name.endswith(".pt"):
            last = name
        else:
            (folder / name).unlink()
    done = True
    thread.join()
    return grown


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="how much memory is a process's own is Linux's to say"
)
def test_a_write_takes_little_memory_of_its_own(tmp_path: Path) -> None:
    part = SIZE // 4
    header = {"small.weight": {"dtype": "F32", "shape": [2, 3, 4], "data_offsets": [0, 96]}}
    for number in range(4):
        start = 96 + number * part
        entry = {"dtype": "F32", "shape": [part // 4096, 1024], "data_offsets": [start, start + part]}
        header[f"large{number}.weight"] = entry
    where = "/dev/shm" if Path("/dev/shm").exists() else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        path = Path(name) / "large.safetensors"
        path.write_bytes(raw_safetensors(header))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + 96 + SIZE)  # zeros that take no room
        grown = clean.called(grown_by_writes, Path(name))
    assert all(bytes_ < MOST for bytes_ in grown.values()), grown
