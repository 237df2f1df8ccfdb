"""What every kind of checkpoint has in common: layers, names, records, edits, weights that are made of others."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SAMPLES, any_bits, same_bits, save, small_network, write_edited
from hypothesis import given
from hypothesis import strategies as st
from layers import kind
from torch import Tensor, nn
from torch.nn.utils import prune

from convtool import open_checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import FusionRecord, Record, SourceLayer, loads
from convtool.cli.app import run_app
from convtool.core.names import unwrap
from convtool.core.tree import Chain, Sum, map_leaves
from convtool.errors import InputError, RefusedError, UsageError
from convtool.kinds.found import group_layers

SUFFIXES = (".safetensors", ".pt")


# Layers


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_are_known_by_their_tensors_names_and_shapes(tmp_path: Path, suffix: str) -> None:
    state = small_network() | {
        "scale.gamma": torch.ones(3),
        "table.weight": torch.ones(3),
        "odd.running_mean": torch.ones(3),
        "bare": torch.ones(3, 2, 1),
    }
    opened = open_checkpoint(save(state, tmp_path / f"in{suffix}"))
    kinds = {name: layer.kind.name for name, layer in opened.layers.items()}
    assert kinds == {
        "stem.first": "conv",
        "stem.second": "conv",
        "stem.bn": "batch_norm",
        "head": "linear",
        "scale": "scale",
        "table": "other",
        "odd": "other",
        "": "other",
    }
    assert opened.layer("head.weight").name == "head"
    with pytest.raises(UsageError, match=r"no layer 'stem\.frst'; did you mean stem\.first"):
        opened.layer("stem.frst")
    with pytest.raises(UsageError, match=r"no layer 'stem'; did you mean (stem\.\w+( or )?){3}\?"):
        opened.layer("stem")


PREFIXES = (
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrappers_at_any_depth_are_seen_through_and_written_back(tmp_path: Path, suffix: str, prefix: str) -> None:
    inside = {name.replace("stem.", "stem._checkpoint_wrapped_module."): t for name, t in small_network().items()}
    state = {f"{prefix}{name}": tensor for name, tensor in inside.items()}
    opened = open_checkpoint(save(state, tmp_path / f"in{suffix}"))
    full = f"{prefix}stem._checkpoint_wrapped_module.first"
    assert unwrap(full) == "stem.first"
    for name in ("stem.first", "stem.first.weight", full, f"{full}.bias"):
        assert opened.layer(name).name == full
    edit = Edit.of([f"{full}.weight"], {f"{full}.weight": torch.zeros(1)}, f"{full}.weight")
    write_edited(opened, edit, tmp_path / f"out{suffix}", None, force=False)
    assert list(open_checkpoint(tmp_path / f"out{suffix}").infos) == list(opened.infos)


def test_two_layers_that_differ_in_wrappers_alone_are_not_guessed_between(tmp_path: Path) -> None:
    state = {"module.conv.weight": torch.ones(2, 1, 3), "_orig_mod.conv.weight": torch.zeros(2, 1, 3)}
    opened = open_checkpoint(save(state, tmp_path / "in.pt"))
    with pytest.raises(UsageError, match=r"'conv' fits several layers \(module\.conv, _orig_mod\.conv\)"):
        opened.layer("conv")
    assert opened.layer("module.conv").name == "module.conv"


def test_a_copy_of_averages_is_a_layer_of_its_own_name(tmp_path: Path) -> None:
    state = small_network() | {f"ema.{name}": tensor + 1 for name, tensor in small_network().items()}
    opened = open_checkpoint(save(state, tmp_path / "in.pt"))
    assert opened.layer("head").name == "head"
    assert opened.layer("ema.head").name == "ema.head"


# Weights that are made of others


OLD: Any = nn.utils
NEW: Any = nn.utils.parametrizations


def normed(layer: nn.Module, form: str, dim: int | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (OLD if form == "old" else NEW).weight_norm(layer, dim=dim)


LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(3, 4, (3, 2)),
    "one channel": nn.Conv1d(3, 1, 5),
    "depthwise": nn.Conv2d(4, 4, (3, 2), groups=4),
    "transposed": nn.ConvTranspose1d(3, 4, 5),
    "linear": nn.Linear(5, 3),
}


INPUTS = {
    "conv": (1, 3, 7, 8),
    "one channel": (1, 3, 7),
    "depthwise": (1, 4, 7, 8),
    "transposed": (1, 3, 7),
    "linear": (1, 5),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_norm_is_the_weight_that_it_makes(
    tmp_path: Path, kind: str, form: str, dim: int | None, suffix: str
) -> None:
    layer = normed(copy.deepcopy(LAYERS[kind]).double(), form, dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    state = {f"net.layer.{name}": tensor for name, tensor in layer.state_dict().items()} | {
        "net.x.weight": torch.ones(2)
    }
    opened = open_checkpoint(save(state, tmp_path / f"in{suffix}"))
    layer.eval()
    layer(torch.zeros(INPUTS[kind], dtype=torch.float64))  # the old form makes its weight when it runs
    weight: Tensor = layer.weight.detach()
    found = opened.layer("net.layer")
    assert found.kind.name == ("linear" if kind == "linear" else "conv")
    assert found.tensors["weight"].shape == tuple(weight.shape)
    made = opened.tensor("net.layer.weight")
    assert torch.allclose(made, weight, rtol=1e-14, atol=0)
    assert list(opened.infos) == list(state)
    assert set(found.tensor_names()) == set(state) - {"net.x.weight"}


def test_a_weight_norm_is_rounded_once(tmp_path: Path) -> None:
    direction, magnitude = any_bits(1, torch.float16, 3, 4, 5).nan_to_num(1, 1, 1), torch.rand(3, 1, 1).half()
    state = {"layer.weight_g": magnitude, "layer.weight_v": direction}
    made = open_checkpoint(save(state, tmp_path / "in.pt")).tensor("layer.weight")
    v = direction.double()
    exact = v * (magnitude.double() / v.square().sum((1, 2), keepdim=True).sqrt())
    assert made.dtype == torch.float16
    above, below = exact - made.nextafter(made - 1).double(), made.nextafter(made + 1).double() - exact
    assert bool(((made.double() - exact).abs() <= torch.minimum(above.abs(), below.abs()) + 1e-18).all())


def test_a_fusion_of_a_weight_norm_puts_a_plain_layer_in_its_place(tmp_path: Path) -> None:
    first, second = normed(nn.Conv1d(2, 3, 3), "new", 0), normed(nn.Conv1d(3, 4, 2), "old", 0)
    model = nn.Sequential(first, second).eval()
    path = save(model.state_dict(), tmp_path / "in.pt")
    fields = ("0.stride=1", "0.dilation=1", "0.groups=1", "1.padding=0", "1.dilation=1")
    stated = [word for field in fields for word in ("--set", field)]
    assert run_app(["fuse", str(path), "0", "1", "-o", str(tmp_path / "out.pt"), "--quiet", *stated]) == 0
    back = torch.load(tmp_path / "out.pt")
    assert list(back) == ["0.weight", "0.bias"]
    x = torch.randn(2, 2, 9)
    fused = nn.functional.conv1d(x, back["0.weight"], back["0.bias"])
    assert torch.allclose(fused, model(x), atol=1e-5)


def spectral(form: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (OLD if form == "old" else NEW).spectral_norm(nn.Conv2d(2, 3, 3))


def pruned() -> nn.Module:
    layer = nn.Conv2d(2, 3, 3)
    prune.l1_unstructured(layer, "weight", 3)
    return layer


class Doubled(nn.Module):
    """A parametrization of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def own() -> nn.Module:
    layer = nn.Conv2d(2, 3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


EIGHT_BITS = {"weight": torch.ones(3, 2, 3, 3).to(torch.float8_e4m3fn), "weight_scale": torch.ones(3)}
NOT_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "spectral norm, old": (spectral("old").state_dict(), "has a spectral norm; make it permanent"),
    "spectral norm, new": (spectral("new").state_dict(), "has a spectral norm; make it permanent"),
    "pruned": (pruned().state_dict(), r"is pruned; make it permanent with torch\.nn\.utils\.prune\.remove"),
    "own parametrization": (own().state_dict(), "is reparametrised; make it permanent"),
    "quantized": (EIGHT_BITS, "is quantized: its weight is to be multiplied by a scale"),
    "packed": ({"qweight": torch.ones(3, 2, dtype=torch.int32), "scales": torch.ones(3)}, "is quantized"),
    "norm that doesn't fit": (
        {"weight_g": torch.ones(5, 1, 1), "weight_v": torch.ones(3, 2, 3)},
        "has a weight norm whose tensors don't fit",
    ),
    "whole numbers": ({"weight": torch.ones(3, 2, 3, dtype=torch.int32)}, "expected floating-point numbers, got int32"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_weights_that_are_not_what_they_seem_are_refused_by_name(tmp_path: Path, kind: str, suffix: str) -> None:
    state, message = NOT_PLAIN[kind]
    opened = open_checkpoint(save({f"layer.{n}": t for n, t in state.items()}, tmp_path / f"in{suffix}"))
    with pytest.raises(InputError, match=rf"layer.*: .*{message}"):
        opened.conv("layer")


# Records

SOURCES = (
    SourceLayer("a", kind("conv"), {"stride": [2], "padding": [(0, 1)], "groups": 1}),
    SourceLayer("b.c", kind("batch_norm"), {"eps": 1e-3}),
    SourceLayer("avg_pool(2)", kind("avg_pool"), {}),
    SourceLayer("d", kind("conv"), {"padding": "half"}, origin="other"),
)
TREES = st.recursive(
    st.sampled_from(SOURCES),
    lambda parts: st.builds(
        lambda kind, items: kind(tuple(items)), st.sampled_from((Chain, Sum)), st.lists(parts, min_size=1, max_size=3)
    ),
    max_leaves=8,
)
FUSIONS = st.builds(
    FusionRecord,
    name=st.text(max_size=9),
    tree=TREES,
    fields=st.sampled_from([{}, {"stride": [2, 1], "padding_mode": "zeros"}]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    exact=st.booleans(),
    input_size=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rim=st.just(()) | st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
)


def sound(fusions: list[FusionRecord]) -> tuple[FusionRecord, ...]:
    """The fusions with every layer in one of them only, and one of the checkpoint's in each."""
    numbers = itertools.count()

    def named(source: SourceLayer) -> SourceLayer:
        return source if source.written else replace(source, name=f"{next(numbers)}.{source.name}")

    return tuple(
        replace(fusion, name=f"{next(numbers)}.{fusion.name}", tree=map_leaves(named, Chain((SOURCES[0], fusion.tree))))
        for fusion in fusions
    )


RECORDS = st.builds(Record, st.text(max_size=5), st.lists(FUSIONS, max_size=3).map(sound))


@given(RECORDS)
def test_a_record_comes_back_as_it_was_written(record: Record) -> None:
    assert loads(record.dumps(), "here") == record


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "sizes below 1": ({"input_size": [-1, -1]}, "input_size: expected integers of at least 1, got -1"),
    "a size of 0": ({"input_size": [0, 4]}, "input_size: expected integers of at least 1, got 0"),
    "too many sizes": ({"input_size": [1, 2, 3]}, "input_size: expected 2 sizes, got"),
    "no sizes": ({"input_size": []}, "input_size: expected 2 sizes, got"),
    "half a position": ({"input_size": [1.5, 2]}, "input_size: expected integers of at least 1, got 1.5"),
    "a flag for a size": ({"input_size": [True, 2]}, "input_size: expected integers of at least 1, got True"),
    "a size beyond all": ({"input_size": [2**40, 2]}, "input_size: expected integers of at least 1, got 1099511627776"),
    "text for sizes": ({"input_size": "77"}, "input_size: expected a list of sizes, got '77'"),
    "a rim below 0": ({"rim": [[-1, 0], [0, 0]]}, "rim: expected integers of at least 0, got -1"),
    "no groups": ({"fields": {"groups": 0}}, "groups: expected an integer of at least 1, got 0"),
    "a stride of 0": ({"fields": {"stride": [0, 1]}}, "stride: expected integers of at least 1, got 0,1"),
    "padding beyond all": ({"fields": {"padding": [[2**31, 0], [0, 0]]}}, "padding: expected integers of at least 0"),
    "one dilation": ({"fields": {"dilation": [1]}}, "dilation: expected one value or 2 values"),
    "eps of a convolution": ({"fields": {"eps": 1}}, "a fused layer has no eps"),
    "no layers": ({"sources": {"chain": [{"name": "avg_pool(2)", "kind": "avg_pool", "fields": {}}]}}, "no layer of"),
    "a layer twice": (
        {"sources": {"chain": [{"name": "a", "kind": "conv", "fields": {}}] * 2}},
        "'a' goes into 'a' after it went into a fusion already",
    ),
    "an unknown kind": ({"sources": {"name": "a", "kind": "relu", "fields": {}}}, "a: unknown kind 'relu'"),
    "no groups of a source": ({"sources": {"name": "a", "kind": "conv", "fields": {"groups": 0}}}, "groups: expected"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_no_fusion_could_have_left_is_a_damaged_record(name: str) -> None:
    sound_one = FusionRecord("a", Chain(SOURCES[:2]), {"stride": [1, 2]}, "float32", True, (5, 7), ((0, 0), (0, 0)))
    document = json.loads(Record("1", (sound_one,)).dumps())
    assert loads(json.dumps(document), "here").fusions == (sound_one,)
    document["fusions"][0] |= DAMAGE[name][0]
    with pytest.raises(InputError, match=r"^here: its convtool record is damaged \(") as caught:
        loads(json.dumps(document), "here")
    assert DAMAGE[name][1] in str(caught.value)


def test_a_layer_goes_into_one_fusion_only() -> None:
    one = FusionRecord("f", Chain(SOURCES[:2]), {}, "float32", True, None, ())
    made = SourceLayer("f", kind("conv"), {})
    again = [
        replace(one, name="g"),  # takes a and b.c once more
        one,
        replace(one, tree=Chain((SourceLayer("x", kind("conv"), {}),))),  # takes a name that is there
    ]
    for second in again:
        with pytest.raises(InputError, match=r"after it went into a fusion already|two fusions are called"):
            loads(Record("1", (one, second)).dumps(), "here")
    for name in ("f", "a", "g"):
        further = Record("1", (one, replace(one, name=name, tree=Chain((made, SOURCES[2])))))
        assert loads(further.dumps(), "here") == further


@given(RECORDS, st.data())
def test_a_damaged_record_is_an_error_or_another_record(record: Record, data: st.DataObject) -> None:
    text = record.dumps()
    place = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from(["", "x", '"', "}", "null", "9" * 400, "[", "1e999"]))
    with contextlib.suppress(InputError):
        loads(text[:place] + new + text[place + 1 :], "here")


def with_record(path: Path, text: str) -> Path:
    """Put a record into a torch file; a .safetensors file has it already."""
    if path.suffix == ".pt":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{path.stem}/convtool.json", text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("3", "damaged"),
        ('{"schema": 2, "version": "1"}', "damaged"),
        ('{"schema": 2, "version": "1", "fusions": [{}]}', "damaged"),
        (
            '{"schema": 2, "schema": 2, "version": "1", "fusions": []}',
            "its convtool record has the key 'schema' twice",
        ),
        ("[" * 200_000, "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_record_that_cannot_be_read_is_named_when_it_is_asked_for(
    tmp_path: Path, suffix: str, text: str, message: str
) -> None:
    path = with_record(save(small_network(), tmp_path / f"in{suffix}", {"convtool": text}), text)
    opened = open_checkpoint(path)
    assert opened.tensor("head.weight").shape == (2, 5)
    with pytest.raises(InputError, match=message):
        _ = opened.record


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 99, "version": "9", "fusions": []}', "schema 99, this version reads 2; use the version"),
        ('{"schema": 2, "version": "9", "fusions": [], "more": 1}', "has the key 'more'"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_record_that_this_version_does_not_know_is_none_and_the_reason_is_there(
    tmp_path: Path, suffix: str, text: str, message: str
) -> None:
    path = with_record(save(small_network(), tmp_path / f"in{suffix}", {"convtool": text}), text)
    opened = open_checkpoint(path)
    assert opened.record is None
    assert message in opened.unknown_record


def test_histories_continue_or_are_of_another_file() -> None:
    one, other = (FusionRecord(name, SOURCES[0], {}, "float32", True, None, ()) for name in "ab")
    both = Record("1", (one, other))
    assert both.since(None) == (one, other)
    assert both.since(Record("0", (one,))) == (other,)
    assert Record("1", (one,)).appended("2", [other]) == Record("2", (one, other))
    with pytest.raises(InputError, match="different histories"):
        both.since(Record("1", (other,)))


RECORD = Record("1.2.3", (FusionRecord("a", Chain(SOURCES[:2]), {"stride": [1]}, "float32", True, None, ()),))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_record_travels_with_its_file(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    opened = open_checkpoint(save(small_network(), tmp_path / f"in{suffix}"))
    assert opened.record is None
    write_edited(opened, Edit.nothing(), out, RECORD, force=False)
    assert open_checkpoint(out).record == RECORD
    write_edited(opened, Edit.nothing(), out, None, force=True)
    assert open_checkpoint(out).record is None


@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"mmap": True}], ids=str)
def test_torch_passes_over_the_record_in_its_file(tmp_path: Path, options: dict[str, Any]) -> None:
    out, state = tmp_path / "out.pt", small_network()
    opened = open_checkpoint(save(state, tmp_path / "in.pt"))
    write_edited(opened, Edit.nothing(), out, RECORD, force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.pt"]  # and nothing beside it
    loaded = torch.load(out, **options)
    assert loaded.keys() == state.keys()
    assert all(same_bits(loaded[name], state[name]) for name in state)


# Edits


def test_an_edit_says_what_goes_and_what_comes_where() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    edit = Edit.of(["a", "b"], {"a": x, "n": y}, "b")
    assert edit.order("zabc") == [("z", None), ("a", x), ("n", y), ("c", None)]
    assert Edit.nothing().order("ab") == [("a", None), ("b", None)]
    together = Edit.together([edit, Edit.of(["c"], {"c": y}, "c")])
    assert together.order("zabc") == [("z", None), ("a", x), ("n", y), ("c", y)]
    with pytest.raises(UsageError, match="two fusions claim 'a'"):
        Edit.together([edit, Edit.of(["a"], {}, "a")])
    with pytest.raises(UsageError, match="two fusions claim 'n'"):
        Edit.together([edit, Edit.of(["c"], {"n": y}, "c")])
    with pytest.raises(UsageError, match="'z' is taken by a tensor that stays"):
        Edit.of(["a"], {"z": y}, "a").order("za")


# Output


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_checkpoint_can_be_written_over_itself(tmp_path: Path, suffix: str) -> None:
    path = save(small_network(), tmp_path / f"in{suffix}")
    link = tmp_path / f"link{suffix}"
    link.symlink_to(path.name)
    before = {name: open_checkpoint(path).tensor(name).clone() for name in open_checkpoint(path).infos}
    opened = open_checkpoint(path)
    edit = Edit.of(["head.weight"], {"head.weight": torch.zeros(3)}, "head.weight")
    write_edited(opened, edit, link, None, force=True)
    assert link.is_symlink()
    assert all(same_bits(opened.tensor(name), tensor) for name, tensor in before.items())  # the old file, still open
    back = open_checkpoint(path)
    assert torch.equal(back.tensor("head.weight"), torch.zeros(3))
    assert all(same_bits(back.tensor(name), before[name]) for name in before if name != "head.weight")


@pytest.mark.parametrize("name", ["x", "x.npz", "x.safetensors.gz", "x.PT"])
def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    opened = open_checkpoint(SAMPLES / "chains.pt")
    with pytest.raises(UsageError, match=r"expected a name that ends in \.safetensors, \.pt"):
        write_edited(opened, Edit.nothing(), tmp_path / name, None, force=False)
    assert not list(tmp_path.iterdir())


def test_what_a_nested_file_holds_beside_its_state_dict_is_not_dropped_silently(tmp_path: Path) -> None:
    torch.save({"model": small_network(), "epoch": 3}, tmp_path / "in.pt")
    opened = open_checkpoint(tmp_path / "in.pt")
    with pytest.raises(
        RefusedError, match=r"more than the state dict at 'model'.*leave the rest out with --root model"
    ):
        write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False)
    write_edited(opened, Edit.nothing(), tmp_path / "out.safetensors", None, force=False, state_only=True)
    assert opened.left_out == {"epoch": "a value of type int"}
    assert list(open_checkpoint(tmp_path / "out.safetensors").infos) == list(small_network())


def test_a_pipe_and_a_device_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path(os.devnull)):
        with pytest.raises(InputError, match="is not a regular file"):
            open_checkpoint(path)


def test_grouping_knows_parametrizations_as_part_of_their_layer() -> None:
    from convtool.kinds.kind import TensorInfo

    names = ["a.parametrizations.weight.original", "a.bias", "parametrizations.weight.original0", "x.parametrizations"]
    layers = group_layers(TensorInfo(name, "float32", (2,), 8) for name in names)
    assert {name: list(layer.tensors) for name, layer in layers.items()} == {
        "a": ["parametrizations.weight.original", "bias"],
        "": ["parametrizations.weight.original0"],
        "x": ["parametrizations"],
    }
