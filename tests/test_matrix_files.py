"""Matrix files: each format, as the program that people load it with reads it."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from cases import CASES, Case, make_conv, real_numbers, whole_numbers
from oracles import toeplitz as dense_toeplitz
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import ToeplitzMatrix, toeplitz
from convtool.errors import OutputError, RefusedError, UsageError
from convtool.formats.atomic import FilePlan, Written
from convtool.formats.matrices import RECORD_NAME, Contents, Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Chunk
from convtool.formats.stored_zip import archive_size, write_archive
from convtool.matrix import FORMATS, MatrixPlan, plan_matrix, write_matrix

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


class Read(NamedTuple):
    """What a reader found."""

    dense: Tensor
    bias: Tensor | None
    index_dtypes: set[Any]


Reader: TypeAlias = Callable[[Path], Read]


def read_scipy(path: Path) -> Read:
    sparse = scipy.sparse.load_npz(path)
    assert isinstance(sparse, scipy.sparse.sparray)
    if sparse.format == "csr":
        sparse.check_format(full_check=True)
        assert sparse.has_canonical_format
        indices = {sparse.indices.dtype.name, sparse.indptr.dtype.name}
    else:
        indices = {part.dtype.name for part in sparse.coords}
        order = np.lexsort(sparse.coords[::-1])
        assert (order == np.arange(sparse.nnz)).all(), "entries in order of rows, then columns"
    with np.load(path, allow_pickle=False) as arrays:
        bias = torch.from_numpy(arrays["bias"]) if "bias" in arrays else None
    return Read(torch.from_numpy(sparse.toarray()), bias, indices)


def read_numpy(path: Path) -> Read:
    if path.suffix == ".npy":
        dense = np.load(path, allow_pickle=False)
        assert dense.flags.c_contiguous
        assert (np.load(path, mmap_mode="r") == dense).all()
        return Read(torch.from_numpy(dense), None, set())
    with np.load(path, allow_pickle=False) as arrays:
        bias = torch.from_numpy(arrays["bias"]) if "bias" in arrays else None
        return Read(torch.from_numpy(arrays["weight"]), bias, set())


def read_torch(path: Path) -> Read:
    state = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    weight: Tensor = state.pop("weight")
    bias: Tensor | None = state.pop("bias", None)
    assert state == {}
    assert torch.equal(mapped["weight"].to_dense(), weight.to_dense())
    if weight.layout == torch.sparse_csr:
        rows, columns = weight.crow_indices(), weight.col_indices()
        torch._validate_sparse_csr_tensor_args(rows, columns, weight.values(), weight.shape)
        return Read(weight.to_dense(), bias, {str(rows.dtype)[6:], str(columns.dtype)[6:]})
    if weight.layout == torch.sparse_coo:
        assert weight.is_coalesced()
        again = torch.sparse_coo_tensor(weight.indices(), weight.values(), weight.shape, check_invariants=True)
        assert torch.equal(again.coalesce().indices(), weight.indices()), "coalesced, as the file says"
        return Read(weight.to_dense(), bias, {str(weight.indices().dtype)[6:]})
    return Read(weight, bias, set())


def read_safetensors(path: Path) -> Read:
    tensors = load_file(path)
    bias = tensors.pop("bias", None)
    if "weight" in tensors:
        assert set(tensors) == {"weight"}
        return Read(tensors["weight"], bias, set())
    shape = tensors.pop("shape").tolist()
    if "indptr" in tensors:
        assert set(tensors) == {"indptr", "indices", "data"}
        rows, columns = tensors["indptr"], tensors["indices"]
        sparse = torch.sparse_csr_tensor(rows, columns, tensors["data"], size=shape, check_invariants=True)
        return Read(sparse.to_dense(), bias, {str(rows.dtype)[6:], str(columns.dtype)[6:]})
    assert set(tensors) == {"row", "col", "data"}
    indices = torch.stack([tensors["row"], tensors["col"]])
    return Read(
        torch.sparse_coo_tensor(indices, tensors["data"], shape, check_invariants=True).to_dense(),
        bias,
        {str(indices.dtype)[6:]},
    )


def read_matrix_market(path: Path) -> Read:
    rows, columns, entries, form, _, symmetry = scipy.io.mminfo(path)
    assert (form, symmetry) == ("coordinate", "general")
    found = scipy.io.mmread(path)
    assert (found.shape, found.nnz) == ((rows, columns), entries)
    assert (np.lexsort((found.col, found.row)) == np.arange(entries)).all(), "entries in order of rows, then columns"
    assert max(map(len, path.read_bytes().splitlines())) <= 1024
    return Read(torch.from_numpy(found.toarray()), None, set())


READERS: dict[tuple[str, Layout], Reader] = {
    (".npz", "csr"): read_scipy,
    (".npz", "coo"): read_scipy,
    (".npz", "dense"): read_numpy,
    (".npy", "dense"): read_numpy,
    (".pt", "csr"): read_torch,
    (".pt", "coo"): read_torch,
    (".pt", "dense"): read_torch,
    (".safetensors", "csr"): read_safetensors,
    (".safetensors", "coo"): read_safetensors,
    (".safetensors", "dense"): read_safetensors,
    (".mtx", "coo"): read_matrix_market,
}
KINDS = list(READERS)
KIND_IDS = ["-".join(kind).removeprefix(".") for kind in KINDS]

each_kind = pytest.mark.parametrize(("suffix", "layout"), KINDS, ids=KIND_IDS)


def test_every_format_and_layout_has_a_reader_here() -> None:
    assert set(KINDS) == {(suffix, layout) for suffix, form in FORMATS.items() for layout in form.LAYOUTS}


def write(matrix: ToeplitzMatrix, path: Path, **options: Any) -> MatrixPlan:
    plan = plan_matrix(matrix, path, layout=options.pop("layout", None), rows=options.pop("rows", None))
    write_matrix(matrix, plan, path, force=True, **options)
    return plan


def expected_dense(conv: Conv, case: Case, matrix: ToeplitzMatrix, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The matrix from the definition, and the bias of each output."""
    dense = torch.from_numpy(dense_toeplitz(conv, case.input_size))
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    bias = bias.repeat_interleave(math.prod(matrix.output_size)).to(torch.float64)
    if matrix.affine:
        dense = torch.cat([dense, bias[:, None]], 1)
    if matrix.transpose:
        return dense.T[slice(*rows)], bias
    return dense[slice(*rows)], bias[slice(*rows)]


