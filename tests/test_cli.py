"""The command line from outside: what goes to which stream, exit codes, what is written, and every bad input once.

Most runs are in this process (`convtool.cli.app.run_app` is all that `main` adds `sys.exit` to); processes of their own
are for what only they show: signals, pipes, the entry points. All layers, kernels and sizes are non-square.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import shell
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shell import Cli, Run
from torch import Tensor

from convtool.cli.app import COMMANDS, run_app
from convtool.cli.exit_codes import BROKEN_PIPE, INTERNAL, INTERRUPTED, TERMINATED

ROOT = Path(__file__).resolve().parent.parent
FAR = 1e30  # two such weights multiply beyond float32


def network() -> dict[str, Tensor]:
    """Layers that fit each other (first, second, norm), that don't (wide), and broken ones."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "first.weight": random(4, 3, 3, 2),
        "first.bias": random(4),
        "second.weight": random(5, 4, 2, 3),
        "second.bias": random(5),
        "norm.weight": random(5),
        "norm.bias": random(5),
        "norm.running_mean": random(5),
        "norm.running_var": random(5).square() + 0.5,
        "norm.num_batches_tracked": torch.tensor(7),
        "wide.weight": random(5, 6, 2, 3),
        "blur.weight": random(4, 3, 3, 5),
        "sharpen.weight": random(6, 4, 3, 3),
        "patch.weight": random(5, 4, 2, 4),
        "poison.weight": random(4, 3, 3, 2).index_fill(1, torch.tensor([1]), float("nan")),
        "huge.weight": random(4, 3, 3, 2) * FAR,
        "huger.weight": random(5, 4, 2, 3) * FAR,
        "head.weight": random(7, 5),
    }


MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, (3, 2)), nn.BatchNorm2d(4), nn.ReLU())
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    save_file(network(), folder / "net.safetensors")
    torch.save(network(), folder / "net.pt")
    torch.save({"model": network(), "ema": network()}, folder / "two.pt")
    waves = {"wave.weight": torch.full((4, 3, 3, 2), 1 - 2j), "mix.weight": torch.full((5, 4, 2, 1), 2 + 1j)}
    torch.save(waves, folder / "complex.pt")
    for name, keep in (("net.safetensors", 0.9), ("net.pt", 0.5)):
        whole = (folder / name).read_bytes()
        (folder / f"cut.{name}").write_bytes(whole[: int(len(whole) * keep)])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "hello.txt").write_text("hello\n")
    (folder / "model.py").write_text(MODEL)
    (folder / "there.safetensors").write_text("somebody's work")
    (folder / "there.npz").write_text("somebody's work")
    (folder / "there.png").write_text("somebody's work")
    (folder / "odd.toml").write_text("first = [")
    (folder / "unknown.toml").write_text('"frist" = { stride = 2 }')
    (folder / "field.toml").write_text("first = { strides = 2 }")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, made the current one."""
    folder = tmp_path / "here"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(here: Path) -> Cli:
    """Run a command line in the folder of inputs."""
    return shell.cli


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# A line for each mistake: its exit code, and what the message has to say.
PADDED = (
    "--set blur.padding=1,2 --set sharpen.padding=1 --set blur.stride=1 --set blur.dilation=1 --set sharpen.dilation=1"
    " --set blur.groups=1"
)
# What the fusion of first and second depends on, stated.
PLAIN = (
    "--set first.stride=1 --set first.dilation=1 --set first.groups=1 --set second.padding=0 --set second.dilation=1"
)
MISTAKES = [
    # --- what would be lost, or spilled where nobody looks
    ("toeplitz net.safetensors first --input-size 5,7 -o net.safetensors -f", 2, "is the checkpoint itself"),
    ("unfold net.safetensors first --input-size 5,7 -o net.safetensors -f", 2, "is the checkpoint itself"),
    ("convert net.pt .", 2, "expected the name of a file or a folder as OUT"),
    # --- what is empty, and would be the current folder as a path
    *[
        (line, 2, rf"^{words}, got an empty string \(see `convtool")
        for line, words in (
            ("inspect ''", "expected CKPT"),
            ("verify net.pt ''", "expected AFTER"),
            ("convert net.pt ''", "expected OUT"),
            ("plan '' --model model.py:Net --model-input 3,9,8", "expected CKPT"),
            ("inspect net.pt --model ''", "--model: expected CODE"),
            ("inspect net.pt --geometry ''", "--geometry: expected FILE"),
            ("fuse net.pt first second -o ''", "--out: expected OUT"),
            ("fuse net.pt first second --name '' -o f.pt", "--name: expected NAME"),
            ("verify net.pt net.pt --root ''", "--root: expected KEYS"),
            ("toeplitz net.pt first --input-size 5,7 --stride '' -o t.npz", r"--stride: expected N\[,N"),
        )
    ],
    ("toeplitz net.pt '' --input-size 5,7 -o t.npz", 2, "no layer ''"),  # which a bare module's is called
    # --- the option that was typed
    ("convert net.pt o.safetensors --shard-size 1KB", 2, "^--shard-size: o.safetensors is one file; name a folder"),
    (
        "convert net.pt o.pt --as-toeplitz first=4,5 --as-toeplitz first=5,5 --assume-defaults",
        2,
        "^first: is to be written in two forms",
    ),
    ("inspect net.pt --set first.stride=", 2, "^--set first.stride=: stride: expected an integer"),
    ("toeplitz net.pt first --input-size 5,7 --stride x -o t.npz", 2, "^--stride: expected an integer"),
    ("convert net.pt c.pt --as-conv head=", 2, "such as head=3,32,32/5,5$"),
    ("fuse --list-recipes net.pt", 2, "^--list-recipes: .* nothing else goes with it"),
    ("fuse --list-recipes --recipe repvgg", 2, "^--list-recipes: .* nothing else goes with it"),
    # --- layers without tensors
    ("fuse net.pt first 'avg_pool(2' -o f.pt", 2, r"^avg_pool\(2: expected avg_pool\(...\)"),
    ("fuse net.pt first 'avg_pool()' -o f.pt", 2, r"^avg_pool\(\): .* needs the first of them"),
    ("fuse net.pt first 'avg_pool(0)' -o f.pt", 2, r"^avg_pool\(0\): kernel_size: expected integers of at least 1"),
    ("fuse net.pt first 'avg_pool(2; stride=2; stride=3)' -o f.pt", 2, "stride is given twice"),
    ("fuse net.pt --recipe conv-bn-timm --strength nan -o f.pt", 2, "^--strength: goes with adapters"),
    # --- complex numbers have no room in real ones
    *[
        (f"{line} --dtype {dtype}", 4, f"{dtype} has no room for imaginary parts; use a complex dtype")
        for line in (
            "toeplitz complex.pt wave --input-size 5,7 -o t.npz",
            "toeplitz complex.pt wave --input-size 5,7 --order HWC -o t.npz --dry-run",
            "unfold complex.pt wave -o u.npz",
            "fuse complex.pt wave mix -o f.pt --assume-defaults",
        )
        for dtype in ("float32", "float64")
    ],
    ("spectrum net.pt first --input-size 5,7 --tolerance nan", 2, "^--tolerance: expected a number between 0 and 1"),
    # --- layers
    ("toeplitz net.safetensors frist --input-size 5,7 -o t.npz", 2, r"no layer 'frist'; did you mean first\?"),
    ("toeplitz net.pt first.wieght --input-size 5,7 -o t.npz", 2, r"no layer 'first.wieght'; did you mean .*first"),
    ("fuse net.pt first secnd -o f.pt", 2, r"net.pt: no layer 'secnd'; did you mean second"),
    ("verify net.pt net.pt --before first,secnd --after first", 2, r"no layer 'secnd'; did you mean second"),
    ("inspect net.safetensors frist", 2, r"no layer matches 'frist'"),
    ("fuse net.pt first head -o f.pt", 4, r"head is a linear layer: .*flatten"),
    (
        "toeplitz net.pt first --input-size 5,7 --set frist.stride=2 -o t.npz",
        2,
        r"'frist' fits no layer .*mean first\?",
    ),
    # --- files
    *[
        (line.format(file), 3, rf"^{re.escape(file)}: {message}")
        for line in (
            "inspect {}",
            "toeplitz {} first --input-size 5,7 -o t.npz",
            "unfold {} first -o u.npz",
            "spectrum {} first --input-size 5,7",
            "plan {} --model model.py:Net --model-input 3,9,8",
            "fuse {} first second -o f.safetensors",
            "verify {} net.pt",
            "convert {} c.safetensors",
        )
        for file, message in (
            ("missing.safetensors", "no such file"),
            ("missing.pt", "no such file$"),
            ("facebook/dinov2-base", "no such file; a model of the Hugging Face hub is downloaded first: hf download"),
            ("cut.net.safetensors", r"is truncated: .*\d+ bytes, the file has \d+"),
            ("cut.net.pt", "."),
            ("empty.safetensors", "is empty"),
            ("hello.txt", "is text, not a checkpoint"),
            ("folder", "is a folder"),
        )
    ],
    ("verify net.pt missing.pt", 3, "missing.pt: no such file"),
    ("fuse two.pt first second -o f.pt", 2, r"two.pt: .*--root.*"),
    ("fuse net.pt first second --geometry missing.toml -o f.pt", 3, "missing.toml: no such file"),
    ("fuse net.pt first second --geometry odd.toml -o f.pt", 3, "odd.toml: is not TOML"),
    ("fuse net.pt first second --geometry unknown.toml -o f.pt", 2, r"unknown.toml: 'frist' fits no layer"),
    (
        "fuse net.pt first second --geometry field.toml -o f.pt",
        2,
        r"first: unknown field 'strides'; did you mean stride",
    ),
    # --- numbers that aren't finite
    ("toeplitz net.safetensors poison --input-size 5,7 -o t.npz", 3, "poison.weight: holds inf or NaN"),
    ("unfold net.pt poison -o u.npz", 3, "poison.weight: holds inf or NaN"),
    ("spectrum net.pt poison --input-size 5,7", 3, "poison.weight: holds inf or NaN"),
    ("fuse net.pt poison second -o f.pt", 3, "poison.weight: holds inf or NaN"),
    ("verify net.pt net.pt --before poison --after first --input-size 5,7", 3, "poison.weight: holds inf or NaN"),
    (
        "fuse net.safetensors huge huger -o f.safetensors --assume-defaults",
        4,
        r"cannot fuse huge, huger: the fused weight: float32 cannot hold its numbers: .*; float64 would hold them$",
    ),
    # --- shapes
    ("fuse net.safetensors first wide -o f.safetensors", 2, "wide takes 6 channels, and first gives 4"),
    ("toeplitz net.pt first --input-size 4,5,7 -o t.npz", 2, "first takes 3 channels, and --input-size gives 4"),
    (
        "toeplitz net.pt first --input-size 2,7 -o t.npz",
        2,
        "an input size of 2 .* smaller than the kernel, which spans 3",
    ),
    ("unfold net.pt first --input-size 2,7 -o u.npz", 2, "smaller than the kernel, which spans 3"),
    ("spectrum net.pt first --input-size 2,7", 2, "smaller than the kernel, which spans 3"),
    ("spectrum net.pt first", 2, "needs --input-size"),
    ("plan --model model.py:Net --model-input 2,9,8", 2, "."),
    ("toeplitz net.pt first --input-size 7 -o t.npz", 2, "input size"),
    ("toeplitz net.pt first -o t.npz", 2, "needs --input-size"),
    ("verify net.pt net.pt --before first --after first --input-size 9,1", 2, "smaller than the kernel, which spans 2"),
    (f"fuse net.pt first second {PLAIN} --input-size 3,3,3 -o f.pt", 2, "smaller than the kernel"),
    ("toeplitz net.pt first --input-size 5,7 --groups 3 -o t.npz", 2, "groups"),
    ("toeplitz net.pt first --input-size 5,7 --padding=-1 -o t.npz", 2, "padding"),
    ("toeplitz net.pt first --input-size 5,7 --dilation 0 -o t.npz", 2, "dilation: expected integers of at least 1"),
    # --- options and values
    *[
        (f"{command} --wrong", 2, rf"^no such option: --wrong \(see `convtool {command} --help`\)")
        for command in COMMANDS
    ],
    ("inspect net.pt --jason", 2, r"no such option: --jason; did you mean --json"),
    ("fuze net.pt first second", 2, r"no command 'fuze'; did you mean fuse\?"),
    ("inspect", 2, "expected CKPT: "),
    ("toeplitz", 2, r"expected CKPT, LAYER and --out \(see"),
    ("fuse", 2, "expected CKPT, the checkpoint to fuse layers of; and two layers or more, .*; and -o OUT, the new"),
    ("fuse net.pt first second -o f.pt --stride 2", 2, "no such option: --stride; say --set LAYER.stride=VALUE"),
    ("toeplitz net.pt first --input-size 5,7", 2, "expected --out: "),
    ("convert net.pt first.pt second third", 2, "expected no more arguments, got second third"),
    ("verify net.pt net.pt --trials many", 2, "--trials: expected an integer, got 'many'"),
    ("verify net.pt net.pt --rtol tiny", 2, "--rtol: expected a number, got 'tiny'"),
    ("unfold net.pt first", 2, "expected --out: "),
    ("spectrum net.pt frist --input-size 5,7", 2, r"no layer 'frist'; did you mean first\?"),
    ("convert net.pt c.pt --dtype float31", 2, "--dtype: expected one of .* got 'float31'"),
    ("convert net.pt c.pt --shard-size much", 2, "--shard-size: expected a number of bytes .* got 'much'"),
    ("plan --model model.py --model-input 3,9,8", 2, "expected model.py:NAME, .*; it has .*Net"),
    ("plan --model model.py:Nat --model-input 3,9,8", 2, "model.py: has no 'Nat'"),
    ("plan --model nowhere.py:Net --model-input 3,9,8", 3, "nowhere.py: no such file"),
    ("plan net.pt", 2, "expected --model"),
    ("fuse net.pt first second", 2, "expected -o OUT"),
    ("fuse", 2, "expected CKPT"),
    ("fuse net.pt first -o f.pt", 2, "expected two layers or more"),
    ("fuse net.pt first second --set first.strid=2 -o f.pt", 2, r"unknown field 'strid'; did you mean stride\?"),
    ("fuse net.pt first second --set first=2 -o f.pt", 2, "expected LAYER.FIELD=VALUE"),
    ("fuse net.pt first second --set first.stride=two -o f.pt", 2, "stride: expected an integer .* got 'two'"),
    ("fuse net.pt first second --set first.stride=0 -o f.pt", 2, "stride"),
    ("fuse net.pt first second --dtype float31 -o f.pt", 2, "--dtype: expected one of .* got 'float31'"),
    ("toeplitz net.pt first --input-size 5,x -o t.npz", 2, "--input-size: expected integers from 1 .* got '5,x'"),
    ("toeplitz net.pt first --input-size 5,7 --rows 3 -o t.npz", 2, "--rows: expected A:B"),
    ("toeplitz net.pt first --input-size 5,7 --rows 3:9999 -o t.npz", 2, "--rows: expected A:B .* got 3:9999"),
    ("toeplitz net.pt first --input-size 5,7 --layout csc -o t.npz", 2, "--layout: expected .* got 'csc'"),
    ("toeplitz net.pt first --input-size 5,7 --padding-mode mirror -o t.npz", 2, "^--padding-mode: expected one of"),
    ("fuse net.pt --recipe nope -o f.pt", 2, "no recipe 'nope'; --recipe auto takes the one that fits"),
    ("fuse net.pt --recipe repvg -o f.pt", 2, r"no recipe 'repvg'; did you mean repvgg"),
    ("fuse first second net.pt -o f.pt", 2, "expected CKPT first: there is no file first, and net.pt is one"),
    ("inspect first net.pt", 2, "expected CKPT first"),
    ("fuse net.pt first second --recipe repvgg -o f.pt", 2, "--recipe names the layers"),
    ("fuse net.pt --recipe missing.toml -o f.pt", 3, "missing.toml: no such file"),
    (f"fuse net.pt first second {PLAIN} --name head -o f.pt", 2, "'head.weight' is taken"),
    ("fuse net.pt first second --with net.pt -o f.pt", 2, "--with: expected NAME=FILE"),
    ("verify net.pt net.pt --before first", 2, "--before and --after go together"),
    # --- outputs
    ("fuse net.pt first second -o there.safetensors", 5, "there.safetensors: exists already; use --force"),
    ("toeplitz net.pt first --input-size 5,7 -o there.npz", 5, "there.npz: exists already; use --force"),
    ("unfold net.pt first -o there.npz", 5, "there.npz: exists already; use --force"),
    ("convert net.pt there.safetensors", 5, "there.safetensors: exists already; use --force"),
    ("convert net.pt no/c.pt", 5, "no/c.pt: the folder no doesn't exist"),
    ("convert net.pt c.onnx", 2, "c.onnx: expected a name that ends in .safetensors"),
    ("toeplitz net.pt first --input-size 5,7 -o t.npz --plot there.png", 5, "there.png: exists already; use --force"),
    ("toeplitz net.pt first --input-size 5,7 -o t.npz --plot t.jpg", 2, "t.jpg: expected a name that ends in .png"),
    ("fuse net.pt first second -o no/f.pt", 5, "no/f.pt: the folder no doesn't exist"),
    ("toeplitz net.pt first --input-size 5,7 -o no/t.npz", 5, "no/t.npz: the folder no doesn't exist"),
    ("fuse net.pt first second -o net.pt", 5, "net.pt: exists already"),
    ("fuse net.pt first second -o f.onnx", 2, "f.onnx: expected a name that ends in .safetensors"),
    ("toeplitz net.pt first --input-size 5,7 -o t.mat", 2, "t.mat: expected a name that ends in .npz"),
    # --- refusals
    (
        f"fuse net.pt blur sharpen {PADDED} -o f.pt",
        4,
        "the first row, the last row, the first column and the last column",
    ),
    (
        f"fuse net.pt blur sharpen {PADDED} --input-size 9,8 -o f.pt",
        4,
        "or accept that: convtool fuse .* --allow-border$",
    ),
    (f"fuse net.pt blur sharpen {PADDED} -o f.pt --dry-run", 4, "give blur padding 2,3 and sharpen none"),
    (
        "fuse net.safetensors first patch --set patch.stride=2,4 --set patch.padding=1 -o f.pt --assume-defaults",
        4,
        "cannot fuse first, patch",
    ),
]


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_gives_one_clear_line_its_exit_code_and_nothing_written(
    cli: Cli, here: Path, line: str, code: int, message: str
) -> None:
    before = snapshot(here)
    plain = cli(line)
    assert (plain.code, plain.out) == (code, "")
    assert re.search(message, plain.message), plain.message
    as_json = cli(f"{line} --json")
    assert as_json.code == code
    assert as_json.err == f"convtool: {as_json.document['error']['message']}\n"
    assert as_json.document["ok"] is False
    assert as_json.document["command"] == line.split()[0]
    # A command to paste has all that was typed.
    quiet, typed = cli(f"{line} --quiet"), f": convtool {line}"
    assert as_json.document["error"] == {
        "kind": {2: "usage", 3: "input", 4: "refused", 5: "output"}[code],
        "exit_code": code,
        "message": plain.message.replace(typed, f"{typed} --json"),
    }
    assert quiet.err == as_json.err.replace(f"{typed} --json", f"{typed} --quiet")
    assert snapshot(here) == before


def test_nothing_at_all_asks_for_help_on_stderr(cli: Cli) -> None:
    bare = cli("")
    assert (bare.code, bare.out) == (2, "")
    assert all(f"  {name} " in bare.err for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_examples_that_parse(
    command: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = cli(f"{command} --help")
    assert (shown.code, shown.err) == (0, "")
    examples = shown.out.partition("Examples:\n")[2].replace("\\\n", "")
    lines = [line.strip() for line in examples.splitlines()]
    own = [shlex.split(line, comments=True) for line in lines if line.startswith("convtool ")]
    assert own
    for words in own:
        # No file that an example names is here, so that it fails when it opens one; a usage error would be its own.
        before_pipe = words[1 : words.index("|")] if "|" in words else words[1:]
        assert run_app(before_pipe) == (0 if command == "manual" else 3), words


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_window(command: str, columns: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cli(f"{command} --help").out.splitlines()
    whole = [line for line in lines if " " in line.strip() and "'" not in line]  # a path or quoted code can't be folded
    assert max(map(len, whole)) <= min(columns, 100)


@pytest.mark.parametrize(
    ("command", "more"), [("fuse", set()), ("verify", {"A matrix file"}), ("spectrum", {"Options"})]
)
def test_help_shows_options_in_sections_each_once(command: str, more: set[str], cli: Cli) -> None:
    parts = dict(re.findall(r"^(\w[\w' ]+):\n((?:  .*\n)+)", cli(f"{command} --help").out, re.MULTILINE))
    options = {title: re.findall(r"^  (?:-\w, )?(--[\w-]+)", rows, re.MULTILINE) for title, rows in parts.items()}
    shown = [name for each in options.values() for name in each]
    assert len(shown) == len(set(shown)) > 15
    common = {"What the checkpoint doesn't say", "Output"} | ({"Input", "Checking"} if command != "spectrum" else set())
    assert {title for title, each in options.items() if each} == common | more
    assert [title for title, each in options.items() if each][-1] == "Output"
    assert {"--geometry", "--set", "--eps"} <= set(options["What the checkpoint doesn't say"])
    assert options["Output"][-1] == "--help"


def test_version_goes_to_stdout(cli: Cli) -> None:
    from convtool import __version__

    assert cli("--version") == cli("-V") == Run(0, f"convtool {__version__}\n", "")


# Command lines that succeed, and the file that each writes.
SUCCESSES = [
    ("inspect net.safetensors", None),
    ("inspect net.pt 's*' --tensors", None),
    ("inspect net.pt first 'sec*'", None),
    ("toeplitz net.safetensors first --input-size 5,7 -o t.npz", "t.npz"),
    (f"fuse net.safetensors first second norm {PLAIN} --eps 1e-5 -o f.safetensors", "f.safetensors"),
    (f"fuse net.pt first second {PLAIN} --dry-run -o f.pt", None),
    ("fuse --list-recipes", None),
    ("verify net.pt net.pt --before first --after first --input-size 6,7", None),
    ("unfold net.pt first --input-size 5,7 -o u.npz", "u.npz"),
    ("spectrum net.pt first --input-size 5,7", None),
    ("plan --model model.py:Net --model-input 3,9,8", None),
    ("convert net.pt c.safetensors", "c.safetensors"),
]


@pytest.mark.parametrize(("line", "written"), SUCCESSES, ids=[line for line, _ in SUCCESSES])
def test_results_on_stdout_and_all_else_on_stderr(cli: Cli, here: Path, line: str, written: str | None) -> None:
    before = snapshot(here)
    plain = cli(line)
    assert plain.code == 0
    assert plain.out
    assert "assumed" not in plain.err  # what a result rests on is a part of it, also with --quiet
    made = snapshot(here)
    assert set(made) - set(before) == ({written} if written else set())
    again = cli(f"{line} --quiet --force" if written else f"{line} --quiet")
    assert (again.code, again.out, again.err) == (0, plain.out, "")
    as_json = cli(f"{line} --json --force" if written else f"{line} --json")
    assert (as_json.code, as_json.err) == (0, "")
    assert as_json.document["ok"] is True
    assert as_json.document["schema"] == 1
    assert as_json.document["command"] == line.split()[0]
    assert snapshot(here) == made  # equal inputs, equal files
    assert all(made[name] == content for name, content in before.items())


# --- inspect


def test_inspect_lists_the_same_of_both_formats(cli: Cli) -> None:
    one, other = (cli(f"inspect net.{suffix} --json --tensors").document for suffix in ("safetensors", "pt"))
    assert {one["format"], other["format"]} == {"safetensors", "torch"}
    tensors = [
        {tensor["name"]: tensor for layer in document["layers"] for tensor in layer["tensors"]}
        for document in (one, other)
    ]
    assert tensors[0] == tensors[1]
    assert {name: (t["shape"], t["dtype"]) for name, t in tensors[0].items()} == {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in network().items()
    }
    kinds = {layer["name"]: layer["kind"] for layer in one["layers"]}
    assert kinds["first"] == kinds["wide"] == "conv"
    assert kinds["norm"] == "batch_norm"
    assert kinds["head"] == "linear"
    assert one["bytes"] == sum(tensor.nbytes for tensor in network().values())


def test_inspect_takes_names_and_patterns(cli: Cli) -> None:
    def names(line: str) -> list[str]:
        return [layer["name"] for layer in cli(f"inspect net.pt {line} --json").document["layers"]]

    assert names("first") == ["first"]
    assert names("'h*'") == ["huge", "huger", "head"]
    assert names("'?irst'") == ["first"]


def test_inspect_shows_geometry_only_where_it_is_known(cli: Cli) -> None:
    def geometry(line: str, layer: str) -> Any:
        document = cli(f"inspect {line} --json").document
        return {found["name"]: found["geometry"] for found in document["layers"]}[layer]

    assert geometry("net.pt", "first") is None
    assert geometry("net.pt --set first.padding=0:1,2", "first") == {"padding": [[0, 1], [2, 2]]}
    assert cli(f"fuse net.pt first second {PLAIN} -o f.safetensors --set second.stride=1,2").code == 0
    recorded = geometry("f.safetensors", "first")
    assert recorded["stride"] == [1, 2]
    assert "padding" not in recorded  # which is that of first, and nobody said it
    assert cli("inspect f.safetensors").err.endswith("first was fused by convtool from first → second\n")


# Names that would mean another layer too, were they taken as people's words: without a wrapper's prefix, as patterns.
@pytest.mark.parametrize(("name", "other"), [("a", "module.a"), ("x*", "xy"), ("[uv]", "u")])
def test_what_is_recorded_of_a_layer_is_said_of_no_other(cli: Cli, here: Path, name: str, other: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (4, 3, 3, 2), other: (4, 3, 3, 2), "behind": (5, 4, 1, 1)}
    save_file(
        {f"{key}.weight": torch.randn(s, generator=generator) for key, s in shapes.items()}, here / "n.safetensors"
    )
    stated = f"--set '{name}.stride=2,1' --set '{name}.groups=1' --set behind.stride=1 --set behind.padding=0"
    assert cli(f"fuse n.safetensors '{name}' behind -o f.safetensors {stated}").code == 0
    layers = {one["name"]: one["geometry"] for one in cli("inspect f.safetensors --json").document["layers"]}
    assert layers[name]["stride"] == [2, 1]
    assert layers[other] is None
    for layer, positions in ((name, 4 * 5), (other, 7 * 5)):
        more = "--assume padding,dilation" if layer == name else ""
        made = cli(f"toeplitz f.safetensors '{layer}' --input-size 9,6 -o t.npz -f --json {more}").document
        assert made["shape"][0] == positions * (5 if layer == name else 4)


def test_names_from_a_file_cannot_steer_the_terminal(cli: Cli, here: Path) -> None:
    save_file({"evil\x1b[2J\r\u202e.weight": torch.zeros(4, 3, 2, 3)}, here / "evil.safetensors")
    shown = cli("inspect evil.safetensors")
    assert shown.out.splitlines()[1].startswith("evil\\x1b[2J\\r\\u202e ")
    wrong = cli("inspect evil.safetensors 'x\x1b[2J'")
    assert "\x1b" not in wrong.err
    assert cli("inspect evil.safetensors --json").out.isascii()


# --- toeplitz


def test_toeplitz_writes_the_matrix_that_torch_computes_with(cli: Cli, here: Path) -> None:
    x = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, bias = (network()[f"first.{name}"].double() for name in ("weight", "bias"))
    padded = F.pad(x, (2, 2, 0, 1))
    y = F.conv2d(padded[None], weight, bias, stride=(1, 2), dilation=(2, 1))[0]
    options = "--input-size 5,7 --stride 1,2 --padding 0:1,2:2 --dilation 2,1 --dtype float64 --force"
    geometry = ["--set first.stride=1,2 --set first.padding=0:1,2 --set first.dilation=2,1", options]
    for given in (options, f"{geometry[0]} --input-size 3,5,7 --dtype float64 --force"):
        assert cli(f"toeplitz net.pt first {given} -o t.npz").code == 0
        matrix = scipy.sparse.load_npz(here / "t.npz")
        assert matrix.shape == (y.numel(), x.numel())
        expected = (y - bias[:, None, None]).reshape(-1).numpy()
        np.testing.assert_allclose(matrix @ x.reshape(-1).numpy(), expected, rtol=0, atol=1e-12)
    assert cli(f"toeplitz net.pt first {options} --transpose --affine -o t.npy").code == 0
    extended = np.append(x.reshape(-1).numpy(), 1.0)
    np.testing.assert_allclose(extended @ np.load(here / "t.npy"), y.reshape(-1).numpy(), rtol=0, atol=1e-12)
    part = cli(f"toeplitz net.pt first {options} --rows 3:11 --layout dense -o t.safetensors --json").document
    loaded = load_file(here / "t.safetensors")
    assert part["shape"] == [8, x.numel()] == list(loaded["weight"].shape)
    rows = loaded["weight"] @ x.reshape(-1) + loaded["bias"]
    np.testing.assert_allclose(rows.numpy(), y.reshape(-1)[3:11].numpy(), rtol=0, atol=1e-12)


def test_a_dry_run_of_toeplitz_tells_the_size_of_its_file_to_the_byte(cli: Cli, here: Path) -> None:
    for name in ("t.npz", "t.npy", "t.safetensors", "t.pt", "there.npz"):
        line = f"toeplitz net.pt first --input-size 5,7 --padding 1,2 -o {name} --json"
        before = snapshot(here)
        dry = cli(f"{line} --dry-run").document
        assert snapshot(here) == before
        done = cli(f"{line} --force").document
        assert (dry.pop("written"), done.pop("written")) == (False, True)
        assert dry == done
        assert done["bytes"] == (here / name).stat().st_size


def test_toeplitz_says_where_the_bias_went(cli: Cli) -> None:
    def bias(line: str) -> Any:
        return cli(f"toeplitz net.pt {line} --input-size 5,7 --force --json").document["bias"]

    assert bias("first -o t.npz") == "vector"
    assert bias("first -o t.npy") == "missing"
    assert bias("first -o t.npy --affine") == "column"
    assert bias("blur -o t.npy") is None
    assert "t.npy has no room for the bias of first" in cli("toeplitz net.pt first --input-size 5,7 -o t.npy -f").err


def test_a_picture_without_matplotlib_is_refused_before_the_matrix_is_written(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = cli("toeplitz net.pt first --input-size 5,7 -o t.npz --plot t.png")
    assert (refused.code, refused.message) == (2, "--plot needs matplotlib: pip install 'convtool[plot]'")
    assert not (here / "t.npz").exists()


# --- fuse and verify


def run_layers(tensors: dict[str, Tensor], names: str, x: Tensor, **fields: Any) -> Tensor:
    """Convolutions of the checkpoint, one after the other, in float64."""
    for name in names.split():
        bias = tensors.get(f"{name}.bias")
        x = F.conv2d(x, tensors[f"{name}.weight"].double(), None if bias is None else bias.double(), **fields)
    return x


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_fuse_then_verify(cli: Cli, here: Path, suffix: str) -> None:
    assert cli(f"fuse net.{suffix} first second {PLAIN} -o f.{suffix}").code == 0
    fused = load_file(here / "f.safetensors") if suffix == "safetensors" else torch.load(here / "f.pt")
    assert fused.keys() == network().keys() - {"second.weight", "second.bias"}
    for name, tensor in network().items():
        if name in fused and not name.startswith("first."):
            assert torch.equal(fused[name], tensor) or name.startswith("poison")
    x = torch.randn(1, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = run_layers(network(), "first second", x)
    torch.testing.assert_close(run_layers(fused, "first", x), expected, rtol=0, atol=1e-5)
    for options in ("", "--input-size 6,8", "--input-size 3,6,8 --exhaustive", "--input-size 9,5 --input-size 4,4"):
        proof = cli(f"verify net.{suffix} f.{suffix} {options} --json")
        assert proof.code == 0
        assert proof.document["equivalent"]
        assert {part["ratio"] <= 1 for part in proof.document["fusions"]} == {True}
        assert proof.document["exhaustive"] is ("--exhaustive" in options)


def test_verify_finds_a_wrong_weight_a_changed_and_a_missing_tensor(cli: Cli, here: Path) -> None:
    assert cli(f"fuse net.safetensors first second {PLAIN} -o f.safetensors").code == 0
    good = load_file(here / "f.safetensors")
    metadata = {"convtool": _record(here / "f.safetensors")}
    changes: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda t: t["first.weight"][3, 1, 2].mul_(1.0001), "NOT equivalent"),
        (lambda t: t["first.bias"].neg_(), "NOT equivalent"),
        (lambda t: t["first.weight"].copy_(t["first.weight"].flip(-1)), "NOT equivalent"),
        (lambda t: t["head.weight"][6, 0].add_(1), "head.weight: changed, and no fusion accounts for it"),
        (lambda t: t.pop("wide.weight"), "wide.weight: missing, and no fusion accounts for it"),
        (lambda t: t.update(extra=torch.ones(2)), "extra: new, and no fusion accounts for it"),
    ]
    for change, message in changes:
        tensors = {name: tensor.clone() for name, tensor in good.items()}
        change(tensors)
        save_file(tensors, here / "g.safetensors", metadata)
        found = cli("verify net.safetensors g.safetensors")
        assert found.code == 1
        assert message in found.out
        assert found.out.endswith("NOT equivalent\n")
        assert cli("verify net.safetensors g.safetensors --json").document["equivalent"] is False


def _record(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return str(opened.metadata()["convtool"])


def test_a_padded_3x3_after_a_padded_3x3_is_refused_and_goes_ahead_only_when_told(cli: Cli, here: Path) -> None:
    refused = cli(f"fuse net.safetensors blur sharpen {PADDED} -o f.safetensors")
    assert refused.code == 4
    assert refused.message == (
        "cannot fuse blur, sharpen exactly: sharpen pads what the layers before compute, so the first row,"
        " the last row, the first column and the last column of the output would differ; give blur padding 2,3"
        " and sharpen none, and train on with that; or write their matrix for one input size, which is exact: convtool"
        f" toeplitz net.safetensors blur sharpen {PADDED} --input-size SIZE -o OUT.npz; or accept that: convtool fuse"
        f" net.safetensors blur sharpen {PADDED} -o f.safetensors --allow-border"
    )
    assert not (here / "f.safetensors").exists()
    told = cli(f"fuse net.safetensors blur sharpen {PADDED} -o f.safetensors --allow-border --json").document
    assert told["fusions"][0]["exact"] is False
    for options in ("", "--input-size 9,8", "--input-size 7,11 --exhaustive"):
        found = cli(f"verify net.safetensors f.safetensors {options} --json")
        assert found.code == 1
        assert [(part["interior"]["equal"], part["rim"]["equal"]) for part in found.document["fusions"]] == [
            (True, False)
        ]
    assert "blur, rim: " in cli("verify net.safetensors f.safetensors --input-size 9,8").out
    # The way out that the message gives: exact, and equal to the pair that it describes.
    wider = PADDED.replace("blur.padding=1,2", "blur.padding=2,3").replace("sharpen.padding=1", "sharpen.padding=0")
    assert cli(f"fuse net.safetensors blur sharpen {wider} -o g.safetensors").code == 0
    assert cli("verify net.safetensors g.safetensors --input-size 9,8").code == 0


def test_a_patch_convolution_is_exact_for_the_sizes_that_it_divides(cli: Cli, here: Path) -> None:
    chain = "fuse net.pt first patch --set first.padding=1,0 --set patch.stride=2,4 --set patch.padding=0:1,0"
    chain += " --set first.stride=1 --set first.groups=1 --set *.dilation=1"
    # The first layer keeps the height: of 6 rows, patches of 2 leave none over to be padded; of 7 they do.
    for size, code in (("--input-size 6,9", 0), ("--input-size 7,9", 4), ("", 4)):
        assert cli(f"{chain} {size} -o f{code}.pt --force").code == code
    assert cli("verify net.pt f0.pt").code == 0
    assert cli("verify net.pt f0.pt --input-size 7,9").code == 1


def test_fuse_names_rounds_and_replaces_as_told(cli: Cli, here: Path) -> None:
    assert cli(f"fuse net.safetensors first second {PLAIN} -o f.safetensors --name whole --dtype float64").code == 0
    fused = load_file(here / "f.safetensors")
    assert fused["whole.weight"].dtype == fused["whole.bias"].dtype == torch.float64
    assert not {"first.weight", "second.weight"} & fused.keys()
    assert cli("verify net.safetensors f.safetensors").code == 0
    # In place: OUT may be CKPT itself, where --force says so.
    in_place = f"fuse net.safetensors first second {PLAIN} -o net.safetensors --name whole --dtype float64 --force"
    assert cli(in_place).code == 0
    assert (here / "net.safetensors").read_bytes() == (here / "f.safetensors").read_bytes()


def test_an_optimizer_s_states_of_fused_parameters_are_remarked(cli: Cli, here: Path) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    for key, value in (("optimizer", optimizer), ("optimizer_states", [optimizer])):
        torch.save({"model": network(), key: value, "epoch": 3}, here / "training.pt")
        found = cli(f"fuse training.pt first second {PLAIN} -o f.pt --root model --force")
        assert f"{key}: holds an optimizer's states of the old parameters" in found.err
        kept = torch.load(here / "f.pt")[key]
        assert len(kept) == len(value)
    assert "optimizer" not in cli(f"fuse net.pt first second {PLAIN} -o f.pt --force").err


def test_a_dry_run_says_what_a_run_would_write(cli: Cli, here: Path) -> None:
    dry = cli(f"fuse net.pt first second norm {PLAIN} --eps 1e-5 -o f.pt --dry-run --json").document
    assert not (here / "f.pt").exists()
    done = cli(f"fuse net.pt first second norm {PLAIN} --eps 1e-5 -o f.pt --json").document
    assert (dry.pop("written"), done.pop("written")) == (False, True)
    assert dry == done
    tensors = done["fusions"][0]["tensors"]
    fused = torch.load(here / "f.pt")
    assert {name: list(fused[name].shape) for name in tensors["written"]} == tensors["written"]
    assert tensors["removed"] == sorted(network().keys() - fused.keys())
    assert done["tensors"] == len(fused)
    assert done["files"] == {"f.pt": (here / "f.pt").stat().st_size} == {"f.pt": done["bytes"]}
    shown = cli(f"fuse net.pt first second norm {PLAIN} --eps 1e-5 -o g.pt --dry-run --quiet").out.splitlines()
    assert [line for line in shown if line[:4] in ("  - ", "  + ")] == [
        *(f"  - {name}" for name in tensors["removed"]),
        *("  + first.weight 5x3x4x4", "  + first.bias 5"),
    ]
    sizes = f"{done['bytes']} bytes, of which {done['record_bytes']} say what was fused"
    assert shown[-1] == f"would write g.pt, {len(fused)} tensors, {sizes}"


@pytest.mark.parametrize(
    ("line", "out"),
    [
        (f"fuse net.safetensors first second {PLAIN} -o f.safetensors", "f.safetensors"),
        (f"fuse net.pt first second {PLAIN} -o f.safetensors", "f.safetensors"),
        ("convert net.safetensors f.pt", "f.pt"),
        ("convert net.pt there.safetensors --dtype bfloat16 --force", "there.safetensors"),
        ("convert net.pt f.pt --as-toeplitz first=4,5 --assume-defaults", "f.pt"),
        ("convert net.pt parts --shard-size 300", "parts"),
        ("convert net.safetensors parts --dtype bfloat16 --shard-size 300B", "parts"),
        ("plan --model model.py:Net --model-input 3,9,8 -o p.toml", "p.toml"),
    ],
)
def test_a_dry_run_tells_every_file_and_its_bytes_and_touches_none(line: str, out: str, cli: Cli, here: Path) -> None:
    before = snapshot(here)
    dry = cli(f"{line} --dry-run --json").document
    assert snapshot(here) == before
    shown = cli(f"{line} --dry-run").out.splitlines()
    assert snapshot(here) == before
    done = cli(f"{line} --json").document
    assert (dry.pop("written"), done.pop("written")) == (False, True)
    assert dry == done
    changed = {name: text for name, text in snapshot(here).items() if text is not None and before.get(name) != text}
    files = {name: len(text) for name, text in changed.items() if text is not None}
    assert files
    assert done.get("files", {out: done["bytes"]}) == files
    assert done["bytes"] == sum(files.values())
    last = next(text for text in shown if text.startswith(f"would write {out}, "))
    record = done.get("record_bytes", 0)
    assert last.endswith(f", {done['bytes']} bytes{f', of which {record} say what was fused' if record else ''}")
    if len(files) > 1:
        assert shown[-len(files) :] == [f"  {name}, {size} bytes" for name, size in done["files"].items()]


def test_verify_of_named_layers_and_one_sided_fields(cli: Cli, here: Path) -> None:
    assert cli(f"fuse net.pt first second {PLAIN} -o f.pt --set first.padding=1,2").code == 0
    named = "verify net.pt f.pt --before first,second --after first --input-size 6,7"
    named += f" {PLAIN}".replace("--set ", "--set before:")
    assert cli(f"{named} --set before:first.padding=1,2 --set after:first.padding=1,2 --json").code == 0
    assert cli(f"{named} --set first.padding=1,2").code == 0
    assert cli(f"{named} --set before:first.padding=1,2 --set after:first.padding=2,1").code in (1, 2)
    loose = cli(f"{named} --set first.padding=1,2 --rtol 1e-3 --atol 1e-3 --json").document
    assert loose["tolerance"] == {"rtol": 1e-3, "atol": 1e-3}
    assert cli(f"{named} --set first.padding=1,2 --computed-in float32").code == 0


def test_a_plan_is_piped_into_fuse(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name.replace("second", "0").replace("norm", "1"): tensor for name, tensor in network().items()}
    plan = "plan --model piped.py:Net --model-input 4,9,8 -o -"
    (here / "piped.py").write_text(
        MODEL.replace("Conv2d(3, 4, (3, 2))", "Conv2d(4, 5, (2, 3))").replace("2d(4)", "2d(5)")
    )
    save_file({name: tensor for name, tensor in tensors.items() if name[0] in "01"}, here / "piped.safetensors")
    recipe = cli(plan)
    assert (recipe.code, recipe.err) == (0, "")
    assert len(tomllib.loads(recipe.out)["fuse"]) == 1
    assert "stdout holds the recipe or the document" in cli(f"{plan} --json").message
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(recipe.out.encode())))
    document = cli("fuse piped.safetensors --recipe - -o f.safetensors --dry-run --json").document
    assert [fusion["layers"] for fusion in document["fusions"]] == [["0", "1"]]


def test_an_accident_of_ours_asks_for_a_report(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import convtool.checkpoint

    def fail(*arguments: object, **options: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(convtool.checkpoint, "open_checkpoint", fail)
    broken = cli("inspect net.pt --json")
    assert broken.code == INTERNAL
    assert broken.document["error"]["kind"] == "internal"
    assert "a bug in convtool (IndexError: list index out of range); please report it" in broken.err


def test_an_accident_before_a_command_begins_asks_for_a_report_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise NameError("name 'complete' is not defined")

    monkeypatch.setattr("convtool.cli.app.typer.main.get_command", fail)
    broken = cli("inspect net.pt --json")
    assert broken.code == INTERNAL
    assert broken.document["error"]["exit_code"] == INTERNAL


# --- processes


def environment() -> dict[str, str]:
    """One thread, and the convtool beside these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}


