"""Good files of every form, ways to damage them, and what a damaged file may do: be refused, or be what it says."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import bits_of, bytes_of, same_bits, small_network, with_metadata
from torch import Tensor

from convtool import open_checkpoint
from convtool.errors import InputError, OutputError, RefusedError, UsageError
from convtool.graph.exported import read_exported

SUFFIXES = {
    "safetensors": ".safetensors",
    "zip": ".pt",
    "legacy": ".pt",
    "index": ".safetensors.index.json",
    "bin index": ".bin.index.json",
}


def small_state() -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in small_network().items() if name.startswith(("stem.first", "stem.bn"))}
    return state | {"half": torch.tensor([1.5, -2.0]).bfloat16(), "tied": state["stem.bn.weight"]}


def parts(form: str) -> dict[str, dict[str, Tensor]]:
    """The files that an index of that form names, and what is in each."""
    suffix = ".safetensors" if form == "index" else ".bin"
    state = small_state()
    state = {name: tensor.clone() for name, tensor in state.items()}
    names = list(state)
    return {f"part-{n}{suffix}": {name: state[name] for name in names[n::2]} for n in range(2)}


def write_parts(folder: Path) -> None:
    """The good files that damaged indexes stand beside."""
    for name, part in parts("index").items():
        safetensors.torch.save_file(part, folder / name)
    for name, part in parts("bin index").items():
        torch.save(part, folder / name)


def good_file(form: str) -> bytes:
    """The bytes of a good file."""
    if form.endswith("index"):
        homes = {name: home for home, part in parts(form).items() for name in part}
        return json.dumps({"metadata": {"total_size": 123}, "weight_map": homes}, indent=2).encode()
    if form == "safetensors":
        state = {name: tensor for name, tensor in small_state().items() if name != "tied"}
        return safetensors.torch.save(state, {"format": "pt", "tied": "stem.bn.weight"})
    buffer = io.BytesIO()
    value = {"model": with_metadata(small_state()), "epoch": 3, "args": [1.5, None, {"x": (True, "y")}]}
    torch.save(value, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def damaged(data: bytes, random: Random) -> bytes:
    """The bytes with one to three changes of any of the kinds below."""
    for _ in range(random.randint(1, 3)):
        data = random.choice(CHANGES)(data, random)
    return data


def _place(data: bytes, random: Random) -> int:
    """Somewhere in the file: half of the time near one of its ends, where formats keep their tables."""
    if not data:
        return 0
    edge = min(len(data), 900)
    near = random.choice((random.randrange(edge), len(data) - 1 - random.randrange(edge)))
    return random.choice((near, random.randrange(len(data))))


def _flip(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :] if data else data


def _byte(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))]) + data[place + 1 :]


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: _place(data, random)]


def _delete(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + data[place + random.randint(1, 40) :]


def _insert(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    new = random.choice((b"\0" * random.randint(1, 9), random.randbytes(random.randint(1, 9)), b"}", b"]", b'"', b"."))
    return data[:place] + new + data[place:]


def _splice(data: bytes, random: Random) -> bytes:
    start, place, length = _place(data, random), _place(data, random), random.randint(1, 60)
    return data[:place] + data[start : start + length] + data[place + random.choice((0, length)) :]


def _number(data: bytes, random: Random) -> bytes:
    """Another number in the place of one that is written in digits."""
    found = list(itertools.islice(re.finditer(rb"\d+", data), 200))
    if not found:
        return data
    match = random.choice(found)
    value = int(match[0][:15])
    new = random.choice((value + 1, max(0, value - 1), 0, value * 2, 2**31, 2**32, 2**63, 2**64, 10**30, -1))
    return b"".join((data[: match.start()], str(new).encode(), data[match.end() :]))


def _word(data: bytes, random: Random) -> bytes:
    """Four or eight bytes of another number, as lengths and offsets are written."""
    place, size = _place(data, random), random.choice((2, 4, 8))
    value = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, len(data), len(data) * 2)) % (1 << 8 * size)
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_flip, _byte, _truncate, _delete, _insert, _splice, _number, _word),
)


def verdict(path: Path, form: str) -> str:
    """'refused', or 'accepted' where all that is read is what the file says by the package that the format is of.

    Raises:
        AssertionError: it is neither.
    """
    try:
        nested = form in ("zip", "legacy") and b"model" in path.read_bytes()
        opened = open_checkpoint(path, "model" if nested else None)
        found = {name: opened.tensor(name) for name in opened.infos}
        for name in found:
            assert bytes_of(opened, name) == bits_of(opened, name)
        _ = opened.record
    except (InputError, RefusedError, UsageError) as error:
        message = str(error)
        assert message, "a message"
        assert len(message) < 2000, "a short message"
        return "refused"
    except OutputError as error:
        raise AssertionError("nothing was to be written") from error
    if found.keys() == small_state().keys() and all(same_bits(found[name], small_state()[name]) for name in found):
        return "accepted"
    expected = read_by_its_package(path, form, opened.root)
    for name, tensor in found.items():
        assert name in expected, f"{name!r} is not in the file"
        assert same_bits(tensor, expected[name].detach()), f"{name!r} is other than the file says"
    return "accepted"


def read_by_its_package(path: Path, form: str, root: Sequence[str]) -> Any:
    """The state dict as safetensors or torch reads it."""
    if form.endswith("index"):
        homes = json.loads(path.read_text())["weight_map"]
        files = {
            home: read_by_its_package(path.with_name(home), form.removesuffix("index"), ()) for home in homes.values()
        }
        return {name: files[home][name] for name, home in homes.items()}
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            for name, kept in (opened.metadata() or {}).items():
                if kept in state:
                    state.setdefault(name, state[kept])
        return state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.load(path, weights_only=True, map_location="cpu")
    return functools.reduce(lambda inner, key: inner[key], root, value)


# Files of which one part is damaged and the rest stays good, checksums included: what else torch saves a network as

INNER = {
    "module": "net.pt",
    "script": "data.pkl",
    "script code": "code/__torch__/torch/nn/modules/conv",  # or so; a name that is taken in this process gets a number
    "program": "models/model.json",
    "program's weights": "data/weights/model_weights_config.json",
    "folder": ".metadata",
}


@functools.cache
def good_files(form: str) -> dict[str, bytes]:
    """The files, or the members of the archive, that a small network is saved as, by name."""
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, (3, 1), stride=2, padding=(1, 0)), torch.nn.BatchNorm2d(3)).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / INNER[form]
        if form == "module":
            torch.save(net, path, _use_new_zipfile_serialization=False)
        elif form == "folder":
            dcp.save(net.state_dict(), checkpoint_id=folder)  # type: ignore[attr-defined]
        elif form.startswith("script"):
            torch.jit.script(net).save(str(path := Path(folder) / "net.pt"))
        else:
            path = Path(folder) / "net.pt2"
            torch.export.save(torch.export.export(net, (torch.rand(1, 2, 5, 4),)), path)
        if form in ("module", "folder"):
            return {one.name: one.read_bytes() for one in Path(folder).iterdir()}
        with zipfile.ZipFile(path) as archive:
            return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def damaged_part(form: str) -> str:
    """The name of the file or member that is damaged."""
    return min(name for name in good_files(form) if name.startswith(INNER[form]))


def good_part(form: str) -> bytes:
    """What is damaged, as it is before."""
    return good_files(form)[damaged_part(form)]


def write_damaged(form: str, part: bytes, folder: Path) -> Path:
    """Write the files with that in the place of the one part, and return what is to be opened."""
    files = good_files(form) | {damaged_part(form): part}
    if form in ("module", "folder"):
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder / INNER[form]
    with zipfile.ZipFile(folder / "net.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(f"net/{name}", data)
    return folder / "net.zip"


def read_all(path: Path) -> str:
    """Read whatever is in a file; 'refused' or 'accepted'."""
    try:
        opened = open_checkpoint(path)
        for name in opened.infos:
            assert bytes_of(opened, name) == bits_of(opened, name)
        _ = opened.stated, opened.other_classes, opened.left_out, opened.record
        if opened.program is not None:
            read_exported(opened, opened.program)
    except (InputError, RefusedError, UsageError) as error:
        message = str(error)
        assert message, "a message"
        assert len(message) < 2000, "a short message"
        return "refused"
    return "accepted"
