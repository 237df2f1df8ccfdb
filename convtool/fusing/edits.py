"""What has to change in a model for it to fit a new checkpoint: as lines of code, in words, or as a loader module."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, TypeAlias

from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.fields import Fields
from convtool.core.geometry import format_sizes
from convtool.core.names import WRAPPERS, is_written, unwrap
from convtool.core.tree import BASE, Chain, Tree, first_leaves, has_sum, leaves, tree_text
from convtool.errors import UsageError
from convtool.formats.atomic import replacing
from convtool.fusing.dependence import changed_fields
from convtool.fusing.fusion import PlannedLayer
from convtool.fusing.leaf import LoweredLayer
from convtool.kinds.written import read_layer, undoing


def module_edits(planned: PlannedLayer) -> list[str]:
    """Return the lines that make a model's code fit the new checkpoint; of what isn't known, only what changes."""
    conv, name = planned.fusion.conv, planned.name
    lines = _own_line(planned)
    if conv.has_bias_map:
        lines.append(f"y = {name}(x) + bias_map  # that of the checkpoint, in place of {name}(x)")
    lines += _normalizations(planned)
    silent = []
    for leaf, fate in _fates(planned):
        layer = leaf.layer
        if fate == "in code":
            lines.append(f"take {layer.name} out of the model's code, as {name} does it")
        elif fate == "parameters":
            lines += [f"{tensor} = None" for tensor in layer.tensor_names()]
        elif fate == "deleted":
            lines.append(f"del {layer.name}")
        elif fate == "silent":
            silent.append(layer.name)
        elif fate == "identity":
            # Tensors don't tell whether the module does more: timm's BatchNormAct2d has an activation inside.
            more = "  # but for an activation inside of it, which stays" if layer.kind.spare else ""
            lines.append(f"{layer.name} = nn.Identity(){more}")
    lines += [
        f"{one}: a {what} in this model, whose code has to be changed where it does more; convtool.apply refuses it"
        for one, what in planned.others.items()
    ]
    if silent:
        lines.append(f"{', '.join(silent)}: nn.Identity(), and zeros from each branch, as convtool.apply has it")
    return lines


def _fates(planned: PlannedLayer) -> Iterator[tuple[LoweredLayer, Fate]]:
    """Yield what becomes of each of the model's layers in a fusion."""
    own = [leaf for leaf in planned.layers if leaf.own]
    stays = any(leaf.layer.name == planned.name for leaf in own)  # then the model goes on to call all of the branches
    # An identity would add its input to a sum.
    other: Fate = "identity" if not has_sum(planned.tree) else "silent" if stays else "deleted"
    for leaf in own:
        layer = leaf.layer
        if is_written(layer.name):
            yield leaf, "in code"
        elif layer.kind.parameter and (layer.name in planned.blocks or layer.name in layer.tensor_names()):
            yield leaf, "parameters"
        else:
            yield leaf, "stays" if layer.name == planned.name else other


def _own_line(planned: PlannedLayer) -> list[str]:
    """Return what becomes of the fused layer's own module."""
    conv, known = planned.fusion.conv, planned.record.fields
    missing = [name for name in needed_fields(conv, known) if name not in known] if conv.spatial_axes else []
    if not missing:
        return [f"{planned.name} = {module_text(conv)}"]
    own = next((leaf for leaf in planned.layers if leaf.own and leaf.layer.name == planned.name), None)
    if own is None or not own.layer.kind.main:
        whose = [leaf.name for leaf in planned.layers if any(leaf.open.values())]
        have = f"{', '.join(whose)} {'have' if len(whose) > 1 else 'has'}"
        return [f"{planned.name} = {module_text(conv, missing)}  # what is left out, as {have} it"]
    plain = ["a plain convolution, whose weight is standardized already"] if "standardized" in own.fields else []
    changes = plain + list(_changes(conv, own.conv, known, changed_fields(planned.tree, own), planned.layers))
    return [f"{planned.name}: {', '.join(changes)}"] if changes else []


