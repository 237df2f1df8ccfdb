"""A chain of layers as one layer, together with the decision whether that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convtool.core.border import Verdict, decide, describe_sizes
from convtool.core.compose import compose
from convtool.core.conv import Conv
from convtool.core.geometry import Geometry, format_sizes
from convtool.errors import ConvtoolError, InputError, RefusedError


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """One layer that stands for a chain.

    Attributes:
        conv: the fused layer, in the dtype asked for.
        verdict: where it equals the chain.
    """

    conv: Conv
    verdict: Verdict


def fuse_chain(
    chain: Sequence[Conv],
    *,
    input_size: Sequence[int] | None = None,
    allow_border: bool = False,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
) -> Fusion:
    """Fuse layers, first to last, into one; see `fuse` for the arguments, errors and the source.

    Args:
        names: what the layers are called in messages; 'layer 1', 'layer 2', ... by default.
    """
    names = [f"layer {number}" for number in range(1, len(chain) + 1)] if names is None else names
    fused = chain[0].exact()
    for number, (conv, name) in enumerate(zip(chain[1:], names[1:], strict=True), 1):
        try:
            fused = compose(fused, conv)
        except ConvtoolError as error:
            raise type(error)(f"cannot fuse {_list(names[: number + 1])}: {name}: {error}") from None
    verdict = decide(chain, fused.geometry, input_size)
    if not (verdict.exact or allow_border):
        raise RefusedError(explain(chain, fused.geometry, verdict, names))
    rounded = fused.to(chain[0].weight.dtype if dtype is None else dtype)
    _check_finite(fused, rounded, names)
    return Fusion(rounded, verdict)


def fuse(
    chain: Sequence[Conv],
    *,
    input_size: Sequence[int] | None = None,
    allow_border: bool = False,
    dtype: torch.dtype | None = None,
) -> Conv:
    """One layer that computes the same as the chain; computed in float64 and rounded once.

    Args:
        chain: the layers, first to last.
        input_size: spatial sizes for which it has to be exact; every size where None.
        allow_border: give the fused layer also where outputs near the border would differ.
        dtype: of the result; the first layer's by default.

    Raises:
        RefusedError: it would not be exact, or no single layer has that form.
        UsageError: the channels don't fit, or the chain cannot run on `input_size`.
        InputError: the result is not finite in `dtype`.

    >>> import torch, convtool
    >>> smooth = convtool.conv(torch.ones(1, 1, 1, 3), padding=(0, 1))
    >>> scale = convtool.conv(torch.full((1, 1, 1, 1), 0.5))
    >>> convtool.fuse([smooth, scale]).weight.flatten()
    tensor([0.5000, 0.5000, 0.5000])
    """
    return fuse_chain(chain, input_size=input_size, allow_border=allow_border, dtype=dtype).conv


def explain(chain: Sequence[Conv], fused: Geometry, verdict: Verdict, names: Sequence[str]) -> str:
    """Why a fusion isn't exact, what would differ, and each way out, as one line."""
    late = [name for conv, name in zip(chain[1:], names[1:], strict=True) if conv.geometry.padded]
    if verdict.only_bias:
        biased = [name for conv, name in zip(chain, names, strict=True) if conv.has_bias]
        cause = f"the padding of {_list(late)} hides the bias of {_list(biased[:1])}"
    else:
        cause = f"{_list(late)} pad{'s' if len(late) == 1 else ''} what the layers before compute"
    at = "" if verdict.input_size is None else f" for input size {format_sizes(verdict.input_size)}"
    ways = ["--allow-border accepts that"]
    if sizes := describe_sizes(verdict):
        ways.append(f"--input-size decides for one size (it is exact for {sizes})")
    ways.append(f"or give {names[0]} padding {_padding(fused)} and {_list(late)} none, and train on with that")
    return (
        f"cannot fuse {_list(names)} exactly{at}: {cause}, so {verdict.describe_rim()} of the output would differ;"
        f" {'; '.join(ways)}"
    )


def _padding(geometry: Geometry) -> str:
    sides = [str(before) if before == after else f"{before}:{after}" for before, after in geometry.padding]
    return ",".join(sides)


def _check_finite(exact: Conv, rounded: Conv, names: Sequence[str]) -> None:
    for what, before, after in (("weight", exact.weight, rounded.weight), ("bias", exact.bias, rounded.bias)):
        if before is None or after is None or bool(after.isfinite().all()):
            continue
        if not bool(before.isfinite().all()):
            raise InputError(f"cannot fuse {_list(names)}: the fused {what} is not finite; a layer holds inf or NaN")
        raise InputError(
            f"cannot fuse {_list(names)}: the fused {what} reaches {float(before.abs().max()):.3g}, beyond what"
            f" {str(after.dtype).removeprefix('torch.')} can hold; use --dtype float32 or float64"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
