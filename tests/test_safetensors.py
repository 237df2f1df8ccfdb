"""The .safetensors format: what is read, what is written, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import (
    DTYPES,
    SAMPLE_NAMES,
    SAMPLES,
    any_bits,
    raw_safetensors,
    same_bits,
    save,
    small_network,
    write_edited,
)

from convtool import open_checkpoint
from convtool.checkpoint import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.errors import InputError, RefusedError, UsageError
from convtool.formats.safetensors import SafetensorsFile

F32 = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
JSON = json.dumps(F32).encode()
OTHER = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


def entry(**changes: object) -> dict[str, object]:
    return F32 | changes


# The safetensors project's own list of malformed files, and more of the kind: name, bytes, what the message says.
MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "is empty"),
    ("too small", b"\x02\0\0\0", "too short"),
    ("no header", struct.pack("<Q", 0) + b"a", "not a JSON object"),
    ("header longer than the file", raw_safetensors({"a": F32}, b"12345678", length=9999), "truncated"),
    ("header length of a gigabyte", raw_safetensors({"a": F32}, b"12345678", length=1 << 30), "declares a header"),
    ("header length that overflows", raw_safetensors({"a": F32}, b"12345678", length=2**64 - 1), "declares a header"),
    ("header that ends early", raw_safetensors({"a": F32}, b"12345678", length=20), "not JSON"),
    ("not UTF-8", raw_safetensors(b'{"\xff": 1}'), "not UTF-8"),
    ("not JSON", raw_safetensors(b'{"a": }'), "not JSON"),
    ("two documents", raw_safetensors(b"{}{}"), "not JSON"),
    ("a list", raw_safetensors(b"[1, 2]  "), "not a JSON object"),
    ("does not start with a brace", raw_safetensors(b'  {"a":1}'), "not a JSON object"),
    ("nested without end", raw_safetensors(b'{"a":' + b"[" * 100_000), "not JSON"),
    ("NaN", raw_safetensors(b'{"a": NaN}'), "not JSON"),
    ("number of 5000 digits", raw_safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    ("half a surrogate pair", raw_safetensors({"\ud800": F32}, b"12345678"), "malformed"),
    ("data cut short", raw_safetensors({"a": F32}, b"1234567"), "truncated"),
    ("trailing bytes", raw_safetensors({"a": F32}, b"123456789"), "1 bytes follow the last tensor"),
    ("data without a tensor", raw_safetensors({}, b"1"), "1 bytes follow"),
    ("overlap", raw_safetensors({"a": F32, "b": OTHER | {"data_offsets": [5, 8]}}, b"12345678"), "'b' overlaps"),
    ("the same bytes twice", raw_safetensors({"a": F32, "b": F32}, b"12345678"), "overlaps"),
    ("hole", raw_safetensors({"a": F32, "b": OTHER | {"data_offsets": [9, 12]}}, b"123456789012"), "'b' leaves a hole"),
    ("hole at the start", raw_safetensors({"a": entry(data_offsets=[4, 12])}, b"123456789012"), "hole"),
    ("past the end", raw_safetensors({"a": entry(data_offsets=[8, 16])}, b"12345678"), "hole"),
    ("offsets backwards", raw_safetensors({"a": entry(data_offsets=[8, 0])}, b"12345678"), "declared to take -8"),
    ("size that doesn't fit the shape", raw_safetensors({"a": entry(shape=[3])}, b"12345678"), "declared to take 8"),
    ("size of another dtype", raw_safetensors({"a": entry(dtype="F64")}, b"12345678"), "declared to take 8"),
    ("shape that overflows to fit", raw_safetensors({"a": entry(shape=[2**62, 2, 2])}, b"12345678"), "declared"),
    ("shape that overflows, and nothing", raw_safetensors({"a": entry(shape=[2**62, 4, 0], data_offsets=[0, 0])}), "d"),
    ("size beyond what torch counts", raw_safetensors({"a": entry(shape=[2**63])}), "malformed"),
    ("negative size", raw_safetensors({"a": entry(shape=[-2, -1])}, b"12345678"), "malformed"),
    ("size that is a float", raw_safetensors({"a": entry(shape=[2.0, 1])}, b"12345678"), "malformed"),
    ("size that is true", raw_safetensors({"a": entry(shape=[2, True])}, b"12345678"), "malformed"),
    ("shape that is a number", raw_safetensors({"a": entry(shape=2)}, b"12345678"), "malformed"),
    ("three offsets", raw_safetensors({"a": entry(data_offsets=[0, 4, 8])}, b"12345678"), "malformed"),
    ("offsets that are text", raw_safetensors({"a": entry(data_offsets="08")}, b"12345678"), "malformed"),
    ("dtype that is a number", raw_safetensors({"a": entry(dtype=4)}, b"12345678"), "malformed"),
    ("no dtype", raw_safetensors({"a": {"shape": [8], "data_offsets": [0, 8]}}, b"12345678"), "malformed"),
    ("no entry but a number", raw_safetensors({"a": 1}), "malformed"),
    ("no entry but null", raw_safetensors({"a": None}), "malformed"),
    (
        "duplicate key",
        raw_safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"12345678"),
        "'a' twice",
    ),
    ("duplicate key in an entry", raw_safetensors(b'{"a":{"dtype":"F32","dtype":"U8"}}'), "'dtype' twice"),
    ("duplicate __metadata__", raw_safetensors(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    ("metadata that is no table", raw_safetensors({"__metadata__": "x"}), "not a table of strings"),
    ("metadata that is an entry", raw_safetensors({"__metadata__": F32}), "not a table of strings"),
    ("metadata of numbers", raw_safetensors({"__metadata__": {"a": 1}}), "not a table of strings"),
    ("all zeros", bytes(4096), "zeros only"),
]


@pytest.mark.parametrize(("data", "message"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_a_malformed_file_is_refused_with_its_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_the_sample_models_read_as_the_package_reads_them(name: str) -> None:
    path = SAMPLES / f"{name}.safetensors"
    expected = safetensors.torch.load_file(path)
    opened = open_checkpoint(path)
    assert dict.fromkeys(opened.infos) == dict.fromkeys(json.loads(header_of(path)).keys() - {"__metadata__"})
    for tensor_name, tensor in expected.items():
        info = opened.infos[tensor_name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert same_bits(opened.tensor(tensor_name), tensor)


def header_of(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_and_writes_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "odd": any_bits(0, torch.uint8, 3),
        "a": any_bits(1, dtype, 3, 5),
        "b": any_bits(2, dtype),
        "c": any_bits(3, dtype, 0, 4),
    }
    save(state, tmp_path / "in.safetensors")
    opened = open_checkpoint(tmp_path / "in.safetensors")
    assert all(same_bits(opened.tensor(name), tensor) for name, tensor in state.items())
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_a_tensor_that_stands_crooked_is_read_all_the_same(tmp_path: Path) -> None:
    numbers = torch.tensor([1.5, -2.0])
    header = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "a": entry(data_offsets=[3, 11], shape=[2])}
    data = b"odd" + numbers.numpy().tobytes()
    (tmp_path / "crooked.safetensors").write_bytes(raw_safetensors(header, data))
    opened = open_checkpoint(tmp_path / "crooked.safetensors")
    assert torch.equal(opened.tensor("a"), numbers)
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    straight = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert torch.equal(straight["a"], numbers)
    assert bytes(straight["odd"].tolist()) == b"odd"
    assert list(json.loads(header_of(tmp_path / "out.safetensors"))) == ["odd", "a"]  # names keep their order


def test_a_dtype_that_torch_does_not_have_is_carried_over_and_named_where_it_is_asked_for(tmp_path: Path) -> None:
    header = {"packed": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    (tmp_path / "in.safetensors").write_bytes(raw_safetensors(header, b"abc"))
    opened = open_checkpoint(tmp_path / "in.safetensors")
    with pytest.raises(InputError, match="packed: dtype F6_E2M3 is not supported"):
        opened.tensor("packed")
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    assert (tmp_path / "out.safetensors").read_bytes().endswith(b"abc")


def test_the_order_of_names_and_of_bytes_are_both_kept(tmp_path: Path) -> None:
    header = {
        "z": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    (tmp_path / "in.safetensors").write_bytes(raw_safetensors(header, b"aaazz"))
    write_edited(
        open_checkpoint(tmp_path / "in.safetensors"), Edit.nothing(), tmp_path / "out.safetensors", None, force=False
    )
    written = header_of(tmp_path / "out.safetensors")
    assert list(json.loads(written)) == ["z", "a"]
    assert (tmp_path / "out.safetensors").read_bytes().endswith(b"aaazz")


def test_an_edit_keeps_the_other_tensors_bits_and_order_and_the_metadata(tmp_path: Path) -> None:
    state = small_network() | {"nan": any_bits(5, torch.float32, 7), "half": any_bits(6, torch.bfloat16, 3)}
    save(state, tmp_path / "in.safetensors", {"format": "pt", "author": "somebody", "é": "ü"})
    opened = open_checkpoint(tmp_path / "in.safetensors")
    names = list(opened.infos)
    new = {"stem.first.weight": torch.ones(5, 3, 2, 1), "stem.first.extra": torch.zeros(3)}
    edit = Edit.of(["stem.first.weight", "stem.second.weight"], new, "stem.first.weight")
    write_edited(opened, edit, tmp_path / "out.safetensors", None, force=False)
    back = safetensors.torch.load_file(tmp_path / "out.safetensors")
    place = names.index("stem.first.weight")
    expected = [*names[:place], *new, *names[place + 1 :]]
    expected.remove("stem.second.weight")
    header = json.loads(header_of(tmp_path / "out.safetensors"))
    assert [name for name in header if name != "__metadata__"] == expected
    assert header["__metadata__"] == {"format": "pt", "author": "somebody", "é": "ü"}
    for name in expected:
        assert same_bits(back[name], (state | new)[name]), name


def test_opening_reads_the_header_alone(tmp_path: Path) -> None:
    header = {"huge": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    path = tmp_path / "sparse.safetensors"
    text = json.dumps(header)
    path.write_bytes(raw_safetensors(text.ljust((len(text) + 7) // 8 * 8).encode()))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40))  # a terabyte that takes no room on the disk
    opened = open_checkpoint(path)
    assert opened.infos["huge"].nbytes == 1 << 40
    assert not any(next(opened.chunks("huge")))
    with pytest.raises(InputError, match=r"a part of it takes 1\.0 TiB of memory"):
        opened.tensor("huge")


def test_inspecting_imports_neither_torch_nor_numpy() -> None:
    for sample in ("chains.safetensors", "chains.pt"):
        code = (
            "import sys; from convtool.cli.app import run_app\n"
            f"code = run_app(['inspect', {str(SAMPLES / sample)!r}])\n"
            "sys.exit(99 if {'torch', 'numpy'} & set(sys.modules) else code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "conv" in done.stdout


def tied(path: Path) -> Path:
    """A file with tied tensors, as the package's save_model writes one."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    for module in model:
        assert isinstance(module, torch.nn.Linear)
        module.weight = model[0].weight  # type: ignore[assignment]
    safetensors.torch.save_model(model, str(path))
    return path


