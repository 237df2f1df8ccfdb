"""`convtool spectrum`: the singular values at both ends of the matrix of a layer or a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convtool.cli import shared, spectrum_table
from convtool.cli.command import Command
from convtool.cli.document import INLINE, Count, Sizes, fill
from convtool.cli.layer import LayerOptions, LayersAtSize, OfLayers, find_layers, more_layers
from convtool.cli.options import Size, flag, option, parse_bytes
from convtool.cli.output import Reporter
from convtool.errors import UsageError

if TYPE_CHECKING:
    from convtool.core.singular import Method, SingularValue

EXAMPLES = """
convtool spectrum resnet.safetensors layer1.0.conv1 --input-size 56,56 --padding 1
# of a chain, exact at the borders
convtool spectrum net.pt conv1 bn1 conv2 --input-size 3,32,32 --set 'conv*.padding=1'
# the ten largest and the ten smallest, and their vectors
convtool spectrum net.pt conv1 --input-size 3,32,32 --count 10 --vectors vectors.npz
# of each layer of a pattern; of a whole network, and by how much it enlarges a difference at most
convtool spectrum net.pt 'layer1.*' --input-size 56,56 --set '*.padding=1'
convtool spectrum net.pt '*' --model net.py:Net --model-input 3,224,224
# the largest alone, in a fraction of the time
convtool spectrum vit.pt blocks.0.mlp.fc1 --largest
# how far the answers may be off, relative to the largest
convtool spectrum net.pt conv1 --input-size 3,32,32 --tolerance 1e-4
"""
METHODS = {
    "fourier": "by Fourier transform, exact to rounding",
    "dense": "by a dense SVD, exact to rounding",
    "cholesky": "by Lanczos, and with a factored Gram matrix",
    "lanczos": "by Lanczos, and the bound of an endless input",
    "sums": "by Lanczos, and sums of absolute values",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The layer, and how much is to be done for its singular values."""

    wanted: LayerOptions
    more: list[str] | None = more_layers()
    largest: bool = flag("Only the largest, which takes much less time for large layers.")
    tolerance: float = option("T", "How far off the values may be, relative to the largest.", default=1e-6)
    steps: int | None = option("N", "The most steps of an iteration; by default enough for most layers.")
    memory: int | None = option(
        "SIZE",
        "What a factorisation may take, such as 4GB, however long it takes; 1.5GiB and a few minutes in all without.",
        parse=parse_bytes,
    )
    count: int | None = option("K", "Also print the K largest and the K smallest singular values.")
    vectors: Path | None = option("OUT", "Write the singular vectors of --count (1 without it): an .npz file.")
    model_input: Size | None = option("C,H,W", "With a pattern and --model: the size of the network's input.")
    sources: shared.Sources
    force: bool = shared.force()

    @property
    def how(self) -> dict[str, Any]:
        """What `convtool.core.spectrum.spectrum` is told."""
        return {name: getattr(self, name) for name in ("tolerance", "steps", "memory", "largest")}


