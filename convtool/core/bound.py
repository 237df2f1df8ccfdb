"""How far apart rounding alone can bring two sides that are equal, element by element.

B (before) is a chain or sum of layers whose numbers are taken as exact. A (after) is what was made of it: in exact
arithmetic its numbers would give B's map; they were computed with some rounding, and each was rounded once more to the
dtype that it is stored in. Both sides are then run in float64. With |B|(|x|) for the same layers with the absolute
values of all weights and biases, elementwise,

    |B(x) - A(x)|  <=  S(|x|)  +  (gamma(K, v) + beta) |B|(|x|)  +  gamma(N, w) (|B|(|x|) + |A|(|x|))  +  eta

S, storing. What was rounded to the stored number a lies within half a unit in the last place of a, or within half of
the smallest subnormal where that is more (Muller et al., Handbook of Floating-Point Arithmetic, 2nd ed., section 2.6;
Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 2.1). So each has a known h(a), and with
m_i = |A|(|x|) up to layer i,

    S_0 = 0,   S_{i+1} = |a_i| S_i + h(a_i) (m_i + S_i) + h(bias_i)        (branches of a sum: added up)

is the most that these do together: the chain with |a_i| + h(a_i), less the one with |a_i|. It covers underflow (fp16,
bf16), where no relative bound holds; for one layer it is at most u |A|(|x|), u the unit roundoff, and down to half of
it. Casts of torch from float64 to 16 bits pass through float32 and round twice (convtool's own don't): h has float32's
half unit on top, 2^-13 of itself or less.

gamma(K, v), computing. gamma(n, u) = n u / (1 - n u) bounds the relative error of n roundings in a row (Higham, lemma
3.1), and a sum of n products errs by at most gamma(n, u) times the sum of their absolute values, in whatever order it
is formed (section 3.1). K is the most roundings on the way to a number of A: for each joint of a chain the entries in
a row of what stands right of it (the longest there can be, as layers may be joined in any order), one for each branch
that is added, and `LAYER_STEPS` for each layer, which is what lowering a batch norm takes. Gammas of what is done one
after the other add up (lemma 3.3). v is the unit roundoff that A was computed with: float64's for convtool's own.

beta, storing in between. What was fused in steps had parts stored before they were fused further. Each time moved the
numbers of a part by u of themselves, and they are at most what the absolute values of its layers give; so the steps
together move the output by beta |B|(|x|), 1 + beta the product of the (1 + u). Underflow in between isn't counted.

gamma(N, w), running both here, w = 2^-53. N counts the terms of all inner products along the longest path through B
and through A, with biases and additions of branches, and as many as K for what B's own lowering took. Complex products
err by at most sqrt(2) gamma(2) (Higham, lemma 3.5): three more roundings for each layer. The bound is computed with
roundings of its own, and is made larger by as much.

eta, underflow in float64: half of 2^-1074 for each product, carried through the layers that follow.

There is no tolerance to choose: a ratio of error to bound of at most 1 is what rounding can do, and more is a
difference. An impulse meets one kernel entry at a time, and then the bound is h of that entry and little else: an entry
one unit in the last place off is found, whatever the size of its neighbours. Numbers just below a power of two lie half
as far apart as those above, so what was rounded to one lies within h beyond it and h/2 towards zero. Where A is one
real layer, impulses (which are never negative) are held to that, by the sign of the error: else a power of two in place
of its neighbour below, half its own unit off, would pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, depth, in_channels
from convtool.core.geometry import Geometry
from convtool.core.inputs import Impulses, Input, Leaf, apply, respond
from convtool.core.joint import add_geometry, compose_geometry
from convtool.core.tree import Chain, Sum, Tree, fold, map_leaves
from convtool.errors import ConvtoolError, UsageError

U64 = 2.0**-53  # unit roundoff of float64
TINY64 = 2.0**-1074  # its smallest subnormal
LAYER_STEPS = 6  # roundings of a batch norm: subtract the mean, add eps, square root, divide, multiply; and keeping it
COMPLEX_STEPS = 3  # what the product of two complex numbers has more


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A layer whose numbers were rounded when they were stored.

    Attributes:
        conv: with the numbers as they are stored.
        error: with the most that storing moved each of them by, in float64.
        less_inwards: as the weight; by how much less it can have been towards zero. None where it can be as much.
    """

    conv: Conv
    error: Conv
    less_inwards: Tensor | None = None

    @property
    def geometry(self) -> Geometry:
        """Where the layer reads."""
        return self.conv.geometry

    def without_bias(self) -> Stored:
        """Return the linear part of the layer."""
        return Stored(self.conv.without_bias(), self.error.without_bias(), self.less_inwards)

    def to(self, dtype: torch.dtype, device: torch.device) -> Stored:
        """Return the layer with its numbers in `dtype` on the device; the errors stay in float64."""
        less = None if self.less_inwards is None else self.less_inwards.to(device)
        return Stored(self.conv.to(dtype, device), self.error.to(torch.float64, device), less)


