"""Adapters: changes of another layer's weight, computed of small tensors, as trainers store them.

A module of an adapter's file has no geometry; it is a layer only together with the one that it changes, and then it is
like that one, with the change D as its weight. The formulas are those of the trainers (kohya's, LyCORIS, PEFT).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from convtool.core.fields import FLAG, INTEGER, POSITIVE, TEXT, Fields
from convtool.errors import InputError, RefusedError
from convtool.kinds.convolution import CONV
from convtool.kinds.kind import Base, Kind, Layer, Shape, Shapes, TensorInfo, Tensors
from convtool.kinds.scaling import Scaling

if TYPE_CHECKING:
    from torch import Tensor

# What the trainers call the same tensor, behind the name of the module that it changes.
_LORA = {"down": ("lora_down", "lora_A", "lora.down"), "up": ("lora_up", "lora_B", "lora.up"), "mid": ("lora_mid",)}
_NAMES = {
    **{f"{name}.weight": part for part, names in _LORA.items() for name in names},
    **{f"{name}.default.weight": part for part, names in _LORA.items() for name in names},
    **dict.fromkeys(("lora_B.bias", "lora_B.default.bias"), "up_bias"),
    **dict.fromkeys(
        ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"), "magnitude"
    ),
}
_SUFFIX = re.compile(rf"(.+)\.({'|'.join(map(re.escape, sorted(_NAMES, key=len, reverse=True)))})")
_ABOUT = ("alpha", "dora_scale", "magnitude", "diff_b", "up_bias")  # what stands beside any of them

# What else adapters' files hold, by a tensor that tells.
OTHER_ADAPTERS = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r.weight", "oft_r"), "an OFT"),
    "on_input": "an (IA)3",
    "ia3_l": "an (IA)3",
    "a1.weight": "a GLoRA",
    "w_norm": "the difference of a norm",
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B"), "a LoRA of an embedding"),
    "vera_lambda_b": "a VeRA",
    "set_weight": "a whole weight in place of another",
}


def split_adapter(name: str) -> tuple[str, str] | None:
    """Return the module that a tensor of two components belongs to, and what it is there; None for others."""
    match = _SUFFIX.fullmatch(name)
    return None if match is None else (match[1], _NAMES[match[2]])


class Adapter(Kind):
    """A change of another layer.

    Attributes:
        needed: the sets of tensors that make one, each enough by itself.
        more: tensors that may be beside them.
    """

    adapts = True
    fields = {
        **CONV.fields,
        "of": TEXT,
        "alpha": POSITIVE,
        "rank": INTEGER,
        "rank_stabilized": FLAG,
        "fan_in_fan_out": FLAG,
    }
    needed: ClassVar[tuple[frozenset[str], ...]] = ()
    more: ClassVar[frozenset[str]] = frozenset()

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        names = tensors.keys() - set(_ABOUT)
        return any(parts <= names <= parts | self.more for parts in self.needed)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        """Return the inner size of its factors; None where alpha means nothing to it."""
        return None

    def change(self, parts: Tensors, shape: Shape) -> Tensor:
        """Return D in float64, alpha left out, of the base's shape or of as many numbers.

        Args:
            parts: its tensors in float64.
            shape: of the base's weight.
        """
        raise NotImplementedError

    def applied(self, layer: Layer, base: Base, fields: Fields) -> Layer:
        """Return the layer that is added to `base`: like it, with the change as its weight.

        The numbers are computed when they are asked for, in float64.
        """
        own = list(layer.tensors)
        shape = base.layer.shapes["weight"]
        stored = tuple(layer.tensors[name].name for name in own)

        def weight(*tensors: Tensor) -> Tensor:
            return self.weight(dict(zip(own, tensors, strict=True)), base, fields, layer.name)

        def bias(*tensors: Tensor) -> Tensor:
            return self.bias(dict(zip(own, tensors, strict=True)), fields, layer.name)

        made = {"weight": TensorInfo(f"{layer.name}.weight", "float64", shape, 8 * math.prod(shape), stored, weight)}
        if {"diff_b", "up_bias"} & layer.tensors.keys():
            made["bias"] = TensorInfo(f"{layer.name}.bias", "float64", shape[:1], 8 * shape[0], stored, bias)
        return Layer(layer.name, base.layer.kind, made)

    def claim(self, fields: Fields, shapes: Shapes) -> str:
        idle = {"output_padding"} if not any(fields.get("output_padding", ())) else set()
        return ", ".join(self.say(name, value) for name, value in fields.items() if name not in idle)

    def say(self, name: str, value: Any) -> str:
        if name == "of":
            return f"changes {value}"
        return CONV.say(name, value) if name in CONV.fields else super().say(name, value)

    def assumed(self, layer: Layer, fields: Fields) -> list[str]:
        unsaid = self.rank(layer.shapes) is not None and "alpha" not in {**layer.tensors, **fields}
        return ["alpha is the rank"] if unsaid else []

    def weight(self, tensors: Tensors, base: Base, fields: Fields, name: str) -> Tensor:
        """Return what is added to the base's weight, in float64."""
        import torch

        shape = base.layer.shapes["weight"]
        parts = {part: tensor.to(torch.float64) for part, tensor in tensors.items()}
        change = self.change(parts, shape) * self.factor(tensors, fields, name)
        change = change.T if fields.get("fan_in_fan_out") else change
        if change.numel() != math.prod(shape) or change.shape[0] != shape[0]:
            raise RefusedError(
                f"{name}: its change has the shape {tuple(change.shape)}, and {base.layer.name}'s weight {tuple(shape)}"
            )
        change = change.reshape(shape)
        magnitude = parts.get("dora_scale", parts.get("magnitude"))
        if magnitude is None:
            return change
        whole = base.weight().to(torch.float64)
        changed = whole + change
        # PEFT's magnitude is per output, whatever its axes; LyCORIS' stands on the axis that it belongs to.
        axis = 0 if "magnitude" in parts or magnitude.dim() < 2 or magnitude.shape[0] != 1 else 1
        over = [number for number in range(changed.dim()) if number != axis]
        norm = torch.linalg.vector_norm(changed, dim=over, keepdim=True)
        if "dora_scale" in parts:
            norm = norm + torch.finfo(torch.promote_types(tensors["dora_scale"].dtype, torch.float32)).eps
        if magnitude.numel() != norm.numel():
            raise RefusedError(f"{name}: {magnitude.numel()} magnitudes for {norm.numel()} channels")
        made: Tensor = magnitude.reshape(norm.shape) * changed / norm - whole
        return made

    def bias(self, tensors: Tensors, fields: Fields, name: str) -> Tensor:
        """Return what is added to the base's bias, in float64."""
        import torch

        found = [tensors["diff_b"].to(torch.float64)] if "diff_b" in tensors else []
        if "up_bias" in tensors:
            found.append(tensors["up_bias"].to(torch.float64) * self.factor(tensors, fields, name))
        return sum(found[1:], found[0])

    def factor(self, tensors: Tensors, fields: Fields, name: str) -> float:
        """Return what the product of the factors is multiplied by; see `scaling`."""
        shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
        return self.scaling(shapes, tensors.get("alpha"), fields, name).factor

    def scaling(self, shapes: Shapes, stored: Tensor | None, fields: Fields, name: str) -> Scaling:
        """Return by what its change is multiplied.

        Args:
            stored: the alpha in the file.
        """
        rank = self.rank(shapes)
        if rank is None and stored is None:
            rank = fields.get("rank")  # PEFT scales a LoKr of two whole factors as well
        alpha = fields.get("alpha") if stored is None else float(stored)
        # An alpha of 0 is how trainers that write these files say that none was set.
        if not rank or not alpha:
            return Scaling(alpha or None, rank or None, 1.0)
        if not math.isfinite(alpha):
            raise InputError(f"{name}: alpha: holds {alpha}; nothing exact can be said of it")
        return Scaling(alpha, rank, alpha / (math.sqrt(rank) if fields.get("rank_stabilized") else rank))


