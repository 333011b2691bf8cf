from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stseg.functional import confusion_matrix, iou, mean_iou, pseudo_label, stability

# --- references, written from the formulas


def counted(prediction, target, num_classes, ignore_index=None):
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for p, t in zip(np.ravel(prediction), np.ravel(target), strict=True):
        if t != ignore_index:
            matrix[t, p] += 1
    return matrix


def mean_iou_by_sets(one, other, num_classes):
    """Mean IoU of two class maps; classes in neither are left out."""
    one, other = np.ravel(one), np.ravel(other)
    ratios = []
    for c in range(num_classes):
        here, there = {i for i, v in enumerate(one) if v == c}, {i for i, v in enumerate(other) if v == c}
        if here | there:
            ratios.append(len(here & there) / len(here | there))
    return sum(ratios) / len(ratios) if ratios else math.nan


def stability_by_loops(masks, reference, num_classes):
    scores = []
    for b in range(len(reference)):
        values = [mean_iou_by_sets(earlier[b], reference[b], num_classes) for earlier in masks]
        scores.append(sum(values) / len(values))
    return np.array(scores)


def labels_by_loops(logits, threshold, ignore_index):
    batch, classes, height, width = logits.shape
    mask = np.zeros((batch, height, width), dtype=np.int64)
    confidence = np.zeros((batch, height, width))
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                values = [float(logits[b, k, y, x]) for k in range(classes)]
                exponentials = [math.exp(v - max(values)) for v in values]
                best = values.index(max(values))
                confidence[b, y, x] = exponentials[best] / sum(exponentials)
                mask[b, y, x] = best if confidence[b, y, x] >= threshold else ignore_index
    return mask, confidence


@st.composite
def predictions(draw):
    """Class maps of some checkpoints, ``(K, B, H, W)``, not all classes in all of them."""
    num_classes = draw(st.integers(2, 6))
    shape = [draw(st.integers(1, most)) for most in (4, 3, 5, 5)]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = generator.choice(num_classes, size=draw(st.integers(1, num_classes)), replace=False)
    return num_classes, torch.from_numpy(generator.choice(used, size=shape))


def few(test):
    return settings(max_examples=30, deadline=None)(test)


class TestConfusionMatrix:
    @few
    @given(predictions(), st.booleans())
    def test_counts_pixels(self, drawn, ignoring):
        num_classes, maps = drawn
        prediction, target = maps[0], maps[-1].flip(-1).clone()
        ignored = 255 if ignoring else None
        if ignoring:
            target[target == int(target.flatten()[0])] = 255
        found = confusion_matrix(prediction, target, num_classes, ignore_index=ignored)
        assert found.dtype == torch.int64
        assert np.array_equal(found.numpy(), counted(prediction, target, num_classes, ignored))

    def test_has_the_truth_in_its_rows(self):
        found = confusion_matrix(torch.tensor([2, 2, 0]), torch.tensor([1, 1, 1]), 3)
        assert found.tolist() == [[0, 0, 0], [1, 0, 2], [0, 0, 0]]

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
    def test_takes_all_integers(self, dtype):
        prediction = torch.tensor([0, 19, 20], dtype=dtype)  # 20 * 21 + 19 does not fit into 8 bits
        target = torch.tensor([20, 20, 255], dtype=dtype)
        found = confusion_matrix(prediction, target, 21, ignore_index=255)
        assert found.sum() == 2
        assert found[20, 0] == found[20, 19] == 1

    def test_does_not_look_at_the_prediction_where_the_target_is_ignored(self):
        found = confusion_matrix(torch.tensor([255, 1]), torch.tensor([255, 1]), 2, ignore_index=255)
        assert found.tolist() == [[0, 0], [0, 1]]

    def test_of_no_pixels_is_empty(self):
        nothing = torch.zeros(0, dtype=torch.long)
        assert confusion_matrix(nothing, nothing, 2).tolist() == [[0, 0], [0, 0]]

    @pytest.mark.parametrize("value", [-1, 3, 255])
    def test_refuses_what_is_no_class(self, value):
        fine, wrong = torch.tensor([[0, 1]]), torch.tensor([[0, value]])
        with pytest.raises(ValueError, match=rf"prediction holds the value {value}; expected 0\.\.2"):
            confusion_matrix(wrong, fine, 3)
        with pytest.raises(ValueError, match=rf"target holds the value {value}; expected 0\.\.2"):
            confusion_matrix(fine, wrong, 3)

    def test_refuses_other_shapes_of_as_many_pixels(self):
        with pytest.raises(ValueError, match=r"\(2, 3\) and target \(3, 2\)"):
            confusion_matrix(torch.zeros(2, 3).long(), torch.zeros(3, 2).long(), 2)

    @pytest.mark.parametrize("metric", [confusion_matrix, mean_iou])
    def test_refuses_floats(self, metric):
        fine = torch.zeros(2, 3, dtype=torch.long)
        with pytest.raises(TypeError, match=r"prediction is torch\.float32; expected integer"):
            metric(fine + 0.5, fine, 2)
        with pytest.raises(TypeError, match=r"target is torch\.float32; expected integer"):
            metric(fine, fine.float(), 2)


