"""`convtool verify` and what `convtool fuse` verifies: exit codes, documents, what is compared and what is said."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import real_numbers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import Run, cli
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from convtool.cli.verify import split_names
from convtool.core.conv import Conv
from convtool.core.rounding import rounded
from convtool.fusing.proof import check_planned


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("plain.toml").write_text('"*" = { stride = 1, padding = 0, dilation = 1, groups = 1 }')
    return tmp_path


def plain(line: str) -> Run:
    """Run a command on layers that have torch's defaults, which is stated; what --set says overrules it."""
    return cli(f"{line} --geometry plain.toml")


def fuse(line: str) -> Run:
    """Fuse such layers."""
    return plain(f"fuse {line}")


def network(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {
        "first.weight": (4, 3, 3, 2),
        "first.bias": (4,),
        "second.weight": (5, 4, 2, 3),
        "norm.weight": (5,),
        "norm.bias": (5,),
        "norm.running_mean": (5,),
        "line.weight": (6, 5),
        "deep.weight": (2, 3, 2, 1, 2),
        "patch.weight": (8, 3, 4, 2),
        "patch.bias": (8,),
    }
    state = {name: rounded(real_numbers(seed, *shape), dtype) for seed, (name, shape) in enumerate(shapes.items())}
    state["norm.running_var"] = rounded(real_numbers(77, 5).square() + 0.1, dtype)
    return state


@pytest.fixture
def net() -> dict[str, Tensor]:
    state = network()
    save_file(state, "net.safetensors")
    torch.save(state, "net.pt")
    return state


CHAIN = "first second norm --set first.stride=2,1 --set first.padding=1,0:2 --set norm.eps=1e-3"


# --- the report


def test_the_document_says_all_that_was_found(net: dict[str, Tensor]) -> None:
    assert fuse(f"net.safetensors {CHAIN} -o f.safetensors").code == 0
    found = cli("verify net.safetensors f.safetensors --seed 5 --trials 3 --input-size 9,11 --json")
    document = found.document
    assert (found.code, found.err) == (0, "")
    assert document["equivalent"] is True
    assert document["statement"] == "each number compared, and random inputs run"
    assert (document["seed"], document["trials"], document["computed_in"]) == (5, 3, "float64")
    assert document["input_sizes"] == "given"
    (part,) = document["fusions"]
    assert (part["before"], part["after"]) == (["first", "second", "norm"], ["first"])
    assert part["input_size"] == [3, 9, 11]
    assert part["inputs"]["normal"] == 3
    assert part["mismatch"] is part["rim"] is None
    region = part["interior"]
    assert region["ratio"] == pytest.approx(region["error"] / region["bound"])
    numbers = part["numbers"]
    assert part["ratio"] == max(numbers["ratio"], region["ratio"])
    assert 0.9 < numbers["ratio"] <= 1
    assert (numbers["elements"], numbers["differing"]) == (5 * 3 * 4 * 5 + 5, 0)
    assert region["kind"] in ("normal", "zero", "constant")
    assert 0 < region["error"] <= region["largest_error"]
    assert 0 < region["relative_error"] < 1e-6
    assert len(region["where"]) == 3
    stored = part["run_as_stored"]
    assert stored["dtype"] == "float32"
    assert 0 < stored["difference"] < 1e-5
    assert cli("verify net.safetensors f.safetensors --seed 5 --trials 3 --input-size 9,11 --json").out == found.out
    assert cli("verify net.safetensors f.safetensors --seed 6 --trials 3 --input-size 9,11 --json").out != found.out


def test_what_people_read(net: dict[str, Tensor]) -> None:
    assert fuse(f"net.pt {CHAIN} -o f.pt").code == 0
    found = cli("verify net.pt f.pt")
    lines = found.out.splitlines()
    assert lines[0].split("  ")[0] == "layers"
    assert lines[1].startswith("first → second → norm = first  3x")
    assert lines[1].split("  ")[-1] == "equivalent"
    shares = [float(share) for share in re.findall(r"(\d+)%", lines[1])]
    assert 90 <= shares[0] <= 100
    assert 50 <= shares[1] <= 100
    assert lines[3] == "percentages: the largest error, as a share of what rounding allows; up to 100% is equivalent"
    assert any(line.startswith("run in float32, as stored, outputs differ by up to ") for line in lines)
    assert lines[-2:] == [
        "4 other tensors: bit for bit the same",
        "equivalent, each number compared, and random inputs run",
    ]
    kept = {name: tensor for name, tensor in net.items() if name.startswith(("first.", "second.", "norm."))}
    torch.save(kept, "alone.pt")
    assert fuse(f"alone.pt {CHAIN} -o alone-f.pt").code == 0
    assert "bit for bit" not in cli("verify alone.pt alone-f.pt").out  # no tensor is left to say that of
    assert cli("verify net.pt f.pt --exhaustive").out.endswith(
        "equivalent, every basis vector run: this holds for all inputs of these sizes\n"
    )
    wrong = cli("verify net.pt f.pt --set norm.eps=1e-5")
    assert wrong.code == 1
    assert "output positions differ; worst in channel" in wrong.out
    assert wrong.out.endswith("NOT equivalent\n")


def test_several_sizes_in_one_run_and_by_default_ones_that_the_stride_does_not_divide(net: dict[str, Tensor]) -> None:
    assert fuse("net.pt first second --set first.stride=3,2 -o f.pt").code == 0
    chosen = cli("verify net.pt f.pt --json").document["fusions"]
    heights, widths = ([part["input_size"][axis] for part in chosen] for axis in (1, 2))
    assert len(chosen) == 3
    assert len({n % 3 for n in heights}) == 3
    assert len({n % 2 for n in widths}) == 2
    given = cli("verify net.pt f.pt --input-size 9,10 --input-size 3,14,8 --json").document["fusions"]
    assert [part["input_size"] for part in given] == [[3, 9, 10], [3, 14, 8]]


def test_the_rim_is_apart(net: dict[str, Tensor]) -> None:
    padded = "first second --set first.padding=1 --set second.padding=1"
    assert fuse(f"net.pt {padded} -o f.pt --allow-border").code == 0
    found = cli("verify net.pt f.pt --input-size 7,9 --json")
    assert found.code == 1
    (part,) = found.document["fusions"]
    assert (part["interior"]["equal"], part["rim"]["equal"]) == (True, False)
    text = cli("verify net.pt f.pt --input-size 7,9").out
    assert "first, rim: " in text
    assert "first, interior: " not in text


# --- exit codes


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("verify net.pt missing.pt", 3, "no such file"),
        ("verify net.pt f.pt --before first,second", 2, "--before and --after go together"),
        ("verify net.pt f.pt --input-size 9", 2, "expected 2 spatial sizes"),
        ("verify net.pt f.pt --input-size 4,9,9", 2, "takes 3 channels, not 4"),
        ("verify net.pt f.pt --input-size 2,2", 2, "smaller than the kernel"),
        ("verify net.pt f.pt --input-size x", 2, "--input-size"),
        ("verify net.pt f.pt --trials 0", 2, "no comparison is no proof"),
        ("verify net.pt f.pt --seed -3", 2, "seed: expected an integer from 0"),
        ("verify net.pt f.pt --rtol -1", 2, "finite number of at least 0"),
        ("verify net.pt f.pt --atol inf", 2, "finite number of at least 0"),
        ("verify net.pt f.pt --computed-in float3", 2, "float3"),
        ("verify net.pt f.pt --device nowhere", 2, "--device: torch cannot compute in float64 on 'nowhere' here"),
        ("verify net.pt f.pt --set frist.stride=2", 2, "fits no layer"),
        ("verify net.pt f.pt --before first,secnd --after first", 2, "did you mean second"),
        ("verify net.pt f.pt --before first,deep --after first", 2, "spatial axes"),
        ("verify net.pt f.pt --before first,patch --after first", 2, "channels don't fit"),
        ("verify f.pt net.pt", 2, "holds no record"),
    ],
)
def test_a_question_that_makes_no_sense_is_never_a_verdict(
    net: dict[str, Tensor], line: str, code: int, message: str
) -> None:
    assert fuse("net.pt first second -o f.pt").code == 0
    found = cli(line)
    assert found.code == code
    assert message in found.err.splitlines()[-1]
    assert found.out == ""
    assert cli(f"{line} --json").document["ok"] is False