class LoRA(Adapter):
    """up * down, of two factors, or of three with a kernel in between."""

    name = "lora"
    needed = (frozenset({"down", "up"}),)
    more = frozenset({"mid"})
    tensors = ("down", "up", "mid", *_ABOUT)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        return shapes["down"][0]

    def change(self, parts: Tensors, shape: Shape) -> Tensor:
        up, down = parts["up"].flatten(1), parts["down"]
        if "mid" in parts:
            return _tucker(parts["mid"], down.flatten(1), up.T)
        if up.shape[1] == down.shape[0]:
            return up @ down.flatten(1)
        # PEFT's second layer has the groups of the convolution that it belongs to.
        groups = down.shape[0] // up.shape[1]
        rows = up.reshape(groups, -1, up.shape[1]) @ down.flatten(1).reshape(groups, up.shape[1], -1)
        return rows.flatten(0, 1)


class LoHa(Adapter):
    """The product, number by number, of two products of two factors."""

    name = "loha"
    needed = (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),)
    more = frozenset({"hada_t1", "hada_t2"})
    tensors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", *_ABOUT)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        return shapes["hada_w1_b"][0]

    def change(self, parts: Tensors, shape: Shape) -> Tensor:
        one, other = (_product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in (1, 2))
        return one * other


class LoKr(Adapter):
    """The Kronecker product of two matrices, either of which may be a product of two factors."""

    name = "lokr"
    needed = tuple(
        frozenset({*one, *other})
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for other in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    )
    more = frozenset({"lokr_t2"})
    tensors = (*("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), *_ABOUT)

    def rank(self, shapes: Mapping[str, Shape]) -> int | None:
        return next((shapes[name][0] for name in ("lokr_w1_b", "lokr_w2_b") if name in shapes), None)

    def change(self, parts: Tensors, shape: Shape) -> Tensor:
        import torch

        one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        other = parts.get("lokr_w2")
        if other is None:
            other = _product(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
        # Flat behind the first axis: taps run fastest in both, so that a one-channel step of `one` is a window of them.
        return torch.kron(one, other.flatten(1).contiguous())


class Difference(Adapter):
    """The whole difference, of weight, bias or both."""

    name = "difference"
    needed = (frozenset({"diff"}), frozenset())
    tensors = ("diff", *_ABOUT)

    def recognises(self, tensors: Mapping[str, TensorInfo]) -> bool:
        return bool({"diff", "diff_b"} & tensors.keys()) and super().recognises(tensors)

    def change(self, parts: Tensors, shape: Shape) -> Tensor:
        import torch

        return parts["diff"] if "diff" in parts else torch.zeros(shape, dtype=torch.float64)


LORA, LOHA, LOKR, DIFFERENCE = LoRA(), LoHa(), LoKr(), Difference()


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    return a @ b if core is None else _tucker(core, b, a)


def _tucker(core: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return (p, r, ...) of a core (i, j, ...), b (j, r) and a (i, p), flattened behind the first axis."""
    import torch

    return torch.einsum("ij...,jr,ip->pr...", core, b, a).flatten(1)
