"""python -m bench [--short] [WORD]: run the benchmarks, or those with WORD in their title."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.harness import OUTPUT, Comparison, lines, run, write

MODULES = ("bench.startup", "bench.matrices", "bench.fusions", "bench.checkpoints", "bench.folding", "bench.plans")
REPEATS, SHORT_REPEATS = 7, 3


def comparisons(short: bool) -> Iterator[Comparison]:
    """Those of all modules."""
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        module: Any = importlib.import_module(name)
        yield from module.comparisons(short)


def main() -> None:
    """Run, print as it goes, and write the tables at the end."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="only comparisons with it in their title")
    parser.add_argument("--short", action="store_true", help="small sizes, few rounds: for small machines")
    arguments = parser.parse_args()
    machine = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()},"
        f" torch {torch.__version__}{', short' if arguments.short else ''}"
    )
    print(machine, end="\n\n")
    OUTPUT.mkdir(exist_ok=True)
    results = []
    for comparison in comparisons(arguments.short):
        if arguments.word.lower() in comparison.title.lower():
            results.append(run(comparison, SHORT_REPEATS if arguments.short else REPEATS))
            print("\n".join(lines(results[-1])), flush=True)
    if not results:
        sys.exit(f"no comparison has {arguments.word!r} in its title")
    write(results, machine)
    print(f"written to {OUTPUT.name}/bench.md and bench.json")


if __name__ == "__main__":
    main()
