"""Every layout that a checkpoint is found in, with every command: the same answers from each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import any_bits, files_in, same_bits, save, small_network, with_metadata
from torch import Tensor

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.write import plan_edited
from convtool.cli.app import run_app
from convtool.errors import OutputError

STATE = small_network() | {"rest.bits": any_bits(9, torch.bfloat16, 3, 5), "rest.table": torch.arange(6).reshape(2, 3)}
FIELDS = ("first.stride=2,1", "first.padding=0:1,1", "first.dilation=1", "first.groups=1", "second.padding=0")
GEOMETRY = (*(word for field in (*FIELDS, "second.dilation=1") for word in ("--set", f"stem.{field}")), "--eps", "1e-5")
FUSE = ("stem.first", "stem.second", "stem.bn")


def sharded(folder: Path, suffix: str, save_one: Callable[[dict[str, Tensor], Path], object]) -> Path:
    folder.mkdir()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    homes = {name: f"{stem}-{n % 2 + 1:05}-of-00002{suffix}" for n, name in enumerate(STATE)}
    for home in set(homes.values()):
        save_one({name: STATE[name] for name in STATE if homes[name] == home}, folder / home)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


def nested(folder: Path) -> Path:
    torch.save({"model": with_metadata(STATE), "ema": dict(STATE), "epoch": 3}, folder / "in.ckpt")
    return folder / "in.ckpt"


def old(folder: Path) -> Path:
    torch.save(STATE, folder / "in.pth", _use_new_zipfile_serialization=False)
    return folder / "in.pth"


def wrapped(folder: Path) -> Path:
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}, folder / "in.pt")
    return folder / "in.pt"


def views(folder: Path) -> Path:
    """Each tensor a view of a larger storage, with its axes in another order."""
    state = {}
    for name, tensor in STATE.items():
        flipped = tensor.mT if tensor.dim() > 1 else tensor
        large = torch.zeros(flipped.numel() + 7, dtype=tensor.dtype)
        view = large[5 : 5 + flipped.numel()].reshape(flipped.shape)
        view.copy_(flipped)
        state[name] = view.mT if tensor.dim() > 1 else view
    torch.save(state, folder / "in.pt")
    return folder / "in.pt"


def tied(folder: Path) -> Path:
    torch.save(STATE | {"rest.again": STATE["rest.bits"]}, folder / "in.bin")
    return folder / "in.bin"


def tied_safetensors(folder: Path) -> Path:
    safetensors.torch.save_file(STATE, folder / "in.safetensors", {"format": "pt", "rest.again": "rest.bits"})
    return folder / "in.safetensors"


def index_of(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


# How each layout is made, what the commands need to be told, and what its output is called.
LAYOUTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str]] = {
    ".safetensors": (lambda at: save(STATE, at / "in.safetensors"), (), "out.safetensors"),
    ".safetensors with ties": (tied_safetensors, (), "out.safetensors"),
    ".pt": (lambda at: save(STATE, at / "in.pt"), (), "out.pt"),
    ".pt with ties": (tied, (), "out.bin"),
    ".pt of views": (views, (), "out.pt"),
    ".pt nested": (nested, ("--root", "model"), "out.ckpt"),
    ".pt of torch before 1.6": (old, (), "out.pth"),
    ".pt wrapped": (wrapped, (), "out.pt"),
    "folder of .safetensors": (lambda at: sharded(at / "in", ".safetensors", save), (), "out"),
    "folder of .bin": (lambda at: sharded(at / "in", ".bin", torch.save), (), "out"),
    "index of .safetensors": (
        lambda at: index_of(sharded(at / "in", ".safetensors", save)),
        (),
        "out/model.safetensors.index.json",
    ),
    "index of .bin": (
        lambda at: index_of(sharded(at / "in", ".bin", torch.save)),
        (),
        "out/pytorch_model.bin.index.json",
    ),
}


class Run:
    """A checkpoint of one layout, and commands on it."""

    def __init__(self, folder: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
        make, self.root, out = LAYOUTS[layout]
        self.path, self.out, self.capsys = make(folder), folder / out, capsys
        self.prefix = "module._orig_mod." if layout == ".pt wrapped" else ""

    def command(self, *words: object) -> dict[str, Any]:
        self.capsys.readouterr()
        code = run_app([*map(str, words), *self.root, "--json"])
        out, err = self.capsys.readouterr()
        assert code == 0, err
        return dict(json.loads(out))

    def state(self, path: Path) -> dict[str, Tensor]:
        opened = open_checkpoint(path, self.root[1] if self.root else None)
        return {name.removeprefix(self.prefix): opened.tensor(name) for name in opened.infos}


@pytest.fixture(params=LAYOUTS)
def run(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, request.param, capsys)


TIES = {"rest.again"}


def test_inspect(run: Run) -> None:
    layers = {layer["name"].removeprefix(run.prefix): layer for layer in run.command("inspect", run.path)["layers"]}
    assert {name: layer["kind"] for name, layer in layers.items()} == {
        "stem.first": "conv",
        "stem.second": "conv",
        "stem.bn": "batch_norm",
        "head": "linear",
        "rest": "other",
    }
    assert layers["stem.first"]["shape"] == [4, 3, 3, 2]
    found = run.state(run.path)
    assert {name for name in found if name not in TIES} == set(STATE)
    assert all(same_bits(found[name], STATE[name]) for name in STATE)


def test_toeplitz(run: Run, tmp_path: Path) -> None:
    options = ("--stride", "2,1", "--padding", "0:1,1", "--input-size", "7,5")
    run.command("toeplitz", run.path, "stem.first", "-o", tmp_path / "t.npy", *options)
    matrix = torch.from_numpy(np.load(tmp_path / "t.npy"))
    x = torch.arange(3 * 7 * 5.0).reshape(1, 3, 7, 5)
    padded = torch.nn.functional.pad(x, (1, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, STATE["stem.first.weight"], stride=(2, 1))
    assert torch.equal(matrix @ x.reshape(-1), expected.reshape(-1))


def test_fuse_and_verify(run: Run) -> None:
    document = run.command("fuse", run.path, *FUSE, "-o", run.out, *GEOMETRY)
    assert document["fusions"][0]["name"] == f"{run.prefix}stem.first"
    found = run.state(run.out)
    gone = {"stem.second", "stem.bn"}
    kept = {name for name in STATE if name.rpartition(".")[0] not in gone}
    assert {name for name in found if name not in TIES} == kept
    assert all(same_bits(found[name], STATE[name]) for name in kept if not name.startswith("stem.first"))
    for name in TIES & found.keys():
        assert same_bits(found[name], STATE["rest.bits"])
    document = run.command("verify", run.path, run.out)
    assert document["equivalent"] is True
    if run.root:
        other = open_checkpoint(run.out, "ema")
        assert all(same_bits(other.tensor(name), STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", ["same", ".safetensors", ".pt", "folder"])
def test_convert(run: Run, suffix: str, tmp_path: Path) -> None:
    out = {"same": run.out, "folder": tmp_path / "folder"}.get(suffix, tmp_path / f"converted{suffix}")
    run.command("convert", run.path, out, *(["--shard-size", "300B"] if suffix == "folder" else []))
    run.root = run.root if suffix in ("same", ".pt") else ()
    found, expected = run.state(out), run.state(run.path) if run.root else STATE
    assert {name for name in found if name not in TIES} == set(STATE)
    assert all(same_bits(found[name], expected[name]) for name in STATE)


def test_convert_to_another_dtype(run: Run) -> None:
    run.command("convert", run.path, run.out, "--dtype", "bfloat16")
    for name, tensor in run.state(run.out).items():
        if name in STATE:
            assert same_bits(tensor, STATE[name].bfloat16() if tensor.is_floating_point() else STATE[name])


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("suffix", ["same", ".safetensors", ".pt", "folder"])
def test_the_size_is_told_before_the_first_byte_and_progress_adds_up_to_it(
    run: Run, suffix: str, dtype: str | None, tmp_path: Path
) -> None:
    out = {"same": run.out, "folder": tmp_path / "folder"}.get(suffix, tmp_path / f"written{suffix}")
    opened = open_checkpoint(run.path, run.root[1] if run.root else None)
    first = f"{run.prefix}stem.first.weight"
    edit = Edit.of([first, f"{run.prefix}stem.bn.bias"], {first: torch.ones(2, 3, 5)}, first)
    before = set(files_in(tmp_path))
    plan = plan_edited(
        opened,
        edit,
        out,
        Record("1.2.3"),
        force=False,
        dtype=dtype,
        state_only=True,
        shard_size=300 if suffix == "folder" else None,
    )
    assert set(files_in(tmp_path)) == before
    told: list[int] = []
    plan.write(told.append)
    written = {name: data for name, data in files_in(tmp_path).items() if name not in before}
    assert sum(told) == plan.size == sum(map(len, written.values()))
    assert min(told) >= 0


@pytest.mark.parametrize("suffix", ["same", ".safetensors", ".pt", "folder"])
def test_what_does_not_fit_is_refused_before_the_first_byte(
    run: Run, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = {"same": run.out, "folder": tmp_path / "folder"}.get(suffix, tmp_path / f"written{suffix}")
    opened = open_checkpoint(run.path, run.root[1] if run.root else None)
    size = 300 if suffix == "folder" else None
    before = files_in(tmp_path)
    plan = plan_edited(opened, Edit.nothing(), out, None, force=False, state_only=True, shard_size=size)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.size - 1))
    with pytest.raises(OutputError, match=r": needs \S+ KiB, and its file system has \S+ KiB free$"):
        plan.write()
    assert files_in(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.size))
    plan.write()
    assert set(files_in(tmp_path)) > set(before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_fusion_of_a_layer_that_is_tied_to_another_is_refused(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(STATE | {"copy.weight": STATE["stem.first.weight"]}, tmp_path / "in.pt")
    assert run_app(["convert", str(tmp_path / "in.pt"), str(tmp_path / f"tied{suffix}")]) == 0
    words = ["fuse", str(tmp_path / f"tied{suffix}"), *FUSE, "-o", str(tmp_path / f"out{suffix}"), *GEOMETRY]
    assert run_app(words) == 4
    assert "stem.first.weight is one tensor with copy.weight" in capsys.readouterr().err


def test_a_nested_file_is_verified_against_a_flat_one(tmp_path: Path) -> None:
    path = nested(tmp_path)
    words = ["fuse", str(path), *FUSE, "-o", str(tmp_path / "fused.ckpt"), *GEOMETRY, "--root", "model", "-q"]
    assert run_app(words) == 0
    for out in (tmp_path / "flat.safetensors", tmp_path / "flat"):
        flags = [] if out.suffix else ["--shard-size", "1KB"]
        assert run_app(["convert", str(tmp_path / "fused.ckpt"), str(out), "--root", "model", *flags]) == 0
        assert run_app(["verify", str(path), str(out), "--root", "model"]) == 0
