"""Files that mean harm, and files that came to harm: nothing runs or leaves its folder, and one line says so."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import clean
import pytest
import torch
from checkpoints import described, files_in, raw_safetensors, save, small_network, write_edited
from damage import INNER, SUFFIXES, damaged, good_file, good_part, read_all, verdict, write_damaged, write_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.cli.app import run_app
from convtool.errors import InputError
from convtool.formats import indexes, safetensors
from convtool.formats.pieces import Piece
from convtool.formats.stored_zip import archive_size, write_archive
from convtool.matrix.read import open_matrix


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A torch zip file with that pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def legacy(path: Path, pickled: bytes) -> Path:
    """A file of torch's older format with that pickle."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps([], 2))
    return path


def call(module: str, name: str, *arguments: object) -> bytes:
    """Opcodes that call a function of a module."""
    inner = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    return f"c{module}\n{name}\n(".encode() + inner + b"tR"


def inside(value: bytes) -> bytes:
    """A pickled dict {"w": value}."""
    return b"\x80\x02}X\x01\0\0\0w" + value + b"s."


# Everything here would run a command that leaves a mark, were it run.
COMMAND = "touch harmed"
CODE = "open('harmed', 'w')"
SYSTEM = call("os", "system", COMMAND)
HARM: dict[str, bytes] = {
    "os.system": inside(SYSTEM),
    "posix.system": inside(call("posix", "system", COMMAND)),
    "nt.system": inside(call("nt", "system", COMMAND)),
    "subprocess": inside(call("subprocess", "check_output", COMMAND)),
    "eval": inside(call("builtins", "eval", CODE)),
    "exec": inside(call("builtins", "exec", CODE)),
    "exec of Python 2": inside(call("__builtin__", "exec", CODE)),
    "compile": inside(call("builtins", "compile", CODE, "x", "exec")),
    "open": inside(call("builtins", "open", "harmed", "w")),
    "getattr": inside(call("builtins", "getattr", "x", "y")),
    "import": inside(call("builtins", "__import__", "os")),
    "importlib": inside(call("importlib", "import_module", "os")),
    "runpy": inside(call("runpy", "run_path", "x.py")),
    "pickle in pickle": inside(call("pickle", "loads", b"cos\nsystem\n(X\x0c\0\0\0" + COMMAND.encode() + b"tR.")),
    "torch.load": inside(call("torch.serialization", "load", "x.pt")),
    "torch.hub": inside(call("torch.hub", "load", "x/y", "z")),
    "torch.jit": inside(call("torch.jit._serialization", "load", "x.pt")),
    "functools.partial": inside(call("functools", "partial", 1)),
    "operator.attrgetter": inside(call("operator", "attrgetter", "system")),
    "a nested name": inside(b"\x8c\x08builtins\x8c\x0bobject.eval\x93(tR"),
    "by its parts": inside(b"\x8c\x02os\x8c\x06system\x93" + b"(X\x0c\0\0\0" + COMMAND.encode() + b"tR"),
    "from the memo": inside(b"cos\nsystem\nq\x00h\x00(X\x0c\0\0\0" + COMMAND.encode() + b"tR"),
    "named and not called": inside(b"cos\nsystem\n"),
    "thrown away": b"\x80\x02cos\nsystem\n0}.",
    "an instance": inside(b"(X\x0c\0\0\0" + COMMAND.encode() + b"ios\nsystem\n"),
    "an object": inside(b"(cos\nsystem\nX\x0c\0\0\0" + COMMAND.encode() + b"o"),
    "a new object": inside(b"csubprocess\nPopen\nX\x0c\0\0\0" + COMMAND.encode() + b"\x85\x81"),
    "a new object with names": inside(b"csubprocess\nPopen\n)}\x92"),
    "an extension": inside(b"\x82\x01"),
    "in a list in a tuple": inside(b"]" + SYSTEM + b"\x85a"),
    "as a key": b"\x80\x02}" + SYSTEM + b"K\x01s.",
    "as an attribute": inside(b"ccollections\nOrderedDict\n)R}X\x01\0\0\0a" + SYSTEM + b"sb"),
    "as a storage": inside(call("os", "system", COMMAND) + b"Q"),
    "in a parameter": inside(b"ctorch._utils\n_rebuild_parameter\n(" + SYSTEM + b"\x89ccollections\nOrderedDict\n)RtR"),
    "in a subclass": inside(b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nX\x01\0\0\0x)NtR"),
    "of numpy": inside(call("numpy", "load", "x.npy")),
    "of numpy's tests": inside(call("numpy.testing._private.utils", "runstring", CODE, {})),
    "of this program": inside(call("convtool.formats.atomic", "discard", "x")),
    "a module of torch": inside(b"ctorch.nn.modules.conv\nConv2d\n)\x81"),
}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("kind", HARM)
def test_pickles_with_code_are_read_as_data_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    if form == "zip":
        archive(path, HARM[kind])
    elif form == "legacy":
        legacy(path, HARM[kind])
    else:
        path.write_bytes(HARM[kind])
    code = run_app(["inspect", str(path)])
    out, err = capsys.readouterr()
    assert code == (0 if kind == "in a subclass" else 3), err  # there is no tensor in the others
    assert (out == "") == (code != 0)
    assert err.count("\n") == 1 or code == 0
    assert set(files_in(tmp_path)) == {"bad.pt"}


