from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Named, Pooled, pairs

from stseg import MeanIoU, evaluate


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


class TestPerImage:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 5))
    def test_is_the_mean_over_the_classes_in_the_image(self, seed, count, num_classes):
        pairs = list(some_pairs(seed, count, num_classes))
        metric, pooled = MeanIoU(num_classes, per_image=True), MeanIoU(num_classes)
        for index, (prediction, mask) in enumerate(pairs):
            metric.update(prediction, mask, ids=[f"img_{index}"])
            pooled.update(prediction, mask)
        assert torch.equal(metric.matrix, pooled.matrix)
        mious = []
        for (id, found), (prediction, mask) in zip(metric.iou_per_image().items(), pairs, strict=True):
            expected = iou_of_all([(prediction, mask)], num_classes, 255)
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
            mious.append((id, math.nan if np.isnan(expected).all() else float(np.nanmean(expected))))
        assert list(metric.miou_per_image()) == [f"img_{index}" for index in range(count)]
        assert metric.miou_per_image() == pytest.approx(dict(mious), abs=1e-12, nan_ok=True)
        known = [(id, miou) for id, miou in mious if not math.isnan(miou)]
        if known:
            assert metric.mean_over_images() == pytest.approx(np.mean([miou for _, miou in known]), abs=1e-12)
        worst = metric.worst_images(3)
        assert [miou for _, miou in worst] == pytest.approx(sorted(miou for _, miou in known)[:3], abs=1e-12)

    def test_of_a_batch_is_that_of_its_images(self):
        maps = torch.randint(3, (2, 4, 5, 6), generator=torch.Generator().manual_seed(0))
        whole, single = MeanIoU(3, per_image=True), MeanIoU(3, per_image=True)
        whole.update(*maps)
        for prediction, target in zip(*maps, strict=True):
            single.update(prediction, target)
        assert list(whole.miou_per_image()) == ["0", "1", "2", "3"]
        assert whole.miou_per_image() == single.miou_per_image()
        assert torch.equal(whole.matrix, single.matrix)

    def test_images_without_a_pixel_that_counts_are_left_out_of_the_mean(self):
        metric = MeanIoU(2, per_image=True)
        assert math.isnan(metric.mean_over_images())
        assert metric.worst_images() == []
        empty = torch.full((1, 2), 255)
        metric.update(torch.tensor([[0, 1]]), empty, ids=["empty"])
        assert math.isnan(metric.mean_over_images())
        metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), ids=["half"])
        assert math.isnan(metric.miou_per_image()["empty"])
        assert metric.mean_over_images() == 0.25
        assert metric.worst_images() == [("half", 0.25)]
        metric.reset()
        assert metric.miou_per_image() == {}

    def test_differs_from_the_pooled_one(self):
        metric = MeanIoU(2, per_image=True)
        metric.update(torch.tensor([[0]]), torch.tensor([[0]]))
        metric.update(torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 1]]))
        assert metric.compute() == pytest.approx(1 / 3)
        assert metric.mean_over_images() == pytest.approx((1 + 1 / 6) / 2)

    def test_refuses_ids_that_name_no_image_or_two(self):
        maps = torch.zeros(2, 3, 3, dtype=torch.int64)
        metric = MeanIoU(2, per_image=True)
        for ids in (["a"], "ab", [1, 2]):
            with pytest.raises(ValueError, match="for 2 images; expected a list of a string for each"):
                metric.update(maps, maps, ids=ids)
        with pytest.raises(ValueError, match="'a' was added twice"):
            metric.update(maps, maps, ids=["a", "a"])
        metric.update(maps, maps, ids=["a", "b"])
        with pytest.raises(ValueError, match="'b' was added twice"):
            metric.update(maps, maps, ids=["c", "b"])
        with pytest.raises(ValueError, match="some images have ids and others none"):
            metric.update(maps, maps)
        assert list(metric.miou_per_image()) == ["a", "b"]
        assert int(metric.matrix.sum()) == 18
        with pytest.raises(ValueError, match=r"expected \(H, W\) or \(B, H, W\)"):
            metric.update(maps[0, 0], maps[0, 0])
        with pytest.raises(ValueError, match="count is 0"):
            metric.worst_images(0)

    def test_is_there_where_it_was_wanted(self):
        metric, maps = MeanIoU(2), torch.zeros(2, 3, 3, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"expected MeanIoU\(\.\.\., per_image=True\)"):
            metric.update(maps, maps, ids=["a", "b"])
        metric.update(maps, maps)
        for ask in (metric.iou_per_image, metric.miou_per_image, metric.mean_over_images, metric.worst_images):
            with pytest.raises(ValueError, match=r"stseg\.evaluate\(\.\.\., per_image=True\)"):
                ask()

    def test_of_an_evaluation_has_the_ids_of_the_data_set(self):
        data = Named(pairs(5, size=7))
        network = Pooled(2)
        metric = evaluate(network, data, num_classes=2, per_image=True, batch_size=2, progress=False)
        assert list(metric.miou_per_image()) == data.ids
        for id, item in zip(data.ids, data, strict=True):
            alone = evaluate(network, [item], num_classes=2, progress=False)
            assert metric.miou_per_image()[id] == pytest.approx(alone.compute(), abs=1e-12)
        with pytest.raises(ValueError, match="no single images"):
            evaluate(network, data, num_classes=2, progress=False).miou_per_image()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_dice_and_accuracy_are_those_counted_by_hand(seed, num_classes):
    metric = MeanIoU(num_classes)
    cells = list(some_pairs(seed, 3, num_classes))
    for prediction, mask in cells:
        metric.update(prediction, mask)
    predicted, true = (np.concatenate([np.ravel(pair[i]) for pair in cells]) for i in (0, 1))
    predicted, true = predicted[true != 255], true[true != 255]
    for k, found in enumerate(metric.dice().tolist()):
        total = (predicted == k).sum() + (true == k).sum()
        expected = 2 * ((predicted == k) & (true == k)).sum() / total if total else math.nan
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    expected = (predicted == true).mean() if len(true) else math.nan
    assert metric.accuracy() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert metric.dice().dtype == torch.float64


def test_dice_and_accuracy_are_nan_of_nothing():
    metric = MeanIoU(3)
    assert math.isnan(metric.accuracy())
    assert metric.dice().isnan().all()
