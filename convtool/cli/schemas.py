"""JSON Schemas of what `--json` prints, made of the dataclasses that commands return; `python -m` prints one."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from convtool.cli.app import COMMANDS, find_command
from convtool.cli.document import HIDDEN, INLINE, OPTIONAL, SCHEMA, Failure, LayerFields
from convtool.core.tree import Chain, Sum, Tree
from convtool.kinds import field_types

PLAIN = {str: "string", Path: "string", bool: "boolean", int: "integer", type(None): "null"}
NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}  # the latter are what JSON has no number for
Definitions = dict[str, dict[str, Any]]


def schema(command: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a command's document, complete in itself."""
    found = _hints(find_command(command).run)["return"]
    made: Definitions = {}
    names = [_document(one, command, made) for one in (*(get_args(found) or (found,)), Failure)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"what `convtool {command} --json` prints",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in names],
        "$defs": made,
    }


def _document(result: type, command: str, made: Definitions) -> str:
    """Add a result's schema with what every document begins with, and return its name."""
    name, failed = _define(result, made), result is Failure
    head = {
        "schema": {"const": SCHEMA, "description": "raised when a property goes or changes its meaning"},
        "command": {"type": ["string", "null"], "description": "as typed"} if failed else {"const": command},
        "ok": {"const": False} if failed else {"type": "boolean", "description": "whether the exit code is 0"},
    }
    own = made[name]
    made[name] = own | {"properties": head | own["properties"], "required": [*head, *own["required"]]}
    return name


def _define(made_of: Any, made: Definitions) -> str:
    """Add the schema of a dataclass, a chain or a sum, and return its name."""
    origin = get_origin(made_of) or made_of
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", origin.__name__.strip("_")).lower()
    if name not in made:
        made[name] = {}  # so that a tree can hold trees
        properties, optional = _properties(made_of, made)
        made[name] |= {
            "description": inspect.cleandoc(origin.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
            "type": "object",
            "required": [one for one in properties if one not in optional],
            "additionalProperties": False,
            "properties": properties,
        }
    return name


def _properties(made_of: Any, made: Definitions) -> tuple[dict[str, Any], set[str]]:
    """Return the properties of an object, and which of them may be missing."""
    origin = get_origin(made_of) or made_of
    if origin in (Chain, Sum):
        tree: Any = Tree
        return {origin.__name__.lower(): {"type": "array", "items": _schema(tree[get_args(made_of)], made)}}, set()
    hints, said = _hints(origin), _descriptions(origin)
    properties: dict[str, Any] = {}
    optional: set[str] = set()
    for field in fields(origin):
        if field.metadata == INLINE:
            own, missing = _properties(hints[field.name], made)
            properties, optional = properties | own, optional | missing
        elif field.metadata != HIDDEN:
            properties[field.name] = _schema(hints[field.name], made) | said.get(field.name, {})
            optional |= {field.name} if field.metadata == OPTIONAL else set()
    return properties, optional


def _schema(hint: Any, made: Definitions) -> dict[str, Any]:
    """Return the schema of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint == LayerFields:
        own = {name: _schema(one.recorded, made) for name, one in field_types().items()}
        made["fields"] = {"type": "object", "additionalProperties": False, "properties": own}
        return {"$ref": "#/$defs/fields"}
    if origin is Annotated:
        base, (keyword, value) = arguments
        return _schema(base, made) | {keyword: list(value) if isinstance(value, tuple) else value}
    if hint in (Any, float):
        return NUMBER if hint is float else {}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return {"enum": [one.value if isinstance(one, Enum) else one for one in arguments or hint]}
    if origin in (Union, types.UnionType):
        return {"oneOf": [_schema(one, made) for one in arguments]}
    if origin is tuple and arguments[-1] is not Ellipsis:
        items = [_schema(one, made) for one in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (tuple, list, Sequence):
        return {"type": "array", "items": _schema(arguments[0], made)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], made)}
    return {"$ref": f"#/$defs/{_define(hint, made)}"}


def _descriptions(made_of: type) -> dict[str, dict[str, str]]:
    """Return what a docstring's Attributes say."""
    _, _, text = inspect.cleandoc(made_of.__doc__ or "").partition("Attributes:\n")
    found: dict[str, dict[str, str]] = {}
    for entry in re.split(r"\n(?=    \S)", text) if text else ():
        names, _, said = entry.partition(": ")
        found |= {name.strip(): {"description": " ".join(said.split())} for name in names.split(",")}
    return found


def _hints(made_of: type | Callable[..., Any]) -> dict[str, Any]:
    """Return annotations as types, also those that the module imports for type checkers only, to start fast."""
    module = sys.modules[made_of.__module__]
    names: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), str(module.__file__), "exec"), names)
    return get_type_hints(made_of, globalns=vars(module), localns=names, include_extras=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"expected one command: {', '.join(COMMANDS)}")
    with contextlib.suppress(BrokenPipeError):  # whoever read it had enough
        print(json.dumps(schema(sys.argv[1]), indent=2), flush=True)