def aliases_of(opened: Checkpoint) -> dict[str, str]:
    (file,) = opened.files.values()
    assert isinstance(file, SafetensorsFile)
    return file.aliases


def test_tied_tensors_are_known_under_all_their_names_and_stay_tied(tmp_path: Path) -> None:
    path = tied(tmp_path / "tied.safetensors")
    opened = open_checkpoint(path)
    assert aliases_of(opened) == {"1.weight": "0.weight", "2.weight": "0.weight"}
    assert torch.equal(opened.tensor("2.weight"), opened.tensor("0.weight"))
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    back = open_checkpoint(tmp_path / "out.safetensors")
    assert aliases_of(back) == aliases_of(opened)
    assert list(safetensors.torch.load_file(tmp_path / "out.safetensors")) == list(safetensors.torch.load_file(path))


def test_the_other_names_of_a_tensor_keep_it_when_one_is_edited(tmp_path: Path) -> None:
    opened = open_checkpoint(tied(tmp_path / "tied.safetensors"))
    old = opened.tensor("0.weight").clone()
    edit = Edit.of(["0.weight"], {"0.weight": torch.full((3, 3), 5.0)}, "0.weight")
    write_edited(opened, edit, tmp_path / "out.safetensors", None, force=False)
    back = open_checkpoint(tmp_path / "out.safetensors")
    assert torch.equal(back.tensor("0.weight"), torch.full((3, 3), 5.0))
    assert torch.equal(back.tensor("1.weight"), old)
    assert torch.equal(back.tensor("2.weight"), old)
    assert aliases_of(back) == {"2.weight": "1.weight"}