@each_kind
def test_the_usual_reader_finds_the_matrix_and_the_bias(suffix: str, layout: Layout, tmp_path: Path) -> None:
    # Each layer of the table in one of the forms, whole or in part; every combination comes often.
    path = tmp_path / f"m{suffix}"
    for number, case in enumerate(CASES):
        conv = case.conv()
        form = {"transpose": bool(number & 1), "affine": bool(number & 2)}
        matrix = toeplitz(conv, case.input_size, transpose=form["transpose"], affine=form["affine"])
        total = matrix.shape[0]
        rows = [(0, total), (total // 3, total // 3 + 1), (total // 2, total)][number % 3]
        plan = write(matrix, path, layout=layout, rows=None if rows == (0, total) else rows)
        found = READERS[suffix, layout](path)
        dense, bias = expected_dense(conv, case, matrix, rows)
        assert torch.equal(found.dense, dense), (case.name, form, rows)
        assert tuple(found.dense.shape) == plan.shape
        if conv.bias is None or form["affine"] or not FORMATS[suffix].STORES_BIAS:
            assert found.bias is None
        else:
            assert found.bias is not None
            assert torch.equal(found.bias, bias), (case.name, form, rows)
        assert found.index_dtypes <= {"int32"} or (suffix, layout) == (".pt", "coo")
        assert path.stat().st_size == plan.size
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@each_kind
def test_a_bias_map_is_written_as_the_bias(suffix: str, layout: Layout, tmp_path: Path) -> None:
    plain = make_conv(Geometry.of((3, 2), padding=(1, 0)), 2, 3)
    bias = whole_numbers(3, 3, 4, 4)
    conv = Conv(plain.weight, bias, plain.geometry)
    path = tmp_path / f"m{suffix}"
    affine = not FORMATS[suffix].STORES_BIAS
    write(toeplitz(conv, (4, 5), affine=affine), path, layout=layout, rows=(7, 41))
    found = READERS[suffix, layout](path)
    vector = found.dense[:, -1] if affine else found.bias
    assert vector is not None
    assert torch.equal(vector, bias.flatten()[7:41])


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex128, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8),
)
# What a format can't hold; everything else it has to.
REFUSED = {
    ".npy": {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2},
    ".npz": {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2},
    ".pt": {torch.float8_e4m3fn, torch.float8_e5m2},
    ".safetensors": {torch.complex128},
    ".mtx": {torch.float8_e4m3fn, torch.float8_e5m2},
}


