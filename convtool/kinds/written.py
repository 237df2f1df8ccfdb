"""Layers without tensors as they are written in a chain: 'avg_pool(2)', 'pad(0:1,2:2)', 'scale(0.5)'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from convtool.core.fields import FLAG, Fields
from convtool.core.names import CALL, unwrap
from convtool.errors import RefusedError, UsageError, about, did_you_mean
from convtool.kinds import KINDS, kind_named, names_of
from convtool.kinds.kind import Kind, Layer, Shape, TensorInfo

if TYPE_CHECKING:
    from convtool.core.conv import Conv

NOT_LINEAR = frozenset(
    {"relu", "relu6", "leaky_relu", "prelu", "elu", "gelu", "silu", "swish", "mish", "sigmoid", "tanh", "softmax"}
    | {"hardswish", "hardsigmoid", "max_pool", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout"}
)


def read_layer(text: str) -> Layer:
    """Return the layer that the text describes.

    Raises:
        RefusedError: the layer isn't linear.
        UsageError: an unknown layer, or arguments that it doesn't have.
    """
    call = CALL.fullmatch(text)
    name = call[1] if call else text
    if name in NOT_LINEAR:
        raise RefusedError(f"{text}: {name} is not linear; nothing can be fused across it")
    kind = kind_named(name)
    if kind is None or not kind.written:
        known = names_of(kind for kind in KINDS if kind.written)
        raise UsageError(f"{text}: unknown layer {name!r}; expected one of {known}")
    if call is None:
        raise UsageError(f"{text!r}: expected NAME(ARGUMENTS)")
    return Layer(text, kind, {}, _read_arguments(text, call[2], kind))


def with_tensors(layer: Layer, infos: Mapping[str, TensorInfo]) -> Layer:
    """Return a written layer with the tensors of a checkpoint that it names.

    Raises:
        UsageError: there is no such tensor.
    """
    found = {}
    for field, name in layer.fields.items():
        if isinstance(name, str) and field in layer.kind.fields and layer.kind.fields[field].names_tensors:
            same = [info for full, info in infos.items() if unwrap(full) == unwrap(name)]
            if name not in infos and len(same) != 1:
                raise UsageError(f"{layer.name}: no tensor {name!r}{did_you_mean(name, infos)}")
            found[field] = infos.get(name) or same[0]
    return replace(layer, tensors=found)


def layer_of_operation(name: str, arguments: Mapping[str, Any], takes: Shape, gives: Shape) -> Layer | None:
    """Return the layer without tensors that an operation is, as it would be written; see `Kind.of_operation`."""
    for kind in KINDS:
        fields = kind.of_operation(name, arguments, takes, gives) if name in kind.operations else None
        if kind.written and fields is not None and kind.fields.keys() <= {**kind.defaults, **fields}.keys():
            return Layer(_text(kind, fields), kind, {}, fields)
    return None


def layer_of_module(module: object, size_of: Callable[[], tuple[int, ...] | None]) -> Layer | None:
    """Return the layer without tensors that a module is, as it would be written; see `Kind.of_module`."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    kind = next((kind for kind in KINDS if name in kind.bare_modules), None)
    if kind is None:
        return None
    fields = kind.of_module(module, size_of)
    return Layer(_text(kind, fields), kind, {}, fields)


def undoing(text: str) -> Layer:
    """Return the layer that undoes the one that the text describes: 'unflatten(2,3)' of 'flatten(2,3)'."""
    layer = read_layer(text)
    kind, fields = kind_named(layer.kind.inverse), layer.kind.undone_by(layer.fields)
    if kind is None or fields is None:
        raise RefusedError(f"{text}: no layer undoes it")
    return Layer(_text(kind, fields), kind, {}, fields)


def check_closed(text: str) -> None:
    """Raise UsageError for what begins as one of these layers does and lacks its end: 'avg_pool(2'."""
    name, opened, _ = text.partition("(")
    kind = kind_named(name)
    if opened and kind is not None and kind.written and CALL.fullmatch(text) is None:
        raise UsageError(f"{text}: expected {name}(...), which ends in a parenthesis; quote it for the shell")


def make_written(text: str, channels: int, axes: int) -> Conv:
    """Return the layer that the text describes, for an input of `channels` channels and `axes` spatial axes.

    Raises:
        RefusedError, UsageError: as `read_layer`, or the arguments don't fit such an input.
    """
    layer = read_layer(text)
    try:
        return layer.kind.lower({}, layer.fields, axes, channels)
    except UsageError as error:
        raise UsageError(f"{text}: {str(error).removeprefix(f'{layer.kind.name}: ')}") from None


def _text(kind: Kind, fields: Fields) -> str:
    """Return a layer as `read_layer` reads it: 'pad(0:1,2:2)'."""

    def value(one: object, between: str = ",") -> str:
        return between.join(value(part, ":") for part in one) if isinstance(one, list | tuple) else str(one)

    first = next(iter(kind.fields), "")
    inside = "; ".join(
        f"{name}={value(fields[name], kind.fields[name].between)}" for name in kind.fields if name in fields
    )
    return f"{kind.name}({inside.removeprefix(f'{first}=')})"


def _read_arguments(text: str, inside: str, kind: Kind) -> Fields:
    """Return '2,3; padding=1' as {'kernel_size': [2, 3], 'padding': 1}; semicolons part arguments."""
    fields: Fields = {}
    takes = ", ".join(kind.fields) or "nothing"
    for number, part in enumerate(part.strip() for part in inside.split(";") if part.strip()):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals and kind.fields.get(part) is FLAG:
            key, value = part, "true"
        elif not equals:
            key, value = next(iter(kind.fields), ""), part
            if number:
                raise UsageError(f"{text}: expected name=value after the first argument, got {part!r}")
        if key not in kind.fields:
            raise UsageError(f"{text}: {kind.name} takes {takes}, got {part!r}")
        if key in fields:
            raise UsageError(f"{text}: {key} is given twice")
        with about(text):
            fields[key] = kind.fields[key].read(key, value)
    if kind.fields.keys() - kind.defaults.keys() - fields.keys():
        raise UsageError(f"{text}: {kind.name} takes {takes}, and needs the first of them")
    return fields