# What is of no form that pickle writes.
NOT_EVEN_READ = {"an extension", "a new object with names", "thrown away", "as a storage", "from the memo"}


@pytest.mark.parametrize("kind", [kind for kind in HARM if kind not in NOT_EVEN_READ])
def test_code_beside_a_state_dict_is_written_as_it_was(tmp_path: Path, kind: str) -> None:
    state = inside(tensor())
    pickled = b"\x80\x04}(X\x05\0\0\0model" + state[2:-1] + b"X\x05\0\0\0other" + HARM[kind][2:-1] + b"u."
    path, out = archive(tmp_path / "in.pt", pickled, FOUR), tmp_path / "out.pt"
    opened = open_checkpoint(path, "model")
    assert list(opened.infos) == ["w"]
    assert opened.classes
    write_edited(opened, Edit.nothing(), out, force=False)
    with zipfile.ZipFile(out) as archived:
        assert described(archived.read("archive/data.pkl")) == described(pickled)
    assert set(files_in(tmp_path)) == {"in.pt", "out.pt"}


def tensor(
    key: str = "0", count: int = 4, offset: int = 0, shape: Any = (4,), stride: Any = (1,), cls: str = "FloatStorage"
) -> bytes:
    """Opcodes of a tensor."""

    def opcodes(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = (
        b"(" + opcodes("storage") + f"ctorch\n{cls}\n".encode() + opcodes(key) + opcodes("cpu") + opcodes(count) + b"tQ"
    )
    rest = opcodes(offset) + opcodes(shape) + opcodes(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


FOUR = {"0": struct.pack("<4f", 1, 2, 3, 4)}
WRONG_TENSORS: dict[str, tuple[bytes, str]] = {
    "a storage that isn't there": (tensor(key="7"), "'7' of a tensor is not in the file"),
    "a key that climbs": (tensor(key="../data.pkl"), "is not in the file"),
    "a storage that is declared larger": (tensor(count=5), "has 16 bytes, and is declared to have 20"),
    "a storage that is declared smaller": (tensor(count=3, shape=(3,)), "has 16 bytes, and is declared to have 12"),
    "a count that overflows": (tensor(count=2**62 + 4), "declared to have"),
    "a count that is larger still": (tensor(count=2**64), "describes the storage '0' wrongly"),
    "a shape beyond the storage": (tensor(shape=(5,)), "reads beyond its storage"),
    "an offset beyond the storage": (tensor(offset=1), "reads beyond its storage"),
    "an offset that overflows": (tensor(offset=2**63 - 1, shape=(1,)), "reads beyond its storage"),
    "a negative offset": (tensor(offset=-1), "make no sense"),
    "a negative stride": (tensor(offset=3, stride=(-1,)), "make no sense"),
    "a negative size": (tensor(shape=(-4,)), "make no sense"),
    "strides beyond the storage": (tensor(shape=(2, 2), stride=(3, 1)), "reads beyond its storage"),
    "a stride too few": (tensor(shape=(2, 2)), "make no sense"),
    "a shape of floats": (tensor(shape=(4.0,)), "make no sense"),
    "a shape that is a number": (tensor(shape=4), "isn't a tuple"),
    "a terabyte of repetitions": (tensor(shape=(2**38, 1), stride=(0, 1)), "repeats the 16 bytes of its storage"),
    "more repetitions than can be counted": (tensor(shape=(2**62, 2**62), stride=(0, 0)), "repeats"),
    "a storage of another class": (tensor(cls="Tensor"), "storage of class torch.Tensor"),
    "a persistent id of another kind": (b"X\x01\0\0\0xQ", "isn't a storage"),
    "a rebuilt list": (b"ctorch._utils\n_rebuild_tensor_v2\n(]K\x00))\x89NtR", "isn't a storage"),
    "numbers of another dtype than their storage": (
        tensor().replace(b"tensor_v2", b"tensor_v3")[:-2] + b"ctorch\nint32\ntR",
        "reads a storage of float32 as int32",
    ),
    "too few arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_tensors_that_their_storage_does_not_hold_are_refused(tmp_path: Path, kind: str) -> None:
    opcodes, message = WRONG_TENSORS[kind]
    path = archive(tmp_path / "bad.pt", inside(opcodes), FOUR)
    with pytest.raises(InputError, match=re.escape(message)):
        open_checkpoint(path)


def test_a_good_tensor_of_the_same_make_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "good.pt", inside(tensor(shape=(2, 2), stride=(1, 2))), FOUR)
    assert open_checkpoint(path).tensor("w").tolist() == [[1, 3], [2, 4]]


WRONG_PICKLES: dict[str, bytes] = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "nothing": b"\x80\x02.",
    "two values": b"\x80\x02}}.",
    "bytes after the end": inside(b"K\x01") + b"x",
    "an unknown opcode": b"\x80\x02\xff.",
    "a stack that is empty": b"\x80\x02R.",
    "a mark too few": b"\x80\x02u.",
    "a memo that is empty": b"\x80\x02h\x05.",
    "a text that is cut short": b"\x80\x02X\xff\xff\xff\x7fabc",
    "a text of eight exabytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc",
    "bytes of eight exabytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc",
    "a number of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7fabc",
    "a number of negative length": b"\x80\x02\x8b\xff\xff\xff\xffabc.",
    "a number of 5000 digits": b"\x80\x02I" + b"9" * 5000 + b"\n.",
    "a text that is not UTF-8": b"\x80\x02X\x01\0\0\0\xff.",
    "a key that cannot be one": b"\x80\x02}]K\x01s.",
    "half a pair": b"\x80\x02}(K\x01u.",
    "a key twice": b"\x80\x02}(K\x01K\x02K\x01K\x03u.",
    "items into a number": b"\x80\x02K\x01K\x01K\x01s.",
    "a list into a dict": b"\x80\x02}K\x01a.",
    "attributes of a number": b"\x80\x02K\x01}b.",
    "a call of a dict": b"\x80\x02})R.",
    "a call with a list": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "an OrderedDict of numbers": b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.",
    "a class by numbers": b"\x80\x02K\x01K\x02\x93.",
}


@pytest.mark.parametrize("kind", WRONG_PICKLES)
def test_broken_pickles_are_damage(tmp_path: Path, kind: str) -> None:
    for path in (archive(tmp_path / "bad.pt", WRONG_PICKLES[kind]), legacy(tmp_path / "bad.bin", WRONG_PICKLES[kind])):
        if kind == "bytes after the end" and path.suffix == ".bin":
            continue  # the next pickle follows there
        with pytest.raises(InputError, match=r"damaged|not a torch file"):
            open_checkpoint(path)


def test_what_would_fill_the_memory_is_only_described(tmp_path: Path) -> None:
    """torch.load(weights_only=True) makes each of these."""
    for opcodes in (
        call("builtins", "bytearray", 10**15),
        call("torch", "Tensor", 10**15),
        call("torch", "FloatStorage", 10**15),
        call("builtins", "set", []),
        b"r\xff\xff\xff\xffK\x01",  # a place of the memo far out
    ):
        pickled = (
            b"\x80\x02}(X\x01\0\0\0w"
            + tensor()
            + b"X\x01\0\0\0x"
            + (opcodes if opcodes[:1] != b"r" else b"K\x01" + opcodes[:5])
            + b"u."
        )
        path = archive(tmp_path / "large.pt", pickled, FOUR)
        opened = open_checkpoint(path)
        assert list(opened.infos) == ["w"]
        write_edited(opened, Edit.nothing(), tmp_path / "out.pt", None, force=True)
        assert list(open_checkpoint(tmp_path / "out.pt").infos) == ["w"]


def test_lists_of_lists_of_lists_are_not_walked_and_too_deep_ones_refused(tmp_path: Path) -> None:
    laughs = b"]q\x00" + b"".join(
        b"](" + b"h" + bytes([n]) + (b"h" + bytes([n])) * 9 + b"eq" + bytes([n + 1]) for n in range(50)
    )
    pickled = b"\x80\x02}(X\x01\0\0\0w" + tensor() + b"X\x01\0\0\0x(" + laughs + b"lu."
    path = archive(tmp_path / "laughs.pt", pickled, FOUR)
    write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / "out.pt", None, force=False)
    assert (tmp_path / "out.pt").stat().st_size < 10_000
    deep = b"\x80\x02}(X\x01\0\0\0w" + tensor() + b"X\x01\0\0\0x" + b"]" * 100_000 + b"a" * 99_999 + b"u."
    opened = open_checkpoint(archive(tmp_path / "deep.pt", deep, FOUR))
    with pytest.raises(InputError, match="nested too deeply"):
        write_edited(opened, Edit.nothing(), tmp_path / "out.pt", None, force=True)


