"""Every command with all its options, over sample models and small fixtures: what it prints, its exit code, its files.

    python tests/golden.py record OUT.json              run all cases
    python tests/golden.py compare OLD.json NEW.json    print each difference; exit code 1 if there is any

Record before and after a change that must not change what users see. A recording holds for one machine, since the last
digits of numbers depend on it. Cases are command lines alone, so that they run unchanged whatever the package looks
like inside. They stand in golden_cases.txt, one a line, and run in that order in one folder, where later ones read what
earlier ones wrote; `<a|b>` stands for one case with each, `stdin:FILE` in front feeds a file. Behind the cases follow
the small text files that they read, each under a line `=== NAME`.
"""

from __future__ import annotations

import difflib
import gc
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parent
CASES = TESTS / "golden_cases.txt"
SAMPLES = TESTS.parent / "sample_models"
ALTERNATIVES = re.compile("<([^<>]*)>")

Found = dict[str, Any]


# --- fixtures


def main_network() -> dict[str, Tensor]:
    """Layers of every kind and number of axes, nothing square: weights by their shapes, biases beside them."""
    biased = {
        "first": (4, 3, 3, 2),
        "second": (5, 4, 1, 2),
        "third": (6, 5, 3, 3),
        "point": (7, 6, 1, 1),
        "patch": (6, 3, 2, 3),
        "up": (5, 4, 3, 2),  # transposed
        "up2": (4, 3, 2, 2),  # transposed
        "line": (4, 3, 5),
        "line2": (2, 4, 1),
        "cube": (3, 2, 2, 3, 2),
        "cube2": (2, 3, 1, 1, 2),
        "head": (3, 7 * 2 * 3),
        "tail": (2, 3),
        "block.pwconv2": (5, 8),
    }
    bare = {
        "patch2": (5, 3, 2, 3),
        "depth": (10, 1, 3, 3),
        "groups": (6, 2, 3, 1),
        "groups2": (8, 3, 1, 2),
        "same": (5, 5, 3, 3),
    }
    make = torch.Generator().manual_seed(12)
    state: dict[str, Tensor] = {}
    for name, shape in (biased | bare).items():
        state[f"{name}.weight"] = torch.randn(shape, generator=make)
        if name in biased:
            outputs = shape[1] if name.startswith("up") else shape[0]
            state[f"{name}.bias"] = torch.randn(outputs, generator=make)
    for name, channels in {"norm": 5, "norm6": 6, "norm10": 10, "plain": 5}.items():
        state |= norm(name, channels, make, affine=name != "plain")
    state["block.gamma"] = torch.randn(5, generator=make)
    return state


