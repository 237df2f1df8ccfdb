"""Ranks of torchrun killed or stopped at random: `python tests/launched.py [--rounds 30] [--seed 0]`.

Each round starts torchrun with two to four processes that write one matrix in shards over an older one. At a random
moment one of them is killed (SIGKILL), or stopped for a while (SIGSTOP). What is left has to be the old matrix or the
new one, whole, and nothing beside it but what says by its name that it is unfinished, or shards that no index names;
and all processes have to end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from checkpoints import SAMPLES

LAYER = ("toeplitz", str(SAMPLES / "chains.safetensors"), "widen", "--input-size")
OLD, NEW = "16,5,6", "16,24,20"
PATIENCE = 120.0  # seconds after which a round counts as hung, however loaded the machine is
STOPPED = 3.0  # seconds


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".convtool-")}


def line(folder: Path, size: str, shards: int) -> list[str]:
    out = str(folder / "m.safetensors")
    return [*LAYER, size, "--padding", "1", "--shards", str(shards), "-q", "--force", "-o", out]


def write(folder: Path, size: str, shards: int) -> None:
    subprocess.run([sys.executable, "-m", "convtool", *line(folder, size, shards)], check=True)


def ranks_of(launcher: int) -> list[int]:
    """Return the processes that a launcher has started, as Linux lists them."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(process) for process in children.read_text().split()] if children.exists() else []


def round_of(folder: Path, count: int, shards: int, chance: random.Random, name: str) -> tuple[str, float]:
    """Launch, do something to a rank, and wait; how it ended, and after how many seconds."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    process = subprocess.Popen(
        [*launch, "-m", "convtool", *line(folder, NEW, shards)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    begin = time.monotonic()
    while len(ranks := ranks_of(process.pid)) < count and process.poll() is None:
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 1) * chance.choice((1.0, 4.0, 12.0)))
    if process.poll() is None:
        victim = chance.choice(ranks)
        try:
            if name == "killed":
                os.kill(victim, signal.SIGKILL)
            else:
                os.kill(victim, signal.SIGSTOP)
                time.sleep(STOPPED)
                os.kill(victim, signal.SIGCONT)
        except ProcessLookupError:
            pass
    try:
        process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        process.kill()
        return "hung", time.monotonic() - begin
    return f"exit {process.returncode}", time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, counts, wrong = random.Random(given.seed), Counter[str](), list[str]()
    for number in range(given.rounds):
        count, shards = chance.randint(2, 4), chance.randint(2, 9)
        name = chance.choice(("killed", "killed", "stopped"))
        with tempfile.TemporaryDirectory() as home:
            old, new, work = (Path(home, part) for part in ("old", "new", "work"))
            for folder in (old, new, work):
                folder.mkdir()
            write(old, OLD, 3)
            write(work, OLD, 3)
            write(new, OLD, 3)
            write(new, NEW, shards)
            ended, seconds = round_of(work, count, shards, chance, name)
            found, states = files(work), {"old": files(old), "new": files(new)}
            state = next((one for one, all_of in states.items() if all_of.items() <= found.items()), "lost")
            more = found.keys() - states.get(state, {}).keys() - states["new"].keys()
            if (
                state == "lost"
                or more
                or ended == "hung"
                or (name == "stopped" and (ended, state) != ("exit 0", "new"))
            ):
                wrong.append(f"round {number}: {count} ranks, one {name}: {ended}, {state}, {sorted(more)}")
                print(wrong[-1], flush=True)
            counts[f"{name}: {ended}, {state}"] += 1
            print(
                number,
                count,
                shards,
                name,
                ended,
                state,
                f"{seconds:.1f} s",
                sorted(found.keys() - states[state].keys()) if state in states else "",
                flush=True,
            )
    print(dict(counts))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
