"""Running a command: errors to exit codes, signals to a clean stop."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
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

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = body() or exit_codes.OK
        sys.stdout.flush()
        return code
    except ConvtoolError as error:
        code, kind = exit_codes.of_error(error)
        return fail(kind, code, str(error))
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    except KeyboardInterrupt:
        return fail("interrupted", exit_codes.INTERRUPTED, "interrupted; nothing half-written was left behind")
    except _Terminated:
        return fail("terminated", exit_codes.TERMINATED, "terminated; nothing half-written was left behind")
    except MemoryError:
        return fail("input", 3, "not enough memory for this; see the command's --help for smaller outputs")
    except Exception as error:
        traceback.print_exc()
        return fail(
            "internal",
            exit_codes.INTERNAL,
            f"a bug in convtool ({type(error).__name__}: {error}); please report it with the trace above, the"
            " command line and the output of `convtool inspect` for the checkpoint",
        )
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
