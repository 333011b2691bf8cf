"""Ramps, against numbers worked out by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg.functional import linear_rampup, polynomial_decay, sigmoid_rampup


@pytest.mark.parametrize(
    ("share", "value"),
    [(0, 0.006738), (0.1, 0.017422), (0.25, 0.060055), (0.5, 0.286505), (0.75, 0.731616), (0.9, 0.951229), (1, 1)],
)
def test_the_sigmoid_rampup_has_its_known_values(share, value):
    assert sigmoid_rampup(share * 1000, 1000) == pytest.approx(value, abs=5e-7)


def test_the_sigmoid_rampup_weighs_as_cct_does():
    assert [round(30 * sigmoid_rampup(step, 7296), 6) for step in (0, 3648, 7296)] == [0.202138, 8.595144, 30]


@pytest.mark.parametrize(
    ("share", "value"), [(0.1, 0.909533), (0.25, 0.771890), (0.5, 0.535887), (0.75, 0.287175), (0.9, 0.125893)]
)
def test_polynomial_decay_has_its_known_values(share, value):
    assert polynomial_decay(round(share * 1000), 1000, 0.9) == pytest.approx(value, abs=5e-7)


def test_the_linear_rampup_has_its_known_values():
    assert [linear_rampup(epoch, 10, 50) for epoch in (0, 10, 11, 35, 60, 99)] == [0, 0, pytest.approx(0.02), 0.5, 1, 1]


def test_a_ramp_without_length_is_a_jump():
    assert [sigmoid_rampup(step, 0) for step in (-1, 0, 5)] == [1, 1, 1]
    assert [linear_rampup(step, 3, 0) for step in (2, 3, 4)] == [0, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.floats(-100, 1000), st.floats(0, 500), st.floats(0, 500), st.floats(0, 50))
def test_ramps_rise_within_their_bounds(step, start, length, later):
    for ramp in (lambda t: sigmoid_rampup(t, length), lambda t: linear_rampup(t, start, length)):
        assert 0 <= ramp(step) <= ramp(step + later) <= 1
        assert ramp(start + length + step + 1000) == 1


@pytest.mark.parametrize("length", [-1, -0.5, math.nan])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(ValueError, match=r"length is .*; expected 0 or more steps"):
        sigmoid_rampup(0, length)
    with pytest.raises(ValueError, match=r"length is .*; expected 0 or more steps"):
        linear_rampup(0, 0, length)