def test_records_of_different_histories_are_no_pair(net: dict[str, Tensor]) -> None:
    assert fuse("net.pt first second -o one.pt").code == 0
    assert fuse("net.pt second norm --eps 1e-5 -o other.pt").code == 0
    found = cli("verify one.pt other.pt")
    assert found.code == 3
    assert "different histories" in found.err


# --- what is compared


def test_only_the_fusions_since_before_are_run_and_all_of_them_spelled_out(net: dict[str, Tensor]) -> None:
    assert fuse("net.pt first second -o one.pt --name whole --dtype float64").code == 0
    assert fuse("one.pt whole norm --eps 1e-5 -o two.pt --dtype float32").code == 0
    assert fuse("two.pt patch deep -o no.pt").code == 2
    through = cli("verify net.pt two.pt --json").document
    assert {tuple(part["before"]) for part in through["fusions"]} == {("first", "second", "norm")}
    assert through["equivalent"]
    last = cli("verify one.pt two.pt --json").document
    assert {tuple(part["before"]) for part in last["fusions"]} == {("whole", "norm")}
    assert last["equivalent"]


def test_every_recorded_fusion_is_run(net: dict[str, Tensor]) -> None:
    state = {f"{block}.{name}": tensor.clone() for block in "xy" for name, tensor in network().items()}
    save_file(state, "two.safetensors")
    Path("r.toml").write_text('[[fuse]]\nname = "{b}.first"\nchain = ["{b}.first", "{b}.second"]\n')
    assert fuse("two.safetensors --recipe r.toml -o f.safetensors").code == 0
    document = cli("verify two.safetensors f.safetensors --json").document
    assert {part["name"] for part in document["fusions"]} == {"x.first", "y.first"}
    planted, metadata = load_file("f.safetensors"), metadata_of("f.safetensors")
    planted["y.first.weight"][0, 0, 0, 0] += 1
    save_file(planted, "g.safetensors", metadata)
    found = cli("verify two.safetensors g.safetensors --json")
    assert found.code == 1
    assert {part["name"] for part in found.document["fusions"] if not part["equivalent"]} == {"y.first"}


