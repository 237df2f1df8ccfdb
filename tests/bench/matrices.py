"""Matrices: built, exported, and what an export takes of memory; beside the ways that people use instead."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import scipy.linalg
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OUTPUT, Candidate, Comparison, anonymous_mib_of, timed, touch_memory
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.matrix import plan_matrix, write_matrix

VECTORS = 64  # of the identity that is sent through the layer: the whole of it would take ten minutes


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
        return (
            torch.empty(count, dtype=torch.int32).fill_(1),
            torch.empty(count).fill_(1.0),
            torch.empty(rows + 1, dtype=torch.int32).fill_(1),
        )

    def ours() -> Any:
        fresh = ToeplitzMatrix(conv, size)
        return fresh.rows(0, rows), fresh.indptr()

    touch_memory(12 * count)
    inputs = channels * size[0] * size[1]
    return Comparison(
        f"CSR of {channels} to {channels}, 3x3, padding 1 at {size[0]}x{size[1]}: {count / 1e6:.1f}M entries",
        [
            Candidate("filling the same bytes", timed(fill)),
            Candidate("convtool", timed(ours)),
            Candidate("scipy.sparse.block_array of a matrix per channel pair", timed(lambda: blocks(conv, size)), 1),
            Candidate("sum over taps of scipy.sparse.kron", timed(lambda: krons(conv, size)), 1),
            Candidate("conv2d of an identity", lambda: identity(conv, size) * inputs / VECTORS, 1),
        ],
        "convtool",
        1.5,
        note=f"Allocation included. The identity is scaled up from {VECTORS} of its {inputs} vectors.",
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


def identity(conv: Conv, size: tuple[int, int]) -> float:
    """Seconds for `VECTORS` basis vectors: what the layer makes of them, their entries collected."""
    inputs = conv.in_channels * size[0] * size[1]

    def some() -> Any:
        basis = torch.zeros(VECTORS, inputs)
        basis.fill_diagonal_(1.0)
        columns = F.conv2d(basis.view(VECTORS, conv.in_channels, *size), conv.weight, padding=1)
        return scipy.sparse.csr_array(columns.flatten(1).numpy())

    return timed(some)()


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
            Candidate("filling the same bytes", timed(lambda: torch.empty(shape).fill_(1.0))),
            Candidate("convtool", timed(lambda: ToeplitzMatrix(conv, (32, 32)).to_dense())),
            Candidate("scipy.linalg.toeplitz in loops", timed(by_toeplitz), 2),
            Candidate("torch.func.jacrev", timed(by_jacobian), 2),
        ],
        "convtool",
        1.0,
        note="Allocation included.",
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
