"""A fused checkpoint's loader: a module of plain torch that changes an unfused model to fit, and loads the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template

from convtool.core.names import WRAPPERS, unwrap
from convtool.core.tree import has_sum, tree_text
from convtool.errors import UsageError
from convtool.formats.atomic import replacing
from convtool.fusing.dependence import changed_fields
from convtool.fusing.edits import Fate, ends_with, fates, goes_on, missing_fields, module_text
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer

CHECKED = ("transposed", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding", "eps")
MODULE = Template('''\
"""Loads $name into the model whose checkpoint was fused.

Written by convtool $version. It needs $needs, and nothing of convtool. Build the model as before, and then:

    model = load(model).eval()
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
${imports}from torch import nn

CHECKPOINT = Path(__file__).parent / $path
# The layers that were fused, and what was stated of them. Behind one that ends a fusion, an activation may be.
LAYERS: dict[str, dict[str, Any]] = {
$layers
}


def load(model: nn.Module, checkpoint: str | Path = CHECKPOINT) -> nn.Module:
    """Put the fused layers into the model, load the checkpoint strictly, and return the model.

    Where the model has other layers than those that were fused, it is left as it was; see `find`.
    """
    old = {name: find(model, name, **stated) for name, stated in LAYERS.items()}
$edits
    model.load_state_dict(read(checkpoint), strict=True)
    return model


def read(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors by name."""
$reading


def find(model: nn.Module, name: str, ends: bool = False, **stated: object) -> Any:
    """Return a layer that goes.

    Raises TypeError where it may do more than its tensors say, and ValueError where it isn't as it was stated.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no layer {name}: it isn't the one whose checkpoint was fused") from None
    kind, inside = type(layer), [key for key, one in layer.named_children() if type(one) is not nn.Identity]
    timms = (kind.__module__.partition(".")[0], kind.__name__) == ("timm", "BatchNormAct2d")
    known = timms or kind is getattr(nn, kind.__name__, None)
    if not known or (inside and not ends) or {*inside} - {"drop", "act"}:
        what = f"a {kind.__qualname__}, which may do more than its weights say"
        raise TypeError(f"{name} is {what}; load with convtool.apply(model, {str(CHECKPOINT)!r}), which looks inside")
    if sum(one is layer for _, one in model.named_modules(remove_duplicate=False)) > 1:
        raise ValueError(f"{name} is in the model under two names; replacing it in one place would leave the other")
    for field, value in stated.items():
        has = getattr(layer, field, None)
        if field == "padding" and isinstance(has, str):  # "same" or "valid"
            spans = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size)]
            has = tuple(span / 2 if has == "same" else 0 for span in spans)
        if has != value:
            raise ValueError(f"{name} has {field} {has}, and {value} was stated or assumed when it was fused")
    return layer


def rest(layer: nn.Module) -> nn.Module:
    """Return what stays of a layer that goes: of timm's BatchNormAct2d, the dropout and the activation inside."""
    return nn.Sequential(OrderedDict(layer.named_children())) if [*layer.children()] else nn.Identity()


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of that name, in the model's dtype and on its device."""
    like = next((one for one in model.parameters() if one.is_floating_point()), torch.zeros(()))
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.to(like).train(model.training))


def delete(model: nn.Module, name: str) -> None:
    """Delete a branch. Of an nn.Sequential an empty list stays: without layers it would pass its input on."""
    parent, _, last = name.rpartition(".")
    around = model.get_submodule(parent)
    delattr(around, last)
    if parent and isinstance(around, nn.Sequential) and not len(around):
        put(model, parent, nn.ModuleList())
