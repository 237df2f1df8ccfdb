"""Matrix files read back: whole and in blocks, convtool's own and other programs', sound and damaged."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from cases import CASES, make_conv, make_inputs, real_numbers, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_matrix_files import KIND_IDS, KINDS, write
from torch import Tensor

import convtool
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import ToeplitzMatrix, toeplitz
from convtool.errors import ConvtoolError, InputError, RefusedError, UsageError
from convtool.formats import mtx
from convtool.formats.matrices import Layout
from convtool.matrix.read import MatrixFile, load_matrix, open_matrix

each_kind = pytest.mark.parametrize(("suffix", "layout"), KINDS, ids=KIND_IDS)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


def small() -> ToeplitzMatrix:
    return toeplitz(make_conv(Geometry.of((2, 3), padding=(1, 0), groups=2), 4, 6), (4, 5))


def check_against(opened: MatrixFile, dense: Tensor) -> None:
    """Every way to read it gives the same matrix."""
    rows, columns = dense.shape
    assert opened.shape == (rows, columns)
    assert torch.equal(load_matrix(opened.path).to_dense(), dense)
    as_scipy = load_matrix(opened.path, "scipy")
    assert isinstance(as_scipy, scipy.sparse.sparray)
    np.testing.assert_array_equal(as_scipy.toarray(), dense.numpy())
    x = whole_numbers(2, columns, 3)
    assert torch.equal(opened.product(x), dense.double() @ x)
    assert torch.equal(opened.product(x, absolute=True), dense.double().abs() @ x)
    for start, stop in ((0, 0), (0, rows), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
        assert torch.equal(opened.dense_rows(start, stop), dense[start:stop])
        counts, indices, values = opened.rows(start, stop)
        assert int(counts.sum()) == len(indices) == len(values)
    for entries in (1, 7, 10**6):
        blocks = list(opened.blocks(entries))
        assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
        assert blocks[-1][1] == rows
        assert all(start < stop for start, stop in blocks)


@each_kind
def test_a_matrix_comes_back_whole_and_in_parts(suffix: str, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    for case in CASES[::3]:
        matrix = toeplitz(case.conv(), case.input_size)
        write(matrix, path, layout=layout, record={"layer": case.name})
        opened = open_matrix(path)
        assert (opened.layout, opened.shape, opened.dtype) == (layout, matrix.shape, torch.float64)
        assert opened.nnz == (matrix.nnz if layout != "dense" else matrix.shape[0] * matrix.shape[1])
        check_against(opened, matrix.to_dense())
        if matrix.bias is None or suffix in (".npy", ".mtx"):
            assert opened.bias is None
        else:
            assert opened.bias is not None
            assert torch.equal(opened.bias, matrix.bias)
        assert opened.record == (None if suffix == ".npy" else {"layer": case.name})


@each_kind
def test_a_layer_can_be_held_against_its_file_block_by_block(suffix: str, layout: Layout, tmp_path: Path) -> None:
    conv = make_conv(Geometry.of((3, 3), padding=(1, 2), stride=(2, 1)), 3, 5)
    path, x = tmp_path / f"m{suffix}", make_inputs(conv, (9, 8), batch=3)
    write(toeplitz(conv, (9, 8)), path, layout=layout)
    found = open_matrix(path).product(x.flatten(1).T)
    assert torch.equal(found, forward(Conv(conv.weight, None, conv.geometry), x).flatten(1).T)


def test_csr_blocks_hold_no_more_entries_than_asked_for(tmp_path: Path) -> None:
    sparse = scipy.sparse.csr_array(np.tril(np.ones((30, 31), dtype=np.float32)))
    scipy.sparse.save_npz(tmp_path / "m.npz", sparse)
    opened = open_matrix(tmp_path / "m.npz")
    for entries in (1, 20, 40, 100):
        for start, stop in opened.blocks(entries):
            assert stop == start + 1 or int(opened.rows(start, stop).counts.sum()) <= entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = real_numbers(0, 3, 2, 2, 2)
    conv = Conv((torch.complex(weight, weight) if dtype.is_complex else weight).to(dtype), None, Geometry.of((2, 2)))
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"m{suffix}"
        write(toeplitz(conv, (3, 4)), path)
        found = load_matrix(path)
        assert found.dtype == dtype
        assert torch.equal(found.values(), toeplitz(conv, (3, 4)).values(0, 18))
        if dtype in (torch.float16, torch.bfloat16):
            with pytest.raises(RefusedError, match=f"scipy has no sparse matrices of {str(dtype)[6:]}"):
                load_matrix(path, "scipy")


def test_the_public_name(tmp_path: Path) -> None:
    write(small(), tmp_path / "m.safetensors")
    assert torch.equal(convtool.load_matrix(tmp_path / "m.safetensors").to_dense(), small().to_dense())
    assert convtool.open_matrix(str(tmp_path / "m.safetensors")).shape == small().shape
    with pytest.raises(UsageError, match="kind: expected 'torch' or 'scipy', got 'numpy'"):
        load_matrix(tmp_path / "m.safetensors", "numpy")  # type: ignore[arg-type]


MAPPED = """
import sys
import torch
from convtool.matrix.read import load_matrix, open_matrix

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

