"""What torch.jit.save writes: tensors in a pickle, and code beside it, of which only lists of names are read.

The pickle has a module's attributes in one table. Which of them `state_dict()` has, and the geometry of torch's own
classes, stand at the top of each class in the code: `__parameters__ = [...]`, `stride : Final[...] = (2, 2)`.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from convtool.errors import UsageError
from convtool.formats.pickle_values import Call, Global, PickleError
from convtool.formats.source import Part, Source
from convtool.formats.state_dicts import Module, StateDict, plain_attributes, read_module
from convtool.formats.stored_tensors import StoredTensors
from convtool.formats.tensor_file import SavedModule, TensorFile
from convtool.formats.torch_contents import read_archive

NAME = "torchscript"
CONSTANTS = "constants.pkl"
_CLASS = re.compile(r"^class (\w+)\(.*\):$", re.MULTILINE)
_NAMES = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_FINAL = re.compile(r"^  (\w+) : Final\[.*\] = (.{1,200})$", re.MULTILINE)
_MANGLED = re.compile(r"\.___torch_mangle_\d+")
_TORCH = "__torch__."


def recognises(members: Mapping[str, Part]) -> bool:
    """Tell whether an archive of these members is one."""
    return any(name.rpartition("/")[2] == CONSTANTS for name in members)


def open_members(source: Source, members: Mapping[str, Part], root: str | None) -> TensorFile:
    """Open the archive of these members; `root` is '.' or nothing.

    Raises:
        InputError: it is damaged, or was frozen: its weights are constants without names then.
        UsageError: another `root`.
    """
    if root not in (None, "."):
        raise UsageError(f"{source.path}: --root {root}: is TorchScript, which has one state dict; leave it out")
    contents = read_archive(source, members)
    classes = {name: about for path, member in members.items() for name, about in _classes(path, member)}
    try:
        state, modules = read_module(contents.value, functools.partial(_module, classes))
    except PickleError as error:
        raise source.damaged(str(error)) from None
    if not state:
        frozen = sum("/constants/" in f"/{name}" for name in members)
        what = f"its {frozen} weights are constants without names, as torch.jit.freeze makes them" if frozen else ""
        raise source.error(f"is TorchScript without tensors under names{what and ': ' + what}; save it before freezing")
    beside = {"code": "the TorchScript code"}
    return StoredTensors(source, contents.storages, StateDict((), state, state, modules, beside), NAME)


def _module(classes: Mapping[str, SavedModule], value: Any) -> Module | None:
    """Return the module that a value of the pickle is, by the code of its class; None of whatever isn't one."""
    if not (isinstance(value, Call) and isinstance(value.function, Global) and isinstance(value.state, dict)):
        return None
    name = str(value.function)
    if not name.startswith(_TORCH):
        return None
    stated = classes.get(name, SavedModule("", {})).attributes
    attributes = {key: one for key, one in value.state.items() if isinstance(key, str)}
    cls = _MANGLED.sub("", f".{name.removeprefix(_TORCH)}")[1:]
    names = (*stated.get("parameters", ()), *stated.get("buffers", ()))
    return Module(
        SavedModule(cls, {**plain_attributes(attributes), **stated}),
        {key: attributes.get(key) for key in names},
        {key: one for key, one in attributes.items() if isinstance(one, Call)},
    )


def _classes(path: str, member: Part) -> Iterator[tuple[str, SavedModule]]:
    """Yield the classes of a file of code by their full names, with the names of their tensors and their constants."""
    start = f"/{path}".find("/code/")
    if start < 0 or not path.endswith(".py"):
        return
    module = path[start + len("code/") :].removesuffix(".py").replace("/", ".")
    text = member.text(path).decode("utf-8", "replace")
    _, *parts = _CLASS.split(text)
    for cls, body in zip(parts[::2], parts[1::2], strict=True):
        about: dict[str, Any] = {"parameters": [], "buffers": []}
        about |= {key: _literal(f"[{listed}]") or [] for key, listed in _NAMES.findall(body)}
        finals = {name: value for name, text in _FINAL.findall(body) if (value := _literal(text)) is not None}
        own = {name: True for listed in about.values() for name in listed}
        yield f"{module}.{cls}", SavedModule(cls, {**own, **finals, **about})


def _literal(text: str) -> Any:
    """Return a number, a word, or a row of these; None for anything else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    parts = value if isinstance(value, list | tuple) else [value]
    return value if all(isinstance(one, int | float | str) for one in parts) else None
