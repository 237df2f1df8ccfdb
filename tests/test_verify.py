"""The verifier: its bound against what rounding does, its inputs against the definition, and what it says of both.

That it finds faults is `test_fault_injection`; that correct fusions pass, in numbers, `random_fusions`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, real_numbers, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NOTHING, axis_taps
from random_fusions import DTYPES, check, random_fusions
from strategies import chains, mixed_chains
from torch import Tensor

import convtool
from convtool.core.bound import Bound, Tolerance, fusing_terms, gamma
from convtool.core.conv import Conv
from convtool.core.expression import Expression, alike_size, default_sizes, fused_geometry, run, split_input_size
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.rounding import rounded
from convtool.core.stored import Stored, half_ulp, stored
from convtool.core.tally import dense_inputs, ratios
from convtool.core.tree import Chain, Sum, Tree
from convtool.core.verify import EquivalenceReport, verify
from convtool.errors import ConvtoolError, RefusedError, UsageError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def layer(
    seed: int, shape: Sequence[int], dtype: torch.dtype = torch.float64, bias: bool = True, **fields: Any
) -> Conv:
    weight = rounded(real_numbers(seed, *shape), dtype)
    return convtool.conv(weight, rounded(real_numbers(seed + 50, shape[0]), dtype) if bias else None, **fields)


def pair(dtype: torch.dtype = torch.float32) -> list[Conv]:
    """Two layers that fuse exactly, with strides, a dilation and a padding, all non-square."""
    first = layer(1, (4, 3, 3, 2), dtype, stride=(2, 1), padding=[(1, 0), (2, 1)], dilation=(1, 2))
    return [first, layer(2, (5, 4, 2, 3), dtype, stride=(1, 2))]


# --- half a unit in the last place


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_power_of_two_and_its_neighbours_are_told_apart(dtype: torch.dtype, sign: float) -> None:
    """Each of them stored in place of each other is found, though the two below lie half as far apart."""
    zero, most = torch.tensor(0.0, dtype=dtype), torch.tensor(math.inf, dtype=dtype)
    for power in (0.25, 1.0, 64.0):
        middle = torch.tensor(power, dtype=dtype)
        numbers = [torch.nextafter(middle, zero), middle, torch.nextafter(middle, most)]
        for one, other in itertools.product(range(3), repeat=2):
            # The numbers stand among others in a kernel of three taps.
            weights = [torch.stack([zero + 3, numbers[n], zero - 5]).mul(sign).reshape(1, 1, 3) for n in (one, other)]
            before, after = (convtool.conv(weight) for weight in weights)
            report = verify([before], [after], (9,), trials=1)
            if dtype is torch.float64:  # the rounding of running both is as much
                assert report.equivalent
            else:
                assert report.equivalent == (one == other), (power, one, other, report.ratio)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_what_rounds_to_a_power_of_two_passes_on_either_side(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for share in (-0.2499, -0.1, 0.2, 0.4999):
        exact = torch.tensor([[[2.0, -2.0, 0.5]]], dtype=torch.float64) * (1 + share * eps)
        after = convtool.conv(rounded(exact, dtype))
        assert torch.equal(after.weight.double(), torch.tensor([[[2.0, -2.0, 0.5]]], dtype=torch.float64))
        report = verify([convtool.conv(exact)], [after], (8,), trials=1)
        assert report.equivalent
        assert report.ratio > 0.15


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_an_ulp_is_half_the_way_to_the_next_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    numbers = torch.tensor(
        [1.0, 1.5, 2.0, -3.75, info.max, info.smallest_normal, tiny, 5 * tiny, 0.0, -0.0], dtype=dtype
    )
    upwards = torch.nextafter(numbers.abs(), torch.tensor(math.inf, dtype=dtype)).double()
    steps = torch.where(upwards.isfinite(), upwards - numbers.double().abs(), info.max * info.eps / (2 - info.eps))
    allowance = 1.0 if dtype.itemsize > 2 else 1 + 2.0**-11  # float32's own half unit on top
    found = half_ulp(numbers, dtype)
    assert bool((found >= steps / 2).all())
    assert bool((found <= steps / 2 * allowance).all())


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rounding_moves_nothing_by_more_and_sometimes_by_as_much(dtype: torch.dtype) -> None:
    exact = real_numbers(1, 40_000) * torch.exp2(real_numbers(2, 40_000) * 8)
    moved = (rounded(exact, dtype).double() - exact).abs()
    most = half_ulp(rounded(exact, dtype), dtype)
    finite = rounded(exact, dtype).isfinite()
    assert bool((moved <= most)[finite].all())
    assert float((moved / most)[finite].max()) > 0.995
    twice = exact.float().to(dtype)  # by way of float32, as torch's own casts go
    assert bool(((twice.double() - exact).abs() <= half_ulp(twice, dtype))[finite & twice.isfinite()].all())


def test_of_complex_numbers_both_parts_count() -> None:
    numbers = torch.tensor([3 + 4j, 1e-3 + 5j, 0j], dtype=torch.complex64)
    parts = [half_ulp(part, torch.float32) for part in (numbers.real, numbers.imag)]
    assert torch.equal(half_ulp(numbers, torch.complex64), torch.hypot(*parts))


# --- the bound


def test_gamma() -> None:
    assert gamma(3, 2.0**-53) == 3 * 2.0**-53 / (1 - 3 * 2.0**-53)
    with pytest.raises(UsageError, match="--computed-in"):
        gamma(300, 2.0**-8)


def test_terms_of_a_fusion_by_hand() -> None:
    steps = fusing_terms(layer(0, (4, 3, 3, 2)))
    # A row of what stands right of the joint, and the bias: 4 channels of 2x3 taps.
    assert fusing_terms(Chain(tuple(pair()))) == 2 * steps + 4 * 6 + 1
    third = layer(3, (2, 5, 1, 3))
    # Joined from the right, the first joint has the other two composed to its right: 4 channels of 2x7 taps.
    composed = fused_geometry(Chain((pair()[1], third))).kernel_size
    assert composed == (2, 7)
    assert fusing_terms(Chain((*pair(), third))) == 3 * steps + (4 * 14 + 1) + (5 * 3 + 1)
    assert fusing_terms(Sum((layer(0, (4, 3, 3, 2)), layer(1, (4, 3, 3, 2)), layer(2, (4, 3, 3, 2))))) == steps + 2


def test_the_bound_of_one_layer_is_half_an_ulp_of_each_number_and_little_else() -> None:
    conv = layer(1, (3, 2, 2, 3), torch.bfloat16)
    x = real_numbers(2, 4, 2, 5, 6)
    bound = bound_on(conv, stored(conv), x)
    error = stored(conv).error
    assert error is not None
    storing = forward(error, x.abs())
    assert bool((bound >= storing).all())
    assert bool((bound <= storing * (1 + 1e-9)).all())
    unit = 2.0**-8 * (1 + 2.0**-15) * forward(_absolute(conv.exact()), x.abs())
    assert bool((bound <= unit * (1 + 1e-9)).all())
    assert bool((bound >= unit / 2 * (1 - 1e-9)).all())


def bound_on(before: Expression, after: Tree[Stored], x: Tensor) -> Tensor:
    """Return the bound on outputs for some inputs."""
    return Bound(before, after).of(lambda tree: run(tree, x.abs()), x, x)


def _absolute(conv: Conv) -> Conv:
    return Conv(conv.weight.abs(), None if conv.bias is None else conv.bias.abs(), conv.geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chain_stored_layer_by_layer_stays_within_what_storing_can_do_and_comes_near(dtype: torch.dtype) -> None:
    exact = [layer(1, (3, 2, 2, 3)), layer(2, (4, 3, 3, 1)), layer(3, (2, 4, 1, 2))]
    positive = [
        Conv(conv.weight.abs(), conv.bias.abs() if conv.bias is not None else None, conv.geometry) for conv in exact
    ]
    report = verify(positive, [conv.to(dtype) for conv in positive], (6, 7))
    assert report.equivalent
    # Every number as far off as it can be, all in the same direction: the bound is reached and not passed.
    kept = [stored(conv.to(dtype)) for conv in positive]
    worst = []
    for leaf in kept:
        assert leaf.conv.bias is not None
        assert leaf.error is not None
        assert leaf.error.bias is not None
        worst.append(
            Conv(
                leaf.conv.weight.double() + leaf.error.weight,
                leaf.conv.bias.double() + leaf.error.bias,
                leaf.conv.geometry,
            )
        )
    report = verify(worst, Chain(tuple(kept)), (6, 7))
    assert report.equivalent
    assert report.ratio > 0.999
    further = [*worst[:-1], Conv(worst[-1].weight * (1 + 1e-4), worst[-1].bias, worst[-1].geometry)]
    assert not verify(further, Chain(tuple(kept)), (6, 7)).equivalent


def test_adding_branches_adds_what_storing_can_do() -> None:
    branches = [layer(seed, (3, 2, 3, 2), torch.float16) for seed in (1, 2)]
    kept = Sum(tuple(stored(conv) for conv in branches))
    x = real_numbers(1, 2, 2, 4, 5)
    both = bound_on(Sum(tuple(branches)), kept, x)
    apart = [bound_on(conv, stored(conv), x) for conv in branches]
    torch.testing.assert_close(both, apart[0] + apart[1], rtol=1e-9, atol=0)


def test_underflow_is_in_the_bound() -> None:
    """Weights far below float16's smallest number: stored as zero, which is all that float16 can do."""
    exact = Conv(real_numbers(1, 3, 2, 3, 2) * 2.0**-27, real_numbers(2, 3) * 2.0**-27, Geometry.of((3, 2)))
    half = exact.to(torch.float16)
    assert not half.weight.count_nonzero()
    report = verify([exact], [half], (5, 6))
    assert report.equivalent
    assert 0.01 < report.ratio <= 1
    assert not verify([exact.to(torch.float16)], [exact], (5, 6), dtype=torch.float64).equivalent
    less = Conv(exact.weight * 16, exact.bias, exact.geometry)  # now they are above half of the smallest number
    assert not verify([less], [half], (5, 6)).equivalent


