"""Functions called in a process of their own, forked off one that has convtool imported and has done nothing else."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from convtool import open_checkpoint
from convtool.errors import ConvtoolError

P = ParamSpec("P")
R = TypeVar("R")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "convtool.checkpoint.write", "convtool.formats.torch_zip", "json", "zipfile"])


def called(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Return what a function of a module gives in a process of its own."""
    with ProcessPoolExecutor(1, SERVER) as pool:
        return pool.submit(function, *arguments, **options).result()


def opened(path: Path, user: int | None = None) -> tuple[int, Any]:
    """Open a file, as another user where one is given.

    Returns:
        By how many bytes the memory grew at its peak, and how many tensors were found or what the refusal says.
    """
    if user is not None and os.geteuid() == 0:
        os.seteuid(user)
    before = peak()
    try:
        found: int | str = len(open_checkpoint(path).infos)
    except ConvtoolError as error:
        found = f"{type(error).__name__} {error}"
    return peak() - before, found


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