def needed_fields(conv: Conv, known: Fields) -> list[str]:
    """Return the fields without which the layer's constructor can't be written."""
    geometry = conv.geometry
    return [
        *("stride", "padding", "groups", "transposed"),
        *(["dilation"] if any(k > 1 for k in geometry.kernel_size) else []),
        *(["padding_mode"] if geometry.padded or "padding" not in known else []),
        *(["output_padding"] if known.get("transposed") else []),
    ]


def _changes(
    conv: Conv, own: Conv, known: Fields, changed: frozenset[str], layers: list[LoweredLayer]
) -> Iterator[str]:
    """Yield in what the fused layer is another than the module that it takes the place of."""
    if conv.in_channels != own.in_channels:
        yield f"{conv.in_channels} input channels"
    if conv.out_channels != own.out_channels:
        yield f"{conv.out_channels} output channels"
    if conv.geometry.kernel_size != own.geometry.kernel_size:
        yield f"kernel size {_sizes(conv.geometry.kernel_size)}"
    if conv.geometry.groups != own.geometry.groups:
        yield f"groups {conv.geometry.groups}"
    kind = next(leaf.layer.kind for leaf in layers if leaf.conv is own)
    for name in sorted(changed - {"groups"}):
        whose = " and ".join(leaf.name for leaf in layers if leaf.open.get(name) or leaf.conv is own)
        yield kind.say(name, known[name]) if name in known else f"the {name} that {whose} make together"
    if (conv.bias is None) != (own.bias is None) and not conv.has_bias_map:
        yield "add a bias" if own.bias is None else "no bias"


def _sizes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else format_sizes(values)


def _normalizations(planned: PlannedLayer) -> list[str]:
    """Return what becomes of normalisations: that of the input is in front of the model, others in its own code."""
    first = list(first_leaves(planned.tree))
    in_front = first if len({layer.layer.name for layer in first}) == 1 else []
    lines = [
        f"give {planned.name} its input as it was before {layer.layer.name}"
        if any(layer is one for one in in_front)
        else f"take {layer.layer.name} out of the model's code, as {planned.name} does it"
        for layer in planned.layers
        if layer.layer.kind.code == "input"
    ]
    return list(dict.fromkeys(lines))


