"""Faults at each step of every command: `python tests/faults.py` prints a table of counts.

A step is a call to the system, of one of the families below. In each run of a command one thing happens at one step:
the call fails, a signal comes (SIGKILL, or one of those that are heard), or another program changes a file that is
being read (writes into it, cuts it short, or renames another over it). What is left is held against what may be: the
outputs as they were or as they were to be, whole, of the source as it was at one time; nothing beside them but what the
message names, or what says by its name that it is unfinished; the exit code one that stands for what happened; and what
the message says of the disk is so.

Runs follow each other in one process, forked off where all is imported, and another takes over wherever a run ended it.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import functools
import io
import itertools
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from checkpoints import save

from convtool.cli.app import run_app
from convtool.formats import source as source_module

PATIENCE = 600.0  # seconds after which a run counts as hung, however loaded the machine is
USUAL = 700  # faults of a scenario, about
TICK = 0.02  # seconds: more than the file system's clock takes from one reading to the next

LAYER = ("first", "--input-size", "5,4", "--padding", "1,0")

# Where calls are counted, by family: the module and the names in it. (`open` with O_CREAT is no other than without.)
FAMILIES: dict[str, tuple[tuple[Any, tuple[str, ...]], ...]] = {
    "open": ((os, ("open",)), (io, ("open",)), (builtins, ("open",))),
    "read": ((os, ("preadv", "read")),),
    "stat": ((os, ("fstat", "stat")),),
    "write": ((os, ("write", "sendfile")),),  # and what io.FileIO writes
    "rename": ((os, ("link", "replace", "rename")),),
    "fsync": ((os, ("fsync", "fchmod")),),
    "unlink": ((os, ("unlink", "remove", "rmdir", "mkdir")),),
    "mmap": ((mmap, ("mmap",)),),
    "allocate": ((np, ("zeros", "empty")), (torch, ("empty", "zeros", "cat")), (source_module, ("bytearray",))),
}
ERRORS = {
    "open": (errno.EMFILE, errno.EACCES),
    "read": (errno.EIO,),
    "stat": (errno.EIO,),
    "write": (errno.ENOSPC, errno.EFBIG),
    "rename": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO,),
    "unlink": (errno.EACCES,),
    "mmap": (errno.ENOMEM,),
    "allocate": (errno.ENOMEM,),  # as a MemoryError
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGALRM")
CHANGES = ("written to", "cut short", "renamed over")
MOMENTS = ("open", "read", "write", "rename", "fsync")  # the families at whose steps a source is changed


@dataclass(frozen=True)
class Scenario:
    """A command, and the kind of output that it writes.

    Attributes:
        line: its words; a word that names a file is relative to the folder that it runs in.
        source: the file that it reads, which is changed meanwhile.
        existing: whether the output is there already, and is to be replaced.
    """

    name: str
    line: tuple[str, ...]
    source: str
    existing: bool = False

    @property
    def apart(self) -> bool:
        """Whether it writes two outputs that are of use without each other."""
        return "plot" in self.name

    @property
    def title(self) -> str:
        return f"{self.name}, over an old one" if self.existing else self.name


def scenarios() -> list[Scenario]:
    fields = ("first.padding=1", "second.padding=0", "*.stride=1", "*.dilation=1", "*.groups=1")
    fuse = ("first", "second", *(word for one in fields for word in ("--set", one)), "--allow-border")
    matrix = ("toeplitz", "net.safetensors", *LAYER, "-o")
    written: list[tuple[str, tuple[str, ...], str]] = [
        ("fuse to .safetensors", ("fuse", "net.safetensors", *fuse, "-o", "out.safetensors"), "net.safetensors"),
        ("fuse to .pt", ("fuse", "net.pt", *fuse, "-o", "out.pt"), "net.pt"),
        ("convert to a folder", ("convert", "net.safetensors", "out", "--shard-size", "400B"), "net.safetensors"),
        ("convert to a folder of torch", ("convert", "net.pt", "out", "--shard-size", "400B"), "net.pt"),
        ("unfold", ("unfold", "net.safetensors", *LAYER, "-o", "out.npz"), "net.safetensors"),
        *((f"toeplitz to {end}", (*matrix, f"out{end}"), "net.safetensors") for end in (".npz", ".npy", ".mtx", ".pt")),
        ("toeplitz in shards", (*matrix, "out.safetensors", "--shards", "2"), "net.safetensors"),
        ("toeplitz with a plot", (*matrix, "out.npz", "--plot", "out.png"), "net.safetensors"),
    ]
    found = [
        Scenario(name, (*line, *(("--force",) if existing else ())), source, existing)
        for name, line, source in written
        for existing in (False, True)
    ]
    found.append(Scenario("fuse in place", ("fuse", "net.pt", *fuse, "-o", "net.pt", "--force"), "net.pt"))
    read = [
        ("inspect", ("inspect", "net.pt", "--json")),
        ("spectrum", ("spectrum", "net.pt", "first", "--input-size", "5,4", "--json")),
        ("verify", ("verify", "net.pt", "other.safetensors", "--before", "head", "--after", "head", "--json")),
        ("verify a matrix", ("verify", "net.pt", "m.npz", "--json")),
    ]
    return found + [Scenario(name, line, "m.npz" if "m.npz" in line else "net.pt") for name, line in read]


def network(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first.weight": (4, 3, 3, 2), "first.bias": (4,), "second.weight": (5, 4, 1, 2), "head.weight": (60, 5)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def prepare(folder: Path, seed: int) -> None:
    """Write the files that commands read; of another seed they are as long, and hold other numbers."""
    folder.mkdir()
    for suffix in ("pt", "safetensors"):
        save(network(seed), folder / f"net.{suffix}")
    save(network(seed), folder / "other.safetensors")
    line = ("toeplitz", "net.pt", *LAYER, "-o", "m.npz", "-q")
    assert run_here(folder, line).code == 0


# --- one run


class Ended(NamedTuple):
    """How a process ended: its exit code, -n for signal n, None where it hung; and what it printed."""

    code: int | None
    out: str
    err: str


def started(folder: Path, action: Callable[[], int], streams: tuple[int, int] | None = None) -> int:
    """Start an action in a process of its own, in a folder, and return the process's number."""
    child = os.fork()
    if not child:
        code = 99
        try:
            os.chdir(folder)
            for number, stream in enumerate(streams or (os.open(os.devnull, os.O_WRONLY),) * 2, 1):
                os.dup2(stream, number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            code = action()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


def in_folder(folder: Path, action: Callable[[], int]) -> Ended:
    """Run an action in a process of its own, in a folder."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = waited(started(folder, action, (out.fileno(), err.fileno())))
        return Ended(code, *map(printed, (out, err)))


def printed(stream: IO[bytes]) -> str:
    """Return what a process has printed into a file."""
    return os.pread(stream.fileno(), 1 << 20, 0).decode(errors="replace")


def run_here(folder: Path, line: Sequence[str]) -> Ended:
    """Run a command in this process, so that its children needn't import what it takes."""
    with contextlib.chdir(folder), contextlib.ExitStack() as stack:
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return Ended(run_app(list(line)), out.getvalue(), err.getvalue())


def waited(child: int) -> int | None:
    end, pause = time.monotonic() + PATIENCE, 0.001
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.3, 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Runs:
    """Runs of an action in a process that isn't this one; another takes over wherever a run ended it."""

    def __init__(self, action: Callable[..., int]) -> None:
        self.action = action
        self.child: int | None = None
        self.out, self.err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115

    def start(self) -> None:
        self.here, there = multiprocessing.Pipe()

        def serve() -> int:
            self.here.close()
            with contextlib.suppress(EOFError):
                while True:
                    arguments = there.recv()
                    os.dup2(self.out.fileno(), 1)  # which a signal may have kept a run from putting back
                    code = self.action(*arguments)
                    sys.stdout.flush()
                    sys.stderr.flush()
                    there.send(code)
            return 0

        self.child = started(Path.cwd(), serve, (self.out.fileno(), self.err.fileno()))
        there.close()

    def run(self, *arguments: object) -> Ended:
        if self.child is None:
            self.start()
        assert self.child is not None
        for stream in (self.out, self.err):
            stream.seek(0)  # theirs too
            stream.truncate()
        self.here.send(arguments)
        try:
            code = self.here.recv() if self.here.poll(PATIENCE) else self.end(signal.SIGKILL)
        except (EOFError, ConnectionResetError):
            code = self.end()
        return Ended(code, *map(printed, (self.out, self.err)))

    def end(self, number: int | None = None) -> int | None:
        """Wait for the process to end, with None for an exit code where a signal has to end it."""
        if self.child is None:
            return None
        self.here.close()
        child, self.child = self.child, None
        if number is not None:
            os.kill(child, number)
        code = waited(child)
        return code if number is None else None


@dataclass
class Steps:
    """Counts the calls of some families in this process, and does something at one of them."""

    families: Sequence[str]
    at: int = 0
    act: Callable[[], None] = lambda: None
    counts: Counter[str] = field(default_factory=Counter)

    def watched(self, family: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.counts[family] += 1
            if self.counts.total() == self.at:
                self.act()
            return call(*arguments, **options)

        return watched

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the calls that are made meanwhile."""
        steps = self

        class WatchedFile(io.FileIO):
            def write(self, data: Any) -> int:
                return steps.watched("write", super().write)(data)  # type: ignore[no-any-return]

        with contextlib.ExitStack() as stack:
            for family in self.families:
                for module, names in FAMILIES[family]:
                    for name in names:
                        call = self.watched(family, getattr(module, name, None) or getattr(builtins, name))
                        stack.enter_context(mock.patch.object(module, name, call, create=True))
            if "write" in self.families:
                stack.enter_context(mock.patch.object(io, "FileIO", WatchedFile))
            yield


class Fault(NamedTuple):
    """What happens at a step: of which families, what is done there, and its name."""

    families: tuple[str, ...]
    how: str
    name: str

    @property
    def kind(self) -> str:
        """What it is counted as."""
        return f"{self.families[0]} fails" if self.how == "fail" else self.how


def faults() -> Iterator[Fault]:
    for family, numbers in ERRORS.items():
        for number in numbers:
            yield Fault((family,), "fail", errno.errorcode[number])
    for name in SIGNALS:
        yield Fault(("write", "rename", "fsync", "unlink", "read"), "signal", name)
    for change in CHANGES:
        yield Fault(MOMENTS, "change", change)


def act_of(fault: Fault, folder: Path, source: str) -> Callable[[], None]:
    """Return what is done at the step, in the process that is watched."""
    unpatched_open, unpatched_replace, unpatched_write = os.open, os.replace, os.write

    def fail() -> None:
        number = getattr(errno, fault.name)
        if fault.families == ("allocate",):
            raise MemoryError
        raise OSError(number, os.strerror(number))

    def change() -> None:
        if fault.name == "renamed over":
            shutil.copyfile(folder.parent / "changed" / source, folder / ".theirs")
            unpatched_replace(folder / ".theirs", folder / source)
            return
        descriptor = unpatched_open(folder / source, os.O_RDWR)
        try:
            if fault.name == "cut short":
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_END) // 2)
            else:
                unpatched_write(descriptor, (folder.parent / "changed" / source).read_bytes())
        finally:
            os.close(descriptor)

    if fault.how == "fail":
        return fail
    return change if fault.how == "change" else lambda: os.kill(os.getpid(), getattr(signal, fault.name))


# --- what may be left


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Case:
    """A scenario made ready: the folder as it is before, and what the outputs are in every state that may be.

    Attributes:
        start: the folder that each run begins with a copy of.
        inputs: names of the files that are read.
        states: outputs by name, before a run (`old`), after it (`new`), and after one of the changed source.
        said: what a command that only reads prints, of the one source and the other.
        counts: steps of each family.
    """

    scenario: Scenario
    home: Path
    inputs: set[str] = field(default_factory=set)
    states: dict[str, dict[str, bytes]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def start(self) -> Path:
        return self.home / "start"

    @property
    def work(self) -> Path:
        return self.home / "work"

    def action(self) -> int:
        return run_app(list(self.scenario.line))

    def make(self, prepared: Path) -> None:
        for name, seed in (("start", 1), ("changed", 2)):
            shutil.copytree(prepared / str(seed), self.home / name)
        if self.scenario.existing:
            # The old output is of yet another network.
            shutil.copytree(prepared / "3", self.home / "old")
            assert run_here(self.home / "old", self.scenario.line).code == 0
            for name in files_of(self.home / "old").keys() - files_of(self.start).keys():
                (self.start / name).parent.mkdir(exist_ok=True)
                shutil.copy(self.home / "old" / name, self.start / name)
        self.inputs = set(files_of(self.home / "changed"))
        for state in ("new of the changed source", "new"):
            self.reset()
            if state != "new":
                shutil.copyfile(self.home / "changed" / self.scenario.source, self.work / self.scenario.source)
            ended = run_here(self.work, self.scenario.line)
            assert ended.code in (0, 1), (self.scenario, ended)
            self.said.add(ended.out)
            self.states[state] = self.outputs()
        self.reset()
        self.states["old"] = self.outputs()
        steps = Steps(list(FAMILIES))
        with steps.counted():
            assert run_here(self.work, self.scenario.line).code in (0, 1)
        self.counts = steps.counts

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.start, self.work)

    def outputs(self) -> dict[str, bytes]:
        """Return what stands beside the inputs, and an input that is written to."""
        kept = {self.scenario.source} if "in place" in self.scenario.name else set[str]()
        return {name: data for name, data in files_of(self.work).items() if name not in self.inputs - kept}

    def steps(self, fault: Fault) -> int:
        """Return at how many steps a fault can happen."""
        return sum(self.counts[family] for family in fault.families)

    def run(self, fault: Fault, at: int, reached: Path) -> int:
        """Run in this process with a fault at a step, and mark that there was such a step."""
        self.reset()
        os.chdir(self.work)
        time.sleep(TICK)
        reached.unlink(missing_ok=True)
        act, mark = act_of(fault, self.work, self.scenario.source), os.open

        def reach() -> None:
            mark(reached, os.O_CREAT)
            act()

        with Steps(fault.families, at, reach).counted():
            return self.action()

    def problem(self, fault: Fault, ended: Ended) -> str:
        """Say what is wrong about the end of a run, in a word; '' for nothing."""
        if ended.code is None:
            return "hung"
        unfinished = {name for name in self.outputs() if Path(name).name.startswith(".convtool-")}
        found = {name: data for name, data in self.outputs().items() if name not in unfinished}
        left = ended.err.partition("left over, and can be deleted: ")[2]
        said = {name for name in found if Path(name).name in left}
        found = {name: data for name, data in found.items() if name not in said}
        state = next((state for state, files in self.states.items() if files == found), None)
        if state is None and self.scenario.apart and self.each_whole(found):
            state = "old" if fault.name == "SIGKILL" or "written before that" not in ended.err else "new of one"
        killed = fault.name == "SIGKILL" and ended.code == -signal.SIGKILL
        if state is None and killed:  # files that no index names may be left of a set
            state = next((state for state, files in self.states.items() if self.named(found, files)), None)
        if "in place" in self.scenario.name and fault.how == "change":
            # What the other program has left of the source, or of what has its name by then.
            state = state or ("old" if ended.code else "new" if found == self.changed_output(fault) else None)
        if state is None:
            old = self.states["old"]
            return "lost" if any(found.get(name) != data for name, data in old.items()) else "half-written"
        if unfinished and not killed and not all(Path(name).name in ended.err for name in unfinished):
            return "left over"
        return self.untrue(fault, ended, state)

    def changed_output(self, fault: Fault) -> dict[str, bytes]:
        """Return what another program makes of an output that is in place already."""
        new, theirs = self.states["new"], (self.home / "changed" / self.scenario.source).read_bytes()
        ours = new[self.scenario.source]
        cut = fault.name == "cut short"
        return {**new, self.scenario.source: ours[: len(ours) // 2] if cut else theirs + ours[len(theirs) :]}

    def each_whole(self, found: Mapping[str, bytes]) -> bool:
        """Tell whether each output by itself is as it was, or as it was to be."""
        states = list(self.states.values())
        names = set().union(*states)
        return found.keys() <= names and all(found.get(name) in [state.get(name) for state in states] for name in names)

    def named(self, found: Mapping[str, bytes], files: Mapping[str, bytes]) -> bool:
        """Tell whether what was found is a state, and files that its index doesn't name."""
        more = found.keys() - files.keys()
        return all(found.get(name) == data for name, data in files.items()) and not any(
            "index" in name for name in more
        )

    def untrue(self, fault: Fault, ended: Ended, state: str) -> str:
        """Say what is wrong about exit code and message."""
        code, said = ended.code, ended.err
        if code == 70 or "Traceback" in said:
            return "a bug"
        if fault.how == "signal":
            number = getattr(signal, fault.name)
            if code not in (0, 1, 128 + number, -number if number == signal.SIGKILL else 0):
                return "a wrong exit code"
        elif code not in (0, 1, 3, 5):
            return "a wrong exit code"
        if code in (0, 1) and self.states["new"] != self.states["old"] and not state.startswith("new"):
            return "not written"
        if code in (0, 1) and self.states["new"] == self.states["old"] and ended.out not in self.said:
            return "mixed"
        if "nothing was changed" in said and state.startswith("new") and self.states["new"] != self.states["old"]:
            return "an untrue message"
        if "written before that" in said and state == "old":
            return "an untrue message"
        return ""


# --- all of them


@dataclass
class Row:
    """What came of a scenario under the faults of one kind."""

    steps: int
    runs: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return f"{self.steps}/{self.runs}/{self.wrong}"


def tried(case: Case, sample: Callable[[], bool]) -> Iterator[tuple[Fault, int, str]]:
    """Yield every fault that was tried on a case, at which step, and what was wrong."""
    reached = case.home / "reached"
    runs = Runs(functools.partial(case.run, reached=reached))
    for fault in faults():
        for at in range(1, case.steps(fault) + 1):
            if sample():
                ended = runs.run(fault, at)
                problem = case.problem(fault, ended) if reached.exists() else ""
                if fault.name == "SIGKILL" and not problem and case.scenario.existing:
                    problem = again(case)
                if problem:
                    problem += f": exit code {ended.code}, {ended.err.strip()[-300:]!r}"
                yield fault, at, problem
    runs.end()


def again(case: Case) -> str:
    """Run once more over what a killed run has left, an hour later."""
    for left in case.work.rglob(".convtool-*"):
        os.utime(left, (0, 0))
    ended = in_folder(case.work, case.action)
    if ended.code != 0 or any(case.work.rglob(".convtool-*")):
        return f"the next run didn't get through, or left what the killed one had left: {ended.err}"
    return ""


RACES = (  # of two processes that write the same
    ("convert", "out.safetensors"),
    ("convert", "out.pt"),
    ("convert", "out", "--shard-size", "400B"),
    ("toeplitz", *LAYER, "-o", "out.npz"),
    ("toeplitz", *LAYER, "-o", "out.safetensors", "--shards", "3"),
)


def race(rounds: int) -> tuple[int, list[str]]:
    """Have two processes write the same output at once, with --force and without: one wins, always."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for seed in (1, 2):
            prepare(Path(name, str(seed)), seed)
        for (command, *options), force in itertools.product(RACES, ((), ("--force",))):
            lines = [[command, f"../{seed}/net.safetensors", *options, *force, "-q"] for seed in (1, 2)]
            wanted = []
            for line in lines:
                (alone := Path(name, "alone")).mkdir()
                assert run_here(alone, line).code == 0
                wanted.append(published(alone)[0])
                shutil.rmtree(alone)
            for _ in range(rounds):
                (work := Path(name, "work")).mkdir()
                children = [started(work, functools.partial(run_app, line)) for line in lines]
                codes = sorted(waited(child) or 0 for child in children)
                found, left = published(work)
                right = codes == [0, 5] or (force and codes == [0, 0])  # one may come before the other begins
                if not right or found not in wanted or left:
                    wrong.append(f"{command} {options} {force}: exit codes {codes}, left over {sorted(left)}")
                shutil.rmtree(work)
    return 2 * len(RACES) * rounds, wrong


def published(folder: Path) -> tuple[list[bytes], set[str]]:
    """Return what the files hold that an index names, or the only file; and the names of all others."""
    files = files_of(folder)
    index = next((name for name in files if name.endswith(".index.json")), None)
    if index is None:
        names = sorted(files)[:1]
    else:
        read = json.loads(files[index])
        homes = [shard["file"] for shard in read["shards"]] if "shards" in read else read["weight_map"].values()
        names = sorted(str(Path(index).with_name(home)) for home in set(homes))
    return [files[name] for name in names], files.keys() - {*names, index}


def table(only: str = "", sample: int | None = None, seed: int = 0, *, quiet: bool = False) -> tuple[int, list[str]]:
    """Try the faults of every scenario; return how many, and what was wrong.

    Args:
        only: part of the scenarios' titles.
        sample: about how many faults, of all.
        quiet: whether no row is printed for each scenario as it ends.
    """
    chance, runs, wrong = random.Random(seed), 0, list[str]()
    chosen = [one for one in scenarios() if only in one.title]
    share = 1.0 if sample is None else sample / (USUAL * len(chosen))
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # without a disk to wait for
    kinds = list(dict.fromkeys(fault.kind for fault in faults()))
    if not quiet:
        print(f"{'steps / faults / wrong':44}", *(f"{kind:>16}" for kind in kinds), flush=True)
    with tempfile.TemporaryDirectory(dir=where) as name:
        for seed in (1, 2, 3):
            prepare(Path(name, str(seed)), seed)
        for scenario in chosen:
            with tempfile.TemporaryDirectory(dir=where) as home:
                case = Case(scenario, Path(home))
                case.make(Path(name))
                rows = {fault.kind: Row(case.steps(fault)) for fault in faults()}
                for fault, at, problem in tried(case, lambda: chance.random() < share):
                    rows[fault.kind].runs += 1
                    if problem:
                        rows[fault.kind].wrong += 1
                        families = "/".join(fault.families)
                        wrong.append(f"{scenario.title}, {fault.name} at step {at} of {families}: {problem}")
            if not quiet:
                print(f"{scenario.title:44}", *(f"{rows[kind]!s:>16}" for kind in kinds), flush=True)
            runs += sum(row.runs for row in rows.values())
    return runs, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=int, help="about how many faults, of all")
    parser.add_argument("--only", default="", help="part of a scenario's name")
    parser.add_argument("--race", type=int, help="rounds in which two processes write the same, and nothing fails")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs, wrong = race(given.race) if given.race else table(given.only, given.sample, given.seed)
    print(f"{runs} runs, {len(wrong)} wrong", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
