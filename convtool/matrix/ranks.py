"""The processes that torchrun started, as `convtool.formats.several` wants them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from convtool.errors import OutputError, UsageError
from convtool.formats.several import Ranks

MEETING = timedelta(minutes=10)  # for all processes to have started
PATIENCE = timedelta(hours=12)  # for the slowest shard


@contextlib.contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes of the launch that this one belongs to; it alone where there was none.

    Raises:
        UsageError: torchrun's variables are there, and the processes don't find each other.
    """
    if not _launched():
        yield Ranks()
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=MEETING)
        # Not for a second group, which would wait as long for a process that is gone before it is made.
        dist.distributed_c10d._set_pg_timeout(PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes of this launch don't find each other: {_first_line(error)}") from None
    try:
        yield _Launched()
    finally:
        dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process is the one of its launch that speaks for all."""
    return not _launched() or os.environ["RANK"] == "0"


def _launched() -> bool:
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


class _Launched(Ranks):
    """One of several processes."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def wait(self) -> None:
        import torch.distributed as dist

        try:
            dist.barrier()
        except RuntimeError as error:
            raise OutputError(f"another process of this launch is gone ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
