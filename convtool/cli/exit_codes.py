"""The one table from what happened to the process's exit code."""

from __future__ import annotations

from convtool.errors import ConvtoolError, InputError, OutputError, RefusedError, UsageError

OK = 0
NOT_EQUIVALENT = 1  # of `verify`, and of nothing else
USAGE = 2
INTERNAL = 70
INTERRUPTED = 130  # 128 + SIGINT, and so on
BROKEN_PIPE = 141  # SIGPIPE: whoever read our output went away
TERMINATED = 143

SIGNALS = {"hangup": 129, "interrupted": INTERRUPTED, "quit": 131, "alarm": 142, "terminated": TERMINATED}
# By the kind's name in JSON.
FAILURES = {"usage": USAGE, "input": 3, "refused": 4, "output": 5, **SIGNALS, "internal": INTERNAL}
BY_ERROR: dict[type[ConvtoolError], str] = {
    UsageError: "usage",
    InputError: "input",
    RefusedError: "refused",
    OutputError: "output",
}

MEANINGS = {
    f"{OK}": "done; verify: equivalent",
    f"{NOT_EQUIVALENT}": "verify: not equivalent; no other command exits with 1",
    f"{USAGE}": "usage: unknown option, layer or value; something missing; or the model's own code failed",
    "3": "input missing, corrupt, changed while it was read, unsupported, not finite, or more than memory allows",
    "4": "refused: not exact, not complete, against the model's own run, or more than the dtype can hold",
    "5": "output exists without --force, or could not be written",
    f"{INTERNAL}": "a bug in convtool, with how to report it",
    f"{BROKEN_PIPE}": "whoever read the output went away, as `head` does",
    "128 + n": "ended by signal n (HUP, INT, QUIT, ALRM or TERM); nothing half-written left behind",
}


def kind_of(error: ConvtoolError) -> str:
    """Return the name that JSON has for the kind of an error."""
    return next(name for kind, name in BY_ERROR.items() if isinstance(error, kind))