''')


def loader_text(planned: Sequence[PlannedLayer], names: Iterable[str], path: str, root: Sequence[str]) -> str:
    """Return the text of the module.

    Args:
        names: of the new checkpoint's tensors.
        path: of the new checkpoint, a single file, from where the module is.
        root: the keys of the state dict in a nested torch file.

    Raises:
        UsageError: an edit can't be written down without the live model.
    """
    from convtool import __version__

    safe = path.endswith(".safetensors")
    layers, edits, gone = list[str](), list[str](), set[str]()
    for one in planned:
        _check(one)
        goes = [(leaf, fate) for leaf, fate in fates(one) if leaf.name not in gone]
        layers += _layers(one, [leaf for leaf, _ in goes])
        edits.append(_plain(f"# {tree_text(one.tree, lambda leaf: leaf.name)} becomes {one.name}"))
        edits += [f"# which {one.record.limit}"] if one.record.limit else []
        edits += _edits(one, goes)
        gone.update(one.record.shares())
    return MODULE.substitute(
        name=_plain(path),
        path=repr(path),
        version=__version__,
        needs="torch and safetensors" if safe else "torch",
        imports="from safetensors.torch import load_file\n" if safe else "",
        layers=_indented(layers),
        edits=_indented(edits),
        reading=_indented(_reading(names, safe, root)),
    )


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


@contextlib.contextmanager
def beside(path: Path, text: str, *, force: bool) -> Iterator[None]:
    """Write a loader that gets its name when the block, in which its checkpoint is written, ends well."""
    with replacing(path, force=force) as file:
        file.write(text.encode())
        file.flush()
        yield


def _plain(text: str) -> str:
    """Return a text that ends no comment and no docstring, whatever a layer or a file is called."""
    return "".join(c if c.isprintable() and c not in '\\"' else "?" for c in text)


def _reading(names: Iterable[str], safe: bool, root: Sequence[str]) -> Iterator[str]:
    keys = "".join(f"[{key!r}]" for key in root)
    yield "state: dict[str, torch.Tensor] = " + (
        "load_file(checkpoint)" if safe else f'torch.load(checkpoint, map_location="cpu", weights_only=True){keys}'
    )
    wrappers = sorted(WRAPPERS & {part for name in names for part in name.split(".")})
    if wrappers:
        parts = f'part for part in name.split(".") if part not in {wrappers!r}'
        yield f'return {{".".join({parts}): tensor for name, tensor in state.items()}}'
    else:
        yield "return state"


def _check(planned: PlannedLayer) -> None:
    """Raise UsageError where an edit can't be written down without the live model."""
    found, several = list(fates(planned)), has_sum(planned.tree)
    stays = any(leaf.name == planned.name for leaf, _ in found)
    if planned.fusion.conv.has_bias_map or several == stays:
        why = "takes the place of one branch of a sum" if stays else "has a name that none of its layers has"
        why = "has a bias map" if planned.fusion.conv.has_bias_map else why
        raise UsageError(f"--loader: {planned.name} {why}, which only convtool.apply puts into a model")
    if own := [leaf.name for leaf, _ in found if "standardized" in leaf.fields]:
        # What else their code does, nobody sees without the live model.
        raise UsageError(
            f"--loader: {', '.join(own)} standardizes its weight, which only convtool.apply takes out of a model"
        )
    if code := goes_on(planned.record.tree, planned.name):
        raise UsageError(f"--loader: {', '.join(code)} is in the model's own code; take it out there")


def _layers(planned: PlannedLayer, layers: Iterable[LoweredLayer]) -> Iterator[str]:
    """Yield what the live layers are held against."""
    for layer in layers:
        if not layer.layer.kind.parameter:
            ends = ["ends=True"] if ends_with(planned, layer) else []
            stated = (f"{key}={value!r}" for key, value in _stated(layer))
            yield f"{unwrap(layer.name)!r}: dict({', '.join([*ends, *stated])}),"


def _edits(planned: PlannedLayer, goes: Sequence[tuple[LoweredLayer, Fate]]) -> Iterator[str]:
    """Yield the lines that change a model for one fused layer, of whose layers these go."""
    yield f"put(model, {unwrap(planned.name)!r}, {_constructor(planned)})"
    for leaf, fate in goes:
        name = unwrap(leaf.name)
        if fate == "parameters":
            for tensor in leaf.layer.tensor_names():
                parent, _, last = unwrap(tensor).rpartition(".")
                yield f"model.get_submodule({parent!r}).register_parameter({last!r}, None)"
        elif fate == "stays" or leaf.name.startswith(f"{planned.name}."):
            continue
        elif fate == "deleted":
            yield f"delete(model, {name!r})"
        else:
            kept = ends_with(planned, leaf) and not leaf.layer.kind.parameter  # of which there is no layer to look at
            yield f"put(model, {name!r}, {f'rest(old[{name!r}])' if kept else 'nn.Identity()'})"


def _stated(layer: LoweredLayer) -> Iterator[tuple[str, object]]:
    """Yield what was stated or assumed of a layer, as the attributes of a torch module have it."""
    geometry = layer.conv.geometry
    known = [field for field in CHECKED if field in layer.fields]
    for field in known:
        if field == "eps":
            yield field, layer.fields[field]
        elif field == "padding":
            yield field, tuple(before for before, _ in geometry.padding)
        elif field != "padding_mode" or geometry.padded:
            yield field, getattr(geometry, field)


def _constructor(planned: PlannedLayer) -> str:
    """Return the fused layer as a call; what isn't known of it is taken from the live layer that has it."""
    if any(before != after for before, after in planned.fusion.conv.geometry.padding):
        raise UsageError(f"--loader: {planned.name} pads its sides differently, which only convtool.apply puts in")
    live = {name: f"old[{unwrap(_live(planned, name))!r}]" for name in missing_fields(planned)}
    taken = {name: f"{layer}.{name}" for name, layer in live.items() if name != "transposed"}
    taken |= {"in_channels": f"{live['groups']}.in_channels"} if "groups" in live else {}
    return module_text(planned.fusion.conv, **taken)


def _live(planned: PlannedLayer, field: str) -> str:
    """Return the layer whose field is the fused one's as well; raise UsageError where none need have it."""
    for layer in planned.layers:
        if layer.own and layer.layer.kind.main and field not in changed_fields(planned.tree, layer):
            return layer.name
    raise UsageError(f"--loader: the {field} of {planned.name} isn't known; state it, say with --set, or use --model")
