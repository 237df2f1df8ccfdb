"""JSON Schemas of what `--json` prints, one file per command; what several of them need stands in shared.json.

The files say no more than they must: `schema` makes every object closed (no other properties than those named), all of
its properties required but those listed as "optional", and wraps what each document begins with around it.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from convtool.cli.output import SCHEMA


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a command's document, complete in itself."""
    own, shared = _read(f"{command}.json"), _read("shared.json")
    start = {
        "schema": {"const": SCHEMA, "description": "raised when a property goes or changes its meaning"},
        "command": {"const": command},
        "ok": {"const": True},
    }
    results = {name: {**result, "properties": start | result["properties"]} for name, result in own["results"].items()}
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"what `convtool {command} --json` prints",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in (*results, "failure")],
        "$defs": results | own.get("$defs", {}) | shared["$defs"],
    }
    closed = _closed(document)
    assert isinstance(closed, dict)
    return closed


def _closed(value: Any) -> Any:
    if isinstance(value, list):
        return [_closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    inside = {key: _closed(item) for key, item in value.items() if key != "optional"}
    if isinstance(value.get("properties"), dict):
        required = [name for name in value["properties"] if name not in value.get("optional", ())]
        return {"type": "object", "required": required, "additionalProperties": False} | inside
    return inside


def _read(name: str) -> dict[str, Any]:
    value = json.loads(resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value