def stored(conv: Conv, dtype: torch.dtype | None = None) -> Stored:
    """Return the layer with each number taken as rounded once to `dtype`; to its own where None."""
    bias = None if conv.bias is None else half_ulp(conv.bias, dtype or conv.bias.dtype)
    kind = dtype or conv.weight.dtype
    return Stored(conv, Conv(half_ulp(conv.weight, kind), bias, conv.geometry), less_inwards(conv.weight, kind))


def less_inwards(numbers: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return by how much nearer to each number is what was rounded to it from the side of zero: only to powers of two.

    None where there is no power of two, and for complex numbers.
    """
    if numbers.is_complex() or dtype.is_complex:
        return None
    info, word = torch.finfo(dtype), _WORDS.get(dtype)
    if word is not None and numbers.dtype == dtype:  # of whose bits those behind the exponent are all 0
        powers = (numbers.view(word) & _behind_exponent(info)) == 0
        if not bool(powers.any()):
            return None
        size = numbers.to(torch.float64).abs()
    else:
        size = numbers.to(torch.float64).abs()
        powers = torch.frexp(size).mantissa == 0.5
    powers &= size > info.smallest_normal
    return torch.where(powers, size * (info.eps / 4), 0.0) if bool(powers.any()) else None


def half_ulp(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the most by which what was rounded to each of these numbers of `dtype` can differ from it, in float64.

    Of complex numbers, the modulus of what both parts can differ by.
    """
    if numbers.is_complex():
        parts = torch.view_as_real(numbers.to(torch.complex128))
        real = dtype.to_real() if dtype.is_complex else dtype
        return torch.hypot(*half_ulp(parts, real).unbind(-1))
    info, word = torch.finfo(dtype), _WORDS.get(dtype)
    smallest = info.smallest_normal * info.eps / 2
    if word is not None and numbers.dtype == dtype:  # the bits of the exponent alone are the power of two below
        exponent = ((1 << info.bits - 1) - 1) & ~_behind_exponent(info)
        powers = (numbers.view(word) & exponent).view(dtype).to(torch.float64)
        half = powers.mul_(info.eps / 2).clamp_(min=smallest)
    else:
        size = numbers.to(torch.float64).abs()
        power = torch.frexp(size).exponent - 1  # size = [1, 2) * 2**power
        half = torch.ldexp(torch.full_like(size, info.eps / 2), power)
        half = torch.where(size == 0, smallest, half).clamp(min=smallest)
    return half + numbers.to(torch.float64).abs() * 2.0**-24 if info.bits < 32 else half


_WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _behind_exponent(info: torch.finfo) -> int:
    """Return the bits of a number that stand behind its exponent."""
    return round(1 / info.eps) - 1


class Allowance:
    """What rounding may add up to, beyond what storing AFTER's numbers did to them; see this module's docstring.

    Args:
        before: layers with exact numbers.
        after: layers with numbers that were rounded when they were stored.
        computed_in: the precision that the numbers of `after` were computed in before that.
        between: dtypes in which parts of `after` were stored before they were fused further, one for each time.

    Raises:
        UsageError: sums so long, in a precision so low, that nothing can be said.
    """

    def __init__(
        self,
        before: Expression,
        after: Expression,
        computed_in: torch.dtype = torch.float64,
        between: Sequence[torch.dtype] = (),
    ) -> None:
        self._before, self._kept = before, after
        fusing, running = fusing_terms(before), depth(before, _terms) + depth(after, _terms)
        stored_between = math.expm1(sum(math.log1p(torch.finfo(dtype).eps / 2) for dtype in between))
        self.computing = gamma(fusing, torch.finfo(computed_in).eps / 2) + stored_between
        self.running = gamma(running + fusing, U64)

    @cached_property
    def underflow(self) -> float:
        """What float64 products that underflow can add up to."""
        return _underflow(self._before) + _underflow(self._kept)

    def around(self, lost: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the bound on numbers.

        Args:
            lost: what storing them can have moved them by.
            before, after: what the absolute values of either side give.
        """
        bound = lost + self.computing * before + self.running * (before + after.abs()) + self.underflow
        return bound * (1 + self.running)


class Bound(Allowance):
    """The whole bound on outputs; `before` is in float64 or complex128, and `after` says what storing it did."""

    def __init__(
        self, before: Expression, after: Tree[Stored], computed_in: torch.dtype, between: Sequence[torch.dtype] = ()
    ) -> None:
        super().__init__(before, map_leaves(lambda leaf: leaf.conv, after), computed_in, between)
        self._after = after

    # What isn't asked for isn't made: these are as large as the layers.
    @cached_property
    def before(self) -> Expression:
        """The absolute values of BEFORE."""
        return map_leaves(Conv.absolute, self._before)

    @cached_property
    def after(self) -> Tree[Stored]:
        """The absolute values of AFTER."""
        return map_leaves(_absolute_stored, self._after)

    @cached_property
    def less(self) -> tuple[Conv, Conv] | None:
        """What to take off for an impulse where outputs should be larger, and where smaller; None where nothing."""
        return _less_inwards(self._after)

    def of(self, x: Input, expected: Tensor, found: Tensor) -> Tensor:
        """Return the most that rounding can do to each output, (N, C_out, *output_size)."""
        size = x.abs()
        before, (after, lost) = apply(self.before, size), _storing(self.after, size, None)
        if self.less is not None and isinstance(x, Impulses):
            up, down = (respond(less, x) for less in self.less)
            lost = lost - torch.where(expected > found, up, down)
        return self.around(lost, before, after)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The bound of those who insist on choosing one: atol + rtol * |expected|, as numpy's allclose."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0 <= value < math.inf:
                raise UsageError(f"--{name}: expected a finite number of at least 0, got {value:g}")

    def of(self, x: Input, expected: Tensor, found: Tensor) -> Tensor:
        """Return the most that each output may be off."""
        return self.atol + self.rtol * expected.abs()


def gamma(n: int, u: float) -> float:
    """Return the relative error of n roundings in a row, n u / (1 - n u); UsageError where that bounds nothing."""
    if n * u >= 1:
        raise UsageError(
            f"sums of {n} terms in a precision of {u:.1g} have no error bound; say with --computed-in what they were"
            " accumulated in (of 16-bit matrix products usually float32)"
        )
    return n * u / (1 - n * u)


def half_digit(values: Tensor, digits: int) -> Tensor:
    """Return half of the last of so many decimal digits of each number; of a complex one, of its larger part."""
    size = torch.view_as_real(values).abs().amax(-1) if values.is_complex() else values.abs().to(torch.float64)
    power = torch.where(size > 0, size, 1.0).log10().floor() - digits + 1
    # A number that was rounded up to a power of ten had smaller digits, never larger ones.
    return torch.where(size > 0, 0.5 * 10.0**power * (1 + 2.0**-40), 0.0)


def stored_within(wanted: Tensor, have: Tensor, half: Tensor) -> Tensor:
    """Return what storing may have moved each number by, on its side: powers of two move less inwards."""
    less = less_inwards(have, have.dtype)
    return half if less is None else half - torch.where(wanted.abs() < have.abs(), less, 0.0)


def fusing_terms(tree: Expression) -> int:
    """Return the most roundings on the way to a number of the layer that stands for the tree, whatever the order."""
    if isinstance(tree, Sum):
        return max(map(fusing_terms, tree.parts)) + len(tree.parts) - 1
    if isinstance(tree, Chain):
        return sum(map(fusing_terms, tree.parts)) + _joints(tree)
    return LAYER_STEPS + (COMPLEX_STEPS if tree.weight.is_complex() else 0)


def _joints(chain: Chain[Conv]) -> int:
    """Add up, for each joint of a chain, the entries in a row of the longest layer that may stand right of it."""

    def longest(number: int) -> int:
        inner = in_channels(chain.parts[number])
        composed = itertools.accumulate(shapes[number:], compose_geometry)
        return max(inner // geometry.groups * math.prod(geometry.kernel_size) for geometry in composed)

    try:
        shapes = [fused_geometry(part) for part in chain.parts]
        return sum(longest(number) + 1 for number in range(1, len(shapes)))  # and the bias
    except ConvtoolError:  # no single layer has that form, so nothing was composed; what running it takes is as much
        return depth(chain, _terms)


def fused_geometry(tree: Expression) -> Geometry:
    """Return the geometry of the one layer that stands for the tree; RefusedError where there is none."""

    def chain(parts: list[Geometry]) -> Geometry:
        return reduce(compose_geometry, parts)

    def total(parts: list[Geometry]) -> Geometry:
        return reduce(add_geometry, parts)

    return fold(tree, lambda conv: conv.geometry, chain, total)


def _terms(conv: Conv) -> int:
    """Return the length of the longest accumulation in a layer: products and the bias."""
    return conv.weight[0].numel() + 1 + (COMPLEX_STEPS if conv.weight.is_complex() else 0)


def _underflow(tree: Expression) -> float:
    """Return eta: what float64 products that underflow can add up to."""

    def through(part: Expression, lost: float) -> float:
        if isinstance(part, Chain):
            return reduce(lambda value, one: through(one, value), part.parts, lost)
        if isinstance(part, Sum):
            return sum(through(one, lost) for one in part.parts)
        gain = float(part.weight.abs().flatten(1).sum(1).max()) if part.weight.numel() else 0.0
        return lost * gain + _terms(part) * TINY64

    return through(tree, 0.0)


def _absolute_stored(leaf: Stored) -> Stored:
    # What underflowed on the way to a number before it was stored, however long the sum.
    more = leaf.conv.weight[0].numel() * TINY64 if leaf.conv.weight.numel() else 0.0
    bias = None if leaf.error.bias is None else leaf.error.bias + more
    return Stored(leaf.conv.absolute(), Conv(leaf.error.weight + more, bias, leaf.geometry))


def _less_inwards(after: Tree[Stored]) -> tuple[Conv, Conv] | None:
    """Return what to take off for an impulse where outputs should be larger, and where smaller; None where nothing."""
    layer = sole_layer(after)
    if layer is None or layer.less_inwards is None:
        return None
    weight, less = layer.conv.weight, layer.less_inwards
    sides = (weight < 0, weight > 0)  # those numbers that are nearer to zero where they are larger; smaller
    up, down = (Conv(torch.where(side, less, 0.0), None, layer.geometry) for side in sides)
    return up, down


def sole_layer(tree: Tree[Leaf]) -> Leaf | None:
    """Return the layer that is all of the tree; None where there are several."""
    while isinstance(tree, Chain | Sum):
        if len(tree.parts) > 1:
            return None
        tree = tree.parts[0]
    return tree


def _storing(tree: Tree[Stored], x: Input, lost: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (m, S) behind the tree: the absolute output, and what storing the numbers can have moved it by.

    Args:
        x: the absolute input.
        lost: the S that it brings along; None for none.
    """
    if isinstance(tree, Chain):
        first, *others = tree.parts
        size, lost = _storing(first, x if isinstance(x, Tensor) else x.into(others), lost)
        for part in others:
            size, lost = _storing(part, size, lost)
        return (size, lost) if isinstance(x, Tensor) else (x.wanted(size, others), x.wanted(lost, others))
    if isinstance(tree, Sum):
        sizes, losses = zip(*(_storing(part, x, lost) for part in tree.parts), strict=True)
        return reduce(torch.add, sizes), reduce(torch.add, losses)
    size = respond(tree.conv, x)
    if lost is None or not isinstance(x, Tensor):
        return size, respond(tree.error, x)
    return size, respond(tree.conv.without_bias(), lost) + respond(tree.error, x + lost)
