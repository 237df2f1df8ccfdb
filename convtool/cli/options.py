"""The options that several commands share, each stated once."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from convtool.cli import complete
from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch


# Sections of a command's help, in the order in which its options come; OUTPUT is the last.
INPUT, STATED, CHECKING, OUTPUT = "Input", "What the checkpoint doesn't say", "Checking", "Output"

TYPER = "typer"  # under which a field's metadata have what typer wants to know
Size: TypeAlias = tuple[int, ...]  # is parsed as such
FLOATS = ("float64", "float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "complex64", "complex128")
SHORT_DTYPES = {
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    "bf16": "bfloat16",
}

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def argument(metavar: str, text: str, completion: complete.Completion | None = None, *, required: bool = False) -> Any:
    """Declare a field of options as an argument."""
    default = ... if required else None
    return _declared(typer.Argument(default, metavar=metavar, help=text, autocompletion=completion))


def option(
    metavar: str,
    text: str,
    *names: str,
    default: Any = None,
    required: bool = False,
    completion: complete.Completion | None = None,
    parse: Callable[[str, str], Any] | None = None,
    panel: str | None = None,
) -> Any:
    """Declare a field of options as an option with a value.

    Args:
        names: made of the field's where there are none.
        parse: makes the value of a text and the option's name, which a UsageError begins with.
        panel: the section of the help that shows it.
    """
    default = ... if required else default
    info = typer.Option(default, *names, metavar=metavar, help=text, autocompletion=completion, rich_help_panel=panel)
    info.parser = parse
    return _declared(info)


def flag(text: str, *names: str, panel: str | None = None) -> Any:
    """Declare a field of options as an option without a value; short names come besides the one made of the field."""
    return _declared(typer.Option(False, *names, help=text, rich_help_panel=panel))


def spelled(field: str) -> str:
    """Return '--input-size' for input_size."""
    return f"--{field.replace('_', '-')}"


def _declared(info: Any) -> Any:
    return field(default=MISSING if info.default is ... else info.default, metadata={TYPER: info})


def parse_float(name: str, option: str, known: Sequence[str] = FLOATS) -> str:
    """Return an option's value as the name of a real floating-point dtype; raise UsageError for one that isn't known.

    Short names do as well: fp16, half, bf16, ...
    """
    name = SHORT_DTYPES.get(name.removeprefix("torch."), name.removeprefix("torch."))
    if name not in known:
        raise UsageError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    return name


def parse_dtype(name: str, option: str) -> torch.dtype:
    """Return an option's value as torch's dtype, as `parse_float`, and complex ones as well."""
    import torch

    dtype: torch.dtype = getattr(torch, parse_float(name, option, DTYPES))
    return dtype


def parse_device(name: str, option: str) -> torch.device:
    """Return an option's value as a device; raise UsageError where torch can't compute there."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # 'meta' has no numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{option}: torch cannot compute in float64 on {name!r} here ({reason})") from None
    return device


def parse_bytes(text: str, option: str) -> int:
    """Return '500MB' as a number of bytes."""
    number = text.rstrip("BKMGIbkmgi")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or unit not in UNITS or len(number) > 15 or int(number) == 0:
        raise UsageError(f"{option}: expected a number of bytes such as 500MB, 5GB or 2GiB, got {text!r}")
    return int(number) * UNITS[unit]


def parse_rows(text: str, option: str) -> tuple[int, int]:
    """Return 'A:B' as two integers; raise UsageError where A isn't below B."""
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal() or int(start) >= int(stop):
        raise UsageError(f"{option}: expected A:B with A below B, such as 0:100, got {text!r}")
    return int(start), int(stop)
