"""Fusing two layers of a large checkpoint, beside copying the file: time, and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.fusions import fuse
from bench.harness import OUTPUT, Candidate, Comparison, anonymous_mib_of, timed

CHUNK = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)  # 4 MiB
BODY = 64 << 20  # bytes of each tensor that isn't touched

# What there is otherwise: all of the checkpoint in memory, and out again.
IN_MEMORY = """
import os, sys
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

def job():
    tensors = load_file(sys.argv[1])
    first, second = tensors["first.weight"], tensors.pop("second.weight")
    tensors["first.weight"] = F.conv2d(first.transpose(0, 1), second.flip(2, 3)).transpose(0, 1).contiguous()
    save_file(tensors, sys.argv[2])
    with open(sys.argv[2], "rb") as file:
        os.fsync(file.fileno())
"""

WITHIN = "convtool fuse: planned, written, read back"
PROCESS = "convtool fuse, the process: that, start-up and a proof"

FUSING = """
import sys
from pathlib import Path
from bench.fusions import fuse

def job():
    fuse(Path(sys.argv[1]), ["first", "second"], Path(sys.argv[2]))
"""


def comparisons(short: bool) -> Iterator[Comparison]:
    """The rows about large checkpoints."""
    with tempfile.TemporaryDirectory(dir=OUTPUT) as name:
        path = Path(name) / "large.safetensors"
        count = write_checkpoint(path, (256 << 20) if short else (4 << 30))
        yield fusing(path, count, short)
        yield fusing_memory(path, count)


def write_checkpoint(path: Path, size: int) -> int:
    """A 3x3 and a 1x1 convolution in front of about `size` bytes of other tensors; gives the bytes of the file."""
    tensors: dict[str, tuple[int, ...]] = {"first.weight": (64, 32, 3, 3), "second.weight": (48, 64, 1, 1)}
    tensors |= {f"body.{number}.weight": (BODY // 4 // 4096, 4096) for number in range(size // BODY)}
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, CHUNK.nbytes):
            file.write(CHUNK.tobytes()[: end - start])
    return path.stat().st_size


def fusing(path: Path, count: int, short: bool) -> Comparison:
    """Until the new file is on the disk."""
    out = path.with_name("out.safetensors")

    def remove() -> None:
        out.unlink(missing_ok=True)
        os.sync()

    def copy() -> None:
        subprocess.run([shutil.which("cp") or "cp", str(path), str(out)], check=True)
        with out.open("rb") as file:
            os.fsync(file.fileno())

    def process(*arguments: str) -> Callable[[], float]:
        return timed(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True), remove)

    in_memory = ("-c", f"{IN_MEMORY}\njob()", str(path), str(out))
    command = ("-m", "convtool", "fuse", str(path), "first", "second", "--assume-defaults", "-o", str(out), "--quiet")
    within = timed(lambda: fuse(path, ["first", "second"], out), remove)
    return Comparison(
        f"fusing a pair in a checkpoint of {count / 1e9:.1f} GB, with fsync",
        [
            Candidate("cp and fsync", timed(copy, remove), 3),
            Candidate(WITHIN, within, 3),
            Candidate(PROCESS, process(*command), 1 if short else 3),
            Candidate("safetensors.load_file and save_file", process(*in_memory), 1),
        ],
        WITHIN if short else PROCESS,
        1.3,
        note="Start-up is most of the process's time where the checkpoint is small.",
    )


def fusing_memory(path: Path, count: int) -> Comparison:
    """Anonymous memory above start-up."""
    arguments = str(path), str(path.with_name("memory.safetensors"))
    return Comparison(
        f"anonymous memory of fusing a pair in a checkpoint of {count / 1e9:.1f} GB, above start-up",
        [
            Candidate("safetensors.load_file and save_file", anonymous_mib_of(IN_MEMORY, *arguments), 1),
            Candidate("convtool fuse", anonymous_mib_of(FUSING, *arguments), 1),
        ],
        "convtool fuse",
        300,
        unit="MiB",
    )
