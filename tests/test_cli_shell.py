"""At home in a shell: completion, terminals and what isn't one, streams, progress."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convtool.cli import output
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
        ("convtool fuse chains.pt spread gather --set gather.str", ["gather.stride="]),
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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_names_that_a_shell_would_carry_out_are_not_completed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = [
        "$(touch${IFS}x)",
        "\\$(id>x)",
        "`id`",
        ";id",
        "&id",
        "|id",
        "{a,b}",
        "~",
        "!!",
        "--force",
        "=ls",
        "a*",
        "#",
    ]
    save_file({f"{name}.weight": torch.zeros(3, 2, 1, 2) for name in (*hostile, "plain.0")}, tmp_path / "n.safetensors")
    line = f"convtool toeplitz {tmp_path / 'n.safetensors'} "
    for name, value in (("COMP_WORDS", line), ("COMP_CWORD", "3"), ("_TYPER_COMPLETE_ARGS", line)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", "")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("_CONVTOOL_COMPLETE", f"complete_{shell}")
    assert run_app([]) == 0
    shown = capsys.readouterr().out
    assert "plain.0" in shown
    assert [name for name in hostile if name.strip("~#=") and name in shown] == []
    assert not set(shown) & set("$`;&|~!#") - set("|" if shell == "powershell" else "")


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


# --- terminals, and what isn't one


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


STYLE = re.compile(r"\x1b\[[0-9;]*m")
COLUMNS = ("layer", "kind", "size")
ROWS = [("layer1.0.conv1", "conv", "1.5 KiB"), ("head\x1b[2J", "linear", "")]


def table_on(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **changes: str) -> str:
    for name in ("NO_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream)
    output.table(COLUMNS, ROWS, right=("size",))
    return stream.getvalue()


def test_a_table_is_columns_in_a_pipe_whatever_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (
        "layer           kind       size\n"  #
        "layer1.0.conv1  conv    1.5 KiB\n"
        "head\\x1b[2J     linear\n"
    )
    assert table_on(io.StringIO(), monkeypatch, COLUMNS="10") == plain
    assert table_on(Terminal(), monkeypatch, COLUMNS="40", NO_COLOR="1") == plain
    assert table_on(Terminal(), monkeypatch, COLUMNS="40", TERM="dumb") == plain
    styled = table_on(Terminal(), monkeypatch, COLUMNS="40")
    assert [line.rstrip() for line in STYLE.sub("", styled).splitlines()] == plain.splitlines()
    assert styled.startswith("\x1b[1mlayer")  # the header is bold, and nothing else
    assert "\x1b" not in styled.partition("\n")[2]


def test_a_long_table_is_cut_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shown = [(f"layer{n}",) for n in range(9)], {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        output.table(("layer",), rows, most=3)
        shown[type(stream)] = stream.getvalue().splitlines()
    assert shown[Terminal][-2:] == ["layer2", "... and 6 more; a pipe gets all of them, such as | less"]
    assert len(shown[io.StringIO]) == 10


@pytest.mark.parametrize(
    ("colour", "on_terminal", "no_color", "coloured"),
    [
        (None, True, "", True),
        ("auto", True, "1", False),
        (None, False, "", False),
        ("always", False, "1", True),
        ("never", True, "", False),
    ],
)
def test_a_verdict_has_a_colour_where_one_is_wanted(
    colour: output.Colour | None, on_terminal: bool, no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    for good, number in ((True, 32), (False, 31)):
        monkeypatch.setattr(sys, "stdout", stream := Terminal() if on_terminal else io.StringIO())
        output.Reporter("verify", colour=colour).verdict("so it is", good=good)
        assert stream.getvalue() == (f"\x1b[{number}mso it is\x1b[0m\n" if coloured else "so it is\n")


def test_the_last_column_of_a_table_is_folded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "35")
    monkeypatch.setenv("NO_COLOR", "1")
    output.table(("layer", "exact"), [("[conv1]", "the first row and the last row")])
    assert stream.getvalue() == (
        "layer    exact\n"  #
        "[conv1]  the first row and the\n"
        "         last row\n"
    )


def test_a_dash_is_left_out_where_a_row_is_no_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(rim: str, count: int = 3) -> str:
        monkeypatch.setattr(sys, "stdout", stream := Terminal())
        monkeypatch.setenv("COLUMNS", "30")
        monkeypatch.setenv("NO_COLOR", "1")
        rows = [(f"a long name of layer {n}", str(n), "1% of the bound", rim, "equivalent") for n in range(count)]
        output.table(("layers", "input", "interior", "rim", "verdict"), rows)
        return stream.getvalue()

    for count in (2, 3):  # in paragraphs, and in the line that says what all rows have in common
        assert "rim 3%" in shown("3%", count)
        assert "rim" not in shown("-", count)


def test_what_all_rows_have_in_common_is_said_once_where_that_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, ...]]
    rows = [(f"conv{n}", "float32", f"{n} KiB", f"stride 1, padding {n}") for n in (1, 2, 10)]

    def shown(columns: str, rows: list[tuple[str, ...]]) -> list[str]:
        monkeypatch.setattr(sys, "stdout", stream := Terminal())
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("NO_COLOR", "1")
        output.table(("layer", "dtype", "size", "geometry"), rows, right=("size",), most=3)
        return stream.getvalue().splitlines()

    assert shown("47", rows)[1] == "conv1   float32   1 KiB  stride 1, padding 1"
    assert shown("40", rows) == [
        "layer     size  geometry",
        "conv1    1 KiB  stride 1, padding 1",
        "conv2    2 KiB  stride 1, padding 2",
        "conv10  10 KiB  stride 1, padding 10",
        "of all: dtype float32",
    ]
    # A line ends behind a comma where it can, and not in front of a number.
    assert shown("30", rows)[1:3] == ["conv1    1 KiB  stride 1,", "                padding 1"]
    # One that isn't shown counts too.
    other = shown("40", [*rows, ("conv11", "float16", "1 KiB", "")])
    assert other[-1].startswith("... and 1 more")
    assert not any("of all" in line for line in other)


def test_a_table_is_paragraphs_in_a_window_too_narrow_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_on(Terminal(), monkeypatch, COLUMNS="24", NO_COLOR="1") == (
        "layer1.0.conv1\n"  #
        "  kind conv;\n"
        "    size 1.5 KiB\n"
        "head\\x1b[2J\n"
        "  kind linear\n"
    )


def test_a_page_in_a_narrow_window_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("NO_COLOR", "1")
    output.markdown("| file | read |\n| --- | --- |\n| `torch.distributed.checkpoint` | .safetensors, and others |\n")
    lines = [line for line in stream.getvalue().splitlines() if line.strip() and "─" not in line]
    start = lines[0].index("read")
    assert "".join(line[:start].strip() for line in lines) == "filetorch.distributed.checkpoint"


def test_progress_shows_on_a_terminals_stderr_after_a_while_and_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(threading.Timer):
        """Rings at once, or never."""

        def start(self) -> None:
            if self.interval == 0:
                self.function()

        def join(self, timeout: float | None = None) -> None:
            """It has no thread."""

    stdout = sys.stdout

    def shown(
        stream: io.StringIO, unit: output.Unit = "bytes", patience: float = 0, total: int | None = 8 << 20, **more: str
    ) -> str:
        for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1", **more}.items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as patch:
            patch.setattr(output, "PATIENCE", patience)
            patch.setattr("convtool.cli.output.threading.Timer", Clock)
            patch.setattr(sys, "stderr", stream)
            with output.Reporter("test").progress("writing [x].npz", total, unit) as advance:
                advance(1 << 20)
                assert (sys.stdout, sys.stderr) == (stdout, stream)  # others may be replacing them meanwhile
                advance(1 << 20)
        return stream.getvalue()

    text = shown(Terminal())
    assert "writing [x].npz" in text
    assert "/8.4 MB" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # the bar's line is erased
    assert "writing [x].npz" in shown(Terminal(), total=None)
    assert " 25%" in shown(Terminal(), "share")
    assert shown(Terminal(), patience=60) == ""  # over before anyone wondered
    narrow = STYLE.sub("", shown(Terminal(), COLUMNS="40")).replace("\r", "\n").split("\n")
    assert any("writing [x].npz" in line and "25%" in line for line in narrow)
    assert max(len(re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line)) for line in narrow) <= 40
    assert shown(io.StringIO()) == ""
    assert shown(Terminal(), TERM="dumb") == ""


# --- streams


def test_geometry_and_recipes_are_read_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(line: str, text: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code = run_app(line.split())
        captured = capsys.readouterr()
        return code, captured.out or captured.err

    monkeypatch.chdir(SAMPLES)
    code, shown = run("inspect chains.safetensors widen --geometry -", '"wid*" = { padding = [1, 2] }')
    assert (code, shown.splitlines()[1].split("  ")[-1], shown.splitlines()[2]) == (0, "padding 1,2", "geometry by -")
    recipe = '[[fuse]]\nname = "whole"\nchain = ["reduce", "spread"]\n'
    recipe += '[geometry]\n"*" = { stride = 1, padding = 0, dilation = 1, groups = 1 }\n'
    code, shown = run("fuse chains.safetensors --recipe - -o whole.safetensors --dry-run", recipe)
    said = [line for line in shown.splitlines() if not line.startswith("assumed: ")]
    assert (code, said[0]) == (0, "reduce → spread becomes whole")
    code, shown = run("inspect chains.safetensors --geometry -", "widen = {")
    assert code == 3
    assert shown.startswith("convtool: -: is not TOML")


def test_json_has_shapes_on_one_line_and_the_same_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {
        "shape": [4, 3, 2],
        "pairs": [[0, 1], [-2, 2.5e-07]],
        "names": ["[\n1\n]", "a [ 1,\n 2 ]", "\u00e9"],
        "none": [],
        "odd": [float("nan"), float("inf"), 1.0],
    }
    output.print_document(document)
    printed = capsys.readouterr().out
    assert json.loads(printed) == document | {"odd": ["nan", "inf", 1.0]}
    assert '"shape": [4, 3, 2],' in printed
    assert "[0, 1],\n    [-2, 2.5e-07]\n" in printed
    assert printed.isascii()


def test_lines_fold_between_words_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(stream: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", "30")
        output.print_error("fuse", "output", "out.safetensors: exists already; use --force to overwrite", as_json=False)
        return stream.getvalue()

    assert said(io.StringIO()) == "convtool: out.safetensors: exists already; use --force to overwrite\n"
    assert said(Terminal()) == (
        "convtool: out.safetensors:\n"  #
        "  exists already;\n"
        "  use --force to overwrite\n"
    )


def test_a_long_line_has_its_clauses_below_each_other_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    layer = "normalize(mean=.5; std=.2)"
    output.say(f"convtool: cannot fuse {layer}, a; leave it; or accept that: convtool fuse n.pt '{layer}' a")
    assert stream.getvalue() == (
        f"convtool: cannot fuse {layer}, a;\n  leave it;\n  or accept that:\n    convtool fuse n.pt '{layer}' a\n"
    )


def test_the_window_is_that_of_whichever_stream_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(descriptor: int) -> os.terminal_size:
        if descriptor == 2:  # stdout goes to a file
            return os.terminal_size((47, 20))
        raise OSError

    monkeypatch.setattr("convtool.cli.output.os.get_terminal_size", size)
    for told, columns in (("", 47), ("0", 47), ("x", 47), ("61", 61)):
        monkeypatch.setenv("COLUMNS", told)
        assert output.window_columns() == columns