x = torch.ones(open_matrix(sys.argv[1]).shape[1], 1)
before = anonymous()
opened = open_matrix(sys.argv[1])
opened.product(x)
loaded = load_matrix(sys.argv[1])
kept = sum(part.nbytes for part in (loaded.values(), loaded.col_indices()))
print(kept, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system doesn't tell a process's memory apart")
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_file_is_mapped_not_loaded(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    conv = Conv(torch.ones(32, 24, 3, 3), None, Geometry.of((3, 3), padding=1))
    write(toeplitz(conv, (40, 57)), path)
    done = subprocess.run([sys.executable, "-c", MAPPED, str(path)], capture_output=True, text=True, check=True)
    size, taken = map(int, done.stdout.split())
    assert size > 100 << 20
    assert taken < 50 << 20


# --- other programs' files


def test_what_scipy_saves(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((7, 5)) < 0.4, rng.integers(1, 9, (7, 5)), 0).astype(np.float32)
    path = tmp_path / "m.npz"
    for compressed in (False, True):
        for form in (scipy.sparse.csr_matrix, scipy.sparse.csr_array, scipy.sparse.coo_array):
            scipy.sparse.save_npz(path, form(dense), compressed=compressed)
            check_against(open_matrix(path), torch.from_numpy(dense))
    for form in (scipy.sparse.csc_array, scipy.sparse.bsr_array, scipy.sparse.dia_array):
        scipy.sparse.save_npz(path, form(dense))
        check_against(open_matrix(path), torch.from_numpy(dense))
    arrays = dict(np.load(path))
    for name, wrong in (("shape", [7, 2**40]), ("shape", [7]), ("offsets", [0.5]), ("format", b"lil")):
        np.savez(path, **{**arrays, name: np.array(wrong)})
        with pytest.raises(InputError, match=r"m\.npz: "):
            open_matrix(path)
    scipy.sparse.save_npz(path, scipy.sparse.csc_array(dense))
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "indices": arrays["indices"] + 7})
    with pytest.raises(InputError, match="damaged: its arrays make no csc matrix"):
        open_matrix(path)


def test_entries_in_any_order_and_several_at_one_place(tmp_path: Path) -> None:
    rows, columns, values = np.array([2, 0, 2, 1, 0]), np.array([1, 3, 1, 0, 0]), np.array([1.0, 2, 3, 4, 5])
    coo = scipy.sparse.coo_array((values, (rows, columns)), shape=(3, 4))
    path = tmp_path / "m.npz"
    scipy.sparse.save_npz(path, coo)
    check_against(open_matrix(path), torch.from_numpy(coo.toarray()))
    arrays = {"indptr": [0, 2, 2, 5], "indices": [3, 1, 0, 0, 2], "shape": [3, 4]}
    tensors = {name: torch.tensor(numbers) for name, numbers in arrays.items()}
    save_file({**tensors, "data": torch.tensor([1.0, 2, 3, 4, 5])}, tmp_path / "m.safetensors")
    expected = torch.tensor([[0, 2.0, 0, 1], [0, 0, 0, 0], [7, 0, 5, 0]])
    opened = open_matrix(tmp_path / "m.safetensors")
    assert torch.equal(opened.dense_rows(0, 3), expected)
    assert torch.equal(opened.product(torch.eye(4)), expected)


