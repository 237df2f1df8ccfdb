"""Checkpoints in several files: Hugging Face's folders and their indexes, of both kinds."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import SAMPLES, any_bits, files_in, same_bits, save, small_network, write_edited

from convtool import checkpoint, open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import Record
from convtool.checkpoint.write import check_output, plan_edited
from convtool.cli.app import run_app
from convtool.errors import ConvtoolError, InputError, OutputError, RefusedError, UsageError
from convtool.formats.indexes import is_plain_name
from convtool.formats.several import alone_in
from convtool.formats.tensor_file import TensorFile

KINDS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def sharded(folder: Path, kind: str = "safetensors", files: int = 3) -> Path:
    """A folder as transformers writes it: tensors dealt out to files in turn, an index, a configuration."""
    folder.mkdir()
    state = small_network() | {"bits": any_bits(3, torch.bfloat16, 3, 5)}
    stem = KINDS[kind].removesuffix(f".{kind}")
    homes = {name: f"{stem}-{n % files + 1:05}-of-{files:05}.{kind}" for n, name in enumerate(state)}
    for home in sorted(set(homes.values())):
        part = {name: state[name] for name in state if homes[name] == home}
        save(part, folder / home, {"format": "pt", "part": home})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values()), "note": "x"}, "weight_map": homes}
    (folder / f"{KINDS[kind]}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"kept": true}')
    return folder


def state_of(path: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(path)
    return {name: opened.tensor(name) for name in opened.infos}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(same_bits(one[name], other[name]) for name in one)


EDIT = Edit.of(
    ["stem.first.weight", "stem.first.bias", "stem.bn.bias"],
    {"stem.first.weight": torch.ones(4, 3, 2, 2)},
    "stem.first.weight",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_an_index_and_the_files_hold_the_same(tmp_path: Path, kind: str) -> None:
    folder = sharded(tmp_path / "in", kind)
    expected = small_network() | {"bits": any_bits(3, torch.bfloat16, 3, 5)}
    for path in (folder, folder / f"{KINDS[kind]}.index.json"):
        assert same_state(state_of(path), expected)
    opened = open_checkpoint(folder)
    assert opened.format == f"{'safetensors' if kind == 'safetensors' else 'torch'} in 3 files"
    assert opened.record is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_keeps_the_files_and_what_it_does_not_touch(tmp_path: Path, kind: str) -> None:
    folder = sharded(tmp_path / "in", kind)
    before = files_in(folder)
    write_edited(open_checkpoint(folder), EDIT, tmp_path / "out", Record("1.2.3"), force=False)
    assert files_in(folder) == before
    after = files_in(tmp_path / "out")
    assert set(after) == set(before) - {"config.json"}
    back = open_checkpoint(tmp_path / "out")
    assert back.index is not None
    assert back.record == Record("1.2.3")
    assert back.index["metadata"]["note"] == "x"
    assert back.index["metadata"]["total_size"] == sum(info.nbytes for info in back.infos.values())
    expected = {
        name: tensor for name, tensor in state_of(folder).items() if name not in EDIT.remove - {"stem.first.weight"}
    }
    expected["stem.first.weight"] = torch.ones(4, 3, 2, 2)
    assert same_state(state_of(tmp_path / "out"), expected)
    if kind == "safetensors":
        name = "model-00002-of-00003.safetensors"
        with safetensors.safe_open(tmp_path / "out" / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "part": name}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_an_edit_leaves_empty_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = sharded(tmp_path / "in", kind)
    homes = json.loads((folder / f"{KINDS[kind]}.index.json").read_text())["weight_map"]
    third = [name for name, home in homes.items() if "-00003-" in home]
    edit = Edit(frozenset(third), {})
    plan = plan_edited(open_checkpoint(folder), edit, folder, None, force=True)
    assert [path.name for path in plan.files][1:] == [
        f"{KINDS[kind].split('.')[0]}-0000{n}-of-00002.{kind}" for n in (1, 2)
    ]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and not (folder / "written").exists():
            index = json.loads(next(iter(plan.files)).read_text())
            if set(index["weight_map"]) == kept.keys():
                (folder / "written").touch()
                raise OSError(errno.EIO, os.strerror(errno.EIO))  # the index has its name already
        real(descriptor)

    kept = {name: tensor for name, tensor in state_of(folder).items() if name not in third}
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="could not be synced"):
        plan.write()
    assert same_state(state_of(folder), kept)
    assert set(files_in(folder)) == {path.name for path in plan.files} | {"config.json", "written"}


@pytest.mark.parametrize("kind", KINDS)
def test_writing_over_itself_leaves_new_files_the_index_and_everything_that_is_not_its_own(
    tmp_path: Path, kind: str
) -> None:
    folder = sharded(tmp_path / "in", kind)
    (folder / "model-other.safetensors").write_bytes(b"somebody else's")
    before = state_of(folder)
    names = set(files_in(folder))
    with pytest.raises(OutputError, match="exists already"):
        write_edited(open_checkpoint(folder), EDIT, folder, None, force=False)
    assert set(files_in(folder)) == names
    write_edited(open_checkpoint(folder), EDIT, folder, None, force=True)
    after = state_of(folder)
    assert all(same_bits(after[name], before[name]) for name in after if name != "stem.first.weight")
    left = set(files_in(folder))
    assert {"config.json", "model-other.safetensors", f"{KINDS[kind]}.index.json"} <= left
    assert len(left) == len(names)
    write_edited(open_checkpoint(folder), Edit.nothing(), folder, None, force=True)
    assert set(files_in(folder)) == names  # the first names are free again
    assert same_state(state_of(folder), after)


LAYOUTS = (
    "one.safetensors",
    "one.pt",
    "folder",
    "folder/model.safetensors.index.json",
    "folder/pytorch_model.bin.index.json",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_converts_to_every_other_and_back(tmp_path: Path, source: str, layout: str) -> None:
    state = small_network() | {"bits": any_bits(3, torch.bfloat16, 3, 5)}
    first = open_checkpoint(save(state, tmp_path / "first.safetensors"))
    expected = state_of(tmp_path / "first.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, path, opened in (("a", source, first), ("b", layout, None)):
        size = 200 if path.startswith("folder") else None
        opened = opened or open_checkpoint(tmp_path / "a" / source)
        check_output(tmp_path / folder / path, force=False, source=opened, shard_size=size)
        write_edited(opened, Edit.nothing(), tmp_path / folder / path, None, force=False, shard_size=size)
        assert same_state(state_of(tmp_path / folder / path), expected)
        if size:
            parts = [part for part in (tmp_path / folder / "folder").iterdir() if part.suffix != ".json"]
            assert len(parts) == 3  # the first weight alone is 288 bytes


def test_tied_tensors_stay_in_one_file(tmp_path: Path) -> None:
    shared = torch.arange(60.0)
    torch.save({"a": shared, "b": torch.ones(60), "c": shared}, tmp_path / "in.pt")
    write_edited(
        open_checkpoint(tmp_path / "in.pt"), Edit.nothing(), tmp_path / "out", None, force=False, shard_size=250
    )
    opened = open_checkpoint(tmp_path / "out")
    assert opened.index is not None
    homes = opened.index["weight_map"]
    assert homes["a"] == homes["c"] != homes["b"]
    assert opened.piece("a").memory == opened.piece("c").memory
    assert list(opened.infos) == ["a", "b", "c"]


CLIMBING = (
    *("../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", ".", "", "./x", "a//b", "a/./b"),
    *("C:\\x.safetensors", "C:x.safetensors", "\\\\host\\share\\x", "..\\outside.safetensors", "a\0b", "x/", "nul\\x"),
)


@pytest.mark.parametrize("name", CLIMBING)
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "in")
    save(small_network(), tmp_path / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="refused: it names the file"):
        open_checkpoint(folder)
    assert not is_plain_name(name)


def test_a_link_out_of_the_folder_is_refused_and_the_cache_of_huggingface_hub_is_read(tmp_path: Path) -> None:
    name = "model-00001-of-00003.safetensors"
    folder = sharded(tmp_path / "in")
    (folder / name).rename(tmp_path / "outside.safetensors")
    (folder / name).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(InputError, match="is a link out of its folder"):
        open_checkpoint(folder)
    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    folder = sharded(cache / "snapshots" / "abc")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert len(state_of(folder)) == 10


BAD_INDEXES: list[tuple[str, Any, str]] = [
    ("not JSON", "{", "not JSON"),
    ("not UTF-8", b"\xff", "not JSON"),
    ("a list", "[]", "not an index"),
    ("no weight map", {"metadata": {}}, "not an index"),
    ("weight map of numbers", {"weight_map": {"a": 1}}, "not an index"),
    ("empty", {"weight_map": {}}, "names no tensors"),
    ("metadata of another kind", {"weight_map": {"a": "b"}, "metadata": 3}, "metadata is not a table"),
    ("a key twice", '{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' twice"),
    ("a missing file", {"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors: no such file"),
    ("nested without end", "[" * 200_000, "not JSON"),
]


@pytest.mark.parametrize(("content", "message"), [row[1:] for row in BAD_INDEXES], ids=[row[0] for row in BAD_INDEXES])
def test_a_bad_index_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        open_checkpoint(path)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_and_files_that_disagree_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    moved = json.loads(json.dumps(index))
    moved["weight_map"]["head.weight"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(moved))
    with pytest.raises(InputError, match=r"'head\.weight' is not in model-00001"):
        open_checkpoint(folder)
    del index["weight_map"]["head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"holds 'head\.weight', which the index doesn't have"):
        open_checkpoint(folder)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    part = folder / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{part}: is truncated"):
        open_checkpoint(folder)


def test_a_folder_with_several_checkpoints_is_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder without a checkpoint"):
        open_checkpoint(tmp_path)
    save(small_network(), tmp_path / "mine.safetensors")
    assert list(open_checkpoint(tmp_path).infos)  # the only one
    save(small_network(), tmp_path / "epoch2.pt")
    with pytest.raises(UsageError, match=r"several checkpoints \(epoch2.pt, mine.safetensors\); give one"):
        open_checkpoint(tmp_path)
    save(small_network(), tmp_path / "model.safetensors")  # what transformers would load
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"
    save(small_network(), tmp_path / "pytorch_model.bin")  # the same model's weights, in the other format
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"
    save(small_network(), tmp_path / "adapter_model.bin")
    with pytest.raises(UsageError, match="several checkpoints"):
        open_checkpoint(tmp_path)


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in", "bin")
    part = folder / "pytorch_model-00003-of-00003.bin"
    data = bytearray(part.read_bytes())
    place = data.find(small_network()["stem.second.weight"].numpy().tobytes())
    data[place] ^= 1  # found only when it is copied, after the files before it
    part.write_bytes(data)
    before = files_in(folder)
    for out, force in ((tmp_path / "new", False), (folder, True)):
        with pytest.raises(InputError, match="checksum"):
            write_edited(open_checkpoint(folder), EDIT, out, None, force=force)
    assert not (tmp_path / "new").exists()
    assert files_in(folder) == before


def test_a_taken_name_in_another_file_is_found(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    edit = Edit.of(["stem.first.weight"], {"head.weight": torch.ones(2)}, "stem.first.weight")
    with pytest.raises(UsageError, match=r"'head\.weight' is taken"):
        write_edited(open_checkpoint(folder), edit, tmp_path / "out", None, force=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("missing/folder", OutputError, "doesn't exist"),
        ("file", OutputError, "is not a folder"),
        ("x.json.index.json", UsageError, "expected an index named"),
    ],
)
def test_folders_that_cannot_be_written_are_refused(
    tmp_path: Path, out: str, error: type[ConvtoolError], message: str
) -> None:
    opened = open_checkpoint(SAMPLES / "chains.safetensors")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(error, match=message):
        check_output(tmp_path / out, force=True, source=opened, shard_size=10**9)
    with pytest.raises(error, match=message):
        write_edited(opened, Edit.nothing(), tmp_path / out, None, force=True, shard_size=10**9)
    assert set(files_in(tmp_path)) == {"file"}


def test_entries_that_a_folder_has_no_room_for_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "in.pt")
    with pytest.raises(RefusedError, match=r"entries that aren't tensors.*\(step\)"):
        write_edited(
            open_checkpoint(tmp_path / "in.pt"), Edit.nothing(), tmp_path / "o", None, force=False, shard_size=9
        )
    assert not (tmp_path / "o").exists()


def test_a_folder_written_of_a_folder_says_what_it_leaves_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sharded(tmp_path / "in")
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".gitattributes").write_text("")
    (folder / "onnx").mkdir()
    assert run_app(["convert", str(folder), str(tmp_path / "out")]) == 0
    said = "left where they were: config.json, tokenizer.json; copy those that fit the new checkpoint too\n"
    assert said in capsys.readouterr().err
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}
    (tmp_path / "out" / "config.json").write_text("{}")
    assert run_app(["convert", str(folder), str(tmp_path / "out"), "--force"]) == 0
    assert "left where they were: tokenizer.json; copy" in capsys.readouterr().err
    for out in (folder, tmp_path / "one.safetensors"):  # nothing is missing there; a file has nothing beside it
        assert run_app(["convert", str(folder), str(out), "--force"]) == 0
        assert "left where" not in capsys.readouterr().err


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    for source in (save({}, tmp_path / "in.safetensors"), sharded(tmp_path / "in")):
        opened = open_checkpoint(source)
        with pytest.raises(RefusedError, match="no tensors for an index to name"):
            plan_edited(opened, Edit(frozenset(opened.infos), {}), tmp_path / "out", None, force=False, shard_size=9)


def test_a_file_among_others_leaves_nothing_behind_and_one_of_a_model_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(small_network(), tmp_path / "in.safetensors")
    (tmp_path / "notes.txt").write_text("about something else")
    options = ["--shard-size", "100", "--force"]
    assert run_app(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out"), *options]) == 0
    assert "left where" not in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert run_app(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out"), *options]) == 0
    assert "left where they were: config.json, notes.txt; copy" in capsys.readouterr().err


def test_a_folder_that_another_process_writes_to_is_left_to_it(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in")
    before = files_in(folder)
    plan = plan_edited(open_checkpoint(folder), EDIT, folder, None, force=True)
    with alone_in(folder), pytest.raises(OutputError, match="another process is writing to it"):
        plan.write()
    assert files_in(folder) == before
    write_edited(open_checkpoint(folder), Edit.nothing(), folder, None, force=True)
    before = files_in(folder)
    with pytest.raises(OutputError, match="another process has written to it meanwhile"):
        plan.write()  # under names that were free then
    assert files_in(folder) == before


@pytest.mark.parametrize("missing", [False, True])
def test_a_folder_that_is_replaced_while_it_is_opened_is_not_read_in_part(
    tmp_path: Path, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sharded(tmp_path / "in") / "model.safetensors.index.json"

    def open_then(path: Path, root: str | None) -> TensorFile:
        opened = real(path, root)
        (tmp_path / "new").write_bytes(index.read_bytes())
        (tmp_path / "new").replace(index)
        if missing:
            raise InputError(f"{path}: no such file")
        return opened

    real = checkpoint._open_file
    monkeypatch.setattr(checkpoint, "_open_file", open_then)
    with pytest.raises(InputError, match="was replaced while its files were opened; try again"):
        open_checkpoint(index)


def test_root_and_index_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the files of an index are flat"):
        open_checkpoint(sharded(tmp_path / "in"), "model")
