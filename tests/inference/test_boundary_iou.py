from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg import BoundaryIoU, MeanIoU


def distance_in(shape, dilation):
    return max(1, round(dilation * np.sqrt(shape[0] ** 2 + shape[1] ** 2)))


def ring_by_opencv(mask, dilation):
    """``mask_to_boundary`` of the authors' code."""
    cv2 = pytest.importorskip("cv2")
    height, width = mask.shape
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance_in(mask.shape, dilation))
    return (mask - eroded[1 : height + 1, 1 : width + 1]).astype(bool)


def ring_by_scipy(mask, dilation):
    ndimage = pytest.importorskip("scipy.ndimage")
    iterations = distance_in(mask.shape, dilation)
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=iterations, border_value=0)
    return mask.astype(bool) & ~eroded


def ious(pairs, num_classes, dilation, ring):
    """The IoU of the rings of each class, of the pixels of all pairs that are not ignored."""
    both, either = np.zeros(num_classes), np.zeros(num_classes)
    for prediction, target in pairs:
        prediction = np.where(target == 255, 255, prediction)
        for k in range(num_classes):
            found, true = (ring((map == k).astype(np.uint8), dilation) for map in (prediction, target))
            both[k] += (found & true).sum()
            either[k] += (found | true).sum()
    return np.array([b / e if e else math.nan for b, e in zip(both, either, strict=True)])


def some_pairs(seed, count, num_classes=4, *, ignored=True):
    """Blocks of classes, a prediction that is moved and in part wrong, and ignored regions."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        height, width = generator.integers(1, 40, size=2)
        coarse = generator.integers(0, num_classes, (5, 5))
        target = np.kron(coarse, np.ones((8, 8), np.int64))[:height, :width]
        prediction = np.roll(target, generator.integers(-3, 4, size=2), (0, 1))
        prediction = np.where(generator.random(target.shape) < 0.02, 0, prediction)
        if ignored:
            target = np.where(np.kron(generator.random((10, 10)) < 0.1, np.ones((4, 4)))[:height, :width], 255, target)
        yield prediction, target


@pytest.mark.parametrize("ring", [ring_by_opencv, ring_by_scipy])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.005, 0.02, 0.1, 0.7]))
def test_is_that_of_the_authors(ring, seed, count, dilation):
    pairs = list(some_pairs(seed, count))
    metric = BoundaryIoU(4, dilation=dilation)
    for prediction, target in pairs:
        metric.update(torch.from_numpy(prediction), torch.from_numpy(target))
    expected = ious(pairs, 4, dilation, ring)
    np.testing.assert_allclose(metric.iou().numpy(), expected, rtol=0, atol=1e-12)
    if np.isnan(expected).all():
        assert math.isnan(metric.compute())
    else:
        assert metric.compute() == pytest.approx(np.nanmean(expected), abs=1e-12)


def test_of_a_wide_ring_is_the_iou():
    metric, plain = BoundaryIoU(4, dilation=2.0), MeanIoU(4)
    for prediction, target in some_pairs(0, 6):
        for each in (metric, plain):
            each.update(torch.from_numpy(prediction), torch.from_numpy(target))
    torch.testing.assert_close(metric.iou(), plain.iou(), equal_nan=True)


def test_is_lower_than_the_iou_of_a_contour_that_is_off():
    target = torch.zeros(100, 100, dtype=torch.int64)
    target[20:80, 20:80] = 1
    prediction = torch.zeros_like(target)
    prediction[22:78, 22:78] = 1
    metric, plain = BoundaryIoU(2), MeanIoU(2)
    metric.update(prediction, target)
    plain.update(prediction, target)
    assert metric.iou()[1] < 0.35 < 0.85 < plain.iou()[1]


def test_of_a_batch_is_that_of_its_images():
    maps = torch.randint(3, (2, 4, 20, 30), generator=torch.Generator().manual_seed(0))
    whole, single = BoundaryIoU(3), BoundaryIoU(3)
    whole.update(maps[0], maps[1])
    for prediction, target in zip(*maps, strict=True):
        single.update(prediction, target)
    assert torch.equal(whole.matrix, single.matrix)


def test_what_is_predicted_at_ignored_pixels_makes_no_difference():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(2, (6, 6), generator=generator).repeat_interleave(5, 0).repeat_interleave(5, 1)
    target[10:20] = 255
    metric = BoundaryIoU(2)
    metric.update(torch.where(target == 255, torch.randint(2, target.shape, generator=generator), target), target)
    assert metric.compute() == 1
    metric = BoundaryIoU(2)
    metric.update(torch.full_like(target, 255), torch.full_like(target, 255))
    assert math.isnan(metric.compute())


def test_is_nan_until_something_is_added_and_after_a_reset():
    metric = BoundaryIoU(3)
    assert math.isnan(metric.compute())
    metric.update(torch.tensor([[0, 2]], dtype=torch.uint8), torch.tensor([[0, 2]]))
    assert metric.iou().tolist()[::2] == [1, 1]
    assert metric.iou()[1].isnan()
    assert "mIoU=1.000" in repr(metric)
    metric.merge_processes()
    metric.reset()
    assert math.isnan(metric.compute())


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([[0, 3]], [[0, 1]], "prediction holds the value 3"),
        ([[0, 1]], [[0, -1]], "target holds the value -1"),
        ([[0, 1]], [[0], [1]], "expected the same"),
        ([[0.0, 1.0]], [[0, 1]], "expected integer class indices"),
        ([0, 1], [0, 1], r"expected \(H, W\) or \(B, H, W\)"),
        ([[[[0]]]], [[[[1]]]], r"expected \(H, W\) or \(B, H, W\)"),
    ],
)
def test_refuses_wrong_input_and_keeps_its_counts(prediction, target, message):
    metric = BoundaryIoU(3)
    with pytest.raises((ValueError, TypeError), match=message):
        metric.update(torch.tensor(prediction), torch.tensor(target))
    assert not metric.matrix.any()


@pytest.mark.parametrize("dilation", [0, -0.1, math.nan, math.inf])
def test_refuses_a_distance_that_makes_no_sense(dilation):
    with pytest.raises(ValueError, match="dilation is"):
        BoundaryIoU(3, dilation=dilation)
    with pytest.raises(ValueError, match="num_classes is 1"):
        BoundaryIoU(1)
