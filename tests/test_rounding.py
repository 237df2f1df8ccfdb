"""What a dtype can't hold, above or below, is refused wherever numbers enter it, and nothing else is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live import done, error, load, save
from safetensors.torch import save_file
from torch import Tensor, nn

import convtool
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.rounding import Rounding, held, rounded
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import RefusedError

NARROW = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]


def by_definition(row: list[float], dtype: torch.dtype) -> bool:
    """Whether each number of a row is stored to within u of the largest."""
    stored = [float(rounded(torch.tensor([x], dtype=torch.float64), dtype).to(torch.float64)) for x in row]
    u = torch.finfo(dtype).eps / 2
    return all(abs(x - y) <= u * max(map(abs, row)) for x, y in zip(row, stored, strict=True))  # false of inf, nan


@settings(max_examples=300)
@given(
    rows=st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=3),
    power=st.integers(-160, 140),
    dtype=st.sampled_from(NARROW),
)
def test_a_row_is_held_where_nothing_moves_by_more_than_a_rounding_of_its_largest(
    rows: list[list[float]], power: int, dtype: torch.dtype
) -> None:
    numbers = torch.tensor(rows, dtype=torch.float64) * 2.0**power
    good = all(by_definition(row, dtype) for row in numbers.tolist())
    if good:
        assert torch.equal(held(numbers, dtype, "x").to(torch.float64), rounded(numbers, dtype).to(torch.float64))
    else:
        with pytest.raises(RefusedError, match=r"x: \w+ cannot hold its numbers"):
            held(numbers, dtype, "x")
    # In pieces, all of them together: the same as of one row.
    rounding = Rounding(dtype, "x")
    try:
        for row in numbers:
            rounding.piece(row)
        rounding.end()
    except RefusedError:
        assert not by_definition(numbers.flatten().tolist(), dtype)
    else:
        assert by_definition(numbers.flatten().tolist(), dtype)


def test_a_wider_dtype_holds_everything_and_infinities_stay_what_they_are() -> None:
    odd = torch.tensor([[1.0, math.inf], [math.nan, 1e-30]])
    assert torch.equal(held(odd, torch.float64, "x").isfinite(), odd.isfinite())
    assert held(odd[:1], torch.float16, "x").tolist() == [[1.0, math.inf]]


def test_the_message_counts_what_is_lost_and_names_a_dtype_that_holds_it() -> None:
    with pytest.raises(RefusedError) as caught:
        held(torch.tensor([[1.0, 2.0], [1e-9, 0.0], [1e-9, -3e-9]]), torch.float16, "w")
    assert str(caught.value) == (
        "w: float16 cannot hold its numbers: 3 of 6 are lost, such as -3e-09, which would be -0; float32 or float64"
        " would hold them"
    )


def small(scale: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 1, bias=False))
    for parameter in layers.parameters():
        parameter.data.mul_(scale / float(parameter.detach().abs().max()))
    return layers


def test_fused_half_precision_weights_that_would_be_zero_are_refused(tmp_path: Path) -> None:
    path = save(small(1e-4).half(), tmp_path / "net.pt")
    stated = ("--set", "0.groups=1", "--set", "1.padding=0")
    code, message = error("fuse", path, "0", "1", "-o", tmp_path / "out.pt", *stated)
    assert code == 4
    assert "the fused weight: float16 cannot hold its numbers" in message
    assert list(tmp_path.iterdir()) == [path]
    done("fuse", path, "0", "1", "--dtype", "float32", "-o", tmp_path / "out.pt", *stated)
    assert load(tmp_path / "out.pt")["0.weight"].count_nonzero() == 5 * 3 * 9


def test_a_cast_that_would_make_a_tensor_zero_is_refused(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        path = save(small(1e-9), tmp_path / f"net{suffix}")
        code, message = error("convert", path, tmp_path / "out.safetensors", "--dtype", "float16")
        assert (code, "0.weight: float16 cannot hold its numbers" in message) == (4, True)
        done("convert", path, tmp_path / f"out{suffix}", "--dtype", "bfloat16")


def test_a_factor_that_has_lost_digits_is_no_factor(tmp_path: Path) -> None:
    path = save(small(1.0), tmp_path / "net.pt")
    code, message = error("fuse", path, "0", "scale(1e-320)", "-o", tmp_path / "out.pt")
    assert (code, "expected a finite number" in message) == (2, True)
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[fuse]]\nname = "0"\nsum = [{ chain = ["0"], scale = 1e-320 }]')
    code, message = error("fuse", path, "--recipe", recipe, "-o", tmp_path / "out.pt")
    assert (code, "scale: expected a finite number" in message) == (2, True)


def replicate(number: float) -> Conv:
    return convtool.conv(torch.full((1, 1, 3), number, dtype=torch.float16), padding=1, padding_mode="replicate")


def test_matrices_whose_sums_are_beyond_their_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the matrix: float16 cannot hold its numbers"):
        convtool.toeplitz(replicate(40000.0), (5,)).to_dense()
    assert float(convtool.toeplitz(replicate(40000.0), (5,), dtype=torch.float32).to_dense()[0, 0]) == 80000
    state: dict[str, Tensor] = {"a.weight": torch.full((1, 1, 3), 1e5), "b.weight": torch.full((1, 1, 3), 1e-9)}
    torch.save(state, tmp_path / "net.pt")
    for layer in ("a", "b"):
        for words in (("toeplitz", "--input-size", "5"), ("unfold",)):
            command = (
                words[0],
                tmp_path / "net.pt",
                layer,
                *words[1:],
                "--dtype",
                "float16",
                "-o",
                tmp_path / "o.safetensors",
            )
            code, message = error(*command)
            assert (code, "float16 cannot hold its numbers" in message) == (4, True), command
            assert not (tmp_path / "o.safetensors").exists()


def test_integers_hold_what_they_are_and_neither_wrap_nor_cut_off() -> None:
    geometry = Geometry.of((3,), padding=1, padding_mode="replicate")
    hundred = Conv(torch.full((1, 1, 3), 100, dtype=torch.int8), None, geometry)
    with pytest.raises(RefusedError, match="such as 200, which would be -56"):
        ToeplitzMatrix(hundred, (5,)).to_dense()
    assert ToeplitzMatrix(hundred, (5,), dtype=torch.int32).to_dense().max() == 200
    half = convtool.conv(torch.full((1, 1, 3), 0.5))
    with pytest.raises(RefusedError, match=r"such as 0\.5, which would be 0"):
        ToeplitzMatrix(half, (5,), dtype=torch.int64).to_dense()


def test_float8_saturates_in_torch_and_is_refused_here() -> None:
    conv = convtool.conv(torch.full((1, 1, 3), 1000.0))
    with pytest.raises(RefusedError, match="which would be 448"):
        convtool.toeplitz(conv, (5,), dtype=torch.float8_e4m3fn).to_dense()


def test_a_cast_that_would_make_one_output_channel_zero_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 300, 9, 29)  # more than is cast in one go
    for lost in (3, 0):
        state = {"c.weight": weight.clone()}
        state["c.weight"][lost] *= 1e-9
        for suffix in (".pt", ".safetensors"):
            path, out = tmp_path / f"net{suffix}", tmp_path / f"out{suffix}"
            if suffix == ".pt":
                torch.save(state, path)
            else:
                save_file(state, path)
            code, message = error("convert", path, out, "--dtype", "float16")
            assert (code, "c.weight: float16 cannot hold its numbers: 1 of 4 rows are lost" in message) == (4, True)
            assert not out.exists()
    torch.save({"c.weight": weight}, tmp_path / "fine.pt")
    done("convert", tmp_path / "fine.pt", tmp_path / "fine16.pt", "--dtype", "float16")
