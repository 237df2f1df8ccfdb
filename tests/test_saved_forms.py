"""Whatever torch saves a network as: its names, its bits, its geometry, and nothing of it is run."""

from __future__ import annotations

import datetime
import functools
import io
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import saved_nets
import torch
from cases import whole_numbers
from checkpoints import bits_of, described, same_bits, small_network, write_edited
from saved_nets import CHAINS, FORMS, NETS, Half, Mobile, Passing, Residual, Same, Tied, geometry_of, made, save_as
from shell import cli
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.errors import InputError, UsageError
from convtool.formats.account import accounting
from convtool.formats.pickle_values import PickleError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Networks saved once in each form, when asked for."""

    @functools.cache
    def save(cls: type[nn.Module], form: str) -> Path:
        return save_as(form, made(cls), tmp_path_factory.mktemp(f"{cls.__name__}-{form}"))

    return save


def expected_state(cls: type[nn.Module], form: str, path: Path) -> dict[str, Tensor]:
    """What torch's own state dict has; TorchScript keeps buffers that aren't saved, and knows its own."""
    if form not in ("scripted", "traced"):
        return made(cls).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, Tensor] = torch.jit.load(path).state_dict()
    return state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", NETS)
def test_names_bits_and_geometry_are_torchs(saved: Any, cls: type[nn.Module], form: str) -> None:
    path = saved(cls, form)
    opened, wanted = open_checkpoint(path), expected_state(cls, form, path)
    assert opened.infos.keys() == wanted.keys()
    assert form == "exported" or list(opened.infos) == list(wanted)  # which has the buffers behind the parameters
    for name, tensor in wanted.items():
        assert same_bits(opened.tensor(name), tensor), name
        assert b"".join(map(bytes, opened.chunks(name))) == bits_of(opened, name)
    modules = {name: geometry_of(module) for name, module in made(cls).named_modules(remove_duplicate=False)}
    known = {name: fields for name, fields in modules.items() if fields is not None}
    stated = {name: fields for name, fields in opened.stated.items() if fields}
    if form == "exported":  # of what is tied, one name has all tensors
        stated.pop("same", None)
        assert stated.items() <= known.items()
        assert known.keys() - stated.keys() == ({"bn"} if cls is Tied else set())
    elif form in ("module", "legacy"):
        assert stated == known
    else:
        assert stated.items() <= known.items()
        assert form != "scripted" or stated.keys() == known.keys()


def test_a_subclass_is_named_and_nothing_is_said_of_it(saved: Any) -> None:
    opened = open_checkpoint(saved(Passing, "module"))
    assert opened.other_classes["same"] == "saved_nets.Same"
    assert "same" not in opened.stated
    assert "not in the file (a saved_nets.Same)" in cli(f"inspect {saved(Passing, 'module')}").out
    exported = open_checkpoint(saved(Passing, "exported")).stated["same"]  # by its operations
    assert exported["padding"] == [[0, 2], [0, 1]]


class Calls(nn.Module):
    """Runs a convolution that is no module, as a function, and one in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ParameterDict({"weight": nn.Parameter(torch.rand(4, 3, 2, 2))})
        self.bn, self.own, self.bn2 = nn.BatchNorm2d(4), Same(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(nn.functional.conv2d(x, self.held["weight"], padding=1))
        return torch.as_tensor(self.bn2(self.own(x)))


def test_a_layer_that_a_program_runs_by_other_code_than_torchs_is_said_to_be_one(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Calls().eval(), (torch.rand(1, 3, 5, 6),)), tmp_path / "net.pt2")
    for chain, what in (("held bn", "function that .*Calls calls"), ("own bn2", "saved_nets.Same")):
        done = cli(f"fuse {tmp_path / 'net.pt2'} {chain} -o {tmp_path / 'o.pt'} --force")
        assert done.code == 0
        assert re.search(rf"{chain.split()[0]}: a {what} in this model", done.out)


def test_a_chain_is_held_against_the_run_that_a_program_describes(saved: Any, tmp_path: Path) -> None:
    for form, code in (("exported", 4), ("module", 0)):  # a module's file says nothing of its run
        done = cli(f"fuse {saved(Mobile, form)} layers.0 layers.4 -o {tmp_path / 'o.safetensors'} --tensors-only")
        assert done.code == code, done.err
        assert code == 0 or "the model's run is against layers.0 → layers.4: between layers.0 and layers.4" in done.err


