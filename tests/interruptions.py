"""Writes that are interrupted at each step, in processes of their own: `python tests/interruptions.py HOW FOLDER`.

A step is a system call that changes something on the disk. HOW is what happens there: `kill` (SIGKILL before it),
`term` (SIGTERM before it and after it), `fail` (the call reports a full disk), `random` (SIGKILL after a random time),
or `race` (nothing, but two processes write the same). What is left is held against the old state and the new one, and a
line of JSON says how many interruptions there were and which of them left anything else.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import files_in, save, write_edited
from torch import Tensor

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.cli.app import run_app
from convtool.cli.output import Reporter
from convtool.cli.run import run

CALLS = ("sendfile", "fsync", "fchmod", "link", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")
REMOVALS = ("unlink", "remove", "rmdir")  # which no disk is too full for
ROUNDS = 100  # of random kills; a 25th or 50th of that, of each race
UNTOUCHED = 77  # the exit code of a run that had fewer steps than the one at which something was to happen


def network(seed: int, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"conv{number}.{name}": torch.randn(*shape, generator=generator)
        for number in range(3)
        for name, shape in (("weight", (4, 4, size, 2)), ("bias", (4,)))
    }


# The output of each layout, in a folder of its own, and the bytes of tensors in a file of it.
LAYOUTS: dict[str, tuple[str, int | None]] = {
    "safetensors": ("out.safetensors", None),
    "torch": ("out.pt", None),
    "folder": ("out/model.safetensors.index.json", 1000),
    "folder of torch": ("out/pytorch_model.bin.index.json", 1000),
}
Write = Callable[[Path], int]


def writes(folder: Path, layout: str, seed: int, size: int = 3) -> Write:
    """A command that writes a checkpoint with an edit and a record to a folder; an older one and a newer one differ."""
    folder.mkdir(parents=True, exist_ok=True)
    out, shard_size = LAYOUTS[layout]
    source = open_checkpoint(save(network(seed, size), folder / f"in{seed}-{size}.pt"))
    edit = Edit.of(["conv1.weight"], {"conv1.weight": torch.full((3, 2), float(seed))}, "conv1.weight")
    record = Record(f"{seed}.0")

    def write(work: Path) -> int:
        def body() -> None:
            write_edited(source, edit, work / out, record, force=True, shard_size=shard_size)

        return run(Reporter("fuse", quiet=True), body)

    return write


def start(action: Callable[[], int]) -> int:
    """A process of its own that ends with the action's exit code; its number."""
    child = os.fork()
    if not child:
        code = 99
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            code = action()
        finally:
            os._exit(code)
    return child


def in_child(action: Callable[[], int], after: float | None = None) -> int:
    """The exit code of an action in a process of its own, which is killed after so many seconds; -9 for killed."""
    child = start(action)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Steps:
    """Counts the steps of this process, and does something at one of them."""

    def __init__(self, at: int, act: Callable[[], None], *, both_sides: bool) -> None:
        self.at = at
        self.both_sides = both_sides
        self.act = act
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.step()
            result = call(*arguments, **options)
            if self.both_sides:
                self.step()
            return result

        return watched

    def install(self, calls: Sequence[str]) -> None:
        for name in calls:
            setattr(os, name, self.watched(getattr(os, name)))
        steps, opened = self, os.open

        def watched_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            return (self.watched(opened) if flags & os.O_CREAT else opened)(path, flags, *arguments, **options)

        class WatchedFile(io.FileIO):
            def write(self, data: Any) -> int:
                return steps.watched(super().write)(data)  # type: ignore[no-any-return]

        os.open = watched_open
        io.FileIO = WatchedFile  # type: ignore[misc]


def raise_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "fail": raise_full,
}


def meaning(work: Path, layout: str) -> Any:
    """What a reader finds at the output: every tensor, and the record; None where nothing is there."""
    out = work / LAYOUTS[layout][0]
    if not out.exists():
        return None
    opened = open_checkpoint(out)
    record = opened.record
    return {name: bytes(opened.bits(name).tolist()) for name in opened.infos}, record and record.dumps()


