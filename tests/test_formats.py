"""A format is a module and a line in the table: one that is made up here does all that the others do."""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from checkpoints import SAMPLES
from test_house import PACKAGE, SOURCES
from torch import Tensor

from convtool import formats, load_matrix, matrix, open_checkpoint
from convtool.cli.app import run_app
from convtool.errors import InputError, OutputError
from convtool.formats import pieces
from convtool.formats.atomic import FilePlan, Written
from convtool.formats.dtypes import ITEMSIZE
from convtool.formats.matrices import Contents, Found, Layout
from convtool.formats.pieces import Piece
from convtool.formats.source import Chunk, File, Source
from convtool.formats.tensor_file import Place, TensorFile

MAGIC = b"\x7fTOY\n"


class ToyFile(TensorFile):
    """A few letters, a line of JSON, and the tensors' bytes one after the other."""

    format = "toy"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        with source.opened() as file:
            file.seek(len(MAGIC))
            self.head = json.loads(file.readline())
            at = file.tell()
        self.tensors = {}
        for name, dtype, shape in self.head["tensors"]:
            nbytes = torch.Size(shape).numel() * ITEMSIZE[dtype]
            self.tensors[name] = SimpleNamespace(dtype=dtype, shape=tuple(shape), nbytes=nbytes, start=at)
            at += nbytes

    def record(self) -> str | None:
        record: str | None = self.head["record"]
        return record

    def tensor(self, name: str) -> Tensor:
        found = self.tensors[name]
        data = self.source.view(found.start, found.start + found.nbytes)
        return torch.frombuffer(data, dtype=getattr(torch, found.dtype)).reshape(found.shape)

    def piece(self, name: str) -> Piece:
        found = self.tensors[name]
        chunks = lambda: map(Chunk, self.source.chunks(found.start, found.start + found.nbytes))  # noqa: E731
        return Piece(name, found.dtype, found.shape, found.nbytes, chunks, memory=name)

    def place(self, name: str) -> Place:
        return Place(name, 0, self.tensors[name].nbytes)


class Toy(ModuleType):
    """The module of the format; in a file of its own these would be its functions and constants."""

    NAME = "toy"
    LAYOUTS: tuple[Layout, ...] = ("coo",)
    STORES_BIAS = True
    COO_INDICES = None

    def recognises(self, start: bytes) -> bool:
        return start.startswith(MAGIC)

    def open_file(self, source: Source, root: str | None) -> ToyFile:
        return ToyFile(source)

    def plan_state(self, pieces: Sequence[Piece], metadata: Mapping[str, str], record: str | None) -> FilePlan:
        head = {"tensors": [(piece.name, piece.dtype, piece.shape) for piece in pieces], "record": record}
        text = MAGIC + json.dumps(head).encode() + b"\n"

        def fill(file: Written) -> None:
            file.write(text)
            for piece in pieces:
                piece.write(file)

        def check(path: Path) -> None:
            if list(ToyFile(File(path)).tensors) != [piece.name for piece in pieces]:
                raise OutputError("the file read back holds other tensors")

        return FilePlan(len(text) + sum(piece.nbytes for piece in pieces), fill, check)

    def refusal(self, dtype: str, layout: Layout) -> str | None:
        return None if dtype in ITEMSIZE else f"no {dtype}"

    def plan_matrix(self, contents: Contents) -> FilePlan:
        shape = Piece.of_tensor("shape", torch.tensor(contents.shape))
        return self.plan_state((shape, *contents.arrays), {}, contents.record)

    def read_matrix(self, source: Source) -> Found:
        file = ToyFile(source)
        return Found({name: file.tensor(name) for name in file.tensors}, file.head["record"])

    def is_matrix(self, source: Source) -> bool:
        return "row" in ToyFile(source).tensors


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Toy("convtool.formats.toy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(formats.CHECKPOINTS, ".toy", "toy")
    monkeypatch.setitem(matrix.FORMATS, ".toy", module)


def run(*words: object) -> int:
    return run_app([*map(str, words), "--quiet"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_numbers_that_came_to_the_disk_as_others_are_found(tmp_path: Path, suffix: str) -> None:
    turns = iter([torch.arange(6.0), torch.arange(6.0).flip(0)])  # what is written, and what was to be
    piece = replace(
        Piece.of_tensor("w", torch.arange(6.0)), chunks=lambda: map(Chunk, pieces.tensor_chunks(next(turns)))
    )
    plan = formats.checkpoint_format(suffix).plan_state([piece], {}, None)
    with pytest.raises(OutputError, match=f"out{suffix}: w read back differs from what was written"):
        plan.write(tmp_path / f"out{suffix}", force=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, InputError, zipfile.BadZipFile])
def test_what_a_reader_says_of_a_file_just_written_is_damage(tmp_path: Path, error: type[Exception]) -> None:
    def fill(file: Written) -> None:
        file.write(b"abc")

    def check(path: Path) -> None:
        raise error("half of it")

    plan = FilePlan(3, fill, check)
    with pytest.raises(OutputError, match=r"out: the file read back is damaged \(half of it\)"):
        plan.write(tmp_path / "out", force=False)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_a_new_format_is_written_listed_fused_verified_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, toy, fused = SAMPLES / "chains.safetensors", tmp_path / "a.toy", tmp_path / "fused.toy"
    assert run("convert", source, toy) == 0
    capsys.readouterr()
    assert run("inspect", toy, "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "toy"
    assert run("fuse", toy, "reduce", "spread", "--assume-defaults", "-o", fused) == 0
    record = open_checkpoint(fused).record
    assert record is not None
    assert [fusion.name for fusion in record.fusions] == ["reduce"]
    assert run("verify", source, fused, "--input-size", "8,9") == 0
    for out in (tmp_path / "b.pt", tmp_path / "c.safetensors"):
        assert run("convert", fused, out) == 0
        assert run("verify", source, out, "--input-size", "8,9") == 0
    assert run("convert", toy, tmp_path / "again.safetensors") == 0
    assert run("verify", source, tmp_path / "again.safetensors") == 0
    (tmp_path / "a.xyz").write_bytes(toy.read_bytes())  # how a file begins tells its format
    assert open_checkpoint(tmp_path / "a.xyz").format == "toy"


def test_a_matrix_of_a_new_format_is_written_and_read(tmp_path: Path) -> None:
    line = ["toeplitz", SAMPLES / "chains.safetensors", "widen", "--input-size", "16,5,6", "--padding", "1,2", "-o"]
    for name in ("m.toy", "m.npz"):
        assert run(*line, tmp_path / name) == 0
        assert run("verify", SAMPLES / "chains.safetensors", tmp_path / name) == 0
    found, expected = (load_matrix(tmp_path / name).to_dense() for name in ("m.toy", "m.npz"))
    assert torch.equal(found, expected)


def test_who_writes_and_reads_asks_the_format_and_never_its_name_or_class() -> None:
    """Outside of `formats/` nothing imports the module of one format."""
    modules = {f"convtool.formats.{name}" for name in {*formats.CHECKPOINTS.values(), *formats.MATRICES.values()}}
    for path in SOURCES:
        if path.is_relative_to(PACKAGE / "formats"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported = {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert not imported & modules, f"{path}:{node.lineno}"