def norm(name: str, channels: int, make: torch.Generator, *, affine: bool = True) -> dict[str, Tensor]:
    """A batch norm's tensors, none as it begins."""
    own = {f"{name}.{own}": torch.randn(channels, generator=make) for own in ("weight", "bias")} if affine else {}
    return own | {
        f"{name}.running_mean": torch.randn(channels, generator=make),
        f"{name}.running_var": torch.rand(channels, generator=make) + 0.3,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def branches() -> dict[str, dict[str, Tensor]]:
    """Blocks of parallel branches under the names of the recipes that ship, and a LoRA file with its base."""
    make = torch.Generator().manual_seed(3)

    def conv(name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.randn(shape, generator=make)}

    def block(name: str, *shape: int) -> dict[str, Tensor]:
        return conv(f"{name}.conv", *shape) | norm(f"{name}.bn", shape[0], make)

    mobileone = block("b.rbr_conv.0", 4, 4, 3, 3) | block("b.rbr_conv.1", 4, 4, 3, 3) | block("b.rbr_scale", 4, 4, 1, 1)
    acnet: dict[str, Tensor] = {}
    for kind, size in {"square": (3, 3), "ver": (3, 1), "hor": (1, 3)}.items():
        acnet |= conv(f"b.{kind}_conv", 5, 4, *size) | norm(f"b.{kind}_bn", 5, make)
    dbb = block("b.dbb_origin", 4, 3, 3, 3) | block("b.dbb_1x1", 4, 3, 1, 1) | conv("b.dbb_avg.conv", 4, 3, 1, 1)
    dbb |= norm("b.dbb_avg.bn.bn", 4, make) | norm("b.dbb_avg.avgbn", 4, make) | conv("b.dbb_1x1_kxk.conv1", 3, 3, 1, 1)
    dbb |= norm("b.dbb_1x1_kxk.bn1.bn", 3, make) | conv("b.dbb_1x1_kxk.conv2", 4, 3, 3, 3)
    dbb |= norm("b.dbb_1x1_kxk.bn2", 4, make)
    expand = conv("e.0", 6, 3, 1, 1) | conv("e.1", 6, 6, 3, 3) | conv("e.2", 4, 6, 1, 1)
    lora = {
        "lora_unet_first.lora_down.weight": torch.randn(2, 3, 3, 2, generator=make),
        "lora_unet_first.lora_up.weight": torch.randn(4, 2, 1, 1, generator=make),
        "lora_unet_first.alpha": torch.tensor(1.0),
        "lora_unet_head.lora_down.weight": torch.randn(2, 42, generator=make),
        "lora_unet_head.lora_up.weight": torch.randn(3, 2, generator=make),
    }
    hadamard = {
        f"lora_unet_tail.hada_w{one}": torch.randn(2, 2, generator=make) for one in ("1_a", "1_b", "2_a", "2_b")
    }
    recipes = {"mobileone": mobileone | norm("b.rbr_skip", 4, make), "acnet": acnet, "dbb": dbb, "expandnet": expand}
    return recipes | {"lora": lora, "loha": lora | hadamard}


class Runs:
    """What a pickle would call, were it run."""

    def __reduce__(self) -> tuple[object, ...]:
        """Return a call."""
        return (print, ("called",))


def write_fixtures() -> None:
    """Write all files that cases read into the current folder."""
    for path in SAMPLES.iterdir():
        if path.suffix in (".safetensors", ".pt") or path.name == "networks.py":
            shutil.copy(path, path.name)
    shutil.copy(TESTS / "golden_models.py", "models.py")
    net = main_network()
    few = {name: tensor for name, tensor in net.items() if name.split(".")[0] in ("first", "second", "norm", "tail")}
    ordered: Any = OrderedDict(net)
    ordered._metadata = OrderedDict((name.rpartition(".")[0], {"version": 1}) for name in net)
    make = torch.Generator().manual_seed(5)
    normed = {"wn.weight_g": torch.rand(4, 1, 1, 1, generator=make), "wn.bias": few["first.bias"]}
    normed |= {
        "wn.weight_v": few["first.weight"],
        "pn.parametrizations.weight.original0": torch.rand(5, 1, 1, 1, generator=make),
    }
    normed |= {"pn.parametrizations.weight.original1": few["second.weight"], "pn.bias": few["second.bias"]}
    nan = few | {"second.bias": torch.full((5,), torch.nan)}
    wrong = few | {"second.weight": few["second.weight"].index_fill(0, torch.tensor(2), 0.5)}
    safetensors = {
        "net": net,
        "few": few,
        "double": {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in few.items()},
        "half": {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in few.items()},
        "small": {name: tensor * 1e-6 for name, tensor in few.items()},
        "complex": {"c.weight": torch.complex(net["first.weight"], -net["first.weight"]), "d.weight": torch.ones(2, 4)},
        "module": {f"module.{name}": tensor for name, tensor in few.items()},
        "wn": normed,
        "nan": nan,
        "wrong": wrong,
        "less": {name: tensor for name, tensor in few.items() if name != "tail.bias"},
        "evil": {"x\x1b[2J.weight": torch.ones(2, 3, 1, 1), "ü*[a].weight": torch.ones(1, 2, 1, 1)},
        "numbers": {"n.weight": torch.ones(2, 2, dtype=torch.int64)},
        "empty": {},
    }
    for name, state in (safetensors | branches()).items():
        save_file(state, f"{name}.safetensors", metadata={"format": "pt"} if name == "net" else None)
    shared = few["tail.weight"]
    columns = net["head.weight"].T.contiguous().T
    torch.manual_seed(9)  # of the whole module
    torch_files: dict[str, object] = {
        "net": ordered,
        "few": few,
        "nested": {"epoch": 3, "state_dict": few, "ema": {**few, "tail.bias": few["tail.bias"] + 1}, "lr": [0.1]},
        "model": {"model": few, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        "tied": {"a.weight": shared, "b.weight": shared, "v.weight": net["head.weight"][1:, ::3], "t.weight": columns},
        "code": {**few, "extra": Runs()},
        "text": {"a": "b"},
        "whole": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3)).eval(),
        "normed": normed,
    }
    for name, value in torch_files.items():
        torch.save(value, f"{name}.pt")
    torch.save(few, "legacy.pth", _use_new_zipfile_serialization=False)
    for name, cut in {"net.safetensors": 900, "few.pt": 700}.items():
        Path(f"cut_{name}").write_bytes(Path(name).read_bytes()[:-cut])
    Path("junk.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{{{{{{{{")
    Path("junk.pt").write_bytes(b"not a zip")
    Path("plain.pt").write_bytes(pickle.dumps({"a": 1}))
    x = torch.eye(3 * 5 * 4).reshape(-1, 3, 5, 4)
    matrix = torch.nn.functional.conv2d(x, few["first.weight"]).flatten(1).T.numpy()
    np.save("foreign.npy", matrix)
    np.save("foreign_t.npy", np.ascontiguousarray(matrix.T))
    entries = [f"{i + 1} {j + 1} {matrix[i, j]:.17g}" for i, j in zip(*matrix.nonzero(), strict=True)]
    head = f"%%MatrixMarket matrix coordinate real general\n{matrix.shape[0]} {matrix.shape[1]} {len(entries)}\n"
    Path("foreign.mtx").write_text(head + "\n".join(entries) + "\n")
    Path("damaged.mtx").write_text(head + "\n".join(entries[:-3]) + "\n1 x 2\n")
    torch.save(torch.from_numpy(matrix).to_sparse_csr(), "foreign.pt")
    save_file(
        {"lin.weight": torch.from_numpy(matrix).contiguous(), "lin.bias": torch.zeros(len(matrix))}, "lin.safetensors"
    )
    for block in CASES.read_text().split("\n=== ")[1:]:
        name, _, text = block.partition("\n")
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)


