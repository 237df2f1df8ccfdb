"""At home in a shell: completion, terminals and what isn't one, streams, progress."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convtool.cli.app import run_app

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "sample_models"


def environment(**changes: str) -> dict[str, str]:
    """One thread, the convtool beside these tests, a plain terminal."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "TERM")}
    return kept | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"} | changes


# --- completion

Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    """What bash is given for a line whose last word is being typed."""
    monkeypatch.chdir(SAMPLES)

    def run(line: str) -> list[str]:
        monkeypatch.setenv("_CONVTOOL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        assert run_app([]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.split()

    return run


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("convtool in", ["inspect"]),
        ("convtool fuse --dry", ["--dry-run"]),
        ("convtool toeplitz chains.safetensors s", ["sharpen", "spread"]),
        ("convtool toeplitz chains.pt s", ["spread", "sharpen"]),  # each in its file's order
        ("convtool fuse chains.safetensors spread g", ["gather"]),
        ("convtool inspect conv_bn.safetensors conv", ["conv1", "conv2", "conv3", "conv4"]),
        ("convtool verify chains.pt conv_bn.pt --before reduce,spread,g", ["reduce,spread,gather"]),
        ("convtool verify chains.pt conv_bn.pt --after bn", ["bn1", "bn2", "bn3", "bn4"]),
        ("convtool inspect chains.pt --set gather.p", ["gather.padding=", "gather.padding_mode="]),
        ("convtool fuse chains.pt spread gather --set gather.st", ["gather.stride="]),
        ("convtool toeplitz chains.pt widen --layout d", ["dense"]),
        ("convtool toeplitz chains.pt widen --padding-mode re", ["replicate", "reflect"]),
        ("convtool fuse chains.pt --recipe repvg", ["repvgg-timm", "repvgg"]),
        ("convtool toeplitz missing.safetensors s", []),
        ("convtool toeplitz README.md s", []),
        ("convtool fuze x", []),
    ],
)
def test_completion_knows_commands_options_layers_and_fields(
    complete: Complete, line: str, expected: list[str]
) -> None:
    assert complete(line) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish", "powershell"])
def test_other_shells_are_asked_for_layers_as_well(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CONVTOOL_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"convtool toeplitz {SAMPLES / 'chains.safetensors'} wid")
    monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", "wid")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert run_app([]) == 0
    assert "widen" in capsys.readouterr().out


def test_bash_completes_with_what_convtool_tells_it() -> None:
    script = """
        eval "$(_CONVTOOL_COMPLETE=source_bash convtool)"
        COMP_WORDS=(convtool toeplitz sample_models/chains.safetensors wi) COMP_CWORD=3
        _convtool_completion convtool
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "widen\n", "")
