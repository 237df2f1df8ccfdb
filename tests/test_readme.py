"""The README is true: its commands run as written and print what it shows, its Python runs, its tables are complete.

`python tests/test_readme.py` writes the outputs of the day into the README; read the difference before keeping it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convtool.cli import exit_codes
from convtool.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)


def run_block(block: str, folder: Path) -> str:
    """The block again, each `$ ` command followed by what it prints (both streams) and a non-zero exit code."""
    lines = []
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
    }
    for command in (line for line in block.splitlines() if line.startswith("$ ")):
        done = subprocess.run(
            ["bash", "-c", command[2:] + " 2>&1"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        lines += [command, *done.stdout.splitlines()]
        if done.returncode:
            lines.append(f"[exit code {done.returncode}]")
    return "\n".join(lines) + "\n"


def run_all(folder: Path) -> str:
    """The README with every console block run in order, in one folder that has the sample models."""
    shutil.copytree(ROOT / "sample_models", folder / "sample_models")
    return CONSOLE.sub(lambda match: f"```console\n{run_block(match[1], folder)}```", README.read_text())


def test_console_blocks_print_what_the_readme_shows(tmp_path: Path) -> None:
    assert run_all(tmp_path) == README.read_text()


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_command_and_exit_code_is_listed() -> None:
    text = README.read_text()
    for command in app.registered_commands:
        assert f"`convtool {command.name} " in text
    for code in exit_codes.MEANINGS:
        assert re.search(rf"^\| (\d+, )?{code}(, \d+)? \|", text, re.MULTILINE), code


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)$", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        README.write_text(run_all(Path(folder)))