class Flattened(nn.Sequential):
    """A linear layer and a batch norm with the other axes flattened between them, as in LeViT."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        out: Tensor = self[1](x.flatten(0, 1)).reshape_as(x)
        return out


def test_a_flatten_of_other_axes_is_nothing_against_a_chain(tmp_path: Path) -> None:
    net = Flattened(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (torch.rand(2, 3, 4),)), tmp_path / "net.pt2")
    done = cli(f"fuse {tmp_path / 'net.pt2'} 0 1 -o {tmp_path / 'out.safetensors'} --tensors-only")
    assert done.code == 0, done.err


class Standardized(nn.Conv2d):
    """A convolution that divides its weight by its deviation, as BiT's do."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.weight / self.weight.std(), self.bias)
        return out


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_program_states_what_a_weight_norm_runs_with(tmp_path: Path, norm: Any, bias: bool) -> None:
    plain = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1, bias=bias)
    other = Standardized(4, 4, 3, bias=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(norm(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1, bias=bias)), other).eval()
        torch.export.save(torch.export.export(net, (torch.rand(1, 3, 9, 9),)), tmp_path / "net.pt2")
    assert open_checkpoint(tmp_path / "net.pt2").stated == {"0": geometry_of(plain)}


@pytest.mark.parametrize("form", FORMS)
def test_inspect_lists_all_that_there_is(saved: Any, form: str) -> None:
    shown = cli(f"inspect {saved(Passing, form)} --json").document
    formats = {"exported": "pt2", "folder": "dcp", "scripted": "torchscript", "traced": "torchscript"}
    assert shown["format"] == formats.get(form, "torch")
    assert bool(shown["others"]) == (form != "folder")  # code, a graph, or a module's class
    assert ("saved_nets.Same" in shown["classes"]) == (form in ("module", "legacy"))


def test_a_module_under_keys_is_replaced_by_its_state_dict_under_each(tmp_path: Path) -> None:
    """As ultralytics saves a detector."""
    net = made(Half)
    torch.save({"epoch": -1, "model": net, "ema": net, "args": {"lr": 0.1}}, tmp_path / "yolo.pt")
    line = f"fuse {tmp_path / 'yolo.pt'} stem bn -o {tmp_path / 'out.pt'} --force"
    assert cli(f"{line} --json").document["left_out"] == ["model"]
    done = cli(line)
    assert "model is the module, an object of saved_nets.Half, which can't be written; its state dict is" in done.err
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert back["model"] is back["ema"]
    assert (back["epoch"], back["args"]) == (-1, {"lr": 0.1})
    assert list(back["model"]) == ["stem.weight", "stem.bias", "conv.weight", "conv.bias", "head.weight", "head.bias"]
    assert cli(f"verify {tmp_path / 'yolo.pt'} {tmp_path / 'out.pt'}").code == 0


def test_a_compiled_module_is_read_as_the_module_in_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: Any = torch.compile(made(Residual))
    torch.save(net, tmp_path / "net.pt")
    opened = open_checkpoint(tmp_path / "net.pt")
    assert list(opened.infos) == list(net.state_dict())
    assert all(same_bits(opened.tensor(name), tensor) for name, tensor in net.state_dict().items())
    assert opened.stated["_orig_mod.stem"] == geometry_of(made(Residual).get_submodule("stem"))
    line = f"{tmp_path / 'net.pt'} _orig_mod.stem _orig_mod.bn -o {tmp_path / 'out.safetensors'} --tensors-only"
    assert cli(f"fuse {line}").code == 0
    assert cli(f"verify {tmp_path / 'net.pt'} {tmp_path / 'out.safetensors'}").code == 0


def test_tied_tensors_stay_tied(saved: Any, tmp_path: Path) -> None:
    for form in ("module", "exported", "scripted"):
        opened = open_checkpoint(saved(Tied, form))
        assert opened.piece("first.weight").memory == opened.piece("second.weight").memory
    write_edited(open_checkpoint(saved(Tied, "module")), Edit.nothing(), tmp_path / "out.pt", force=False)
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert back["first.weight"].data_ptr() == back["second.weight"].data_ptr()


