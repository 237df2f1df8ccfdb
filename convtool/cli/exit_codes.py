"""The one table from what happened to the process's exit code."""

from __future__ import annotations

from convtool.errors import ConvtoolError, InputError, OutputError, RefusedError, UsageError

OK = 0
NOT_EQUIVALENT = 1  # of `verify`, and of nothing else
USAGE = 2
INTERNAL = 70
INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE: whoever read our output went away
TERMINATED = 143  # 128 + SIGTERM

FAILURES = {  # by the kind's name in JSON
    "usage": USAGE,
    "input": 3,
    "refused": 4,
    "output": 5,
    "interrupted": INTERRUPTED,
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
    NOT_EQUIVALENT: "verify: not equivalent, and nothing else ever exits 1",
    USAGE: "usage: unknown option, layer or value",
    3: "input missing, corrupt, unsupported, or not finite",
    4: "refused: it would not be exact, or the pickle holds code",
    5: "output exists without --force, or could not be written",
    INTERNAL: "a bug in convtool, with how to report it",
    INTERRUPTED: "interrupted; nothing half-written left behind",
    BROKEN_PIPE: "whoever read the output went away, as `head` does",
    TERMINATED: "terminated; nothing half-written left behind",
}


def kind_of(error: ConvtoolError) -> str:
    """Return the name that JSON has for the kind of an error."""
    return next(name for kind, name in BY_ERROR.items() if isinstance(error, kind))
