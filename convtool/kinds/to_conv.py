"""A found layer as a `Conv`, once its tensors are seen to be what its kind has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convtool.core.fields import Fields
from convtool.errors import InputError, about
from convtool.kinds.kind import UNKNOWN, Kind, Layer, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from convtool.core.conv import Conv


def to_conv(
    layer: Layer,
    tensors: Tensors,
    fields: Fields,
    axes: int,
    where: str,
    why_not: str | None = None,
    channels: int | None = None,
) -> Conv:
    """Return a found layer with the given fields as a `Conv`, once its tensors are seen to be what its kind has.

    Args:
        tensors: by parameter name, those computed from others included.
        fields: as far as they are stated; torch's defaults hold for the rest.
        axes, channels: of the layer's input, for the kinds whose tensors don't tell.
        where: what messages call it.
        why_not: why its weight isn't what its tensors hold, if so.

    Raises:
        InputError: it isn't a linear map that convtool knows, or a tensor holds inf or NaN.
        UsageError: the fields don't fit the tensors.
    """
    kind = layer.kind
    if kind is UNKNOWN:
        raise InputError(f"{where}: {why_not or _no_kind(layer)}")
    sources = {name for info in layer.tensors.values() for name in info.derived_from}
    others = [name for name, info in layer.tensors.items() if name not in kind.tensors and info.name not in sources]
    if others:
        what = f"what a {kind.label} does with {'that' if len(others) == 1 else 'those'} isn't known"
        raise InputError(f"{where}: holds {', '.join(others)} as well, and {what}")
    own = {name: tensors[name] for name in kind.tensors if name in tensors}
    for name, tensor in own.items():
        if name not in kind.counters:
            _check_numbers(tensor, f"{where}.{name}")
    with about(where):
        Kind.check_fields(kind, fields)  # what their values have to be hangs on the tensors, and is seen by lowering
        return kind.lower(own, {**layer.fields, **fields}, axes, channels)


def _no_kind(layer: Layer) -> str:
    kernel = next((info.name for info in layer.tensors.values() if len(info.shape) > 2), None)
    hint = f"; a fixed kernel is written kernel({kernel}), an offset offset(TENSOR)" if kernel else ""
    return f"is not a convolution, linear layer or batch norm (it holds {', '.join(sorted(layer.tensors))}){hint}"


def _check_numbers(tensor: Tensor, where: str) -> None:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise InputError(f"{where}: expected floating-point numbers, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dtype in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):  # pairs of numbers, and scales of other numbers
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{where}: nothing is computed with {kind}, which is only copied; save it dequantized")
    numbers = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # float8 knows no isfinite
    if not bool(numbers.sum().isfinite()) and not bool(numbers.isfinite().all()):  # the sum alone is quicker
        raise InputError(f"{where}: holds inf or NaN; nothing exact can be said of it")
    if not tensor.numel():
        raise InputError(f"{where}: holds no numbers (shape {tuple(tensor.shape)})")