def test_both_entry_points_are_the_same_program(here: Path) -> None:
    outputs = [
        subprocess.run([*start, "inspect", "net.safetensors"], env=environment(), capture_output=True, check=False)
        for start in ([sys.executable, "-m", "convtool"], ["convtool"])
    ]
    assert [(done.returncode, done.stderr) for done in outputs] == [
        (0, b"net.safetensors: safetensors, 17 tensors, 4.9 KiB\n")
    ] * 2
    assert outputs[0].stdout == outputs[1].stdout


@pytest.mark.parametrize("line", ["--help", "inspect net.safetensors", "inspect missing.pt --json", "fuse --help"])
def test_a_reader_that_went_away_is_no_error_message(here: Path, line: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            ["convtool", *line.split()],
            env=environment(),
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == BROKEN_PIPE
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full, which Linux has"
)
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("inspect net.safetensors >/dev/full", 5, "convtool: stdout: could not be written: No space left on device\n"),
        ("--help >/dev/full", 5, "convtool: stdout: could not be written: No space left on device\n"),
        ("inspect net.safetensors --quiet --json >/dev/full", 5, "convtool: stdout: could not be written: .*\n"),
        ("inspect net.safetensors >/dev/null 2>/dev/full", 0, ""),
        ("inspect missing.pt 2>/dev/full", 3, ""),
        ("inspect net.safetensors --quiet >&-", 0, ""),
        ("inspect missing.pt 2>&- <&-", 3, ""),
    ],
)
def test_streams_that_are_full_or_closed(here: Path, line: str, code: int, message: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"convtool {line}"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert re.fullmatch(message, done.stderr.removeprefix("net.safetensors: safetensors, 17 tensors, 4.9 KiB\n"))


# Stops where the new file has been written and hasn't got its name yet.
STALLED = """
import os, sys, time

def stall(descriptor):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

os.fsync = stall
from convtool.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "line", "code", "kind"),
    [
        (signal.SIGINT, f"fuse net.pt first second {PLAIN} -o f.pt", INTERRUPTED, "interrupted"),
        (
            signal.SIGTERM,
            f"fuse net.safetensors first second {PLAIN} -o there.safetensors --force",
            TERMINATED,
            "terminated",
        ),
    ],
)
def test_a_signal_leaves_nothing_half_written(here: Path, number: int, line: str, code: int, kind: str) -> None:
    before = snapshot(here)
    with subprocess.Popen(
        [sys.executable, "-c", STALLED, *line.split(), "--json"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        assert snapshot(here) != before  # the temporary file is there
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, f"convtool: {kind}; nothing was changed\n")
    assert json.loads(out)["error"]["kind"] == kind
    assert snapshot(here) == before


def test_dtypes_have_short_names(cli: Cli, tmp_path: Path) -> None:
    whole = ROOT / "sample_models" / "chains.safetensors"
    for short, name in (("bf16", "bfloat16"), ("half", "float16"), ("fp64", "float64"), ("torch.float16", "float16")):
        done = cli(f"convert {whole} {tmp_path / short}.pt --dtype {short} --json")
        assert (done.code, json.loads(done.out)["dtype"]) == (0, name)


def test_help_as_a_word(cli: Cli) -> None:
    assert cli("help fuse").out == cli("fuse --help").out
    assert cli("help").out == cli("--help").out
    assert "no command 'fuze'; did you mean fuse?" in cli("help fuze").err
    commands = cli("help").out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+) ", commands, re.MULTILINE) == [*COMMANDS, "help"]


@pytest.mark.parametrize(
    "line",
    [
        "toeplitz net.pt first --input-size 5{}7 -o t.npz --stride 2{}1 --padding 0:1{}2 --dilation 1{}2",
        "spectrum net.pt 'f*' --input-size 3{}5{}7 --set first.stride=2{}1 --assume-defaults",
        "fuse net.pt 'avg_pool(2{}1)' first -o f.pt --input-size 3{}6{}7 --assume-defaults",
        "verify net.pt net.pt --before first --after first --input-size 6{}7 --input-size 3{}7{}6 --assume-defaults",
        "plan --model model.py:Net --model-input 3{}9{}8",
        "convert net.pt c.pt --as-toeplitz first=3{}4{}5 --assume-defaults",
        "convert net.pt c.pt --as-conv head=5{}1{}1/1{}1",
    ],
)
def test_sizes_have_commas_or_x_between_them(cli: Cli, here: Path, line: str) -> None:
    before = snapshot(here)
    commas = cli(f"{line.replace('{}', ',')} --json")
    assert commas.code == 0
    for name in snapshot(here).keys() - before.keys():
        (here / name).unlink()
    times = cli(f"{line.replace('{}', 'x')} --json")
    assert times.code == 0
    assert times.out.replace("avg_pool(2x1)", "avg_pool(2,1)") == commas.out  # which names the layer as it was written


def test_manual_lists_its_pages_and_prints_one(cli: Cli) -> None:
    listed, page = cli("manual"), cli("manual recipes")
    assert "recipes  " in listed.out
    assert page.out == (ROOT / "convtool" / "manual" / "recipes.md").read_text()
    wrong = cli("manual recipe")
    assert (wrong.code, wrong.out) == (2, "")
    assert "no page 'recipe'; did you mean recipes?" in wrong.err
    pages = {"LoRA": "recipes", "repvgg": "recipes", "fuse": "commands, models", "verify": "commands, proofs"}
    for word, treated in pages.items():
        assert f"no page {word!r}; it is treated in: {treated}; `convtool" in cli(f"manual {word}").err
    assert "no page 'xyzzy'; `convtool" in cli("manual xyzzy").err
