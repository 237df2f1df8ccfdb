"""Faults planted into correct fused checkpoints: each is found, in every dtype, and nothing where there is none.

The table of what each costs, in ratios of error to bound:

    python tests/test_fault_injection.py
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import real_numbers
from checkpoints import fitted
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convtool.cli.app import run_app
from convtool.core.rounding import rounded

DTYPES = ("float32", "bfloat16", "float16")
State = dict[str, Tensor]

# A grouped convolution with a stride, a padding on one side more than on the other, and a bias; a batch norm of an eps
# that isn't the default; a grouped convolution. The fused kernel is 5x3 in 2 groups, its width and height not alike.
FIELDS: tuple[str, ...] = ("first.stride=2", "first.padding=1:2,0:1", "first.groups=2", "norm.eps=1e-3")
FIELDS += ("first.dilation=1", "second.stride=1", "second.padding=0", "second.dilation=1", "second.groups=2")
# a chain that can be transposed without its shape telling: 3x3 after 1x1
SQUARE = ("wide.stride=1", "wide.padding=1", "wide.groups=1", "narrow.stride=1", "narrow.padding=0")


def network(dtype: torch.dtype) -> State:
    """The layers, some that nothing is done to, in one dtype."""
    shapes = {
        "first.weight": (6, 2, 3, 2),
        "first.bias": (6,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "norm.running_mean": (6,),
        "second.weight": (8, 3, 2, 2),
        "second.bias": (8,),
        "wide.weight": (5, 3, 3, 3),
        "narrow.weight": (4, 5, 1, 1),
        "narrow.bias": (4,),
        "head.weight": (7, 8),
        "head.bias": (7,),
    }
    state = {name: rounded(real_numbers(7 + seed, *shape), dtype) for seed, (name, shape) in enumerate(shapes.items())}
    state["norm.running_var"] = rounded(real_numbers(99, 6).square() * 0.02 + 0.01, dtype)
    state["norm.num_batches_tracked"] = torch.tensor(41)
    return state


@dataclass(frozen=True)
class Fused:
    """A network, and it with both chains fused, as files in a folder."""

    folder: Path
    tensors: State
    record: dict[str, Any]

    def verify(self, tensors: State, record: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Exit code and document of `verify` for a checkpoint with these tensors and this record."""
        save_file(tensors, self.folder / "planted.safetensors", {"convtool": json.dumps(record)})
        return run_json("verify", self.folder / "net.safetensors", self.folder / "planted.safetensors")


def run_json(*arguments: object) -> tuple[int, dict[str, Any]]:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        code = run_app([*map(str, arguments), "--json"])
    document = json.loads(out.getvalue())
    assert isinstance(document, dict)
    return code, document


def make(dtype: str, folder: Path) -> Fused:
    net, half, whole = (folder / f"{name}.safetensors" for name in ("net", "half", "fused"))
    save_file(network(getattr(torch, dtype)), net)
    settings = [word for text in FIELDS for word in ("--set", text)]
    assert run_json("fuse", net, "first", "norm", "second", "-o", half, *settings)[0] == 0
    settings = [word for text in SQUARE for word in ("--set", text)]
    assert run_json("fuse", half, "wide", "narrow", "-o", whole, *settings)[0] == 0
    with safe_open(whole, framework="pt") as opened:
        record = json.loads(opened.metadata()["convtool"])
    return Fused(folder, load_file(whole), record)


# --- faults: each changes tensors or the record in place

Fault = Callable[[State, dict[str, Any]], None]


def largest(tensor: Tensor) -> tuple[int, ...]:
    place = torch.unravel_index(tensor.abs().float().argmax(), tensor.shape)
    return tuple(int(i) for i in place)


def two_units_off(tensor: Tensor, place: tuple[int, ...], units: int = 2) -> None:
    away = torch.copysign(torch.full((), math.inf, dtype=tensor.dtype), tensor[place])
    for _ in range(units):
        tensor[place] = torch.nextafter(tensor[place], away)


def largest_weight_off(state: State, record: dict[str, Any]) -> None:
    two_units_off(state["first.weight"], largest(state["first.weight"]))


def largest_bias_off(state: State, record: dict[str, Any]) -> None:
    two_units_off(state["first.bias"], largest(state["first.bias"]))


def smallest_weight_off(state: State, record: dict[str, Any]) -> None:
    weight = state["first.weight"]
    place = torch.unravel_index(torch.where(weight == 0, math.inf, weight.abs().float()).argmin(), weight.shape)
    two_units_off(weight, tuple(int(i) for i in place))