@pytest.mark.parametrize(("name", "other"), [("a", "module.a"), ("x*", "xy"), ("[uv]", "u")])
def test_the_fields_of_a_recorded_layer_are_no_others(name: str, other: str) -> None:
    save_file({f"{key}.weight": real_numbers(n, 3, 3, 2, 2) for n, key in enumerate((name, other))}, "n.safetensors")
    same = "padding = 0, dilation = 1, groups = 1"
    Path("g.toml").write_text(f"'{name}' = {{ stride = [1, 2], {same} }}\n'{other}' = {{ stride = [3, 1], {same} }}\n")
    Path("r.toml").write_text(f"[[fuse]]\nname = 'b'\nchain = ['{other}', '{name}']\n")
    assert cli(f"fuse n.safetensors '{other}' '{name}' -o f.safetensors --name b --geometry g.toml").code == 0
    found = cli("verify n.safetensors f.safetensors --json")
    assert found.code == 0


def test_a_layer_of_another_file_is_not_the_one_of_its_name(net: dict[str, Tensor]) -> None:
    other = {"second.weight": real_numbers(9, 5, 4, 1, 2).float(), "second.bias": real_numbers(10, 5).float()}
    save_file(other, "other.safetensors")
    joined = "first other:second --with other=other.safetensors --set other:second.stride=1,2 -o f.safetensors"
    question = "verify net.safetensors f.safetensors --with other=other.safetensors"
    # The base has no `second`,
    save_file({"first.weight": net["first.weight"]}, "bare.safetensors")
    assert fuse(f"bare.safetensors {joined}").code == 0
    assert cli("verify bare.safetensors f.safetensors --with other=other.safetensors").code == 0
    # one that stays as it is, and can be fused later,
    edits = fuse(f"net.safetensors {joined} --force --json").document["fusions"][0]["edits"]
    assert not any("second" in line for line in edits)
    assert torch.equal(load_file("f.safetensors")["second.weight"], net["second.weight"])
    assert cli(question).code == 0
    assert fuse("f.safetensors second norm --set norm.eps=1e-3 -o g.safetensors").code == 0
    assert cli(question.replace(" f.", " g.")).code == 0
    planted = load_file("f.safetensors")
    planted["second.weight"][1, 2, 1, 0] += 1
    save_file(planted, "f.safetensors", metadata_of("f.safetensors"))
    assert cli(question).code == 1
    # and one that convtool made, of which something is recorded.
    assert fuse("net.safetensors second norm --set second.stride=2 --set norm.eps=1 -o made.safetensors").code == 0
    assert fuse(f"made.safetensors {joined} --force").code == 0
    (made,) = cli("inspect f.safetensors second --json").document["layers"]
    assert made["geometry"]["stride"] == [2, 2]
    verdict = cli(f"{question} --json").document
    assert verdict["equivalent"] is True
    parts = {part["name"]: part["before"] for part in verdict["fusions"]}
    assert parts == {"second": ["second", "norm"], "first": ["first", "other:second"]}


def metadata_of(path: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def test_named_chains_of_any_length_on_both_sides(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors first second -o f.safetensors --name whole").code == 0
    for sides in ("--before first,second --after whole", "--before first,second,norm --after whole,norm"):
        found = plain(f"verify net.safetensors f.safetensors {sides} --eps 1e-5 --json")
        assert found.code == 0
        assert found.document["other_tensors"]["differing"] == {}
        alone = plain(f"verify net.safetensors f.safetensors {sides} --eps 1e-5 --only --json")
        assert (alone.code, alone.document["other_tensors"]) == (0, None)
        assert alone.document["statement"].endswith("; of the layers named alone")
    assert cli("verify net.safetensors net.safetensors --before first --after first").code == 0
    assert cli("verify net.safetensors net.safetensors --before first --after patch --input-size 8,8").code == 1
    assert plain("verify net.safetensors f.safetensors --before first,second --after 'whole,scale(2)'").code == 1


def test_a_patch_convolution_and_the_linear_layer_that_it_is(net: dict[str, Tensor]) -> None:
    as_linear = {"patch.weight": net["patch.weight"].reshape(8, -1), "patch.bias": net["patch.bias"]}
    save_file(as_linear, "linear.safetensors")
    question = "verify net.safetensors linear.safetensors --before patch --after 'flatten(4,2),patch' --only"
    assert cli(f"{question} --input-size 4,2 --exhaustive").code == 0
    as_linear["patch.weight"] = net["patch.weight"].mT.reshape(8, -1).contiguous()
    save_file(as_linear, "linear.safetensors")
    assert cli(f"{question} --input-size 4,2").code == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--as-linear patch --set patch.stride=4,2", "patch"),
        ("--as-toeplitz first=3,5,6 --set first.stride=2,1 --set first.padding=1,0", "first"),
    ],
)
def test_a_converted_layer_by_its_record(net: dict[str, Tensor], options: str, name: str) -> None:
    assert plain(f"convert net.safetensors c.safetensors {options}").code == 0
    assert cli("verify net.safetensors c.safetensors").code == 0
    converted = load_file("c.safetensors")
    weight = converted[f"{name}.weight"]
    place = tuple(int(i) for i in torch.unravel_index(weight.abs().argmax(), weight.shape))
    for _ in range(2):
        weight[place] = torch.nextafter(weight[place], torch.tensor(math.inf))
    save_file(converted, "d.safetensors", metadata_of("c.safetensors"))
    assert cli("verify net.safetensors d.safetensors").code == 1