def test_what_the_format_has_no_room_for_is_refused(tmp_path: Path) -> None:
    opened = open_checkpoint(save(small_network(), tmp_path / "in.safetensors"))
    edit = Edit.of(["head.weight"], {"head.weight": torch.zeros(2, dtype=torch.complex128)}, "head.weight")
    with pytest.raises(RefusedError, match=r"no complex128; write a .pt"):
        write_edited(opened, edit, tmp_path / "out.safetensors", None, force=False)
    edit = Edit.of(["head.weight"], {"__metadata__": torch.zeros(2)}, "head.weight")
    with pytest.raises(RefusedError, match="__metadata__"):
        write_edited(opened, edit, tmp_path / "out.safetensors", None, force=False)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}


def test_metadata_that_would_tie_a_name_to_a_new_tensor_are_refused_and_the_format_ties_none(tmp_path: Path) -> None:
    state = {"head.weight": torch.ones(2), "pt": torch.ones(3)}
    opened = open_checkpoint(save(state, tmp_path / "in.safetensors", {"format": "pt", "note": "head.bias"}))
    assert list(opened.infos) == ["head.weight", "pt"]
    edit = Edit.of(["head.weight"], {"head.bias": torch.zeros(2)}, "head.weight")
    with pytest.raises(RefusedError, match=r"head\.bias: the metadata give this name to 'note'"):
        write_edited(opened, edit, tmp_path / "out.safetensors", None, force=False)
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


