"""What is known of a checkpoint's tensors without loading one; nothing here needs torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from convtool.core.names import unwrap as unwrap
from convtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's description.

    Attributes:
        name: in full.
        dtype: torch's name without the 'torch.'.
        derived_from: full names of the tensors that it is computed from (a weight norm's); of one that stands in the
            file, none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    derived_from: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors that share a module path.

    Attributes:
        name: module path; '' for a state dict of one bare module.
        kind: 'conv', 'linear', 'batch_norm', 'scale' or 'other', as far as names and shapes tell.
        tensors: by parameter name ('weight', 'running_mean', ...), what is computed from others included.
    """

    name: str
    kind: str
    tensors: Mapping[str, TensorInfo]

    @property
    def spatial_axes(self) -> int | None:
        """Number of spatial axes, where the weight tells."""
        return len(self.tensors["weight"].shape) - 2 if self.kind == "conv" else None

    def stored(self) -> Iterator[TensorInfo]:
        """The tensors that stand in the file."""
        return (info for info in self.tensors.values() if not info.derived_from)

    def tensor_names(self) -> Iterator[str]:
        """Full names of the layer's tensors in the file."""
        return (info.name for info in self.stored())


FUNCTION = "function"  # the kind of a layer without tensors, which stands in no checkpoint
SCALES = ("gamma", "layer_scale_parameter", "lambda1")  # what per-channel scales are called in timm and transformers

PARAMETRIZATIONS = "parametrizations"  # torch.nn.utils.parametrize's module, between a layer's name and its tensors'
# A weight norm's magnitude and direction, under the old names and the new.
WEIGHT_NORMS = (
    ("weight_g", "weight_v"),
    (f"{PARAMETRIZATIONS}.weight.original0", f"{PARAMETRIZATIONS}.weight.original1"),
)
# What stands beside a weight of few bits that is to be multiplied by it.
_SCALES_OF_WEIGHTS = frozenset(
    {"weight_scale", "weight_scale_inv", "scale_weight", "weight_scale_2", "scale", "scales", "SCB", "input_scale"}
)


def group_layers(infos: Iterable[TensorInfo]) -> dict[str, Layer]:
    """Layers in order of their first tensor."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for info in infos:
        path, parameter = _split(info.name)
        grouped.setdefault(path, {})[parameter] = info
    for path, tensors in grouped.items():
        weight = _derived_weight(path, tensors)
        if weight is not None:
            tensors["weight"] = weight
    return {path: Layer(path, kind_of(tensors), tensors) for path, tensors in grouped.items()}


def _split(name: str) -> tuple[str, str]:
    """A tensor's full name as its layer's and its own."""
    parts = name.split(".")
    at = parts.index(PARAMETRIZATIONS) if PARAMETRIZATIONS in parts[:-2] else len(parts) - 1
    return ".".join(parts[:at]), ".".join(parts[at:])


def _derived_weight(path: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The weight that a weight norm's two tensors make; None where there are none, or they don't fit each other."""
    for magnitude, direction in WEIGHT_NORMS:
        if magnitude not in tensors or direction not in tensors or "weight" in tensors:
            continue
        g, v = tensors[magnitude], tensors[direction]
        axes = len(v.shape)
        fits = len(g.shape) == axes and all(g.shape[axis] in (1, v.shape[axis]) for axis in range(axes))
        if (fits or g.shape == ()) and g.dtype == v.dtype:
            return TensorInfo(f"{path}.weight" if path else "weight", v.dtype, v.shape, v.nbytes, (g.name, v.name))
    return None


def why_not_plain(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why a layer's weight isn't simply what its tensors hold, and what to do; None where it is."""
    names = tensors.keys()
    if "weight_mask" in names:
        return "is pruned; make it permanent with torch.nn.utils.prune.remove before saving"
    if "weight_orig" in names or f"{PARAMETRIZATIONS}.weight.0._u" in names:
        return (
            "has a spectral norm; make it permanent with torch.nn.utils.remove_spectral_norm (or"
            " parametrize.remove_parametrizations) before saving"
        )
    if any(name.startswith(f"{PARAMETRIZATIONS}.") for name in names) and "weight" not in names:
        return "is reparametrised; make it permanent with torch.nn.utils.parametrize.remove_parametrizations"
    if "weight_g" in names and not tensors.get("weight", TensorInfo("", "", (), 0)).derived_from:
        return "has a weight norm whose tensors don't fit each other; remove it with torch.nn.utils before saving"
    weight = tensors.get("weight")
    few_bits = weight is not None and weight.dtype.startswith(("float8", "int", "uint"))
    if few_bits and (names & _SCALES_OF_WEIGHTS or any(name.startswith("weight.") for name in names)):
        return "is quantized: its weight is to be multiplied by a scale beside it; save it dequantized"
    if "qweight" in names:
        return "is quantized; save it dequantized"
    return None


def kind_of(tensors: Mapping[str, TensorInfo]) -> str:
    """What a module must be, as far as its tensors' names and shapes tell."""
    if why_not_plain(tensors) is not None:
        return "other"
    if "running_mean" in tensors and "running_var" in tensors:
        return "batch_norm"
    if len(tensors) == 1 and (scale := next((tensors[name] for name in SCALES if name in tensors), None)):
        return "scale" if scale.shape and all(size == 1 for size in scale.shape[1:]) else "other"
    if "weight" not in tensors:
        return "other"
    axes = len(tensors["weight"].shape)
    if "bias" in tensors and len(tensors["bias"].shape) != 1:
        return "other"
    return "conv" if axes > 2 else "linear" if axes == 2 else "other"


def find_layer(layers: Mapping[str, Layer], name: str, where: str) -> Layer:
    """The layer of that name: a module path, or one of its tensors' full names; wrappers' prefixes may be left out.

    Raises:
        UsageError: there is none, or several differ only in wrappers; the nearest names are suggested.
    """
    if name in layers:
        return layers[name]
    path, _, parameter = name.rpartition(".")
    if path in layers and parameter in layers[path].tensors:
        return layers[path]
    same = [layer for layer in layers.values() if unwrap(layer.name) in (unwrap(name), unwrap(path))]
    same = [layer for layer in same if unwrap(layer.name) == unwrap(name) or parameter in layer.tensors]
    if len(same) == 1:
        return same[0]
    if same:
        names = ", ".join(layer.name for layer in same)
        raise UsageError(f"{where}: {name!r} fits several layers ({names}); give one of these in full")
    near = difflib.get_close_matches(name, layers, n=3, cutoff=0.5)
    inside = [layer for layer in layers if layer.startswith(name + ".")][:3] if name else []
    hint = f"; did you mean {' or '.join(near or inside)}?" if near or inside else ""
    if not hint:
        hint = "; `convtool inspect` lists the layers"
    raise UsageError(f"{where}: no layer {name!r}{hint}")
