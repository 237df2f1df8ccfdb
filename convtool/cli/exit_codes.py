"""The one table from what happened to the process's exit code."""

from __future__ import annotations

from convtool.errors import ConvtoolError, InputError, OutputError, RefusedError, UsageError

OK = 0
NOT_EQUIVALENT = 1  # of `verify`, and of nothing else
USAGE = 2
INTERNAL = 70
HUNG_UP = 129  # 128 + SIGHUP, and so on
INTERRUPTED = 130
QUIT = 131
BROKEN_PIPE = 141  # SIGPIPE: whoever read our output went away
ALARM = 142
TERMINATED = 143

FAILURES = {  # by the kind's name in JSON
    "usage": USAGE,
    "input": 3,
    "refused": 4,
    "output": 5,
    "hangup": HUNG_UP,
    "interrupted": INTERRUPTED,
    "quit": QUIT,
    "alarm": ALARM,
    "terminated": TERMINATED,
    "internal": INTERNAL,
}
BY_ERROR: dict[type[ConvtoolError], str] = {
    UsageError: "usage",
    InputError: "input",
    RefusedError: "refused",
    OutputError: "output",
}

MEANINGS = {
    OK: "done; verify: equivalent",
    NOT_EQUIVALENT: "verify: not equivalent; no other command exits with 1",
    USAGE: "usage: unknown option, layer or value",
    3: "input missing, corrupt, changed while it was read, unsupported, not finite, or more than memory allows",
    4: "refused: not exact, not complete, against the model's own run, or more than the dtype can hold",
    5: "output exists without --force, or could not be written",
    INTERNAL: "a bug in convtool, with how to report it",
    HUNG_UP: "ended by SIGHUP, as when a connection drops; nothing half-written left behind",
    INTERRUPTED: "interrupted (SIGINT, Ctrl-C); nothing half-written left behind",
    QUIT: "ended by SIGQUIT; nothing half-written left behind",
    BROKEN_PIPE: "whoever read the output went away, as `head` does",
    ALARM: "ended by SIGALRM; nothing half-written left behind",
    TERMINATED: "terminated (SIGTERM); nothing half-written left behind",
}


def kind_of(error: ConvtoolError) -> str:
    """Return the name that JSON has for the kind of an error."""
    return next(name for kind, name in BY_ERROR.items() if isinstance(error, kind))
