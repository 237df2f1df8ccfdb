"""Options that several commands take as one frozen value, declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints


def grouped(function: Callable[..., int]) -> Callable[..., int]:
    """A command with its parameters that are dataclasses unfolded into their fields, in their place.

    Typer wants every option in a command's signature. So a set of options is a frozen dataclass whose annotations are
    typer's; a command has one parameter for it, which gets the value, and the signature that typer reads has its
    fields.
    """
    hints = get_type_hints(function, include_extras=True)
    values: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    unfolded = [one for name in inspect.signature(function).parameters for one in _unfolded(function, name, hints)]

    def command(**given: Any) -> int:
        for name, value in values.items():
            given[name] = value(**{field.name: given.pop(field.name) for field in fields(value)})
        return function(**given)

    # What typer and `Command` read; not functools.wraps, by which they would find the function as it was.
    command.__name__, command.__module__, command.__doc__ = function.__name__, function.__module__, function.__doc__
    command.__annotations__ = {one.name: one.annotation for one in unfolded} | {"return": hints["return"]}
    command.__signature__ = inspect.Signature(unfolded)  # type: ignore[attr-defined]
    return command


def _unfolded(function: Callable[..., int], name: str, hints: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    hint = hints[name]
    if not is_dataclass(hint):
        default = inspect.signature(function).parameters[name].default
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        return
    own = get_type_hints(hint, include_extras=True)
    for field in fields(hint):
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=own[field.name]
        )


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