@dataclass(frozen=True, slots=True)
class Near:
    """A number that a singular value is near.

    Attributes:
        error: how far from it one is, at most.
    """

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Several:
    """Singular values at both ends, the outermost first.

    Attributes:
        complete: whether none is missing in between, which only a dense SVD proves.
    """

    largest: tuple[Near, ...]
    smallest: tuple[Near, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Both ends of a spectrum.

    Attributes:
        smallest: null with --largest.
        condition: largest / smallest; null where one of them isn't known to the tolerance.
        condition_error: how far off the condition number may be; null where that is.
        condition_at_least: null with --largest.
        tolerance: on errors, relative to the largest.
        steps: of iterations.
        lacking: bytes of a factorisation that would have proved more and wasn't made; 0 without one.
        several: those of --count.
        vectors: the file of --vectors.
    """

    source: Path
    of: OfLayers = field(metadata=INLINE)
    shape: Sizes
    largest: SingularValue
    smallest: SingularValue | None
    condition: float | None
    condition_error: float | None
    condition_at_least: float | None
    tolerance: float
    methods: tuple[Method, ...]
    steps: Count
    lacking: Count
    several: Several | None
    vectors: Path | None
    assumed: tuple[str, ...]


def run(options: Options, reporter: Reporter) -> Result | spectrum_table.TableResult:
    """The largest and the smallest singular value of the matrix of a layer or a chain, and its condition number.

    A large matrix isn't built: it is taken apart where dilation, strides, groups or padding that wraps around allow it.
    Where its product with its transpose can be factored in a few minutes (64 to 64 channels, 3x3, up to about 28x28),
    both ends are proved. Each value is given with how far off it may be; where that is more than the tolerance, as the
    bounds that hold for certain. The largest always has one above.
    """
    from convtool.core.spectrum import spectrum

    if not 0 < options.tolerance < 1:
        raise UsageError(f"--tolerance: expected a number between 0 and 1, got {options.tolerance:g}")
    if options.steps is not None and options.steps < 1:
        raise UsageError(f"--steps: expected a number of at least 1, got {options.steps}")
    if options.count is not None and options.count < 1:
        raise UsageError(f"--count: expected at least 1, got {options.count}")
    if options.largest and (options.count is not None or options.vectors is not None):
        raise UsageError("--largest: is one number; --count and --vectors, of both ends, don't go with it")
    opened = options.sources.open(options.wanted.checkpoint, reporter)
    if spectrum_table.is_pattern(options.wanted.layer, opened.layers):
        return spectrum_table.run_table(options, options.sources, opened, reporter)
    if options.model_input is not None:
        raise UsageError("--model-input: is for a pattern, such as '*'; of one layer, --input-size says it")
    if options.vectors is not None:
        from convtool.matrix.vectors import check_vectors

        shared.check_not_source(options.vectors, options.wanted.checkpoint)
        check_vectors(options.vectors, force=options.force)
    found = find_layers(options.wanted, options.more, options.sources, reporter)
    with reporter.progress("computing singular values", None):
        ends = spectrum(found.layers, found.spatial, **options.how)
        several = _several(options, found)
    unknown = dict.fromkeys(("condition_at_least",) if ends.smallest is None else ())
    if ends.smallest is None or not (ends.largest.proved and ends.smallest.proved):
        unknown |= {"condition": None, "condition_error": None}
    return fill(Result, ends, found, options, several=several, **{**unknown, "largest": ends.largest})


def _several(options: Options, found: LayersAtSize) -> Several | None:
    """Return the singular values of --count, and write their vectors, where these are wanted."""
    if options.count is None and options.vectors is None:
        return None
    from convtool.core.extremes import extremes

    made = extremes(found.layers, found.spatial, options.count or 1)
    if options.vectors is not None:
        from convtool.matrix.vectors import write_vectors

        write_vectors(made, options.vectors, force=options.force)
    high, low = (
        tuple(Near(float(value), float(error)) for value, error in zip(values, errors, strict=True))
        for values, errors in ((made.largest, made.largest_errors), (made.smallest, made.smallest_errors))
    )
    return Several(high, low, made.complete)


def show(result: Result | spectrum_table.TableResult, reporter: Reporter) -> None:
    """Print both values, the condition number, and how they were found."""
    if isinstance(result, spectrum_table.TableResult):
        spectrum_table.show_table(result, reporter)
        return
    rows, columns = result.shape
    how = ", ".join(METHODS[method] for method in result.methods)
    after = f", {result.steps} steps" if result.steps else ""
    reporter.line(f"{result.of.name}: {result.of.sizes_text}, matrix {rows} x {columns}")
    reporter.lines(result.of.fields_lines)
    reporter.line(f"  largest singular value   {spectrum_table.value_text(result.largest, 1)}")
    reporter.line(f"  smallest singular value  {spectrum_table.value_text(result.smallest, -1)}")
    if result.smallest is not None:
        reporter.line(f"  condition number         {_condition(result)}")
    reporter.line(f"  {how}{after}{_proved(result)}")
    if result.several is not None:
        _show_several(result.several, result.vectors, reporter)
    if not (result.largest.proved and (result.smallest is None or result.smallest.proved)):
        more = f"; --memory {math.ceil(result.lacking / 1e6)}MB lets a factorisation decide" if result.lacking else ""
        reporter.remark(
            f"not settled to {result.tolerance:g} in {result.steps} steps: what is printed are bounds{more}"
        )


def _show_several(several: Several, vectors: Path | None, reporter: Reporter) -> None:
    """Print the values at both ends, each with how far from a singular value it may be."""
    for name, values in (("largest", several.largest), ("smallest", several.smallest)):
        reporter.line(f"  the {len(values)} {name}")
        for value in values:
            reporter.line(f"    {value.value:.9g} (+- {value.error:.1g})")
    if not several.complete:
        reporter.remark("each of these is near a singular value; that none lies in between is not proved")
    if vectors is not None:
        reporter.line(f"wrote {vectors}")


def _condition(result: Result) -> str:
    if result.condition is None or result.condition_error is None:
        return f"at least {result.condition_at_least or 0:.6g}"
    if math.isinf(result.condition):
        return "infinite: to the accuracy above, the smallest is zero"
    vague = result.condition_error > 1e-6 * result.condition
    return f"{result.condition:.6g}{f' (+- {result.condition_error:.1g})' if vague else ''}"


def _proved(result: Result) -> str:
    """Return what of an iteration's answer is certain; what is exact to rounding needs no word."""
    ends = ((result.largest, "larger"), (result.smallest, "smaller"))
    beyond = [word for value, word in ends if value is not None and value.proved and result.steps]
    return f"; proved: none is {' or '.join(beyond)}" if beyond else ""


COMMAND = Command("CKPT LAYER [LAYER...]", EXAMPLES, Options, run, show)