class TestMeanIoU:
    @few
    @given(predictions())
    def test_equals_that_of_sets_of_pixels(self, drawn):
        num_classes, maps = drawn
        found = mean_iou(maps[0], maps[-1].flip(-1), num_classes)
        assert found.dtype == torch.float64
        assert abs(float(found) - mean_iou_by_sets(maps[0], maps[-1].flip(-1), num_classes)) <= 1e-12

    def test_leaves_absent_classes_out(self):
        one, other = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0])
        assert float(mean_iou(one, other, 50)) == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-15)

    def test_counts_a_class_that_only_one_of_the_two_has(self):
        assert float(mean_iou(torch.tensor([0, 0]), torch.tensor([0, 1]), 3)) == 0.25

    def test_of_nothing_but_ignored_pixels_is_nan(self):
        ignored = torch.full((2, 2), 255)
        assert math.isnan(mean_iou(ignored, ignored, 3, ignore_index=255))

    def test_iou_of_many_matrices_at_once_is_that_of_each(self):
        matrices = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (2, 3, 4, 4)))
        matrices[0, 0, 1] = matrices[0, 0, :, 1] = 0
        found = iou(matrices)
        for i in range(2):
            for j in range(3):
                for c in range(4):
                    m = matrices[i, j].numpy()
                    union = m[c].sum() + m[:, c].sum() - m[c, c]
                    expected = m[c, c] / union if union else math.nan
                    assert float(found[i, j, c]) == pytest.approx(expected, abs=1e-15, nan_ok=True)
        assert found[0, 0].isnan().tolist() == [False, True, False, False]


