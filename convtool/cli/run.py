"""Running a command: errors to exit codes, signals to a clean stop."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from convtool.cli import exit_codes
from convtool.cli.output import Reporter, StdoutError, leave, print_error, printable, say
from convtool.cli.signals import Signalled, ending_signals_raise
from convtool.errors import ConvtoolError, InputError
from convtool.formats.account import Account, accounting
from convtool.formats.resources import ran_out


def run(reporter: Reporter, body: Callable[[], int | None]) -> int:
    """Run a command's body and give its exit code, whatever happens in it."""
    with accounting() as account:

        def fail(kind: str, message: str) -> int:
            reporter.remark(*reporter.notes)  # what was assumed may be why
            said = f"{message}; {account.outcome()}" if account.began else message
            return print_error(reporter.command, kind, said, as_json=reporter.as_json)

        try:
            with ending_signals_raise(account):
                code = body() or exit_codes.OK
                if left := account.left_over():
                    say(f"convtool: {printable(left)}")
                return code
        except (BrokenPipeError, StdoutError):
            raise  # `flushed` deals with that
        except ConvtoolError as error:
            behind = _changed(account) or error
            whole = reporter.again(behind.paste) if behind.paste else ""
            return fail(exit_codes.kind_of(behind), str(behind).removesuffix(behind.paste) + whole)
        except Signalled as error:
            return fail(error.kind, error.kind)
        except Exception as error:
            outside = ran_out(error) or _of_the_system(error)
            if outside is not None:
                return fail("output" if account.unfinished else "input", outside)
            return bug(error, reporter.command, as_json=reporter.as_json)
        except BaseException as error:  # convtool's own are above, so it's the user's code that wants to end all this
            ended = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
            return fail("usage", f"the model's own code ended the run, by {ended}; nothing came of it")


def _changed(account: Account) -> ConvtoolError | None:
    """Return that a file changed while it was read, where one has: whatever else went wrong may be due to that."""
    try:
        account.check_unchanged()
    except InputError as error:
        return error
    return None


def _of_the_system(error: Exception) -> str | None:
    """Say what the system refused, and of which file; None for an error that isn't the system's."""
    if not (isinstance(error, OSError) and error.errno):
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror or error}"


@contextlib.contextmanager
def stdout_kept() -> Iterator[None]:
    """Send to stderr whatever is printed meanwhile, by a user's code or by what it starts: stdout is the result's."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where one of them is closed there is nothing to keep apart
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        yield


def bug(error: Exception, command: str | None, *, as_json: bool) -> int:
    """Report what nobody foresaw, and give the exit code for that."""
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(error)
    message = (
        f"a bug in convtool ({type(error).__name__}: {error}); please report it with the trace above, the"
        " command line and the output of `convtool inspect` for the checkpoint"
    )
    return print_error(command, "internal", message, as_json=as_json)


def flushed(action: Callable[[], int]) -> int:
    """Run an action that prints, and see its output off; the exit code tells where it could not be written."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        leave(sys.stdout)
        return exit_codes.BROKEN_PIPE
    except (StdoutError, OSError) as error:  # a full disk: there is no room for a document either
        leave(sys.stdout)
        message = (
            f"stdout: could not be written: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        )
        return print_error(None, "output", message, as_json=False)