def test_what_numpy_and_torch_save(tmp_path: Path) -> None:
    dense = np.arange(12.0).reshape(3, 4)
    for number, array in enumerate(
        (np.asfortranarray(dense), dense.astype(">f8"), dense[:, ::-1], dense.astype("<i4"))
    ):
        np.save(tmp_path / "m.npy", array)
        check_against(
            open_matrix(tmp_path / "m.npy"), torch.from_numpy(array.astype(array.dtype.newbyteorder("=")).copy())
        )
        np.savez_compressed(tmp_path / "m.npz", weight=array)
        assert open_matrix(tmp_path / "m.npz").layout == "dense", number
    tensor = torch.from_numpy(dense)
    for saved in (tensor, tensor.to_sparse_csr(), tensor.to_sparse_coo(), {"weight": tensor, "bias": tensor[:, 0]}):
        torch.save(saved, tmp_path / "m.pt")
        check_against(open_matrix(tmp_path / "m.pt"), tensor)


def test_matrix_market_files_that_scipy_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    dense = np.where(rng.random((7, 5)) < 0.4, rng.integers(1, 9, (7, 5)), 0)
    path = tmp_path / "m.mtx"
    for array in (dense.astype(np.float64), dense, dense * 1j, dense * 0.0):
        scipy.io.mmwrite(path, scipy.sparse.coo_array(array), comment="a comment", symmetry="general")
        found = open_matrix(path)
        assert torch.equal(found.dense_rows(0, 7), torch.from_numpy(array))
    scipy.io.mmwrite(path, scipy.sparse.coo_array(np.eye(3)))
    with pytest.raises(InputError, match=r"expected '%%MatrixMarket matrix coordinate' with .*; got .*symmetric'"):
        open_matrix(path)
    for text in ("1 1 5\n", "", "9 1 5\n1 1 1\n", "0 1 5\n1 1 1\n", "1 x 5\n1 1 1\n", "1 1\n1 1\n", "1 1 5\n2 2 1"):
        path.write_text(f"%%MatrixMarket matrix coordinate real general\n2 2 2\n{text}")
        with pytest.raises(InputError, match=r"m\.mtx: (the matrix is )?(damaged|not a Matrix Market file)"):
            load_matrix(path)
    path.write_text("%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 5\n2 2 12.5")  # cut short, of 12.53
    with pytest.raises(InputError, match="ends in the middle of a line"):
        load_matrix(path)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_text_is_read_whatever_the_order_of_its_entries(
    ordered: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mtx, "BLOCK", block)  # of text that is looked at together
    rng = np.random.default_rng(2)
    dense = np.where(rng.random((23, 6)) < 0.5, rng.standard_normal((23, 6)), 0)
    dense[[0, 3, 4, 22]] = 0
    dense[7] = 1.5
    entries = scipy.sparse.coo_array(dense)
    order = np.argsort(entries.coords[0], kind="stable") if ordered else rng.permutation(entries.nnz)
    lines = [f"{entries.coords[0][k] + 1} {entries.coords[1][k] + 1}\t{entries.data[k]:.17g} \r\n" for k in order]
    head = f"%%MatrixMarket matrix coordinate real general\n% words\n\n23 6 {len(lines)}\n"
    (tmp_path / "m.mtx").write_text(head + "\n".join(lines))  # with a blank line between
    opened = open_matrix(tmp_path / "m.mtx")
    assert (opened.nnz, opened.dtype) == (entries.nnz, torch.float64)
    for start, stop in [(0, 23), (0, 0), (3, 5), (7, 8), (6, 20), (22, 23)]:
        assert torch.equal(opened.dense_rows(start, stop), torch.from_numpy(dense[start:stop]))
    for limit in (1, 9, 1000):
        blocks = list(opened.blocks(limit))
        assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
        assert blocks[-1][1] == 23
    x = torch.from_numpy(rng.standard_normal((6, 2)))
    torch.testing.assert_close(opened.product(x), torch.from_numpy(dense) @ x)
    assert np.array_equal(opened.to_scipy().toarray(), dense)
    assert torch.equal(opened.to_torch().to_dense(), torch.from_numpy(dense))
    with pytest.raises(UsageError, match="rows: expected 0 <= A <= B <= 23"):
        opened.rows(3, 24)