def at_each_step(how: str, folder: Path, layout: str, existing: bool) -> tuple[int, list[str]]:
    """Interrupt at every step in turn until one run gets through."""
    write, work, start = writes(folder, layout, 2), folder / "work", folder / "start"
    start.mkdir()
    if existing:
        (start / "out").mkdir()
        assert writes(folder, layout, 1)(start) == 0
    shutil.copytree(start, work)
    old, old_files = meaning(work, layout), set(files_in(work))
    assert write(work) == 0
    new, new_files = meaning(work, layout), set(files_in(work))
    assert new != old
    wrong: list[str] = []
    seen: set[str] = set()
    for at in range(1, 10_000):
        shutil.rmtree(work)
        shutil.copytree(start, work)
        steps = Steps(at, ACTIONS[how], both_sides=how == "term")

        def action(steps: Steps = steps) -> int:
            steps.install([name for name in CALLS if how != "fail" or name not in REMOVALS])
            code = write(work)
            return code if steps.count >= steps.at else UNTOUCHED

        code = in_child(action)
        if code == UNTOUCHED:
            return at - 1, wrong + ([] if seen == {"old", "new"} else [f"{layout}: only {seen} was ever there"])
        found = meaning(work, layout)
        state = "old" if found == old else "new" if found == new else "neither"
        seen.add(state)
        stray = {name for name in files_in(work) if name not in old_files | new_files}
        problem = problem_of(how, code, state, stray)
        if how == "kill" and at % 5 == 0:
            for left in work.rglob(".convtool-*"):
                os.utime(left, (0, 0))  # as if an hour had passed
            if write(work) != 0 or meaning(work, layout) != new or list(work.rglob(".convtool-*")):
                problem = "the next run did not get through, or left what the killed one had left"
        if problem:
            wrong.append(f"{layout}, step {at}: {problem} (exit code {code}, {state}, left over {sorted(stray)})")
    raise AssertionError("more steps than anybody would count")


def problem_of(how: str, code: int, state: str, stray: set[str]) -> str:
    """What is wrong about the end of a run; '' for nothing."""
    if state == "neither":
        return "neither the old nor the new"
    if how == "kill":
        return "" if code == -signal.SIGKILL and all(map(is_temporary, stray)) else "something strange"
    if stray:
        return "something left over"
    if how == "term":
        return "" if code in (0, 143) else "a wrong exit code"
    return "" if code == 5 or (code == 0 and state == "new") else "a wrong exit code"


def is_temporary(name: str) -> bool:
    """Whether a file that is left over is one that says so by its name, or a part that no index names."""
    return Path(name).name.startswith(".convtool-") or name.startswith("out/")


def at_random(folder: Path) -> tuple[int, list[str]]:
    """Kill at random times; each run writes over what the one before it left."""
    chance = random.Random(0)
    wrong: list[str] = []
    killed = 0
    for layout in LAYOUTS:
        work = folder / layout
        (work / "out").mkdir(parents=True)
        commands = [writes(folder, layout, seed, 800) for seed in (3, 4)]
        states, longest = [], 0.0
        for write in commands:
            start = time.monotonic()
            assert in_child(partial(write, work)) == 0
            longest = time.monotonic() - start
            states.append(meaning(work, layout))
        goal = killed + ROUNDS // len(LAYOUTS)
        for turn in itertools.count():
            if killed >= goal:
                break
            write = commands[turn % 2]
            killed += in_child(partial(write, work), after=chance.uniform(0, longest)) == -signal.SIGKILL
            if meaning(work, layout) not in states:
                wrong.append(f"{layout}, turn {turn}: neither of the two")
    return killed, wrong


def race(folder: Path) -> tuple[int, list[str]]:
    """Two processes write the same output at once, with --force and without."""
    wrong: list[str] = []
    rounds = 0
    for layout, (name, shard_size) in LAYOUTS.items():
        sources = [save(network(seed), folder / f"{seed}.pt") for seed in (1, 2)]
        contents = [{name: bytes(open_checkpoint(path).bits(name).tolist()) for name in network(1)} for path in sources]
        size = [] if shard_size is None else ["--shard-size", str(shard_size)]
        for flags in (["--force"], []):
            for turn in range(ROUNDS // (25 if shard_size is None else 50)):
                work = folder / f"{layout}-{turn}{''.join(flags)}"
                work.mkdir()
                out = work / name
                children = [
                    start(partial(run_app, ["convert", str(path), str(out), *size, *flags])) for path in sources
                ]
                codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
                rounds += 1
                opened = open_checkpoint(out)
                found = {name: bytes(opened.bits(name).tolist()) for name in opened.infos}
                files = {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()}
                named = {str(Path(name).with_name(part)) for part in opened.files if part} | {name}
                right = codes == [0, 5] or (flags and codes == [0, 0])  # one may come before the other begins
                if shard_size is None and flags:
                    right = codes == [0, 0]
                if not right or found not in contents or files != named:
                    wrong.append(f"{layout}, turn {turn}: exit codes {codes}, files {sorted(files)}")
    return rounds, wrong


def main(how: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if how == "random":
        count, wrong = at_random(folder)
    elif how == "race":
        count, wrong = race(folder)
    else:
        count, wrong = 0, []
        # A single .safetensors file takes the steps that each file of a folder takes, and those of torch are kin.
        for layout in LAYOUTS if how == "kill" else ("torch", "folder"):
            for existing in (True, False):
                place = folder / f"{layout}-{existing}"
                steps, found = at_each_step(how, place, layout, existing)
                count += steps
                wrong += found
    print(json.dumps({"interruptions": count, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
