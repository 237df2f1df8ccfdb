"""How long the program takes to start: whole processes, beside those that import what it is built on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness import Candidate, Comparison, timed

SAMPLE = Path(__file__).resolve().parent.parent.parent / "sample_models" / "chains"
CONVTOOL = (sys.executable, "-m", "convtool")


def comparisons(short: bool) -> Iterator[Comparison]:
    """The rows about starting."""
    yield quick()
    yield inspecting()


def quick() -> Comparison:
    """What needs neither torch nor numpy."""
    completing = "COMP_WORDS='convtool fuse --in' COMP_CWORD=2 _CONVTOOL_COMPLETE=complete_bash"
    return Comparison(
        "start-up: --help and what else opens no file",
        [
            Candidate("python -c 'import typer'", process(sys.executable, "-c", "import typer")),
            Candidate("convtool --help", process(*CONVTOOL, "--help")),
            Candidate("convtool fuse --help", process(*CONVTOOL, "fuse", "--help")),
            Candidate("convtool --version", process(*CONVTOOL, "--version")),
            Candidate("convtool fuze (a usage error)", process(*CONVTOOL, "fuze", expected=2)),
            Candidate("completing an option", process("bash", "-c", f"{completing} {' '.join(CONVTOOL)}")),
            Candidate("python -c 'import torch'", process(sys.executable, "-c", "import torch")),
        ],
        "convtool --help",
        3,
        note="Whole processes, their end included.",
    )


def inspecting() -> Comparison:
    """Listing a small checkpoint."""
    one, other = f"{SAMPLE}.safetensors", f"{SAMPLE}.pt"
    safe = "f = safe_open(sys.argv[1], 'pt'); print({name: f.get_slice(name).get_shape() for name in f.keys()})"
    loaded = "print({name: tensor.shape for name, tensor in torch.load(sys.argv[1]).items()})"
    return Comparison(
        "start-up: listing the layers of a checkpoint",
        [
            Candidate("python -c 'import torch'", process(sys.executable, "-c", "import torch")),
            Candidate("convtool inspect, .safetensors", process(*CONVTOOL, "inspect", one)),
            Candidate("convtool inspect --json, .safetensors", process(*CONVTOOL, "inspect", one, "--json")),
            Candidate("convtool inspect, .pt", process(*CONVTOOL, "inspect", other)),
            Candidate(
                "safetensors.safe_open and a loop",
                process(sys.executable, "-c", f"import sys; from safetensors import safe_open; {safe}", one),
            ),
            Candidate("torch.load and a loop", process(sys.executable, "-c", f"import sys, torch; {loaded}", other)),
        ],
        "convtool inspect, .safetensors",
        0.25,
        note="Whole processes, their end included.",
    )


def process(*arguments: str, expected: int = 0) -> Callable[[], float]:
    """Seconds that a process takes; an error where it ends otherwise than it should."""

    def job() -> None:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode != expected:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")

    return timed(job)
