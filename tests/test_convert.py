"""`convtool convert`: other formats and dtypes, nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import SAMPLE_NAMES, SAMPLES, any_bits, files_in, same_bits, save, small_network, write_edited
from hypothesis import given, settings
from hypothesis import strategies as st

from convtool import open_checkpoint
from convtool.checkpoint.cast import cast_chunks
from convtool.checkpoint.edit import Edit
from convtool.cli.app import run_app
from convtool.core.rounding import rounded
from convtool.errors import RefusedError
from convtool.formats.pieces import Piece
from convtool.formats.source import Chunk

FLOATS = ("float64", "float32", "float16", "bfloat16")


def convert(*arguments: object) -> int:
    return run_app(["convert", *map(str, arguments), "--quiet"])


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = convert(*arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


def state_of(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(path, **options)
    return {name: opened.tensor(name) for name in opened.infos}


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_the_sample_models_go_from_one_format_to_the_other_and_back(name: str, tmp_path: Path) -> None:
    for start, middle in ((".safetensors", ".pt"), (".pt", ".safetensors")):
        source, there, back = SAMPLES / f"{name}{start}", tmp_path / f"there{middle}", tmp_path / f"back{start}"
        assert convert(source, there) == 0
        assert convert(there, back) == 0
        expected = state_of(source)
        for path in (there, back):
            found = state_of(path)
            assert list(found) == list(expected)
            assert all(same_bits(found[key], expected[key]) for key in expected)
    original = SAMPLES / f"{name}.safetensors"
    assert convert(original, tmp_path / "same.safetensors") == 0
    assert (tmp_path / "same.safetensors").read_bytes() == original.read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("start", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_dtype_is_for_floating_point_tensors_of_16_bits_and_more(
    tmp_path: Path, dtype: str, start: str, suffix: str
) -> None:
    kept = {
        "steps": torch.tensor(7),
        "mask": any_bits(1, torch.bool, 5),
        "eight": any_bits(2, torch.float8_e4m3fn, 3),
        "complex": any_bits(3, torch.complex64, 3),
    }
    floats = {f"f.{name}": torch.tensor([[1.5, -2.0, 0.1]]).to(getattr(torch, name)) for name in FLOATS}
    empty = {"empty": torch.empty(0, 3)}
    path = save({**floats, **kept, **empty}, tmp_path / f"in{start}")
    assert convert(path, tmp_path / f"out{suffix}", "--dtype", dtype) == 0
    back = state_of(tmp_path / f"out{suffix}")
    assert list(back) == list(state_of(path))
    for name, tensor in kept.items():
        assert same_bits(back[name], tensor)
    for name, tensor in {**floats, **empty}.items():
        assert same_bits(back[name], rounded(tensor, getattr(torch, dtype)))


def test_tied_tensors_and_views_stay_so_in_another_dtype(tmp_path: Path) -> None:
    large = torch.arange(12.0).reshape(3, 4)
    state = {"a": large, "b": large, "t": large.T, "row": large[1]}
    torch.save({"model": state, "epoch": 3}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--dtype", "bfloat16") == 0
    back = torch.load(tmp_path / "out.pt")
    assert back["epoch"] == 3
    assert {tensor.untyped_storage().data_ptr() for tensor in back["model"].values()} == {back["model"]["a"].data_ptr()}
    assert all(torch.equal(back["model"][name], state[name].bfloat16()) for name in state)
    assert len(back["model"]["a"].untyped_storage()) == 24


def test_a_number_too_large_for_the_dtype_is_refused_and_infinities_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inf = torch.tensor([float("inf"), float("nan"), -float("inf"), 1.0])
    for suffix in (".safetensors", ".pt"):
        path = save({"w": torch.tensor([1.0, 65520.0]), "inf": inf}, tmp_path / f"in{suffix}")
        code, result = document(capsys, path, tmp_path / "out.safetensors", "--dtype", "float16")
        assert code == 4
        assert "w: float16 cannot hold its numbers: 65520 would be inf; float32" in result["error"]["message"]
        assert set(files_in(tmp_path)) == {path.name}
        assert convert(path, tmp_path / "out.safetensors", "--dtype", "bfloat16") == 0
        assert same_bits(state_of(tmp_path / "out.safetensors")["inf"], inf.bfloat16())
        for file in tmp_path.iterdir():
            file.unlink()


# Rounding, against numpy's own conversion to float16, which rounds once, and exact arithmetic for the others.


@given(st.lists(st.floats(width=64), min_size=1, max_size=50))
@settings(max_examples=300)
def test_float64_is_rounded_to_float16_as_numpy_does(numbers: list[float]) -> None:
    with np.errstate(over="ignore"):
        expected = np.array(numbers).astype(np.float16)
    found = rounded(torch.tensor(numbers, dtype=torch.float64), torch.float16).numpy()
    assert (np.isnan(found) == np.isnan(expected)).all()
    assert (found == expected)[~np.isnan(expected)].all()
    assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_numbers_a_hair_from_half_way_go_to_the_nearer(dtype: torch.dtype) -> None:
    bits = (
        torch.arange(256, dtype=torch.uint8).view(dtype)
        if dtype.itemsize == 1
        else torch.arange(0, 30000).short().view(dtype)
    )
    values = bits.double()
    values = values[values.isfinite() & (values > 0)].sort().values.unique()
    half_way = (values[1:] + values[:-1]) / 2
    hair = half_way * 2.0**-50
    assert torch.equal(rounded(half_way - hair, dtype).double(), values[:-1])
    assert torch.equal(rounded(half_way + hair, dtype).double(), values[1:])
    assert torch.equal(rounded(-half_way - hair, dtype).double(), -values[1:])


def test_casting_in_pieces_is_casting_at_once() -> None:
    numbers = torch.randn(1000, dtype=torch.float64)
    view = memoryview(numbers.numpy().tobytes())
    chunks = [Chunk(memoryview(bytearray(view[start : start + 800]))) for start in range(0, 8000, 800)]
    piece = Piece("x", "float64", (1000,), 8000, lambda: iter(chunks))
    data = b"".join(chunk.data for chunk in cast_chunks(piece, "bfloat16"))
    assert same_bits(torch.frombuffer(bytearray(data), dtype=torch.bfloat16), rounded(numbers, torch.bfloat16))
    with pytest.raises(RefusedError, match="x: float32 cannot hold its numbers: 1e"):
        list(cast_chunks(Piece.of_tensor("x", torch.tensor([1e300], dtype=torch.float64)), "float32"))


# What is left out, refused, and said


def training_file(path: Path) -> Path:
    torch.save({"state_dict": small_network(), "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    return path


def test_root_leaves_the_rest_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training_file(tmp_path / "in.ckpt")
    code, result = document(capsys, path, tmp_path / "out.safetensors")
    assert (code, result["error"]["kind"]) == (4, "refused")
    assert "--root state_dict" in result["error"]["message"]
    code, result = document(capsys, path, tmp_path / "out.safetensors", "--root", "state_dict")
    assert (code, result["left_out"]) == (0, ["epoch", "optimizer"])
    assert run_app(["convert", str(path), str(tmp_path / "o.safetensors"), "--root", "state_dict"]) == 0
    assert "left out: epoch, optimizer" in capsys.readouterr().err
    assert list(safetensors.torch.load_file(tmp_path / "out.safetensors")) == list(small_network())
    code, result = document(capsys, path, tmp_path / "out", "--root", "state_dict", "--shard-size", "1MB")
    assert (code, result["left_out"]) == (0, ["epoch", "optimizer"])
    code, result = document(capsys, path, tmp_path / "out.pt", "--root", "state_dict", "--dtype", "float16")
    assert (code, result["left_out"]) == (0, [])
    assert torch.load(tmp_path / "out.pt")["epoch"] == 3


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_new_tensors_are_rounded_like_the_others(tmp_path: Path, suffix: str) -> None:
    opened = open_checkpoint(save(small_network(), tmp_path / f"in{suffix}"))
    new = {"head.weight": torch.tensor([[1 + 2.0**-12, 3.0]]), "count": torch.tensor(3)}
    edit = Edit.of(["head.weight"], new, "head.weight")
    write_edited(opened, edit, tmp_path / f"out{suffix}", None, force=False, dtype="float16")
    back = state_of(tmp_path / f"out{suffix}")
    assert same_bits(back["head.weight"], torch.tensor([[1.0, 3.0]], dtype=torch.float16))
    assert same_bits(back["count"], torch.tensor(3))


def test_the_document_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(small_network(), tmp_path / "in.pt")
    code, result = document(capsys, path, tmp_path / "out.safetensors", "--dtype", "float16")
    floats = [name for name, tensor in small_network().items() if tensor.dtype == torch.float32]
    assert code == 0
    assert result == {
        "schema": 1,
        "command": "convert",
        "ok": True,
        "source": str(path),
        "out": str(tmp_path / "out.safetensors"),
        "tensors": 9,
        "dtype": "float16",
        "cast": floats,
        "left_out": [],
        "reexpressed": [],
        "written": True,
        "bytes": (tmp_path / "out.safetensors").stat().st_size,
        "record_bytes": 0,
        "files": {str(tmp_path / "out.safetensors"): (tmp_path / "out.safetensors").stat().st_size},
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dtype", "float8"], 2, "--dtype: expected one of"),
        (["--dtype", "int8"], 2, "--dtype: expected one of"),
        (["--dtype", "1e308"], 2, "--dtype: expected one of"),
        (["--root", "model"], 2, "a safetensors file is flat"),
        *((["--shard-size", size], 2, "--shard-size: expected") for size in ("0", "-1", "1e308", "5 TB", "", "9" * 20)),
        *((["--shard-size", size], 2, "--shard-size: expected") for size in ("1.5GB", "GB", "5GBB", "²")),
    ],
)
def test_bad_options_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    found, result = document(capsys, SAMPLES / "chains.safetensors", tmp_path / "out.safetensors", *arguments)
    assert (found, message in result["error"]["message"]) == (code, True), result
    assert not files_in(tmp_path)


@pytest.mark.parametrize(("size", "files"), [("37KB", 2), ("37KiB", 1), ("1GB", 1), ("16000", 3), ("1B", 26)])
def test_shards_are_as_large_as_asked_for(tmp_path: Path, size: str, files: int) -> None:
    source = SAMPLES / "conv_bn.safetensors"
    assert convert(source, tmp_path / "out", "--shard-size", size) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "out").glob("*.safetensors"))) == files
    loaded: dict[str, torch.Tensor] = {}
    for part in set(index["weight_map"].values()):
        loaded |= safetensors.torch.load_file(tmp_path / "out" / part)
    expected = safetensors.torch.load_file(source)
    assert loaded.keys() == expected.keys()
    assert all(same_bits(loaded[name], expected[name]) for name in expected)


def test_an_existing_output_needs_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "out.pt", tmp_path / "out.safetensors"):
        out.write_bytes(b"mine")
        code, result = document(capsys, SAMPLES / "chains.pt", out)
        assert (code, result["error"]["kind"], out.read_bytes()) == (5, "output", b"mine")
        assert convert(SAMPLES / "chains.pt", out, "--force") == 0
        assert list(state_of(out)) == list(state_of(SAMPLES / "chains.pt"))


def test_the_record_goes_along(tmp_path: Path) -> None:
    fused = tmp_path / "fused.safetensors"
    stated = ["--geometry", str(SAMPLES / "chains.toml"), "--quiet"]
    assert run_app(["fuse", str(SAMPLES / "chains.pt"), "reduce", "spread", "-o", str(fused), *stated]) == 0
    record = open_checkpoint(fused).record
    assert record is not None
    for out in (tmp_path / "a.pt", tmp_path / "b.safetensors", tmp_path / "c"):
        assert convert(fused, out, *(["--shard-size", "1KB"] if not out.suffix else [])) == 0
        assert open_checkpoint(out).record == record
        assert run_app(["verify", str(SAMPLES / "chains.pt"), str(out), "--input-size", "8,9", "--quiet"]) == 0
