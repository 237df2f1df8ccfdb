"""The tap table against windows over a padded line, written down position by position."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracles import NOTHING, axis_taps
from strategies import MODES, axes, runs, smallest_size

from convtool.core.geometry import PADDING_MODES, Axis
from convtool.core.taps import PADDED, compose_tables, tap_table


def check(axis: Axis, size: int) -> None:
    table = tap_table(axis, size)
    assert table.dtype == np.int64
    assert table.shape == (axis.output_size(size), axis.kernel)
    np.testing.assert_array_equal(table, axis_taps(axis, size), err_msg=str((axis, size)))


def test_padded_is_what_the_oracle_calls_nothing() -> None:
    assert PADDED == NOTHING == -1


def test_every_small_axis() -> None:
    checked = 0
    for kernel, stride, dilation, before, after, mode, size in itertools.product(
        (1, 2, 3), (1, 2, 3), (1, 2), (0, 1, 4), (0, 2, 3), PADDING_MODES, (1, 2, 3, 5)
    ):
        axis = Axis(kernel, stride, before, after, dilation, mode)
        if runs(axis, size):
            check(axis, size)
            checked += 1
    assert checked > 1500


def test_every_small_transposed_axis() -> None:
    checked = 0
    for kernel, stride, dilation, before, after, extra, size in itertools.product(
        (1, 2, 3), (1, 2, 3), (1, 2), (0, 1, 4), (0, 2), (0, 1), (1, 2, 3)
    ):
        axis = Axis(kernel, stride, before, after, dilation, "zeros", True, extra)
        if runs(axis, size):
            check(axis, size)
            checked += 1
    assert checked > 400


@given(data=st.data(), mode=MODES, transposed=st.booleans(), more=st.integers(0, 6))
def test_random_axes(data: st.DataObject, mode: str, transposed: bool, more: int) -> None:
    axis = data.draw(axes(transposed=True, most=7) if transposed else axes(mode, most=7))  # type: ignore[arg-type]
    size = smallest_size([axis]) + more
    check(axis, size)
    table = tap_table(axis, size)
    start = data.draw(st.integers(0, len(table)))
    stop = data.draw(st.integers(start, len(table)))
    np.testing.assert_array_equal(tap_table(axis, size, start, stop), table[start:stop])


@given(data=st.data(), modes=st.tuples(MODES, MODES), more=st.integers(0, 4))
def test_tables_compose_by_indexing(data: st.DataObject, modes: tuple[str, str], more: int) -> None:
    first, second = (data.draw(axes(mode, most=3)) for mode in modes)  # type: ignore[arg-type]
    size = smallest_size([first, second]) + more
    tables = tap_table(first, size), tap_table(second, first.output_size(size))
    composed = compose_tables(*tables)
    inner, outer = axis_taps(first, size), axis_taps(second, len(tables[0]))
    assert composed.shape == (len(outer), second.kernel, first.kernel)
    for o, t2, t1 in np.ndindex(*composed.shape):
        through = outer[o][t2]
        assert composed[o, t2, t1] == (NOTHING if through == NOTHING else inner[through][t1])


def test_a_padded_tap_stays_padded() -> None:
    # The second reads one position beyond each end: nothing there, and not what Python's index -1 picks.
    first, second = Axis(2), Axis(3, before=1, after=1)
    composed = compose_tables(tap_table(first, 3), tap_table(second, 2))
    assert composed.tolist() == [[[-1, -1], [0, 1], [1, 2]], [[0, 1], [1, 2], [-1, -1]]]


def test_huge_numbers_do_not_overflow() -> None:
    huge = 2**31 - 1
    table = tap_table(Axis(2, huge, huge, huge, huge), 3)
    assert table.tolist() == [[-1, 0], [0, -1]]
