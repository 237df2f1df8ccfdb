"""The options that several commands share, each stated once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convtool.cli import complete
from convtool.cli.output import Reporter
from convtool.errors import InputError, UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from convtool.checkpoint import Checkpoint
    from convtool.kinds.stated import FieldSource, FieldSources

STREAM = "-"  # in place of a file: stdin, or stdout
FLOATS = ("float64", "float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "complex64", "complex128")

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="A .safetensors or torch (.pt, .pth, .bin) file; or an index or folder of several.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, also on failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No remarks on stderr.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite OUT if it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]
Root = Annotated[
    str | None,
    typer.Option(
        "--root", metavar="KEYS", help="In a nested torch file, the dotted keys of the state dict.", show_default=False
    ),
]
NoMmap = Annotated[
    bool, typer.Option("--no-mmap", help="Read files instead of mapping them, on file systems that can't map.")
]
GeometryFile = Annotated[
    Path | None,
    typer.Option(
        "--geometry",
        metavar="FILE",
        help="TOML with a table of fields per layer or pattern; - for stdin.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="CODE",
        help="The model's code, to read geometry off: pkg.mod:callable, file.py:callable, or a Hugging Face folder."
        " This runs that code, your own, and nothing else in convtool does.",
        show_default=False,
    ),
]
ModelArgs = Annotated[
    str | None,
    typer.Option("--model-args", metavar="JSON", help="Arguments of the callable, as JSON.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="LAYER.FIELD=VALUE",
        help="A field that the checkpoint doesn't hold, as torch calls it: stride, padding, dilation, groups,"
        " padding_mode, transposed, output_padding, eps. Repeatable.",
        show_default=False,
        autocompletion=complete.settings,
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME=FILE",
        help="Another checkpoint, whose layers are then called NAME:LAYER. Repeatable.",
        show_default=False,
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="[C,]H,W",
        help="Spatial sizes of the first layer's input, with or without the channels in front.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float64, float32, float16, bfloat16, complex64 or complex128.",
        show_default=False,
        autocompletion=complete.one_of(*DTYPES),
    ),
]
Stride = Annotated[str | None, typer.Option(metavar="N[,N]", help="Stride of LAYER.", show_default=False)]
Padding = Annotated[
    str | None,
    typer.Option(metavar="P", help="1, or 1,2, or before:after (0:1,2:2), or same, or half.", show_default=False),
]
Dilation = Annotated[str | None, typer.Option(metavar="N[,N]", help="Dilation of LAYER.", show_default=False)]
Groups = Annotated[str | None, typer.Option(metavar="N", help="Groups of LAYER.", show_default=False)]
PaddingModeOption = Annotated[
    str | None,
    typer.Option(
        "--padding-mode",
        help="zeros, circular, replicate or reflect.",
        show_default=False,
        autocompletion=complete.one_of("zeros", "circular", "replicate", "reflect"),
    ),
]
Transposed = Annotated[bool, typer.Option("--transposed", help="LAYER is a ConvTranspose.")]
OutputPadding = Annotated[
    str | None,
    typer.Option("--output-padding", metavar="N[,N]", help="Of a transposed LAYER.", show_default=False),
]

FixedSize = Annotated[
    bool, typer.Option("--fixed-size", help="Also fuse what is exact for inputs of --input-size only.")
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Choose by the time that layers take on this machine, measured.")
]


@dataclass(frozen=True, slots=True)
class Speech:
    """How a command speaks."""

    as_json: Json = False
    quiet: Quiet = False

    def reporter(self, command: str) -> Reporter:
        """Of one run of that command."""
        return Reporter(command, as_json=self.as_json, quiet=self.quiet)


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where the fields that a checkpoint doesn't hold come from, and how it is opened: as typed."""

    geometry: GeometryFile = None
    model: Model = None
    model_args: ModelArgs = None
    settings: Settings = None
    root: Root = None
    no_mmap: NoMmap = False

    def open(self, path: Path, reporter: Reporter) -> Checkpoint:
        """The checkpoint at that path."""
        return open_reporting(reporter, path, self.root, mapped=not self.no_mmap)

    def fields(self, model: FieldSource | None = None, layer_fields: dict[str, Any] | None = None) -> FieldSources:
        """The places where fields come from, later ones winning; see `field_sources`."""
        return field_sources(self.geometry, self.settings, layer_fields or {}, model)

    def of_model(self, checkpoint: Checkpoint, reporter: Reporter) -> FieldSource | None:
        """What --model says of a checkpoint's layers, or None without it; what disagrees is remarked."""
        from convtool.cli.model import model_fields

        return model_fields(self.model, self.model_args, checkpoint, reporter)


