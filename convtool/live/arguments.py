"""Arguments of public functions, made into what the functions take, by how their parameters are annotated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convtool.core.conv import Conv
from convtool.core.expression import Expression, split_input_size
from convtool.core.geometry import LARGEST, Geometry
from convtool.core.stored import Stored
from convtool.core.tree import Chain, Sum, Tree, leaves
from convtool.errors import UsageError, a_or_an, about
from convtool.graph.planned import Plan
from convtool.live.lowered import LayerLike, lower_modules

Reader: TypeAlias = Callable[["Arguments", Any], Any]

_OF_THE_LAYERS = ("fuse", "toeplitz")  # whose result is of the layers' dtype where none is asked for


def wrong(expected: str, value: Any) -> UsageError:
    """Return what to raise for an argument that is something else than expected."""
    return UsageError(f"expected {expected}, got {_said(value)}")


class Arguments:
    """The arguments of one call.

    Args:
        function: its name, for messages.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self.given: Mapping[str, Any] = {}
        self.tree: Expression | None = None  # the first layers among them
        self.dtype: torch.dtype | None = None  # that these are stored in, where they are modules

    def converted(self, signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by name as the function takes them; UsageError for one that can't be that."""
        self.given, made = given, dict[str, Any]()
        for name, value in given.items():
            with about(f"{self.function}: {name}"):
                made[name] = self._read(str(signature.parameters[name].annotation), value)
        if self.dtype is not None and made.get("dtype") is None and self.function in _OF_THE_LAYERS:
            made["dtype"] = self.dtype
        return made

    def _read(self, annotation: str, value: Any) -> Any:
        wanted, bar, nothing = annotation.rpartition(" | ")
        if bar and nothing == "None":
            if value is None:
                return None
            annotation = wanted
        return _READERS[annotation](self, value) if annotation in _READERS else value

    def layer(self, value: Any) -> Conv:
        """Return a layer."""
        tree = self.layers(value)
        while isinstance(tree, Chain | Sum) and len(tree.parts) == 1:
            tree = tree.parts[0]
        if not isinstance(tree, Conv):
            raise wrong("one layer (convtool.fuse makes one of several)", value)
        return tree

    def chain(self, value: Any) -> Any:
        """Return layers one after the other."""
        tree = self.layers(value)
        return list(tree.parts) if isinstance(tree, Chain) else [tree]

    def layers(self, value: Any) -> Any:
        """Return a layer, or chains and sums of layers."""
        tree = self._tree(value)
        if all(isinstance(leaf, Conv | Stored) for leaf in leaves(tree)):
            found: Any = tree
        else:
            size = self.given.get("input_size")
            found, dtype = lower_modules(tree, size if isinstance(size, Sequence) else None)
            self.dtype = self.dtype or dtype
        self.tree = found if self.tree is None else self.tree
        return found

    def _tree(self, value: Any) -> Tree[LayerLike]:
        if isinstance(value, Conv | Stored | str):
            return value
        if isinstance(value, nn.Module):
            # A plain sequence is the chain of what is in it.
            parts = list(value.children())
            plain = type(value) is nn.Sequential and not (value._forward_hooks or value._forward_pre_hooks)
            return Chain(tuple(self._tree(part) for part in parts)) if plain and parts else value
        if isinstance(value, Chain | Sum):
            return type(value)(tuple(self._tree(part) for part in value.parts))
        if isinstance(value, list | tuple) and value:
            return Chain(tuple(self._tree(part) for part in value))
        hint = "; convtool.conv makes one of a weight" if isinstance(value, Tensor) or hasattr(value, "dtype") else ""
        raise wrong(f"a layer (a Conv, an nn.Module of a known kind) or a list of them{hint}", value)

    def sizes(self, value: Any) -> tuple[int, ...]:
        """Return the size of an input: of its spatial axes, where layers are among the arguments."""
        one = type(value) is int
        if isinstance(value, Tensor):
            raise wrong("ints; a tensor goes into inputs=[...], where there is that", value)
        if not one and not (isinstance(value, list | tuple | torch.Size) and all(type(size) is int for size in value)):
            raise wrong("an int, or one for each axis", value)
        if any(not 1 <= size <= LARGEST for size in ([value] if one else value)):
            raise wrong(f"ints from 1 to {LARGEST}", value)
        if self.tree is None:
            return (value,) if one else tuple(value)
        first = next(leaves(self.tree))
        if one:
            return (value,) * first.spatial_axes
        return split_input_size(value, first.in_channels, first.spatial_axes)

    def tensor(self, value: Any) -> Any:
        """Return a tensor that has numbers, of whatever becomes one."""
        try:
            made = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise wrong("a tensor", value) from None
        if made.is_meta or made.layout != torch.strided:
            raise wrong("a dense tensor that holds numbers (not on the meta device)", value)
        if not (made.is_floating_point() or made.is_complex()):
            raise wrong(f"floating-point numbers (tensor.float() makes them such), not {made.dtype}", value)
        return made.detach()

    def weight(self, value: Any) -> Any:
        """Return a tensor, or the layer that a module is."""
        return self.layer(value) if isinstance(value, nn.Module | Conv) else self.tensor(value)

    def geometry(self, value: Any) -> Geometry:
        """Return a geometry, that of a layer if it is one."""
        return value if isinstance(value, Geometry) else self.layer(value).geometry

    def any_dtype(self, value: Any) -> torch.dtype:
        """Return torch's dtype of that name."""
        found = getattr(torch, value, None) if isinstance(value, str) else value
        if not isinstance(found, torch.dtype) or not (found.is_floating_point or found.is_complex):
            raise wrong("a floating-point dtype, such as torch.float32", value)
        return found


def _of(types: Any, expected: str) -> Reader:
    def read(arguments: Arguments, value: Any) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise wrong(expected, value)
        return value

    return read


def _number(arguments: Arguments, value: Any) -> float:
    try:
        return float(_of((int, float), "a number")(arguments, value))
    except OverflowError:
        raise wrong("a number that float64 holds", value) from None


def _each(read: Reader) -> Reader:
    def read_each(arguments: Arguments, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise wrong("a list", value)
        return [read(arguments, part) for part in value]

    return read_each


def _field(arguments: Arguments, value: Any) -> Any:
    """Return the value of a layer's field; what its numbers may be is seen where the geometry is made."""
    parts = value if isinstance(value, list | tuple) else [value]
    parts = [number for part in parts for number in (part if isinstance(part, list | tuple) else [part])]
    if not all(isinstance(part, int | str) for part in parts):
        raise wrong("an int, or one (or a pair) for each axis", value)
    return value


def _callable(arguments: Arguments, value: Any) -> Any:
    if not callable(value) or isinstance(value, nn.Module):
        raise wrong("a function", value)
    return value


def _device(arguments: Arguments, value: Any) -> torch.device:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        raise wrong("a device of this machine, such as 'cpu'", value) from None
    return device


def _said(value: Any) -> str:
    """Return a value as a message has it: small ones themselves, others by their type and shape."""
    if isinstance(value, int | float | str | bool | type(None)):
        return repr(value)[:80]
    if isinstance(value, list | tuple) and all(type(part) in (int, float, str) for part in value):
        return repr(value)[:80]
    shape = getattr(value, "shape", None)
    return f"{a_or_an(type(value).__name__)}{f' of shape {tuple(shape)}' if isinstance(shape, tuple) else ''}"


_MODULE = _of(nn.Module, "an nn.Module")
_READERS: dict[str, Reader] = {
    "Conv": Arguments.layer,
    "Sequence[Conv]": Arguments.chain,
    "Conv | Sequence[Conv] | Expression": Arguments.layers,
    "Sequence[Conv] | Expression": Arguments.layers,
    "Sequence[Conv] | Expression | Tree[Stored]": Arguments.layers,
    "Sequence[int]": Arguments.sizes,
    "Tensor": Arguments.tensor,
    "Tensor | Conv": Arguments.weight,
    "Geometry": Arguments.geometry,
    "torch.dtype": Arguments.any_dtype,
    "bool": _of(bool, "True or False"),
    "int": _of(int, "an int"),
    "float": _number,
    "str": _of(str, "a text"),
    "str | Path": _of((str, Path), "a path"),
    "nn.Module": _MODULE,
    "Sequence[Any]": _each(lambda arguments, value: value),
    "Sequence[torch.dtype]": _each(Arguments.any_dtype),
    "Mapping[str, str]": _of(Mapping, "a mapping from names to reasons"),
    "PerAxis": _field,
    "Padding": _field,
    "Kind": _of(str, "a text"),
    "Order": _of(str, "a text"),
    "Plan": _of(Plan, "a Plan, such as convtool.plan makes"),
    "Callable[[str], bool]": _callable,
    "Progress": _callable,
    "torch.device | str": _device,
}