def test_numbers_too_large_for_float64_are_not_equivalent_to_anything() -> None:
    """The bound itself overflows: what allows any error allows none."""
    far = [Conv(torch.full((1, 1, 2), 1e200, dtype=torch.float64), None, Geometry.of(2)) for _ in range(2)]
    cancelling = Conv(torch.tensor([[[1e200, -1e200]]], dtype=torch.float64), None, Geometry.of(2))
    assert not verify(far, far, (6,)).equivalent
    report = verify([far[0], cancelling], [far[0], cancelling], (6,))
    assert not report.equivalent
    assert report.ratio == math.inf


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_computed_in_allows_for_that_precision_and_not_for_more(computed_in: torch.dtype) -> None:
    conv = layer(1, (4, 3, 3, 2), computed_in)
    norm = convtool.conv(
        rounded(real_numbers(2, 4, 1, 1, 1), computed_in), rounded(real_numbers(3, 4), computed_in), groups=4
    )
    assert conv.bias is not None
    assert norm.bias is not None
    gain = norm.weight.reshape(4, 1, 1, 1)  # multiplied and stored in that precision, as other programs do
    bias = conv.bias * gain.flatten() + norm.bias
    theirs = Conv(conv.weight * gain, bias, conv.geometry)
    report = verify([conv, norm], [theirs], (5, 7), computed_in=computed_in)
    assert report.equivalent
    off = Conv(theirs.weight * (1 + 40 * torch.finfo(computed_in).eps), bias, conv.geometry)
    assert not verify([conv, norm], [off], (5, 7), computed_in=computed_in).equivalent