class TestStability:
    @few
    @given(predictions())
    def test_equals_the_formula(self, drawn):
        num_classes, maps = drawn
        reference = maps[-1].flip(-1)
        found = stability(maps, reference, num_classes)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), stability_by_loops(maps, reference, num_classes), rtol=0, atol=1e-12)

    def test_of_an_image_by_hand(self):
        reference = torch.tensor([[[0, 0, 1, 1]]])
        masks = torch.tensor([[[[0, 1, 1, 1]]], [[[2, 2, 2, 2]]]])
        # 0: 1/2, 1: 2/3; then three classes without a pixel in common
        assert float(stability(masks, reference, 3)) == pytest.approx((7 / 12 + 0) / 2, abs=1e-15)

    @few
    @given(predictions())
    def test_is_1_where_all_agree_and_never_outside_0_to_1(self, drawn):
        num_classes, maps = drawn
        same = maps[:1].expand(4, -1, -1, -1)
        assert stability(same, maps[0], num_classes).tolist() == [1.0] * maps.shape[1]
        scores = stability(maps, maps[0].flip(-2), num_classes)
        assert bool(((scores >= 0) & (scores <= 1)).all())

    def test_is_0_without_a_pixel_in_common(self):
        reference = torch.zeros(1, 4, 4, dtype=torch.long)
        assert stability(1 + reference[None], reference, 3).tolist() == [0.0]

    @few
    @given(predictions(), st.randoms(use_true_random=False))
    def test_follows_the_images_of_a_batch(self, drawn, random):
        num_classes, maps = drawn
        reference = maps[0].flip(-1)
        order = random.sample(range(maps.shape[1]), maps.shape[1])
        whole = stability(maps, reference, num_classes)
        assert torch.equal(stability(maps[:, order], reference[order], num_classes), whole[order])
        alone = torch.cat([stability(maps[:, i : i + 1], reference[i : i + 1], num_classes) for i in order])
        assert torch.equal(alone, whole[order])

    @few
    @given(predictions(), st.randoms(use_true_random=False))
    def test_does_not_change_with_the_names_of_classes(self, drawn, random):
        num_classes, maps = drawn
        reference = maps[0].flip(-1)
        names = torch.tensor(random.sample(range(num_classes), num_classes))
        torch.testing.assert_close(
            stability(names[maps], names[reference], num_classes),
            stability(maps, reference, num_classes),
            rtol=0,
            atol=1e-12,
        )

    @few
    @example((6, torch.tensor([[[[0, 0, 5], [0, 5, 3], [0, 1, 5]]]])), 2)
    @given(predictions(), st.integers(1, 300))
    def test_does_not_change_with_classes_that_never_occur(self, drawn, more):
        num_classes, maps = drawn
        reference = maps[0].flip(-1)
        few_classes = stability(maps, reference, num_classes)
        # Not to the last bit: sums over another number of classes are added in another order.
        more_classes = stability(maps, reference, num_classes + more)
        torch.testing.assert_close(more_classes, few_classes, rtol=0, atol=1e-12)

    def test_does_not_change_with_the_order_of_the_earlier_masks_but_with_the_reference(self):
        a, b, c = torch.tensor([[[0, 0, 1]], [[0, 1, 1]], [[2, 2, 2]]])[:, None]
        assert torch.equal(stability(torch.stack([a, b]), c, 3), stability(torch.stack([b, a]), c, 3))
        assert stability(torch.stack([a, b]), c, 3) != stability(torch.stack([c, b]), a, 3)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
    def test_takes_all_integers(self, dtype):
        maps = torch.tensor([[[[0, 200, 7]]], [[[0, 0, 7]]]])
        expected = stability(maps, maps[1], 255)
        assert torch.equal(stability(maps.to(dtype), maps[1].to(dtype), 255), expected)

    def test_of_an_empty_batch_is_empty(self):
        assert stability(torch.zeros(2, 0, 4, 4).long(), torch.zeros(0, 4, 4).long(), 3).shape == (0,)

    @pytest.mark.parametrize(
        ("masks", "reference"),
        [((2, 1, 4, 4), (1, 4, 5)), ((1, 4, 4), (1, 4, 4)), ((2, 3, 4, 4), (1, 4, 4)), ((2, 1, 4, 4), (2, 1, 4, 4))],
    )
    def test_refuses_shapes_that_do_not_match(self, masks, reference):
        with pytest.raises(ValueError, match=r"expected \(K, B, H, W\) and \(B, H, W\)"):
            stability(torch.zeros(masks).long(), torch.zeros(reference).long(), 3)

    def test_refuses_no_checkpoints_and_no_pixels(self):
        with pytest.raises(ValueError, match="no checkpoint"):
            stability(torch.zeros(0, 1, 4, 4).long(), torch.zeros(1, 4, 4).long(), 3)
        with pytest.raises(ValueError, match="without pixels"):
            stability(torch.zeros(1, 1, 0, 4).long(), torch.zeros(1, 0, 4).long(), 3)

    @pytest.mark.parametrize("value", [-1, 3, 255])
    def test_refuses_what_is_no_class(self, value):
        fine = torch.zeros(1, 1, 2, 2, dtype=torch.long)
        wrong = torch.tensor([[[[0, 1], [value, 2]]]])
        with pytest.raises(ValueError, match=f"masks holds the value {value};"):
            stability(wrong, fine[0], 3)
        with pytest.raises(ValueError, match=f"reference holds the value {value};"):
            stability(fine, wrong[0], 3)

    def test_refuses_floats(self):
        fine = torch.zeros(1, 1, 2, 2, dtype=torch.long)
        with pytest.raises(TypeError, match=r"masks is torch\.float32; expected integer"):
            stability(fine.float(), fine[0], 3)
        with pytest.raises(TypeError, match=r"reference is torch\.float32; expected integer"):
            stability(fine, fine[0].float(), 3)


