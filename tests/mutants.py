"""Mutants sampled at random, each against the tests that reach it: what survives, no test would notice.

    python tests/mutants.py [--count 150] [--seed 0] [--budget 120] [--tree FOLDER] [PATH ...]

One run of all tests under coverage, in a copy of the tree, says which tests reach which line and how long each takes;
--tree keeps the copy, and takes it from there where it is. cosmic-ray makes the mutants: places in PATHs (convtool) are
drawn at random, and one change at each. A mutant is run in a copy of its own, the quickest tests first, until one
fails; what would take more than --budget seconds is left out, and said so. What survives is printed as a diff: look
whether it changes anything that a user could see.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("convtool", "tests", "sample_models", "pyproject.toml", "README.md", "Makefile")
WORKERS = 2
UNMEASURED = "read_only_folder"  # who takes another user's rights for a while, under whom coverage can't write
TIMES = "times.xml"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp=made"]
LIMITS = {resource.RLIMIT_AS: 8 << 30, resource.RLIMIT_FSIZE: 16 << 30}  # bytes: a mutant may ask for anything


class Mutant(NamedTuple):
    """A change of one place, the tests that reach it, and how many of them are run."""

    change: MutationSpec
    tests: list[str]
    run: int
    seconds: float


def copy_tree(source: Path, target: Path) -> Path:
    """Copy what tests need into a folder."""
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / part, target / part)
    return target


def measure(tree: Path) -> None:
    """Run all tests of a tree once, and leave in it which lines each reaches and how long it takes."""
    command = [*PYTEST, "--numprocesses", str(WORKERS), "-k", f"not {UNMEASURED}", f"--junitxml={TIMES}"]
    command += ["--cov=convtool", "--cov-context=test", "--cov-report="]
    subprocess.run(command, cwd=tree, env=environment(tree), check=False)


class Reach:
    """What one run of all tests says of a tree."""

    def __init__(self, tree: Path) -> None:
        self.seconds: dict[str, float] = {}  # of each test that passed, by its name there
        for case in ET.parse(tree / TIMES).iter("testcase"):
            if all(case.find(what) is None for what in ("failure", "error", "skipped")):
                self.seconds[f"{case.get('classname')}.{case.get('name')}"] = float(case.get("time", 0))
        self.data = CoverageData(str(tree / ".coverage"))
        self.data.read()
        self.lines = functools.cache(self._lines)

    def _lines(self, path: Path) -> dict[int, set[str]]:
        """Return the tests that reach each line of a file."""
        found = self.data.contexts_by_lineno(str(path))
        tests = {line: {context.rpartition("|")[0] for context in contexts} for line, contexts in found.items()}
        return {line: {test for test in some if key(test) in self.seconds} for line, some in tests.items()}

    def tests(self, path: Path, first: int, last: int) -> list[str]:
        """Return the tests that reach lines first to last, quickest first; of the file, where it's none of a test's.

        Lines of a class or a module run when it is imported, and matter to whoever uses it.
        """
        lines = self.lines(path)
        found = set().union(*(lines.get(line, ()) for line in range(first, last + 1))) or set().union(*lines.values())
        return sorted(found, key=lambda test: (self.seconds[key(test)], test))


def key(test: str) -> str:
    """Return the name that a test has in pytest's XML."""
    path, _, name = test.partition("::")
    return f"{path.removesuffix('.py').replace('/', '.')}.{name.replace('::', '.')}"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which the copy's package is the one that is imported."""
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def changes(tree: Path, path: Path) -> Iterator[list[MutationSpec]]:
    """Yield for each place of a file the changes that can be made there.

    Left out are annotations, which nothing runs, and what decorators are told, such as frozen=True.
    """
    nodes = list(ast.walk(ast.parse(path.read_text())))
    idle = [note for node in nodes for what in ("annotation", "returns") if (note := getattr(node, what, None))]
    idle += [one for node in nodes for one in getattr(node, "decorator_list", ()) if isinstance(one, ast.Call)]
    spans = [((one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)) for one in idle]
    parsed = get_ast_from_path(path)
    places: defaultdict[tuple[int, int], list[MutationSpec]] = defaultdict(list)
    for name in cosmic_ray.plugins.operator_names():
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        found = (place for node in ast_nodes(parsed) for place in operator.mutation_positions(node))
        for occurrence, (start, stop) in enumerate(found):
            if not any(first <= start < last for first, last in spans):
                change = MutationSpec(path.relative_to(tree), name, occurrence, start, stop)
                places[start].append(change)
    yield from places.values()