def small_matrix(dtype: torch.dtype) -> ToeplitzMatrix:
    conv = make_conv(Geometry.of((2, 3), padding=(0, 1), groups=2), 4, 2, most=5)
    if dtype.is_complex:
        conv = Conv(torch.complex(conv.weight, conv.weight.flip(0)), None, conv.geometry)
    return toeplitz(conv, (3, 4), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@each_kind
def test_values_of_every_dtype_are_stored_as_they_are(
    suffix: str, layout: Layout, dtype: torch.dtype, tmp_path: Path
) -> None:
    path, matrix = tmp_path / f"m{suffix}", small_matrix(dtype)
    refused = dtype in REFUSED[suffix] or ((suffix, dtype) == (".npz", torch.float16) and layout != "dense")
    if refused:
        with pytest.raises(RefusedError, match=r"\.safetensors|\.pt|--dtype float32") as caught:
            write(matrix, path, layout=layout)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        return
    write(matrix, path, layout=layout)
    if suffix == ".safetensors":
        tensors = load_file(path)
        stored = tensors["weight"] if layout == "dense" else tensors["data"]
    elif suffix == ".pt":
        weight = torch.load(path, weights_only=True)["weight"]
        stored = weight if layout == "dense" else weight.values()
    elif suffix == ".npy":
        stored = torch.from_numpy(np.load(path))
    elif suffix == ".mtx":
        stored = torch.from_numpy(scipy.io.mmread(path).data).to(dtype)
    else:
        with np.load(path) as arrays:
            stored = torch.from_numpy(arrays["weight" if layout == "dense" else "data"])
    expected = matrix.to_dense() if layout == "dense" else matrix.values(0, matrix.shape[0])
    assert stored.dtype == dtype
    assert torch.equal(stored.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_a_dense_file_is_a_linear_layers_state_dict(tmp_path: Path) -> None:
    conv = make_conv(Geometry.of((3, 2), stride=(1, 2)), 2, 3)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"linear{suffix}"
        matrix = toeplitz(conv, (4, 6))
        write(matrix, path, layout="dense")
        state = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], dtype=torch.float64)
        assert layer.load_state_dict(state, strict=True)
        x = whole_numbers(1, 5, matrix.shape[1])
        out = torch.nn.functional.conv2d(x.reshape(5, 2, 4, 6), conv.weight, conv.bias, stride=(1, 2))
        assert torch.equal(layer(x), out.flatten(1))


