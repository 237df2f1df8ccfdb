"""Matrices in shards: the same bytes however many processes write them, and no index unless all of them are there."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
from cases import make_conv, whole_numbers
from schemas import validate

from convtool.cli.app import run_app
from convtool.core.geometry import Geometry
from convtool.core.toeplitz import ToeplitzMatrix, toeplitz
from convtool.errors import ConvtoolError, InputError, OutputError, UsageError
from convtool.formats.matrices import Layout
from convtool.formats.several import Ranks
from convtool.matrix import plan_matrix, write_matrix
from convtool.matrix.read import load_matrix, open_matrix
from convtool.matrix.shards import check_shards, index_path, plan_shards, shard_rows

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")

CHAINS = str(Path(__file__).resolve().parent.parent / "sample_models" / "chains.safetensors")
WIDEN = ["widen", "--input-size", "16,5,6", "--padding", "1,2"]
RECORD: dict[str, object] = {"layer": "conv", "transpose": False, "affine": False, "rows": None}


def matrix(**form: bool) -> ToeplitzMatrix:
    return toeplitz(make_conv(Geometry.of((2, 3), padding=(1, 0), groups=2), 4, 6), (4, 5), **form)  # type: ignore[arg-type]


class Together(Ranks):
    """Threads in the place of processes."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        self.rank, self.count, self._barrier = rank, barrier.parties, barrier

    def wait(self) -> None:
        try:
            self._barrier.wait(timeout=30)
        except threading.BrokenBarrierError:
            raise OutputError("another process is gone") from None


def run_together(count: int, job: Any) -> list[BaseException | None]:
    """Run `job(ranks)` as so many ranks; what each of them raised."""
    barrier = threading.Barrier(count)
    raised: list[BaseException | None] = [None] * count

    def one(rank: int) -> None:
        try:
            job(Together(rank, barrier))
        except BaseException as error:
            raised[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["csr", "coo", "dense"])
