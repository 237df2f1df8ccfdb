"""python -m bench.spectra [WORD]: both ends of the spectra of layers, beside scipy's solvers and a dense SVD.

Each way runs in a process of its own, in one thread; the others have `LIMIT` seconds of CPU, enough to see whether
they get there. Seconds depend on the machine, so those that a product of two matrices takes, measured in the same
process, stand beside them.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch

import convtool
from bench.harness import OUTPUT, environment
from convtool.cli.spectrum_table import value_text
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.spectrum import spectrum

LIMIT = 10  # seconds of CPU of what others do
REFERENCE = 2000  # rows of the matrices whose product is the unit of time
DENSE_BYTES = 1 << 30  # of a matrix of which a dense SVD is tried

Layer = tuple[Conv, tuple[int, ...]]


def random(outputs: int, inputs: int, kernel: int, *size: int, **fields: Any) -> Layer:
    """Return a layer of normal numbers, scaled as trained ones are, and its input size."""
    geometry, generator = Geometry.of((kernel,) * len(size), **fields), torch.Generator().manual_seed(0)
    channels = (outputs, inputs // geometry.groups)
    if geometry.transposed:
        channels = (inputs, outputs // geometry.groups)
    weight = torch.randn(*channels, *geometry.kernel_size, generator=generator, dtype=torch.float64)
    return Conv(weight / math.sqrt(weight[0].numel()), None, geometry), size


def blur(length: int, channels: int, *size: int, **fields: Any) -> Layer:
    """Return a binomial blur of each channel."""
    line = torch.tensor([math.comb(length - 1, n) for n in range(length)], dtype=torch.float64) / 2.0 ** (length - 1)
    weight = torch.outer(line, line).expand(channels, 1, length, length).contiguous()
    return Conv(weight, None, Geometry.of((length,) * 2, groups=channels, padding=length // 2, **fields)), size


ROWS: dict[str, Callable[[], Layer]] = {
    "64→64 3x3 at 56": lambda: random(64, 64, 3, 56, 56, padding=1),
    "64→128 3x3 stride 2 at 56": lambda: random(128, 64, 3, 56, 56, padding=1, stride=2),
    "512→512 3x3 at 7": lambda: random(512, 512, 3, 7, 7, padding=1),
    "3→64 7x7 stride 2 at 224": lambda: random(64, 3, 7, 224, 224, padding=3, stride=2),
    "3→64 3x3 at 224": lambda: random(64, 3, 3, 224, 224, padding=1),
    "16→16 3x3 at 32": lambda: random(16, 16, 3, 32, 32, padding=1),
    "32→32 3x3 dilation 2 at 28": lambda: random(32, 32, 3, 28, 28, padding=2, dilation=2),
    "256→64 1x1 at 56": lambda: random(64, 256, 1, 56, 56),
    "patches 3→768 16/16 at 224": lambda: random(768, 3, 16, 224, 224, stride=16),
    "depthwise 96 7x7 at 56": lambda: random(96, 96, 7, 56, 56, padding=3, groups=96),
    "depthwise 32 3x3 at 112": lambda: random(32, 32, 3, 112, 112, padding=1, groups=32),
    "depthwise 64 3x3 stride 2 at 112": lambda: random(64, 64, 3, 112, 112, padding=1, stride=2, groups=64),
    "blur 15x15 at 96": lambda: blur(15, 1, 96, 96),
    "blur 3x3 of 64, stride 2 at 56": lambda: blur(3, 64, 56, 56, stride=2),
    "blur 5x5, reflected, at 256": lambda: blur(5, 1, 256, 256, padding_mode="reflect"),
    "1→1 of 31 taps at 100,000": lambda: random(1, 1, 31, 100_000, padding=15),
    "1→512 of 10 taps, stride 5 at 16,000": lambda: random(512, 1, 10, 16_000, stride=5),
    "80→384 of 3 taps at 3,000": lambda: random(384, 80, 3, 3_000, padding=1),
    "depthwise 256 of 31 taps at 400": lambda: random(256, 256, 31, 400, padding=15, groups=256),
    "transposed 64→32 4x4 stride 2 at 16": lambda: random(32, 64, 4, 16, 16, padding=1, stride=2, transposed=True),
    "transposed 64→64 2x2 stride 2 at 28": lambda: random(64, 64, 2, 28, 28, stride=2, transposed=True),
    "circular 16→32 3x3 stride 2 at 32": lambda: random(
        32, 16, 3, 32, 32, padding=1, stride=2, padding_mode="circular"
    ),
    "circular 64→64 3x3 at 32": lambda: random(64, 64, 3, 32, 32, padding=1, padding_mode="circular"),
    "1→8 3x3x3 at 24": lambda: random(8, 1, 3, 24, 24, 24, padding=1),
}


def ours(conv: Conv, size: tuple[int, ...]) -> list[str]:
    """Both ends by convtool, with what is proved of them."""
    found = spectrum(conv, size)
    return [value_text(found.largest, 1), value_text(found.smallest, -1)]


def svds(conv: Conv, size: tuple[int, ...]) -> list[str]:
    """Both ends by scipy's svds, of the layer as an operator."""
    matrix = convtool.operator(conv, size)
    ends = (scipy.sparse.linalg.svds(matrix, 1, which=which, return_singular_vectors=False) for which in ("LM", "SM"))
    return [f"{float(end[0]):.6g}" for end in ends]


