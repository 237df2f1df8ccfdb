"""torch's own files: read as torch reads them, written so that torch reads the same again, and nothing run."""

from __future__ import annotations

import argparse
import collections
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    DTYPES,
    SAMPLE_NAMES,
    SAMPLES,
    any_bits,
    bits_of,
    bytes_of,
    files_in,
    raw_safetensors,
    same_bits,
    save,
    small_network,
    with_metadata,
    write_edited,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.errors import InputError, RefusedError, UsageError
from convtool.formats.pieces import Piece
from convtool.formats.stored_zip import write_archive

FORMATS = ("zip", "legacy")


def saved(value: Any, path: Path, form: str = "zip", **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip", **options)
    return path


@pytest.mark.parametrize("length", [1, 30, 64, 200])
def test_every_member_begins_where_it_can_be_mapped(tmp_path: Path, length: int) -> None:
    """At a multiple of 64 bytes, as torch writes it itself, whatever its name and those before it."""
    members = [Piece.of("x" * (length + n), bytes(3 * n + 1)) for n in range(70)]
    with (tmp_path / "a.zip").open("wb") as file:
        write_archive(file, members)
    data = (tmp_path / "a.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        starts = [info.header_offset for info in archive.infolist()]
    assert all((start + 30 + sum(struct.unpack_from("<2H", data, start + 26))) % 64 == 0 for start in starts)


def loaded(path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, **options)


def rewritten(path: Path, edit: Edit | None = None, root: str | None = None) -> Any:
    """What torch reads from the file that convtool writes of `path`."""
    out = path.with_name(f"rewritten-{path.name}")
    write_edited(open_checkpoint(path, root), edit or Edit.nothing(), out, None, force=False)
    loaded(out, mmap=True)
    return loaded(out)


def assert_same(one: Any, other: Any) -> None:
    """Equal in type, order, bits and attributes."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert same_bits(one.detach(), other.detach())
        assert (one.stride(), one.storage_offset(), one.requires_grad) == (
            other.stride(),
            other.storage_offset(),
            other.requires_grad,
        )
        assert len(one.untyped_storage()) == len(other.untyped_storage())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
        assert vars(one) == vars(other) if hasattr(one, "__dict__") else True
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, float):
        assert repr(one) == repr(other)
    else:
        assert one == other


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_the_sample_models_read_as_torch_reads_them(name: str) -> None:
    path = SAMPLES / f"{name}.pt"
    expected = loaded(path)
    opened = open_checkpoint(path)
    assert list(opened.infos) == list(expected)
    for tensor_name, tensor in expected.items():
        info = opened.infos[tensor_name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert same_bits(opened.tensor(tensor_name), tensor)


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_the_sample_models_are_written_again_as_they_were(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.pt"
    path.write_bytes((SAMPLES / f"{name}.pt").read_bytes())
    assert_same(rewritten(path), loaded(path))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128], ids=str)
def test_every_dtype_reads_and_writes_to_the_bit(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    if (form == "legacy" and dtype in (torch.uint16, torch.uint32, torch.uint64)) or "float8" in str(dtype):
        form = "zip"  # torch's older format has no storages of these
    state = {"a": any_bits(1, dtype, 3, 5), "b": any_bits(2, dtype), "c": any_bits(3, dtype, 0, 4)}
    path = saved(state, tmp_path / "in.pt", form)
    opened = open_checkpoint(path)
    assert all(same_bits(opened.tensor(name), tensor) for name, tensor in state.items())
    assert all(bytes_of(opened, name) == bits_of(opened, name) for name in state)
    assert_same(rewritten(path), loaded(path))


def views() -> dict[str, Tensor]:
    """Tensors that are not simply all of their memory, row after row."""
    large = torch.arange(240.0).reshape(4, 5, 4, 3)
    complex_numbers = any_bits(1, torch.float32, 2, 3, 2)
    complex_numbers[complex_numbers.isnan()] = 1
    return {
        "slice": large[1:3, 2],
        "steps": large[::2, ::3],
        "transposed": large.transpose(0, 3),
        "one element": large[1, 2, 3, 1],
        "channels last": torch.arange(72.0).reshape(2, 3, 4, 3).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "expanded from one": torch.tensor(2.5).expand(2, 3),
        "overlapping windows": torch.arange(7.0).unfold(0, 3, 1),
        "nothing": large[:0],
        "conjugate": torch.view_as_complex(complex_numbers).conj(),
        "negative": torch.view_as_complex(complex_numbers).conj().imag,
        "whole": large,
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", views())
def test_views_read_as_torch_reads_them_and_stay_views(tmp_path: Path, name: str, form: str) -> None:
    tensor = views()[name]
    path = saved({"other": torch.ones(2), name: tensor}, tmp_path / "in.pt", form)
    opened = open_checkpoint(path)
    plain = tensor.resolve_conj().resolve_neg()
    assert same_bits(opened.tensor(name).resolve_conj().resolve_neg(), plain)
    assert bytes_of(opened, name) == plain.contiguous().numpy().tobytes()
    again = rewritten(path)
    assert_same(again[name].resolve_conj().resolve_neg(), loaded(path)[name].resolve_conj().resolve_neg())
    assert again[name].is_conj() == tensor.is_conj()


@pytest.mark.parametrize("form", FORMATS)
def test_views_become_plain_tensors_of_the_right_numbers_in_safetensors(tmp_path: Path, form: str) -> None:
    for name, tensor in views().items():
        path = saved({name: tensor}, tmp_path / "in.pt", form)
        write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / "out.safetensors", None, force=True)
        assert same_bits(
            open_checkpoint(tmp_path / "out.safetensors").tensor(name), tensor.resolve_conj().resolve_neg()
        )


@pytest.mark.parametrize("form", FORMATS)
def test_shared_memory_stays_shared(tmp_path: Path, form: str) -> None:
    shared, large = torch.arange(6.0).reshape(2, 3), torch.arange(20.0)
    state = {"a": shared, "b": shared, "c": shared.T, "left": large[:10], "right": large[10:], "overlap": large[5:15]}
    path = saved(state, tmp_path / "in.pt", form)
    opened = open_checkpoint(path)
    assert opened.piece("a").memory == opened.piece("b").memory != opened.piece("c").memory
    back = rewritten(path)
    back["a"][0, 1] = 99
    back["overlap"][0] = 88
    assert back["b"][0, 1] == back["c"][1, 0] == 99
    assert back["left"][5] == 88
    assert_same({name: loaded(path)[name] for name in state}, loaded(path))


@pytest.mark.parametrize("form", FORMATS)
def test_tied_tensors_are_tied_in_safetensors_and_torch_files_made_of_each_other(tmp_path: Path, form: str) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    path = saved({"a": shared, "z": torch.ones(3), "b": shared}, tmp_path / "in.pt", form)
    write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / "middle.safetensors", None, force=False)
    assert (tmp_path / "middle.safetensors").read_bytes().count(shared.numpy().tobytes()) == 1
    opened = open_checkpoint(tmp_path / "middle.safetensors")
    write_edited(opened, Edit.nothing(), tmp_path / "out.pt", None, force=False)
    back = loaded(tmp_path / "out.pt")
    assert back["a"].data_ptr() == back["b"].data_ptr()
    assert all(torch.equal(back[name], loaded(path)[name]) for name in ("a", "b", "z"))


def test_memory_shared_in_part_is_refused_in_safetensors(tmp_path: Path) -> None:
    large = torch.arange(20.0)
    path = saved({"left": large[:12], "right": large[10:]}, tmp_path / "in.pt")
    with pytest.raises(RefusedError, match="left and right share a part of their memory"):
        write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    path = saved({"left": large[:10], "right": large[10:]}, tmp_path / "in.pt")  # beside each other: no harm
    write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    assert torch.equal(open_checkpoint(tmp_path / "out.safetensors").tensor("right"), large[10:])


ENTRIES: dict[str, Any] = {
    "epoch": 3,
    "big": 2**70,
    "negative": -5,
    "large": 2**31,
    "rate": 1e308,
    "nan": float("nan"),
    "name": "ünï\n\0",
    "bytes": b"\0\xff",
    "nothing": None,
    "yes": True,
    "tuple": (1, (2, ()), "x"),
    "list": [1, [2.5, []], {"a": (3,)}],
    "set": {1, 2},
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "complex": 1 + 2j,
    "counter": collections.Counter("abca"),
    "bytearray": bytearray(b"xyz"),
    "long": list(range(300)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_entries_that_are_no_tensors_are_kept(tmp_path: Path, form: str, protocol: int) -> None:
    value = {"state_dict": with_metadata(small_network()), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}
    value |= ENTRIES
    path = saved(value, tmp_path / "in.ckpt", form, pickle_protocol=protocol)
    opened = open_checkpoint(path)
    assert opened.root == ("state_dict",)
    again = rewritten(path)
    expected = torch.load(path, weights_only=False)
    assert_same(again, expected)
    assert_same(again["state_dict"]._metadata, expected["state_dict"]._metadata)


def test_objects_that_only_hold_data_are_kept_unopened(tmp_path: Path) -> None:
    value = {
        "model": small_network(),
        "args": argparse.Namespace(rate=0.1, layers=[1, 2]),
        "accuracy": np.float64(0.75),
        "history": np.arange(4.0),
        "best": collections.defaultdict(list, a=[1]),
    }
    path = saved(value, tmp_path / "in.pt")
    out = tmp_path / "out.pt"
    write_edited(open_checkpoint(path), Edit.nothing(), out, None, force=False)
    back = torch.load(out, weights_only=False)
    assert back["args"] == value["args"]
    assert back["accuracy"] == 0.75
    assert type(back["accuracy"]) is np.float64
    assert back["history"].tolist() == [0, 1, 2, 3]
    assert back["best"] == value["best"]
    assert back["best"].default_factory is list


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    state = {
        "weight": weight,
        "again": weight,
        "bias": nn.Parameter(torch.ones(2)),
        "grad": torch.ones(2, requires_grad=True),
    }
    path = saved(state, tmp_path / "in.pt")
    opened = open_checkpoint(path)
    assert list(opened.infos) == list(state)
    assert not opened.tensor("bias").requires_grad
    back = rewritten(path)
    assert_same(back, loaded(path))
    assert back["weight"] is back["again"]


@pytest.mark.parametrize("form", FORMATS)
def test_an_edit_takes_its_place_and_leaves_the_rest(tmp_path: Path, form: str) -> None:
    state = with_metadata(small_network())
    state["extra"] = {"not": "a tensor"}
    path = saved({"epoch": 1, "model": state, "other": [1]}, tmp_path / "in.pt", form)
    new = {"stem.first.weight": torch.full((5, 3, 2, 1), 2.0), "stem.first.new": any_bits(1, torch.bfloat16, 3)}
    edit = Edit.of(["stem.first.weight", "stem.second.weight"], new, "stem.first.weight")
    back = rewritten(path, edit)
    expected = loaded(path)
    names = [name for name in state if name != "stem.second.weight"]
    names.insert(1, "stem.first.new")
    assert list(back) == ["epoch", "model", "other"]
    assert list(back["model"]) == names
    assert back["model"]._metadata == expected["model"]._metadata
    for name in names:
        wanted = new.get(name, expected["model"].get(name))
        assert_same(back["model"][name], wanted)


def test_the_old_memory_of_a_tied_tensor_stays_with_the_other_name(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    path = saved({"a": shared, "b": shared}, tmp_path / "in.pt")
    back = rewritten(path, Edit.of(["a"], {"a": torch.zeros(2, 3)}, "a"))
    assert torch.equal(back["a"], torch.zeros(2, 3))
    assert torch.equal(back["b"], shared)


# Nested dicts: what is in them, which one is meant, or None where only --root can tell.
NESTED: list[tuple[str, Callable[[dict[str, Tensor]], Any], str | None]] = [
    ("flat", lambda s: s, "."),
    ("one level", lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
    ("two levels", lambda s: {"a": {"b": s}}, "a.b"),
    ("a dot in a key", lambda s: {"a.b": s}, "a.b"),
    ("an accuracy beside it", lambda s: {"state_dict": s, "best_acc1": torch.tensor(76.1)}, "state_dict"),
    (
        "an optimizer beside it",
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        "model",
    ),
    (
        "callbacks beside it",
        lambda s: {"state_dict": s, "callbacks": {"best": {"score": torch.tensor(1.0)}}},
        "state_dict",
    ),
    ("the same dict twice", lambda s: {"model": s, "also": s}, "model"),
    ("an average beside it", lambda s: {"model": s, "ema": dict(s)}, None),
    ("an average inside it", lambda s: s | {"ema": dict(s)}, None),
    ("a generator and a critic", lambda s: {"nets": {"g": dict(s), "d": dict(s)}}, None),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("make", "root"), [row[1:] for row in NESTED], ids=[row[0] for row in NESTED])
def test_the_state_dict_is_found_and_never_guessed(tmp_path: Path, make: Any, root: str | None, form: str) -> None:
    path = saved(make(small_network()), tmp_path / "in.pt", form)
    if root is None:
        with pytest.raises(UsageError, match=r"several state dicts \(.*\); choose one with root="):
            open_checkpoint(path)
        return
    opened = open_checkpoint(path)
    assert (".".join(opened.root) or ".") == root
    assert list(open_checkpoint(path, root).infos) == list(opened.infos) == list(small_network())


def test_root_chooses_and_the_other_stays_as_it_is(tmp_path: Path) -> None:
    path = saved({"model": small_network(0), "ema": small_network(50)}, tmp_path / "in.pt")
    for root, seed in (("model", 0), ("ema", 50)):
        assert torch.equal(open_checkpoint(path, root).tensor("head.weight"), small_network(seed)["head.weight"])
    out = tmp_path / "out.pt"
    edit = Edit.of(["head.weight"], {"head.weight": torch.zeros(2, 5)}, "head.weight")
    write_edited(open_checkpoint(path, "ema"), edit, out, None, force=False)
    back = loaded(out)
    assert_same(back["model"], loaded(path)["model"])
    assert torch.equal(back["ema"]["head.weight"], torch.zeros(2, 5))
    for wrong in ("emma", "", "model.head", "ema.", "optimizer"):
        with pytest.raises(UsageError, match=r"no such state dict; state dicts found: model, ema"):
            open_checkpoint(path, wrong)


NO_STATE: list[tuple[Any, str]] = [
    (torch.ones(2), "a single tensor; save it in a dict"),
    ([torch.ones(2)], "a list"),
    ({"epoch": 3}, "a dict of 1 entries without one"),
    ({}, "a dict of 0 entries"),
    ({0: torch.ones(2)}, "a dict of 1 entries"),
    (3, "a value of type int"),
]


@pytest.mark.parametrize(("value", "message"), NO_STATE)
def test_what_is_no_state_dict_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"holds no state dict .*, but {message}"):
        open_checkpoint(saved(value, tmp_path / "in.pt"))


def test_a_state_dict_of_counters_alone_is_one(tmp_path: Path) -> None:
    path = saved({"steps": torch.tensor(3)}, tmp_path / "in.pt")
    assert open_checkpoint(path).infos["steps"].shape == ()


def test_a_nested_state_dict_that_keeps_counters_alone_opens_again(tmp_path: Path) -> None:
    path = saved({"model": {"bn.weight": torch.ones(3), "bn.steps": torch.tensor(3)}, "epoch": 2}, tmp_path / "in.pt")
    write_edited(open_checkpoint(path), Edit(frozenset(["bn.weight"]), {}), tmp_path / "out.pt", None, force=False)
    for root in (None, "model"):
        assert list(open_checkpoint(tmp_path / "out.pt", root).infos) == ["bn.steps"]
    path = saved({"model": {"steps": torch.tensor(3)}, "ema": {"w": torch.ones(2)}}, tmp_path / "both.pt")
    assert list(open_checkpoint(path).infos) == ["w"]
    assert list(open_checkpoint(path, "model").infos) == ["steps"]  # where it is asked for
    path = saved({"a": {"steps": torch.tensor(3)}, "b": {"steps": torch.tensor(4)}}, tmp_path / "two.pt")
    with pytest.raises(UsageError, match=r"several state dicts \(a, b\)"):
        open_checkpoint(path)


def test_a_storage_of_any_key_keeps_its_numbers_beside_new_tensors(tmp_path: Path) -> None:
    path = save({"a": torch.ones(3), "b": torch.full((3,), 2.0)}, tmp_path / "in.pt")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "keyed.pt", "w") as keyed:
        for member in archive.namelist():
            data = archive.read(member).replace(b"X\1\0\0\x001q", b"X\5\0\0\0new/0q")
            keyed.writestr(member.replace("data/1", "data/new/0"), data)
    edit = Edit.of(["a"], {"a": torch.full((3,), 5.0)}, "a")
    back = rewritten(tmp_path / "keyed.pt", edit)
    assert {name: tensor.tolist() for name, tensor in back.items()} == {"a": [5.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize("code", ["F6", "QQ"])
def test_a_dtype_that_torch_lacks_is_refused_in_a_torch_file(tmp_path: Path, code: str) -> None:
    entry = {"dtype": code, "shape": [2, 8], "data_offsets": [0, 8]}
    (tmp_path / "in.safetensors").write_bytes(raw_safetensors({"w": entry}, b"12345678"))
    with pytest.raises(RefusedError, match=f"w: torch has no dtype {code}; write a .safetensors file"):
        write_edited(open_checkpoint(tmp_path / "in.safetensors"), Edit.nothing(), tmp_path / "o.pt", None, force=False)
    assert files_in(tmp_path).keys() == {"in.safetensors"}


def test_numbers_of_four_bits_are_pairs_in_torch_and_numbers_in_safetensors(tmp_path: Path) -> None:
    pairs = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    save_file({"w": pairs}, tmp_path / "in.safetensors")  # the package can write them, and not read them
    opened = open_checkpoint(tmp_path / "in.safetensors")
    assert (opened.infos["w"].shape, opened.infos["w"].dtype) == ((2, 4), "float4_e2m1fn_x2")
    write_edited(opened, Edit.nothing(), tmp_path / "o.pt", force=False)
    assert same_bits(torch.load(tmp_path / "o.pt", weights_only=True)["w"], pairs)
    torch.save({"w": pairs, "turned": pairs.clone().T}, tmp_path / "in.pt")
    write_edited(open_checkpoint(tmp_path / "in.pt"), Edit.nothing(), tmp_path / "o.safetensors", force=False)
    again = open_checkpoint(tmp_path / "o.safetensors")
    assert same_bits(again.tensor("w"), pairs)
    assert same_bits(again.tensor("turned").view(torch.uint8), pairs.view(torch.uint8).T)
    assert (tmp_path / "o.safetensors").read_bytes().count(b'"shape":[2,8]') == 1
    bad = {"dtype": "F4", "shape": [3, 3], "data_offsets": [0, 5]}
    (tmp_path / "bad.safetensors").write_bytes(raw_safetensors({"w": bad}, b"12345"))
    with pytest.raises(InputError, match="odd number of numbers in a row"):
        open_checkpoint(tmp_path / "bad.safetensors")


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def sparse_csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


UNUSABLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "quantized": (quantized, r"layer\.weight is quantized; save it dequantized"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"layer\.weight is sparse; save it dense"),
    "sparse csr": (sparse_csr, r"layer\.weight is sparse"),
    "meta": (lambda: torch.empty(2, 3, device="meta"), r"layer\.weight is on the meta device"),
    "sparse parameter": (lambda: nn.Parameter(torch.eye(3).to_sparse()), r"layer\.weight is sparse"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_without_plain_numbers_are_named_when_asked_for_and_carried_over(tmp_path: Path, kind: str) -> None:
    make, message = UNUSABLE[kind]
    value = make()
    path = saved({"layer.weight": value, "layer.bias": torch.ones(3), "other": torch.ones(2)}, tmp_path / "in.pt")
    opened = open_checkpoint(path)
    assert list(opened.infos) == ["layer.bias", "other"]
    for name in ("layer", "layer.weight"):
        with pytest.raises(InputError, match=message):
            opened.layer(name)
    out = tmp_path / "out.pt"
    write_edited(opened, Edit.of(["other"], {"other": torch.zeros(2)}, "other"), out, None, force=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = torch.load(out, weights_only=False)["layer.weight"]
    assert (back.layout, back.device, back.dtype) == (value.layout, value.device, value.dtype)
    if kind.startswith("sparse"):
        assert torch.equal(back.to_dense(), value.to_dense())
    with pytest.raises(RefusedError, match="no room for layer"):
        write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 3)).save(str(tmp_path / "script.pt"))
    assert list(open_checkpoint(tmp_path / "script.pt").infos) == ["weight", "bias"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_module_is_written_as_its_state_dict(tmp_path: Path, form: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3))
    path = saved(module, tmp_path / "whole.pt", form)
    assert_same(rewritten(path), OrderedDict((name, tensor) for name, tensor in module.state_dict().items()))


def test_a_distributed_tensor_is_named(tmp_path: Path) -> None:
    pickled = b"\x80\x02}X\x01\0\0\0wctorch.distributed.tensor\nDTensor\n)Rs."
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(InputError, match=r"distributed tensor.* save the whole: tensor\.full_tensor\(\)"):
        open_checkpoint(tmp_path / "d.pt").layer("w")


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(small_network(), tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(rewritten(path), loaded(path))


def test_an_ordered_dict_of_old_pickles_is_read(tmp_path: Path) -> None:
    """Python 2 pickled an OrderedDict as a call with a list of pairs."""

    class Old:
        def __reduce__(self) -> Any:
            return OrderedDict, ([["b", 1], ["a", 2]],)

    path = saved({"model": small_network(), "order": Old()}, tmp_path / "in.pt")
    assert rewritten(path)["order"] == OrderedDict([("b", 1), ("a", 2)])


def test_extra_files_in_the_archive_stay(tmp_path: Path) -> None:
    path = save(small_network(), tmp_path / "in.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("in/extra/notes.txt", "hello")
        archive.writestr("in/extra/ünï", "more")
    out = tmp_path / "out.pt"
    write_edited(open_checkpoint(path), Edit.nothing(), out, None, force=False)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/extra/notes.txt") == b"hello"
        assert archive.read("archive/extra/ünï") == b"more"
    assert_same(loaded(out), loaded(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"in/{'x' * 65530}", "")  # torch writes it under archive/, which is longer
    with pytest.raises(RefusedError, match="too long to be written"):
        write_edited(open_checkpoint(path), Edit.nothing(), out, None, force=True)
    path.write_bytes(out.read_bytes().replace(b"hello", b"hallo"))
    with pytest.raises(InputError, match=r"damaged: the checksum of extra/notes\.txt"):
        write_edited(open_checkpoint(path), Edit.nothing(), out, None, force=True)


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        path = saved(with_metadata(small_network()), tmp_path / "in.pt")
        write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / f"{name}.pt", None, force=False)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_a_pickle_remembers_of_each_tensor_its_name_and_itself(tmp_path: Path) -> None:
    """What is remembered stays in memory for as long as the pickle is written, and read."""
    counts = []
    for number in (100, 300):
        path = save({f"t{n}": torch.ones(2, 3) for n in range(number)}, tmp_path / "in.pt")
        write_edited(open_checkpoint(path), Edit.nothing(), tmp_path / "out.pt", None, force=True)
        with zipfile.ZipFile(tmp_path / "out.pt") as archive:
            operations = pickletools.genops(archive.read("archive/data.pkl"))
        counts.append(sum("PUT" in operation.name for operation, _, _ in operations))
    assert counts[1] - counts[0] == 2 * 200


def test_opening_reads_no_storage(tmp_path: Path) -> None:
    path = save(small_network(), tmp_path / "in.pt")
    data = bytearray(path.read_bytes())
    place = data.find(small_network()["head.weight"].numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    opened = open_checkpoint(path)  # or it would have found the damage
    assert torch.equal(opened.tensor("stem.bn.bias"), small_network()["stem.bn.bias"])
    with pytest.raises(InputError, match=r"damaged: the checksum of the storage \d+ of head.weight"):
        opened.tensor("head.weight")
    with pytest.raises(InputError, match=r"damaged: the checksum"):
        write_edited(opened, Edit.nothing(), tmp_path / "out.pt", None, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]
