"""Modules for a live model that compute what a `Conv` does, also where torch has none that does so by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtool.core.conv import Conv
from convtool.core.geometry import format_sizes
from convtool.errors import RefusedError, UsageError
from convtool.fusing.edits import torch_module


def live_module(conv: Conv, dtype: torch.dtype) -> nn.Module:
    """Return an nn.Conv, nn.ConvTranspose or nn.Linear of the layer's shape and geometry, its numbers not yet loaded.

    Padding that torch's module cannot say by itself is done by a hook, and so is a bias map, which is a parameter.

    Args:
        dtype: of the module, where it has room for the layer's numbers; a complex layer's own otherwise.

    Raises:
        RefusedError: torch has no module of that form.
    """
    geometry, axes = conv.geometry, conv.spatial_axes
    name, shape, others = torch_module(conv)
    kind: Any = getattr(nn, name, None)
    if kind is None or (axes == 0 and geometry.groups > 1):
        raise RefusedError(f"cannot make a live module of a layer of {axes} spatial axes with {geometry.describe()}")
    if any(p >= max(s, d) for p, s, d in zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=True)):
        raise RefusedError(f"torch's transposed convolutions don't know an output padding of {geometry.output_padding}")
    dtype = conv.weight.dtype if conv.weight.is_complex() and not dtype.is_complex else dtype
    module: nn.Module = kind(*shape, **others, dtype=dtype)
    even = all(before == after for before, after in geometry.padding)
    if not even and geometry.transposed:
        module.register_forward_hook(CropOutput(geometry.padding))
    elif not even:
        module.register_forward_pre_hook(PadInput(geometry.padding, geometry.padding_mode))
    if conv.bias is not None and conv.has_bias_map:
        module.register_parameter("bias_map", nn.Parameter(torch.empty(conv.bias.shape, dtype=dtype)))
        module.register_forward_hook(AddBiasMap())
    return module


@dataclass(frozen=True)
class PadInput:
    """Pad each side by its own amount before a layer runs, which nn.Conv cannot do by itself."""

    sides: tuple[tuple[int, int], ...]
    padding_mode: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(inputs[0], [side for pair in reversed(self.sides) for side in pair], mode=mode)


@dataclass(frozen=True)
class CropOutput:
    """Cut each side by its own amount after a transposed layer ran, whose padding that is."""

    sides: tuple[tuple[int, int], ...]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.pad(output, [-side for pair in reversed(self.sides) for side in pair])


@dataclass(frozen=True)
class AddBiasMap:
    """Add a bias of its own to each output."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias_map = module.bias_map
        assert isinstance(bias_map, Tensor)
        if output.shape[1:] != bias_map.shape:
            raise UsageError(
                f"the output is of size {format_sizes(output.shape[2:])}, and the layer's bias map was made for"
                f" {format_sizes(bias_map.shape[1:])}"
            )
        return output + bias_map


class Zeros(nn.Module):
    """Stand where a branch was that a fused layer has taken over: gives zeros of the fused layer's output shape.

    Args:
        fused: the layer, where this reads the same input; None where it reads what that gave.
    """

    def __init__(self, fused: Conv | None) -> None:
        super().__init__()
        self.channels = None if fused is None else fused.out_channels
        self.geometry = None if fused is None else fused.geometry

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros (N, C_out, *output_size), or of x's shape; with memory, for code that adds to them."""
        if self.geometry is None or self.channels is None:
            return torch.zeros_like(x)
        if not self.geometry.kernel_size:
            return x.new_zeros(*x.shape[:-1], self.channels)
        return x.new_zeros(len(x), self.channels, *self.geometry.output_size(x.shape[2:]))


HOOKS = (PadInput, CropOutput, AddBiasMap)  # all that live modules do besides torch's own
