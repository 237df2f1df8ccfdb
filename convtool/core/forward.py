"""Running a `Conv` through torch's own convolutions, and its adjoint: without making the matrix.

This is what matrices, fusions and bounds are checked against, so it uses the tap tables only where torch has nothing:
for more than three spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.geometry import Axis
from convtool.core.moves import NOTHING, Selection
from convtool.core.rounding import with_room_for
from convtool.core.rows import check_scipy
from convtool.core.taps import tap_table
from convtool.core.unfold import unfold
from convtool.errors import UsageError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def forward(conv: Conv, x: Tensor) -> Tensor:
    """Return the layer's output for x, computed in x's dtype, with imaginary parts where the layer has any.

    Args:
        x: (N, C_in, *input_size)

    Returns:
        (N, C_out, *output_size)

    Raises:
        UsageError: the input doesn't fit the layer.
    """
    if x.dim() != conv.spatial_axes + 2 or x.shape[1] != conv.in_channels:
        raise UsageError(
            f"expected an input of shape (N, {conv.in_channels}, {conv.spatial_axes} spatial sizes),"
            f" got {tuple(x.shape)}"
        )
    output_size = conv.output_size(x.shape[2:])
    if isinstance(conv, Selection):
        return _picked(conv, x)
    x = with_room_for(x, conv.dtype)
    conv = conv.to(x.dtype)
    if not conv.in_channels or not conv.out_channels:
        out = x.new_zeros(len(x), conv.out_channels, *output_size)
    elif conv.spatial_axes not in (1, 2, 3):
        out = _by_taps(conv, x)
    elif conv.only_scales:
        # torch takes a float64 convolution of many groups one group at a time: 100 times as long as the products.
        out = x * conv.weight.reshape(-1, *(1,) * conv.spatial_axes)
    else:
        out = _transposed(conv, x) if conv.geometry.transposed else _direct(conv, x)
    if conv.bias is None:
        return out
    return out + (conv.bias if conv.has_bias_map else conv.bias.reshape(-1, *(1,) * conv.spatial_axes))


def _picked(conv: Selection, x: Tensor) -> Tensor:
    entries = unfold(x, conv.geometry)  # (N, C_in * taps, prod(output))
    out = entries.index_select(1, conv.picked.clamp(min=0))
    out[:, conv.picked == NOTHING] = 0
    return out.unflatten(2, conv.output_size(x.shape[2:])) if conv.spatial_axes else out[:, :, 0]


def _direct(conv: Conv, x: Tensor) -> Tensor:
    geometry = conv.geometry
    if geometry.padded and geometry.padding_mode == "symmetric":  # which F.pad doesn't know
        for number, (size, (before, after)) in enumerate(zip(x.shape[2:], geometry.padding, strict=True), 2):
            around = tap_table(Axis(1, 1, before, after, padding_mode="symmetric"), size)
            x = x.index_select(number, torch.from_numpy(around).flatten())
    elif geometry.padded:
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x = F.pad(x, _pad_list(geometry.padding), mode=mode)
    function = (F.conv1d, F.conv2d, F.conv3d)[conv.spatial_axes - 1]
    out: Tensor = function(x, conv.weight, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups)
    return out


def _transposed(conv: Conv, x: Tensor) -> Tensor:
    geometry = conv.geometry
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[conv.spatial_axes - 1]
    # torch pads both sides alike, so all of the output is made, lengthened by the output padding, and then cut.
    out: Tensor = function(
        x, conv.torch_weight(), stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups
    )
    out = F.pad(out, _pad_list([(0, extra) for extra in geometry.output_padding]))
    for number, ((before, _), size) in enumerate(zip(geometry.padding, conv.output_size(x.shape[2:]), strict=True)):
        out = out.narrow(number + 2, before, size)
    return out


def _by_taps(conv: Conv, x: Tensor) -> Tensor:
    groups = conv.geometry.groups
    columns = unfold(x, conv.geometry).unflatten(1, (groups, -1))  # (N, groups, C_in/groups * taps, prod(output))
    weight = conv.weight.reshape(groups, conv.out_channels // groups, -1)  # (groups, C_out/groups, C_in/groups * taps)
    out: Tensor = weight @ columns  # (N, groups, C_out/groups, prod(output))
    return out.reshape(len(x), conv.out_channels, *conv.output_size(x.shape[2:]))


def _pad_list(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """F.pad wants the last axis first."""
    return [side for pair in reversed(pairs) for side in pair]


def operator(conv: Conv, input_size: Sequence[int], *, dtype: torch.dtype | None = None) -> LinearOperator:
    """Return the layer's matrix as a scipy LinearOperator, for iterative solvers; nothing of it is built. Needs scipy.

    It has matvec, rmatvec, matmat and rmatmat; the bias is left out, as in `toeplitz`. The adjoint is what
    backpropagation computes: for a linear map, the gradient of <T x, y> by x is T* y, and torch forms it by convolution
    as well, in any padding mode.

    Args:
        conv: the layer.
        input_size: spatial sizes of its input.
        dtype: in which it computes; float64 by default (complex128 where the weight is complex), whatever the weight's.

    Raises:
        UsageError: the layer cannot run on that input size, or scipy isn't installed.
    """
    check_scipy("an operator needs")
    from scipy.sparse.linalg import LinearOperator

    exact = conv.without_bias().exact()
    layer = exact if dtype is None else exact.to(dtype)
    inputs, outputs = (conv.in_channels, *input_size), (conv.out_channels, *conv.output_size(input_size))

    @lru_cache(maxsize=1)
    def pull(count: int) -> Any:
        # At 0, and anywhere else: the gradient of a linear map is the same everywhere.
        zeros = torch.zeros(count, *inputs, dtype=layer.dtype)
        return torch.func.vjp(lambda x: forward(layer, x), zeros)[1]

    def apply(x: Any) -> Any:
        return forward(layer, _as_inputs(x, inputs, layer.dtype)).flatten(1).T.numpy()

    def adjoint(y: Any) -> Any:
        back = _as_inputs(y, outputs, layer.dtype)
        return pull(len(back))(back)[0].flatten(1).T.numpy()

    shape, kind = (math.prod(outputs), math.prod(inputs)), torch.empty(0, dtype=layer.dtype).numpy().dtype
    return LinearOperator(shape, matvec=apply, rmatvec=adjoint, matmat=apply, rmatmat=adjoint, dtype=kind)


def _as_inputs(vectors: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return (size, n), or (size,), as (n, *shape); not over the caller's memory, which torch may keep."""
    copied = torch.from_numpy(np.require(vectors, requirements=["W"]).copy())
    return copied.reshape(math.prod(shape), -1).to(dtype).T.reshape(-1, *shape)
