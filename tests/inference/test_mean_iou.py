from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg import MeanIoU


def iou_of_all(pairs, num_classes, ignore_index):
    """IoU of each class out of one count over all pairs of class maps."""
    both, predicted, true = (np.zeros(num_classes) for _ in range(3))
    for prediction, target in pairs:
        for p, t in zip(np.ravel(prediction), np.ravel(target), strict=True):
            if t != ignore_index:
                both[t] += p == t
                predicted[p] += 1
                true[t] += 1
    union = predicted + true - both
    return np.array([b / u if u else math.nan for b, u in zip(both, union, strict=True)])


def some_pairs(seed, count, num_classes):
    """Predictions and masks of different sizes, with ignored pixels."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        shape = tuple(generator.integers(1, 6, size=2))
        mask = generator.integers(0, num_classes, shape).astype(np.uint8)
        prediction = np.where(generator.random(shape) < 0.4, mask, generator.integers(0, num_classes, shape))
        mask[generator.random(shape) < 0.2] = 255
        yield torch.from_numpy(prediction), torch.from_numpy(mask)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 6))
def test_equals_one_count_over_everything_in_any_order(seed, count, num_classes):
    pairs = list(some_pairs(seed, count, num_classes))
    metric, backwards = MeanIoU(num_classes), MeanIoU(num_classes)
    for prediction, mask in pairs:
        metric.update(prediction, mask)
    for prediction, mask in reversed(pairs):
        backwards.update(prediction, mask)
    expected = iou_of_all(pairs, num_classes, 255)
    np.testing.assert_allclose(metric.iou().numpy(), expected, rtol=0, atol=1e-12)
    if not np.isnan(expected).all():
        assert metric.compute() == pytest.approx(float(np.nanmean(expected)), abs=1e-12)
    assert torch.equal(metric.matrix, backwards.matrix)


def test_is_no_mean_over_images():
    metric = MeanIoU(2)
    metric.update(torch.tensor([[0]]), torch.tensor([[0]]))  # an image of mIoU 1
    metric.update(torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 1]]))  # and one of 1/6
    assert metric.iou().tolist() == [1 / 3, 1 / 3]
    assert metric.compute() == pytest.approx(1 / 3, abs=1e-15)


def test_is_nan_until_something_is_added_and_after_a_reset():
    metric = MeanIoU(3)
    assert math.isnan(metric.compute())
    metric.update(torch.tensor([[0, 2]]), torch.tensor([[0, 2]]))
    assert metric.compute() == 1.0
    assert metric.iou().isnan().tolist() == [False, True, False]
    metric.reset()
    assert math.isnan(metric.compute())
    metric.update(torch.tensor([[0, 2]]), torch.tensor([[2, 0]]))
    assert metric.compute() == 0.0


def test_ignores_what_the_mask_says_and_not_what_is_predicted_there():
    metric = MeanIoU(2, ignore_index=-1)
    metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, -1]]))
    assert metric.compute() == 1.0
    assert int(metric.matrix.sum()) == 2


@pytest.mark.parametrize(
    ("prediction", "mask"),
    [
        ([[0, 3]], [[0, 1]]),
        ([[0, 255]], [[0, 1]]),
        ([[0, 1]], [[0, 34]]),
        ([[0, 1]], [[0, -1]]),
        ([[0, 1]], [[0], [1]]),
        ([[0.0, 1.0]], [[0, 1]]),
    ],
)
def test_refuses_wrong_input_and_keeps_its_counts(prediction, mask):
    metric = MeanIoU(3)
    metric.update(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]))
    before = metric.matrix.clone()
    with pytest.raises((ValueError, TypeError), match="expected"):
        metric.update(torch.tensor(prediction), torch.tensor(mask))
    assert torch.equal(metric.matrix, before)


@pytest.mark.parametrize(("num_classes", "ignore_index"), [(1, 255), (0, 255), (3, 2), (300, 255)])
def test_refuses_classes_that_make_no_sense(num_classes, ignore_index):
    with pytest.raises(ValueError, match=r"num_classes is|ignore_index"):
        MeanIoU(num_classes, ignore_index)


def test_keeps_its_counts_alone_in_a_single_process():
    metric = MeanIoU(2)
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    metric.merge_processes()
    assert metric.matrix.tolist() == [[1, 1], [0, 0]]
