"""The public functions, made to take what people have: modules for layers, ints for sizes, arrays for tensors.

Each is the function of its room, of the same name. What it is given becomes what it takes, by what its parameters are
annotated as; what can't is a UsageError, and so is an argument that it doesn't have. Its errors speak of arguments
where they speak of options to whoever is at a shell.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from convtool.checkpoint import open_checkpoint as _open_checkpoint
from convtool.core.compose import add as _add
from convtool.core.compose import compose as _compose
from convtool.core.compose import stack as _stack
from convtool.core.conv import conv as _conv
from convtool.core.forward import forward as _forward
from convtool.core.forward import operator as _operator
from convtool.core.fuse import fuse as _fuse
from convtool.core.spectrum import spectrum as _spectrum
from convtool.core.toeplitz import toeplitz as _toeplitz
from convtool.core.unfold import unfold as _unfold
from convtool.core.verify import verify as _verify
from convtool.errors import ConvtoolError, UsageError, did_you_mean, enough_memory
from convtool.live.apply import apply as _apply
from convtool.live.arguments import Arguments
from convtool.live.layers import geometry_of as _geometry_of
from convtool.live.plan import fuse_model as _fuse_model
from convtool.live.plan import plan as _plan
from convtool.matrix.read import load_matrix as _load_matrix
from convtool.matrix.read import open_matrix as _open_matrix

Made = TypeVar("Made")

_OPTION = re.compile(r"--([a-z][a-z-]*)")


def public(function: Callable[..., Made]) -> Callable[..., Made]:
    """Return the function with its arguments converted, and its errors in the words of whoever calls it."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Made:
        try:
            bound = _bound(function, signature, args, given)
            with enough_memory(function.__name__):
                return function(**Arguments(function.__name__).converted(signature, bound))
        except ConvtoolError as error:
            raise type(error)(_in_python(str(error), signature)) from error.__cause__

    return called


def _bound(
    function: Callable[..., Any], signature: inspect.Signature, args: tuple[Any, ...], given: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments by their names; UsageError where the function doesn't take these."""
    for name in given:
        if name not in signature.parameters:
            known = did_you_mean(name, signature.parameters, f"; it takes {', '.join(signature.parameters)}")
            raise UsageError(f"{function.__name__}: has no argument {name!r}{known}")
    try:
        return signature.bind(*args, **given).arguments
    except TypeError as error:
        raise UsageError(f"{function.__name__}: {error}; it takes {', '.join(signature.parameters)}") from None


def _in_python(message: str, signature: inspect.Signature) -> str:
    """Return a message with arguments in place of the options of the same names."""

    def argument(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        if name not in signature.parameters:
            return option[0]
        return f"{name}=True" if signature.parameters[name].annotation == "bool" else f"{name}=..."

    if "input_size" not in signature.parameters:  # there is nowhere to give it
        message = message.partition("; give --input-size")[0]
    return _OPTION.sub(argument, message.replace("convtool toeplitz", "convtool.toeplitz"))


add = public(_add)
apply = public(_apply)
compose = public(_compose)
conv = public(_conv)
forward = public(_forward)
fuse = public(_fuse)
fuse_model = public(_fuse_model)
geometry_of = public(_geometry_of)
load_matrix = public(_load_matrix)
open_checkpoint = public(_open_checkpoint)
open_matrix = public(_open_matrix)
operator = public(_operator)
plan = public(_plan)
spectrum = public(_spectrum)
stack = public(_stack)
toeplitz = public(_toeplitz)
unfold = public(_unfold)
verify = public(_verify)
