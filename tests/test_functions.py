"""Layers without tensors as they are written in a chain, against what torch computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import real_numbers, whole_numbers
from torch import Tensor

from convtool.core.compose import compose
from convtool.core.conv import Conv
from convtool.core.expression import Expression, joined, multiply_adds, work_per_position
from convtool.core.forward import forward
from convtool.core.fuse import NamedConv
from convtool.core.geometry import Geometry
from convtool.core.moves import Selection
from convtool.core.names import is_written
from convtool.core.tree import Chain, Sum, Tree, leaves
from convtool.errors import RefusedError, UsageError
from convtool.kinds import KINDS
from convtool.kinds.written import NOT_LINEAR, make_written, read_layer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


def sobel(x: Tensor) -> Tensor:
    kernel = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=x.dtype)
    return F.conv2d(x, kernel.expand(3, 1, 3, 3), padding=1, groups=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("identity()", lambda x: x),
        ("scale(0.25)", lambda x: x / 4),
        ("scale(1/4)", lambda x: x / 4),
        ("scale(factor=-3e0)", lambda x: -3 * x),
        ("avg_pool(2)", lambda x: F.avg_pool2d(x, 2)),
        ("avg_pool(2,3)", lambda x: F.avg_pool2d(x, (2, 3))),
        ("avg_pool(3; stride=1,2; padding=1,0)", lambda x: F.avg_pool2d(x, 3, (1, 2), (1, 0))),
        ("avg_pool(kernel_size=3; stride=2; count_include_pad=false)", lambda x: F.avg_pool2d(x, 3, 2)),
        ("avg_pool(2; divisor_override=3)", lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
        ("avg_pool(1; stride=1; dilation=2)", lambda x: x),
        ("upsample(2)", lambda x: F.interpolate(x, scale_factor=2.0)),
        ("upsample(2,3)", lambda x: F.interpolate(x, scale_factor=(2.0, 3.0))),
        ("pad(1)", lambda x: F.pad(x, (1, 1, 1, 1))),
        ("pad(0:1,2:3)", lambda x: F.pad(x, (2, 3, 0, 1))),
        (
            "normalize(mean=0.485,0.456,0.406; std=0.229,0.224,0.225)",
            lambda x: (x - channel(MEAN)) / channel(STD),
        ),
        ("normalize(mean=0.5; std=0.25; scale=1/255)", lambda x: (x / 255 - 0.5) / 0.25),
        ("normalize(scale=1/255)", lambda x: x / 255),
        ("normalize(0.485,0.456,0.406)", lambda x: x - channel(MEAN)),
        ("pixel_unshuffle(3)", lambda x: F.pixel_unshuffle(x, 3)),
        ("permute(2,0,1)", lambda x: x[:, [2, 0, 1]]),
        ("select(1:3)", lambda x: x[:, 1:3]),
        ("select(1:)", lambda x: x[:, 1:]),
        ("place(1:4; of=6)", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))),
        ("channel_shuffle(3)", lambda x: F.channel_shuffle(x, 3)),
        ("offset(0.5,-1,2)", lambda x: x + channel((0.5, -1, 2))),
        ("offset(-1/2)", lambda x: x - 0.5),
        ("kernel([[1,0,-1],[2,0,-2],[1,0,-1]]; each; padding=1)", lambda x: sobel(x)),
        ("kernel([[[[2]],[[3]],[[-1]]]])", lambda x: (x * channel((2, 3, -1))).sum(1, keepdim=True)),
    ],
)  # fmt: skip
def test_what_they_compute(text: str, expected: object) -> None:
    x = real_numbers(4, 2, 3, 6, 9)
    assert callable(expected)
    assert is_written(text)
    torch.testing.assert_close(forward(make_written(text, 3, 2), x), expected(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", sorted(NOT_LINEAR))
def test_what_is_not_linear_is_refused_by_name(name: str) -> None:
    for text in (f"{name}()", f"{name}(2)", f"{name}(anything at=all)"):
        with pytest.raises(RefusedError, match=rf"{name} is not linear; nothing can be fused across it"):
            make_written(text, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blur(3)", "unknown layer 'blur'; expected one of identity, scale, avg_pool, upsample, pad"),
        ("avg_pool()", "avg_pool takes kernel_size, stride, padding, count_include_pad"),
        ("avg_pool(2; ceil_mode=true)", "count_include_pad, dilation, divisor_override, got 'ceil_mode=true'"),
        ("avg_pool(2; 3)", "expected name=value after the first argument, got '3'"),
        ("avg_pool(two)", "avg_pool(two): kernel_size: expected an integer or one per axis, such as 2 or 2,1,"),
        ("avg_pool(2,2,2)", "kernel_size: expected one value or 2 values, one per spatial axis, got 2,2,2"),
        ("avg_pool(0)", "kernel_size: expected integers of at least 1, got 0"),
        ("identity(3)", "identity takes nothing, got '3'"),
        ("upsample(2; mode=bilinear)", "upsample takes factor, got 'mode=bilinear'"),
        ("scale(half)", "half is the name of a tensor, and here there is no checkpoint"),
        ("scale(1/0)", "factor: expected a finite number, or a tensor's full name, got '1/0'"),
        ("scale(nan)", "factor: expected a finite number, or a tensor's full name, got 'nan'"),
        ("scale(inf)", "factor: expected a finite number, or a tensor's full name, got 'inf'"),
        ("permute(0,1,1)", "expected each of the channels 0 to 2 once, got [0, 1, 1]"),
        ("select(2:4)", "expected channels of the 3 that there are, got 2:4"),
        ("select(2:2)", "channels: expected channels A:B, from A up to B, which is left out, got '2:2'"),
        ("channel_shuffle(2)", "groups: expected a divisor of the 3 channels, got 2"),
        ("pixel_shuffle(2)", "3 numbers don't make channels of that size"),
        ("kernel([[1,2],[3]]; each)", "kernel: expected a tensor's full name, or numbers in a JSON list, got"),
        ("kernel([[1,2],[3,4]])", "expected a weight (C_out, C_in/groups, ...), got (2, 2); or add `; each`"),
        ("offset(1,2)", "expected 1 or 3 numbers, one per channel, got 2"),
        ("pad(-1)", "padding: expected integers of at least 0"),
        ("normalize(mean=1,2)", "mean: expected 1 or 3 numbers, one per channel, got 2"),
        ("normalize(std=0)", "std: expected numbers above 0, got 0.0"),
        ("normalize(mean=a)", "mean: expected finite numbers, such as 0.5,0.4, got 'a'"),
    ],
)  # fmt: skip
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_written(text, 3, 2)
    assert message in str(caught.value)


def test_padding_that_does_not_count_is_refused() -> None:
    with pytest.raises(RefusedError, match="divides by less at the border"):
        make_written("avg_pool(3; padding=1; count_include_pad=false)", 3, 2)


def test_flatten_sizes() -> None:
    assert read_layer("flatten(7,5)").fields == {"size": [7, 5]}
    assert read_layer("flatten(7)").axes() == 1
    for text in ("flatten(a)", "flatten(0,3)"):
        with pytest.raises(UsageError, match="size: expected spatial sizes, such as 7,7"):
            read_layer(text)
    with pytest.raises(UsageError, match="flatten takes size, and needs the first of them"):
        read_layer("flatten()")


def test_a_flatten_is_a_convolution_whose_weight_is_made_only_when_asked_for() -> None:
    x = real_numbers(4, 2, 3, 4, 5)
    conv = make_written("flatten(4,5)", 3, 2)
    assert torch.equal(forward(conv, x), x.reshape(2, 60, 1, 1))
    large = make_written("flatten(56,56)", 64, 2)  # 5 GB, were it made
    assert (large.in_channels, large.out_channels, large.output_size((56, 56))) == (64, 64 * 56 * 56, (1, 1))
    with pytest.raises(UsageError, match="too many numbers"):
        _ = large.weight


def test_what_follows_a_flatten_is_read_through_it() -> None:
    x = real_numbers(4, 2, 3, 4, 5)
    flatten, weight = make_written("flatten(4,5)", 3, 2), real_numbers(1, 7, 60, 1, 1)
    linear = Conv(weight, real_numbers(2, 7), Geometry.of((1, 1)))
    chain: Tree[NamedConv] = Chain((NamedConv("flatten(4,5)", flatten), NamedConv("fc", linear)))
    (one,) = leaves(joined(chain))
    assert one.name == "fc"
    assert one.conv.weight.data_ptr() == weight.data_ptr()  # read another way, not copied
    torch.testing.assert_close(forward(one.conv, x), forward(linear, forward(flatten, x)), rtol=1e-13, atol=1e-13)
    norm = Conv(real_numbers(3, 60, 1, 1, 1), None, Geometry.of((1, 1), groups=60))  # which has no such short way
    apart: Tree[NamedConv] = Chain((NamedConv("flatten(4,5)", flatten), NamedConv("norm", norm)))
    assert [leaf.name for leaf in leaves(joined(apart))] == ["flatten(4,5)", "norm"]
    both = compose(flatten, norm)
    torch.testing.assert_close(forward(both, x), forward(norm, forward(flatten, x)), rtol=1e-13, atol=1e-13)


def test_a_selection_reads_entries_in_any_order_and_as_often_as_it_likes() -> None:
    x, linear = real_numbers(4, 2, 2, 5, 6), Conv(real_numbers(1, 4, 5, 1, 1), None, Geometry.of((1, 1)))
    for picked in ([3, 0, 1, 5, 2], [0, 0, 7, 7, 7]):
        selection = Selection(torch.tensor(picked), 2, Geometry.of((2, 2), stride=(1, 2)))
        expected = forward(linear, forward(selection, x))
        torch.testing.assert_close(forward(compose(selection, linear), x), expected, rtol=1e-13, atol=1e-13)


def test_unflattening() -> None:
    x = real_numbers(4, 2, 6, 1, 1)
    found = forward(make_written("unflatten(3,1)", 6, 2), x)
    assert torch.equal(found, x.reshape(2, 2, 3, 1))
    with pytest.raises(UsageError, match="6 numbers don't make channels of that size"):
        make_written("unflatten(4,1)", 6, 2)


def takes(text: str, gives: int | None) -> int | None:
    layer = read_layer(text)
    return layer.kind.takes({}, layer.fields, gives)


def test_channels_that_arguments_tell() -> None:
    assert takes("normalize(mean=0.1,0.2; std=1)", None) == 2
    assert takes("normalize(mean=0.1; std=1)", None) is None
    assert takes("normalize(mean=0.1,0.2; std=1,2,3)", None) is None
    assert takes("scale(2)", None) is None
    assert takes("scale(2)", 5) == 5
    assert takes("unflatten(2,2)", 3) == 12
    assert takes("flatten(2,2)", 12) == 3
    assert takes("flatten(2,2)", 13) is None


def test_every_written_layer_works_along_one_and_three_axes() -> None:
    argument = {"identity": "", "normalize": "std=2", "select": "0:3", "place": "0:3; of=3", "permute": "2,0,1"}
    argument |= {"channel_shuffle": "3", "channel_unshuffle": "3"}
    other = ("kernel", "pixel_unshuffle", "pixel_shuffle", "focus")  # of other channels: see test_words
    for kind in KINDS:
        if not kind.written or kind.reshapes or kind.name in other:
            continue
        for axes in (1, 3):
            conv = make_written(f"{kind.name}({argument.get(kind.name, '2')})", 3, axes)
            assert (conv.in_channels, conv.out_channels, conv.spatial_axes) == (3, 3, axes)


# --- what layers cost


def layer(kernel: tuple[int, int], inner: int, outer: int, **fields: object) -> Conv:
    geometry = Geometry.of(kernel, **fields)  # type: ignore[arg-type]
    return Conv(whole_numbers(1, outer, inner // geometry.groups, *kernel), None, geometry)


def test_multiply_adds_of_one_input() -> None:
    first = layer((3, 2), 4, 6, stride=2, groups=2)
    assert multiply_adds(first, (9, 8)) == 6 * 2 * 6 * (4 * 4)
    second = layer((1, 3), 6, 5)
    assert multiply_adds(Chain((first, second)), (9, 8)) == 6 * 2 * 6 * 16 + 5 * 6 * 3 * (4 * 2)
    assert multiply_adds(Sum((first, first)), (9, 8)) == 2 * 6 * 2 * 6 * 16
    up = layer((3, 2), 4, 6, stride=2, transposed=True)
    assert multiply_adds(up, (5, 7)) == 6 * 4 * 6 * 35  # each input position meets each tap


def test_copying_costs_nothing() -> None:
    for text in ("identity()", "pad(1)", "upsample(2)"):
        assert multiply_adds(make_written(text, 3, 2), (5, 7)) == 0
        assert work_per_position(make_written(text, 3, 2)) == 0
    assert multiply_adds(make_written("scale(2)", 3, 2), (5, 7)) == 3 * 35
    assert multiply_adds(make_written("avg_pool(2)", 3, 2), (4, 6)) == 3 * 4 * 6


def test_work_per_position_is_that_of_large_inputs() -> None:
    trees: list[Expression] = [
        layer((3, 2), 4, 6, stride=2),
        Chain((layer((3, 2), 4, 6, stride=2), layer((3, 3), 6, 5, stride=(1, 2)), layer((1, 1), 5, 5))),
        Chain(
            (layer((3, 3), 4, 4, stride=2, transposed=True), Sum((layer((3, 3), 4, 6), layer((5, 5), 4, 6, padding=1))))
        ),
    ]
    for tree in trees:
        size = (4000, 6000)
        assert work_per_position(tree) == pytest.approx(multiply_adds(tree, size) / (size[0] * size[1]), rel=1e-2)