def flipped(state: State, record: dict[str, Any]) -> None:
    state["first.weight"] = state["first.weight"].flip(-1, -2).contiguous()


def flipped_along_height(state: State, record: dict[str, Any]) -> None:
    state["first.weight"] = state["first.weight"].flip(-2).contiguous()


def height_and_width_swapped(state: State, record: dict[str, Any]) -> None:
    state["wide.weight"] = state["wide.weight"].mT.contiguous()


def padding_swapped(state: State, record: dict[str, Any]) -> None:
    fields = fused_fields(record, "first")
    fields["padding"] = fields["padding"][::-1]


def bias_dropped(state: State, record: dict[str, Any]) -> None:
    del state["first.bias"]


def first_bias_forgotten(state: State, record: dict[str, Any]) -> None:
    state["first.bias"] = network(state["first.bias"].dtype)["second.bias"]


def output_channels_swapped(state: State, record: dict[str, Any]) -> None:
    for name in ("first.weight", "first.bias"):
        state[name][[2, 3]] = state[name][[3, 2]]


def input_channels_swapped(state: State, record: dict[str, Any]) -> None:
    state["first.weight"][:, [0, 1]] = state["first.weight"][:, [1, 0]]


def groups_permuted(state: State, record: dict[str, Any]) -> None:
    weight = state["first.weight"]
    state["first.weight"] = torch.cat([weight[4:], weight[:4]])


def padding_off_by_one_on_one_side(state: State, record: dict[str, Any]) -> None:
    fused_fields(record, "first")["padding"][0][0] += 1


def padding_moved_to_the_other_side(state: State, record: dict[str, Any]) -> None:
    fused_fields(record, "wide")["padding"][1] = [2, 0]


def wrong_eps(state: State, record: dict[str, Any]) -> None:
    """What fusing with the default eps gives, under a record that says the right one."""
    folder = Path(tempfile.mkdtemp())
    dtype = state["first.weight"].dtype
    save_file(network(dtype), folder / "net.safetensors")
    settings = [word for text in FIELDS if "eps" not in text for word in ("--set", text)]
    chain = ("fuse", folder / "net.safetensors", "first", "norm", "second", "-o", folder / "out.safetensors")
    assert run_json(*chain, *settings, "--assume", "eps")[0] == 0
    other = load_file(folder / "out.safetensors")
    state.update({name: other[name] for name in ("first.weight", "first.bias")})


def corner_tap_zeroed(state: State, record: dict[str, Any]) -> None:
    state["first.weight"][3, 1, 0, 0] = 0


def stride_halved(state: State, record: dict[str, Any]) -> None:
    fused_fields(record, "first")["stride"] = [1, 1]


def errors_that_cancel(state: State, record: dict[str, Any]) -> None:
    """Two entries of one output off by the same amount in opposite directions: no sum of outputs shows it."""
    weight = state["first.weight"]
    step = torch.finfo(weight.dtype).eps * 8 * float(weight.abs().max())
    weight[1, 0, 2, 1] += step
    weight[1, 1, 0, 2] -= step


def not_a_number(state: State, record: dict[str, Any]) -> None:
    state["first.weight"][4, 0, 1, 1] = math.nan


def infinite(state: State, record: dict[str, Any]) -> None:
    state["wide.bias"][0] = math.inf


def one_bit_elsewhere(state: State, record: dict[str, Any]) -> None:
    tensor = state["head.weight"]
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[6, 3] ^= 1


def tensor_back(state: State, record: dict[str, Any]) -> None:
    state["norm.num_batches_tracked"] = torch.tensor(41)


def tensor_gone(state: State, record: dict[str, Any]) -> None:
    del state["head.bias"]


def tensor_of_another_dtype(state: State, record: dict[str, Any]) -> None:
    state["head.weight"] = state["head.weight"].double()


def fused_fields(record: dict[str, Any], name: str) -> dict[str, Any]:
    fields = next(fusion["fields"] for fusion in record["fusions"] if fusion["name"] == name)
    assert isinstance(fields, dict)
    return fields