# --- inputs


def test_dense_inputs_are_signed_of_several_scales_and_repeatable() -> None:
    kinds: dict[str, list[Tensor]] = {}
    for kind, x in dense_inputs(3, (4, 5), 7, 1, 60):
        kinds.setdefault(kind, []).append(x)
    normal = torch.cat(kinds["normal"])
    assert normal.shape == (7, 3, 4, 5)
    spread = normal.flatten(1).std(dim=1)
    assert float(spread.max() / spread.min()) > 2.0**15
    assert bool((normal < 0).any())
    assert bool((normal > 0).any())
    assert not torch.cat(kinds["zero"]).count_nonzero()
    assert torch.equal(torch.cat(kinds["constant"]), torch.ones(1, 3, 4, 5, dtype=torch.float64))
    again = torch.cat([x for kind, x in dense_inputs(3, (4, 5), 7, 1, 10**9) if kind == "normal"])
    assert torch.equal(normal, again)  # whatever the batches
    other = torch.cat([x for kind, x in dense_inputs(3, (4, 5), 7, 2, 60) if kind == "normal"])
    assert not torch.equal(normal, other)


@settings(max_examples=150)
@given(chain=st.one_of(chains(), mixed_chains()))
def test_default_sizes_run_differ_by_axis_and_leave_remainders(chain: list[Conv]) -> None:
    found = default_sizes(chain)
    for size in found:
        assert all(n > 0 for n in run(Chain(tuple(chain)), torch.zeros(1, chain[0].in_channels, *size).double()).shape)
        assert len(set(size)) == len(size)
    stride = max(math.prod(axes) for axes in zip(*(conv.geometry.stride for conv in chain), strict=True))
    if not any(conv.geometry.transposed for conv in chain):
        assert len(found) == min(4, stride)
        assert stride == 1 or any(n % stride for size in found for n in size)


