"""Signals that end a run: as an exception, so that what is half-done is undone, and at once, whatever it is doing."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from convtool.formats.account import Account

# By the name that JSON has for it; some systems lack some.
KINDS = {"SIGHUP": "hangup", "SIGINT": "interrupted", "SIGQUIT": "quit", "SIGALRM": "alarm", "SIGTERM": "terminated"}
UNHEARD = 2.0  # seconds after which a library isn't waited for: its own code doesn't hear of a signal before it ends
AGAIN = 0.01  # seconds after which a signal that was lost is sent once more
UNWINDING = 30.0  # seconds for clearing up what was interrupted


class Signalled(BaseException):
    """A signal that ends the run.

    Attributes:
        kind: of the failure, as JSON has it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@contextlib.contextmanager
def ending_signals_raise(account: Account) -> Iterator[None]:
    """Have the first of these signals raise `Signalled`, and end the process where that isn't heard.

    Not so where a parent has one ignored (as `nohup` does) or a program has a way of its own with it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def raise_it(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) == 1:  # another one would interrupt the clearing up
            raise Signalled(KINDS[signal.Signals(number).name])

    previous = {}
    for name in KINDS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            previous[number] = signal.signal(number, raise_it)
    try:
        with _watched(account, [int(number) for number in previous], heard):
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(account: Account, numbers: list[int], heard: list[int]) -> Iterator[None]:
    """Have a thread see that the block ends soon after a signal; it ends the process where it doesn't.

    Args:
        heard: has something in it once the signal is being dealt with.
    """
    if os.name != "posix":  # where the numbers of signals go through a socket
        yield
        return
    (out, into), ended, owner = os.pipe(), threading.Event(), os.getpid()
    os.set_blocking(into, False)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while (data := os.read(out, 1)) and os.getpid() == owner:
                if data[0] in numbers and not ended.wait(UNHEARD) and not (heard and ended.wait(UNWINDING)):
                    _end(account, data[0])
        os.close(out)

    def unraisable(lost: Any) -> None:
        """Have a signal sent once more that came in the midst of a finalizer, out of which nothing is raised."""
        if isinstance(lost.exc_value, Signalled) and heard:
            number = heard[0]
            heard.clear()
            _thread.start_new_thread(_send_again, (owner, number, ended))
        else:
            before_hook(lost)

    before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    before_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        # Not by `threading`, which would wait for a thread that has no memory to begin with.
        with contextlib.suppress(RuntimeError, MemoryError):
            _thread.start_new_thread(watch, ())
        yield
    finally:
        ended.set()
        sys.unraisablehook = before_hook
        signal.set_wakeup_fd(before)
        os.close(into)  # which ends the thread's reading


def _send_again(process: int, number: int, ended: threading.Event) -> None:
    if not ended.wait(AGAIN):  # a run that has ended meanwhile is whole
        os.kill(process, number)


def _end(account: Account, number: int) -> None:
    """Remove what is half-written, and end the process."""
    for path in list(account.unfinished):
        with contextlib.suppress(OSError):
            path.unlink()
    kind = KINDS[signal.Signals(number).name]
    with contextlib.suppress(OSError):
        os.write(2, f"convtool: {kind}; {account.outcome()}\n".encode("utf-8", "backslashreplace"))
    os._exit(128 + number)


def _forget() -> None:
    """Let a process that was forked off go its own way: its signals aren't this one's."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
