"""A model from where its code is, on the meta device: all of its modules, and no weights in memory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convtool.errors import InputError, RefusedError, UsageError

EXPECTED = "pkg.mod:callable, path/to/file.py:callable, or a Hugging Face folder with a config.json"


def load_model(spec: str, arguments: str | None = None, *, in_memory: bool = False) -> nn.Module:
    """The model that `spec` names, in eval mode, its tensors on the meta device. This runs the code that it names.

    Args:
        spec: 'pkg.mod:callable', 'path/to/file.py:callable', or a folder with a Hugging Face config.json. What is
            named may be a class, a function, or a module made already.
        arguments: for the callable, as JSON: an object of keyword arguments or a list of positional ones.
        in_memory: with its tensors in memory, on the CPU, so that it can be run.

    Raises:
        UsageError: there is no such module or callable, or calling it failed.
        InputError: the file or the folder is missing or damaged.
        RefusedError: the folder asks for code of its own to be run.
    """
    folder = Path(spec)
    if folder.is_dir():
        if arguments is not None:
            raise UsageError("--model-args: a Hugging Face folder takes none; its config.json says everything")
        model = _from_config(folder, in_memory)
    else:
        model = _from_code(spec, arguments, in_memory)
    return model.eval()


def _from_code(spec: str, arguments: str | None, in_memory: bool) -> nn.Module:
    where, colon, attribute = spec.rpartition(":")
    if not colon or not where or not attribute:
        raise UsageError(f"--model: expected {EXPECTED}, got {spec!r}")
    positional, keywords = _arguments(arguments)
    with _importable(Path(where).parent if where.endswith(".py") else Path()):
        module = _file(Path(where)) if where.endswith(".py") else _import(where)
        try:
            made: Any = reduce(getattr, attribute.split("."), module)
        except AttributeError:
            public = [name for name in vars(module) if not name.startswith("_")]
            raise UsageError(f"--model: {where} has no {attribute!r}; it has {', '.join(public[:8])}") from None
        if not isinstance(made, nn.Module):
            made = _call(spec, made, positional, keywords, in_memory)
    if not isinstance(made, nn.Module):
        raise UsageError(f"--model: {spec} gave a {type(made).__name__}, expected an nn.Module")
    return made


def _call(spec: str, make: Any, positional: list[Any], keywords: dict[str, Any], in_memory: bool) -> Any:
    """Call it with nothing allocated; in memory where that is asked for, or its code looks at a value as it builds."""
    try:
        if in_memory:
            return make(*positional, **keywords)
        with torch.device("meta"):
            made = make(*positional, **keywords)
        return made.to("meta") if isinstance(made, nn.Module) else made  # what it placed elsewhere by itself
    except Exception as failed:
        with contextlib.suppress(Exception):
            if not in_memory:
                return make(*positional, **keywords)
        raise UsageError(f"--model: {spec}: calling it failed: {_said(failed)}") from None


def _arguments(text: str | None) -> tuple[list[Any], dict[str, Any]]:
    if text is None:
        return [], {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--model-args: is not JSON: {error}; such as '{{\"depth\": 18}}'") from None
    if isinstance(value, dict):
        return [], value
    if isinstance(value, list):
        return value, {}
    raise UsageError(f"--model-args: expected a JSON object or list, got {text!r}")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"--model: no module {name!r}; it is looked for here and where Python looks") from None
        raise UsageError(f"--model: importing {name} failed: {_said(error)}") from None
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"--model: importing {name} failed: {_said(error)}") from None


def _file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"--model: {path}: no such file")
    name = f"convtool_model_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles of its classes look there
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"--model: running {path} failed: {_said(error)}") from None
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first among the places to import from, as `python file.py` and `python -m` have it."""
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


def _said(error: BaseException) -> str:
    """An error of the user's code in one line, with the line of theirs that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{at}"


def _from_config(folder: Path, in_memory: bool) -> nn.Module:
    """The architecture that a Hugging Face config.json names, by the code of the installed transformers alone."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--model: {folder}: has no config.json; expected {EXPECTED}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--model: {path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"--model: {path}: expected a JSON object")
    if config.get("auto_map"):
        raise RefusedError(
            f"--model: {path} asks for code of its own (auto_map), which isn't run; if you trust it, name it as"
            " file.py:callable"
        )
    try:
        import transformers
    except ImportError:
        raise UsageError(
            f"--model: {folder} needs transformers; install it, or name the model's code as pkg.mod:callable"
        ) from None
    names = config.get("architectures") or []
    kind: Any = getattr(transformers, str(names[0]), None) if names else transformers.AutoModel
    if kind is None:
        raise UsageError(f"--model: {path}: transformers {transformers.__version__} has no {names[0]}")
    try:
        parsed = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        build = kind.from_config if kind is transformers.AutoModel else kind._from_config
        device = "cpu" if in_memory else "meta"
        with torch.device(device):
            model: nn.Module = build(parsed).to(device)
    except Exception as error:
        raise UsageError(f"--model: {folder}: transformers could not build it: {_said(error)}") from None
    return model