class TestPseudoLabel:
    @few
    @example(3, (1, 2, 2, 4), 1.0)
    @given(
        st.integers(0, 2**32 - 1),
        st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(1, 4)),
        st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    )
    def test_equals_the_formula(self, seed, shape, threshold):
        logits = torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3)
        found = pseudo_label(logits, threshold=threshold, ignore_index=200)
        mask, confidence = labels_by_loops(logits, threshold, 200)
        assert found.mask.dtype == torch.uint8
        assert found.confidence.dtype == torch.float32
        assert torch.equal(found.mask == 200, found.confidence < threshold)
        clear = np.abs(confidence - threshold) > 1e-6  # the others may round to the other side
        assert np.array_equal(found.mask.numpy()[clear], mask[clear])
        np.testing.assert_allclose(found.confidence.numpy(), confidence, rtol=1e-5, atol=0)

    @few
    @given(
        st.integers(0, 2**32 - 1),
        st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(1, 4)),
        st.sampled_from([list, tuple, np.array, torch.tensor]),
    )
    def test_with_a_threshold_for_each_class_equals_the_formula(self, seed, shape, made):
        generator = np.random.default_rng(seed)
        logits = torch.from_numpy(generator.normal(size=shape).astype(np.float32) * 3)
        thresholds = generator.choice([0.0, 0.3, 0.6, 0.9, 1.0], shape[1])
        expected = [labels_by_loops(logits, threshold, 200)[0] for threshold in thresholds]
        best, confidence = labels_by_loops(logits, 0.0, 200)
        mask = np.zeros_like(best)
        for place in np.ndindex(*best.shape):
            mask[place] = expected[best[place]][place]
        found = pseudo_label(logits, threshold=made([float(value) for value in thresholds]), ignore_index=200)
        assert found.mask.dtype == torch.uint8
        assert np.array_equal(found.mask.numpy(), mask)
        np.testing.assert_allclose(found.confidence.numpy(), confidence, rtol=1e-5, atol=0)

    @few
    @given(st.integers(0, 2**32 - 1), st.floats(0, 1))
    def test_with_equal_thresholds_is_as_with_one(self, seed, threshold):
        logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 4, 3, 5)))
        for value in (threshold, float(pseudo_label(logits).confidence[1, 2, 0])):  # the latter meets a pixel exactly
            one = pseudo_label(logits, threshold=value)
            assert torch.equal(pseudo_label(logits, threshold=[value] * 4).mask, one.mask)

    @few
    @given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1))
    def test_with_a_higher_threshold_of_a_class_leaves_out_more_of_that_class_alone(self, seed, of_class, one, other):
        logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 4, 3, 5)))
        thresholds = [0.4] * 4
        masks = []
        for value in (min(one, other), max(one, other)):
            thresholds[of_class] = value
            masks.append(pseudo_label(logits, threshold=thresholds).mask)
        low, high = masks
        changed = low != high
        assert (low[changed] == of_class).all()
        assert (high[changed] == 255).all()

    @few
    @given(st.integers(0, 2**32 - 1), st.floats(-50, 50))
    def test_does_not_change_when_all_logits_grow_alike(self, seed, offset):
        logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 4, 3, 3)))
        found, shifted = pseudo_label(logits), pseudo_label(logits + offset)
        assert torch.equal(found.mask, shifted.mask)
        torch.testing.assert_close(found.confidence, shifted.confidence, rtol=1e-4, atol=0)

    def test_tells_logits_apart_that_give_equal_probabilities(self):
        logits = torch.tensor([0.0, 1e-9, 0.0]).reshape(1, 3, 1, 1)
        assert logits.softmax(1).unique().numel() == 1
        assert int(pseudo_label(logits).mask) == 1

    def test_keeps_pixels_exactly_at_the_threshold(self):
        found = pseudo_label(torch.zeros(1, 4, 1, 1), threshold=0.25)
        assert float(found.confidence) == 0.25
        assert int(found.mask) == 0

    def test_gives_the_confidence_of_left_out_pixels_too(self):
        found = pseudo_label(torch.zeros(1, 4, 1, 1), threshold=0.5)
        assert (int(found.mask), float(found.confidence)) == (255, 0.25)

    @pytest.mark.parametrize(
        ("num_classes", "ignore_index", "dtype"),
        [(255, 255, torch.uint8), (256, 256, torch.int32), (257, 65535, torch.int32), (3, -1, torch.int32)],
    )
    def test_has_room_for_all_classes_and_the_ignore_index(self, num_classes, ignore_index, dtype):
        logits = torch.zeros(1, num_classes, 1, 2)
        logits[0, -1, 0, 0] = 50.0
        mask = pseudo_label(logits, threshold=0.9, ignore_index=ignore_index).mask
        assert mask.dtype == dtype
        assert mask.tolist() == [[[num_classes - 1, ignore_index]]]

    def test_of_half_precision_has_the_confidence_of_single(self):
        logits = torch.tensor([0.0, 3.0]).reshape(1, 2, 1, 1)
        assert float(pseudo_label(logits.bfloat16()).confidence) == float(pseudo_label(logits).confidence)

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
    def test_refuses_thresholds_that_are_no_probability(self, threshold):
        with pytest.raises(ValueError, match="threshold is"):
            pseudo_label(torch.zeros(1, 3, 2, 2), threshold=threshold)

    @pytest.mark.parametrize(
        ("threshold", "message"),
        [
            (
                [0.1, 0.2],
                r"threshold is \[0.1, 0.2\]; expected a probability .*, or one for each of 3 classes",
            ),
            ([], r"threshold is \[\]; expected"),
            ([[0.1, 0.2, 0.3]], r"threshold is \[\[0.1, 0.2, 0.3\]\]; expected"),
            (torch.zeros(4), r"threshold is of shape \(4,\); expected a probability"),
            (torch.zeros(3, 1), r"threshold is of shape \(3, 1\); expected a probability"),
            ([0.1, math.nan, 0.3], r"threshold of class 1 is nan; expected a probability in \[0, 1\]"),
            ([0.1, 0.2, 1.5], r"threshold of class 2 is 1.5; expected"),
            ([-0.1, 0.2, 0.3], r"threshold of class 0 is -0.1; expected"),
            ("high", "threshold is 'high'; expected"),
            (None, "threshold is None; expected"),
            ({"road": 0.5}, "threshold is {'road': 0.5}; expected"),
        ],
    )
    def test_refuses_thresholds_that_are_not_one_for_each_class(self, threshold, message):
        with pytest.raises(ValueError, match=message):
            pseudo_label(torch.zeros(1, 3, 2, 2), threshold=threshold)

    @pytest.mark.parametrize("logits", [torch.zeros(3, 2, 2), torch.zeros(1, 3, 2, 2).long()])
    def test_refuses_what_are_no_logits(self, logits):
        with pytest.raises(ValueError, match=r"expected float \(B, K, H, W\)"):
            pseudo_label(logits)

    def test_refuses_an_ignore_index_that_is_a_class(self):
        with pytest.raises(ValueError, match="ignore_index 2 is one of the 3 classes"):
            pseudo_label(torch.zeros(1, 3, 2, 2), ignore_index=2)