def parse_dtype(name: str | None, option: str = "--dtype", known: Sequence[str] = DTYPES) -> torch.dtype | None:
    """An option's value as torch's dtype; UsageError for one that isn't known."""
    if name is None:
        return None
    if name not in known:
        raise UsageError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_input_size(text: str | None, option: str = "--input-size") -> tuple[int, ...] | None:
    """An option's value as sizes; UsageError where they aren't positive integers."""
    from convtool.core.fields import parse_sizes

    return None if text is None else parse_sizes(text, option)


def check_not_source(out: Path, checkpoint: Path) -> None:
    """UsageError where a matrix would be written in the place of the checkpoint that it is of, --force or not."""
    from convtool.errors import UsageError

    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UsageError(f"{out}: is the checkpoint itself, and a matrix in its place would lose it; name another OUT")


def field_sources(
    geometry: Path | None,
    settings: list[str] | None,
    layer_fields: dict[str, Any],
    model: FieldSource | None = None,
) -> FieldSources:
    """The places where fields may come from, later ones winning: the model, the file, --set, options for the one layer.

    Args:
        layer_fields: by layer name, what options such as --stride say.
        model: what --model says (convtool.cli.model).
    """
    from convtool.kinds.stated import FieldSource, FieldSources

    sources = [] if model is None else [model]
    if geometry is not None:
        sources.append(_geometry_file(geometry))
    set_tables: dict[str, Any] = {}
    for text in settings or ():
        layer, field, value = _setting(text)
        set_tables.setdefault(layer, {})[field] = value
    sources.append(FieldSource("--set", set_tables))
    sources.append(FieldSource("options", layer_fields, exact_names=True))
    return FieldSources(tuple(sources))


def _setting(text: str) -> tuple[str, str, Any]:
    """A --set as (layer, field, value); UsageError, with what was typed, where it is none."""
    from convtool.kinds.stated import parse_setting

    try:
        return parse_setting(text)
    except UsageError as error:
        raise UsageError(str(error) if str(error).startswith("--set") else f"--set {text}: {error}") from None


def open_reporting(reporter: Reporter, path: Path, root: str | None = None, *, mapped: bool = True) -> Checkpoint:
    """`convtool.checkpoint.open_checkpoint`, with a bar where the names of very many tensors take long to read."""
    from convtool.checkpoint import open_checkpoint

    with reporter.progress(f"reading {path.name}", None):
        return open_checkpoint(path, root, mapped=mapped)


def open_others(reporter: Reporter, given: list[str] | None, *, mapped: bool = True) -> dict[str, Checkpoint]:
    """The checkpoints of --with by name; UsageError where one is malformed or given twice."""
    opened: dict[str, Checkpoint] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path) or ":" in name or name in opened:
            raise UsageError(f"--with: expected NAME=FILE, each name once, got {text!r}")
        opened[name] = open_reporting(reporter, Path(path), mapped=mapped)
    return opened


def check_used(sources: FieldSources, layers: list[str]) -> None:
    """Every table and setting names a layer that is there: a misspelt one would be silently without effect.

    Raises:
        UsageError: one doesn't.
    """
    for source in sources.sources:
        for pattern in source.tables:
            if not any(source.matches(pattern, layer) for layer in layers):
                hint = did_you_mean(pattern, layers, "; `convtool inspect` lists the layers")
                raise UsageError(f"{source.origin}: {pattern!r} fits no layer of the checkpoint{hint}")


def single_layer_fields(**given: object) -> dict[str, Any]:
    """Fields from --stride, --padding, ...: those that were given, parsed."""
    from convtool.kinds import parse_field

    fields = {}
    for name, value in given.items():
        if value not in (None, False):
            try:
                fields[name] = parse_field(name, value)
            except UsageError as error:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option}: {str(error).removeprefix(f'{name}: ')}") from None
    return fields


def _geometry_file(path: Path) -> Any:
    from convtool.kinds.stated import parse_tables

    return parse_tables(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file, or stdin for '-'; InputError where it is missing or isn't one."""
    from convtool.formats.toml import LARGEST, parse_toml

    try:
        if str(path) == STREAM:
            data = sys.stdin.buffer.read(4 * LARGEST + 1)
        else:
            with path.open("rb") as file:
                data = file.read(4 * LARGEST + 1)
        return parse_toml(data.decode(), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None