def eigsh(conv: Conv, size: tuple[int, ...]) -> list[str]:
    """Both ends by scipy's eigsh, of the operator's shorter product with its adjoint."""
    matrix = convtool.operator(conv, size)
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.H
    values = scipy.sparse.linalg.eigsh(matrix.H @ matrix, 2, which="BE", return_eigenvectors=False)
    return [f"{math.sqrt(max(0.0, value)):.6g}" for value in sorted(values, reverse=True)]


def dense(conv: Conv, size: tuple[int, ...]) -> list[str]:
    """Both ends by numpy's SVD of the whole matrix."""
    matrix = convtool.toeplitz(conv, size)
    if math.prod(matrix.shape) * 8 > DENSE_BYTES:
        raise MemoryError
    values = np.linalg.svd(matrix.to_dense().numpy(), compute_uv=False)
    return [f"{values[0]:.6g}", f"{values[-1]:.6g}"]


WAYS = {way.__name__: way for way in (ours, svds, eigsh, dense)}


def measure(row: str, way: str) -> None:
    """Print both ends by one way, its seconds of CPU, those of the reference, and the peak of memory in MiB."""
    (conv, size), square = ROWS[row](), np.random.default_rng(0).random((REFERENCE, REFERENCE))
    start = time.process_time()
    square @ square
    reference, start = time.process_time() - start, time.process_time()
    if way != "ours":
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(start) + LIMIT,) * 2)
    ends = WAYS[way](conv, size)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"ends": ends, "seconds": seconds, "reference": reference, "mib": peak}))


def figures(row: str, way: str) -> dict[str, Any]:
    """Measure one way in a process of its own; only what it cost where it didn't get there."""
    command = [sys.executable, "-m", "bench.spectra", row, way]
    threads = environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=threads)
    if done.returncode:
        return {"cost": "doesn't fit" if "MemoryError" in done.stderr else f"not in {LIMIT} s"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"cost": f"{found['seconds']:.1f} s, {found['mib']} MiB"}


def table(word: str) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield f"| layer | largest | smallest | convtool | a product of {REFERENCE} rows | svds | eigsh | dense SVD |"
    yield "| --- " * 8 + "|"
    for row in (row for row in ROWS if word in row):
        found = figures(row, "ours")
        others = (figures(row, way)["cost"] for way in ("svds", "eigsh", "dense"))
        cells = [row, *found["ends"], found["cost"], f"{found['reference']:.2f} s", *others]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure one layer one way, or print the table as it grows, and write it."""
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
        return
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / "spectra.md").open("w") as file:
        for line in table("".join(sys.argv[1:2])):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
