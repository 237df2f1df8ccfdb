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

is the most that these do together: the chain with |a_i| + h(a_i), less the one with |a_i|, as which it is computed. It
covers underflow (fp16, bf16), where no relative bound holds; for one layer it is at most u |A|(|x|), u the unit
roundoff, and down to half of it. Casts of torch from float64 to 16 bits pass through float32 and round twice
(convtool's own don't): h has float32's half unit on top, 2^-13 of itself or less.

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
difference. Numbers by themselves (`convtool.core.coefficients`) are what an input of one 1 among zeros gives: the
bound is then h of that number and little else, and one that is two units in the last place off is found, whatever the
size of its neighbours. Numbers just below a power of two lie half as far apart as those above, so what was rounded to
one lies within h beyond it and h/2 towards zero. Where A is one real layer, its numbers are held to that, by the sign
of the error: else a power of two in place of its neighbour below, half its own unit off, would pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.expression import Expression, depth, fused_geometry, in_channels
from convtool.core.joint import compose_geometry
from convtool.core.moves import Selection
from convtool.core.rounding import exact_dtype
from convtool.core.stored import Stored
from convtool.core.tree import Chain, Sum, Tree, map_leaves, sole_layer, walk
from convtool.errors import ConvtoolError, UsageError

U64 = 2.0**-53  # unit roundoff of float64
TINY64 = 2.0**-1074  # its smallest subnormal
LAYER_STEPS = 6  # roundings of a batch norm: subtract the mean, add eps, square root, divide, multiply; and keeping it
COMPLEX_STEPS = 3  # what the product of two complex numbers has more


Evaluated: TypeAlias = Callable[[Expression], Tensor]


class Bound:
    """What rounding may add up to; see this module's docstring.

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
        after: Tree[Stored],
        computed_in: torch.dtype = torch.float64,
        between: Sequence[torch.dtype] = (),
    ) -> None:
        self._before, self._after, kept = before, after, map_leaves(lambda leaf: leaf.conv, after)
        fusing, running = fusing_terms(before), depth(before, _terms) + depth(kept, _terms)
        stored_between = math.expm1(sum(math.log1p(torch.finfo(dtype).eps / 2) for dtype in between))
        self.computing = gamma(fusing, torch.finfo(computed_in).eps / 2) + stored_between
        self.running = gamma(running + fusing, U64)

    # What isn't asked for isn't made: these are as large as the layers.
    @cached_property
    def before(self) -> Expression:
        """The absolute values of BEFORE."""
        return map_leaves(lambda conv: conv.exact().absolute(), self._before)

    @cached_property
    def after(self) -> Expression:
        """The absolute values of AFTER."""
        return map_leaves(lambda leaf: leaf.conv.exact().absolute(), self._after)

    @cached_property
    def wide(self) -> Expression:
        """The most that AFTER's numbers can have been before they were stored."""
        return map_leaves(_widened, self._after)

    @cached_property
    def error(self) -> Conv | None:
        """What storing moved the numbers of AFTER by, where it is one layer."""
        layer = sole_layer(self._after)
        return None if layer is None or layer.error is None else _with_underflow(layer.error)

    @cached_property
    def less(self) -> tuple[Conv, Conv] | None:
        """What of that to take off where numbers should be larger, and where smaller; None where nothing."""
        layer = sole_layer(self._after)
        less = None if layer is None else layer.less
        if less is None:
            return None
        # Larger numbers are the nearer ones to zero of those below it, and smaller ones of those above.
        return less.changed(lambda numbers: numbers.neg().clamp(min=0)), less.changed(
            lambda numbers: numbers.clamp(min=0)
        )

    @cached_property
    def underflow(self) -> float:
        """What float64 products that underflow can add up to."""
        return _underflow(self._before) + _underflow(map_leaves(lambda leaf: leaf.conv, self._after))

    def of(
        self,
        evaluated: Evaluated,
        expected: Tensor,
        found: Tensor,
        *,
        numbers: bool = False,
        lost: Tensor | None = None,
    ) -> Tensor:
        """Return the most that rounding can do to what was found.

        Args:
            evaluated: gives for other layers what `expected` is of BEFORE and `found` of AFTER, signs apart.
            numbers: it is about the layers' own numbers, not about what comes of them.
            lost: what storing can have moved these by, where that is known.
        """
        if lost is None and self.error is None:
            wide = evaluated(self.wide)
            lost = wide - evaluated(self.after) + 2 * self.running * wide
        elif lost is None and self.error is not None:
            lost = evaluated(self.error)
            if numbers and self.less is not None:
                up, down = map(evaluated, self.less)
                lost = lost - torch.where(expected > found, up, down)
        assert lost is not None
        if numbers and bool(((expected - found).abs() <= lost).all()):
            return lost  # which is nearly always so, and takes nothing more
        before = evaluated(self.before)
        bound = lost + self.computing * before + self.running * (before + evaluated(self.after)) + self.underflow
        return bound * (1 + self.running)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The bound of those who insist on choosing one: atol + rtol * |expected|, as numpy's allclose."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0 <= value < math.inf:
                raise UsageError(f"--{name}: expected a finite number of at least 0, got {value:g}")

    def of(self, evaluated: Evaluated, expected: Tensor, found: Tensor, **_: object) -> Tensor:
        """Return the most that each number may be off; see `Bound.of`."""
        return self.atol + self.rtol * expected.abs()


def gamma(n: int, u: float) -> float:
    """Return the relative error of n roundings in a row, n u / (1 - n u); UsageError where that bounds nothing."""
    if n * u >= 1:
        raise UsageError(
            f"sums of {n} terms in a precision of {u:.1g} have no error bound; say with --computed-in what they were"
            " accumulated in (of 16-bit matrix products usually float32)"
        )
    return n * u / (1 - n * u)


def fusing_terms(tree: Expression) -> int:
    """Return the most roundings on the way to a number of the layer that stands for the tree, whatever the order."""
    if isinstance(tree, Sum):
        return max(map(fusing_terms, tree.parts)) + len(tree.parts) - 1
    if isinstance(tree, Chain):
        return sum(map(fusing_terms, tree.parts)) + _joints(tree)
    return LAYER_STEPS + (COMPLEX_STEPS if tree.dtype.is_complex else 0)


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


def _terms(conv: Conv) -> int:
    """Return the length of the longest accumulation in a layer: products and the bias."""
    return math.prod(conv.geometry.kernel_size) * (conv.in_channels // conv.geometry.groups) + (
        1 + (COMPLEX_STEPS if conv.dtype.is_complex else 0)
    )


def _underflow(tree: Expression) -> float:
    """Return eta: what float64 products that underflow can add up to."""

    def step(conv: Conv, lost: float) -> float:
        if isinstance(conv, Selection):
            return lost
        sums = conv.weight.to(exact_dtype(conv.dtype)).abs().flatten(1).sum(1)
        return lost * (float(sums.max()) if len(sums) else 0.0) + _terms(conv) * TINY64

    return walk(tree, 0.0, step, lambda _, branches: sum(branches))


def _with_underflow(error: Conv) -> Conv:
    # What underflowed on the way to a number before it was stored, however long the sum.
    more = _terms(error) * TINY64
    return error.changed(lambda numbers: numbers + more)


def _widened(leaf: Stored) -> Conv:
    size = leaf.conv.exact().absolute()
    if leaf.error is None:
        return size
    error = _with_underflow(leaf.error)
    bias = None if size.bias is None or error.bias is None else size.bias + error.bias
    return Conv(size.weight + error.weight, bias, size.geometry)
