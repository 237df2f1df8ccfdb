"""How candidates are measured and shown: interleaved, several times, as ratios to a baseline of the same run.

A module of benchmarks has a function `comparisons(short)` that yields `Comparison`s; `bench/__main__.py` lists the
modules. Seconds of one machine mean little on the next, and little on the same one an hour later; the ratio of two
candidates that took turns stays.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

STATUS = Path("/proc/self/status")
OUTPUT = Path(__file__).resolve().parent.parent.parent / "bench_output"  # tables, and what benchmarks write meanwhile
SAMPLE_EVERY = 0.002  # seconds between two looks at a process's memory


@dataclass(frozen=True)
class Candidate:
    """One way to do the job.

    Attributes:
        measure: does it once and gives what it took (seconds, or the comparison's other unit).
        most: repeat it at most so often; for what is so slow that one look is enough.
    """

    name: str
    measure: Callable[[], float]
    most: int = sys.maxsize


@dataclass(frozen=True)
class Comparison:
    """Candidates for one job.

    Attributes:
        candidates: the baseline first; each is shown as a ratio to it, unless `unit` isn't seconds.
        ours: the candidate that the target is about.
        target: of our ratio (of our figure itself where the unit isn't seconds), or None.
        unit: "s", or what `measure` gives.
        note: what a reader has to know, in a line.
    """

    title: str
    candidates: Sequence[Candidate]
    ours: str
    target: float | None = None
    unit: str = "s"
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What a candidate took: the median, and between which figures all of its runs lay."""

    name: str
    median: float
    least: float
    most: float
    ratio: float
    runs: int


@dataclass(frozen=True)
class Result:
    """A comparison that was run."""

    title: str
    unit: str
    note: str
    ours: str
    target: float | None
    rows: list[Row] = field(default_factory=list)

    @property
    def figure(self) -> float:
        """What the target is about."""
        row = next(row for row in self.rows if row.name == self.ours)
        return row.ratio if self.unit == "s" else row.median

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.figure <= self.target


def timed(job: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """Seconds that `job` takes, after `prepare`, which isn't counted; what the job returns is dropped in time."""

    def measure() -> float:
        prepare()
        gc.collect()
        start = time.perf_counter()
        result = job()
        taken = time.perf_counter() - start
        del result
        return taken

    return measure


def timed_process(arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """Seconds that a process takes from start to end; CalledProcessError where it fails."""
    return timed(lambda: subprocess.run(arguments, check=True, capture_output=True), prepare)


def run(comparison: Comparison, repeats: int = 7) -> Result:
    """Measure the candidates in turn, `repeats` rounds of them."""
    taken: dict[str, list[float]] = {candidate.name: [] for candidate in comparison.candidates}
    ratios: dict[str, list[float]] = {candidate.name: [] for candidate in comparison.candidates}
    baseline = comparison.candidates[0].name
    for number in range(repeats):
        for candidate in comparison.candidates:
            if number < candidate.most:
                taken[candidate.name].append(candidate.measure())
                # against the baseline of the same round: what slows the machine down meanwhile slows both
                ratios[candidate.name].append(taken[candidate.name][-1] / max(taken[baseline][-1], 1e-12))
    rows = [
        Row(name, statistics.median(one), min(one), max(one), statistics.median(ratios[name]), len(one))
        for name, one in taken.items()
    ]
    return Result(comparison.title, comparison.unit, comparison.note, comparison.ours, comparison.target, rows)


def touch_memory(count: int) -> None:
    """Have the system find this many bytes of memory before anything is measured: the first to ask for it waits."""
    block = np.ones(count, dtype=np.uint8)
    del block


def anonymous_bytes() -> int:
    """The anonymous resident memory of this process; mapped files aren't part of it, nor is the page cache."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def anonymous_peak(job: Callable[[], object]) -> int:
    """How far the anonymous memory of this process rises while `job` runs, in bytes, looked at every 2 ms."""
    gc.collect()
    before = most = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(SAMPLE_EVERY):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job()
    finally:
        done.set()
        watcher.join()
    return max(most, anonymous_bytes()) - before


def environment(**more: str) -> dict[str, str]:
    """That of a process which imports what the benchmarks do."""
    tests = Path(__file__).resolve().parent.parent
    return {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'sample_models'}", **more}


def anonymous_mib_of(code: str, *arguments: str) -> Callable[[], float]:
    """MiB of anonymous memory that code takes above its start-up, in a process of its own.

    Args:
        code: Python that defines a function `job`; what it imports and makes outside of `job` isn't counted.
    """
    script = f"{code}\nfrom bench.harness import anonymous_peak\nprint(anonymous_peak(job))"

    def measure() -> float:
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
        return int(done.stdout.split()[-1]) / (1 << 20)

    return measure


def lines(result: Result) -> Iterator[str]:
    """A result as a table in Markdown."""
    yield f"### {result.title}"
    yield ""
    if result.note:
        yield result.note
        yield ""
    timed_ones = result.unit == "s"
    yield f"| candidate | {'ratio | ' if timed_ones else ''}median | all runs between |"
    yield f"| --- | {'---: | ' if timed_ones else ''}---: | ---: |"
    for row in result.rows:
        name = f"**{row.name}**" if row.name == result.ours else row.name
        ratio = f"{row.ratio:.2f}x | " if timed_ones else ""
        spread = (
            f"{_number(row.least, result.unit)} and {_number(row.most, result.unit)}" if row.runs > 1 else "one run"
        )
        yield f"| {name} | {ratio}{_number(row.median, result.unit)} | {spread} |"
    if result.target is not None:
        sign, unit = ("x", "") if timed_ones else ("", f" {result.unit}")
        verdict = "met" if result.met else "**missed**"
        yield ""
        yield f"Target: at most {result.target:g}{sign}{unit}; {result.figure:.2f}{sign}{unit}: {verdict}."
    yield ""


def write(results: Iterable[Result], machine: str) -> None:
    """The tables and the figures as files in `OUTPUT`."""
    done = list(results)
    text = "\n".join(line for result in done for line in lines(result))
    (OUTPUT / "bench.md").write_text(f"{machine}\n\n{text}")
    (OUTPUT / "bench.json").write_text(json.dumps([asdict(result) for result in done], indent=2))


def _number(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.1f} {unit}"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
