"""Damaged files for as long as you like, guided by coverage: `python tests/fuzz.py SECONDS [SEED]`.

A file that takes the readers down a line they have not been on joins the ones that further damage is done to. Whatever
is neither refused nor what it says (`damage.verdict`) is kept in fuzz_findings/, to become a test, and the exit code is
1.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from damage import INNER, SUFFIXES, damaged, good_file, good_part, read_all, verdict, write_damaged, write_parts

import convtool

READERS = tuple(str(Path(convtool.__file__).parent / part) for part in ("checkpoint", "formats", "graph"))
FINDINGS = Path("fuzz_findings")
LARGEST = 64 << 10  # bytes of a file that is worth damaging further
SLOWEST = 2.0  # seconds for a file of some kilobytes
EVERY = 20  # one case in so many is traced, since tracing takes most of the time


class Coverage:
    """The lines of the readers that have run, in pairs of one after the other."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.new = 0
        self.last: dict[int, int] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(READERS):
            return None
        if event == "line":
            edge = (frame.f_code.co_filename, self.last.get(id(frame), 0), frame.f_lineno)
            if edge not in self.seen:
                self.seen.add(edge)
                self.new += 1
            self.last[id(frame)] = frame.f_lineno
        return self.trace

    def found_new(self, path: Path, form: str) -> bool:
        """Judge a file with every line watched, and say whether it went where none had been."""
        self.new = 0
        self.last.clear()
        sys.settrace(self.trace)
        try:
            judged(path, form)
        finally:
            sys.settrace(None)
        return self.new > 0


def judged(path: Path, form: str) -> str:
    """Return what becomes of a file, or raise what is wrong."""
    start = time.process_time()
    result = read_all(path) if form in INNER else verdict(path, form)
    assert time.process_time() - start < SLOWEST or sys.gettrace(), "slow"
    return result


def main(seconds: float, seed: int) -> int:
    torch.set_num_threads(1)
    random, coverage = Random(seed), Coverage()
    corpus: dict[str, list[bytes]] = {form: [good_file(form)] for form in SUFFIXES}
    corpus |= {form: [good_part(form)] for form in INNER}
    counts: Counter[str] = Counter()
    findings = 0
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder))
        while time.monotonic() < end:
            form = random.choice(list(corpus))
            data = damaged(random.choice(corpus[form]), random)
            if form in INNER:
                (inner := Path(folder) / form).mkdir(exist_ok=True)
                path = write_damaged(form, data, inner)
            else:
                path = Path(folder) / f"file{SUFFIXES[form]}"
                path.write_bytes(data)
            try:
                if random.randrange(EVERY) == 0:
                    counts["traced"] += 1
                    if coverage.found_new(path, form) and len(data) < LARGEST:
                        corpus[form].append(data)
                else:
                    counts[judged(path, form)] += 1
            except Exception:
                findings += 1
                FINDINGS.mkdir(exist_ok=True)
                (FINDINGS / f"{form}-{findings}{SUFFIXES.get(form, '')}").write_bytes(data)
                traceback.print_exc()
    sizes = ", ".join(f"{form} {len(files)}" for form, files in corpus.items())
    print(f"{sum(counts.values())} damaged files: {dict(counts)}; {len(coverage.seen)} pairs of lines; corpus: {sizes}")
    print(f"{findings} findings" + (f", in {FINDINGS}/" if findings else ""))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
