"""A record is a claim: what it says is printed, and nothing else in it makes a wrong file right.

`python tests/test_record_claims.py COUNT` edits more records at random than the suite does.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import real_numbers
from checkpoints import fitted
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import Run, cli
from torch import Tensor

State = dict[str, Tensor]
COUNT = 200  # records edited at random in the suite
SHAPES = {
    "a.weight": (4, 3, 3, 2),
    "a.bias": (4,),
    "b.weight": (4, 4, 1, 3),
    "n.weight": (4,),
    "n.bias": (4,),
    "n.running_mean": (4,),
    "c.weight": (2, 4, 2, 2),
    "d.weight": (2, 2, 1, 1),
    "rest.weight": (3, 2),
}


def write(folder: Path) -> None:
    """Write a network and what three fusions make of it, one of them of another one's layer and for one size."""
    state = {name: real_numbers(seed, *shape).to(torch.float32) for seed, (name, shape) in enumerate(SHAPES.items())}
    state["n.running_var"] = (real_numbers(77, 4).square() + 0.1).to(torch.float32)
    save_file(state, folder / "net.safetensors")
    (folder / "plain.toml").write_text('"*" = { stride = 1, padding = 0, dilation = 1, groups = 1 }')
    lines = (
        "net.safetensors a b -o ab.safetensors --set a.stride=2,1 --set a.padding=1,0:2 --set b.stride=1",
        "ab.safetensors c d -o cd.safetensors --set c.stride=1 --set d.stride=1 --set c.padding=1 --set d.padding=0",
        "cd.safetensors a n -o f.safetensors --set n.eps=1e-3 --input-size 9,8",
        "cd.safetensors a n -o eps.safetensors --set n.eps=0.5 --input-size 9,8",
    )
    for line in lines:
        # What is recorded isn't said again, as it would be overruled.
        plain = "" if " n -o" in line else f"--geometry {folder / 'plain.toml'}"
        checkpoint, *words = line.split()
        out = words.index("-o") + 1
        words[out] = str(folder / words[out])
        assert cli(f"fuse {folder / checkpoint} {' '.join(words)} {plain}").code == 0, line


def record_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        found: dict[str, Any] = json.loads(opened.metadata()["convtool"])
        return found


def save(state: State, record: Any, path: Path) -> None:
    save_file(state, path, {"convtool": json.dumps(record)})


def scaled(state: State, name: str) -> State:
    return state | {name: state[name] * 1.001}


WRONG: dict[str, Callable[[State], State]] = {
    "a weight": lambda state: scaled(state, "a.weight"),
    "a bias": lambda state: scaled(state, "a.bias"),
    "channels": lambda state: state | {"c.weight": state["c.weight"].flip(1).contiguous()},
    "a tensor apart": lambda state: scaled(state, "rest.weight"),
    "a tensor more": lambda state: state | {"more.weight": torch.ones(2)},
    "a tensor less": lambda state: {name: tensor for name, tensor in state.items() if name != "rest.weight"},
    "half the precision": lambda state: state | {"c.weight": state["c.weight"].to(torch.bfloat16)},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    write(folder)
    return folder


def verified(folder: Path, options: str = "") -> Run:
    return cli(f"verify {folder / 'net.safetensors'} {folder / 'edited.safetensors'} --trials 1 --json {options}")


# Digests


def test_a_record_names_what_went_in_and_what_came_out_to_the_bit(files: Path) -> None:
    """Numbers within the bound of storing, and yet not those that were written or read, are another file's."""
    state, record = load_file(files / "f.safetensors"), record_of(files / "f.safetensors")
    save(state, record, files / "edited.safetensors")
    assert verified(files).code == 0
    bits = state["c.weight"].clone()
    bits.view(torch.int32).view(-1)[0] ^= 1  # one unit in its last place; or what stood there was rounded up
    save(state | {"c.weight": bits}, record, files / "edited.safetensors")
    found = verified(files, "--atol 1e-3")
    assert (found.code, found.document["other_tensors"]["differing"]) == (1, {"c.weight": "digest"})
    net = load_file(files / "net.safetensors")
    save(state, record, files / "edited.safetensors")
    save_file(scaled(net, "b.weight"), files / "other.safetensors")
    found = cli(f"verify {files / 'other.safetensors'} {files / 'edited.safetensors'} --atol 1 --json")
    assert (found.code, found.document["other_tensors"]["differing"]) == (1, {"before:b.weight": "digest"})
    # A claim on the command line stands in place of the record's, digests included.
    fields = "--set c.stride=1 --set d.stride=1 --set before:c.padding=1 --set d.padding=0 --set after:c.padding=1"
    fields += " --set before:c.groups=1 --set before:c.dilation=1 --set before:d.dilation=1"
    save(state | {"c.weight": bits}, record, files / "edited.safetensors")
    assert verified(files, f"--before c,d --after c {fields} --atol 1e-3").code == 0


def test_what_was_rounded_since_is_held_against_its_numbers(files: Path) -> None:
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(files / "f.safetensors").items()}
    save(halves, record_of(files / "f.safetensors"), files / "edited.safetensors")
    assert verified(files).code == 1
    assert verified(files, "--rounded-to bfloat16").code == 0
    save(scaled(halves, "a.weight"), record_of(files / "f.safetensors"), files / "edited.safetensors")
    assert verified(files, "--rounded-to bfloat16").code == 0  # 1.001 rounds to 1
    halves["a.weight"] = halves["a.weight"] * 1.02
    save(halves, record_of(files / "f.safetensors"), files / "edited.safetensors")
    assert verified(files, "--rounded-to bfloat16").code == 1


