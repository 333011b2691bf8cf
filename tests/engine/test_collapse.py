"""Early signs of a collapse: synthetic histories with and without one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stseg.engine.collapse import nothing_kept, signs_in, slow_validation, vanished_classes
from stseg.inference.class_counts import ClassCounts


def history(steps=1000, **columns):
    """Rows at equal distances, of columns of equal length; None leaves a value out."""
    (length,) = {len(column) for column in columns.values()}
    return [
        {
            "step": steps * (row + 1) / length,
            "loss": 1.0,
            **{name.replace("_", "/"): column[row] for name, column in columns.items() if column[row] is not None},
        }
        for row in range(length)
    ]


def first_signs(rows, steps=1000):
    """Number of the row, from 1, at which each sign is first seen."""
    found: dict[str, int] = {}
    for count in range(1, len(rows) + 1):
        for kind in signs_in(rows[:count], steps):
            found.setdefault(kind, count)
    return found


class TestFalling:
    @pytest.mark.parametrize(
        ("mious", "at"),
        [
            ([0.3, 0.5, 0.44, 0.43], 4),
            ([0.5, 0.1, 0.2], 3),
            ([0.5, 0.6, 0.4, 0.58, 0.5, 0.5], 6),
            ([0.6, math.nan, 0.5, 0.5], 4),
            ([0.6, None, 0.5, None, 0.5], 5),
        ],
    )
    def test_twice_in_a_row_by_more_than_five_points(self, mious, at):
        assert first_signs(history(miou=mious)) == {"falling": at}

    @pytest.mark.parametrize(
        "mious",
        [
            [],
            [0.5],
            [0.5, 0.1],
            [0.3, 0.5, 0.46, 0.46, 0.47],
            [0.3, 0.5, 0.44, 0.5, 0.44, 0.5],
            [0.1, 0.2, 0.3, 0.4],
            [math.nan] * 5,
            [None] * 5,
            [0.0] * 5,
        ],
    )
    def test_not_otherwise(self, mious):
        assert first_signs(history(miou=mious) if mious else []) == {}

    def test_says_what_was_seen_and_what_to_try(self):
        text = signs_in(history(miou=[0.3, 0.512, 0.44, 0.43]), 1000)["falling"]
        assert "was 51.2 % at step 500 and is 43.0 % at step 1000" in text
        assert "Try a lower lr" in text

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
    def test_is_what_a_loop_finds(self, mious):
        expected = len(mious) > 2 and all(max(mious[:-2]) - last > 0.05 for last in mious[-2:])
        margin = len(mious) > 2 and any(abs(max(mious[:-2]) - last - 0.05) < 1e-9 for last in mious[-2:])
        assert margin or ("falling" in signs_in(history(miou=mious), 1000)) == expected


class TestOneClass:
    def test_after_a_fifth_of_the_training_twice_in_a_row(self):
        rows = history(iou_0=[0.7] * 20, iou_1=[0.0] * 20, iou_2=[0.004] * 20, iou_3=[math.nan] * 20)
        assert first_signs(rows) == {"one class": 4}
        text = signs_in(rows, 1000)["one class"]
        assert "finds class 0 alone at step 1000" in text
        assert "Try another lr" in text

    @pytest.mark.parametrize(
        "columns",
        [
            {"iou_0": [0.7] * 5, "iou_1": [0.02] * 5},
            {"iou_0": [0.7, 0.7, 0.7, 0.7, 0.7], "iou_1": [0.0, 0.1, 0.0, 0.1, 0.0]},
            {"iou_0": [0.7, 0.0, 0.7, 0.0, 0.7], "iou_1": [0.0, 0.7, 0.0, 0.7, 0.0]},
            {"iou_0": [0.7] * 5, "iou_1": [math.nan] * 5},  # there is a single class
            {"iou_0": [0.0] * 5, "iou_1": [0.0] * 5},
            {"iou_0": [math.nan] * 5, "iou_1": [math.nan] * 5},
            {"miou": [0.1] * 5},
        ],
    )
    def test_not_otherwise(self, columns):
        assert first_signs(history(**columns)) == {}

    def test_not_at_the_beginning(self):
        rows = history(iou_0=[0.7] * 20, iou_1=[0.0] * 3 + [0.2] * 17)
        assert first_signs(rows) == {}


class TestUnsure:
    def test_for_a_third_of_the_training(self):
        assert first_signs(history(sure=[0.0] * 20)) == {"unsure": 7}
        assert first_signs(history(sure=[0.5] * 4 + [0.002] * 16)) == {"unsure": 11}
        assert "threshold" in signs_in(history(sure=[0.0] * 20), 1000)["unsure"]

    @pytest.mark.parametrize(
        "sure",
        [
            [0.0] * 6 + [0.02] * 14,
            [0.0, 0.0, 0.02] * 6,
            [1.0] * 20,  # as with the threshold 0
            [0.0, 0.0],  # too few rows to tell
            [None] * 20,
            [math.nan] * 20,
        ],
    )
    def test_not_otherwise(self, sure):
        assert first_signs(history(sure=sure)) == {}


def counts(*masks, classes=4):
    result = ClassCounts(classes)
    for mask in masks:
        result.add(torch.as_tensor(mask))
    return result


class TestVanishedClasses:
    labeled = counts(*[[[0, 0, 1, 1, 2, 255]]] * 4)

    def test_are_named_with_their_shares(self):
        text = vanished_classes(self.labeled, counts(*[[[0, 0, 0, 0, 1, 1]]] * 6))
        assert text.startswith(
            "the pseudo-masks hold class 2 in 0.000 % of their pixels, the labeled masks in 20.000 %"
        )
        assert "Try" in text

    @pytest.mark.parametrize(("share", "gone"), [(0.0018, True), (0.0021, False)])
    def test_are_those_below_a_hundredth_of_their_share(self, share, gone):
        mask = np.zeros(10000, dtype=np.uint8)
        mask[: round(share * 10000)] = 2
        mask[5000:] = 1
        assert (vanished_classes(self.labeled, counts(*[mask[None]] * 6)) is not None) == gone

    def test_are_not_those_that_few_masks_would_hold(self):
        without = [[0, 0, 1, 1]]
        rare = counts([[0, 1, 2]], *[[[0, 1, 1]]] * 9)
        assert vanished_classes(rare, counts(*[without] * 49)) is None  # 4.9 expected
        assert vanished_classes(rare, counts(*[without] * 50)) is not None

    @pytest.mark.parametrize("masks", [[], [[[255, 255]]], [[[0, 1, 2]]] * 9, [[[3, 0, 1, 2]]] * 9])
    def test_not_otherwise(self, masks):
        assert vanished_classes(self.labeled, counts(*masks)) is None
        assert vanished_classes(counts(*masks), counts()) is None

    def test_of_many_are_cut_short(self):
        labeled = counts(*[[list(range(30))]] * 9, classes=30)
        text = vanished_classes(labeled, counts(*[[[0, 0]]] * 9, classes=30))
        assert "(and 21 more)" in text


def test_masks_that_keep_nothing():
    assert nothing_kept(counts([[0] + [255] * 199])).startswith(
        "the pseudo-masks keep 0.50 % of the pixels; all others"
    )
    assert nothing_kept(counts([[0, 0] + [255] * 198])) is None
    assert nothing_kept(counts()) is None


class TestSlowValidation:
    def test_names_how_often_to_evaluate(self):
        text = slow_validation(60, 120, 6, every=1, length=80)
        assert text == (
            "validation takes 50 % of the time (10.0 s each); TrainConfig(eval_every=4), now 1, would make it 20 %"
        )
        assert "eval_every=3), now 1, would make it 25 %" in slow_validation(60, 120, 6, every=1, length=3)

    @pytest.mark.parametrize(
        ("validation", "seconds", "evaluations"), [(60, 120, 2), (9, 18, 9), (60, 180, 9), (0, 0, 9), (0, 100, 20)]
    )
    def test_not_otherwise(self, validation, seconds, evaluations):
        assert slow_validation(validation, seconds, evaluations, every=1, length=80) is None

    def test_of_all_the_time(self):
        assert "100 % of the time" in slow_validation(50, 50, 9, every=1, length=80)
