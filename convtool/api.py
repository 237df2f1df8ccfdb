"""The parts of the Python API that are no other module's business: building a Conv by hand, and live modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convtool.checkpoint import open_checkpoint
from convtool.checkpoint.info import FUNCTION
from convtool.core.conv import Conv, lower_conv
from convtool.core.geometry import Geometry, Padding, PerAxis
from convtool.core.tree import BASE, has_sum
from convtool.errors import InputError, RefusedError, UsageError


def conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: PerAxis = 0,
) -> Conv:
    """A `Conv` from the tensors of an nn.Conv (nn.ConvTranspose where `transposed`) and its fields.

    Args:
        weight: as torch lays it out: (C_out, C_in/groups, *kernel), or (C_in, C_out/groups, *kernel) transposed.
        bias: (C_out,) or None.
        stride, dilation, output_padding: an int, or one int per spatial axis.
        padding: an int; an int or a pair (before, after) per axis; 'same'; 'half'.
        groups, padding_mode, transposed: as in torch.

    Raises:
        UsageError: a field is out of range, or doesn't fit the weight.
    """
    geometry = Geometry.of(
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    return lower_conv(weight, bias, geometry)


def apply(model: nn.Module, path: str | Path) -> nn.Module:
    """Put a checkpoint's recorded fusions into a live model and load its tensors strictly.

    Each fused layer takes its place; nn.Identity stands where the other layers of its chain were, and branches of a sum
    are deleted, with the modules that held only them (the model's forward has to know the fused layer by its name). The
    model is changed in place and returned.

    Args:
        model: as before the fusions; layers are found by name.
        path: a checkpoint that `convtool fuse` wrote.

    Raises:
        InputError: the checkpoint has no record, or its tensors don't load into the changed model.
        UsageError: the model has no layer of a recorded name.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.record is None:
        raise InputError(f"{path}: holds no convtool record; there is nothing to apply")
    for fusion in checkpoint.record.fusions:
        branches = has_sum(fusion.tree)
        names = [source.name for source in fusion.sources if source.origin == BASE and source.kind != FUNCTION]
        _check_modules(model, names if branches else [*names, fusion.name])
        # The fused layer first: it keeps the module that it stands in from being deleted as empty.
        if f"{fusion.name}.weight" in checkpoint.infos:  # else it was fused further, and a later record has it
            _put_submodule(model, fusion.name, live_module(checkpoint.conv(fusion.name)))
        for name in names:
            if name != fusion.name and branches:  # an identity in place of a branch would add its input to the sum
                _delete_submodule(model, name)
            elif name != fusion.name:
                model.set_submodule(name, nn.Identity())
    try:
        model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.infos}, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: does not load into the model: {' '.join(str(error).split())}") from None
    return model


def live_module(conv: Conv) -> nn.Module:
    """An nn.Conv, nn.ConvTranspose or nn.Linear of the layer's shape and geometry, its numbers not yet loaded.

    Raises:
        RefusedError: torch has no module of that form.
    """
    geometry, bias, dtype = conv.geometry, conv.bias is not None, conv.weight.dtype
    if conv.spatial_axes == 0:
        return nn.Linear(conv.in_channels, conv.out_channels, bias, dtype=dtype)
    if conv.spatial_axes > 3 or geometry.transposed:
        raise RefusedError(f"cannot make a live module of a layer with {geometry.describe()}")
    plain = all(before == after for before, after in geometry.padding)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[conv.spatial_axes - 1]
    module: nn.Module = kind(
        conv.in_channels,
        conv.out_channels,
        geometry.kernel_size,
        stride=geometry.stride,
        padding=tuple(before if plain else 0 for before, _ in geometry.padding),
        dilation=geometry.dilation,
        groups=geometry.groups,
        bias=bias,
        padding_mode=geometry.padding_mode if plain else "zeros",
        dtype=dtype,
    )
    if not plain:
        module.register_forward_pre_hook(_PadInput(geometry.padding, geometry.padding_mode))
    return module


@dataclass(frozen=True)
class _PadInput:
    """Pads each side by its own amount before a layer runs, which nn.Conv cannot do by itself."""

    sides: tuple[tuple[int, int], ...]
    padding_mode: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(inputs[0], [side for pair in reversed(self.sides) for side in pair], mode=mode)


def _delete_submodule(model: nn.Module, name: str) -> None:
    """Delete a module, and then the modules around it that are left without anything."""
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    delattr(parent, last)
    if path and not list(parent.children()) and not any(True for _ in parent.parameters()):
        _delete_submodule(model, path)


def _put_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path).add_module(last, module)


def _check_modules(model: nn.Module, names: list[str]) -> None:
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise UsageError(f"the model has no layer {name!r}, which the checkpoint's record names")
