"""Command lines run in this process, as a shell would split them."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schemas import validate

from convtool.cli.app import run_app


@dataclass(frozen=True)
class Run:
    """What a run of the program did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout, which has to be as its schema says."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        validate(found)
        return found

    @property
    def message(self) -> str:
        """The last line of stderr, which is the only one that isn't a remark."""
        *remarks, last = self.err.splitlines()
        assert not any(line.startswith("convtool: ") for line in remarks)
        assert last.startswith("convtool: ")
        return last.removeprefix("convtool: ")


Cli = Callable[[str], Run]


def cli(line: str) -> Run:
    """Run a command line (`convtool` itself left out)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run_app(shlex.split(line))
    return Run(code, out.getvalue(), err.getvalue())