def test_a_dict_that_holds_itself_is_read_and_written(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": torch.ones(2), "list": []}
    value["self"] = value
    value["list"].append(value["list"])
    torch.save(value, tmp_path / "in.pt")
    write_edited(open_checkpoint(tmp_path / "in.pt"), Edit.nothing(), tmp_path / "out.pt", None, force=False)
    back = torch.load(tmp_path / "out.pt")
    assert back["list"][0] is back["list"]


# Archives


def rebuilt(path: Path, change: Callable[[list[tuple[str, bytes]]], object], **options: Any) -> None:
    """The archive with its members changed."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    change(members)
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in members:
            new.writestr(name, data)


def twice(members: list[tuple[str, bytes]]) -> None:
    members.append(members[4])


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "trailing bytes": (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "bytes follow the end|no readable",
    ),
    "a comment that is cut": (
        lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x09\0"),
        "no readable|follow",
    ),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is truncated or damaged"),
    "half of it": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "is truncated",
    ),
    "bytes before it": (
        lambda path: path.write_bytes(b"PK\x03\x04" + path.read_bytes()),
        "isn't where|disagree|damaged",
    ),
    "compressed": (
        lambda path: rebuilt(path, lambda members: None, compression=zipfile.ZIP_DEFLATED),
        "was compressed or encrypted by another program",
    ),
    "no pickle": (lambda path: rebuilt(path, lambda members: members.pop(0)), "has no data.pkl"),
    "two pickles": (lambda path: rebuilt(path, lambda m: m.append(("x/data.pkl", m[0][1]))), "has several data.pkl"),
    "another machine": (
        lambda path: rebuilt(path, lambda m: m.__setitem__(3, (m[3][0], b"big"))),
        "written on a big-endian machine",
    ),
    "TorchScript": (lambda path: rebuilt(path, lambda m: m.append(("in/constants.pkl", b""))), "is TorchScript"),
    "a storage missing": (lambda path: rebuilt(path, lambda m: m.pop(5)), "is not in the file"),
    "a storage cut": (
        lambda path: rebuilt(path, lambda m: m.__setitem__(5, (m[5][0], m[5][1][:-1]))),
        "is declared to have",
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_broken_archives_are_refused(tmp_path: Path, kind: str) -> None:
    path = save(small_network(), tmp_path / "in.pt")
    ARCHIVES[kind][0](path)
    with pytest.raises(InputError, match=ARCHIVES[kind][1]):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    path = save(small_network(), tmp_path / "in.pt")
    rebuilt(path, twice)
    with pytest.raises(InputError, match=r"has the member .* twice"):
        open_checkpoint(path)


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    data = good_file(form)
    path = tmp_path / f"cut{SUFFIXES[form]}"
    write_parts(tmp_path)
    for length in {*range(0, len(data), 7), *range(len(data) - 60, len(data))}:
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_checkpoint(path)


@pytest.mark.parametrize("form", SUFFIXES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=300)
def test_a_damaged_file_is_refused_or_is_what_it_says(form: str, seed: int) -> None:
    path = FUZZED / f"file{SUFFIXES[form]}"
    path.write_bytes(damaged(GOOD[form], Random(seed)))
    verdict(path, form)


@pytest.mark.parametrize("form", INNER)
def test_whatever_torch_saves_is_read(tmp_path: Path, form: str) -> None:
    assert read_all(write_damaged(form, good_part(form), tmp_path)) == "accepted"


@pytest.mark.parametrize("form", INNER)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_whatever_torch_saves_is_refused_or_read_once_a_part_is_damaged(form: str, seed: int) -> None:
    (FUZZED / form).mkdir(exist_ok=True)
    read_all(write_damaged(form, damaged(good_part(form), Random(seed)), FUZZED / form))


def test_what_means_to_take_for_ever_or_all_memory_is_refused(tmp_path: Path) -> None:
    """Modules that each hold the one before twice, a state that holds itself 2**60 times, JSON in JSON in JSON."""
    modules = b"ca\nB\n)\x81}(X\x0b\0\0\0_parameters}X\x01\0\0\0w" + tensor() + b"sX\x08\0\0\0_modules}ubq\x01"
    for number in range(2, 80):
        twice = b"".join(b"X\x01\0\0\0" + name + b"h" + bytes([number - 1]) for name in (b"x", b"y"))
        modules += b"ca\nB\n)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}(" + twice + b"uubq" + bytes([number])
    path = archive(tmp_path / "modules.pt", b"\x80\x02(" + modules + b"1h\x4f.", FOUR)
    with pytest.raises(InputError, match="modules in modules without an end"):
        open_checkpoint(path)
    itself = b")q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"0"
    state = b"\x80\x02" + itself + b"}(X\x01\0\0\0w" + tensor() + b"X\x01\0\0\0xca\nB\n)\x81h\x00bu."
    opened = open_checkpoint(archive(tmp_path / "state.pt", state, FOUR))
    assert opened.left_out == {"x": "an object of a.B"}
    write_edited(opened, Edit.nothing(), tmp_path / "out.pt", force=False)
    assert (tmp_path / "out.pt").stat().st_size < 4000
    nested = b")" + b"2\x86" * 60
    cls = b"ctorch._tensor\n_rebuild_from_type_v2\n(ca\nB\n" + nested + b")\x85NtR"
    assert open_checkpoint(archive(tmp_path / "class.pt", inside(cls))).unusable["w"].startswith("is of the tensor sub")
    layout = b"ctorch.serialization\n_get_layout\n" + nested + b"\x85R"
    sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n" + layout + b")\x86R"
    with pytest.raises(InputError, match="not made as torch makes one"):
        open_matrix(archive(tmp_path / "matrix.pt", b"\x80\x02}X\x06\0\0\0weight" + sparse + b"s."))
    deep = write_damaged("program", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", tmp_path)
    with pytest.raises(InputError, match="is not JSON"):
        open_checkpoint(deep)


def test_a_storage_of_no_tensor_is_looked_at_too(tmp_path: Path) -> None:
    saved = {"w": torch.ones(2), "s": torch.arange(5.0).untyped_storage()}
    torch.save(saved, tmp_path / "in.pt")
    with zipfile.ZipFile(tmp_path / "in.pt") as old:
        pickled, first = (old.read(f"in/{name}") for name in ("data.pkl", "data/0"))
    for rest in ({}, {"1": bytes(7)}):
        with pytest.raises(InputError, match="the storage '1' "):
            open_checkpoint(archive(tmp_path / "out.pt", pickled, {"0": first, **rest}))
    data = pickle.dumps(saved)
    (tmp_path / "cut.pt").write_bytes(data.replace(struct.pack("<5f", *range(5)), struct.pack("<4f", *range(4))))
    with pytest.raises(InputError, match="is damaged"):
        open_checkpoint(tmp_path / "cut.pt")


GOOD = {form: good_file(form) for form in SUFFIXES}
FUZZED = (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")) / f"convtool-fuzzed-{os.getpid()}"


@pytest.fixture(scope="module", autouse=True)
def _no_fuzzed_files() -> Any:
    FUZZED.mkdir()
    write_parts(FUZZED)
    yield
    shutil.rmtree(FUZZED)


def test_every_flipped_bit_of_a_storage_of_torch_is_found(tmp_path: Path) -> None:
    data = GOOD["zip"]
    numbers = small_network()["stem.first.weight"].numpy().tobytes()
    start = data.index(numbers)
    random = Random(0)
    for _ in range(60):
        place = start + random.randrange(len(numbers))
        path = tmp_path / "flipped.pt"
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"the checksum of the storage .* of stem\.first\.weight is"):
            open_checkpoint(path).tensor("stem.first.weight")


# What isn't a checkpoint at all

OTHER_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "a Git LFS pointer.*git lfs pull",
    ),
    "a web page": (b"<!DOCTYPE html>\n<html><title>404</title>", "a web page"),
    "a page in small letters": (b"<html><body>Not found</body></html>", "a web page"),
    "a message": (b"Entry not found", r"is text, not a checkpoint \(it begins 'Entry not found'\)"),
    "JSON": (b'{"error": "Repository not found"}', "is text, not a checkpoint"),
    "zeros": (bytes(10_000), "begins with zeros only"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    "gzip": (zlib.compress(b"x") and b"\x1f\x8b\x08" + bytes(100), "compressed by gzip"),
    "a tar archive": (b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(1000), "a tar archive.*torch before 0.2"),
    "noise": (Random(0).randbytes(5000), "neither|header|damaged"),
    "a zip of something else": (b"", "torch.save didn't write"),
    "a pickle of something else": (pickle.dumps({"a": 1}), "header|no state dict.*a dict of 1"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".xyz"])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, kind: str, suffix: str) -> None:
    data, message = OTHER_FILES[kind]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data)
    if kind == "a zip of something else":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_said() -> None:
    path = Path("/tmp") / f"convtool-unreadable-{os.getpid()}.pt"
    path.write_bytes(GOOD["zip"])
    path.chmod(0)
    try:
        assert (
            clean.called(clean.opened, path, user=65534)[1] == f"InputError {path}: cannot be read: Permission denied"
        )
    finally:
        path.unlink()


# Names


NAMES = ("\x1b[31mred\x1b[0m", "a\nb", "a\rb", "a\0b", "../../up", "\u202eevil", "a\tb", "\x07bell", "ünï", "\x9b31m")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_cannot_steer_a_terminal(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"{name}.weight": torch.ones(2, 3, 1) for name in NAMES}
    path = save(state, tmp_path / f"in{suffix}")
    for arguments in (
        ["inspect", path],
        ["inspect", path, "--tensors"],
        ["fuse", path, *NAMES[:2], "-o", tmp_path / "o.pt"],
    ):
        run_app([str(word) for word in arguments])
        out, err = capsys.readouterr()
        for line in (out + err).splitlines():
            assert line.isprintable(), line
    assert len(out + err) < 3000
    code = run_app(["inspect", str(path), "--json"])
    out, err = capsys.readouterr()
    assert code == 0
    assert {layer["name"] for layer in json.loads(out)["layers"]} == set(NAMES)
    damaged_header = {"\x1b[31m": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    (tmp_path / "bad.safetensors").write_bytes(raw_safetensors(damaged_header, b"1234"))
    assert run_app(["inspect", str(tmp_path / "bad.safetensors")]) == 3
    assert capsys.readouterr().err.rstrip("\n").isprintable()


# Sizes


def remembered(*values: bytes) -> bytes:
    """The opcodes that put values into a pickle's memo, from number 0 on."""
    return b"".join(value + b"q" + bytes([number]) + b"0" for number, value in enumerate(values))


LONG_TEXT = b"X" + (500_000).to_bytes(4, "little") + b"a" * 500_000
LATIN = b"X\x06\0\0\0latin1"
PAIRS = b"](" + b"".join(b"J" + number.to_bytes(4, "little") + b"N\x86" for number in range(50_000)) + b"e"
AGAIN = {  # what is remembered, and what is made of it 50,000 times
    "bytes": (remembered(LONG_TEXT, LATIN, b"c_codecs\nencode\n"), b"h\x02h\0h\1\x86R"),
    "byte arrays": (
        remembered(LONG_TEXT, LATIN, b"c_codecs\nencode\n", b"h\x02h\0h\1\x86R", b"cbuiltins\nbytearray\n"),
        b"h\4h\3\x85R",
    ),
    "dicts": (remembered(PAIRS, b"ccollections\nOrderedDict\n"), b"h\1h\0\x85R"),
    "tensors": (
        remembered(b"B" + (500_000).to_bytes(4, "little") + bytes(500_000), b"ctorch.storage\n_load_from_bytes\n"),
        b"h\1h\0\x85R",
    ),
}


@pytest.mark.parametrize("kind", AGAIN)
def test_what_is_made_again_and_again_of_a_few_bytes_is_refused(tmp_path: Path, kind: str) -> None:
    first, again = AGAIN[kind]
    path = tmp_path / "a.pt"
    path.write_bytes(b"\x80\x03" + first + b"(" + again * 50_000 + b"t.")
    grown, found = clean.called(clean.opened, path)
    assert "again and again" in found
    assert grown < 100 * path.stat().st_size


def test_headers_of_many_tensors_take_memory_in_proportion(tmp_path: Path) -> None:
    entry = b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % number for number in range(100_000)) + b"}"
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw_safetensors(header))
    grown, found = clean.called(clean.opened, path)
    assert found == 100_000
    assert grown < 20 * len(header)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":' + b"[" * 20_000_000, "not JSON"),
        (b'{"a":[' + b"0," * 10_000_000 + b"0]}", "malformed"),
        (b'{"__metadata__":{"a":"' + b"x" * 20_000_000 + b'"}}', 0),
        (b" " * 20_000_000, "not a JSON object"),
        (b'{"a":' * 4_000_000, "not JSON"),
        (b'{"a":' + b"9" * 20_000_000 + b"}", "not JSON"),
        (b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[0' + b",1" * 5_000_000 + b"]}}", "malformed"),
    ],
    ids=["nested", "numbers", "metadata", "blanks", "nested objects", "digits", "axes"],
)
def test_large_headers_take_memory_in_proportion(tmp_path: Path, text: bytes, message: Any) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(raw_safetensors(text))
    grown, found = clean.called(clean.opened, path)
    assert found == message or message in found
    assert grown < 12 * len(text)


@pytest.mark.parametrize("length", [99, 100, 101])
def test_a_header_may_be_as_long_as_the_format_says_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(safetensors, "MAX_HEADER", 100)
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors(text.ljust(length), b"x"))
    if length <= 100:
        assert list(open_checkpoint(path).infos) == ["a"]
        return
    with pytest.raises(InputError, match="declares a header of 101 bytes, more than the format's 100"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 20_000_000, "not JSON$"),
        (b'{"weight_map":{"a":' + b"9" * 20_000_000 + b"}}", "not JSON$"),
        (b'{"weight_map":{"a":"b","' + b"x" * 20_000_000 + b'":"a","a":"c"}}', "the key 'a' twice$"),
    ],
    ids=["nested", "digits", "twice"],
)
def test_large_indexes_take_memory_in_proportion(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    grown, found = clean.called(clean.opened, path)
    assert re.search(message, found)
    assert grown < 6 * len(text)


def test_an_index_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "MAX_INDEX", 20)
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b" " * 21)
    with pytest.raises(InputError, match="larger than any index"):
        open_checkpoint(path)