def test_safetensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(toeplitz(make_conv(Geometry.of((2, 2)), 1, 1).to(torch.float16), (3, 3)), path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert (8 + size) % 64 == 0
    for name in ("shape", "indptr", "indices", "data", "bias"):
        width = {"I64": 8, "I32": 4, "F16": 2}[header[name]["dtype"]]
        assert (8 + size + header[name]["data_offsets"][0]) % width == 0


# --- the record


@each_kind
def test_the_record_is_kept_where_there_is_room(suffix: str, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    record: dict[str, object] = {"layer": "a.b-\u00e9\n", "fields": {"stride": [1, 2]}, "long": "x y" * 500}
    write(small_matrix(torch.float64), path, layout=layout, record=record)
    if suffix == ".npz":
        with np.load(path) as arrays:
            text = arrays[RECORD_NAME].item().decode()
    elif suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            text = opened.metadata()[RECORD_NAME]
    elif suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            text = archive.read(f"archive/extra/{RECORD_NAME}.json").decode()
    elif suffix == ".mtx":
        lines = [line for line in path.read_text().splitlines() if line.startswith(f"%{RECORD_NAME} ")]
        text = "".join(line.removeprefix(f"%{RECORD_NAME} ") for line in lines)
    else:
        return  # .npy has no room
    assert json.loads(text) == record
    assert READERS[suffix, layout](path).dense.shape == small_matrix(torch.float64).shape


@each_kind
def test_equal_matrices_give_equal_files(suffix: str, layout: Layout, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(small_matrix(torch.float32), tmp_path / f"{name}{suffix}", layout=layout, record={"layer": "x"})
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


# --- progress, and memory


@each_kind
def test_progress_adds_up_to_the_size_of_the_file(suffix: str, layout: Layout, tmp_path: Path) -> None:
    path, steps = tmp_path / f"m{suffix}", list[int]()
    matrix = toeplitz(make_conv(Geometry.of((3, 3), padding=1), 4, 8), (24, 20))
    write(matrix, path, layout=layout, progress=steps.append)
    assert sum(steps) == path.stat().st_size
    assert min(steps) > 0


ANONYMOUS = """
import sys
from pathlib import Path
import torch
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import toeplitz
from convtool.matrix import plan_matrix, write_matrix

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

conv = Conv(torch.zeros(32, 24, 3, 3), torch.zeros(32), Geometry.of((3, 3), padding=1))
path = Path(sys.argv[1])
matrix = toeplitz(conv, (int(sys.argv[3]), 57))
plan = plan_matrix(matrix, path, layout=sys.argv[2])
before, most = anonymous(), 0
def watch(written):
    global most
    most = max(most, anonymous())
write_matrix(matrix, plan, path, force=True, progress=watch)
print(plan.size, most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system doesn't tell a process's memory apart")
@pytest.mark.parametrize(("name", "layout", "height"), [("m.npz", "csr", 60), ("m.npy", "dense", 4)])
def test_a_large_file_takes_little_memory(name: str, layout: str, height: int, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", ANONYMOUS, str(tmp_path / name), layout, str(height)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    size, taken = map(int, done.stdout.split())
    assert size > 150 << 20
    assert taken < 64 << 20


# --- sizes that need 64 bits: by the header and the edges, not by hundreds of gigabytes


def wide(height: int, width: int, **form: bool) -> ToeplitzMatrix:
    """A pointwise layer: as many rows, columns and entries as positions."""
    return toeplitz(make_conv(Geometry.of((1, 1)), 1, 1).to(torch.float32), (height, width), **form)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_int32_is_used_as_far_as_it_reaches_and_no_further(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    fits, exceeds = wide(2**15, 2**16 - 1), wide(2**15, 2**16)
    assert plan_matrix(fits, path, layout="csr").index_dtype == torch.int32
    assert plan_matrix(exceeds, path, layout="csr").index_dtype == torch.int64
    # A few rows of it: few entries, but as many columns.
    assert plan_matrix(exceeds, path, layout="csr", rows=(5, 9)).index_dtype == torch.int64
    # Few columns, but as many entries: coordinates need no more than the shape does, row starts do.
    many = toeplitz(Conv(torch.ones(()).expand(2**16, 2**15), None, Geometry.of(())), ())
    assert many.nnz == 2**31
    assert plan_matrix(many, path, layout="csr").index_dtype == torch.int64
    assert plan_matrix(many, path, layout="csr", rows=(0, 2**16 - 1)).index_dtype == torch.int32
    narrow = torch.int64 if suffix == ".pt" else torch.int32
    assert plan_matrix(many, path, layout="coo").index_dtype == narrow
    assert plan_matrix(many, path, layout="dense").index_dtype is None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".npy"])
def test_the_size_of_a_file_too_large_to_write_is_known_and_checked(suffix: str, tmp_path: Path) -> None:
    matrix = toeplitz(Conv(torch.zeros(512, 512, 3, 3), None, Geometry.of((3, 3), padding=1)), (512, 512))
    path = tmp_path / f"m{suffix}"
    plan = plan_matrix(matrix, path)
    entries = 512 * 512 * (3 * 512 - 2) ** 2
    per_entry = 4 * 2**27 * 2**27 if suffix == ".npy" else entries * 12 + 8 * 2**27
    assert 0 <= plan.size - per_entry < 2000
    with pytest.raises(OutputError, match=rf"m\{suffix}: needs [\d.]+ TiB, and its file system has .* free"):
        write_matrix(matrix, plan, path, force=False)
    assert list(tmp_path.iterdir()) == []


def test_rows_far_inside_of_a_matrix_with_64_bit_indices(tmp_path: Path) -> None:
    matrix, start = wide(2**16, 2**16), 3 * 2**30
    path = tmp_path / "m.npz"
    write(matrix, path, rows=(start, start + 5))
    found = scipy.sparse.load_npz(path)
    assert found.shape == (5, 2**32)
    assert found.indices.dtype == np.int64
    assert found.indices.tolist() == list(range(start, start + 5))
    assert found.indptr.tolist() == list(range(6))


class Holes(io.FileIO):
    """A file in which long runs of zeros are holes, which take no disk."""

    def write(self, data: Any, /) -> int:
        count = memoryview(data).nbytes
        if count < 1 << 20:
            return super().write(data)
        self.seek(count, io.SEEK_CUR)
        return count


def test_an_archive_beyond_4_gib_is_one_to_every_reader(tmp_path: Path) -> None:
    zeros, head = Chunk(bytes(1 << 24)), b"head"

    def member(name: str, size: int) -> Piece:
        def chunks() -> Iterator[Chunk]:
            whole, rest = divmod(size - len(head), 1 << 24)
            yield Chunk(head)
            yield from (zeros for _ in range(whole))
            yield Chunk(bytes(rest))

        return Piece(f"archive/{name}", "uint8", (size,), size, chunks)

    members = [
        Piece.of("archive/version", b"3\n"),
        member("small", 4),
        member("big", LIMIT + (1 << 24)),
        Piece.of("archive/behind", b"tail"),
        member("below", LIMIT - 1),  # the largest size that fits the short fields
        member("edge", LIMIT),
        Piece.of("archive/last", b"end"),
    ]
    path = tmp_path / "a.zip"
    with Holes(path, "w+") as file:
        write_archive(file, members)
    assert path.stat().st_size == archive_size(members) > 3 * LIMIT
    with zipfile.ZipFile(path) as archive:
        assert [(one.filename, one.file_size) for one in archive.infolist()] == [
            (member.name, member.nbytes) for member in members
        ]
        found = [archive.read(f"archive/{name}") for name in ("small", "behind", "last")]
        assert found == [head, b"tail", b"end"]
        for info in archive.infolist():
            assert data_offset(path, info.header_offset) % 64 == 0
        with archive.open("archive/big") as big:
            assert big.read(8) == head + bytes(4)
    theirs = torch._C.PyTorchFileReader(str(path))
    assert sorted(theirs.get_all_records()) == sorted(member.name.removeprefix("archive/") for member in members)
    assert [theirs.get_record(name) for name in ("small", "behind", "last")] == found
    check_end(path, len(members))


LIMIT = 0xFFFFFFFF  # from here on a size takes the wide fields


def check_end(path: Path, count: int) -> None:
    """Hold each field of the end of a large archive against PKWARE's APPNOTE, 4.3.14 to 4.3.16; readers skip most."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 98)
        end64, locator, end = file.read(56), file.read(20), file.read(22)
    signature, length, made, needed, disk, first_disk, here, entries, directory, offset = struct.unpack(
        "<LQ2H2L4Q", end64
    )
    assert (signature, length, made, needed) == (0x06064B50, 56 - 12, 45, 45)
    assert (disk, first_disk, here, entries) == (0, 0, count, count)
    assert offset + directory == size - 98
    assert struct.unpack("<LLQL", locator) == (0x07064B50, 0, size - 98, 1)
    assert struct.unpack("<L4H2LH", end) == (0x06054B50, 0, 0, count, count, directory, LIMIT, 0)
    with path.open("rb") as file:
        file.seek(offset)
        assert file.read(4) == b"PK\x01\x02"


def data_offset(path: Path, header: int) -> int:
    with path.open("rb") as file:
        file.seek(header + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return header + 30 + int(name) + int(extra)


# --- refusals, and failures midway: nothing is left behind


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("m.csv", None, r"m\.csv: expected a name that ends in \.npz, "),
        ("m", None, "expected a name that ends in"),
        ("m.npy", "csr", r"m\.npy: a \.npy file holds dense, not csr; a file that holds it: \.npz, "),
        ("m.npz", "bsr", "--layout: expected one of csr, coo, dense, got 'bsr'"),
    ],
)
def test_names_and_layouts_that_do_not_go_together(name: str, layout: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plan_matrix(small_matrix(torch.float32), tmp_path / name, layout=layout)


@pytest.mark.parametrize("rows", [(0, 0), (3, 2), (-1, 4), (0, 10**6)])
def test_rows_that_the_matrix_does_not_have(rows: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"--rows: expected A:B with 0 <= A < B <= \d+, got {rows[0]}:{rows[1]}"):
        plan_matrix(small_matrix(torch.float32), tmp_path / "m.npz", rows=rows)


def test_a_plan_is_for_one_format(tmp_path: Path) -> None:
    matrix = small_matrix(torch.float32)
    plan = plan_matrix(matrix, tmp_path / "m.npz")
    with pytest.raises(UsageError, match=r"the plan is for a \.npz file"):
        write_matrix(matrix, plan, tmp_path / "m.pt", force=False)


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, path = toeplitz(make_conv(Geometry.of((2, 2)), 2, 2).to(torch.float32), (12, 12)), tmp_path / "m.npy"
    plan = plan_matrix(matrix, path)
    free = shutil.disk_usage(tmp_path)._replace(free=plan.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"needs 272\.4 KiB.* free; a .* file with --layout csr takes .* --rows A:B"):
        write_matrix(matrix, plan, path, force=False)
    assert list(tmp_path.iterdir()) == []
    free = free._replace(free=plan.size)
    write_matrix(matrix, plan, path, force=False)
    assert path.stat().st_size == plan.size


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@each_kind
def test_a_failure_midway_leaves_what_was_there(
    suffix: str, layout: Layout, failure: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"what was there")
    matrix = toeplitz(make_conv(Geometry.of((2, 2)), 2, 2), (3, 5))
    whole = type(matrix).values

    def values(start: int, stop: int) -> Tensor:
        if start > 0 or layout != "dense":
            raise failure
        return whole(matrix, start, stop)

    matrix.values = values  # type: ignore[method-assign]
    plan = plan_matrix(matrix, path, layout=layout)
    if layout == "dense":
        matrix.dense_rows = lambda start, stop: values(1, 2)  # type: ignore[method-assign]
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_matrix(matrix, plan, path, force=True)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def damage(path: Path, suffix: str, layout: Layout) -> None:
    """Another value in the head of an array: what a bug in a writer, or a lying disk, would make."""
    data = bytearray(path.read_bytes())
    if suffix == ".safetensors":
        data[8:] = data[8:].replace(b'"F64"', b'"I64"', 1)
    elif suffix == ".pt":
        at = data.index(b"DoubleStorage")
        data[at : at + 13] = b"DoubleStoragf"
    elif suffix == ".mtx":
        data[-1:] = b" "
    else:
        at = data.rindex(b"<f8") if layout == "dense" else data.index(b"<i4")
        data[at + 1 : at + 2] = b"u"
    path.write_bytes(data)


@each_kind
def test_what_was_written_is_read_back_before_it_gets_its_name(
    suffix: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS[suffix]
    plan_of = form.plan_matrix

    def damaged_first(contents: Contents) -> FilePlan:
        plan = plan_of(contents)

        def check(path: Path) -> None:
            damage(path, suffix, layout)
            plan.check(path)

        return replace(plan, check=check)

    monkeypatch.setattr(form, "plan_matrix", damaged_first)
    with pytest.raises(OutputError, match=r"m\.\w+: [^\n]*read back"):
        write(small_matrix(torch.float64), tmp_path / f"m{suffix}", layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_than_planned_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS[".npz"]
    plan_of = form.plan_matrix

    def write_short(file: Written) -> None:
        file.write(b"short")

    monkeypatch.setattr(form, "plan_matrix", lambda contents: replace(plan_of(contents), fill=write_short))
    with pytest.raises(OutputError, match="5 bytes were written instead of"):
        write(small_matrix(torch.float64), tmp_path / "m.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_replaced_only_with_force(tmp_path: Path) -> None:
    path, matrix = tmp_path / "m.npz", small_matrix(torch.float64)
    path.write_bytes(b"old")
    plan = plan_matrix(matrix, path)
    with pytest.raises(OutputError, match="exists already; use --force to overwrite it"):
        write_matrix(matrix, plan, path, force=False)
    assert path.read_bytes() == b"old"
    write_matrix(matrix, plan, path, force=True)
    assert scipy.sparse.load_npz(path).shape == matrix.shape


def test_real_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    conv = Conv(real_numbers(0, 3, 2, 2, 3), real_numbers(1, 3), Geometry.of((2, 3), padding=1)).to(torch.float32)
    matrix = toeplitz(conv, (4, 5))
    for suffix, layout in KINDS:
        path = tmp_path / f"m{suffix}"
        write(matrix, path, layout=layout)
        assert torch.equal(READERS[suffix, layout](path).dense.float(), matrix.to_dense())
