"""Matrices: built, exported, and what an export takes of memory; beside the ways that people use instead."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
import scipy.linalg
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OUTPUT, Candidate, Comparison, anonymous_mib_of, environment, timed, touch_memory
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.matrix import plan_matrix, write_matrix


def filled(count: int, dtype: npt.DTypeLike) -> Tensor:
    """Ones by torch's threads, in memory of the kind that matrices have: in large pages, if the system has them."""
    return torch.from_numpy(np.empty(count, dtype)).fill_(1)


def touched(shape: tuple[int, int]) -> Any:
    """Zeros, a number in each page of which is written, by torch's threads."""
    zeros = np.zeros(shape, np.float32)
    torch.from_numpy(zeros).view(-1)[:: 4096 // 4] = 1
    return zeros


def layer(channels: int, seed: int = 0) -> Conv:
    """A 3x3 convolution with padding 1, as most are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    return Conv(weight, None, Geometry.of((3, 3), padding=1))


def comparisons(short: bool) -> Iterator[Comparison]:
    """The rows about matrices."""
    channels, size = (16, (56, 56)) if short else (64, (56, 56))
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:
        yield csr(channels, size)
        yield csr_reused(channels, size)
        yield small()
        yield dense()
        yield export(channels, size, Path(folder))
        yield export_memory(channels, size, Path(folder))


# --- CSR


def csr(channels: int, size: tuple[int, int]) -> Comparison:
    """The whole matrix in memory."""
    conv = layer(channels)
    matrix = ToeplitzMatrix(conv, size)
    count, rows = matrix.nnz, matrix.shape[0]

    def fill() -> Any:
        return filled(count, np.int32), filled(count, np.float32), filled(rows + 1, np.int32)

    def ours() -> Any:
        fresh = ToeplitzMatrix(conv, size)
        return fresh.rows(0, rows), fresh.indptr()

    touch_memory(12 * count)
    return Comparison(
        f"CSR of {channels} to {channels}, 3x3, padding 1 at {size[0]}x{size[1]}: {count / 1e6:.1f}M entries",
        [
            Candidate("filling the same bytes", timed(fill)),
            Candidate("convtool", timed(ours)),
            Candidate("scipy.sparse.block_array of a matrix per channel pair", timed(lambda: blocks(conv, size)), 1),
            Candidate("sum over taps of scipy.sparse.kron", timed(lambda: krons(conv, size)), 1),
        ],
        "convtool",
        1.5,
        note="Allocation included.",
    )


REUSED = """
import sys, time
import numpy as np
import torch
from bench.matrices import layer
from convtool.core.toeplitz import ToeplitzMatrix

channels, height, width = (int(word) for word in sys.argv[1:4])
conv = layer(channels)
matrix = ToeplitzMatrix(conv, (height, width))

def fill():
    parts = np.empty(matrix.nnz, np.int32), np.empty(matrix.nnz, np.float32)
    return [torch.from_numpy(part).fill_(1) for part in parts]

def convtool():
    fresh = ToeplitzMatrix(conv, (height, width))
    return fresh.rows(0, fresh.shape[0]), fresh.indptr()

for _ in range(2):
    made = globals()[sys.argv[4]]()
    del made
times = []
for _ in range(5):
    start = time.perf_counter()
    made = globals()[sys.argv[4]]()
    times.append(time.perf_counter() - start)
    del made
print(min(times))
"""


def csr_reused(channels: int, size: tuple[int, int]) -> Comparison:
    """The same in memory that the process had before, so that the time goes into writing it alone."""

    def taken(how: str) -> Callable[[], float]:
        # The process keeps what it frees: nothing is given back to the system, or taken from it again.
        kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 20)}
        command = [sys.executable, "-c", REUSED, str(channels), *map(str, size), how]

        def measure() -> float:
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(**kept))
            return float(done.stdout.split()[-1])

        return measure

    return Comparison(
        f"CSR of {channels} to {channels}, 3x3, padding 1 at {size[0]}x{size[1]}, in memory that was used before",
        [Candidate("filling the same bytes", taken("fill"), 3), Candidate("convtool", taken("convtool"), 3)],
        "convtool",
        1.5,
        note="Each figure is the least of five in a process of its own.",
    )


def shift(size: int, offset: int) -> Any:
    """(size, size): ones where the column is the row + offset."""
    return scipy.sparse.diags_array([1.0], offsets=[offset], shape=(size, size), dtype=np.float32)


def blocks(conv: Conv, size: tuple[int, int]) -> Any:
    """A banded matrix per pair of channels, put together."""
    offsets = [(row - 1) * size[1] + column - 1 for row in range(3) for column in range(3)]
    count = size[0] * size[1]
    across = np.arange(count) % size[1]
    lines = []
    for row in conv.weight.numpy():
        line = []
        for kernel in row:
            bands = [np.full(count, value, dtype=np.float32) for value in kernel.reshape(-1)]
            for number, band in enumerate(bands):  # scipy has band[column]: no neighbour beyond the line's end
                column = number % 3 - 1
                band[(across - column < 0) | (across - column >= size[1])] = 0
            line.append(scipy.sparse.dia_array((np.array(bands), offsets), shape=(count, count)))
        lines.append(line)
    return scipy.sparse.block_array(lines, format="csr")


def krons(conv: Conv, size: tuple[int, int]) -> Any:
    """Each tap is its channel matrix times a shift down times a shift across."""
    total: Any = None
    for row in range(3):
        for column in range(3):
            moved = scipy.sparse.kron(shift(size[0], row - 1), shift(size[1], column - 1))
            part = scipy.sparse.kron(conv.weight[:, :, row, column].numpy(), moved, format="csr")
            total = part if total is None else total + part
    return total


# --- what takes an evaluation of the layer for each column


def small() -> Comparison:
    """4 to 4, 3x3, padding 1 at 28x28: what the others can do in a while."""
    conv, size = layer(4), (28, 28)
    matrix = ToeplitzMatrix(conv, size)
    inputs = 4 * 28 * 28

    def apply(x: Tensor) -> Tensor:
        return F.conv2d(x.view(-1, 4, *size), conv.weight, padding=1).flatten(1)

    def identity() -> Any:
        return scipy.sparse.csr_array(apply(torch.eye(inputs)).T.numpy())

    def jacobian() -> Any:
        return scipy.sparse.csr_array(torch.func.jacrev(lambda x: apply(x)[0])(torch.zeros(inputs)).numpy())

    def ours() -> Any:
        fresh = ToeplitzMatrix(conv, size)
        return fresh.rows(0, inputs), fresh.indptr()

    return Comparison(
        f"CSR of 4 to 4, 3x3, padding 1 at 28x28: {matrix.nnz / 1e3:.0f}K entries",
        [
            Candidate("convtool", timed(ours)),
            Candidate("conv2d of an identity", timed(identity), 3),
            Candidate("torch.func.jacrev", timed(jacobian), 2),
        ],
        "convtool",
        note="As large as the others take seconds for: they evaluate the layer for each column or row, densely.",
    )


# --- dense


def dense() -> Comparison:
    """3 to 16, 3x3 at 32x32, without padding."""
    generator = torch.Generator().manual_seed(1)
    conv = Conv(torch.randn(16, 3, 3, 3, generator=generator), None, Geometry.of((3, 3)))
    matrix = ToeplitzMatrix(conv, (32, 32))
    shape = matrix.shape
    touch_memory(8 * shape[0] * shape[1])

    def by_toeplitz() -> Any:
        kernel = conv.weight.numpy()
        out = np.zeros(shape, dtype=np.float32)
        for channel in range(16):
            for source in range(3):
                for row in range(30):
                    for tap in range(3):
                        first = np.zeros(32, dtype=np.float32)
                        first[:3] = kernel[channel, source, tap]
                        start = np.zeros(30, dtype=np.float32)
                        start[0] = first[0]
                        band = scipy.linalg.toeplitz(start, first)  # (30, 32)
                        down, across = (channel * 30 + row) * 30, (source * 32 + row + tap) * 32
                        out[down : down + 30, across : across + 32] = band
        return out

    def by_jacobian() -> Any:
        def apply(x: Tensor) -> Tensor:
            return F.conv2d(x.view(1, 3, 32, 32), conv.weight).flatten()

        return torch.func.jacrev(apply)(torch.zeros(shape[1]))

    return Comparison(
        f"dense matrix of 3 to 16, 3x3 at 32x32: {shape[0]} x {shape[1]}",
        [
            Candidate("numpy.zeros, and touching it", timed(lambda: touched(shape))),
            Candidate("convtool", timed(lambda: ToeplitzMatrix(conv, (32, 32)).to_dense())),
            Candidate("scipy.linalg.toeplitz in loops", timed(by_toeplitz), 2),
            Candidate("torch.func.jacrev", timed(by_jacobian), 2),
        ],
        "convtool",
        1.3,
        note="Allocation included. A number in each page of 4 KiB is touched, by as many threads as convtool has.",
    )


# --- files


def export(channels: int, size: tuple[int, int], folder: Path) -> Comparison:
    """From the layer to the file on the disk."""
    conv = layer(channels)
    matrix = ToeplitzMatrix(conv, size)
    total = plan_matrix(matrix, folder / "m.safetensors").size
    chunk = np.random.default_rng(0).bytes(1 << 20)

    def remove() -> None:
        for path in folder.iterdir():
            path.unlink()
        os.sync()

    def raw() -> None:
        with (folder / "raw").open("wb") as file:
            for start in range(0, total, len(chunk)):
                file.write(chunk[: min(len(chunk), total - start)])
            file.flush()
            os.fsync(file.fileno())

    def ours(name: str) -> None:
        fresh = ToeplitzMatrix(conv, size)
        write_matrix(fresh, plan_matrix(fresh, folder / name), folder / name, force=False)

    def synced(name: str, save: Any, *arguments: Any, **options: Any) -> None:
        save(folder / name, *arguments, **options)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())

    def peer(name: str, save: Any, **options: Any) -> Candidate:
        made: list[Any] = []

        def prepare() -> None:
            remove()
            made[:] = [ToeplitzMatrix(conv, size).to_scipy()]

        def job() -> None:
            synced(name, save, made.pop(), **options)

        return Candidate(_SAVERS[name, *options.values()], timed(job, prepare), 1)

    return Comparison(
        f"export of that matrix with fsync: {total / 1e6:.0f} MB",
        [
            Candidate("raw write of as many bytes", timed(raw, remove)),
            Candidate("convtool, .safetensors", timed(lambda: ours("m.safetensors"), remove)),
            Candidate("convtool, .npz", timed(lambda: ours("m.npz"), remove)),
            Candidate("convtool, .pt", timed(lambda: ours("m.pt"), remove)),
            peer("m.npz", scipy.sparse.save_npz, compressed=False),
            peer("m.npz", scipy.sparse.save_npz, compressed=True),
            peer("m.mtx", lambda path, made: scipy.io.mmwrite(path, made)),
        ],
        "convtool, .safetensors",
        1.3,
        note="Ours make the matrix as they write it, and check the file; the others are given the whole matrix.",
    )


_SAVERS: dict[tuple[object, ...], str] = {
    ("m.npz", False): "scipy.sparse.save_npz, stored",
    ("m.npz", True): "scipy.sparse.save_npz, deflated",
    ("m.mtx",): "scipy.io.mmwrite",
}

EXPORT = """
import sys
from pathlib import Path
from bench.matrices import layer
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.matrix import plan_matrix, write_matrix

channels, height, width, name = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
conv = layer(channels)

def job():
    matrix = ToeplitzMatrix(conv, (height, width))
    if sys.argv[5] == "convtool":
        write_matrix(matrix, plan_matrix(matrix, name), name, force=True)
    else:
        import scipy.sparse
        scipy.sparse.save_npz(name, matrix.to_scipy(), compressed=False)
"""


def export_memory(channels: int, size: tuple[int, int], folder: Path) -> Comparison:
    """Anonymous memory of an export above start-up."""

    def taken(name: str, how: str) -> Candidate:
        arguments = (str(channels), str(size[0]), str(size[1]), str(folder / name), how)
        return Candidate(f"{how}, {Path(name).suffix}", anonymous_mib_of(EXPORT, *arguments), 2)

    return Comparison(
        "anonymous memory of that export above start-up",
        [
            taken("memory.npz", "scipy.sparse.save_npz"),
            taken("memory.npz", "convtool"),
            taken("memory.safetensors", "convtool"),
            taken("memory.pt", "convtool"),
        ],
        "convtool, .safetensors",
        64,
        unit="MiB",
    )
