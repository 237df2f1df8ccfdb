"""The JSON Schemas of what `--json` prints; that the documents follow them is held by every test that reads one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from schemas import validate

from convtool.cli.app import COMMANDS, run_app
from convtool.cli.schemas import schema

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_schema_that_is_one(command: str) -> None:
    found = schema(command)
    Draft202012Validator.check_schema(found)
    assert found["title"] == f"what `convtool {command} --json` prints"
    used = {ref.rpartition("/")[2] for ref in references(found)}
    assert used == found["$defs"].keys()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT / "sample_models")
    assert run_app(["inspect", "chains.safetensors", "--json", "--set", "widen.padding=1,2"]) == 0
    found = json.loads(capsys.readouterr().out)
    validate(found)
    assert isinstance(found, dict)
    return found


BREAKAGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.pop("tensors"), r"\$: 'tensors' is a required property"),
    (lambda d: d.update(size=1), r"\$: Additional properties are not allowed \('size' was unexpected\)"),
    (lambda d: d.update(bytes="12"), r"\$.bytes: '12' is not of type 'integer'"),
    (lambda d: d.update(schema=2), r"\$.schema: 1 was expected"),
    (lambda d: d["layers"][0].update(colour="red"), r"\$.layers\[0\]: Additional properties"),
    (lambda d: d["layers"][7]["geometry"].update(strides=[1]), r"\$.layers\[7\].geometry: "),
]


@pytest.mark.parametrize(("breakage", "message"), BREAKAGES)
def test_a_document_that_strays_from_its_schema_is_found(
    breakage: Callable[[dict[str, Any]], object], message: str, document: dict[str, Any]
) -> None:
    broken = copy.deepcopy(document)
    breakage(broken)
    with pytest.raises(AssertionError, match=message):
        validate(broken)


def test_schemas_are_printed_by_the_module() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "convtool.cli.schemas", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert json.loads(run("fuse").stdout) == schema("fuse")
    assert run("fuze").stderr == f"expected one command: {', '.join(COMMANDS)}\n"