def torch_module(conv: Conv) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return the name of torch's class for a layer, its shape as that takes it, and its other arguments.

    Those at torch's defaults are left out. Padding that the class cannot say, as its sides differ, isn't among them.
    """
    geometry, axes = conv.geometry, conv.spatial_axes
    sides = [before if before == after else 0 for before, after in geometry.padding]
    even = all(before == after for before, after in geometry.padding)
    fields = {
        "stride": (geometry.stride, 1),
        "padding": (tuple(sides) if even else (0,), 0),
        "output_padding": (geometry.output_padding, 0),
        "dilation": (geometry.dilation, 1),
        "groups": (geometry.groups, 1),
        "bias": (conv.bias is not None and not conv.has_bias_map, True),
        "padding_mode": (geometry.padding_mode if even and geometry.padded else "zeros", "zeros"),
    }
    others = {
        name: value
        for name, (value, default) in fields.items()
        if (set(value) - {default} if isinstance(value, tuple) else value != default)
    }
    shape = (conv.in_channels, conv.out_channels)
    if not axes:
        return "Linear", shape, others
    return f"Conv{'Transpose' if geometry.transposed else ''}{axes}d", (*shape, geometry.kernel_size), others


def module_text(conv: Conv, unknown: Collection[str] = ()) -> str:
    """Return the layer as a line of torch code: 'nn.Conv2d(3, 16, (5, 7), stride=2)'.

    Args:
        unknown: fields that have three dots in place of a value.
    """
    name, (inputs, *shape), others = torch_module(conv)
    given = {key: "..." if key in unknown else _argument(value) for key, value in others.items()}
    given |= {key: "..." for key in ("stride", "padding", "dilation", "groups") if key in unknown}
    channels = "..." if "groups" in unknown else str(inputs)  # as many as its groups have together
    arguments = [channels, *map(_argument, shape), *(f"{key}={value}" for key, value in given.items())]
    text, geometry = f"nn.{name}({', '.join(arguments)})", conv.geometry
    if all(before == after for before, after in geometry.padding):
        return text
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    if geometry.transposed:
        return f"{text}  # then F.pad(y, {[-side for side in sides]})"
    mode = "" if geometry.padding_mode == "zeros" else f", mode={geometry.padding_mode!r}"
    return f"{text}  # after F.pad(x, {sides}{mode})"


def _argument(value: object) -> str:
    return str(value[0]) if isinstance(value, tuple) and len(set(value)) == 1 else repr(value)


Fate: TypeAlias = Literal["stays", "in code", "parameters", "deleted", "silent", "identity"]

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


def find(model: nn.Module, name: str, *, standardized: bool = False, **stated: object) -> Any:
    """Return a layer that goes; raise TypeError or ValueError where it isn't torch's own, or not as it was stated.

    One whose weight is standardized has code of its own for that, which goes with it.
    """
    layer = model.get_submodule(name)
    if not standardized and type(layer) is not getattr(nn, type(layer).__name__, None):
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
    fates = list(_fates(planned))
    branch = has_sum(planned.tree) and any(leaf.name == planned.name for leaf, _ in fates)
    if planned.fusion.conv.has_bias_map or branch:
        why = "has a bias map" if planned.fusion.conv.has_bias_map else "takes the place of one branch of a sum"
        raise UsageError(f"--loader: {planned.name} {why}, which only convtool.apply puts into a model")
    if code := list(done_by_the_model(planned.record.tree)):
        raise UsageError(f"--loader: {', '.join(code)} is in the model's own code; take it out there")
    fates = [(leaf, fate) for leaf, fate in fates if leaf.name not in gone]
    gone.update(planned.record.shares())
    modules = [leaf for leaf, _ in fates if not leaf.layer.kind.parameter]
    names = {layer.name: f"old{number or ''}" for number, layer in enumerate(modules)}
    made = _constructor(planned, names)
    for layer in modules:
        stated = "".join(f", {key}={value!r}" for key, value in _stated(layer))
        used = f"{names[layer.name]} = " if f"{names[layer.name]}." in made else ""
        yield f"{used}find(model, {unwrap(layer.name)!r}{stated})"
    yield f"put(model, {unwrap(planned.name)!r}, {made})"
    for leaf, fate in fates:
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
    if "standardized" in layer.fields:
        yield "standardized", True
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


# Where a layer without tensors is in a model, and whether it stands in front of all else, such that its code does it.
_CODE = {("model", False), ("model", True), ("input", False)}


def done_by_the_model(tree: Tree[SourceLayer], in_front: bool | None = None) -> Iterator[str]:
    """Yield the layers without tensors that the model's forward does itself, in chains with layers of the model.

    An identity is none, and a normalisation of the whole input stands in front of the model.

    Args:
        in_front: whether the tree's first layers are those that the whole input goes into.
    """
    sources: list[SourceLayer] = list(leaves(tree))
    first_ones: list[SourceLayer] = list(first_leaves(tree))
    ours = any(source.origin == BASE and not source.written for source in sources)
    if in_front is None:
        in_front = len({source.name for source in first_ones}) == 1
    done: list[str] = []
    for number, part in enumerate(() if isinstance(tree, SourceLayer) else tree.parts):
        first = in_front and (number == 0 or not isinstance(tree, Chain))
        if not isinstance(part, SourceLayer):
            yield from done_by_the_model(part, first)
        elif isinstance(tree, Chain) and ours and part.written and (part.kind.code, first) in _CODE:
            # What is undone further on in the chain was fused such that the model's code may go on to do it.
            undone = bool(done) and done[-1] == part.name
            done[-1:] = [] if undone else [*done[-1:], part.name]
            if not undone and part.kind.undone_by(read_layer(part.name).fields) is not None:
                done[-1] = undoing(part.name).name
    yield from done