def test_every_usage_error_names_the_option_that_was_typed(net: dict[str, Tensor]) -> None:
    for option, value in [
        ("--computed-in", "int8"),
        ("--computed-in", "complex64"),
        ("--trials", "0"),
        ("--seed", "-1"),
        ("--rtol", "-1"),
        ("--atol", "nan"),
        ("--device", "nowhere"),
        ("--device", "meta"),
        ("--input-size", "5,x"),
    ]:
        found = cli(f"verify net.pt net.pt --before first --after first {option} {value}")
        assert found.code == 2
        assert found.message.startswith(f"{option}: ")
    found = cli("verify net.pt net.pt --before first --after second")
    assert (found.code, found.message) == (
        2,
        "channels don't fit: second takes 4 channels, and the chain in BEFORE gives 3",
    )
    found = cli("verify net.pt net.pt --model-input 3,4,5")
    assert (found.code, found.message) == (2, "--model-input: goes with --model")


def test_names_are_parted_at_commas_outside_of_parentheses() -> None:
    assert split_names("a,b") == ["a", "b"]
    assert split_names("flatten(7,7), head") == ["flatten(7,7)", "head"]
    assert split_names("pad(0:1,2:2),conv,avg_pool(2,3; padding=1,0)") == [
        "pad(0:1,2:2)",
        "conv",
        "avg_pool(2,3; padding=1,0)",
    ]
    assert split_names("") == [""]


