"""The README is true: its commands run as written and print what it shows, its Python runs, its tables are complete.

What stands between `<!-- NAME -->` and `<!-- end -->` is made here from the code. `python tests/test_readme.py` writes
that and the outputs of the day into the README; read the difference before keeping it.
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
from convtool.cli.app import COMMANDS, find_command
from convtool.cli.help import summary

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands_table() -> str:
    """Every command with its arguments and the first sentence of its help."""
    rows = [
        (f"`convtool {name} {command.usage}`", command.run.__doc__)
        for name, command in ((name, find_command(name)) for name in COMMANDS)
    ]
    lines = [f"| {usage} | {summary(text)} |" for usage, text in rows]
    return "\n".join(["| command | |", "| --- | --- |", *lines])


def exit_codes_table() -> str:
    lines = [f"| {code} | {meaning} |" for code, meaning in exit_codes.MEANINGS.items()]
    return "\n".join(["| exit code | meaning |", "| --- | --- |", *lines])


def pipeline_files() -> str:
    files = [ROOT / "sample_models" / "pipeline" / name for name in ("pipeline.sh", "release.mk", "array.sh")]
    kinds = {".sh": "bash", ".mk": "make"}
    return "\n".join(f"```{kinds[file.suffix]}\n{file.read_text()}```" for file in files)


GENERATED = {"commands": commands_table, "exit codes": exit_codes_table, "pipeline": pipeline_files}


def with_generated(text: str) -> str:
    """The README's text with what is made from the code put in its place."""
    for name, make in GENERATED.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert place.search(text), f"the README has no <!-- {name} --> ... <!-- end -->"
        content = make()
        text = place.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)  # type: ignore[misc]
    return text


def run_block(block: str, folder: Path) -> str:
    """The block again, each `$ ` command followed by what it prints (both streams) and a non-zero exit code."""
    lines = []
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
        "COLUMNS": "100",
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
    text = with_generated(README.read_text())
    return CONSOLE.sub(lambda match: f"```console\n{run_block(match[1], folder)}```", text)


def test_console_blocks_print_what_the_readme_shows(tmp_path: Path) -> None:
    assert run_all(tmp_path) == README.read_text()


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_tables_and_scripts_are_those_of_the_code() -> None:
    assert with_generated(README.read_text()) == README.read_text()


def test_the_reference_shows_every_commands_help() -> None:
    blocks = "".join(CONSOLE.findall(README.read_text()))
    assert [name for name in COMMANDS if f"$ convtool {name} --help" not in blocks] == []


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)$", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_what_the_page_for_contributors_names_is_there() -> None:
    text = (ROOT / "convtool" / "manual" / "contributing.md").read_text()
    places = set(re.findall(r"`((?:convtool|tests)/[\w/.]*)`", text))
    assert len(places) > 30
    assert [place for place in places if not (ROOT / place).exists()] == []
    rooms = {path.name for path in (ROOT / "convtool").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {f"convtool/{room}/" for room in rooms - {"manual"}} <= places


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        README.write_text(run_all(Path(folder)))
