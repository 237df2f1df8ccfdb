"""A fused checkpoint's loader: a module of plain torch that changes an unfused model to fit, and loads the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from convtool.core.names import WRAPPERS, unwrap
from convtool.core.tree import has_sum, tree_text
from convtool.errors import UsageError
from convtool.formats.atomic import replacing
from convtool.fusing.dependence import changed_fields
from convtool.fusing.edits import done_by_the_model, fates, needed_fields, torch_module
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer

CHECKED = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding", "eps")
MODULE = Template('''\
"""Loads $name into the model whose checkpoint was fused.

Written by convtool $version. It needs $needs, and nothing of convtool. Build the model as before, and then:

    model = load(model).eval()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
${imports}from torch import nn

CHECKPOINT = Path(__file__).parent / $path


def load(model: nn.Module, checkpoint: str | Path = CHECKPOINT) -> nn.Module:
    """Put the fused layers into the model, load the checkpoint strictly, and return the model."""
$edits
    model.load_state_dict(read(checkpoint), strict=True)
    return model


def read(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors by name."""
$reading


def find(model: nn.Module, name: str, **stated: object) -> Any:
    """Return a layer that goes; raise TypeError or ValueError where it isn't torch's own, or not as it was stated."""
    layer = model.get_submodule(name)
    if type(layer) is not getattr(nn, type(layer).__name__, None):
        raise TypeError(f"{name} is a {type(layer).__qualname__}, not a layer of torch's own; use convtool.apply")
    if sum(one is layer for _, one in model.named_modules(remove_duplicate=False)) > 1:
        raise ValueError(f"{name} is in the model under two names; replacing it in one place would leave the other")
    for field, value in stated.items():
        has = getattr(layer, field)
        if field == "padding" and isinstance(has, str):  # "same" or "valid"
            spans = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size)]
            has = tuple(span / 2 if has == "same" else 0 for span in spans)
        if has != value:
            raise ValueError(f"{name} has {field} {has}, and {value} was stated when it was fused")
    return layer


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of that name, in the model's dtype and on its device."""
    like = next((one for one in model.parameters() if one.is_floating_point()), torch.zeros(()))
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.to(like).train(model.training))
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
    edits, gone = list[str](), set[str]()
    for layer in planned:
        edits += [_plain(f"# {tree_text(layer.tree, lambda one: one.name)} becomes {layer.name}"), *_edits(layer, gone)]
    return MODULE.substitute(
        name=_plain(path),
        path=repr(path),
        version=__version__,
        needs="torch and safetensors" if safe else "torch",
        imports="from safetensors.torch import load_file\n" if safe else "",
        edits="\n".join(f"    {line}" for line in edits),
        reading="\n".join(f"    {line}" for line in _reading(names, safe, root)),
    )


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


def _edits(planned: PlannedLayer, gone: set[str]) -> Iterator[str]:
    """Yield the lines that change a model for one fused layer.

    Args:
        gone: the layers that fusions share, once one of these was put in; those of this one are added.
    """
    found = list(fates(planned))
    branch = has_sum(planned.tree) and any(leaf.name == planned.name for leaf, _ in found)
    if planned.fusion.conv.has_bias_map or branch:
        why = "has a bias map" if planned.fusion.conv.has_bias_map else "takes the place of one branch of a sum"
        raise UsageError(f"--loader: {planned.name} {why}, which only convtool.apply puts into a model")
    if own := [leaf.name for leaf, _ in found if "standardized" in leaf.fields]:
        # What else their code does, nobody sees without the live model.
        raise UsageError(
            f"--loader: {', '.join(own)} standardizes its weight, which only convtool.apply takes out of a model"
        )
    if code := list(done_by_the_model(planned.record.tree)):
        raise UsageError(f"--loader: {', '.join(code)} is in the model's own code; take it out there")
    found = [(leaf, fate) for leaf, fate in found if leaf.name not in gone]
    gone.update(planned.record.shares())
    modules = [leaf for leaf, _ in found if not leaf.layer.kind.parameter]
    names = {layer.name: f"old{number or ''}" for number, layer in enumerate(modules)}
    made = _constructor(planned, names)
    for layer in modules:
        stated = "".join(f", {key}={value!r}" for key, value in _stated(layer))
        used = f"{names[layer.name]} = " if f"{names[layer.name]}." in made else ""
        yield f"{used}find(model, {unwrap(layer.name)!r}{stated})"
    yield f"put(model, {unwrap(planned.name)!r}, {made})"
    for leaf, fate in found:
        parent, _, last = unwrap(leaf.name).rpartition(".")
        if fate == "parameters":
            for tensor in leaf.layer.tensor_names():
                parent, _, last = unwrap(tensor).rpartition(".")
                yield f"model.get_submodule({parent!r}).register_parameter({last!r}, None)"
        elif fate == "stays" or leaf.name.startswith(f"{planned.name}."):
            continue
        elif fate == "deleted":
            yield f"delattr(model.get_submodule({parent!r}), {last!r})"
        else:
            yield f"put(model, {unwrap(leaf.name)!r}, nn.Identity())"


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


def _constructor(planned: PlannedLayer, names: Mapping[str, str]) -> str:
    """Return the fused layer as a call; what isn't known of it is taken from the live layer that has it.

    Args:
        names: of the variables that hold live layers, by those of the layers.
    """
    conv, known = planned.fusion.conv, planned.record.fields
    name, (inputs, *shape), others = torch_module(conv)
    if any(before != after for before, after in conv.geometry.padding):
        raise UsageError(f"--loader: {planned.name} pads its sides differently, which only convtool.apply puts in")
    missing = [field for field in needed_fields(conv, known) if field not in known] if conv.spatial_axes else []
    given = {key: repr(value) for key, value in others.items() if key not in missing}
    channels = repr(inputs)
    for field in missing:
        live = names[_live(planned, field)]
        given |= {} if field == "transposed" else {field: f"{live}.{field}"}
        channels = f"{live}.in_channels" if field == "groups" else channels
    arguments = [channels, *map(repr, shape), *(f"{key}={value}" for key, value in given.items())]
    return f"nn.{name}({', '.join(arguments)})"


def _live(planned: PlannedLayer, field: str) -> str:
    """Return the layer whose field is the fused one's as well; raise UsageError where none need have it."""
    for layer in planned.layers:
        if layer.own and layer.layer.kind.main and field not in changed_fields(planned.tree, layer):
            return layer.name
    raise UsageError(f"--loader: the {field} of {planned.name} isn't known; state it, say with --set, or use --model")
