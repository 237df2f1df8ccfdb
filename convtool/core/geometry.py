"""Where a convolution reads: stride, padding, dilation, groups, padding mode, for any number of spatial axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from convtool.errors import UsageError

PaddingMode: TypeAlias = Literal["zeros", "circular", "replicate", "reflect", "symmetric"]
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)

PerAxis: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int | Sequence[int]]

# Far beyond any layer and any input; it keeps every index expression within int64, so that no number given as an
# option can overflow into a wrong table.
LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of a layer: everything that its tap table depends on but the input size."""

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    padding_mode: PaddingMode = "zeros"
    transposed: bool = False
    output_padding: int = 0

    @property
    def reach(self) -> int:
        """Distance between the first and the last tap, in input positions (output positions where transposed)."""
        return self.dilation * (self.kernel - 1)

    def output_size(self, size: int) -> int:
        """Number of output positions for `size` input positions; UsageError where the layer cannot run."""
        if size < 1:
            raise UsageError(f"expected an input size of at least 1, got {size}")
        padding = self.before + self.after
        if self.transposed:
            out = (size - 1) * self.stride - padding + self.reach + self.output_padding + 1
            if out < 1:
                raise UsageError(f"an input size of {size} leaves no output: padding {padding} removes all of it")
            return out
        widest = max(self.before, self.after)
        least = widest + (self.padding_mode == "reflect")  # which leaves out the border itself
        if self.padding_mode in ("circular", "symmetric", "reflect") and least > size:
            done = "wrapped around" if self.padding_mode == "circular" else "mirrored"
            raise UsageError(
                f"{self.padding_mode} padding of {widest} needs an input size of at least {least}, got {size}"
                f" (an input can be {done} only once)"
            )
        free = size + padding - self.reach - 1
        if free < 0:
            raise UsageError(
                f"an input size of {size} with padding {self.before}+{self.after} is smaller than the kernel,"
                f" which spans {self.reach + 1}"
            )
        return free // self.stride + 1

    def runs_on(self, size: int) -> bool:
        """Tell whether `output_size(size)` is defined."""
        try:
            self.output_size(size)
        except UsageError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Geometry:
    """All that a convolution is besides its numbers. Build it with `Geometry.of`, which checks every field.

    Padding is held as (before, after) per axis, resolved: 'same' and 'half' exist only on the way in.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        kernel_size: PerAxis,
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding: PerAxis = 0,
    ) -> Geometry:
        """Check the fields, spelled as torch does and a little more, and return their geometry.

        Args:
            kernel_size: one int per spatial axis; a bare int means one axis.
            stride, dilation, output_padding: an int for all axes or one int per axis.
            padding: an int; one int or one (before, after) pair per axis; 'same' (as torch: output size = input size
                at stride 1, the odd one out goes after); 'valid' (none); 'half' (half the dilated kernel, rounded down,
                on both sides: what keeps the size for odd kernels).
            transposed: whether this is a ConvTranspose; these know zero padding only.

        Raises:
            UsageError: a field is out of range or has the wrong number of axes.
        """
        kernel = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        _check("kernel size", kernel, least=1)
        steps = per_axis("stride", stride, len(kernel), least=1)
        spread = per_axis("dilation", dilation, len(kernel), least=1)
        extra = per_axis("output_padding", output_padding, len(kernel), least=0)
        if isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= LARGEST:
            raise UsageError(f"groups: expected an integer of at least 1, got {groups!r}")
        if padding_mode not in PADDING_MODES:
            raise UsageError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        if transposed:
            _check_transposed(padding_mode, padding, extra, steps, spread)
        elif any(extra):
            raise UsageError(f"output_padding: only a transposed convolution has it, got {output_padding!r}")
        sides = _padding(padding, kernel, steps, spread)
        return cls(kernel, steps, sides, spread, groups, padding_mode, bool(transposed), extra)

    @classmethod
    def from_axes(cls, axes: Sequence[Axis], groups: int) -> Geometry:
        """Return the geometry that has these axes, all of one padding mode."""
        return cls(
            kernel_size=tuple(axis.kernel for axis in axes),
            stride=tuple(axis.stride for axis in axes),
            padding=tuple((axis.before, axis.after) for axis in axes),
            dilation=tuple(axis.dilation for axis in axes),
            groups=groups,
            padding_mode=axes[0].padding_mode if axes else "zeros",
            transposed=any(axis.transposed for axis in axes),
            output_padding=tuple(axis.output_padding for axis in axes),
        )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """One `Axis` per spatial axis."""
        return tuple(
            Axis(k, s, before, after, d, self.padding_mode, self.transposed, extra)
            for k, s, (before, after), d, extra in zip(
                self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding, strict=True
            )
        )

    @property
    def padded(self) -> bool:
        """Whether any side of any axis is padded."""
        return any(before or after for before, after in self.padding)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size; UsageError where the layer cannot run."""
        if len(input_size) != len(self.kernel_size):
            raise UsageError(
                f"expected an input size of {_count(len(self.kernel_size))}, got {format_sizes(input_size)}"
            )
        sizes = []
        for number, (axis, size) in enumerate(zip(self.axes, input_size, strict=True)):
            try:
                sizes.append(axis.output_size(size))
            except UsageError as error:
                where = f"axis {number} of input size {format_sizes(input_size)}: " if len(input_size) > 1 else ""
                raise UsageError(f"{where}{error}") from None
        return tuple(sizes)

    def describe(self) -> str:
        """The fields that differ from nn.Conv's defaults, as torch writes them; the kernel first."""
        parts = [f"kernel {format_sizes(self.kernel_size) or '1'}"]
        if any(s != 1 for s in self.stride):
            parts.append(f"stride {_short(self.stride)}")
        if self.padded:
            parts.append(f"padding {_short(format_padding(self.padding))}")
            if self.padding_mode != "zeros":
                parts.append(self.padding_mode)
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation {_short(self.dilation)}")
        if self.groups != 1:
            parts.append(f"groups {self.groups}")
        if self.transposed:
            parts.append("transposed")
            if any(self.output_padding):
                parts.append(f"output_padding {_short(self.output_padding)}")
        return ", ".join(parts)


