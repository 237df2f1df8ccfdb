"""Mutants sampled at random, each against the tests that reach it: what survives, no test would notice.

    python tests/mutants.py [--count 150] [--seed 0] [--budget 60] [--tests WORDS] [PATH ...]

All runs are forked off one pytest, which has imported convtool and collected the tests. In the first, every test runs
once and notes which of the functions that are to be changed it comes through, and how long it takes. Then each mutant
is a process in which one function has other code; it runs the tests that reach it, the quickest first, until one fails,
and no more than take --budget seconds. What survives is printed: look whether it changes anything that a user could
see. What runs only when a module is imported (constants, defaults, decorators) can't be changed so, and isn't.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import copy
import gc
import mmap
import multiprocessing
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 8 << 30  # bytes: a mutant may ask for anything
WORK, PATIENCE = 20, 1800.0  # seconds of a processor, and of waiting, that a mutant may take beside what its tests do
SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.FloorDiv: (ast.Mult,),
    ast.Div: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}


def alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node."""
    match node:
        case ast.Compare(ops=[only]):
            yield from (changed(node, ops=[swap()]) for swap in SWAPS[type(only)])
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign():
            yield from (changed(node, op=swap()) for swap in SWAPS.get(type(node.op), ()))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.If() | ast.While() | ast.IfExp():
            yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.For():
            yield changed(node, iter=ast.Tuple([], ast.Load()))
        case ast.Break() | ast.Continue():
            yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.ExceptHandler(type=ast.expr()):
            yield changed(node, type=ast.Name("ZeroDivisionError", ast.Load()))


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    """Return a copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


class Mutation(ast.NodeTransformer):
    """Puts one of all alternatives in its place, and counts them; annotations have none, since nothing runs them."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.count = at, 0
        self.old = self.new = ast.AST()

    def visit(self, node: ast.AST) -> ast.AST:
        for new in alternatives(node):
            self.count += 1
            if self.count - 1 == self.at:
                self.old, self.new = node, new
        if self.old is node:
            return ast.copy_location(self.new, node)
        if isinstance(node, ast.arg):
            return node
        if isinstance(node, ast.AnnAssign):
            node.value = node.value and self.visit(node.value)  # type: ignore[assignment]
            return node
        return self.generic_visit(node)

    def change(self, function: ast.FunctionDef) -> int:
        """Change the body of a function, and return how many alternatives it has."""
        function.body = [self.visit(line) for line in function.body]  # type: ignore[misc]
        return self.count


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Return the functions and methods of a module; what is defined in one of them belongs to it."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found.append(node)
        elif isinstance(node, ast.stmt):
            found += functions(node)
    return found


class Mutant(NamedTuple):
    """A change of a function: the file, the number of the function in it, and of the alternative in that."""

    path: Path
    function: int
    at: int

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    def apply(self) -> str:
        """Change the function in this process; return what became of which line."""
        mutation, tree = Mutation(self.at), self.tree()
        mutation.change(functions(tree)[self.function])
        replace(self.path, tree, self.function)
        return f"{shown(mutation.old)}  ->  {shown(mutation.new)}"

    def line(self) -> int:
        mutation = Mutation(self.at)
        mutation.change(functions(self.tree())[self.function])
        return getattr(mutation.old, "lineno", 0)

    def watch(self, number: int) -> None:
        """Have the function call `reached` with a number."""
        tree = self.tree()
        functions(tree)[self.function].body.insert(0, ast.parse(f"reached({number})").body[0])
        replace(self.path, tree, self.function)


def shown(node: ast.AST) -> str:
    """Return a node as code, its first line."""
    return ast.unparse(ast.fix_missing_locations(node)).partition("\n")[0]


def replace(path: Path, tree: ast.Module, number: int) -> None:
    """Give a function in this process the code that it has in a changed tree.

    Raises:
        ValueError: it isn't in use, or has other free variables.
    """
    function = functions(tree)[number]
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])

    def wanted(code: CodeType) -> bool:
        return (code.co_filename, code.co_name, code.co_firstlineno) == (str(path), function.name, first)

    new = next(code for code in codes(compile(ast.fix_missing_locations(tree), str(path), "exec")) if wanted(code))
    old = [one for one in gc.get_objects() if type(one) is FunctionType and wanted(one.__code__)]
    if not old or {one.__code__.co_freevars for one in old} != {new.co_freevars}:
        raise ValueError(function.name)
    for one in old:
        one.__code__ = new


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a module's code, and all that is in it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from codes(one)