def test_tensors_that_changed_vanished_or_appeared_are_named(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors first second -o f.safetensors").code == 0
    fused, metadata = load_file("f.safetensors"), metadata_of("f.safetensors")
    fused["line.weight"][0, 0] = -fused["line.weight"][0, 0]
    fused["second.weight"] = net["second.weight"]  # which the record says is gone
    del fused["norm.bias"]
    save_file(fused, "g.safetensors", metadata)
    found = cli("verify net.safetensors g.safetensors --json")
    assert found.code == 1
    assert found.document["other_tensors"]["differing"] == {
        "line.weight": "changed",
        "norm.bias": "missing",
        "second.weight": "new",
    }
    text = cli("verify net.safetensors g.safetensors").out
    assert "norm.bias: missing, and no fusion accounts for it\n" in text
    assert "other tensors that differ, are missing or are new: 3\n" in text


def test_a_tolerance_instead_of_the_bound(net: dict[str, Tensor]) -> None:
    assert fuse("net.pt first second -o f.pt --dtype float16").code == 0
    assert cli("verify net.pt f.pt").code == 0
    assert cli("verify net.pt f.pt --rtol 1e-9").code == 1
    loose = cli("verify net.pt f.pt --rtol 1e-2 --atol 100 --json")
    assert loose.code == 0
    assert loose.document["tolerance"] == {"rtol": 1e-2, "atol": 100}


# --- fused by torch


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_torch_fuses_in_lower_precision_passes_with_computed_in(name: str, groups: int) -> None:
    dtype = getattr(torch, name)
    torch.manual_seed(3)
    conv, norm = nn.Conv2d(4, 6, (3, 2), groups=groups).to(dtype).eval(), nn.BatchNorm2d(6, eps=1e-3).to(dtype).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        assert tensor is not None
        tensor.data.copy_(torch.randn(6) * 3)
    assert norm.running_var is not None
    norm.running_var.copy_(torch.rand(6) + 0.05)
    # In the first channel the bias cancels: what is left of it is rounding of numbers many times its size.
    with torch.no_grad():
        assert conv.bias is not None
        gain = norm.weight[0].double() / (norm.running_var[0].double() + 1e-3).sqrt()
        norm.bias[0] = -((conv.bias[0].double() - norm.running_mean[0].double()) * gain)  # type: ignore[index]
    fused = fuse_conv_bn_eval(conv, norm)
    save_file(nn.ModuleDict({"conv": conv, "norm": norm}).state_dict(), "net.safetensors")
    save_file({f"conv.{key}": value.contiguous() for key, value in fused.state_dict().items()}, "torch.safetensors")
    question = "verify net.safetensors torch.safetensors --before conv,norm --after conv --set norm.eps=1e-3"
    question += f" --set conv.groups={groups}"
    assert cli(f"{question} --computed-in {name}").code == 0
    assert cli(question).code == 1, "not what float64 gives, rounded once"
    off = {f"conv.{key}": value.clone() for key, value in fused.state_dict().items()}
    off["conv.weight"][2, 1, 2, 0] *= 1 + 60 * torch.finfo(dtype).eps
    save_file(off, "torch.safetensors")
    assert cli(f"{question} --computed-in {name}").code == 1


def test_a_model_rounded_layer_by_layer_is_what_rounding_can_do(net: dict[str, Tensor]) -> None:
    assert cli("convert net.safetensors half.safetensors --dtype bfloat16").code == 0
    question = "verify net.safetensors half.safetensors --before first,second,norm --after first,second,norm --only"
    question += " --eps 1e-5 --geometry plain.toml"
    assert cli(question).code == 0
    half = load_file("half.safetensors")
    half["norm.running_var"][3] *= 1.02  # two units in its last place
    save_file(half, "half.safetensors")
    assert cli(question).code == 1


# By how many half units in their last places variance and weight were something else before they were stored.
@pytest.mark.parametrize(
    ("variance_off", "weight_off", "code"),
    [
        *((0, 0, 0), (0.5, 0, 0), (-1, 1, 0), (1, -1, 0), (-1, None, 0), (1, None, 0)),
        *((-3, 3, 1), (3, -3, 1), (0, 3, 1), (-6, 0, 1), (6, 0, 1), (-1.5, None, 1), (1.5, None, 1)),
    ],
)
@pytest.mark.parametrize("variance", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_norm_is_held_against_what_storing_it_can_do_and_no_more(
    dtype: torch.dtype, variance: float, variance_off: float, weight_off: float | None, code: int
) -> None:
    def norm(after: bool) -> dict[str, Tensor]:
        numbers = {"norm.running_var": (1.25 * variance, variance_off), "norm.weight": (1.5, weight_off)}
        state = {"norm.running_mean": torch.zeros(1), "one.weight": torch.ones(1, 1, 1, 1)}
        for name, (number, off) in numbers.items():
            if off is None:
                continue
            stored = torch.tensor([number], dtype=dtype)
            half = (stored.nextafter(stored * 2) - stored).double() / 2
            state[name] = stored if after else stored.double() + off * half
        return {name: tensor if after and name in numbers else tensor.double() for name, tensor in state.items()}

    save_file(norm(after=False), "exact.safetensors")
    save_file(norm(after=True), "stored.safetensors")
    question = "verify exact.safetensors stored.safetensors --before one,norm --after one,norm"
    found = cli(f"{question} --set norm.eps=1e-4 --input-size 1,1,1 --json")
    assert found.code == code
    (part,) = found.document["fusions"]
    if abs(variance_off) == 1:  # as far as storing goes, to the same side: the bound is met and not just kept
        assert 0.98 < part["ratio"] <= 1


# --- fuse verifies before it publishes


def test_fuse_says_what_it_verified(net: dict[str, Tensor]) -> None:
    shown = fuse(f"net.pt {CHAIN} -o f.pt").out
    assert re.search(r"\n  proved number by number: none of \d+ is further off than rounding can put it\n", shown)
    (fusion,) = fuse(f"net.pt {CHAIN} -o f.pt --force --json").document["fusions"]
    assert 0.9 < fusion["verified"]["ratio"] <= 1
    assert fusion["verified"]["numbers"] == fusion["parameters"]["after"]
    (border,) = fuse("net.pt first second --set second.padding=1 --allow-border -o f.pt --force --json").document[
        "fusions"
    ]
    assert border["verified"]["ratio"] <= 1
    (apart,) = fuse(f"net.pt {CHAIN} -o f.pt --force --no-verify --json").document["fusions"]
    assert apart["verified"] is None
    assert "verified" not in fuse(f"net.pt {CHAIN} -o f.pt --force --no-verify").out


def test_a_fusion_that_went_wrong_is_not_written(
    net: dict[str, Tensor], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convtool.core.fuse
    from convtool.core.compose import compose_chain

    def wrong(chain: Any) -> Conv:
        fused = compose_chain(chain)
        fused.weight.view(-1)[0] *= 1 + 1e-6  # a few units in the last place of float32
        return fused

    monkeypatch.setattr(convtool.core.fuse, "compose_chain", wrong)
    before = {path: path.read_bytes() for path in here.iterdir()}
    found = fuse("net.pt first second -o f.pt")
    assert found.code == 70
    assert "made of first, second, differs from them in 1 numbers" in found.err
    assert found.out == ""
    assert {path: path.read_bytes() for path in here.iterdir()} == before
    assert fuse("net.pt first second -o f.pt --no-verify").code == 0
    assert cli("verify net.pt f.pt").code == 1


def test_a_dry_run_verifies_too(net: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def check(layer: Any, checkpoints: Any, progress: Any) -> Any:
        asked.append(layer.name)
        return check_planned(layer, checkpoints, progress)

    monkeypatch.setattr("convtool.fusing.proof.check_planned", check)
    assert fuse("net.pt first second -o f.pt --dry-run").code == 0
    assert asked == ["first"]


# --- matrices


def test_a_layer_and_its_matrix_by_the_files_own_record(net: dict[str, Tensor]) -> None:
    made = "first --stride 2,1 --padding 1,0 --input-size 6,7"
    told = "--before first --set first.stride=2,1 --set first.padding=1,0 --input-size 6,7 --geometry plain.toml"
    for out, options in (
        ("m.npz", ""),
        ("m.npz", "--transpose --affine"),
        ("m.safetensors", "--rows 3:17"),
        ("m.safetensors", "--dtype float16"),
        ("m.safetensors", "--layout dense --affine"),
        ("m.safetensors", "--layout dense --transpose"),
        ("m.pt", "--transpose"),
        ("m.pt", "--affine --rows 3:17"),
        ("m.npz", "--layout coo --dtype float64"),
        ("m.npy", "--transpose"),
        ("m.npy", "--affine"),
    ):
        assert cli(f"toeplitz net.pt {made} -o {out} {options} --force").code == 0
        found = cli(f"verify net.pt {out} {told if out == 'm.npy' else ''} --json")
        assert found.code == 0, (out, options, found.out)
        matrix = found.document["matrix"]
        assert matrix["of"] == "first"
        assert matrix["ratio"] <= 1
        assert matrix["entries"]["positions"] > 0
        assert matrix["products"]["equal"]
        assert matrix["bias_missing"] is (out == "m.npy" and "affine" not in options)


def test_a_matrix_that_is_not_the_layers(net: dict[str, Tensor]) -> None:
    assert cli("toeplitz net.pt first --input-size 6,7 -o m.npy").code == 0
    question = "verify net.pt m.npy --before first --input-size 6,7 --geometry plain.toml"
    assert cli(question).code == 0
    matrix = np.load("m.npy")
    row, column = (int(i) for i in np.argwhere(matrix)[37])
    matrix[row, column] = np.nextafter(matrix[row, column], np.float32(9))
    np.save("m.npy", matrix)
    found = cli(f"{question} --json")
    assert found.code == 1
    assert found.document["matrix"]["entries"]["where"] == [row, column]
    assert found.document["matrix"]["entries"]["differing"] == 1
    assert (
        f"entries: 1 of {np.count_nonzero(matrix)} differ; worst at row, column {row}, {column}:" in cli(question).out
    )
    shape = plain("verify net.pt m.npy --before first --input-size 7,6")
    assert shape.code == 1
    assert "the layer's matrix is" in shape.out
    wrong = plain("verify net.pt m.npy --before first --input-size 6,7 --set first.stride=2")
    assert wrong.code == 1


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("verify net.pt m.npy", 2, "doesn't say which layer it is of; name it with --before"),
        ("verify net.pt m.npy --before first", 2, "give --input-size"),
        ("verify net.pt m.npy --before frist --input-size 6,7", 2, "did you mean first"),
        ("verify net.pt m.npy --before first --input-size 6,7 --input-size 5,7", 2, "one input size"),
        ("verify m.npy net.pt", 2, "the matrix is AFTER"),
        ("verify m.npy m.npy --before first", 2, "BEFORE is a matrix file"),
        ("verify net.pt m.npy --before first --input-size 6,7 --rtol 1", 2, "--rtol: doesn't go with a matrix"),
        ("verify net.pt missing.npz", 3, "no such file"),
        ("verify net.pt broken.npz", 3, "broken.npz"),
        ("verify net.pt whole.npy --before first --input-size 6,7", 3, "floating-point"),
    ],
)
def test_questions_about_matrices_that_make_no_sense(
    net: dict[str, Tensor], line: str, code: int, message: str
) -> None:
    assert cli("toeplitz net.pt first --input-size 6,7 -o m.npy").code == 0
    Path("broken.npz").write_bytes(b"PK\x03\x04 nothing")
    np.save("whole.npy", np.load("m.npy").astype(np.int64))
    found = cli(line)
    assert found.code == code
    assert message in found.err.splitlines()[-1]
    assert cli(f"{line} --json").document["ok"] is False


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt", "mtx"])
def test_a_matrix_is_stored_in_the_dtype_that_its_record_says(net: dict[str, Tensor], suffix: str) -> None:
    """Half the precision loosens the bound, so it mustn't come unsaid."""
    assert cli(f"toeplitz net.safetensors patch --input-size 8,6 -o m.{suffix}").code == 0
    assert cli(f"verify net.safetensors m.{suffix}").code == 0


def test_a_matrix_in_another_dtype_than_recorded_is_another_matrix(net: dict[str, Tensor]) -> None:
    assert cli("toeplitz net.safetensors patch --input-size 8,6 -o m.safetensors").code == 0
    with safe_open("m.safetensors", "pt") as opened:
        metadata = opened.metadata()
    arrays = load_file("m.safetensors")
    arrays["data"] = arrays["data"].to(torch.bfloat16)
    save_file(arrays, "half.safetensors", metadata)
    found = cli("verify net.safetensors half.safetensors")
    assert found.code == 1
    assert "it is stored in bfloat16, and its record says 'float32'" in found.out


def test_two_matrices(net: dict[str, Tensor]) -> None:
    made = "toeplitz net.pt first --input-size 6,7"
    assert cli(f"{made} -o one.npz").code == 0
    assert cli(f"{made} -o dense.safetensors --layout dense").code == 0
    assert cli(f"{made} -o half.pt --layout coo --dtype bfloat16").code == 0
    assert cli(f"{made} -o wide.npz --stride 2").code == 0
    for pair, code in (
        ("one.npz one.npz", 0),
        ("one.npz dense.safetensors", 0),
        ("dense.safetensors one.npz", 0),
        ("one.npz half.pt", 0),
        ("half.pt one.npz", 1),  # BEFORE is what is exact
        ("one.npz wide.npz", 1),
    ):
        found = cli(f"verify {pair} --json")
        assert found.code == code, pair
        assert found.document["equivalent"] is (code == 0)


def test_a_matrix_of_a_linear_layer_and_of_a_batch_norm(net: dict[str, Tensor]) -> None:
    assert cli("toeplitz net.pt line -o line.npz").code == 0
    assert cli("verify net.pt line.npz").code == 0
    assert cli("toeplitz net.pt norm --input-size 5,3,4 --set norm.eps=0.5 -o norm.npz").code == 0
    assert cli("verify net.pt norm.npz").code == 0
    assert cli("verify net.pt norm.npz --set norm.eps=0.25").code == 1


def test_the_largest_numbers_stay_valid_json(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors first second -o f.safetensors").code == 0
    fused = load_file("f.safetensors")
    fused["first.weight"][0, 0, 0, 0] = torch.finfo(torch.float32).max
    fused["first.bias"][1] = -torch.finfo(torch.float32).max
    save_file(fused, "g.safetensors", metadata_of("f.safetensors"))
    found = cli("verify net.safetensors g.safetensors --json")
    assert found.code == 1
    assert math.isfinite(float(found.document["fusions"][0]["interior"]["error"]))


def test_a_document_is_ok_exactly_where_the_exit_code_is_0(net: dict[str, Tensor]) -> None:
    torch.save({**net, "first.weight": net["first.weight"] * 1.5}, "other.pt")
    for line, code in (("verify net.pt net.pt", 0), ("verify net.pt other.pt", 1), ("verify net.pt missing.pt", 3)):
        found = cli(f"{line} --before first --after first --input-size 9,8 --json")
        assert (found.code, found.document["ok"]) == (code, code == 0)


def test_a_pair_that_is_named_leaves_no_other_tensor_out(net: dict[str, Tensor]) -> None:
    assert fuse("net.pt first second -o f.pt").code == 0
    pair = "--before first,second --after first --geometry plain.toml"
    assert cli(f"verify net.pt f.pt {pair}").code == 0
    state = torch.load("f.pt")
    torch.save({**state, "patch.weight": state["patch.weight"] * 5}, "tampered.pt")
    found = cli(f"verify net.pt tampered.pt {pair}")
    assert found.code == 1
    assert "patch.weight" in found.out
    torch.save({name: tensor for name, tensor in state.items() if name != "patch.bias"}, "lacking.pt")
    assert cli(f"verify net.pt lacking.pt {pair}").code == 1
    assert cli(f"verify net.pt lacking.pt {pair} --only").code == 0


def test_every_pair_is_looked_at(net: dict[str, Tensor]) -> None:
    assert fuse("net.pt first second -o f.pt").code == 0
    wrong, right = "--before patch --after first", "--before first,second --after first"
    right += " --geometry plain.toml"
    for pairs in (f"{wrong} {right}", f"{right} {wrong}"):
        assert cli(f"verify net.pt f.pt {pairs} --input-size 9,8").code in (1, 2)
    same = "--before patch --after patch"
    found = cli(f"verify net.pt f.pt {right} {same} --input-size 9,8 --json")
    assert (found.code, [one["name"] for one in found.document["fusions"]]) == (0, ["first", "patch"])
    assert cli(f"verify net.pt f.pt {right} --before patch").message.startswith("--before and --after go together")


def test_what_is_named_stands_in_place_of_the_record_and_the_rest_of_it_stands(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors first second -o one.safetensors").code == 0
    assert fuse("one.safetensors patch 'scale(2)' -o two.safetensors").code == 0
    found = plain("verify net.safetensors two.safetensors --before first,second --after first --json")
    assert (found.code, [one["name"] for one in found.document["fusions"]]) == (0, ["first", "patch"])
    assert cli("verify net.safetensors two.safetensors --before patch --after patch --input-size 8,8").code == 1


def recorded(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(metadata_of(path)["convtool"])
    return found


def test_the_verdict_prints_what_it_takes_from_the_record(net: dict[str, Tensor]) -> None:
    settings = "--set norm.eps=1e-2 --set second.stride=2,1"
    assert fuse(f"net.safetensors second norm {settings} -o f.safetensors").code == 0
    found = cli("verify net.safetensors f.safetensors")
    assert found.code == 0
    assert "no tensor of BEFORE shows:\n" in found.out
    assert "\n  norm: eps 0.01\n" in found.out
    assert "\n  second: stride 2,1, padding" in found.out
    # What somebody else states is no claim of the record's.
    stated = cli("verify net.safetensors f.safetensors --set norm.eps=1e-2 --json")
    assert {claim.partition(":")[0] for claim in stated.document["claims"]} == {"second", "the fused second"}
    # What stands between the layers only a run of the network shows.
    assert "\n  the fused second: nothing stands between the layers that follow each other in it\n" in found.out


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        # What both layers have in common is one line;
        ("", ["first, second: stride 1, padding 0, dilation 1, groups 1"]),
        # by fields it would take three lines, and by layers two.
        ("--set second.stride=2,1", ["first: stride 1, padding 0", "second: stride 2,1, padding 0"]),
    ],
)
def test_what_a_record_claims_is_said_by_field_or_by_layer_whichever_is_shorter(
    settings: str, lines: list[str], net: dict[str, Tensor]
) -> None:
    assert fuse(f"net.safetensors first second {settings} -o f.safetensors").code == 0
    claims = re.compile("^  (.*)$", re.MULTILINE)
    said = claims.findall(cli("verify net.safetensors f.safetensors").out)
    assert said.pop() == "the fused first: nothing stands between the layers that follow each other in it"
    assert [one.startswith(line) for one, line in zip(said, lines, strict=True)] == [True] * len(lines)
    detailed = claims.findall(cli("verify net.safetensors f.safetensors --details").out)
    assert [one.partition(":")[0] for one in detailed] == ["first", "second", "the fused first"]


def test_a_fusion_of_a_layer_with_itself_cannot_buy_a_tolerance(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors first second -o f.safetensors").code == 0
    record, tensors = recorded("f.safetensors"), load_file("f.safetensors")
    itself = {"name": "first", "kind": "conv", "fields": {}}
    again = {**record["fusions"][0], "dtype": "bfloat16", "sources": {"chain": [itself]}}
    tensors["first.weight"] *= 1.001

    def with_fusion(more: dict[str, Any]) -> dict[str, str]:
        return {"convtool": json.dumps({**record, "fusions": [*record["fusions"], more]})}

    def written(name: str, kind: str) -> dict[str, Any]:
        return {"name": name, "kind": kind, "fields": {}}

    one = written("identity()", "identity")
    for nothing in ([itself], [itself, one], [one, written("avg_pool(1)", "avg_pool"), itself]):
        save_file(tensors, "wrong.safetensors", with_fusion({**again, "sources": {"chain": nothing}}))
        found = cli("verify net.safetensors wrong.safetensors")
        assert found.code == 3
        assert "is said to be fused from itself alone" in found.err
    # A step that does something is allowed for, and the verdict says so.
    step = {**again, "sources": {"chain": [itself, written("scale(2)", "scale")]}}
    save_file(tensors, "step.safetensors", with_fusion(step))
    found = cli("verify net.safetensors step.safetensors --json")
    assert found.document["statement"].endswith("roundings in between, as AFTER records: 1 to float32")


def test_what_is_stored_in_another_dtype_than_recorded_is_no_fusion_of_the_record(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors first second -o f.safetensors").code == 0
    tensors = load_file("f.safetensors")
    tensors["first.weight"] = tensors["first.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, "stored.safetensors", metadata_of("f.safetensors"))
    found = cli("verify net.safetensors stored.safetensors")
    assert found.code == 1
    assert "first.weight: isn't stored in the dtype that AFTER records" in found.out


def test_taps_that_no_output_reads_are_said_of_the_verdict(net: dict[str, Tensor]) -> None:
    state = {"a.weight": torch.ones(2, 2, 3, 3), "n.running_mean": torch.ones(2), "n.running_var": torch.ones(2)}
    torch.save(state, "small.pt")
    assert fuse("small.pt a n --eps 1e-5 --set a.padding=1 --input-size 1,1 -o f.pt").code == 0
    found = cli("verify small.pt f.pt --input-size 1,1")
    assert found.code == 0
    assert "1 of 9 taps are read at these sizes, and nothing is said of the others" in found.out.splitlines()[-1]


def test_a_claim_that_equals_the_default_is_printed_like_any_other(net: dict[str, Tensor]) -> None:
    assert fuse("net.safetensors second norm --eps 1e-5 -o f.safetensors").code == 0
    found = cli("verify net.safetensors f.safetensors")
    assert "shows:\n  second: stride 1, padding 0, dilation 1, groups 1\n" in found.out


def test_swapped_checkpoints_are_told(net: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    from convtool.cli.app import run_app

    assert run_app(["fuse", "net.pt", "first", "second", "--geometry", "plain.toml", "-o", "fused.pt", "-q"]) == 0
    assert run_app(["verify", "fused.pt", "net.pt"]) == 2
    assert "BEFORE comes first: convtool verify net.pt fused.pt" in capsys.readouterr().err