@pytest.mark.parametrize(("shards", "ranks"), [(1, 1), (2, 2), (5, 2), (3, 4), (90, 3)])
def test_processes_write_what_one_alone_would(layout: Layout, shards: int, ranks: int, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    planned = [
        plan_shards(matrix(), folder / "m.safetensors", shards, layout=layout, record=RECORD)
        for folder in (alone, together)
    ]
    planned[0].write(force=False)
    assert planned[0].files() == {path: path.stat().st_size for path in alone.iterdir()}

    def job(rank: Together) -> None:
        planned[1].write(force=False, ranks=rank)

    assert run_together(ranks, job) == [None] * ranks
    assert files(alone) == files(together)
    assert len(files(alone)) == shards + 1


@pytest.mark.parametrize("layout", ["csr", "coo", "dense"])
@pytest.mark.parametrize("form", [{}, {"transpose": True}, {"affine": True}], ids=str)
@pytest.mark.parametrize("shards", [1, 4])
def test_shards_are_the_matrix(layout: Layout, form: dict[str, bool], shards: int, tmp_path: Path) -> None:
    whole, path = matrix(**form), tmp_path / "m.safetensors"
    plan_shards(whole, path, shards, layout=layout, record={**RECORD, **form}).write(force=False)
    opened, dense = open_matrix(index_path(path)), whole.to_dense()
    assert (opened.shape, opened.layout, opened.dtype) == (whole.shape, layout, torch.float64)
    assert opened.nnz == (whole.nnz if layout != "dense" else dense.numel())
    assert opened.record == {**RECORD, **form}
    assert torch.equal(load_matrix(index_path(path)).to_dense(), dense)
    as_scipy = load_matrix(index_path(path), "scipy")
    assert isinstance(as_scipy, scipy.sparse.sparray)
    assert (as_scipy.toarray() == dense.numpy()).all()
    x = whole_numbers(1, dense.shape[1], 2)
    assert torch.equal(opened.product(x), dense @ x)
    assert torch.equal(opened.product(x, absolute=True), dense.abs() @ x)
    rows = dense.shape[0]
    for start, stop in ((0, rows), (0, 0), (rows, rows), (rows // 4 - 1, rows // 2 + 1), (rows // 2, rows // 2 + 1)):
        assert torch.equal(opened.dense_rows(start, stop), dense[start:stop])
        assert len(opened.rows(start, stop).counts) == stop - start
    blocks = list(opened.blocks(20))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == rows
    if form.get("affine"):
        assert opened.bias is None
    else:
        assert opened.bias is not None
        assert whole.bias is not None
        assert torch.equal(opened.bias, whole.bias)


def test_a_shard_is_what_its_rows_alone_would_be(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    plan_shards(matrix(), path, 4, record=RECORD).write(force=False)
    for number in range(4):
        span = shard_rows(90, number, 4)
        alone = tmp_path / "rows.safetensors"
        record = RECORD | {"rows": list(span)}
        write_matrix(matrix(), plan_matrix(matrix(), alone, rows=span), alone, force=True, record=record)
        assert (tmp_path / f"m-{number + 1:05}-of-00004.safetensors").read_bytes() == alone.read_bytes()


# --- what goes wrong


class Broken(BaseException):
    """The end of a rank."""


def test_a_rank_that_ends_midway_leaves_the_older_matrix(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    plan_shards(matrix(), path, 4).write(force=False)
    before = files(tmp_path)

    def job(rank: Together) -> None:
        def progress(count: int) -> None:
            if rank.rank == 1:
                raise Broken

        plan_shards(matrix(), path, 4).write(force=True, ranks=rank, progress=progress)

    first, second = run_together(2, job)
    assert isinstance(first, OutputError)
    assert isinstance(second, Broken)
    assert files(tmp_path) == before


def test_a_shard_that_is_gone_is_missed_before_an_index_names_it(tmp_path: Path) -> None:
    class Losing(Ranks):
        def wait(self) -> None:
            for path in tmp_path.glob("m-00002*"):
                path.unlink()

    with pytest.raises(OutputError, match=r"m-00002-of-00003\.safetensors: isn't there as it was written"):
        plan_shards(matrix(), tmp_path / "m.safetensors", 3).write(force=False, ranks=Losing())
    assert files(tmp_path) == {}


def test_without_an_index_there_is_no_matrix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; without its index a matrix in shards isn't whole"):
        open_matrix(index_path(tmp_path / "m.safetensors"))


def test_nothing_is_overwritten_without_force_and_old_shards_go_last(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    plan_shards(matrix(), path, 2).write(force=False)
    before = files(tmp_path)
    for count in (2, 3):
        with pytest.raises(OutputError, match="exists already"):
            plan_shards(matrix(), path, count).write(force=False)
    assert files(tmp_path) == before
    plan_shards(matrix(), path, 2).write(force=True)
    after = files(tmp_path)
    assert after.keys() == {index_path(path).name, "m-00001-of-00002-2.safetensors", "m-00002-of-00002-2.safetensors"}
    assert torch.equal(load_matrix(index_path(path)).to_dense(), matrix().to_dense())
    index_path(path).unlink()  # what a process that was killed leaves are files that no index names
    plan_shards(matrix(), path, 2).write(force=False)
    assert files(tmp_path) == before | {name: data for name, data in after.items() if name != index_path(path).name}


@pytest.mark.parametrize(
    ("name", "shards", "message"),
    [
        ("m.npz", 2, r"m\.npz: a matrix in shards is \.safetensors"),
        ("m.safetensors", 0, "--shards: expected a number from 1 to 99999, got 0"),
        ("m.safetensors", 91, "--shards: expected at most 90, the number of rows, got 91"),
    ],
)
def test_names_and_numbers_that_do_not_do(name: str, shards: int, message: str, tmp_path: Path) -> None:
    def plan() -> None:
        check_shards(tmp_path / name, shards, force=False)
        plan_shards(matrix(), tmp_path / name, shards)

    with pytest.raises(UsageError, match=message):
        plan()
    assert files(tmp_path) == {}


def damaged_indices(index: dict[str, Any]) -> list[object]:
    shards = index["shards"]
    return [
        [],
        {"shards": shards},
        index | {"shards": shards[:-1]},
        index | {"shards": shards[::-1]},
        index | {"shards": [*shards, shards[-1]]},
        index | {"shape": [90, 81]},
        index | {"shape": [91, 80]},
        index | {"shards": [shards[0] | {"rows": [0, 46]}, shards[1]]},
        index | {"shards": [shards[0] | {"file": "missing.safetensors"}, shards[1]]},
        index | {"shards": [shards[0] | {"file": "../m-00001-of-00002.safetensors"}, shards[1]]},
        *(
            index | {"shards": [shards[0] | {"file": name}, shards[1]]}
            for name in ("", "..", ".safetensors", "a\0.safetensors", "m.safetensors.index.json", "m.npz")
        ),
        index | {"shape": [math.inf, 80]},
        index | {"shards": "none"},
    ]


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    plan_shards(matrix(), path, 2).write(force=False)
    index = json.loads(index_path(path).read_bytes())
    open_matrix(index_path(path))
    for damaged in damaged_indices(index):
        index_path(path).write_text(json.dumps(damaged))
        with pytest.raises(ConvtoolError) as caught:
            open_matrix(index_path(path))
        assert isinstance(caught.value, InputError), damaged
    index_path(path).write_bytes(b"{")
    with pytest.raises(InputError, match="is damaged: it is not JSON"):
        open_matrix(index_path(path))


# --- as a shell starts it


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    arguments = ["toeplitz", CHAINS, *WIDEN, "-o", str(out), "--shards"]
    assert run_app([*arguments, "999", "--dry-run"]) == 2  # more than there are rows
    assert capsys.readouterr().err.endswith("expected at most 720, the number of rows, got 999\n")
    assert run_app([*arguments, "3", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert files(tmp_path) == {}
    assert run_app([*arguments, "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    validate(document)
    assert (document["shards"], document["out"]) == (3, str(index_path(out)))
    assert document["files"] == {str(path): path.stat().st_size for path in tmp_path.iterdir()}
    assert document["bytes"] == sum(document["files"].values())
    assert planned.splitlines()[-5:] == [
        f"would write {index_path(out)} and 3 shards, {document['bytes']} bytes",
        *(f"  {path}, {size} bytes" for path, size in document["files"].items()),
    ]
    assert run_app(["verify", CHAINS, str(index_path(out))]) == 0
    assert run_app(["toeplitz", CHAINS, *WIDEN, "-o", str(out), "--shards", "3", "--rows", "0:5", "-f"]) == 2
    assert "into parts; it doesn't go with --rows or --columns" in capsys.readouterr().err


def launch(arguments: list[str], ranks: int) -> list[subprocess.Popen[str]]:
    """Processes with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


# Runs the command line, and is killed at the first chunk of rank 1's first shard.
KILLED = """
import os, signal, sys
from convtool.cli.app import run_app
from convtool.matrix import contents

if os.environ["RANK"] == "1":
    class Chunk(contents.Chunk):
        def __init__(self, tensor):
            os.kill(os.getpid(), signal.SIGKILL)
    contents.Chunk = Chunk
sys.exit(run_app(sys.argv[1:]))
"""


# Runs the command line, and is killed as soon as the processes have found each other.
MET = """
import os, signal, sys
import torch.distributed as dist
from convtool.cli.app import run_app

if os.environ["RANK"] == "1":
    meet = dist.init_process_group
    dist.init_process_group = lambda *args, **fields: (meet(*args, **fields), os.kill(os.getpid(), signal.SIGKILL))
sys.exit(run_app(sys.argv[1:]))
"""


def test_a_process_that_is_killed_once_all_have_met_is_not_waited_for(tmp_path: Path) -> None:
    line = ["toeplitz", CHAINS, *WIDEN, "--shards", "2", "-o", str(tmp_path / "m.safetensors")]
    launched = launch(["-c", MET, *line], 2)
    (_, error), _ = (process.communicate(timeout=120) for process in launched)
    assert [process.returncode for process in launched] == [5, -signal.SIGKILL], error
    assert "another process of this launch is gone" in error
    assert files(tmp_path) == {}


def test_two_processes_and_one_that_is_killed(tmp_path: Path) -> None:
    alone, together, killed = (tmp_path / name for name in ("alone", "together", "killed"))
    for folder in (alone, together, killed):
        folder.mkdir()
    assert run_app(["toeplitz", CHAINS, *WIDEN, "-q", "-o", str(alone / "m.safetensors"), "--shards", "2"]) == 0
    older = ["toeplitz", CHAINS, "widen", "--input-size", "16,5,6", "-q", "--shards", "3"]
    assert all(run_app([*older, "-o", str(folder / "m.safetensors")]) == 0 for folder in (together, killed))
    before = files(killed)
    line = ["toeplitz", CHAINS, *WIDEN, "--shards", "2", "--json", "--force", "-o"]
    sound = launch(["-m", "convtool", *line, str(together / "m.safetensors")], 2)
    broken = launch(["-c", KILLED, *line, str(killed / "m.safetensors")], 2)
    (out, error), (silent, _) = (process.communicate(timeout=120) for process in sound)
    assert [process.returncode for process in sound] == [0, 0], error
    assert json.loads(out)["ok"]
    assert silent == ""
    assert files(alone) == files(together)
    (_, error), _ = (process.communicate(timeout=120) for process in broken)
    assert [process.returncode for process in broken] == [5, -signal.SIGKILL], error
    assert "another process of this launch is gone" in error
    assert "; nothing was changed" in error
    assert {name: data for name, data in files(killed).items() if not name.startswith(".convtool-")} == before
