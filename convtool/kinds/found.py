"""Layers as names and shapes of tensors show them; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from convtool.kinds import kind_of
from convtool.kinds.adapter import OTHER_ADAPTERS, split_adapter
from convtool.kinds.derived import PARAMETRIZATIONS, derived_weight
from convtool.kinds.kind import UNKNOWN, Layer, TensorInfo

# What stands beside a weight of few bits that is to be multiplied by it.
_SCALES_OF_WEIGHTS = frozenset(
    {"weight_scale", "weight_scale_inv", "scale_weight", "weight_scale_2", "scale", "scales", "SCB", "input_scale"}
)


def group_layers(infos: Iterable[TensorInfo]) -> dict[str, Layer]:
    """Return the layers in the order of their first tensors."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for info in infos:
        path, parameter = _split(info.name)
        grouped.setdefault(path, {})[parameter] = info
    for path, tensors in grouped.items():
        weight = derived_weight(path, tensors)
        if weight is not None:
            tensors["weight"] = weight
    kinds = {path: UNKNOWN if why_not_plain(tensors) else kind_of(tensors) for path, tensors in grouped.items()}
    return {path: Layer(path, kinds[path], tensors) for path, tensors in grouped.items()}


def other_adapter(layer: Layer) -> str | None:
    """Return what a module of an adapter's file is, where it is of a form that isn't known here."""
    last = layer.name.rpartition(".")[2]
    names = [*layer.tensors, *(f"{last}.{tensor}" for tensor in layer.tensors)]
    return next((OTHER_ADAPTERS[name] for name in names if name in OTHER_ADAPTERS), None)


def _split(name: str) -> tuple[str, str]:
    """Return a tensor's full name as its layer's and its own."""
    if adapter := split_adapter(name):
        return adapter
    parts = name.split(".")
    at = parts.index(PARAMETRIZATIONS) if PARAMETRIZATIONS in parts[:-2] else len(parts) - 1
    return ".".join(parts[:at]), ".".join(parts[at:])


def why_not_plain(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return why a layer's weight isn't simply what its tensors hold, and what to do; None where it is."""
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
    if weight is not None and weight.shape == (0,):
        return (
            "is an empty placeholder, as DeepSpeed's ZeRO-3 saves what other processes hold; its zero_to_fp32.py puts"
            " the weights of all of them into one file"
        )
    few_bits = weight is not None and weight.dtype.startswith(("float8", "int", "uint"))
    if few_bits and (names & _SCALES_OF_WEIGHTS or any(name.startswith("weight.") for name in names)):
        return "is quantized: its weight is to be multiplied by a scale beside it; save it dequantized"
    if "qweight" in names:
        return "is quantized; save it dequantized"
    return None