def sample(paths: Sequence[Path], count: int, seed: int) -> list[Mutant]:
    """Draw mutants at random."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    every = []
    for file in files:
        for number, function in enumerate(functions(ast.parse(file.read_text()))):
            every += [Mutant(file, number, at) for at in range(Mutation().change(function))]
    return random.Random(seed).sample(every, min(count, len(every)))


class Reached(NamedTuple):
    """What a test came through when nothing was changed: the numbers of mutants, and how long it took."""

    seconds: float
    mutants: bytes


def passes(item: pytest.Item, after: pytest.Item | None) -> bool:
    """Run a test, and tell whether it passed."""
    item._initrequest()  # type: ignore[attr-defined]
    return all(report.passed for report in runtestprotocol(item, nextitem=after, log=False))


def used() -> float:
    """Return the processor time that this process and those that it waited for have used."""
    mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def forked(action: Any, seconds: int = resource.RLIM_INFINITY) -> int:
    """Start a process, with a group of its own, that does something, prints nothing, and works for no longer."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setpgid(0, 0)
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            code = action()
        finally:
            os._exit(code)
    return child


class Mutants:
    """A plugin of pytest's that runs mutants in the place of the tests."""

    def __init__(self, mutants: list[Mutant], budget: float) -> None:
        self.mutants, self.budget = mutants, budget
        self.marks = mmap.mmap(-1, len(mutants))  # which processes that a test starts share with it

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        reached = self.reach(session.items)
        print(f"\n{len(reached)} of {len(session.items)} tests reach some of these, and pass", flush=True)
        counts = Counter[str]()
        for number, mutant in enumerate(self.mutants):
            tests = sorted((at for at, one in reached.items() if one.mutants[number]), key=lambda at: reached[at])
            run, seconds = [], 0.0
            for at in tests:
                if seconds < self.budget:
                    run.append(session.items[at])
                    seconds += reached[at].seconds
            verdict, what = self.tried(mutant, run, seconds)
            counts[verdict] += 1
            where = f"{mutant.path.relative_to(ROOT)}:{mutant.line()}"
            print(f"{verdict:11} {where}  {what}  ({len(run)} of {len(tests)} tests, {seconds:.1f} s)", flush=True)
        print(", ".join(f"{number} {verdict.lower()}" for verdict, number in sorted(counts.items())))
        return True

    def reach(self, items: list[pytest.Item]) -> dict[int, Reached]:
        """Run every test once, and return those that pass and come through a function that is to be changed."""
        found: dict[int, Reached] = {}
        start = 0
        while start < len(items):  # again where a test has ended its process
            here, there = multiprocessing.Pipe(duplex=False)
            child = forked(lambda start=start, there=there: self.run_all(items, start, there))
            there.close()
            try:
                while True:
                    at, result = here.recv()
                    start = at + 1
                    if result is not None and any(result.mutants):
                        found[at] = result
            except EOFError:
                start += 1
            finally:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
        return found

    def run_all(self, items: list[pytest.Item], start: int, there: Connection) -> int:
        builtins.reached = lambda number: self.marks.__setitem__(number, 1)  # type: ignore[attr-defined]
        for first, *_ in group(self.mutants).values():
            with contextlib.suppress(ValueError):
                self.mutants[first].watch(first)
        for at in range(start, len(items)):
            self.marks[:] = bytes(len(self.marks))
            before = used()
            passed = passes(items[at], items[at + 1] if at + 1 < len(items) else None)
            seconds, marks = used() - before, bytearray(self.marks)
            for first, *others in group(self.mutants).values():
                for other in others:
                    marks[other] = marks[first]
            there.send((at, Reached(seconds, bytes(marks)) if passed else None))
        return 0

    def tried(self, mutant: Mutant, tests: list[pytest.Item], seconds: float) -> tuple[str, str]:
        """Run a mutant's tests until one fails; what becomes of it, and what it changes."""
        here, there = multiprocessing.Pipe(duplex=False)

        def run() -> int:
            try:
                there.send(mutant.apply())
            except ValueError:
                return 2
            return int(not all(map(passes, tests, [*tests[1:], None])))

        child = forked(run, WORK + 5 * int(seconds))
        there.close()
        end = time.monotonic() + PATIENCE
        try:
            what = here.recv() if here.poll(PATIENCE) else ""
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
                time.sleep(0.01)
        except EOFError:
            return "left out", mutant.path.name
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what its tests have started
        if not tests:
            return "NOT REACHED", what
        if done[0] == 0 or done[1] == signal.SIGXCPU or done[1] == signal.SIGKILL:
            return "hung", what
        return "SURVIVED" if done[1] == 0 else "killed", what


def group(mutants: Sequence[Mutant]) -> dict[tuple[Path, int], list[int]]:
    """Return the numbers of the mutants of each function."""
    found: dict[tuple[Path, int], list[int]] = {}
    for number, mutant in enumerate(mutants):
        found.setdefault((mutant.path, mutant.function), []).append(number)
    return found


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=["convtool"])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for each mutant at most")
    parser.add_argument("--tests", default="tests", help="what pytest is told: files, -k and words; all without it")
    options = parser.parse_args()
    mutants = sample([ROOT / path for path in options.paths], options.count, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--basetemp={folder}/made",
            f"--rootdir={ROOT}",
        ]
        sys.exit(pytest.main([*words, *shlex.split(options.tests)], plugins=[Mutants(mutants, options.budget)]))


if __name__ == "__main__":
    main()
