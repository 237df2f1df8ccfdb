"""The command line: parse, call, print. `main` is the entry point."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run convtool and exit with its code; never returns."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (>&-); a file that is opened must not take its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            # For a layer's name in a terminal that lacks its letters; and so that lines keep their order in a pipe.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        from convtool.cli.app import run_app

        code = run_app(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:  # while it was still starting
        code = 130
    gc.freeze()  # Python looks through all that is alive once more at exit, which takes half a second with torch
    sys.exit(code)