# --- recording


def expanded(line: str) -> Iterator[str]:
    """Yield a line once for each choice of its alternatives."""
    parts = ALTERNATIVES.split(line)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    for chosen in itertools.product(*choices):
        yield " ".join("".join(chosen).split())


def run(line: str) -> tuple[int, str, str]:
    """Run one command line in this process, as a process of its own would; return exit code, stdout and stderr."""
    from convtool.cli import main

    modules, path = set(sys.modules), list(sys.path)
    words = shlex.split(line)
    fed = Path(words.pop(0).removeprefix("stdin:")).read_bytes() if line.startswith("stdin:") else b""
    torch.manual_seed(0)
    before = sys.stdin, sys.stdout, sys.stderr
    streams = io.BytesIO(), io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(fed), "utf-8")
    held = [io.TextIOWrapper(stream, "utf-8", write_through=True) for stream in streams]  # else they close the streams
    sys.stdout, sys.stderr = held
    try:
        main(words)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        gc.unfreeze()
        sys.path[:] = path
        for name in set(sys.modules) - modules:  # the user's code, which each process imports anew
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(Path.cwd())):
                del sys.modules[name]
    assert isinstance(code, int), code
    printed, told = (stream.getvalue().decode().replace(str(Path.cwd()), "HERE") for stream in streams)
    return code, printed, told


def stamps() -> dict[str, tuple[int, ...]]:
    """Return what tells that a file is another one, by name, of all files in the current folder."""
    found = {str(path): path.stat() for path in Path().rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def files_since(before: dict[str, tuple[int, ...]]) -> Found:
    """Return size and digest of every file that is new or another one, and None for those that went."""
    now = stamps()
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    data = {name: Path(name).read_bytes() if name in now else None for name in changed}
    return {
        name: None if content is None else [len(content), hashlib.sha256(content).hexdigest()]
        for name, content in data.items()
    }


def record(out: Path) -> None:
    """Run all cases and write what they did as JSON."""
    os.environ.update(COLUMNS="100", NO_COLOR="1", LC_ALL="C.UTF-8", TERM="dumb")
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    text = CASES.read_text().partition("\n=== ")[0]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    cases = [case for line in lines for case in expanded(line)]
    found: dict[str, Found] = {}
    start = time.perf_counter()
    out, home = out.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_fixtures()
        for case in cases:
            before = stamps()
            code, printed, told = run(case)
            name = next(name for name in (case + " # again" * number for number in range(9)) if name not in found)
            found[name] = {"exit": code, "stdout": printed, "stderr": told, "files": files_since(before)}
        os.chdir(home)
    out.write_text(json.dumps(found, indent=1))
    package = Path(str(sys.modules["convtool"].__file__)).parent
    print(f"{len(found)} cases of {package} in {time.perf_counter() - start:.0f} s")


def compare(old: Path, new: Path) -> bool:
    """Print every difference between two recordings; return whether there is none."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    different = [case for case in before | after if before.get(case) != after.get(case)]
    for case in different:
        print(f"=== {case}")
        for key in ("exit", "stdout", "stderr", "files"):
            one, other = (json.dumps(found.get(case, {}).get(key), indent=0) for found in (before, after))
            if one != other:
                lines = [text.replace("\\n", "\n").splitlines() for text in (one, other)]
                print(*difflib.unified_diff(lines[0], lines[1], f"old {key}", key, lineterm=""), sep="\n")
    print(f"{len(different)} of {len(before | after)} cases differ")
    return not different


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", out]:
            record(Path(out))
        case ["compare", old, new]:
            sys.exit(not compare(Path(old), Path(new)))
        case _:
            sys.exit(__doc__)