def test_tensors_of_more_axes_than_anything_has_are_damage(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", inside(tensor(shape=(4,) + (1,) * 64, stride=(1,) * 65)), FOUR)
    with pytest.raises(InputError, match="a tensor of 65 axes"):
        open_checkpoint(path)
    path = archive(tmp_path / "b.pt", inside(tensor(shape=(4,) + (1,) * 63, stride=(1,) * 64)), FOUR)
    assert open_checkpoint(path).tensor("w").dim() == 64


def test_an_archive_of_more_members_than_a_short_count_holds_is_written_and_read(tmp_path: Path) -> None:
    members = [Piece.of(f"m{number}", b"") for number in range(1 << 16)]
    path = tmp_path / "many.zip"
    with path.open("wb") as file:
        write_archive(file, members)
    assert path.stat().st_size == archive_size(members)
    with zipfile.ZipFile(path) as read:
        assert read.namelist() == [member.name for member in members]


# Options

ABSURD = ("1e308", "-1", "0", "9" * 30, "nan", "inf", "1e-400", "", " ", "½", "0x10", "1,", ",", "1:2:3", "\0")


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize(
    "option",
    [
        "--set=stem.first.stride=",
        "--set=stem.first.padding=",
        "--set=stem.bn.eps=",
        "--input-size=",
        "--dtype=",
        "--set=",
        "--root=",
    ],
)
def test_absurd_values_are_one_line_and_nothing_is_written(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(small_network(), tmp_path / "in.pt")
    words = [
        "fuse",
        str(path),
        "stem.first",
        "stem.second",
        "stem.bn",
        "-o",
        str(tmp_path / "out.pt"),
        option + value,
        "-q",
    ]
    code = run_app(words)
    err = capsys.readouterr().err
    if code == 0:  # 0 as a padding or an eps is no mistake
        assert value in ("0", "1e-400", "1,", " ") or "eps" in option, (option, value)
        return
    assert code in (2, 3, 4), (code, err)
    assert err.count("\n") == 1, err
    assert set(files_in(tmp_path)) == {"in.pt"}