def per_axis(field: str, value: PerAxis, axes: int, *, least: int) -> tuple[int, ...]:
    """`value` as one int for each of `axes` axes; UsageError where it isn't that or is below `least`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes  # what is no integer is found below
    if len(values) != axes:
        raise UsageError(f"{field}: expected one value or {_count(axes)}, got {format_sizes(values)}")
    _check(field, values, least=least)
    return values


def format_sizes(values: Iterable[object]) -> str:
    """(3, 32, 32) as '3,32,32', the form in which sizes are given on the command line."""
    return ",".join(str(value) for value in values)


def _check(field: str, values: Sequence[int], *, least: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise UsageError(f"{field}: expected integers of at least {least}, got {format_sizes(values)}")


def _check_transposed(
    mode: str, padding: Padding, extra: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> None:
    if mode != "zeros":
        raise UsageError(f"padding_mode: a transposed convolution knows only 'zeros', got {mode!r}")
    if isinstance(padding, str) and padding != "valid":
        raise UsageError(f"padding: expected numbers for a transposed convolution, got {padding!r}")
    for axis, (more, s, d) in enumerate(zip(extra, stride, dilation, strict=True)):
        if more >= max(s, d):
            raise UsageError(
                f"output_padding: expected less than stride or dilation ({max(s, d)}), got {more} on axis {axis}"
            )


def _padding(
    padding: Padding, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    axes = len(kernel)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise UsageError(f"padding: 'same' is defined for stride 1 only, got stride {format_sizes(stride)}")
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if padding == "valid":  # torch's word for none
        return ((0, 0),) * axes
    if padding == "half":
        halves = [(d * (k - 1) + 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
        return tuple((half, half) for half in halves)
    if isinstance(padding, str):
        raise UsageError(f"padding: expected numbers, 'same', 'valid' or 'half', got {padding!r}")
    if not isinstance(padding, Sequence):
        padding = (padding,) * axes
    if len(padding) != axes:
        given = [":".join(map(str, one)) if isinstance(one, Sequence) else str(one) for one in padding]
        hint = (
            f"; before and after, on each axis: {','.join(given * axes)}"
            if len(padding) == 1 and ":" in given[0]
            else ""
        )
        raise UsageError(f"padding: expected one value or {_count(axes)}, got {','.join(given)}{hint}")
    pairs: list[tuple[int, int]] = []
    for entry in padding:
        sides: tuple[Any, ...] = tuple(entry) if isinstance(entry, Sequence) else (entry, entry)
        if len(sides) != 2:
            raise UsageError(f"padding: expected an int or a pair (before, after) per axis, got {entry!r}")
        _check("padding", sides, least=0)
        pairs.append((sides[0], sides[1]))
    return tuple(pairs)


def _count(axes: int) -> str:
    return f"{axes} value{'' if axes == 1 else 's'}, one per spatial axis"


def format_padding(pairs: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """Format each axis's padding as the command line takes it: '1', or '0:1' where the sides differ."""
    return tuple(str(before) if before == after else f"{before}:{after}" for before, after in pairs)


def _short(values: Sequence[object]) -> str:
    return str(values[0]) if len(set(values)) == 1 else format_sizes(values)
