"""The options that several commands share, each stated once."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from convtool.cli import complete
from convtool.cli.output import Reporter
from convtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from convtool.checkpoint import Checkpoint
    from convtool.kinds.stated import FieldSource, FieldSources

TYPER = "typer"  # under which a field's metadata have what typer wants to know
Size: TypeAlias = tuple[int, ...]  # is parsed as such
FLOATS = ("float64", "float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "complex64", "complex128")


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
) -> Any:
    """Declare a field of options as an option with a value.

    Args:
        names: made of the field's where there are none.
        parse: makes the value of a text and the option's name, which a UsageError begins with.
    """
    default = ... if required else default
    info = typer.Option(default, *names, metavar=metavar, help=text, autocompletion=completion)
    info.parser = parse
    return _declared(info)


def flag(text: str, *names: str) -> Any:
    """Declare a field of options as an option without a value; short names come besides the one made of the field."""
    return _declared(typer.Option(False, *names, help=text))


def _declared(info: Any) -> Any:
    return field(default=MISSING if info.default is ... else info.default, metadata={TYPER: info})


def parse_dtype(name: str, option: str, known: Sequence[str] = DTYPES) -> torch.dtype:
    """Return an option's value as torch's dtype; raise UsageError for one that isn't known."""
    if name not in known:
        raise UsageError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def parse_float(name: str, option: str) -> torch.dtype:
    """Return an option's value as one of torch's real floating-point dtypes."""
    return parse_dtype(name, option, FLOATS)


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


def parse_size(text: str, option: str) -> tuple[int, ...]:
    """Return an option's value as sizes; raise UsageError where they aren't positive integers."""
    from convtool.core.fields import parse_sizes

    return parse_sizes(text, option)


# Fields that several commands have, to be called where they are declared.
checkpoint_argument = partial(
    argument,
    "CKPT",
    "A .safetensors or torch (.pt, .pth, .bin) file; or an index or folder of several.",
    required=True,
)
root_option = partial(option, "KEYS", "In a nested torch file, the dotted keys of the state dict.")
model_args_option = partial(option, "JSON", "Arguments of the callable, as JSON.")
input_size_option = partial(
    option, "[C,]H,W", "Spatial sizes of the first layer's input, with or without the channels in front."
)
with_option = partial(
    option, "NAME=FILE", "Another checkpoint, whose layers are then called NAME:LAYER. Repeatable.", "--with"
)
dtype_option = partial(
    option,
    "DTYPE",
    "float64, float32, float16, bfloat16, complex64 or complex128.",
    completion=complete.one_of(*DTYPES),
    parse=parse_dtype,
)
fixed_size_flag = partial(flag, "Also fuse what is exact for inputs of --input-size only.")
measure_flag = partial(flag, "Choose by the time that layers take on this machine, measured.")
force_flag = partial(flag, "Overwrite OUT if it exists.", "-f")


@dataclass(frozen=True, slots=True)
class Writing:
    """Whether and over what is written."""

    dry_run: bool = flag("Say what would be written, and write nothing.")
    force: bool = force_flag()

    @property
    def overwrite(self) -> bool:
        """Whether outputs may be there already."""
        return self.force or self.dry_run


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where the fields that a checkpoint doesn't hold come from, and how it is opened: as typed."""

    geometry: Path | None = option("FILE", "TOML with a table of fields per layer or pattern; - for stdin.")
    model: str | None = option(
        "CODE",
        "The model's code, to read geometry off: pkg.mod:callable, file.py:callable, or a Hugging Face folder."
        " This runs that code, your own, and nothing else in convtool does.",
    )
    model_args: str | None = model_args_option()
    settings: list[str] | None = option(
        "LAYER.FIELD=VALUE",
        "A field that the checkpoint doesn't hold, as torch calls it: stride, padding, dilation, groups,"
        " padding_mode, transposed, output_padding, eps. Repeatable.",
        "--set",
        completion=complete.settings,
    )
    root: str | None = root_option()
    no_mmap: bool = flag("Read files instead of mapping them, on file systems that can't map.")

    def open(self, path: Path, reporter: Reporter) -> Checkpoint:
        """Return the checkpoint at that path."""
        return open_reporting(reporter, path, self.root, mapped=not self.no_mmap)

    def of_model(self, checkpoint: Checkpoint, reporter: Reporter) -> FieldSource | None:
        """Return what --model says of a checkpoint's layers, or None without it; what disagrees is remarked."""
        from convtool.cli.model import read_model

        found = read_model(self.model, self.model_args, checkpoint, reporter)
        return None if found is None else found[1].geometry

    def fields(
        self, model: FieldSource | None, layers: Iterable[str] | None, own: Mapping[str, Any] | None = None
    ) -> FieldSources:
        """Return the places where fields come from, later ones winning: the model, the file, --set, a layer's options.

        Args:
            model: what --model says.
            layers: that there are; None where nobody knows.
            own: by layer, what options such as --stride say.

        Raises:
            UsageError: a table or a setting fits no layer; a misspelt one would be silently without effect.
        """
        from convtool.formats.toml import read_toml
        from convtool.kinds.stated import FieldSource, FieldSources, parse_settings, parse_tables

        found = [] if model is None else [model]
        if self.geometry is not None:
            found.append(parse_tables(read_toml(self.geometry), str(self.geometry)))
        found += [parse_settings(self.settings or ()), FieldSource("options", own or {}, exact_names=True)]
        known = None if layers is None else list(layers)
        for source in found if known is not None else ():
            source.check_used(known or ())
        return FieldSources(tuple(found))


def check_not_source(out: Path, checkpoint: Path) -> None:
    """Raise UsageError where a matrix would be written over the checkpoint that it is of, --force or not."""
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UsageError(f"{out}: is the checkpoint itself, and a matrix in its place would lose it; name another OUT")


def open_reporting(reporter: Reporter, path: Path, root: str | None = None, *, mapped: bool = True) -> Checkpoint:
    """Open a checkpoint, with a bar where the names of very many tensors take long to read."""
    from convtool.checkpoint import open_checkpoint

    with reporter.progress(f"reading {path.name}", None):
        return open_checkpoint(path, root, mapped=mapped)


def open_others(reporter: Reporter, given: list[str] | None, *, mapped: bool = True) -> dict[str, Checkpoint]:
    """Return the checkpoints of --with by name; raise UsageError where one is malformed or given twice."""
    opened: dict[str, Checkpoint] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path) or ":" in name or name in opened:
            raise UsageError(f"--with: expected NAME=FILE, each name once, got {text!r}")
        opened[name] = open_reporting(reporter, Path(path), mapped=mapped)
    return opened
