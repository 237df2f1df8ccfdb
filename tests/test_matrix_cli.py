"""The commands that are about one layer's matrix: toeplitz, unfold, spectrum, as a shell sees them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from safetensors.torch import load_file
from schemas import validate

import convtool
from convtool.cli.app import run_app
from convtool.core.kernels import Order
from convtool.core.unfold import kernel_matrix
from convtool.matrix import plot

CHAINS = str(Path(__file__).resolve().parent.parent / "sample_models" / "chains.safetensors")
WIDEN = ["widen", "--input-size", "16,5,6", "--padding", "1,2"]


@pytest.fixture
def widen() -> convtool.Conv:
    return convtool.open_checkpoint(CHAINS).conv("widen", padding=(1, 2))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run with --json; the document, which has to be as its schema says."""
    run_app([*arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    validate(document)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(
    "out", ["t.npz", "t.npz --layout dense", "t.npy", "t.mtx", "t.pt", "t.safetensors --shards 2", "t.safetensors"]
)
def test_what_opens_a_matrix_is_told(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_app(["toeplitz", CHAINS, *WIDEN, "-o", *out.split()]) == 0
    read = capsys.readouterr().err.splitlines()[-1].removeprefix("to read it: ")
    found = eval(read, {"convtool": convtool, "numpy": np, "scipy": scipy})
    assert getattr(found, "shape", None) == (720, 480) or found["weight"].shape == (720, 480)


# --- unfold


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_unfold_writes_w_and_u(
    suffix: str, widen: convtool.Conv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"w{suffix}"
    document = run(capsys, "unfold", CHAINS, *WIDEN, "-o", str(out))
    assert document["ok"]
    if suffix == ".npz":
        gather = scipy.sparse.load_npz(out)
        with np.load(out) as arrays:
            weight, bias = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"])
    else:
        tensors = load_file(out)
        weight, bias = tensors["weight"], tensors["bias"]
        parts = [tensors[name].numpy() for name in ("data", "indices", "indptr")]
        gather = scipy.sparse.csr_array(tuple(parts), shape=tuple(tensors["shape"].tolist()))
    assert torch.equal(weight, kernel_matrix(widen))
    assert widen.bias is not None
    assert torch.equal(bias, widen.bias)
    product = scipy.sparse.kron(weight.double().numpy(), scipy.sparse.eye_array(30)) @ gather
    expected = convtool.toeplitz(widen, (5, 6), dtype=torch.float64).to_scipy()
    np.testing.assert_array_equal(product.toarray(), expected.toarray())
    assert (document["weight"], document["gather"]) == ([24, 240], [7200, 480])
    assert document["nnz"] == gather.nnz
    assert document["bytes"] == out.stat().st_size
    assert document["bias"] == "vector"
    assert np.array_equal(convtool.load_matrix(out, "scipy").toarray(), gather.toarray())


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
def test_unfold_without_a_size_writes_w(
    suffix: str, widen: convtool.Conv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"w{suffix}"
    document = run(capsys, "unfold", CHAINS, "widen", "-o", str(out), "--dtype", "float64")
    assert (document["input_size"], document["gather"], document["weight"]) == (None, None, [24, 240])
    assert torch.equal(convtool.load_matrix(out), kernel_matrix(widen).double())
    assert document["bias"] == ("missing" if suffix == ".npy" else "vector")


@pytest.mark.parametrize(
    ("wanted", "suffix"),
    [(["widen"], ".npy"), (["widen"], ".npz"), (["widen"], ".pt"), (WIDEN, ".npz"), (WIDEN, ".safetensors")],
)
def test_unfold_says_before_it_writes_what_it_will_write(
    wanted: list[str], suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"w{suffix}"
    arguments = ("unfold", CHAINS, *wanted, "-o", str(out))
    planned = run(capsys, *arguments, "--dry-run")
    assert not out.exists()
    made = run(capsys, *arguments)
    assert made["bytes"] == out.stat().st_size
    assert planned == made | {"written": False}
    assert run(capsys, *arguments, "--dry-run") == planned  # also where there is a file already
    assert run_app([*arguments, "--dry-run"]) == 0
    assert f"would write {out}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*WIDEN, "-o", "{}/w.npy"], 2, "w.npy: expected a name that ends in .npz, .safetensors"),
        ([*WIDEN, "-o", "{}/w.pt"], 2, "w.pt: expected a name that ends in .npz, .safetensors"),
        (["widen", "-o", "{}/w.csv"], 2, "w.csv: expected a name that ends in .npz, .npy, "),
        (["widen", "-o", "{}/w.npz", "--dtype", "bfloat16"], 4, "w.npz: numpy has no bfloat16"),
        (["widen", "-o", "{}/no/w.npz"], 5, "doesn't exist; create it first"),
        (["widen", "-o", "{}/w.npz", "--input-size", "1,1"], 2, "smaller than the kernel"),
    ],
)
def test_what_unfold_refuses(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["unfold", CHAINS, *(one.format(tmp_path) for one in arguments)]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert list(tmp_path.iterdir()) == []


# --- what all three share


def test_every_option_about_a_layer_reaches_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"stride": "2,1", "padding": "1:0,2:1", "dilation": "1,2", "padding_mode": "reflect"}
    options = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]
    torch.save({"up.weight": torch.ones(2, 3, 3, 2), "down.weight": torch.ones(6, 2, 3, 2)}, tmp_path / "c.pt")
    document = run(capsys, "spectrum", str(tmp_path / "c.pt"), "down", "--input-size", "6,7", "--groups", "3", *options)
    expected = {"stride": [2, 1], "padding": [[1, 0], [2, 1]], "dilation": [1, 2], "padding_mode": "reflect"}
    assert document["fields"] | expected | {"groups": 3} == document["fields"]
    options = ["--transposed", "--stride", "2", "--output-padding", "1,0"]
    document = run(capsys, "spectrum", str(tmp_path / "c.pt"), "up", "--input-size", "6,7", *options)
    assert document["fields"] | {"transposed": True, "output_padding": [1, 0]} == document["fields"]


# --- spectrum


def test_spectrum_says_the_ends_and_how_it_got_them(widen: convtool.Conv, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.linalg.svd(convtool.toeplitz(widen, (5, 6), dtype=torch.float64).to_dense().numpy(), compute_uv=False)
    document = run(capsys, "spectrum", CHAINS, *WIDEN)
    assert document["largest"]["value"] == pytest.approx(values[0])
    assert document["smallest"]["value"] == pytest.approx(values[-1])
    assert document["condition"] == pytest.approx(values[0] / values[-1])
    assert document["methods"] == ["dense"]
    assert run_app(["spectrum", CHAINS, *WIDEN]) == 0
    out = capsys.readouterr().out
    assert f"largest singular value   {values[0]:.7g}" in out
    assert "by a dense SVD, exact to rounding" in out


def test_spectrum_of_the_largest_says_that_the_smallest_was_not_asked_for(
    widen: convtool.Conv, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.linalg.svd(convtool.toeplitz(widen, (5, 6), dtype=torch.float64).to_dense().numpy(), compute_uv=False)
    document = run(capsys, "spectrum", CHAINS, *WIDEN, "--largest")
    assert document["largest"]["value"] == pytest.approx(values[0])
    unasked = ("smallest", "condition", "condition_error", "condition_at_least")
    assert [document[name] for name in unasked] == [None] * 4
    assert run_app(["spectrum", CHAINS, *WIDEN, "--largest"]) == 0
    said = capsys.readouterr()
    assert "  smallest singular value  not asked for\n" in said.out
    assert "condition" not in said.out
    assert "not settled" not in said.err
    (row,) = run(capsys, "spectrum", CHAINS, "wide*", *WIDEN[1:3], "--assume-defaults", "--largest")["rows"]
    assert (row["smallest"], row["largest"]["proved"]) == (None, True)
    assert run_app(["spectrum", CHAINS, "wide*", *WIDEN[1:3], "--assume-defaults", "--largest"]) == 0
    assert re.search("^widen .* not asked for$", capsys.readouterr().out, re.MULTILINE)
    for more in ("--count", "--vectors"):
        assert run_app(["spectrum", CHAINS, *WIDEN, "--largest", more, "2"]) == 2
        assert "don't go with it" in capsys.readouterr().err


def test_spectrum_does_not_claim_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convtool.core.spectrum.DENSE_WORK", -1)
    monkeypatch.setattr("convtool.core.spectrum.GRID_WORK", 1 << 20)
    monkeypatch.setattr("convtool.core.gram.FACTOR_WORK", -1)
    document = run(capsys, "spectrum", CHAINS, *WIDEN, "--steps", "5")
    assert document["condition"] is None
    assert not document["smallest"]["proved"]
    assert run_app(["spectrum", CHAINS, *WIDEN, "--steps", "5"]) == 0
    said = capsys.readouterr()
    bounds = re.search("largest singular value   at least (.*), at most (.*)", said.out)
    assert bounds is not None
    least, most = map(float, bounds.groups())
    assert least <= document["largest"]["value"] < document["largest"]["value"] + document["largest"]["error"] <= most
    assert re.search("smallest singular value  at most [^,]*$", said.out, re.MULTILINE)
    assert "condition number         at least" in said.out
    assert "not settled to 1e-06 in 5 steps" in said.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["widen"], 2, "spectrum needs --input-size, the size of widen's input, such as 32,32"),
        ([*WIDEN, "--tolerance", "0"], 2, "tolerance: expected a number between 0 and 1, got 0"),
        ([*WIDEN, "--steps", "0"], 2, "--steps: expected a number of at least 1, got 0"),
        (["wide", "--input-size", "4,4"], 2, "did you mean widen?"),
    ],
)
def test_what_spectrum_refuses(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["spectrum", CHAINS, *arguments]) == code
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- toeplitz: what test_cli doesn't ask for


def test_toeplitz_channels_last(widen: convtool.Conv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    document = run(capsys, "toeplitz", CHAINS, *WIDEN, "--order", "HWC", "-o", str(out))
    assert document["order"] == "HWC"
    x = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    opened = convtool.open_matrix(out)
    assert opened.bias is not None
    found = opened.product(x.reshape(-1, 1))[:, 0] + opened.bias.double()
    expected = convtool.forward(widen, x.movedim(-1, 0)[None])[0].movedim(0, -1)
    torch.testing.assert_close(found.reshape(5, 6, 24), expected)
    assert run(capsys, "verify", CHAINS, str(out))["matrix"]["form"] == "T @ x, channels last"
    assert run_app(["toeplitz", CHAINS, *WIDEN, "--order", "WHC", "-f", "-o", str(out)]) == 2
    assert "--order: expected CHW or HWC, got 'WHC'" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["CHW", "HWC"])
@pytest.mark.parametrize(
    "options",
    [
        *((), ("--rows", "7:200"), ("--affine", "--transpose"), ("--shards", "3")),
        *(("--columns", "70:90"), ("--columns", "3:481", "--rows", "5:9", "--affine")),
        ("--columns", "70:90", "--transpose"),
    ],
)
def test_verify_goes_by_the_order_in_the_record(
    order: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    document = run(capsys, "toeplitz", CHAINS, *WIDEN, "--order", order, *options, "-o", str(out))
    assert run(capsys, "verify", CHAINS, document["out"])["equivalent"]
    for file in tmp_path.iterdir():  # the record as it would be had the matrix been written in the other order
        blob, other = file.read_bytes(), {"CHW": b"HWC", "HWC": b"CHW"}[order]
        file.write_bytes(blob.replace(order.encode(), other))
    wrong = run(capsys, "verify", CHAINS, document["out"])
    assert not wrong["equivalent"]
    assert not wrong["matrix"]["entries"]["equal"]
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes().replace(other, b"WHC"))
    error = run(capsys, "verify", CHAINS, document["out"])["error"]
    assert error["exit_code"] == 3
    assert "its record is damaged: order 'WHC'" in error["message"]


NO_NUMBERS: list[Any] = [True, 5, 1.5, "x", [True], ["a", 1], [None, None], [-1, 2], [[1, 2], [3]], {"a": 1}]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("layer", [5, ["a"], {}]),
        ("fields", [5, "x", [1, 2], {"stride": None}, {"padding": [[1], 2]}, {"a": 1}]),
        ("input_size", NO_NUMBERS),
        ("rows", [*NO_NUMBERS, [1], [1, 2, 3]]),
        ("columns", [*NO_NUMBERS, [1], [1, 2, 3]]),
        ("tree", [5, [], ["a"], {}, {"chain": []}, {"sum": [5]}, {"chain": ["a"], "sum": ["b"]}, {"both": ["a"]}]),
        ("order", [5, [], ["CHW"], {}, None]),
        ("transpose", [0, None, "false", []]),
        ("affine", [1, "", {}]),
    ],
)
def test_a_record_that_says_nothing_sensible_is_damage(
    name: str, values: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.npz"
    run(capsys, "toeplitz", CHAINS, *WIDEN, "-o", str(out))
    with np.load(out) as file:
        arrays = dict(file)
    record = json.loads(arrays["convtool_matrix"].item())
    for value in values:
        np.savez(out, **(arrays | {"convtool_matrix": np.array(json.dumps(record | {name: value}))}))
        error = run(capsys, "verify", CHAINS, str(out))["error"]
        assert error["exit_code"] == 3, value
        assert error["message"].startswith(f"{out}: its record is damaged: "), value


@pytest.mark.parametrize("order", ["CHW", "HWC"])
@pytest.mark.parametrize(("transpose", "form"), [(False, "T @ x"), (True, "x @ B")])
def test_a_matrix_without_a_record_is_the_one_that_it_is_equal_to(
    order: str, transpose: bool, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.npy"
    for layer, size in (("narrow", "24,3,4"), ("sharpen", "12,4,5")):  # the latter's, padded, is a square
        padding = ["--padding", "1"] if layer == "sharpen" else []
        command = ["toeplitz", CHAINS, layer, "--input-size", size, *padding, "--order", order, "-f", "-o", str(out)]
        run(capsys, *command, *(["--transpose"] if transpose else []))
        wanted = ["--before", layer, "--input-size", size, "--geometry", CHAINS.replace(".safetensors", ".toml")]
        found = run(capsys, "verify", CHAINS, str(out), *wanted)
        expected = form + (", channels last" if order == "HWC" else "")
        assert (found["equivalent"], found["matrix"]["form"]) == (True, expected)
        assert found["assumed"][-1] == f"{out}: {expected}"
        matrix = np.load(out)
        matrix[3, 3] += 1
        np.save(out, matrix)
        found = run(capsys, "verify", CHAINS, str(out), *wanted)
        assert not found["equivalent"]
        assert "; it isn't " in found["assumed"][-1]


def test_toeplitz_draws_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "41")
    monkeypatch.setenv("LINES", "30")
    out = tmp_path / "m.npz"
    assert run_app(["toeplitz", CHAINS, "reduce", "--input-size", "1,4,5", "--show", "-o", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()[3:-1]  # behind what was assumed, the name and the size
    # six channels, each a scaled identity: six diagonals, one under the other
    assert len(lines) == 24
    assert all(1 <= len(line.strip()) <= 7 for line in lines)
    assert [line.index(line.strip()) < 6 for line in lines[::4]] == [True] * 6


@pytest.mark.parametrize("order", ["CHW", "HWC"])
@pytest.mark.parametrize("suffix", [".npz", ".mtx", ".safetensors"])
def test_rows_of_a_matrix_of_billions_are_verified_entry_by_entry(
    order: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"m{suffix}"
    command = ["toeplitz", CHAINS, "reduce", "--input-size", "1,60000,60000", "--rows", "7000000000:7000000123"]
    assert run(capsys, *command, "--order", order, "-o", str(out))["shape"] == [123, 3_600_000_000]
    found = run(capsys, "verify", CHAINS, str(out))
    assert found["equivalent"]
    assert found["matrix"]["entries"]["positions"] == 123
    assert found["matrix"]["products"] is None  # neither its input nor its output fits into memory
    x, _ = convtool.load_matrix(out, "scipy").nonzero()
    assert len(x) == 123
    if suffix == ".mtx":
        text = out.read_text()
        out.write_text(text.replace("\n123 ", "\n122 "))  # one row further up
        assert not run(capsys, "verify", CHAINS, str(out))["equivalent"]


@pytest.mark.parametrize("order", ["CHW", "HWC"])
def test_a_picture_shows_the_largest_entry_of_each_bin(order: Order, widen: convtool.Conv) -> None:
    matrix = convtool.toeplitz(widen, (5, 6), affine=True, order=order)
    dense = matrix.dense_rows(0, matrix.shape[0]).numpy()
    for part in ((0, 720), (100, 347), (719, 720)):
        expected = np.zeros((min(part[1] - part[0], 50), 40))
        for row, line in enumerate(dense[slice(*part)]):
            for column, value in enumerate(line):
                place = row * len(expected) // (part[1] - part[0]), column * 40 // 481
                if (abs(value), value) > (abs(expected[place]), expected[place]):
                    expected[place] = value
        np.testing.assert_array_equal(plot.Part.of(matrix, part).binned(50, 40).numpy(), expected)


@pytest.mark.parametrize(
    ("layer", "size", "options", "lines"),
    [
        (["reduce", "--groups", "1"], "1,1,1", ["--rows", "2:3"], 1),  # 1 x 1
        (["narrow"], "24,1,1", ["--rows", "0:1"], 1),  # one row
        (["narrow"], "24,1,1", ["--transpose", "--affine"], 20),  # 25 x 12
        (["reduce"], "1,60000,60000", ["--rows", "7000000000:7000000003"], 1),  # three of 21.6 billion
    ],
)
def test_pictures_of_tiny_and_of_huge_matrices(
    layer: list[str],
    size: str,
    options: list[str],
    lines: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "26")
    out, picture = tmp_path / "m.npz", tmp_path / "m.png"
    command = ["toeplitz", CHAINS, *layer, "--input-size", size, *options, "--show", "--plot", str(picture)]
    assert run_app([*command, "-o", str(out)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("assumed: ")]
    shown = shown[(3 if "stride" in shown[1] else 2) : -1]
    assert len(shown) <= lines
    assert any(line.strip() for line in shown)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_toeplitz_says_what_64_bit_indices_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["toeplitz", CHAINS, "reduce", "--input-size", "1,30000,30000", "--rows", "0:3"]
    assert run_app([*arguments, "-o", str(tmp_path / "m.npz")]) == 0
    assert "indices are int64, since int32 ends at 2147483647" not in capsys.readouterr().err
    arguments[4] = "1,60000,60000"
    assert run_app([*arguments, "-o", str(tmp_path / "n.npz")]) == 0
    assert "indices are int64, since int32 ends at 2147483647" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [(), ("--rows", "7:200"), ("--affine",), ("--transpose",), ("--columns", "70:90")])
def test_a_text_file_is_verified_like_any_other(
    dtype: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.mtx"
    assert run(capsys, "toeplitz", CHAINS, *WIDEN, "--dtype", dtype, *options, "-o", str(out))["ok"]
    assert str(convtool.load_matrix(out).dtype) == f"torch.{dtype}"
    assert run(capsys, "verify", CHAINS, str(out))["equivalent"]
    lines = out.read_text().splitlines(keepends=True)
    row, column, value = lines[-1].split()
    other = torch.tensor(float(value) * 1.01, dtype=getattr(torch, dtype)).item()
    out.write_text("".join([*lines[:-1], f"{row} {column} {other:.17g}\n"]))
    assert not run(capsys, "verify", CHAINS, str(out))["equivalent"]
    if dtype != "float64":  # a number that isn't one of that dtype
        out.write_text("".join([*lines[:-1], f"{row} {column} {other * (1 + 2**-26):.17g}\n"]))
        assert run(capsys, "verify", CHAINS, str(out))["error"]["exit_code"] == 3


@pytest.mark.parametrize(
    ("size", "code", "message"),
    [
        ("16,1000000,1000000", 5, r"needs [\d.]+ TiB, and its file system has .* free; --rows A:B writes a part"),
        ("16,300000000,3", 2, "an axis of 300000000 outputs with 3 taps each is too long for a tap table"),
        ("16,99999999999,3", 2, "expected integers from 1 to 2147483647"),
    ],
)
def test_sizes_beyond_any_disk(
    size: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("toeplitz", CHAINS, "widen", "--input-size", size, "--padding", "1,2", "-o", str(tmp_path / "m.npz"))
    error = run(capsys, *command)["error"]
    assert error["exit_code"] == code
    assert re.search(message, error["message"])
    assert list(tmp_path.iterdir()) == []