FAULTS: tuple[tuple[str, Fault], ...] = (
    ("largest weight off by 2 units in its last place", largest_weight_off),
    ("smallest weight off by 2 units in its last place", smallest_weight_off),
    ("largest bias off by 2 units in its last place", largest_bias_off),
    ("kernel flipped", flipped),
    ("kernel flipped along its height", flipped_along_height),
    ("height and width swapped in a square kernel", height_and_width_swapped),
    ("padding of height and width swapped", padding_swapped),
    ("bias dropped", bias_dropped),
    ("bias of the first layers forgotten", first_bias_forgotten),
    ("two output channels swapped", output_channels_swapped),
    ("two input channels swapped", input_channels_swapped),
    ("groups permuted", groups_permuted),
    ("padding off by one on one side", padding_off_by_one_on_one_side),
    ("padding moved to the other side", padding_moved_to_the_other_side),
    ("eps of the batch norm wrong", wrong_eps),
    ("one corner tap zeroed", corner_tap_zeroed),
    ("stride halved", stride_halved),
    ("two errors that cancel in the sum", errors_that_cancel),
    ("NaN", not_a_number),
    ("infinity", infinite),
    ("one bit of another tensor", one_bit_elsewhere),
    ("a tensor that was taken out is back", tensor_back),
    ("another tensor gone", tensor_gone),
    ("another tensor of another dtype", tensor_of_another_dtype),
)
NOT_FINITE = ("NaN", "infinity")  # the file is refused for holding them, exit code 3
ELSEWHERE = (
    *("one bit of another tensor", "a tensor that was taken out is back"),
    *("another tensor gone", "another tensor of another dtype"),
)


def plant(fused: Fused, fault: Fault) -> tuple[int, dict[str, Any]]:
    tensors = {name: tensor.clone() for name, tensor in fused.tensors.items()}
    record = json.loads(json.dumps(fused.record))
    fault(tensors, record)
    return fused.verify(tensors, fitted(record, tensors))


def cost(code: int, document: dict[str, Any]) -> str:
    """What the fault costs, for the table."""
    if code == 3:
        return "refused"
    if document["other_tensors"]["differing"]:
        return ", ".join(document["other_tensors"]["differing"].values())
    worst = [part for part in document["fusions"] if not part["equivalent"]]
    if worst[0]["mismatch"]:
        return str(worst[0]["mismatch"]).partition(":")[0]
    return f"{max(float(part['ratio']) for part in worst):.3g}"


@pytest.fixture(scope="module", params=DTYPES)
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def test_without_a_fault_nothing_is_found(fused: Fused) -> None:
    code, document = plant(fused, lambda state, record: None)
    assert code == 0
    assert document["equivalent"]
    assert all(0.9 < part["ratio"] <= 1 for part in document["fusions"])
    assert {part["name"] for part in document["fusions"]} == {"first", "wide"}
    assert document["other_tensors"] == {"compared": 2, "differing": {}, "by_random_inputs": False}


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[name for name, _ in FAULTS])
def test_a_fault_is_found(fused: Fused, name: str, fault: Fault) -> None:
    code, document = plant(fused, fault)
    if name in NOT_FINITE:
        assert code == 3
        assert "holds inf or NaN" in document["error"]["message"]
        return
    assert code == 1
    assert document["equivalent"] is False
    differing = document["other_tensors"]["differing"]
    assert bool(differing) == (name in ELSEWHERE)
    wrong = {part["name"] for part in document["fusions"] if not part["equivalent"]}
    square = name in ("height and width swapped in a square kernel", "padding moved to the other side")
    assert wrong == (set() if name in ELSEWHERE else {"wide" if square else "first"})


# --- layers with other borders, a depthwise one, and a bias map


