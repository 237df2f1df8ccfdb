"""A layer's matrix as an operator: T @ x and its adjoint by convolution, without making the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.errors import UsageError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class ConvOperator:
    """T and its adjoint on blocks of vectors, in one dtype.

    The adjoint is what backpropagation computes: for a linear map, the gradient of <T x, y> by x is T* y, and torch
    forms it by convolution as well, in any padding mode.

    Args:
        conv: the layer; its bias is left out.
        input_size: spatial sizes of its input.
        dtype: in which everything is computed; float64 (complex128 where the weight is complex) by default.

    Attributes:
        shape: (rows, columns) of T: (C_out * prod(output_size), C_in * prod(input_size)).

    Raises:
        UsageError: the layer cannot run on that input size.
    """

    def __init__(self, conv: Conv, input_size: Sequence[int], dtype: torch.dtype | None = None) -> None:
        self.input_size = tuple(input_size)
        self.output_size = conv.output_size(input_size)
        exact = Conv(conv.weight, None, conv.geometry).exact()
        self.conv = exact if dtype is None else exact.to(dtype)
        self.dtype = self.conv.weight.dtype
        self.shape = conv.out_channels * math.prod(self.output_size), conv.in_channels * math.prod(self.input_size)
        self._graph: tuple[Tensor, Tensor] | None = None  # an input and its output, to go back from

    def apply(self, x: Tensor) -> Tensor:
        """T @ x, for x of shape (columns, n); (rows, n)."""
        self._check(x, self.shape[1])
        inputs = x.to(self.dtype).T.reshape(-1, self.conv.in_channels, *self.input_size)
        with torch.no_grad():
            return forward(self.conv, inputs).flatten(1).T

    def adjoint(self, y: Tensor) -> Tensor:
        """T's conjugate transpose times y, for y of shape (rows, n); (columns, n)."""
        self._check(y, self.shape[0])
        source, out = self._graph_of(y.shape[1])
        outputs = y.to(self.dtype).T.reshape(out.shape)
        (gradient,) = torch.autograd.grad(out, source, outputs, retain_graph=True)
        return gradient.flatten(1).T

    def _graph_of(self, count: int) -> tuple[Tensor, Tensor]:
        if self._graph is None or len(self._graph[0]) != count:
            with torch.enable_grad():
                # At 0, and anywhere else: the gradient of a linear map is the same everywhere.
                shape = count, self.conv.in_channels, *self.input_size
                source = torch.zeros(shape, dtype=self.dtype, requires_grad=True)
                self._graph = source, forward(self.conv, source)
        return self._graph

    def _check(self, block: Tensor, length: int) -> None:
        if block.dim() != 2 or block.shape[0] != length:
            raise UsageError(f"expected a block of shape ({length}, n), got {tuple(block.shape)}")


def operator(conv: Conv, input_size: Sequence[int], *, dtype: torch.dtype | None = None) -> LinearOperator:
    """Return the layer's matrix as a scipy LinearOperator, for iterative solvers; nothing of it is built. Needs scipy.

    It has matvec, rmatvec, matmat and rmatmat; the bias is left out, as in `toeplitz`.

    Args:
        conv: the layer.
        input_size: spatial sizes of its input.
        dtype: in which it computes; float64 by default, whatever the weight's.

    Raises:
        UsageError: the layer cannot run on that input size, or scipy isn't installed.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError:
        raise UsageError("an operator needs scipy: pip install 'convtool[scipy]'") from None
    made = ConvOperator(conv, input_size, dtype)

    def block(function: Any) -> Any:
        return lambda x: function(_tensor(x)).numpy()

    def vector(function: Any) -> Any:
        return lambda x: function(_tensor(x).reshape(-1, 1)).reshape(-1).numpy()

    return LinearOperator(
        made.shape,
        matvec=vector(made.apply),
        rmatvec=vector(made.adjoint),
        matmat=block(made.apply),
        rmatmat=block(made.adjoint),
        dtype=torch.empty(0, dtype=made.dtype).numpy().dtype,
    )


def _tensor(array: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.require(array, requirements=["W"]).copy())  # not the caller's: torch may keep it
