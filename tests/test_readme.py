"""README and manual are true: commands run as written and print what is shown, Python runs.

What stands between `<!-- NAME -->` and `<!-- end -->` is made here from the code. `python tests/test_readme.py [PAGE]`
writes that and the outputs of the day into the pages; read the difference before keeping it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import typer
from warm import warm_convtool

from convtool.cli import exit_codes
from convtool.cli.app import COMMANDS, application, find_command
from convtool.cli.help import summary
from convtool.core.geometry import PaddingMode

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = {path.stem: path for path in (README, *sorted((ROOT / "convtool" / "manual").glob("*.md")))}
ROUNDINGS = re.compile(r"\d[\d.]*e-\d\d")  # '3.8e-07' on one processor is '4.4e-07' on another
BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)


def commands_table() -> str:
    """Every command with its arguments and the first sentence of its help."""
    rows = [
        (f"`convtool {name} {command.usage}`", command.run.__doc__)
        for name, command in ((name, find_command(name)) for name in COMMANDS)
    ]
    lines = [f"| {usage} | {summary(text)} |" for usage, text in rows]
    return "\n".join(["| command | |", "| --- | --- |", *lines])


def pages_table() -> str:
    """Every page of the manual with its title; outside of a clone the link leads nowhere."""
    titles = {name: path.read_text().partition("\n")[0] for name, path in PAGES.items() if path != README}
    rows = [
        f"| [`convtool manual {name}`](convtool/manual/{name}.md) | {title.removeprefix('# ')} |"
        for name, title in titles.items()
    ]
    return "\n".join(["| page | about |", "| --- | --- |", *rows])


def every_help() -> str:
    """The help of every command, as a window of 100 columns shows it."""
    command = typer.main.get_command(application(COMMANDS))
    pages = []
    for name, one in command.commands.items():  # type: ignore[attr-defined]
        with mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"):
            text = one.get_help(typer.Context(one, info_name=f"convtool {name}"))
        pages.append(f"## {name}\n\n```text\n{text}\n```")
    return "\n\n".join(pages)


def exit_codes_table() -> str:
    lines = [f"| {code} | {meaning} |" for code, meaning in exit_codes.MEANINGS.items()]
    return "\n".join(["| exit code | meaning |", "| --- | --- |", *lines])


def pipeline_files() -> str:
    files = [ROOT / "sample_models" / "pipeline" / name for name in ("pipeline.sh", "release.mk", "array.sh")]
    kinds = {".sh": "bash", ".mk": "make"}
    return "\n".join(f"```{kinds[file.suffix]}\n{file.read_text()}```" for file in files)


GENERATED = {
    "commands": commands_table,
    "pages": pages_table,
    "help": every_help,
    "exit codes": exit_codes_table,
    "pipeline": pipeline_files,
}
PLACE = re.compile(r"<!-- (?P<name>(?!end)[\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def with_generated(text: str) -> str:
    """A page's text with what is made from the code put in its place."""
    return PLACE.sub(lambda match: f"<!-- {match['name']} -->\n{GENERATED[match['name']]()}\n<!-- end -->", text)


def run_block(block: str, folder: Path, programs: Path) -> str:
    """The block again, each `$ ` command followed by what it prints (both streams) and a non-zero exit code."""
    lines = []
    environment = os.environ | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
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


def run_page(page: Path, folder: Path, programs: Path) -> str:
    """A page with its blocks run in order, in one folder that has the sample models.

    Args:
        programs: a folder with `convtool`.
    """
    shutil.copytree(ROOT / "sample_models", folder / "sample_models")
    known: dict[str, object] = {}
    sys.modules.pop("load_net", None)  # another page's
    sys.path_importer_cache.pop(".", None)

    def block(match: re.Match[str]) -> str:
        if match[1] == "console":
            made = f"```console\n{run_block(match[2], folder, programs)}```"
            return match[0] if ROUNDINGS.sub("", made) == ROUNDINGS.sub("", match[0]) else made
        with contextlib.chdir(folder):
            exec(compile(match[2], str(page), "exec"), known)
        return match[0]

    return BLOCK.sub(block, with_generated(page.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_its_commands_print(page: str, tmp_path: Path, warm: Path) -> None:
    assert run_page(PAGES[page], tmp_path, warm) == PAGES[page].read_text()


def test_everything_made_of_the_code_is_shown_once() -> None:
    shown = [name for page in PAGES.values() for name in PLACE.findall(page.read_text())]
    assert sorted(shown) == sorted(GENERATED)


def test_links_lead_somewhere() -> None:
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_geometry_lists_every_padding_mode() -> None:
    (row,) = re.findall(r"^\| `padding_mode` .*", PAGES["geometry"].read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) - {"padding_mode"} == set(get_args(PaddingMode))


def test_the_readme_is_short_and_names_the_command_of_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 300
    assert len(text.split()) <= 2500
    links = {f"[`convtool manual {page}`](convtool/manual/{page}.md)" for page in PAGES if page != "README"}
    assert set(re.findall(r"\[[^]]*\]\([^)]*\.md\)", text)) == links


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

    with warm_convtool() as programs:
        for name in sys.argv[1:] or PAGES:
            with tempfile.TemporaryDirectory() as folder:
                PAGES[name].write_text(run_page(PAGES[name], Path(folder), programs))