# Keys that nobody knows


def test_an_unknown_key_is_an_error_in_verify_and_a_remark_elsewhere(files: Path) -> None:
    state, record = load_file(files / "f.safetensors"), record_of(files / "f.safetensors")
    places: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda one: one,
        lambda one: one["fusions"][0],
        lambda one: one["fusions"][0]["sources"],
        lambda one: one["fusions"][0]["sources"]["chain"][1],
    ]
    for place in places:
        edited = copy.deepcopy(record)
        place(edited)["tolerance"] = 1.0
        save(state, edited, files / "edited.safetensors")
        found = verified(files)
        assert (found.code, "has the key 'tolerance'" in found.err) == (3, True)
        seen = cli(f"inspect {files / 'edited.safetensors'}")
        assert (seen.code, "ignored: " in seen.err) == (0, True)
    save(state, record | {"schema": 99}, files / "edited.safetensors")
    assert verified(files).code == 3
    assert cli(f"inspect {files / 'edited.safetensors'}").code == 0


def test_a_fused_layer_that_is_said_to_pad_otherwise_is_a_claim(files: Path) -> None:
    """A kernel moved by one tap is right with a padding moved by one, which no model's code has unless it's told."""
    state, record = load_file(files / "f.safetensors"), record_of(files / "f.safetensors")
    state["c.weight"] = F.pad(state["c.weight"], (1, 0, 0, 0))  # 2x2 as 2x3, nothing in its first column
    moved = copy.deepcopy(fitted(record, state))
    save(state, moved, files / "edited.safetensors")
    assert verified(files).code == 1
    (fusion,) = (one for one in moved["fusions"] if one["name"] == "c")
    fusion["fields"]["padding"] = [[1, 1], [2, 1]]
    save(state, moved, files / "edited.safetensors")
    found = verified(files)
    assert found.code == 0
    assert any(text.startswith("the fused c: ") and "padding 1,2:1" in text for text in found.document["claims"])
    save(load_file(files / "f.safetensors"), record, files / "edited.safetensors")
    assert not any("padding 1,2:1" in text for text in verified(files).document["claims"])


# Records edited at random


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a document."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from paths(one, (*at, key))


def look(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


ATOMS: list[Any] = [0, 1, 2, 3, 9, -1, 1e-5, 0.5, True, False, None, "", "a", "b", "n", "c", "d", "rest", "zeros"]
ATOMS += [
    "reflect",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "identity()",
    "scale(0.999)",
    "scale(2)",
    [],
    {},
    [1, 1],
]


def edited(record: Any, chance: random.Random) -> Any:
    """Return a record with one to three edits.

    Values are replaced by others of their type; or whatever it is taken out, put twice, grafted from elsewhere.
    """
    document = copy.deepcopy(record)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = [place for place in paths(document) if place]
        scalars = [place for place in places if not isinstance(look(document, place), dict | list)]
        at = chance.choice(scalars if chance.random() < 0.7 else places)
        holder, key, value = look(document, at[:-1]), at[-1], look(document, at)
        alike = [one for one in (*ATOMS, *(look(document, place) for place in scalars)) if type(one) is type(value)]
        match chance.randrange(4) if at not in scalars else 4:
            case 0:
                holder.pop(key)
            case 1 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(value))
            case 2 if isinstance(holder, list):
                chance.shuffle(holder)
            case 4 if alike:
                holder[key] = chance.choice(alike)
            case _:
                holder[key] = copy.deepcopy(look(document, chance.choice(places)))
    return document


def claim(found: Run) -> str:
    """Return what a verdict prints of what the record claims."""
    document = found.document
    fusions = [(one["name"], one["before"], one["after"], one["input_size"]) for one in document["fusions"]]
    said = (document["claims"], document["assumed"], document["statement"])
    return json.dumps([said, fusions, document["other_tensors"]["compared"]])


def fuzz(folder: Path, count: int, seed: int = 0) -> tuple[int, int]:
    """Verify wrong files with edited records; return how many were taken as records, and how many verdicts were 0."""
    chance, (read, passed) = random.Random(seed), (0, 0)
    state, record = load_file(folder / "f.safetensors"), record_of(folder / "f.safetensors")
    said: dict[str, str] = {}
    records: dict[str, Any] = {}
    other = load_file(folder / "eps.safetensors")  # which another claim than the record's would make right
    faults: dict[str, Callable[[State], State]] = {**WRONG, "another eps": lambda state: state | other}
    for name, wrong in faults.items():
        records[name] = fitted(record, wrong(state))
        save(wrong(state), records[name], folder / "edited.safetensors")
        found = verified(folder)
        assert found.code == 1, name
        said[name] = claim(found)
    for number in range(count):
        name = list(faults)[number % len(faults)]
        document = edited(records[name], chance)
        save(faults[name](state), document, folder / "edited.safetensors")
        found = verified(folder)
        assert found.code in (0, 1, 2, 3, 4), document
        read += found.code < 2
        passed += found.code == 0
        assert found.code or claim(found) != said[name], (name, document)
    return read, passed


def test_no_edit_of_a_record_makes_a_wrong_file_right_and_prints_the_same(files: Path) -> None:
    read, _ = fuzz(files, COUNT)
    assert read > COUNT // 4  # edits that are records still, or nothing was tried


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        total = int(sys.argv[1])
        read, passed = fuzz(Path(name), total, seed=1)
        print(f"{total} records edited, {read} of them read as records, {passed} exit 0 with another claim printed")