def test_a_smaller_size_that_is_run_in_place_of_a_large_one_shows_the_same_at_either_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which outputs a chain and the layer fused from it differ in, at both sizes: all padding modes, strides to 4."""
    monkeypatch.setattr("convtool.core.expression.COMFORTABLE_INPUT", 0)
    choose = random.Random(0)

    def one(seed: int, shape: tuple[int, int]) -> Conv:
        geometry: dict[str, Any] = {
            "stride": choose.choice((1, 1, 2, 3, 4)),
            "padding": [(choose.randrange(4), choose.randrange(4))],
            "dilation": choose.choice((1, 1, 2)),
            "padding_mode": choose.choice(("zeros", "zeros", "circular", "reflect", "replicate")),
        }
        return layer(seed, (*shape, choose.randint(1, 4)), bias=choose.random() < 0.5, **geometry)

    def differing(chain: Chain[Conv], fused: Conv, size: int) -> Tensor:
        x = real_numbers(7, 1, 1, size)
        return ((run(chain, x) - run(fused, x)).abs() > 1e-9)[0, 0]

    compared = inexact = 0
    for seed in range(400):
        layers, size = (one(seed, (2, 1)), one(seed + 1000, (1, 2))), choose.randrange(160, 220)
        chain = Chain(layers)
        try:
            fused = convtool.compose(*layers)
            (smaller,) = alike_size((chain, fused), (size,))
            large, small = differing(chain, fused, size), differing(chain, fused, smaller)
        except ConvtoolError:  # padding modes that don't compose
            continue
        assert smaller < size
        half = len(small) // 2
        assert torch.equal(large[:half], small[:half])
        assert torch.equal(large[len(large) - half :], small[len(small) - half :])
        assert bool(large.any()) == bool(small.any())
        compared, inexact = compared + 1, inexact + bool(large.any())
    assert compared > 120
    assert 40 < inexact < compared - 40


def test_a_size_is_kept_where_it_is_small_or_a_bias_map_or_a_whole_kernel_ties_a_layer_to_it() -> None:
    conv = layer(1, (3, 2, 3, 5), padding=1)
    assert alike_size((conv,), (30, 41)) == (30, 41)
    large = (900, 1001)
    assert max(alike_size((conv,), large)) < 40
    mapped = Conv(conv.weight, torch.zeros(3, 900, 999, dtype=torch.float64), conv.geometry)
    assert alike_size((conv, mapped), large) == large
    whole = layer(2, (3, 1, 900, 1001))
    assert alike_size((whole,), large) == large


def test_input_sizes_with_and_without_channels() -> None:
    assert split_input_size((5, 6), 3, 2) == split_input_size((3, 5, 6), 3, 2) == (5, 6)
    assert split_input_size((), 3, 0) == split_input_size((3,), 3, 0) == ()
    for wrong in ((4, 5, 6), (5,), (1, 3, 5, 6)):
        with pytest.raises(UsageError, match="input size"):
            split_input_size(wrong, 3, 2)


# --- tallies and reports


def test_ratios_of_what_cannot_be_compared_are_infinite() -> None:
    inf, nan = math.inf, math.nan
    expected = torch.tensor([1.0, nan, 1.0, inf, inf, 2.0, 2.0, 1.0, 1.0])
    found = torch.tensor([1.0, 1.0, nan, inf, 1.0, 2.5, 2.5, 1.0, 2.0])
    bound = torch.tensor([0.0, 1.0, 1.0, 1.0, inf, 1.0, 0.0, inf, nan])
    _, ratio = ratios(expected, found, bound)
    assert ratio.tolist() == [0, inf, inf, inf, inf, 0.5, inf, inf, inf]


def test_a_report_says_where_and_how_much() -> None:
    before = [layer(1, (3, 2, 2, 3), torch.float32)]
    weight = before[0].weight.clone()
    weight[1, 0, 1, 2] += 0.5
    report = verify(before, [Conv(weight, before[0].bias, before[0].geometry)], (2, 5, 6))
    assert not report.equivalent
    assert report.input_size == (2, 5, 6)
    assert report.output_size == (3, 4, 4)
    numbers, region = report.numbers, report.interior
    assert numbers.where == (1, 0, 1, 2)  # the entry that was changed
    assert (numbers.differing, numbers.elements) == (1, 3 * 2 * 2 * 3 + 3)
    assert numbers.error == pytest.approx(0.5)
    for one in (numbers, region):
        assert one.ratio == pytest.approx(one.error / one.bound)
    assert region.where is not None
    assert region.where[0] == 1
    assert region.differing == region.positions == 16
    assert region.largest_error >= region.error
    assert 0 < region.relative_error < 1


def test_interior_and_rim_are_told_apart() -> None:
    first = layer(1, (3, 2, 3, 2), torch.float32, padding=(1, 0))
    second = layer(2, (4, 3, 3, 2), torch.float32, padding=(1, 1))
    fused = convtool.fuse([first, second], allow_border=True)
    report = verify([first, second], [fused], (8, 9))
    assert report.interior.equal
    assert not report.rim.equal
    assert not report.equivalent
    outputs = math.prod(report.output_size[1:])
    assert report.interior.positions + report.rim.positions == outputs
    assert 0 < report.rim.differing <= report.rim.positions
    # An error inside shows inside, whatever the rim does.
    weight = fused.weight.clone()
    weight[0, 0, 2, 1] += 1
    wrong = verify([first, second], [Conv(weight, fused.bias, fused.geometry)], (8, 9))
    assert not wrong.interior.equal


def test_the_same_seed_gives_the_same_report() -> None:
    layers = pair()
    fused = convtool.fuse(layers)

    def reported(seed: int) -> EquivalenceReport:
        return verify(layers, [fused], (11, 14), seed=seed)

    assert reported(3) == reported(3)
    assert reported(3).seed == 3
    assert reported(3).interior != reported(4).interior


def test_exhaustive_runs_every_basis_vector() -> None:
    layers = pair()
    report = verify(layers, [convtool.fuse(layers)], (9, 11), exhaustive=True, trials=0)
    assert report.equivalent
    assert report.inputs == {"zero": 1, "constant": 1, "basis": 3 * 9 * 11}


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_a_user_sees_who_runs_both_as_stored(dtype: torch.dtype) -> None:
    layers = pair(dtype)
    found = verify(layers, [convtool.fuse(layers)], (11, 14)).stored_error
    assert found is not None
    assert found.dtype == str(dtype).removeprefix("torch.")
    unit = torch.finfo(dtype).eps
    assert 0 < found.difference < 100 * unit
    assert found.difference <= found.before + found.after + unit


def test_nothing_compared_is_an_error_and_never_a_pass() -> None:
    conv = layer(1, (3, 2, 2, 3))
    with pytest.raises(UsageError, match="no comparison is no proof"):
        verify([conv], [conv], (5, 6), trials=0)
    with pytest.raises(UsageError, match="smaller than the kernel"):
        verify([conv], [conv], (1, 6))
    with pytest.raises(UsageError, match="at least one layer"):
        verify([], [conv], (5, 6))
    assert not EquivalenceReport((2, 5, 6), (3, 4, 4)).equivalent


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (layer(1, (3, 2, 2, 3), stride=2), "the outputs differ: 3x4x4 before, 3x2x2 after"),
        (layer(1, (4, 2, 2, 3)), "the outputs differ: 3x4x4 before, 4x4x4 after"),
        (layer(1, (3, 1, 2, 3)), "the inputs differ: 2 channels before, 1 after"),
        (layer(1, (3, 2, 6, 3)), "doesn't run on this input"),
    ],
    ids=["stride", "channels out", "channels in", "kernel"],
)
def test_shapes_that_do_not_agree_are_a_verdict(after: Conv, message: str) -> None:
    report = verify([layer(1, (3, 2, 2, 3))], [after], (5, 6))
    assert message in report.mismatch
    assert not report.equivalent
    assert report.ratio == math.inf


def test_different_numbers_of_axes_are_no_question() -> None:
    with pytest.raises(UsageError, match="2 spatial axes before, 1 after"):
        verify([layer(1, (3, 2, 2, 3))], [layer(1, (3, 2, 2))], (5, 6))


def test_a_tolerance_of_ones_own() -> None:
    conv = layer(1, (3, 2, 2, 3))
    off = Conv(conv.weight * 1.001, conv.bias, conv.geometry)
    assert not verify([conv], [off], (5, 6)).equivalent
    assert verify([conv], [off], (5, 6), atol=100.0).equivalent
    assert not verify([conv], [off], (5, 6), rtol=1e-5, atol=1e-9).equivalent
    nan = Conv(conv.weight * math.nan, conv.bias, conv.geometry)
    assert not verify([conv], [nan], (5, 6), atol=1e300).equivalent
    for wrong in (-1.0, math.nan, math.inf):
        for name in ("rtol", "atol"):
            with pytest.raises(UsageError, match=f"--{name}: expected a finite number of at least 0"):
                verify([conv], [conv], (5, 6), **{name: wrong})  # type: ignore[arg-type]
    most = Tolerance(0.5, 1.0).of(lambda tree: torch.zeros(1), torch.tensor([-2.0]), torch.zeros(1))
    assert torch.equal(most, torch.tensor([2.0]))


def test_taps_that_no_output_reads_are_said_to_be_unknown() -> None:
    """At a size of 1x2 a padded 3x3 kernel has no corner that meets the input: whatever it holds, outputs agree."""
    conv = layer(1, (3, 2, 3, 3), padding=1)
    hollow = conv.weight.clone()
    hollow[:, :, [0, 2]] = 0
    report = verify([conv], [Conv(hollow, conv.bias, conv.geometry)], (1, 2))
    assert report.equivalent
    assert report.taps == (3, 9)
    whole = verify([conv], [Conv(hollow, conv.bias, conv.geometry)], (3, 4))
    assert not whole.equivalent
    assert whole.taps == (9, 9)
    assert all(verify([conv], [conv], size).taps == (9, 9) for size in default_sizes([conv]))


def test_an_input_that_would_not_fit_is_refused_before_anything_is_made() -> None:
    conv = layer(1, (3, 2, 3, 3), padding=1)
    with pytest.raises(UsageError, match="too many to run here"):
        verify([conv], [conv], (10**9, 10**9))


# --- kinds of layers


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_layer_equals_itself_rounded_and_not_one_that_is_off(case: Case, dtype: torch.dtype) -> None:
    whole = case.conv()
    conv = Conv(
        real_numbers(3, *whole.weight.shape),
        None if whole.bias is None else real_numbers(4, len(whole.bias)),
        whole.geometry,
    )
    kept = conv.to(dtype)
    report = verify([conv], [kept], case.input_size)
    assert report.equivalent
    # Every entry that some input meets by itself, off by two units in its last place, one at a time.
    alone = [
        sorted({tap for row in axis_taps(axis, n) for tap, i in enumerate(row) if i != NOTHING and row.count(i) == 1})
        for axis, n in zip(conv.geometry.axes, case.input_size, strict=True)
    ]
    channels = itertools.product(*(range(n) for n in kept.weight.shape[:2]))
    places = list(itertools.product(channels, itertools.product(*alone)))
    assert not places or 0 < report.ratio <= 1
    for place, tap in places[:: max(1, len(places) // 8)]:
        weight = kept.weight.clone()
        up = torch.full((), math.inf, dtype=dtype)
        weight[(*place, *tap)] = torch.nextafter(torch.nextafter(weight[(*place, *tap)], up), up)
        off = Conv(weight, kept.bias, kept.geometry)
        assert not verify([conv], [off], case.input_size, trials=1).equivalent, (place, tap)


def test_complex_layers_with_their_imaginary_parts() -> None:
    def numbers(seed: int, *shape: int) -> Tensor:
        return torch.complex(real_numbers(seed, *shape), real_numbers(seed + 1, *shape)).to(torch.complex64)

    first = Conv(numbers(1, 3, 2, 2, 3), numbers(3, 3), Geometry.of((2, 3)))
    second = Conv(numbers(5, 4, 3, 2, 1), numbers(7, 4), Geometry.of((2, 1), stride=(1, 2)))
    fused = convtool.fuse([first, second])
    report = verify([first, second], [fused], (5, 6))
    assert report.equivalent
    assert 0.5 < report.ratio <= 1
    conjugate = Conv(fused.weight.conj().resolve_conj(), fused.bias, fused.geometry)
    assert not verify([first, second], [conjugate], (5, 6)).equivalent
    real = Conv(fused.weight.real, fused.bias.real if fused.bias is not None else None, fused.geometry)
    assert not verify([first, second], [real], (5, 6)).equivalent
    assert not verify([real], [Conv(real.weight + 1e-3j, real.bias, real.geometry)], (5, 6)).equivalent


def test_one_imaginary_part_among_many_numbers_is_not_lost() -> None:
    real = Conv(real_numbers(1, 64, 64, 3, 3).float(), None, Geometry.of((3, 3), padding=1))
    weight = torch.complex(real.weight.double(), torch.zeros(64, 64, 3, 3, dtype=torch.float64))
    assert verify([Conv(weight, None, real.geometry)], [real], (4, 5), trials=1).equivalent
    weight[7, 2, 1, 0] += 1e-6j * weight[7, 2, 1, 0].real
    assert verify([Conv(weight, None, real.geometry)], [real], (4, 5), trials=1).numbers.differing == 1


def test_a_larger_kernel_is_looked_at_where_all_of_it_reads() -> None:
    before = Conv(real_numbers(1, 4, 3, 3, 3), None, Geometry.of((3, 3), padding=1))
    weight = torch.zeros(4, 3, 31, 31, dtype=torch.float64)
    weight[:, :, 14:17, 14:17] = before.weight
    after = Conv(weight, None, Geometry.of((31, 31), padding=15))
    size = default_sizes([before], [after])[0]
    assert min(size) >= 31
    assert verify([before], [after], size, trials=1).equivalent
    weight[0, 0, 0, 0] = 5
    assert not verify([before], [after], size, trials=1).equivalent
    identity = Conv(torch.eye(4, dtype=torch.float64)[:, :, None, None], None, Geometry.of((1, 1)))
    report = verify([before], [after, identity], (7, 8), trials=1)
    assert report.taps == (13 * 15 + 1, 31 * 31 + 1)


def test_a_large_bias_hides_no_weight() -> None:
    conv = layer(1, (3, 2, 2, 3), torch.float16)
    biased = Conv(conv.weight * 2.0**-10, torch.full((3,), 60000.0, dtype=torch.float16), conv.geometry)
    weight = biased.weight.clone()
    weight[2, 1, 1, 0] *= 1.01
    assert not verify([biased], [Conv(weight, biased.bias, biased.geometry)], (5, 6)).equivalent


def test_zeros_of_either_sign_and_channels_of_zeros() -> None:
    conv = layer(1, (3, 2, 2, 3), torch.bfloat16)
    weight = conv.weight.clone()
    weight[1] = 0.0
    negative = weight.clone()
    negative[1] = -0.0
    report = verify([Conv(weight, None, conv.geometry)], [Conv(negative, None, conv.geometry)], (5, 6))
    assert report.equivalent
    assert report.ratio == 0
    filled = weight.clone()
    filled[1, 0, 0, 0] = torch.finfo(torch.bfloat16).smallest_normal
    assert not verify([Conv(weight, None, conv.geometry)], [Conv(filled, None, conv.geometry)], (5, 6)).equivalent


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_groups_that_were_mixed_up(groups: int) -> None:
    conv = layer(1, (12, 6 // groups, 2, 3), torch.float32, groups=groups)
    assert verify([conv], [conv], (4, 5)).equivalent
    turned = conv.weight.reshape(groups, 12 // groups, *conv.weight.shape[1:]).roll(1, 0).reshape(conv.weight.shape)
    assert not verify([conv], [Conv(turned, conv.bias, conv.geometry)], (4, 5)).equivalent
    dense = convtool.fuse([layer_of_ones(6), conv], dtype=torch.float32)
    assert verify([conv], [dense], (4, 5)).equivalent


def layer_of_ones(channels: int) -> Conv:
    """A dense 1x1 identity."""
    return convtool.conv(torch.eye(channels).reshape(channels, channels, 1, 1))


def test_a_bias_map_is_compared_place_by_place() -> None:
    conv = layer(1, (3, 2, 2, 3), torch.float32)
    bias_map = whole_numbers(5, 3, 4, 4).float()
    before, after = (Conv(conv.weight, bias_map.clone(), conv.geometry) for _ in range(2))
    assert verify([before], [after], (5, 6)).equivalent
    assert after.bias is not None
    after.bias[2, 3, 0] += 1
    report = verify([before], [after], (5, 6))
    assert report.interior.where == (2, 3, 0)
    assert report.interior.differing == 1


def test_layers_that_no_single_layer_stands_for_are_compared_all_the_same() -> None:
    strided = layer(1, (3, 2, 2, 3), torch.float32, stride=2)
    spread = convtool.conv(rounded(real_numbers(2, 3, 4, 3, 2), torch.float32), stride=2, transposed=True)
    with pytest.raises(RefusedError):
        convtool.fuse([strided, spread])
    assert verify([strided, spread], [strided, spread], (7, 9)).equivalent
    weight = spread.weight.clone()
    weight[0, 2, 1, 1] *= 1.0001
    assert not verify([strided, spread], [strided, Conv(weight, None, spread.geometry)], (7, 9)).equivalent


# --- correct fusions


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_correct_fusions_pass_and_the_bound_is_sharp(dtype: torch.dtype) -> None:
    largest = 0.0
    for fusion in random_fusions(60, (dtype,), seed=7_000_000):
        for report in check(fusion):
            assert report.equivalent, (fusion.seed, report)
            largest = max(largest, report.ratio)
    assert largest > (0.001 if dtype == torch.float64 else 0.9)


def test_the_public_name() -> None:
    assert convtool.EquivalenceReport is EquivalenceReport
    conv = layer(1, (2, 3, 3, 2), torch.float32)
    report = convtool.verify([conv], [conv], (5, 6))
    assert report == verify([conv], [conv], (5, 6))
    assert report.equivalent
