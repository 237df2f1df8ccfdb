"""Running a command: errors to exit codes, signals to a clean stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from convtool.cli import exit_codes
from convtool.cli.output import Reporter, print_error
from convtool.errors import ConvtoolError


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that half-written files are cleaned up on its way."""


def run(reporter: Reporter, body: Callable[[], int | None]) -> int:
    """Run a command's body and give its exit code, whatever happens in it."""

    def fail(kind: str, code: int, message: str) -> int:
        print_error(reporter.command, kind, code, message, as_json=reporter.as_json)
        return code

    try:
        with _termination_raises():
            return body() or exit_codes.OK
    except ConvtoolError as error:
        code, kind = exit_codes.of_error(error)
        return fail(kind, code, str(error))
    except BrokenPipeError:
        raise  # whoever read the output went away: `flushed` deals with that
    except KeyboardInterrupt:
        return fail("interrupted", exit_codes.INTERRUPTED, "interrupted; nothing half-written was left behind")
    except _Terminated:
        return fail("terminated", exit_codes.TERMINATED, "terminated; nothing half-written was left behind")
    except MemoryError:
        return fail("input", 3, "not enough memory for this; see the command's --help for smaller outputs")
    except Exception as error:
        return bug(error, reporter.command, as_json=reporter.as_json)


def bug(error: Exception, command: str | None, *, as_json: bool) -> int:
    """Report what nobody foresaw, and give the exit code for that."""
    traceback.print_exception(error)
    message = (
        f"a bug in convtool ({type(error).__name__}: {error}); please report it with the trace above, the"
        " command line and the output of `convtool inspect` for the checkpoint"
    )
    print_error(command, "internal", exit_codes.INTERNAL, message, as_json=as_json)
    return exit_codes.INTERNAL


def flushed(action: Callable[[], int]) -> int:
    """Run an action that prints, and see its output off; the exit code is that of a broken pipe where nobody reads."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain there.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM raises, and so unwinds what is half-done; not so where a parent has it ignored (as `nohup` does)."""
    previous = signal.getsignal(signal.SIGTERM)
    if previous is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
