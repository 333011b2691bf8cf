from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stseg.functional.thresholds import STEPS, check_threshold, least_confidence, leaves_out, lower_end, step_of

confidences = st.floats(0, 1, width=32) | st.integers(0, 2**14).map(lambda n: 1 - n * 2**-24)


class TestSteps:
    @given(confidences)
    def test_hold_what_is_at_or_above_their_lower_end_and_below_that_of_the_step_before(self, value):
        step = int(step_of(torch.tensor([value])))
        assert lower_end(step) <= value
        assert step == 0 or value < lower_end(step - 1)

    def test_have_lower_ends_that_float32_holds_exactly_and_that_cut_there(self):
        ends = torch.tensor([lower_end(step) for step in range(STEPS)], dtype=torch.float64)
        single, steps = ends.float(), torch.arange(STEPS)
        assert torch.equal(single.double(), ends)
        assert (step_of(single) <= steps).all()
        below = single.nextafter(torch.zeros(()))
        assert (step_of(below) > steps)[single > 0].all()
        assert (ends.diff() <= 0).all()

    @given(st.lists(confidences, min_size=2, max_size=2))
    def test_are_in_the_order_of_confidence(self, values):
        first, second = step_of(torch.tensor(sorted(values))).tolist()
        assert 0 <= second <= first < STEPS

    @given(confidences)
    def test_are_as_wide_as_a_thousandth_of_the_distance_from_one(self, value):
        distance = 1 - value
        assert value - lower_end(int(step_of(torch.tensor([value])))) <= distance / 1000 + 2**-24

    def test_of_what_is_no_probability_are_those_of_the_nearest(self):
        assert step_of(torch.tensor([1.0000001, 1.0, 0.0, -0.5, math.nan, math.inf])).tolist()[:5] == [
            *(0, 0),
            *(STEPS - 1, STEPS - 1, STEPS - 1),
        ]


class TestLeastConfidence:
    @given(st.lists(confidences, max_size=30), st.floats(0.01, 1))
    def test_keeps_as_many_as_asked_for_and_no_step_more(self, values, keep):
        steps = step_of(torch.tensor(values)).tolist()
        counts = [0] * STEPS
        for step in steps:
            counts[step] += 1
        least = least_confidence(counts, keep)
        kept = [value for value in values if value >= least]
        assert len(kept) >= keep * len(values)
        if least == 0:
            assert kept == values
        else:
            last = max(step_of(torch.tensor(kept)).tolist())
            assert sum(step < last for step in steps) < keep * len(values)


class TestCheckThreshold:
    @given(st.floats(0, 1))
    def test_gives_back_what_came(self, value):
        assert check_threshold(value, 3) == value
        assert check_threshold([value, 0, 1], 3) == check_threshold((value, 0, 1), 3) == (value, 0.0, 1.0)
        assert check_threshold(torch.tensor(value, dtype=torch.float64), 3) == value

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
    def test_names_what_is_no_probability(self, value):
        with pytest.raises(ValueError, match=rf"threshold is {value}; expected a probability"):
            check_threshold(value, 2)
        with pytest.raises(ValueError, match=rf"threshold of class 1 is {value}; expected a probability"):
            check_threshold([0.5, value], 2)

    def test_leaves_out_where_one_is_above_nothing(self):
        assert [leaves_out(t) for t in (0.0, 0.1, (0.0, 0.0), (0.0, 0.1))] == [False, True, False, True]
