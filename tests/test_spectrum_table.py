"""`convtool spectrum` of a pattern: a row for each layer, and what a network lengthens a difference by at most."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from live import done, error
from torch import nn

FIELDS = ("stride=1", "padding=1", "dilation=1", "groups=1")
CODE = """
from torch import nn

def net(last=nn.ReLU, twice=False):
    first = nn.Conv2d(2, 3, 3, padding=1)
    layers = [first, nn.BatchNorm2d(3, eps=1e-3), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=2), last(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(27, 4))

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()

def smooth():
    return net(nn.SiLU)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path


def saved(folder: Path, name: str) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    space: dict[str, type[nn.Module]] = {}
    exec(CODE, space)
    model = space[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var = torch.rand(3) + 0.5
    torch.save(model.state_dict(), folder / "net.pt")
    return model, folder / "net.pt"


def norm(layer: nn.Module, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the largest and smallest singular value of a layer by running it on every basis vector."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        made = layer.double()(basis) - layer(torch.zeros_like(basis))
    values = torch.linalg.svdvals(made.flatten(1))
    layer.float()
    return float(values[0]), float(values[-1])


def test_a_network_in_sequence_has_a_product(folder: Path) -> None:
    model, path = saved(folder, "net")
    document = done("spectrum", path, "*", "--model", f"{folder}/net.py:net", "--model-input", "2,7,8")
    sizes = {"0": (2, 7, 8), "1": (3, 7, 8), "3": (3, 7, 8), "6": (27,)}
    product = 1.0
    assert [row["layer"] for row in document["rows"]] == list(sizes)
    for row, (name, size) in zip(document["rows"], sizes.items(), strict=True):
        high, low = norm(model.get_submodule(name), size)
        assert tuple(row["input_size"]) == size
        assert row["largest"]["value"] == pytest.approx(high, rel=1e-6)
        assert row["smallest"]["value"] == pytest.approx(low, rel=1e-4, abs=1e-6)
        product *= high
    assert document["product"] == pytest.approx(product, rel=1e-5)
    one, other = (torch.randn(50, 2, 7, 8) for _ in range(2))
    with torch.no_grad():
        moved = (model(one) - model(other)).norm(dim=1)
    assert bool((moved <= document["product"] * (one - other).flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize(
    ("name", "pattern", "why"),
    [
        ("Residual", "*", "what input gives is read more than once"),
        ("smooth", "*", "aten.silu.default may make differences larger"),
        ("net", "[03]", "1 is part of the network and not of this table"),
    ],
)
def test_elsewhere_there_is_no_product(folder: Path, name: str, pattern: str, why: str) -> None:
    _, path = saved(folder, name)
    words = ("spectrum", path, pattern, "--model", f"{folder}/net.py:{name}", "--model-input", "2,7,8")
    document = done(*words)
    assert document["product"] is None
    between = "a product bounds only layers that run one after the other, with nothing in between that may make"
    whole = name == "net"
    assert document["no_product"] == why + ("" if whole else f"; {between} differences larger")
    assert document["rows"]


def test_a_pattern_without_a_model_has_one_size(folder: Path) -> None:
    model, path = saved(folder, "net")
    stated = [word for name in ("0", "3") for field in FIELDS for word in ("--set", f"{name}.{field}")]
    document = done("spectrum", path, "[03]", "--input-size", "6,5", *stated)
    assert document["no_product"] == "without --model nothing says in which order the layers run"
    assert [row["shape"] for row in document["rows"]] == [[90, 60], [90, 90]]
    assert document["rows"][0]["largest"]["value"] == pytest.approx(norm(model.get_submodule("0"), (2, 6, 5))[0])
    assert error("spectrum", path, "x*", "--input-size", "6,5")[0] == 2
    every = done("spectrum", path, "[!6]", "--input-size", "6,5", *stated, "--set", "1.eps=1e-3")
    assert [row["layer"] for row in every["rows"]] == ["0", "1", "3"]
    assert "needs --input-size" in error("spectrum", path, "*")[1]
    assert "--model-input says the size" in error("spectrum", path, "*", "--model", f"{folder}/net.py:net")[1]
    assert error("spectrum", path, "*", "--input-size", "6,5", "--count", "2")[0] == 2
