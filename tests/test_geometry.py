"""Geometry: what is accepted, what it means, and what is said about the rest."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case
from hypothesis import given
from hypothesis import strategies as st
from oracles import axis_taps
from strategies import MODES, axes, geometries, runs, smallest_size

from convtool.core.geometry import LARGEST, PADDING_MODES, Axis, Geometry, format_sizes, per_axis
from convtool.errors import UsageError
from convtool.kinds.stated import geometry_toml

SMALL_AXES = [
    Axis(kernel, stride, before, after, dilation, mode)
    for kernel, stride, dilation, before, after, mode in itertools.product(
        (1, 2, 3), (1, 2, 3), (1, 2), (0, 1, 2), (0, 1, 3), PADDING_MODES
    )
]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_table_has_no_square_input_and_runs(case: Case) -> None:
    sizes = case.geometry.output_size(case.input_size)
    assert all(size >= 1 for size in sizes)
    assert len(case.input_size) < 2 or len(set(case.input_size)) > 1


def test_case_names_are_unique() -> None:
    assert len(set(IDS)) == len(IDS)


# --- output size


def test_output_size_is_the_number_of_windows() -> None:
    checked = 0
    for axis, size in itertools.product(SMALL_AXES, range(1, 8)):
        assert axis.runs_on(size) == runs(axis, size), (axis, size)
        if runs(axis, size):
            assert axis.output_size(size) == len(axis_taps(axis, size)), (axis, size)
            checked += 1
    assert checked > 3000


@given(axis=axes(transposed=True), size=st.integers(1, 8))
def test_output_size_of_a_transposed_axis(axis: Axis, size: int) -> None:
    assert axis.runs_on(size) == runs(axis, size)
    if runs(axis, size):
        assert axis.output_size(size) == len(axis_taps(axis, size))


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    extra=st.integers(0, 2),
    size=st.integers(1, 9),
)
def test_output_size_agrees_with_torch(
    kernel: int, stride: int, padding: int, dilation: int, extra: int, size: int
) -> None:
    plain = Geometry.of(kernel, stride=stride, padding=padding, dilation=dilation)
    x = torch.zeros(1, 1, size)
    if plain.axes[0].runs_on(size):
        module = torch.nn.Conv1d(1, 1, kernel, stride, padding, dilation)
        assert plain.output_size((size,)) == module(x).shape[2:]
    extra = min(extra, max(stride, dilation) - 1)
    other = Geometry.of(
        kernel, stride=stride, padding=padding, dilation=dilation, transposed=True, output_padding=extra
    )
    if other.axes[0].runs_on(size):
        transposed = torch.nn.ConvTranspose1d(1, 1, kernel, stride, padding, extra, dilation=dilation)
        assert other.output_size((size,)) == transposed(x).shape[2:]


@given(mode=MODES, data=st.data())
def test_running_is_monotone_in_the_size(mode: Any, data: st.DataObject) -> None:
    axis = data.draw(axes(mode))
    smallest = smallest_size([axis])
    assert [axis.runs_on(size) for size in range(smallest + 4)] == [False] * smallest + [True] * 4


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, (2, 5), "axis 0 of input size 2,5: an input size of 2 with padding 0+0 is smaller than the kernel, which"),
        ({"dilation": (1, 3)}, (3, 3), "axis 1 of input size 3,3: an input size of 3 with padding 0+0 is smaller"),
        ({"padding": [(0, 3), (0, 0)], "padding_mode": "reflect"}, (3, 5), "reflect padding of 3 needs an input size"),
        ({"padding": [(6, 0), (0, 0)], "padding_mode": "circular"}, (5, 5), "circular padding of 6 needs an input"),
        ({"padding": 5, "transposed": True}, (3, 9), "an input size of 3 leaves no output: padding 10 removes all"),
        ({}, (0, 5), "expected an input size of at least 1, got 0"),
        ({}, (5,), "expected an input size of 2 values, one per spatial axis, got 5"),
        ({}, (1, 5, 5), "expected an input size of 2 values, one per spatial axis, got 1,5,5"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_run(fields: dict[str, Any], size: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Geometry.of((3, 2), **fields).output_size(size)
    assert message in str(raised.value)


# --- the fields on their way in


def test_defaults_are_those_of_torch() -> None:
    module = torch.nn.Conv2d(1, 1, (3, 2))
    geometry = Geometry.of((3, 2))
    assert geometry.stride == module.stride == (1, 1)
    assert geometry.padding == ((0, 0), (0, 0))
    assert geometry.dilation == module.dilation == (1, 1)
    assert geometry.groups == module.groups == 1
    assert geometry.padding_mode == module.padding_mode == "zeros"
    assert not geometry.transposed
    assert geometry.output_padding == module.output_padding == (0, 0)


def test_a_number_stands_for_every_axis() -> None:
    geometry = Geometry.of((3, 2, 5), stride=2, padding=1, dilation=3)
    assert geometry == Geometry.of([3, 2, 5], stride=(2, 2, 2), padding=[1, (1, 1), [1, 1]], dilation=[3, 3, 3])
    assert geometry.padding == ((1, 1), (1, 1), (1, 1))


def test_a_bare_kernel_is_one_axis() -> None:
    assert Geometry.of(3) == Geometry.of((3,))


def test_no_axes() -> None:
    geometry = Geometry.of((), padding="same")
    assert geometry.axes == ()
    assert geometry.output_size(()) == ()
    assert not geometry.padded


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_is_what_torch_calls_same(kernel: int, dilation: int) -> None:
    geometry = Geometry.of((kernel, kernel + 1), padding="same", dilation=(dilation, 1))
    for axis in geometry.axes:
        assert axis.before + axis.after == axis.reach
        assert axis.after - axis.before in (0, 1)
        assert all(axis.output_size(size) == size for size in range(1, 12))
    module = torch.nn.Conv1d(1, 1, kernel, padding="same", dilation=dilation)
    left, right = module._reversed_padding_repeated_twice
    assert geometry.padding[0] == (left, right)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_half_keeps_the_size_of_odd_kernels(kernel: int, dilation: int) -> None:
    axis = Geometry.of(kernel, padding="half", dilation=dilation).axes[0]
    span = dilation * (kernel - 1) + 1
    assert axis.before == axis.after == span // 2
    assert axis.output_size(7) == (7 if span % 2 else 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 0}, "stride: expected integers of at least 1, got 0,0"),
        ({"stride": (1, 2, 3)}, "stride: expected one value or 2 values, one per spatial axis, got 1,2,3"),
        ({"stride": (True, 1)}, "stride: expected integers of at least 1, got True,1"),
        ({"stride": LARGEST + 1}, "stride: expected integers of at least 1"),
        ({"dilation": (1, 0)}, "dilation: expected integers of at least 1, got 1,0"),
        ({"padding": -1}, "padding: expected integers of at least 0, got -1,-1"),
        ({"padding": (1,)}, "padding: expected one value or 2 values, one per spatial axis, got 1"),
        ({"padding": [(1, 2, 3), 0]}, "padding: expected an int or a pair (before, after) per axis, got (1, 2, 3)"),
        ({"padding": [(0, -2), 0]}, "padding: expected integers of at least 0, got 0,-2"),
        ({"padding": "full"}, "padding: expected numbers, 'same', 'valid' or 'half', got 'full'"),
        ({"padding": "same", "stride": (1, 2)}, "padding: 'same' is defined for stride 1 only, got stride 1,2"),
        ({"padding": "same", "transposed": True}, "padding: expected numbers for a transposed convolution, got 'same'"),
        ({"groups": 0}, "groups: expected an integer of at least 1, got 0"),
        ({"groups": True}, "groups: expected an integer of at least 1, got True"),
        ({"groups": 2.0}, "groups: expected an integer of at least 1, got 2.0"),
        ({"padding_mode": "mirror"}, "expected one of zeros, circular, replicate, reflect, symmetric, got 'mirror'"),
        ({"padding_mode": "circular", "transposed": True}, "padding_mode: a transposed convolution knows only 'zeros'"),
        ({"output_padding": 1}, "output_padding: only a transposed convolution has it, got 1"),
        ({"output_padding": (0, 2), "transposed": True, "stride": (3, 2)}, "expected less than stride or dilation"),
        ({"output_padding": -1, "transposed": True}, "output_padding: expected integers of at least 0"),
    ],
)  # fmt: skip
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Geometry.of((3, 2), **fields)
    assert message in str(raised.value)


@pytest.mark.parametrize("field", ["stride", "dilation", "padding", "output_padding"])
@pytest.mark.parametrize("value", [1.5, None, (1.5, 1), (None, 1)])
def test_fields_that_are_no_integers(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{field}: expected "):
        Geometry.of((3, 2), transposed=True, **{field: value})


@pytest.mark.parametrize("kernel", [(0, 3), (3, -1), (3, True), (LARGEST + 1,)])
def test_kernels_out_of_range(kernel: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="kernel size: expected integers of at least 1"):
        Geometry.of(kernel)


def test_per_axis() -> None:
    assert per_axis("stride", 3, 2, least=1) == (3, 3)
    assert per_axis("stride", [3, 4], 2, least=1) == (3, 4)
    with pytest.raises(UsageError, match="factor: expected one value or 1 value, one per spatial axis, got 1,2"):
        per_axis("factor", (1, 2), 1, least=0)


# --- the value


def test_a_geometry_is_frozen_and_hashable() -> None:
    geometry = Geometry.of((3, 2), padding=[(0, 1), (2, 3)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        geometry.groups = 2  # type: ignore[misc]
    assert len({geometry, Geometry.of((3, 2), padding=[(0, 1), (2, 3)])}) == 1


@given(geometry=geometries())
def test_axes_hold_all_of_it(geometry: Geometry) -> None:
    assert geometry.kernel_size == tuple(axis.kernel for axis in geometry.axes)
    assert geometry.padded == any(axis.before or axis.after for axis in geometry.axes)
    for number, axis in enumerate(geometry.axes):
        assert axis == Axis(
            geometry.kernel_size[number],
            geometry.stride[number],
            *geometry.padding[number],
            geometry.dilation[number],
            geometry.padding_mode,
            geometry.transposed,
            geometry.output_padding[number],
        )


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (Geometry.of(()), "kernel 1"),
        (Geometry.of((3, 2)), "kernel 3,2"),
        (Geometry.of((3, 3), stride=2, padding=1), "kernel 3,3, stride 2, padding 1"),
        (Geometry.of((3, 2), stride=(2, 1), padding=(1, 0)), "kernel 3,2, stride 2,1, padding 1,0"),
        (Geometry.of(4, padding="same"), "kernel 4, padding 1:2"),
        (Geometry.of((4, 1), padding="same", padding_mode="reflect"), "kernel 4,1, padding 1:2,0, reflect"),
        # a mode without padding changes nothing, so it isn't mentioned
        (Geometry.of(3, padding_mode="circular", dilation=2, groups=4), "kernel 3, dilation 2, groups 4"),
        (
            Geometry.of((3, 2), stride=2, transposed=True, output_padding=(1, 0)),
            "kernel 3,2, stride 2, transposed, output_padding 1,0",
        ),
    ],
)
def test_describe(geometry: Geometry, text: str) -> None:
    assert geometry.describe() == text


def test_format_sizes() -> None:
    assert format_sizes((3, 32, 40)) == "3,32,40"
    assert format_sizes(()) == ""


# --- written down


@pytest.mark.parametrize("name", ["conv1", "layer.0", 'quo"ted', "back\\slash", "tab\tdel\x7f", "ünï", "a.\U0001f98a"])
def test_a_layer_of_any_name_is_read_back_from_the_geometry_that_is_written(name: str) -> None:
    text = geometry_toml({name: {"stride": [2, 3]}})
    assert tomllib.loads(text) == {name: {"stride": [2, 3]}}
