"""What several commands take, each stated once: options, which are called where a field is one, and groups of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli import complete
from convtool.cli.options import DTYPES, OUTPUT, STATED, argument, flag, option, parse_dtype
from convtool.cli.output import Reporter
from convtool.errors import InputError, UsageError, did_you_mean
from convtool.kinds import field_types, parse_field

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from convtool.checkpoint import Checkpoint
    from convtool.kinds.stated import FieldSources
    from convtool.live.agreement import Agreement

checkpoint = partial(
    argument,
    "CKPT",
    "A .safetensors or torch (.pt, .pth, .bin, .pt2) file; or an index or a folder (`convtool manual checkpoints`).",
    required=True,
)
root = partial(option, "KEYS", "In a nested torch file, the dotted keys of the state dict.")
model_args = partial(option, "JSON", "Arguments of the callable, as JSON.")
input_size = partial(
    option, "[C,]H,W", "Spatial sizes of the first layer's input, with or without the channels in front."
)
model_input = partial(
    option,
    "C,H,W|CODE",
    "Size of the model's input, channels first, without the batch; repeat it for several inputs. Or code that returns"
    " them: pkg.mod:callable or file.py:callable.",
)
others = partial(
    option, "NAME=FILE", "Another checkpoint, whose layers are then called NAME:LAYER. Repeatable.", "--with"
)
dtype = partial(
    option,
    "DTYPE",
    "float64, float32, float16 (fp16), bfloat16 (bf16), complex64 or complex128.",
    completion=complete.one_of(*DTYPES),
    parse=parse_dtype,
)
fixed_size = partial(flag, "Also fuse what is exact for inputs of --model-input's size only.")
everything = partial(
    flag, "Also fuse where that takes more multiply-adds, but nothing that the model's code would do a second time."
)
batch_norms_only = partial(
    flag, "Fuse batch norms only. Convolutions that follow each other stay apart, such as those of different blocks."
)
measure = partial(flag, "Choose by the measured time of the layers on this machine.")
PLANNING = ("fixed_size", "measure", "everything", "batch_norms_only")  # the options that `plan_for` takes
strength = partial(
    option,
    "X|NAME=X",
    "How much of the adapters to add, of all or of one --with. Below 0 takes them out. Repeatable.",
)
leave = partial(option, "PATTERN", "Modules of --with files to leave out, such as 'lora_te*'; repeatable.")
tensors_only = partial(flag, "Leave out whatever isn't a tensor, in the state dict and beside it.", panel=OUTPUT)
force = partial(flag, "Overwrite OUT if it exists.", "-f", panel=OUTPUT)
_stated = partial(option, panel=STATED)


@dataclass(frozen=True, slots=True)
class Writing:
    """Whether and over what is written."""

    dry_run: bool = flag("Say what would be written, and write nothing.", panel=OUTPUT)
    force: bool = force()

    @property
    def overwrite(self) -> bool:
        """Whether outputs may be there already."""
        return self.force or self.dry_run

    @property
    def written(self) -> bool:
        """Whether anything is written."""
        return not self.dry_run


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the fields that a checkpoint doesn't hold come from, and how it is opened: as typed."""

    geometry: Path | None = _stated(
        "FILE", "TOML with a table of fields for each layer or pattern; - reads it from stdin."
    )
    model: str | None = _stated(
        "CODE",
        "The model's code, to read geometry off: pkg.mod:callable, file.py:callable, or a Hugging Face folder."
        " This runs your code.",
    )
    model_args: str | None = model_args(panel=STATED)
    settings: list[str] | None = _stated(
        "LAYER.FIELD=VALUE",
        "A field that the checkpoint doesn't hold, as torch calls it: stride, padding, dilation, groups,"
        " padding_mode, transposed, output_padding, eps; standardized, gain_scale. Repeatable.",
        "--set",
        completion=complete.settings,
    )
    eps: float | None = _stated("X", "eps of the batch norms for which nothing else states it.")
    assume: list[str] | None = _stated(
        "FIELD,...", "Accept torch's default of these fields where nothing states them; the result says so."
    )
    assume_defaults: bool = flag("Accept torch's default of every field that nothing states.", panel=STATED)
    root: str | None = root(panel=STATED)

    def open(self, path: Path, reporter: Reporter, *, second: bool = False) -> Checkpoint:
        """Open a checkpoint; of a second one that is flat, --root says nothing."""
        from convtool.checkpoint import is_flat

        root = None if second and is_flat(path) else self.root
        return open_reporting(path, reporter, root)

    def open_others(self, given: list[str] | None, reporter: Reporter) -> dict[str, Checkpoint]:
        """Return the checkpoints of --with by name; raise UsageError where one is malformed or given twice."""
        opened: dict[str, Checkpoint] = {}
        for text in given or ():
            name, equals, path = text.partition("=")
            if not (name and equals and path) or ":" in name or name in opened:
                raise UsageError(f"--with: expected NAME=FILE, such as style=lora.pt, each name once, got {text!r}")
            opened[name] = open_reporting(Path(path), reporter)
        return opened

    def read_model(self, checkpoint: Checkpoint, reporter: Reporter) -> Agreement | None:
        """Return what the model says of a checkpoint's layers; None without --model."""
        from convtool.cli.model import read_model

        if self.model is not None:
            return read_model(self.model, self.model_args, checkpoint, reporter)
        if self.model_args is not None:
            raise UsageError("--model-args: goes with --model")
        return None

    def fields(
        self, model: Agreement | None, layers: Iterable[str] | None, own: Mapping[str, Any] | None = None
    ) -> FieldSources:
        """Return the places where fields come from, later ones winning: the model, the file, --set, a layer's options.

        Args:
            model: as of `read_model`.
            layers: that there are; None where nobody knows.
            own: by layer, what options such as --stride say.

        Raises:
            UsageError: a table or a setting fits no layer; a misspelt one would be silently without effect.
        """
        from convtool.formats.toml import read_toml
        from convtool.kinds.stated import FieldSource, FieldSources, parse_settings, parse_tables

        found = [] if model is None else [model.geometry]
        if self.geometry is not None:
            found.append(replace(parse_tables(read_toml(self.geometry), str(self.geometry)), overrules=True))
        found.append(parse_settings(self.settings or ()))
        found.append(FieldSource("the command's options", own or {}, exact_names=True, overrules=True))
        known = None if layers is None else list(layers)
        for source in found if known is not None else ():
            source.check_used(known or ())
        if self.eps is not None:
            found.append(FieldSource("--eps", {"*": {"eps": parse_field("eps", self.eps)}}))
        return FieldSources(tuple(found), self._accepted())

    def _accepted(self) -> frozenset[str]:
        """Return the fields for which torch's defaults are accepted; raise UsageError for an unknown one."""
        known = field_types()
        if self.assume_defaults:
            return frozenset(known)
        names = [name.strip() for text in self.assume or () for name in text.split(",")]
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known, f"; expected some of {', '.join(known)}")
                raise UsageError(f"--assume: unknown field {name!r}{hint}")
        return frozenset(names)


def out(text: str, *, required: bool = False) -> Any:
    """Declare -o OUT."""
    return option("OUT", text, "--out", "-o", required=required, panel=OUTPUT)


def check_not_source(out: Path, checkpoint: Path) -> None:
    """Raise UsageError where a matrix would be written over the checkpoint that it is of, --force or not."""
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UsageError(f"{out}: is the checkpoint itself, and a matrix in its place would lose it; name another OUT")


def open_reporting(path: Path, reporter: Reporter, root: str | None = None) -> Checkpoint:
    """Open a checkpoint, with a bar where the names of very many tensors take long to read."""
    from convtool.checkpoint import open_checkpoint

    with reporter.progress(f"reading {path.name}", None):
        opened = open_checkpoint(path, root)
    if opened.odd_total:
        reporter.remark(f"{path}: {opened.odd_total}")
    with contextlib.suppress(InputError):  # a damaged record is said where it is needed
        if opened.unknown_record:
            reporter.remark(f"ignored: {opened.unknown_record}")
    return opened
