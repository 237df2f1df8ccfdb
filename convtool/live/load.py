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

from convtool.errors import ConvtoolError, InputError, RefusedError, UsageError, a_or_an, did_you_mean

EXPECTED = "pkg.mod:callable, path/to/file.py:callable, or a Hugging Face folder with a config.json"


def load_model(spec: str, arguments: str | None = None, *, in_memory: bool = False) -> nn.Module:
    """Return the model that `spec` names, in eval mode, its tensors on the meta device, by running the code it names.

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


def run_code(option: str, spec: str) -> Any:
    """Return what the callable that an option's value names returns; raise UsageError where it fails."""
    with _named(spec) as made, _user_code(f"{option} {spec}: calling it failed"):
        return made()


@contextlib.contextmanager
def _named(spec: str) -> Iterator[Any]:
    """Give what 'pkg.mod:name' or 'file.py:name' names, and let its code import what lies beside it meanwhile."""
    where, _, attribute = (spec, "", "") if spec.endswith(".py") else spec.rpartition(":")
    if not where or not (attribute or where.endswith(".py")):
        raise UsageError(f"--model: expected {EXPECTED}, got {spec!r}")
    with _importable(Path(where).parent if where.endswith(".py") else Path()):
        module = _file(Path(where)) if where.endswith(".py") else _import(where)
        try:
            made: Any = reduce(getattr, attribute.split("."), module)
        except AttributeError:
            known = {name: made for name, made in vars(module).items() if callable(made) and not name.startswith("_")}
            own = [name for name, made in known.items() if getattr(made, "__module__", "") == module.__name__]
            near = did_you_mean(attribute, known, f"; it has {', '.join(own[:8]) or 'none of its own'}")
            lacks = f"has no {attribute!r}" if attribute else f"expected {where}:NAME, NAME being what builds the model"
            raise UsageError(f"--model: {where}: {lacks}{near}") from None
        yield made


def _from_code(spec: str, arguments: str | None, in_memory: bool) -> nn.Module:
    given = _arguments(arguments)
    with _named(spec) as made:
        if not isinstance(made, nn.Module):
            with _user_code(f"{spec}: calling it failed"):
                made = _call(made, *given, in_memory)
    if not isinstance(made, nn.Module):
        raise UsageError(f"--model: {spec} gave {a_or_an(type(made).__name__)}, expected an nn.Module")
    return made


def _call(make: Any, positional: list[Any], keywords: dict[str, Any], in_memory: bool) -> Any:
    """Call it with nothing allocated; in memory where that is asked for, or its code looks at a value as it builds."""
    if in_memory:
        return make(*positional, **keywords)
    try:
        with torch.device("meta"):
            made = make(*positional, **keywords)
        return made.to("meta") if isinstance(made, nn.Module) else made  # what it placed elsewhere by itself
    except Exception:
        with contextlib.suppress(Exception):
            return make(*positional, **keywords)
        raise


def _arguments(text: str | None) -> tuple[list[Any], dict[str, Any]]:
    try:
        value = {} if text is None else json.loads(text)
    except ValueError as error:
        raise UsageError(f"--model-args: is not JSON: {error}; such as '{{\"depth\": 18}}'") from None
    if not isinstance(value, dict | list):
        raise UsageError(f"--model-args: expected a JSON object or list, got {text!r}")
    return ([], value) if isinstance(value, dict) else (value, {})


def _import(name: str) -> Any:
    with _user_code(f"importing {name} failed"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                raise UsageError(f"--model: no module {name!r}; it is looked for here and where Python looks") from None
            raise


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
        with _user_code(f"running {path} failed"):
            found.loader.exec_module(module)
    except UsageError:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put the folder first among the places to import from, as `python file.py` and `python -m` have it.

    Nothing is written beside the code that is imported.
    """
    before, written = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(folder.resolve()))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = before, written


@contextlib.contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Say of any error of the user's code, in one line as a UsageError, what failed and the line that raised it."""
    try:
        yield
    except ConvtoolError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
        at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        said = " ".join(str(error).split())
        raise UsageError(f"--model: {what}: {type(error).__name__}: {said}{at}") from None


def _from_config(folder: Path, in_memory: bool) -> nn.Module:
    """Return the architecture that a Hugging Face config.json names, by the installed transformers' code alone."""
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
    device = "cpu" if in_memory else "meta"
    with _user_code(f"{folder}: transformers could not build it"), torch.device(device):
        parsed = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        build = kind.from_config if kind is transformers.AutoModel else kind._from_config
        model: nn.Module = build(parsed).to(device)
    return model
