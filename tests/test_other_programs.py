"""Matrices that other programs saved, verified against the layer that they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import torch
from live import done, error, run

import convtool

FIELDS = ("c.padding=1", "c.stride=1", "c.dilation=1", "c.groups=1")
STATED = ("--before", "c", "--input-size", "5,4", *(word for field in FIELDS for word in ("--set", field)))


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, convtool.ToeplitzMatrix]:
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(2, 3, 3, padding=1)
    torch.save({f"c.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "net.pt")
    return tmp_path / "net.pt", convtool.toeplitz(layer, (5, 4))


def numpy_csr(path: Path, matrix: Any) -> None:
    np.savez(path, data=matrix.data, indices=matrix.indices, indptr=matrix.indptr, shape=matrix.shape)


# A file's name, and how a program of somebody else's writes a scipy matrix there.
SAVERS: dict[str, Callable[[Path, Any], object]] = {
    "plain.mtx": scipy.io.mmwrite,
    "short.mtx": lambda path, matrix: scipy.io.mmwrite(path, matrix, precision=5),
    "double.mtx": lambda path, matrix: scipy.io.mmwrite(path, matrix.astype(np.float64)),
    "csr.npz": sp.save_npz,
    "csc.npz": lambda path, matrix: sp.save_npz(path, matrix.tocsc()),
    "bsr.npz": lambda path, matrix: sp.save_npz(path, matrix.tobsr((5, 4))),
    "dia.npz": lambda path, matrix: sp.save_npz(path, matrix.todia()),
    "dense.npz": lambda path, matrix: np.savez(path, matrix.toarray()),
    "numpy.npz": numpy_csr,
    "turned.npy": lambda path, matrix: np.save(path, matrix.toarray().T),
    "dense.pt": lambda path, matrix: torch.save(torch.from_numpy(matrix.toarray()), path),
    "complex.pt": lambda path, matrix: torch.save(torch.from_numpy(matrix.toarray()).to(torch.complex128), path),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAVERS)
def test_a_matrix_is_verified_whoever_saved_it(net: tuple[Path, convtool.ToeplitzMatrix], name: str) -> None:
    source, matrix = net
    path, good = source.parent / name, matrix.to_scipy()
    wrong = good.copy()
    wrong.data[np.abs(good.data).argmax()] *= 1 + 2.0 ** (-12 if name == "short.mtx" else -22)
    for made, code in ((good, 0), (wrong, 1)):
        path.unlink(missing_ok=True)
        SAVERS[name](path, made)
        found, document = run("verify", source, path, *STATED, "--no-bias")
        assert (found, document["equivalent"]) == (code, code == 0)
        assert document["matrix"]["bias_missing"]
    digits = [text for text in document["assumed"] if "decimal digits" in text]
    assert digits == ([f"{path}: its numbers are rounded to 5 decimal digits"] if name == "short.mtx" else [])
    if path.suffix not in (".mtx", ".npy"):  # which could hold one
        SAVERS[name](path, good)
        assert run("verify", source, path, *STATED)[0] == 1


@pytest.mark.filterwarnings("ignore")
def test_sparse_tensors_of_torch_are_matrices(net: tuple[Path, convtool.ToeplitzMatrix]) -> None:
    source, matrix = net
    for made in (matrix.to_sparse_csr(), matrix.to_sparse_coo()):
        torch.save(made, source.parent / "m.pt")
        assert done("verify", source, source.parent / "m.pt", *STATED, "--no-bias")["equivalent"]
    torch.save({"weight": matrix.to_dense(), "bias": matrix.bias}, source.parent / "m.pt")
    assert matrix.bias is not None
    np.savez(source.parent / "m.npz", T=matrix.to_dense().numpy(), bias=matrix.bias.numpy())
    assert done("verify", source, source.parent / "m.npz", *STATED)["equivalent"]


def test_a_slice_is_told_its_rows(net: tuple[Path, convtool.ToeplitzMatrix]) -> None:
    source, matrix = net
    path = source.parent / "slice.npy"
    np.save(path, matrix.dense_rows(10, 20).numpy())
    assert done("verify", source, path, *STATED, "--rows", "10:20")["equivalent"]
    assert run("verify", source, path, *STATED, "--rows", "11:21")[0] == 1
    assert run("verify", source, path, *STATED, "--rows", "10:19")[0] == 1
    assert "rows that the matrix has, got 60:70" in error("verify", source, path, *STATED, "--rows", "60:70")[1]
    assert error("verify", source, source, "--rows", "0:1") == (2, "--rows: is for a matrix file")
    done(
        "toeplitz", source, "c", "--input-size", "5,4", "--padding", "1", "--rows", "3:9", "-o", source.parent / "r.npz"
    )
    code, message = error("verify", source, source.parent / "r.npz", "--rows", "4:10")
    assert (code, message) == (2, f"--rows: {source.parent / 'r.npz'} says itself which rows it holds")
