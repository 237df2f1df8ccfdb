"""Chains and sums of layers as one layer, together with the decision whether that is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from convtool.core.border import Verdict, all_of, decide, describe_sizes
from convtool.core.compose import add, compose_chain, plain_behind
from convtool.core.conv import Conv
from convtool.core.expression import in_channels, run
from convtool.core.geometry import Geometry, format_padding, format_sizes
from convtool.core.joint import compose_geometry
from convtool.core.rounding import check_room, held
from convtool.core.tree import Chain, Sum, Tree, flat_parts, fold, leaves, map_leaves
from convtool.errors import ConvtoolError, InputError, RefusedError, UsageError

ALLOW = "--allow-border"  # ends a refusal, where that is a way out
MATRIX = "`convtool toeplitz` with the same layers"  # is one too; a command line can say it in full
AT_ONCE = 1 << 16  # numbers that are rounded together: they stay in the processor's cache

First = TypeVar("First")


@dataclass(frozen=True, slots=True, eq=False)
class NamedConv:
    """A layer and what messages call it."""

    name: str
    conv: Conv


Named = TypeVar("Named", bound=NamedConv)


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """One layer that stands for a chain.

    Attributes:
        conv: the fused layer, in the dtype asked for.
        verdict: where it equals the chain.
    """

    conv: Conv
    verdict: Verdict


def fuse_tree(
    tree: Tree[Named],
    *,
    input_size: Sequence[int] | None,
    allow_border: bool,
    dtype: torch.dtype,
    bias_map: bool = False,
) -> Fusion:
    """Fuse layers in chains and sums into one; computed in float64 and rounded to `dtype` once.

    A sum is exact where its branches are; a chain where the tables say so, of its parts fused.

    Args:
        input_size: spatial sizes for which it has to be exact; every size where None.
        allow_border: give the fused layer also where outputs near the border would differ; not where all would.
        bias_map: where only a bias is lost at the border, give the fused layer a bias for each output of `input_size`.

    Raises:
        RefusedError: it would not be exact, no single layer has that form, or `dtype` doesn't hold its numbers.
        UsageError: the channels don't fit, or the tree cannot run on `input_size`.
        InputError: a layer holds inf or NaN.
    """
    size = None if input_size is None else tuple(input_size)
    if bias_map and size is None:
        raise UsageError("a bias map is made for one input size; give --input-size")
    fused, verdict = _fuse_with_map(tree, size) if bias_map and size is not None else _fuse(tree, size, allow_border)
    return Fusion(_stored(fused, dtype, ", ".join(leaf.name for leaf in leaves(tree))), verdict)


def _fuse_with_map(tree: Tree[Named], size: tuple[int, ...]) -> tuple[Conv, Verdict]:
    """The tree as one layer at one size; with a bias map where a plain bias would not do.

    An affine map is its linear part and what it makes of zero: the biases are left out of the one, and the other is
    computed layer by layer, its borders included.
    """
    try:
        return _fuse(tree, size, allow_border=False)
    except RefusedError:
        unbiased = map_leaves(lambda leaf: NamedConv(leaf.name, leaf.conv.without_bias()), tree)
        fused, verdict = _fuse(unbiased, size, allow_border=False)
    exact = map_leaves(lambda leaf: leaf.conv.exact(), tree)
    zero = torch.zeros(1, in_channels(exact), *size, dtype=fused.dtype)
    return Conv(fused.weight, run(exact, zero)[0], fused.geometry), verdict


def _fuse(
    tree: Tree[Named], size: tuple[int, ...] | None, allow_border: bool, within: bool = False
) -> tuple[Conv, Verdict]:
    """The layer and where it is exact.

    Args:
        within: it is a branch inside of a chain, whose input isn't the whole tree's.
    """
    if isinstance(tree, Sum):
        return _fuse_sum(tree, size, allow_border, within)
    if isinstance(tree, Chain):
        return _fuse_chain(tree, size, allow_border, within)
    conv = tree.conv.exact()
    return conv, decide([conv], conv.geometry, size)


def _fuse_sum(tree: Sum[Named], size: tuple[int, ...] | None, allow_border: bool, within: bool) -> tuple[Conv, Verdict]:
    fused = [_fuse(part, size, allow_border, within) for part in tree.parts]
    total = fused[0][0]
    for part, (conv, _) in zip(tree.parts[1:], fused[1:], strict=True):
        total = _named(tree.parts, part, add, total, conv)
    return total, all_of([verdict for _, verdict in fused])


def _fuse_chain(
    tree: Chain[Named], size: tuple[int, ...] | None, allow_border: bool, within: bool
) -> tuple[Conv, Verdict]:
    parts = list(flat_parts(tree))
    if len(parts) == 1:
        return _fuse(parts[0], size, allow_border, within)
    convs: list[Conv] = []
    at = size
    for part in parts:
        # Inside of a chain only the chain's own border can be allowed: what a branch got wrong would spread.
        conv = _fuse(part, at, allow_border=False, within=True)[0]
        convs.append(conv if isinstance(part, Sum) else part.conv)
        at = None if at is None else conv.output_size(at)
    convs = plain_behind(convs)
    geometry, channels = convs[0].geometry, convs[0].out_channels
    for number, (part, conv) in enumerate(zip(parts[1:], convs[1:], strict=True), 1):
        geometry, channels = _named(parts[: number + 1], part, _check_pair, (geometry, channels), conv)
    fused = compose_chain(convs)
    verdict = decide(convs, fused.geometry, size)
    if not verdict.exact and (verdict.inside or not allow_border):
        why = explain(convs, fused.geometry, verdict, [_label(part) for part in parts], within)
        raise RefusedError(why, ALLOW if why.endswith(ALLOW) else "")
    return fused, verdict


def _check_pair(first: tuple[Geometry, int], second: Conv) -> tuple[Geometry, int]:
    """Geometry and output channels of a composition, its errors raised before anything is computed."""
    geometry, channels = first
    if second.in_channels != channels:
        raise UsageError(
            f"channels don't fit: it takes {second.in_channels} channels, and the layer before gives {channels}"
        )
    return compose_geometry(geometry, second.geometry), second.out_channels


def _named(
    parts: Sequence[Tree[Named]],
    last: Tree[Named],
    join: Callable[[First, Conv], First],
    a: First,
    b: Conv,
) -> First:
    """join(a, b), an error of it saying which layers it is about."""
    try:
        return join(a, b)
    except ConvtoolError as error:
        raise type(error)(f"cannot fuse {', '.join(map(_label, parts))}: {_label(last)}: {error}") from None


def _label(tree: Tree[Named]) -> str:
    label: str = fold(tree, lambda leaf: leaf.name, " ".join, lambda parts: f"({' | '.join(parts)})")
    return label


def fuse(
    chain: Sequence[Conv],
    *,
    input_size: Sequence[int] | None = None,
    allow_border: bool = False,
    dtype: torch.dtype | None = None,
    bias_map: bool = False,
) -> Conv:
    """One layer that computes the same as the chain; computed in float64 and rounded once.

    Args:
        chain: the layers, first to last.
        input_size: spatial sizes for which it has to be exact; every size where None.
        allow_border: give the fused layer also where outputs near the border would differ.
        dtype: of the result; the first layer's by default.
        bias_map: where only a bias is lost at the border, give the result a bias for each output of `input_size`.

    Raises:
        RefusedError: it would not be exact, no single layer has that form, or `dtype` doesn't hold its numbers.
        UsageError: the channels don't fit, or the chain cannot run on `input_size`.
        InputError: a layer holds inf or NaN.

    >>> import torch, convtool
    >>> smooth = convtool.conv(torch.ones(1, 1, 1, 3), padding=(0, 1))
    >>> scale = convtool.conv(torch.full((1, 1, 1, 1), 0.5))
    >>> convtool.fuse([smooth, scale]).weight.flatten()
    tensor([0.5000, 0.5000, 0.5000])
    """
    tree: Tree[NamedConv] = Chain(tuple(NamedConv(f"layer {number}", conv) for number, conv in enumerate(chain, 1)))
    kind = chain[0].dtype if dtype is None else dtype
    return fuse_tree(tree, input_size=input_size, allow_border=allow_border, dtype=kind, bias_map=bias_map).conv


def explain(
    chain: Sequence[Conv], fused: Geometry, verdict: Verdict, names: Sequence[str], within: bool = False
) -> str:
    """Why a fusion isn't exact, what would differ, and each way out, as one line.

    Args:
        within: the chain is a branch inside of another, where no border is allowed and sizes are of its own input.
    """
    said = ", ".join
    late = [name for conv, name in zip(chain[1:], names[1:], strict=True) if conv.geometry.padded]
    biased = [name for conv, name in zip(chain, names, strict=True) if conv.has_bias]
    spread = [name for conv, name in zip(chain[1:], names[1:], strict=True) if conv.geometry.transposed]
    at = "" if verdict.input_size is None else f" for input size {format_sizes(verdict.input_size)}"
    what = f"cannot fuse {said(names)} exactly{at}"
    if verdict.inside:
        if verdict.only_bias and spread:
            cause = f"{said(spread)} spreads the bias of {said(biased[:1])} unevenly over its outputs"
        else:
            cause = "what padding hides of the layers before reaches every output"
        return f"{what}: {cause}, so no output would be right; leave these layers apart"
    if not late and spread:
        cause = f"{said(spread)} overlaps with what the layers before would give past their border"
    elif verdict.only_bias:
        cause = f"the padding of {said(late)} hides the bias of {said(biased[:1])}"
    else:
        cause = f"{said(late)} pad{'s' if len(late) == 1 else ''} what the layers before compute"
    ways = []
    if verdict.only_bias:
        ways.append("--bias-map with --input-size makes it exact at one size")
    if sizes := describe_sizes(verdict):
        where = f"where {names[0]} gets inputs of {sizes}" if within else f"for {sizes}"
        ways.append(f"--input-size decides for one size (it is exact {where})")
    if _is_exact_with_early_padding(chain, fused):
        padding = ",".join(format_padding(fused.padding))
        ways.append(f"give {names[0]} padding {padding} and {said(late)} none, and train on with that")
    if within:
        ways.append("leave this branch out (--allow-border is for the fusion's own border, not for those inside)")
    else:
        ways.append(f"write their matrix for one input size, which is exact: {MATRIX}")
        ways.append(f"accept that: {ALLOW}")
    whose = "this branch's" if within else "the"
    return f"{what}: {cause}, so {verdict.describe_rim()} of {whose} output would differ; {'; or '.join(ways)}"


def _is_exact_with_early_padding(chain: Sequence[Conv], fused: Geometry) -> bool:
    """Tell whether the chain becomes the fused layer, exactly, once its first layer does all of the padding.

    Always so for plain layers; a transposed layer's padding crops, and may have no counterpart.
    """
    early = [replace(chain[0].geometry, padding=fused.padding, padding_mode=fused.padding_mode)]
    early += [replace(conv.geometry, padding=((0, 0),) * conv.spatial_axes) for conv in chain[1:]]
    moved = [Conv(conv.weight, conv.bias, geometry) for conv, geometry in zip(chain, early, strict=True)]
    try:
        return reduce(compose_geometry, early) == fused and decide(moved, fused).exact
    except ConvtoolError:
        return False


def _stored(fused: Conv, dtype: torch.dtype, names: str) -> Conv:
    """Return the layer in the dtype that it is to be stored in, which has to hold its numbers."""
    check_room(fused.dtype, dtype)

    def number(exact: Tensor, what: str) -> Tensor:
        if not bool(exact.sum().isfinite()) and not bool(exact.isfinite().all()):  # the sum alone is quicker
            raise InputError(f"cannot fuse {names}: the fused {what} is not finite; a layer holds inf or NaN")
        return held(exact, dtype, f"cannot fuse {names}: the fused {what}")

    bias = None if fused.bias is None else number(fused.bias, "bias")
    weight = torch.empty(fused.shape, dtype=dtype)
    step = max(1, AT_ONCE // max(1, math.prod(fused.shape[1:])))
    try:
        for first in range(0, fused.out_channels, step):
            weight[first : first + step] = number(fused.rows(first, first + step), "weight")
    except RefusedError:
        number(fused.weight, "weight")  # says how many there are of all
        raise
    return Conv(weight, bias, fused.geometry)
