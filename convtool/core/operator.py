"""A layer's matrix as an operator: T @ x and its adjoint by convolution, without making the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.errors import UsageError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


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
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError:
        raise UsageError("an operator needs scipy: pip install 'convtool[scipy]'") from None
    exact = conv.without_bias().exact()
    layer = exact if dtype is None else exact.to(dtype)
    inputs, outputs = (conv.in_channels, *input_size), (conv.out_channels, *conv.output_size(input_size))

    def given(vectors: Any, shape: tuple[int, ...]) -> Tensor:
        """Return (size, n), or (size,), as (n, *shape); not over the caller's memory, which torch may keep."""
        copied = torch.from_numpy(np.require(vectors, requirements=["W"]).copy())
        return copied.reshape(math.prod(shape), -1).to(layer.dtype).T.reshape(-1, *shape)

    @lru_cache(maxsize=1)
    def pull(count: int) -> Any:
        # At 0, and anywhere else: the gradient of a linear map is the same everywhere.
        zeros = torch.zeros(count, *inputs, dtype=layer.dtype)
        return torch.func.vjp(lambda x: forward(layer, x), zeros)[1]

    def apply(x: Any) -> Any:
        return forward(layer, given(x, inputs)).flatten(1).T.numpy()

    def adjoint(y: Any) -> Any:
        back = given(y, outputs)
        return pull(len(back))(back)[0].flatten(1).T.numpy()

    return LinearOperator(
        (math.prod(outputs), math.prod(inputs)),
        matvec=apply,
        rmatvec=adjoint,
        matmat=apply,
        rmatmat=adjoint,
        dtype=torch.empty(0, dtype=layer.dtype).numpy().dtype,
    )
