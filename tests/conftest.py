"""Settings of every test run: repeatable random cases, no threads that fight with pytest-xdist's workers, --part."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from warm import warm_convtool

torch.set_num_threads(1)

# Under nohup, or behind a & in a script, a run ignores signals, and so would every command that a test starts.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# The same cases on every machine and in every run, so that a failure is a change of the code. To look for new ones:
# pytest --hypothesis-profile explore
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=5000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _convtool_on_the_path(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give shells a command `convtool` where the package isn't installed beside this Python."""
    if shutil.which("convtool", path=str(Path(sys.executable).parent)) is None:
        command = tmp_path_factory.mktemp("bin") / "convtool"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m convtool "$@"\n')
        command.chmod(0o755)
        os.environ["PATH"] = f"{command.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """A folder for PATH, with a `convtool` that starts at once."""
    with warm_convtool() as folder:
        yield folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make check`."""
    parser.addoption("--part", type=int, metavar="N", help="run about one in N tests, always the same ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what --part does: by hashes of names, so that a new test changes little, and no file loses all."""
    part = config.getoption("--part")
    if not part:
        return
    hashes = {item: zlib.crc32(item.nodeid.encode()) for item in items}
    least: dict[Path, int] = {}
    for item, number in hashes.items():
        least[item.path] = min(number, least.get(item.path, number))
    taken = [item for item, number in hashes.items() if number % part == 0 or number == least[item.path]]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(taken)])
    items[:] = taken
