"""nn.Linear: a 1x1 convolution at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convtool.core.fields import Fields
from convtool.errors import UsageError
from convtool.kinds.kind import Kind, Shapes, TensorInfo, Tensors

if TYPE_CHECKING:
    from convtool.core.conv import Conv


class Linear(Kind):
    """A linear layer over the channels, which are the last axis of its input."""

    name = "linear"
    tensors = ("weight", "bias")
    main = True
    channels_last = True
    modules = ("torch.nn.modules.linear.Linear",)

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        flat_bias = "bias" not in tensors or len(tensors["bias"].shape) == 1
        return "weight" in tensors and len(tensors["weight"].shape) == 2 and flat_bias

    def takes(self, shapes: Shapes, fields: Fields, gives: int | None) -> int | None:
        return shapes["weight"][1]

    def gives(self, shapes: Shapes, fields: Fields, takes: int | None) -> int | None:
        return shapes["weight"][0]

    def fields_of_run(self, run: Sequence[tuple[str, Mapping[str, Any]]], shapes: Shapes) -> Fields | None:
        return {} if [name for name, _ in run] == ["aten.linear.default"] else None

    def moves_over(self, rank: int, shapes: Shapes, fields: Fields) -> int | None:
        return 0 if rank >= 2 else None  # the last axis

    def lower(self, tensors: Tensors, fields: Fields, axes: int, channels: int | None) -> Conv:
        from convtool.core.conv import Conv, pointwise

        weight = tensors["weight"]
        if weight.dim() != 2:
            raise UsageError(f"expected a linear layer's weight of 2 axes, got shape {tuple(weight.shape)}")
        return Conv(weight.reshape(*weight.shape, *(1,) * axes), tensors.get("bias"), pointwise(axes))


LINEAR = Linear()