def make_others(dtype: str, folder: Path) -> Fused:
    """A depthwise, a circular and a reflecting layer with what follows each; a batch norm before a padded layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "deep": (6, 1, 3, 3),
        "ring": (5, 4, 3, 3),
        "glass": (5, 4, 3, 3),
        "map": (3, 4, 3, 3),
    }
    shapes |= {"deep2": (6, 1, 1, 1), "ring2": (4, 5, 1, 1), "glass2": (4, 5, 1, 1), "rest": (2, 3)}
    state = {f"{name}.weight": real_numbers(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    state |= {f"norm.{name}": real_numbers(40 + n, 4) for n, name in enumerate(("weight", "bias", "running_mean"))}
    state["norm.running_var"] = real_numbers(50, 4).square() + 0.1
    net, step = folder / "net.safetensors", folder / "step{}.safetensors"
    save_file({name: rounded(tensor, getattr(torch, dtype)) for name, tensor in state.items()}, net)
    lines = (
        "deep deep2 --set deep.padding=1 --set deep.groups=6 --set deep2.groups=6 --assume-defaults",
        "ring ring2 --set ring.padding=1 --set ring.padding_mode=circular --input-size 7,8 --assume-defaults",
        "glass glass2 --set glass.padding=1 --set glass.padding_mode=reflect --input-size 7,8 --assume-defaults",
        "norm map --name map --set map.padding=1 --set norm.eps=1e-3 --input-size 7,8 --bias-map --assume-defaults",
    )
    last = net
    for number, line in enumerate(lines):
        out = Path(str(step).format(number))
        code, document = run_json("fuse", last, *line.split(), "-o", out)
        assert code == 0, document
        last = out
    with safe_open(last, framework="pt") as opened:
        return Fused(folder, load_file(last), json.loads(opened.metadata()["convtool"]))


def depthwise_channels_swapped(state: State, record: dict[str, Any]) -> None:
    state["deep.weight"][[1, 4]] = state["deep.weight"][[4, 1]]


def compensating_pair(state: State, record: dict[str, Any]) -> None:
    """One layer twice as large and another half as large: a network of the two in a row computes the same."""
    state["ring.weight"] *= 2
    state["glass.weight"] /= 2


def bias_map_moved(state: State, record: dict[str, Any]) -> None:
    state["map.bias_map"] = state["map.bias_map"].roll(1, -1).contiguous()


def zeros_for_a_ring(state: State, record: dict[str, Any]) -> None:
    fused_fields(record, "ring")["padding_mode"] = "zeros"


def ring_for_a_mirror(state: State, record: dict[str, Any]) -> None:
    fused_fields(record, "glass")["padding_mode"] = "circular"


def mirror_for_a_replica(state: State, record: dict[str, Any]) -> None:
    fused_fields(record, "glass")["padding_mode"] = "replicate"


def rest_in_another_dtype(state: State, record: dict[str, Any]) -> None:
    state["rest.weight"] = state["rest.weight"].to(torch.float64)


OTHERS: tuple[tuple[str, Fault, set[str]], ...] = (
    ("channels of a depthwise layer swapped", depthwise_channels_swapped, {"deep"}),
    ("a compensating pair", compensating_pair, {"ring", "glass"}),
    ("a bias map moved by one", bias_map_moved, {"map"}),
    ("zeros around a circular layer", zeros_for_a_ring, {"ring"}),
    ("a reflecting layer wraps around", ring_for_a_mirror, {"glass"}),
    ("a reflecting layer repeats its edge", mirror_for_a_replica, {"glass"}),
    ("another tensor of another dtype", rest_in_another_dtype, set()),
)


@pytest.fixture(scope="module", params=DTYPES)
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    return make_others(request.param, tmp_path_factory.mktemp(f"others-{request.param}"))


def test_without_a_fault_nothing_is_found_in_others(others: Fused) -> None:
    code, document = plant(others, lambda state, record: None)
    assert (code, len(document["fusions"])) == (0, 4)


@pytest.mark.parametrize(("name", "fault", "wrong"), OTHERS, ids=[name for name, _, _ in OTHERS])
def test_a_fault_in_others_is_found(others: Fused, name: str, fault: Fault, wrong: set[str]) -> None:
    code, document = plant(others, fault)
    assert code == 1
    assert {part["name"] for part in document["fusions"] if not part["equivalent"]} == wrong
    assert bool(document["other_tensors"]["differing"]) == (not wrong)
    if "circular" in name or "reflecting" in name:  # the kernel is right, and the border alone tells
        (part,) = (part for part in document["fusions"] if not part["equivalent"])
        assert part["numbers"]["differing"] > 0


def main() -> None:
    costs: dict[str, list[str]] = {name: [] for name, _ in (("none", None), *FAULTS)}
    costs |= {f"{name} (other layers)": [] for name, _, _ in OTHERS}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            fused = make(dtype, Path(folder))
            _, document = plant(fused, lambda state, record: None)
            costs["none"].append(f"{max(part['ratio'] for part in document['fusions']):.3g}")
            for name, fault in FAULTS:
                costs[name].append(cost(*plant(fused, fault)))
        with tempfile.TemporaryDirectory() as folder:
            fused = make_others(dtype, Path(folder))
            for name, fault, _ in OTHERS:
                costs[f"{name} (other layers)"].append(cost(*plant(fused, fault)))
    print(f"{'error / bound, at most 1 where there is no fault':50}", *(f"{dtype:>18}" for dtype in DTYPES))
    for name, found in costs.items():
        print(f"{name:50}", *(f"{text:>18}" for text in found))


if __name__ == "__main__":
    main()