def sample(tree: Path, paths: Sequence[str], count: int, seed: int, budget: float) -> list[Mutant]:
    """Draw places at random and one change at each, with the tests that reach its lines."""
    roots = [tree / path for path in paths]
    files = [file for root in roots for file in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
    places = [place for file in files for place in changes(tree, file)]
    draw, reach = random.Random(seed), Reach(tree)
    mutants = []
    for place in draw.sample(places, min(count, len(places))):
        change = draw.choice(place)
        tests = reach.tests(tree / change.module_path, change.start_pos[0], change.end_pos[0])
        total, number = 0.0, 0
        while number < len(tests) and total < budget:
            total += reach.seconds[key(tests[number])]
            number += 1
        mutants.append(Mutant(change, tests, number, total))
    return mutants


def start_worker(tree: Path, folder: str) -> None:
    """Give this process a copy of the tree for its own."""
    home = copy_tree(tree, Path(tempfile.mkdtemp(dir=folder)))
    os.chdir(home)
    os.environ.update(environment(home))


def try_mutant(mutant: Mutant) -> tuple[bool, str]:
    """Run a mutant's tests; whether one failed, and the change as a diff."""
    Path("names.txt").write_text("\n".join(mutant.tests[: mutant.run]))
    command = shlex.join([*PYTEST, "-x", "@names.txt"])
    result = mutate_and_test([mutant.change], command, timeout=60 + 5 * mutant.seconds)
    return result.test_outcome != TestOutcome.SURVIVED, result.diff or result.output or ""


def check_known(mutants: Sequence[Mutant], tree: Path) -> None:
    """Raise an error where pytest doesn't find a test by its name: it would fail, and so seem to kill its mutants."""
    tests = {test for mutant in mutants for test in mutant.tests[: mutant.run]}
    Path(tree, "names.txt").write_text("\n".join(sorted(tests)))
    command = [*PYTEST, "--collect-only", "@names.txt"]
    subprocess.run(command, cwd=tree, env=environment(tree), check=True, stdout=subprocess.DEVNULL)


def report(mutants: Sequence[Mutant], tree: Path, folder: str) -> Counter[str]:
    """Run the mutants, print a line for each as it ends, and the survivors' diffs; return the counts."""
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(WORKERS, initializer=start_worker, initargs=(tree, folder)) as pool:
        for mutant, (killed, diff) in zip(mutants, pool.map(try_mutant, mutants), strict=True):
            verdict = "killed" if killed else "SURVIVED" if mutant.tests else "NOT REACHED"
            counts[verdict] += 1
            where = f"{mutant.change.module_path}:{mutant.change.start_pos[0]}"
            tests = f"{mutant.run} of {len(mutant.tests)} tests"
            print(f"{verdict:11} {where} {mutant.change.operator_name.removeprefix('core/')}, {tests}", flush=True)
            if not killed:
                print(diff, flush=True)
    return counts


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=["convtool"])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=120, help="seconds of tests for each mutant at most")
    parser.add_argument("--tree", type=Path, help="where the copy of the tree is kept")
    options = parser.parse_args()
    for limit, most in LIMITS.items():
        resource.setrlimit(limit, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        tree = (options.tree or Path(folder, "tree")).resolve()
        if not (tree / TIMES).exists():
            tree.mkdir(parents=True, exist_ok=True)
            print("Running all tests once, to see which lines each reaches (ten minutes) ...", flush=True)
            measure(copy_tree(ROOT, tree))
        mutants = sample(tree, options.paths, options.count, options.seed, options.budget)
        check_known(mutants, tree)
        counts = report(mutants, tree, folder)
    print(", ".join(f"{number} {verdict.lower()}" for verdict, number in sorted(counts.items())))


if __name__ == "__main__":
    main()