@pytest.mark.parametrize("size", ["3 4 1000000000000", "3 4 3", "9 9 9999999999999999999", "3 4 -1", "3 4", "3 4 2 1"])
def test_what_a_size_line_announces_is_held_against_the_file_first(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scipy makes room for the entries that are announced before it reads one."""
    monkeypatch.setattr(scipy.io, "mmread", lambda file: pytest.fail("it was read"))
    (tmp_path / "m.mtx").write_text(f"%%MatrixMarket matrix coordinate real general\n{size}\n1 1 1\n2 2 2\n")
    with pytest.raises(InputError, match=r"damaged: (announces|line 2: expected rows columns entries; got)"):
        open_matrix(tmp_path / "m.mtx")


def test_without_scipy_text_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(small(), tmp_path / "m.mtx")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"m\.mtx: to read \.mtx takes scipy: pip install 'convtool\[scipy\]'"):
        open_matrix(tmp_path / "m.mtx")


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("real", "1 2", "Line 6: Invalid floating-point value."),
        ("real", "1 2 x", "Line 6: Invalid floating-point value."),
        ("real", "1.5 2 3", "Line 6: Invalid integer value."),
        ("real", "4 2 3", "Line 6: Row index out of bounds"),
        ("real", "2 0 3", "Line 6: Column index out of bounds"),
        ("real", "2 9999999999999999999999 3", "Line 6: Integer out of range."),
        ("real", "% 2 3", "Line 6: Invalid integer value."),
        ("integer", "2 3 99999999999999999999", "Line 6: Integer out of range."),
        ("complex", "2 3 1.5", "Line 6: Invalid floating-point value."),
        # What scipy passes over, and takes for the entry in front of it.
        ("real", "1 2 3 4", "4 entries of 3 numbers each are 12, and it holds 13"),
        ("complex", "2 3 1 2 3", "4 entries of 4 numbers each are 16, and it holds 17"),
        ("real", "1 2 3x", "line 6: has b'x' in a number of its kind"),
        ("real", "1 2 3D5", "line 6: has b'D' in a number of its kind"),
        ("integer", "2 3 1.5", "line 6: has b'.' in a number of its kind"),
        ("integer", "2 3 1e5", "line 6: has b'e' in a number of its kind"),
    ],
)
@pytest.mark.parametrize("block", [8, 1 << 18])
def test_a_malformed_line_is_refused(
    kind: str, line: str, message: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mtx, "BLOCK", block)
    good = "1 1  5 6" if kind == "complex" else "1 1  5"
    text = f"%%MatrixMarket matrix coordinate {kind} general\n3 4 4\n{good}\n\n{good}\n{line}\n{good}\n"
    (tmp_path / "m.mtx").write_text(text)
    with pytest.raises(InputError) as caught:
        open_matrix(tmp_path / "m.mtx")
    assert str(caught.value) == f"{tmp_path / 'm.mtx'}: damaged: {message}"


def test_both_parts_of_complex_text_are_as_written(tmp_path: Path) -> None:
    path, head = tmp_path / "m.mtx", "%%MatrixMarket matrix coordinate complex general\n"
    path.write_text(f"{head}1 3 3\n1 1 1 inf\n1 2 -0 2\n1 3 nan 3\n")
    values = open_matrix(path).rows(0, 1).values
    assert values.real.tolist()[:2] == [1, 0]
    assert bool(values.real.signbit()[1])
    assert values.imag.tolist() == [np.inf, 2, 3]
    path.write_text(f'{head}%convtool_matrix {{"dtype":"float32"}}\n1 1 1\n1 1 1 2\n')
    with pytest.raises(InputError, match="its record calls its numbers float32, which they aren't"):
        open_matrix(path)


# --- what is no matrix, or a damaged one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.npz", r"m\.npz: no such file"),
        ("m.txt", r"m\.txt: expected a matrix file, a name that ends in \.npz, "),
        ("folder.npz", r"folder\.npz: is a folder"),
    ],
)
def test_no_file(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ConvtoolError, match=message):
        open_matrix(tmp_path / name)


def test_files_without_a_matrix(tmp_path: Path) -> None:
    ones = torch.ones(3, 4)
    save_file({"conv.weight": ones}, tmp_path / "a.safetensors")
    save_file({"weight": torch.ones(3, 4, 2)}, tmp_path / "b.safetensors")
    save_file({"indptr": torch.zeros(4), "indices": torch.zeros(0), "data": torch.zeros(0)}, tmp_path / "c.safetensors")
    torch.save({"model": ones}, tmp_path / "d.pt")
    torch.save(ones.to_sparse_csc(), tmp_path / "e.pt")
    torch.save([1, 2], tmp_path / "f.pt")
    np.save(tmp_path / "g.npy", np.array(["a", "b"]))
    np.save(tmp_path / "h.npy", np.array([None]), allow_pickle=True)
    np.savez(tmp_path / "i.npz", other=np.ones(3))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(InputError) as caught:
            open_matrix(path)
        assert str(caught.value).startswith(f"{path}: "), path
        assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_no_code_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2, 2), "x": Evil()}, tmp_path / "m.pt")
    np.savez(tmp_path / "m.npz", weight=np.array([Evil()], dtype=object))
    with pytest.raises(InputError):
        open_matrix(tmp_path / "m.npz")
    assert open_matrix(tmp_path / "m.pt").shape == (2, 2)  # what stands beside the weight is passed over
    assert capsys.readouterr().out == ""


DAMAGES = {
    "columns beyond the last": {"indices": [0, 4, 1]},
    "columns below zero": {"indices": [0, -1, 1]},
    "starts that go back": {"indptr": [0, 2, 1, 3]},
    "starts beyond the entries": {"indptr": [0, 2, 9, 3]},
    "starts that begin late": {"indptr": [1, 2, 2, 3]},
    "starts that end early": {"indptr": [0, 2, 2, 2]},
    "as many starts as rows": {"indptr": [0, 2, 3]},
    "fewer columns than values": {"indices": [0, 1]},
    "a shape of three numbers": {"shape": [3, 4, 1]},
    "a negative shape": {"shape": [-3, 4]},
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=list(DAMAGES))
def test_indices_that_are_out_of_range_are_found(change: dict[str, list[int]], tmp_path: Path) -> None:
    arrays = {"indptr": [0, 2, 2, 3], "indices": [0, 3, 1], "shape": [3, 4]}
    path = tmp_path / "m.safetensors"
    for numbers, sound in ((arrays, True), (arrays | change, False)):
        tensors = {name: torch.tensor(values) for name, values in numbers.items()}
        save_file({**tensors, "data": torch.ones(3)}, path)
        if sound:
            load_matrix(path)
            continue
        for read in (load_matrix, lambda path: load_matrix(path, "scipy"), lambda path: open_matrix(path).rows(0, 3)):
            with pytest.raises(InputError, match=r"the matrix is damaged|expected a shape of 2 numbers"):
                read(path)


@pytest.mark.parametrize("change", [{"indices": [0.5, 3, 1]}, {"indptr": [0.0, 2, 2, 3]}, {"col": [0.0, 3, 1]}])
def test_places_that_are_no_whole_numbers_are_refused(change: dict[str, list[float]], tmp_path: Path) -> None:
    sparse = {"row": [0, 0, 2], "col": [0, 3, 1]} if "col" in change else {"indptr": [0, 2, 2, 3], "indices": [0, 3, 1]}
    arrays = {**sparse, "shape": [3, 4], **change}
    tensors = {name: torch.tensor(values) for name, values in arrays.items()}
    save_file({**tensors, "data": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=f"{next(iter(change))}: expected int32 or int64, got torch.float32"):
        load_matrix(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", [{"row": [0, 2, 3]}, {"row": [-1, 0, 2]}, {"col": [0, 1, 4]}, {"col": [0, -1, 2]}])
def test_coordinates_that_are_out_of_range_are_found(change: dict[str, list[int]], tmp_path: Path) -> None:
    arrays = {"row": [0, 0, 2], "col": [0, 3, 1], "shape": [3, 4]} | change
    tensors = {name: torch.tensor(values) for name, values in arrays.items()}
    save_file({**tensors, "data": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="the matrix is damaged"):
        load_matrix(tmp_path / "m.safetensors")


class Files(dict[tuple[str, Layout], bytes]):
    """Files by their kind; not all of them need be shown where one fails."""

    def __repr__(self) -> str:
        return "files"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The bytes of a small matrix in every format."""
    folder = tmp_path_factory.mktemp("sound")
    files = Files()
    for suffix, layout in KINDS:
        path = folder / f"{layout}{suffix}"
        write(small(), path, layout=layout, record={"layer": "x"})
        files[suffix, layout] = path.read_bytes()
    return files


@settings(max_examples=400)
@given(kind=st.sampled_from(KINDS), where=st.floats(0, 1), cut=st.booleans(), value=st.integers(1, 255))
def test_a_damaged_file_is_an_error_or_the_numbers_it_holds(
    sound: Files,
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, Layout],
    where: float,
    cut: bool,
    value: int,
) -> None:
    # A byte changed or the end cut off: never a crash, a traceback, or memory read that isn't the file's. Archives
    # have checksums, so there no change of a number goes unseen.
    data = bytearray(sound[kind])
    place = min(int(where * len(data)), len(data) - 1)
    if cut:
        del data[place:]
    else:
        data[place] ^= value
    path = tmp_path_factory.getbasetemp() / f"damaged{kind[0]}"
    path.write_bytes(data)
    message: str | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_matrix(path)
            open_matrix(path).product(torch.ones(found.shape[1], 1, dtype=torch.float64))
    except InputError as error:
        message = str(error)
    if message is not None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return
    assert not cut
    if kind[0] in (".npz", ".pt"):
        assert torch.equal(found.to_dense(), small().to_dense())


def test_an_array_that_announces_more_than_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    header = io.BytesIO()
    fields: dict[str, Any] = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**7)}
    np.lib.format.write_array_header_1_0(header, fields)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("weight.npy", header.getvalue() + bytes(80))
        with pytest.raises(InputError, match=r"weight\.npy: it doesn't hold the 100000000000000 elements"):
            open_matrix(path)
    np.save(tmp_path / "m.npy", np.ones((2, 2)))
    (tmp_path / "m.npy").write_bytes(header.getvalue() + bytes(80))
    with pytest.raises(InputError, match=r"m\.npy: not an \.npy file, or damaged"):
        open_matrix(tmp_path / "m.npy")


def test_rows_and_inputs_that_do_not_fit(tmp_path: Path) -> None:
    write(small(), tmp_path / "m.npz")
    opened = open_matrix(tmp_path / "m.npz")
    with pytest.raises(UsageError, match="rows: expected 0 <= A <= B <= 90, got 3:91"):
        opened.rows(3, 91)
    with pytest.raises(UsageError, match=r"expected x of shape \(80, n\), got \(79, 1\)"):
        opened.product(torch.ones(79, 1))
