"""A layer of a checkpoint as another kind of layer that computes the same: what changes, and the record of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.edit import Edit
from convtool.checkpoint.record import FusionRecord, SourceLayer
from convtool.core.conv import Conv, pointwise
from convtool.core.expression import split_input_size
from convtool.core.fields import Fields, geometry_fields
from convtool.core.geometry import Geometry, format_sizes
from convtool.core.recover import Residual, matrix_to_conv, patches_to_linear
from convtool.core.rounding import dtype_name
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.core.tree import BASE, Chain, LayerRef, leaves
from convtool.errors import RefusedError, UsageError, about
from convtool.fusing.edits import module_text
from convtool.fusing.fusion import conv_tensors
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import lower_tree
from convtool.fusing.settle import settle_alone
from convtool.kinds.kind import Layer
from convtool.kinds.stated import FieldSources
from convtool.kinds.written import read_layer

# Of the weight's own rounding steps, relative to its largest entry: a matrix whose taps padding summed up gives its
# kernel back by a small linear system, not to the last bit. So many steps of 16 bits would pass for any matrix.
ROUNDING_STEPS, OF_16_BITS = 64, 2


@dataclass(frozen=True, slots=True, eq=False)
class Reexpression:
    """One layer in its new form.

    Attributes:
        name: of the layer, which it keeps.
        edit: what changes in the checkpoint.
        record: what the new checkpoint says of it.
        module: the module that loads it, as code.
        residual: of a kernel that was recovered from a matrix; else None.
    """

    name: str
    edit: Edit
    record: FusionRecord
    module: str
    residual: Residual | None = None


def as_linear(lowered: LoweredLayer) -> Reexpression:
    """Return a patch convolution as the linear layer that it is on each patch.

    Raises:
        RefusedError: it is none.
    """
    layer, conv = lowered.layer, lowered.conv
    with about(layer.name):
        weight = patches_to_linear(conv)
    kernel = conv.geometry.kernel_size
    linear, size = Conv(weight, conv.bias, pointwise(0)), (conv.in_channels, *kernel)
    return _made(layer, linear, Chain((lowered.source(),)), {}, size, _text("flatten", kernel))


def as_toeplitz(lowered: LoweredLayer, size: Sequence[int]) -> Reexpression:
    """Return a convolution as the linear layer that it is at one input size.

    Args:
        size: of the input, with or without the channels in front.

    Raises:
        RefusedError: it has no spatial axes, so it is one already; or its matrix doesn't fit into memory.
        UsageError: it cannot run on that size.
    """
    layer, conv = lowered.layer, lowered.conv
    if not conv.spatial_axes:
        raise RefusedError(f"{layer.name}: is a linear layer already")
    matrix = ToeplitzMatrix(conv, split_input_size(size, conv.in_channels, conv.spatial_axes))
    needed, there = math.prod(matrix.shape) * matrix.dtype.itemsize, _memory()
    if there is not None and needed > there:
        raise RefusedError(
            f"{layer.name}: its matrix of {matrix.shape[0]} x {matrix.shape[1]} takes {needed / 2**30:.1f} GiB, more"
            f" than the memory free; `convtool toeplitz` writes it sparse and of any size"
        )
    flat = (_text("flatten", matrix.input_size), _text("unflatten", matrix.output_size))
    linear, size = Conv(matrix.to_dense(), matrix.bias, pointwise(0)), (conv.in_channels, *matrix.input_size)
    return _made(layer, linear, Chain((lowered.source(),)), {}, size, *flat)


def lower_convolution(
    checkpoint: Checkpoint, name: str, sources: FieldSources, size: Sequence[int] | None = None
) -> LoweredLayer:
    """Return a layer that is to be written otherwise, lowered; raise UsageError where it is no convolution."""
    layer = checkpoint.layer(name)
    if layer.axes() is None:
        raise UsageError(f"{layer.name}: is a {layer.kind.label}, not a convolution; it stays as it is")
    at = {BASE: checkpoint}
    return settle_alone(leaves(lower_tree(at, LayerRef(name), sources, size)), at, sources.assume)[0]


def made_linear(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], Fields] | None:
    """Return the input size and the fields of a patch convolution that convtool made linear; None of other layers."""
    fusions = checkpoint.record.fusions if checkpoint.record else ()
    known = next((fusion for fusion in reversed(fusions) if fusion.name == name), None)
    if known is None or known.input_size is None or known.after or not known.before:
        return None
    return known.input_size, known.sources[0].fields


def as_conv(
    checkpoint: Checkpoint, layer: Layer, input_size: Sequence[int], kernel: Sequence[int], fields: Fields
) -> Reexpression:
    """Return a linear layer behind a flatten as the convolution that its weight is the matrix of.

    Args:
        input_size: with the channels in front, of what is flattened.
        kernel: of the convolution.
        fields: its stride, padding, ...

    Raises:
        RefusedError: the weight isn't the matrix of such a convolution; the message says how far it is from one.
        UsageError: it isn't a linear layer, or the sizes don't fit.
    """
    if not layer.kind.channels_last:
        raise UsageError(f"{layer.name}: is a {layer.kind.label}, not a linear layer; it stays as it is")
    checkpoint.lower(layer, {}, 0)  # finite numbers, and tensors that fit each other
    weight, bias = checkpoint.tensor(layer.tensors["weight"].name), layer.tensors.get("bias")
    channels, *size = input_size
    if weight.shape[1] != channels * math.prod(size):
        raise UsageError(
            f"{layer.name}: takes {weight.shape[1]} numbers, and an input of {format_sizes(input_size)} has"
            f" {channels * math.prod(size)}"
        )
    stored_bias = None if bias is None else checkpoint.tensor(bias.name)
    geometry = Geometry.of(tuple(kernel), **fields)
    conv, residual = _recovered(layer, weight, stored_bias, geometry, input_size)
    output_size = geometry.output_size(size)
    sources = [_written("flatten", size), SourceLayer(layer.name, layer.kind, {})]
    if math.prod(output_size) > 1:
        sources.append(_written("unflatten", output_size))
    fields = geometry_fields(geometry)
    return _made(layer, conv, Chain(tuple(sources)), fields, tuple(input_size), residual=residual)


def _recovered(
    layer: Layer, weight: Tensor, bias: Tensor | None, geometry: Geometry, input_size: Sequence[int]
) -> tuple[Conv, Residual]:
    """Return the convolution that a weight is the matrix of; see `as_conv`."""
    with about(layer.name):
        conv, residual = matrix_to_conv(weight, bias, geometry, list(input_size[1:]))
    steps = OF_16_BITS if weight.dtype.itemsize == 2 else ROUNDING_STEPS
    most = steps * float(torch.finfo(weight.dtype).eps)
    if residual.relative > most:
        row, column = residual.where
        raise RefusedError(
            f"{layer.name}: its weight isn't the matrix of a convolution ({geometry.describe()}) on"
            f" {format_sizes(input_size)}: the nearest one differs by {residual.relative:.3g} of the largest weight"
            f" (row {row}, column {column}); other sizes, or another geometry?"
        )
    return conv, residual


def _made(
    layer: Layer,
    conv: Conv,
    tree: Chain[SourceLayer],
    fields: Fields,
    input_size: tuple[int, ...],
    before: str = "",
    after: str = "",
    residual: Residual | None = None,
) -> Reexpression:
    """Return a layer in its new form, between what gives and takes the form of its tensors; see `FusionRecord`."""
    gone, name = list(layer.tensor_names()), layer.name
    record = FusionRecord(name, tree, fields, dtype_name(conv.dtype), True, input_size, (), before, after)
    return Reexpression(name, Edit.of(gone, conv_tensors(name, conv), gone[0]), record, module_text(conv), residual)


def _text(kind: str, size: Sequence[int]) -> str:
    return f"{kind}({format_sizes(size)})"


def _written(kind: str, size: Sequence[int]) -> SourceLayer:
    layer = read_layer(_text(kind, size))
    return SourceLayer(layer.name, layer.kind, {})


def _memory() -> int | None:
    """Bytes of memory free, where the system tells."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