@pytest.mark.parametrize("form", ["module", "exported"])
@pytest.mark.parametrize("cls", [cls for cls in NETS if CHAINS[cls] and cls is not Tied])
def test_a_chain_is_fused_with_what_the_file_states_and_verified(
    saved: Any, cls: type[nn.Module], form: str, tmp_path: Path
) -> None:
    path, out = saved(cls, form), tmp_path / "out.safetensors"
    done = cli(f"fuse {path} {CHAINS[cls]} -o {out} --tensors-only --json")
    assert done.code == 0, done.err
    (fusion,) = done.document["fusions"]
    assert not fusion["assumed"]
    assert done.document["left_out"]
    verified = cli(f"verify {path} {out}")
    assert verified.code == 0, verified.out + verified.err


CALLED: list[str] = []
WATCHED = ("pickle.find_class", "os.system", "subprocess.Popen", "exec", "ctypes.dlopen", "socket.connect")


def test_nothing_is_called(saved: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Classes are poisoned, their module is gone, and the interpreter listens."""
    forms = [(cls, form) for cls in (Residual, Passing) for form in FORMS]
    for cls, form in forms:
        saved(cls, form)
        cli(f"inspect {saved(cls, form)} --tensors")  # what convtool itself imports is imported

    def listen(event: str, args: Any) -> None:
        if CALLED and CALLED[0] == "on" and event in WATCHED:
            CALLED.append(event)

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        CALLED.append(f"{type(self).__name__} was called")
        raise AssertionError

    sys.addaudithook(listen)
    for target in (nn.Module, nn.Conv2d, nn.BatchNorm2d, saved_nets.Same, saved_nets.Passing):
        for name in ("__init__", "__setstate__", "__call__"):
            monkeypatch.setattr(target, name, poisoned, raising=False)
    monkeypatch.setitem(sys.modules, "saved_nets", None)
    CALLED.append("on")
    try:
        for cls, form in forms:
            opened = open_checkpoint(saved(cls, form))
            _ = [opened.tensor(name) for name in opened.infos], opened.stated, opened.program
            write_edited(opened, Edit.nothing(), tmp_path / "out.pt", force=True, tensors_only=True)
            write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", force=True, tensors_only=True)
    finally:
        called = CALLED.copy()
        CALLED.clear()
    assert called == ["on"]


# Foreign objects beside a state dict


class Settings:
    """A class with attributes, as hyper-parameters come."""

    def __init__(self) -> None:
        self.rate = 0.1
        self.parent = self  # as a module's children know it


class Listed(list[Any]):
    """A list with attributes."""


class Named(dict[str, Any]):
    """A dict with attributes, Lightning's AttributeDict."""


class Outer:
    class Inner:
        """A class that only protocol 4 has a name for."""


FOREIGN: dict[str, Any] = {
    "settings": Settings(),
    "a list": Listed([1, Settings()]),
    "a dict": Named(a=1, b=Settings()),
    "path": PurePosixPath("a/b"),
    "partial": functools.partial(int, base=2),
    "loss": nn.CrossEntropyLoss(),
    "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
    "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "method": Settings.__init__,
    "inner": Outer.Inner(),
    "array": np.arange(6.0).reshape(2, 3).T,
    "strings": np.array(["a", "bc"]),
    "a set": {1, (2, "x")},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_object_is_inert_and_written_as_it_was(tmp_path: Path, kind: str, protocol: int) -> None:
    value = {"model": small_network(), "other": FOREIGN[kind]}
    if kind == "inner" and protocol < 4:
        return
    torch.save(value, tmp_path / "in.pt", pickle_protocol=protocol)
    opened = open_checkpoint(tmp_path / "in.pt", "model")
    assert list(opened.infos) == list(small_network())
    assert opened.left_out.keys() == {"other"}
    write_edited(opened, Edit.nothing(), tmp_path / "out.pt", force=True)
    pickles = [
        zipfile.ZipFile(tmp_path / name).read(f"{root}/data.pkl")
        for name, root in (("in.pt", "in"), ("out.pt", "archive"))
    ]
    if kind not in ("array", "strings"):  # numpy's have bytes by protocol; those are read by numpy below
        # Both through plain dummies, which see every call with its arguments in order.
        assert described(pickles[1]) == described(pickles[0])
    back = torch.load(tmp_path / "out.pt", weights_only=False)
    assert type(back["other"]) is type(FOREIGN[kind])
    if kind in ("array", "strings", "a set", "time", "path"):
        assert (
            np.array_equal(back["other"], FOREIGN[kind]) if kind[0] == "a" else str(back["other"]) == str(FOREIGN[kind])
        )


class SetByAFunction:
    """An object whose attributes a function of its own sets, which is called for that alone."""

    def __init__(self) -> None:
        self.value = 0

    def __reduce__(self) -> Any:
        return SetByAFunction, (), self.value, None, None, set_value


def set_value(made: SetByAFunction, value: int) -> None:
    made.value = value


def test_what_is_called_for_its_effect_alone_is_written_too(tmp_path: Path) -> None:
    made = SetByAFunction()
    made.value = 7
    torch.save({"model": small_network(), "other": [made, made]}, tmp_path / "in.pt")
    write_edited(open_checkpoint(tmp_path / "in.pt"), Edit.nothing(), tmp_path / "out.pt", force=False)
    one, other = torch.load(tmp_path / "out.pt", weights_only=False)["other"]
    assert one is other
    assert one.value == 7


def test_foreign_classes_are_named_and_left_out_where_asked(tmp_path: Path) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save({"model": small_network(), "args": Settings()}, path)
    shown = cli(f"inspect {path} --json").document
    assert shown["classes"] == ["test_saved_forms.Settings"]
    assert shown["others"] == {"args": "an object of test_saved_forms.Settings"}
    assert "names classes and functions, none of which is run: test_saved_forms.Settings" in cli(f"inspect {path}").err
    refused = cli(f"convert {path} {out}")
    assert refused.code == 4
    assert "--root model or --tensors-only" in refused.message
    for words in ("--tensors-only", "--root model"):
        done = cli(f"convert {path} {out} {words} --force --json")
        assert (done.code, done.document["left_out"]) == (0, ["args"])
    done = cli(f"convert {path} {tmp_path / 'out.pt'} --tensors-only --json")
    assert done.document["left_out"] == ["args"]
    assert list(torch.load(tmp_path / "out.pt", weights_only=True)) == list(small_network())


LONG_KEYS = (b")" + b"2\x86" * 60, b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00", b"(" + b"K\x01" * 2000 + b"t")


def pickled_as(path: Path, pickled: bytes) -> Path:
    """A torch zip file of that pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


@pytest.mark.parametrize("key", LONG_KEYS)
def test_a_key_that_would_be_hashed_for_ever_is_refused(tmp_path: Path, key: bytes) -> None:
    for before, after in ((b"\x80\x02}", b"K\x01s."), (b"\x80\x02(", b"K\x01d."), (b"\x80\x04\x8f(", b"\x90.")):
        with pytest.raises(InputError, match="a key of more than 1000 values"):
            open_checkpoint(pickled_as(tmp_path / "in.pt", before + key + after))


def test_a_key_twice_is_refused_by_whatever_opcode(tmp_path: Path) -> None:
    items = b"K\x01K\x02K\x01K\x03"
    for pickled in (b"(" + items + b"d.", b"}(" + items + b"u.", b"}K\x01K\x02sK\x01K\x03s."):
        with pytest.raises(InputError, match="has the key 1 twice"):
            open_checkpoint(pickled_as(tmp_path / "in.pt", b"\x80\x02" + pickled))


# State dicts in other forms


def test_one_state_dict_under_two_keys_is_one(tmp_path: Path) -> None:
    state = small_network()
    torch.save({"params": state, "params_ema": state, "rng": torch.get_rng_state()}, tmp_path / "in.pt")
    edit = Edit.of(["head.weight"], {"head.weight": torch.zeros(2, 5)}, "head.weight")
    for root in (None, "params", "params_ema"):
        write_edited(open_checkpoint(tmp_path / "in.pt", root), edit, tmp_path / "out.pt", force=True)
        back = torch.load(tmp_path / "out.pt", weights_only=True)
        assert back["params"] is back["params_ema"]
        assert not back["params"]["head.weight"].any()
        assert torch.equal(back["rng"], torch.get_rng_state())


def test_tensors_with_attributes_and_buffers_are_tensors(tmp_path: Path) -> None:
    marked, buffer = torch.arange(6.0).reshape(2, 3), nn.Buffer(torch.ones(3))
    marked.note = "here"  # type: ignore[attr-defined]
    torch.save({"a": marked, "b": buffer, "c": nn.Parameter(torch.ones(2))}, tmp_path / "in.pt")
    opened = open_checkpoint(tmp_path / "in.pt")
    assert {name: opened.tensor(name).tolist() for name in opened.infos} == {
        "a": marked.tolist(),
        "b": [1.0] * 3,
        "c": [1.0] * 2,
    }
    write_edited(opened, Edit.nothing(), tmp_path / "out.pt", force=False)
    back = torch.load(tmp_path / "out.pt", weights_only=False)
    assert back["a"].note == "here"
    assert same_bits(back["a"], marked)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("whole", [True, False])
def test_arrays_of_numpy_are_tensors(tmp_path: Path, protocol: int, whole: bool) -> None:
    arrays = {
        "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "flag": np.array([True, False]),
        "none": np.zeros((0, 3), np.int8),
    }
    path = tmp_path / "in.pkl"
    if whole:
        torch.save({"model": arrays}, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps({"model": arrays, "author": "x"}, protocol=protocol))
    opened = open_checkpoint(path)
    assert {name: opened.tensor(name).numpy().tolist() for name in opened.infos} == {
        k: v.tolist() for k, v in arrays.items()
    }
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", force=True, tensors_only=True)
    again = open_checkpoint(tmp_path / "out.safetensors")
    assert again.tensor("columns").tolist() == arrays["columns"].tolist()
    write_edited(opened, Edit.nothing(), tmp_path / "out.pt", force=True)
    back = torch.load(tmp_path / "out.pt", weights_only=False)["model"]
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_a_sharded_tensor_is_put_together(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(5, 4, 3)
    boxes = [((0, 0, 0), (2, 4, 3)), ((2, 0, 0), (3, 1, 3)), ((2, 1, 0), (3, 3, 3))]
    _write_folder(tmp_path, whole, boxes)
    with accounting() as account:
        opened = open_checkpoint(tmp_path)
    assert opened.root == ("model",)
    assert torch.equal(opened.tensor("w"), whole)
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", force=False, tensors_only=True)
    assert torch.equal(open_checkpoint(tmp_path / "out.safetensors").tensor("w"), whole)
    parts = {path.name for path, _ in account.seen}
    assert parts == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}  # looked at before an output appears
    for wrong, message in (
        (boxes[:2], "don't make up a tensor"),
        ([boxes[0], boxes[1], ((1, 1, 0), (3, 3, 3))], "overlap"),
        ([boxes[0], boxes[1], ((3, 1, 0), (3, 3, 3))], "reaches beyond"),
    ):
        _write_folder(tmp_path, whole, wrong)
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path / ".metadata").tensor("w")


def _write_folder(folder: Path, whole: Tensor, boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """A folder of torch.distributed.checkpoint, by its own classes, as several processes would write it."""
    chunks, places = [], {}
    for number, (offsets, sizes) in enumerate(boxes):
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        buffer = io.BytesIO()
        torch.save(part.clone() if part.numel() else torch.ones(sizes), buffer)
        (folder / f"__{number}_0.distcp").write_bytes(b"before" + buffer.getvalue())
        chunks.append(dcp_metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        index = dcp_metadata.MetadataIndex("model.w", torch.Size(offsets), number)
        places[index] = _StorageInfo(f"__{number}_0.distcp", 6, len(buffer.getvalue()))
    properties = dcp_metadata.TensorProperties(dtype=torch.float32)
    entry = dcp_metadata.TensorStorageMetadata(properties, torch.Size(whole.shape), chunks)
    table = dcp_metadata.Metadata({"model.w": entry}, {"model.w": ("model", "w")}, places)
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def test_a_table_of_contents_with_names_that_are_hashed_for_ever_is_refused(tmp_path: Path) -> None:
    nested: tuple[Any, ...] = ()
    for _ in range(60):
        nested = (nested, nested)
    places = {dcp_metadata.MetadataIndex("w", torch.Size([0])): _StorageInfo(nested, 0, 4)}  # type: ignore[arg-type]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(dcp_metadata.Metadata({}, {}, places)))
    with pytest.raises(InputError, match="a name that isn't a text"):
        open_checkpoint(tmp_path)


def test_a_program_that_was_exported_in_training_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),)), tmp_path / "net.pt2")
    planned = cli(f"plan {tmp_path / 'net.pt2'}")
    assert planned.code == 0
    assert "left alone: 1: was exported in training" in planned.out


def test_a_frozen_script_has_no_names(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.script(made(Residual))).save(str(tmp_path / "frozen.pt"))
    with pytest.raises(InputError, match=r"are constants without names, as torch\.jit\.freeze makes them"):
        open_checkpoint(tmp_path / "frozen.pt")


@pytest.mark.parametrize("form", ["module", "exported", "folder", "scripted"])
def test_a_root_that_is_not_there_is_refused(saved: Any, form: str) -> None:
    with pytest.raises(UsageError, match=r"no such|has one state dict"):
        open_checkpoint(saved(Residual, form), "elsewhere")


def test_another_schema_is_refused_by_its_number(saved: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(saved(Half, "exported")) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'"major": 8', b'"major": 9'))
    with pytest.raises(InputError, match=r"version 9\.\d+ of the schema of exported programs; 8 is known"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "wrong"), [("as_tensor", {"name": {}}), ("as_ints", {"a": 1}), ("as_ints", [[1], 1]), ("as_bool", "yes")]
)
def test_an_argument_of_another_type_than_its_kind_is_damage(saved: Any, tmp_path: Path, kind: str, wrong: Any) -> None:
    path, changed = tmp_path / "other.pt2", 0

    def spoilt(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal changed
        changed += any(key == kind for key, _ in pairs)
        return {key: wrong if key == kind else value for key, value in pairs}

    with zipfile.ZipFile(saved(Residual, "exported")) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            model = "models/" in name and name.endswith(".json")
            new.writestr(name, json.dumps(json.loads(data, object_pairs_hook=spoilt)) if model else data)
    assert changed
    with pytest.raises(InputError, match="its JSON isn't as torch writes it"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("strides", [{"as_int": 1}]),
        ("storage_offset", {"as_int": -4}),
        ("sizes", [{"as_int": 1.0}] * 4),
        ("strides", [{"as_int": -1}] * 4),
    ],
)
def test_a_tensor_of_a_program_that_no_storage_can_have_is_damage(
    saved: Any, tmp_path: Path, field: str, wrong: Any
) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(saved(Half, "exported")) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("_weights_config.json"):
                config = json.loads(data)
                entry = next(one for one in config["config"].values() if len(one["tensor_meta"]["sizes"]) == 4)
                entry["tensor_meta"][field] = wrong
                data = json.dumps(config).encode()
            new.writestr(name, data)
    with pytest.raises(InputError, match="an offset, a shape or strides that make no sense"):
        open_checkpoint(path)


def test_modules_that_hold_each_other_without_end_are_refused() -> None:
    from convtool.formats.pickle_values import Call, Global
    from convtool.formats.state_dicts import read_module

    one = Call(Global("a", "B"), ())
    one.state = {"_parameters": {}, "_buffers": {}, "_modules": {"x": one, "y": one}}
    with pytest.raises(PickleError, match="without an end"):
        read_module(one)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]
)
def test_every_verb_takes_layers_of_few_bits_or_says_why_not(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = whole_numbers(1, 4, 3, 2, 2).abs().clamp(1, 4)
    plain = {"a.weight": whole, "b.weight": whole_numbers(2, 2, 4, 1, 1).abs().clamp(1, 4), "a.bias": torch.ones(4)}
    few = {
        name: tensor.to(torch.uint8).view(dtype) if "float4" in str(dtype) else tensor.to(dtype)
        for name, tensor in plain.items()
    }
    torch.save(few, tmp_path / "in.pt")
    computed = dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    out = f"-o {tmp_path / 'o.npz'} --force"
    for line, of_numbers in {
        f"inspect {tmp_path / 'in.pt'}": False,
        f"convert {tmp_path / 'in.pt'} {tmp_path / 'c.safetensors'}": False,
        f"fuse {tmp_path / 'in.pt'} a b -o {tmp_path / 'f.pt'} --assume-defaults": True,
        f"spectrum {tmp_path / 'in.pt'} a --input-size 4,4 --assume-defaults": True,
        f"toeplitz {tmp_path / 'in.pt'} a --input-size 4,4 {out} --dtype float32 --assume-defaults": True,
        f"verify {tmp_path / 'in.pt'} {tmp_path / 'in.pt'}": False,
    }.items():
        done = cli(line)
        assert done.code == (0 if computed or not of_numbers else 3), (line, done.err)


# Folders and messages


def test_of_a_folder_that_holds_both_formats_the_safer_is_read(tmp_path: Path) -> None:
    cli_state = small_network()
    torch.save(cli_state, tmp_path / "pytorch_model.bin")
    write_edited(open_checkpoint(tmp_path), Edit.nothing(), tmp_path / "model.safetensors", force=False)
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"
    torch.save(cli_state, tmp_path / "adapter_model.bin")
    with pytest.raises(UsageError, match="several checkpoints"):
        open_checkpoint(tmp_path)


def test_an_index_of_a_variant_is_one(tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "in.pt")
    cli(f"convert {tmp_path / 'in.pt'} {tmp_path / 'several'} --shard-size 200B")
    folder = tmp_path / "several"
    (index,) = folder.glob("*.index.json")
    renamed = index.rename(folder / "diffusion_pytorch_model.bin.index.fp16.json")
    for path in (folder, renamed):
        assert open_checkpoint(path).infos.keys() == small_network().keys()


def test_folders_without_a_checkpoint_say_where_some_are(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "abc" / "unet").mkdir(parents=True)
    (tmp_path / "global_step7").mkdir()
    torch.save(small_network(), tmp_path / "snapshots" / "abc" / "unet" / "model.bin")
    with pytest.raises(InputError, match=r"there are some in snapshots/abc/unet: give one of these"):
        open_checkpoint(tmp_path)
    torch.save({}, tmp_path / "global_step7" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match=r"DeepSpeed: its zero_to_fp32\.py.*global_step7"):
        open_checkpoint(tmp_path)


MESSAGES: dict[str, tuple[str, bytes, str]] = {
    "onnx": ("m.onnx", b"\x08\x07" + bytes(range(200)), "is ONNX.*exported from"),
    "xz": ("m.pt", b"\xfd7zXZ\0" + bytes(100), "compressed by xz"),
    "bz2": ("m.pt", b"BZh9" + bytes(range(100)), "compressed by bzip2"),
    "npy": ("m.npy", b"\x93NUMPY\x01\0" + bytes(100), "an array of numpy"),
    "Core ML": ("weight.bin", b"\1\0\0\0\2".ljust(64, b"\0") + b"\xef\xbe\xad\xde" + bytes(60), "weights of Core ML"),
    "part": ("__0_0.distcp", b"PK" + bytes(100), "a part of a folder of torch.distributed.checkpoint"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_files_of_other_programs_are_named(tmp_path: Path, kind: str) -> None:
    name, data, message = MESSAGES[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("arrays", [False, True])
def test_what_pickle_itself_wrote_is_read(tmp_path: Path, protocol: int, arrays: bool) -> None:
    """Tensors stand in such a pickle as files of torch's; protocol 0 is text."""
    state = {"a.weight": torch.randn(4, 3).T, "a.bias": torch.arange(3), "half": torch.ones(2).half()}
    saved = {name: tensor.numpy() for name, tensor in state.items()} if arrays else state | {"tied": state["a.bias"]}
    (tmp_path / "in.pt").write_bytes(pickle.dumps(saved, protocol))
    opened = open_checkpoint(tmp_path / "in.pt")
    assert opened.infos.keys() == saved.keys()
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in state.items())
    assert arrays or opened.piece("tied").memory == opened.piece("a.bias").memory
    if not arrays:
        assert cli(f"convert {tmp_path / 'in.pt'} {tmp_path / 'out.pt'}").code == 0
        back = torch.load(tmp_path / "out.pt")
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_archives_of_other_programs_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    np.savez_compressed(tmp_path / "b.npz", x=np.ones(3))
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/net.pt", b"PK" * 100)
    for name, message in (
        ("a.npz", "npz of numpy"),
        ("b.npz", "npz of numpy"),
        ("c.zip", r"holds inner/net\.pt; unpack"),
    ):
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match=r"^https://a\.b/c\.pt: is a URL; download it first"):
        open_checkpoint("https://a.b/c.pt")


def test_one_padding_of_two_sides_for_two_axes_says_how_to_say_it(saved: Any, tmp_path: Path) -> None:
    line = f"toeplitz {saved(Residual, 'module')} conv --input-size 6,6 --padding 1:2 -o {tmp_path / 'o.npz'}"
    assert "got 1:2; before and after, on each axis: 1:2,1:2" in cli(line).message


def test_an_empty_placeholder_is_named(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.empty(0), "conv.bias": torch.empty(0)}, tmp_path / "zero.pt")
    with pytest.raises(InputError, match="ZeRO-3 saves what other processes hold"):
        open_checkpoint(tmp_path / "zero.pt").conv("conv")