@pytest.mark.parametrize("metadata", [{"a": "\ud800"}, {"\udfff": "a"}])
def test_half_a_character_in_the_metadata_is_damage(tmp_path: Path, metadata: dict[str, str]) -> None:
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "in.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="half a character"):
        open_checkpoint(tmp_path / "in.safetensors")


def test_root_is_for_nested_files() -> None:
    with pytest.raises(UsageError, match="a safetensors file is flat"):
        open_checkpoint(SAMPLES / "chains.safetensors", "model")


def test_names_of_any_kind_survive(tmp_path: Path) -> None:
    names = ["", ".", "..", "../../etc/passwd", "a\0b", "\x1b[31mred", "ünï.weight", "a" * 5000, "with space", '"\\/']
    state: dict[str, Any] = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    save(state, tmp_path / "in.safetensors")
    opened = open_checkpoint(tmp_path / "in.safetensors")
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    back = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert {name: tensor.tolist() for name, tensor in back.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


@pytest.mark.parametrize("name", ["convtool", "format"])
def test_a_tied_tensor_whose_name_the_metadata_need_is_refused(tmp_path: Path, name: str) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, name: shared}, tmp_path / "in.pt")
    opened = open_checkpoint(tmp_path / "in.pt")
    with pytest.raises(RefusedError, match=f"{name} shares the memory of a, and the metadata have another use"):
        write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
