"""Whether a live model's module is the layer that was fused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from convtool.core.fields import DEFAULT_EPS, Fields
from convtool.core.geometry import Geometry
from convtool.modules.live import HOOKS
from convtool.modules.observed import frozen_eps
from convtool.modules.own import CONVS, NORMS, module_geometry, own_class

_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {"conv": CONVS, "linear": (nn.Linear,), "batch_norm": NORMS}


def difference(module: nn.Module, kind: str, fields: Fields) -> str:
    """In what a module isn't the layer that was fused, in words; '' where it is.

    Args:
        kind, fields: of that layer, as its record says.
    """
    if kind == "scale":
        return ""
    classes = _CLASSES.get(kind, ())
    what = f"the model has a {type(module).__name__} there"
    known = next((one for one in classes if isinstance(module, one)), None)
    if kind == "batch_norm" and known is None and (eps := frozen_eps(module)) is not None:
        fused_eps = fields.get("eps", DEFAULT_EPS)
        return "" if eps == fused_eps else f"eps {fused_eps:g} was fused, and the model's code has {eps:g}"
    if known is None:
        return f"{what}, and a {kind.replace('_', ' ')} was fused"
    if own_class(module, classes) is None:
        return f"{what}, whose forward isn't that of nn.{known.__name__}"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not isinstance(hook, (*HOOKS, WeightNorm)) for hook in hooks):
        return f"{what} with forward hooks, which would be lost"
    other = next((name for name, one in _parametrizations(module) if not isinstance(one, _WeightNorm)), "")
    if other:
        return f"{what} with a parametrization of its {other}, which would be lost"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None:
            return f"{what} that keeps no statistics and goes by those of each batch"
        eps = fields.get("eps", DEFAULT_EPS)
        return "" if module.eps == eps else f"eps {eps:g} was fused, and the model has {module.eps:g}"
    if isinstance(module, nn.modules.conv._ConvNd):
        own = module_geometry(module)
        fused = Geometry.of(own.kernel_size, **fields)
        return "" if own == fused else f"a layer of {fused.describe()} was fused, and the model's has {own.describe()}"
    return ""


def _parametrizations(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each with the name of the tensor that it makes."""
    if is_parametrized(module):
        for name, listed in module.get_submodule("parametrizations").named_children():
            yield from ((name, one) for one in listed.children())
