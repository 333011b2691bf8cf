"""The scores of images that are not of the paper, against loops over pixels."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_confusion import few, predictions

from stseg.functional import (
    expected_iou,
    mean_certainty,
    mean_confidence,
    mean_margin,
    pixel_agreement,
    stability,
    weighted_stability,
)


def weighted_by_loops(masks, reference, num_classes, power, min_share):
    scores = []
    for b in range(len(reference)):
        one, values = np.ravel(reference[b]), []
        for mask in masks:
            other = np.ravel(mask[b])
            unions = {c: sum((one == c) | (other == c)) for c in range(num_classes)}
            counting = [c for c, area in unions.items() if area and area >= min_share * one.size - 1e-9]
            counting = counting or [c for c, area in unions.items() if area == max(unions.values())]
            total = sum(float(unions[c]) ** power for c in counting)
            shares = [sum((one == c) & (other == c)) / unions[c] * float(unions[c]) ** power for c in counting]
            values.append(sum(shares) / total)
        scores.append(sum(values) / len(values))
    return np.array(scores)


def probabilities_of(logits, b, y, x):
    values = [float(v) for v in logits[b, :, y, x]]
    exponentials = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def confidence_by_loops(p):
    return max(p)


def margin_by_loops(p):
    *_, second, first = sorted(p)
    return first - second


def certainty_by_loops(p):
    return 1 + sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


def mean_by_loops(logits, of_pixel):
    batch, _, height, width = logits.shape
    return [
        sum(of_pixel(probabilities_of(logits, b, y, x)) for y in range(height) for x in range(width)) / (height * width)
        for b in range(batch)
    ]


def expected_iou_by_loops(logits, power=0):
    scores = []
    batch, _, height, width = logits.shape
    for b in range(batch):
        pixels = [probabilities_of(logits, b, y, x) for y in range(height) for x in range(width)]
        chosen = [p.index(max(p)) for p in pixels]
        shares, total = 0.0, 0.0
        for c in sorted(set(chosen)):
            right = sum(p[c] for p, k in zip(pixels, chosen, strict=True) if k == c)
            missed = sum(p[c] for p, k in zip(pixels, chosen, strict=True) if k != c)
            union = chosen.count(c) + missed
            shares, total = shares + right / union * union**power, total + union**power
        scores.append(shares / total)
    return scores


def drawn_logits(seed, shape, spread=3.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * spread)


shapes = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(1, 4))
of_logits = pytest.mark.parametrize(
    "score", [mean_confidence, mean_margin, mean_certainty, expected_iou, partial(expected_iou, power=1)]
)


class TestWeightedStability:
    @few
    @given(predictions(), st.sampled_from([0, 0.5, 1, 2]), st.sampled_from([0, 0.1, 0.3, 0.7, 1]))
    def test_equals_the_formula(self, drawn, power, min_share):
        num_classes, maps = drawn
        reference = maps[-1].flip(-1)
        found = weighted_stability(maps, reference, num_classes, power=power, min_share=min_share)
        assert found.dtype == torch.float64
        expected = weighted_by_loops(maps.numpy(), reference.numpy(), num_classes, power, min_share)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)

    @few
    @given(predictions())
    def test_is_that_of_the_paper_to_the_bit_without_weights(self, drawn):
        num_classes, maps = drawn
        reference = maps[-1].flip(-1)
        assert torch.equal(
            weighted_stability(maps, reference, num_classes, power=0), stability(maps, reference, num_classes)
        )

    @few
    @given(predictions())
    def test_goes_by_equal_pixels_alone_where_classes_weigh_as_their_area(self, drawn):
        num_classes, maps = drawn
        reference, earlier = maps[0].flip(-1), maps[-1:]
        share = pixel_agreement(earlier, reference, num_classes)
        found = weighted_stability(earlier, reference, num_classes, power=1)
        torch.testing.assert_close(found, share / (2 - share), rtol=0, atol=1e-12)

    def test_leaves_specks_out_and_keeps_those_of_just_the_share(self):
        reference = torch.zeros(1, 1, 30, dtype=torch.long)
        earlier = reference.clone()
        earlier[..., :3] = 1  # a tenth of the image
        whole = (27 / 30 + 0) / 2
        assert float(weighted_stability(earlier[None], reference, 2, power=0, min_share=0.1)) == whole
        assert float(weighted_stability(earlier[None], reference, 2, power=0, min_share=0.11)) == 27 / 30
        assert float(weighted_stability(earlier[None], reference, 2, power=0, min_share=1)) == 27 / 30

    def test_of_a_great_power_is_that_of_the_largest_class(self):
        reference = torch.zeros(1, 40, 50, dtype=torch.long)
        reference[:, 0] = 1
        earlier = torch.zeros_like(reference)
        assert float(weighted_stability(earlier[None], reference, 2, power=1000)) == pytest.approx(1950 / 2000)

    @few
    @given(predictions(), st.randoms(use_true_random=False))
    def test_follows_the_images_of_a_batch_and_stays_within_0_to_1(self, drawn, random):
        num_classes, maps = drawn
        reference = maps[0].flip(-1)
        order = random.sample(range(maps.shape[1]), maps.shape[1])
        for score in (weighted_stability, pixel_agreement):
            whole = score(maps, reference, num_classes)
            alone = torch.cat([score(maps[:, i : i + 1], reference[i : i + 1], num_classes) for i in order])
            # Not to the last bit: powers are taken of several numbers at once, and of the rest one by one.
            atol = 1e-12 if score is weighted_stability else 0
            for found in (score(maps[:, order], reference[order], num_classes), alone):
                torch.testing.assert_close(found, whole[order], rtol=0, atol=atol)
            assert bool(((whole >= 0) & (whole <= 1)).all())
            same = maps[:1].expand(3, -1, -1, -1)
            assert score(same, maps[0], num_classes).tolist() == [1.0] * maps.shape[1]

    @pytest.mark.parametrize("options", [{"power": -1}, {"power": math.nan}, {"power": math.inf}])
    def test_refuses_powers_that_make_no_sense(self, options):
        with pytest.raises(ValueError, match=r"power is .*; expected a finite number, 0 or more"):
            weighted_stability(torch.zeros(1, 1, 2, 2).long(), torch.zeros(1, 2, 2).long(), 3, **options)
        with pytest.raises(ValueError, match="power is"):
            expected_iou(torch.zeros(1, 3, 2, 2), **options)

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_refuses_shares_that_are_none(self, share):
        with pytest.raises(ValueError, match=r"min_share is .*; expected a share in \[0, 1\]"):
            weighted_stability(torch.zeros(1, 1, 2, 2).long(), torch.zeros(1, 2, 2).long(), 3, min_share=share)


class TestPixelAgreement:
    @few
    @given(predictions())
    def test_equals_the_formula(self, drawn):
        num_classes, maps = drawn
        reference = maps[-1].flip(-1)
        found = pixel_agreement(maps, reference, num_classes)
        assert found.dtype == torch.float64
        for b in range(len(reference)):
            shares = [np.mean(mask[b].numpy() == reference[b].numpy()) for mask in maps]
            assert float(found[b]) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@pytest.mark.parametrize("score", [weighted_stability, pixel_agreement])
class TestScoresOfMasks:
    def test_refuse_what_stability_refuses(self, score):
        fine = torch.zeros(1, 1, 2, 2, dtype=torch.long)
        with pytest.raises(ValueError, match=r"expected \(K, B, H, W\) and \(B, H, W\)"):
            score(fine[0], fine[0], 3)
        with pytest.raises(ValueError, match="no checkpoint"):
            score(fine[:0], fine[0], 3)
        with pytest.raises(ValueError, match="without pixels"):
            score(fine[..., :0], fine[0, ..., :0], 3)
        with pytest.raises(ValueError, match="masks holds the value 3"):
            score(fine + 3, fine[0], 3)
        with pytest.raises(TypeError, match=r"reference is torch\.float32"):
            score(fine, fine[0].float(), 3)

    def test_take_all_integers_and_empty_batches(self, score):
        maps = torch.tensor([[[[0, 200, 7]]], [[[0, 0, 7]]]])
        expected = score(maps, maps[1], 255)
        for dtype in (torch.uint8, torch.int32, torch.uint16):
            assert torch.equal(score(maps.to(dtype), maps[1].to(dtype), 255), expected)
        assert score(torch.zeros(2, 0, 4, 4).long(), torch.zeros(0, 4, 4).long(), 3).shape == (0,)


class TestScoresOfLogits:
    @few
    @given(st.integers(0, 2**32 - 1), shapes)
    def test_equal_the_formulas(self, seed, shape):
        logits = drawn_logits(seed, shape)
        for score, expected in [
            (mean_confidence, mean_by_loops(logits, confidence_by_loops)),
            (mean_margin, mean_by_loops(logits, margin_by_loops)),
            (mean_certainty, mean_by_loops(logits, certainty_by_loops)),
            (expected_iou, expected_iou_by_loops(logits)),
            (partial(expected_iou, power=0.5), expected_iou_by_loops(logits, 0.5)),
        ]:
            found = score(logits)
            assert found.dtype == torch.float64
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)

    @of_logits
    @few
    @given(st.integers(0, 2**32 - 1), shapes, st.floats(-50, 50), st.randoms(use_true_random=False))
    def test_follow_the_images_and_only_differences_of_logits(self, score, seed, shape, offset, random):
        logits = drawn_logits(seed, shape).double()
        whole = score(logits)
        assert bool(((whole >= 0) & (whole <= 1)).all())
        order = random.sample(range(len(logits)), len(logits))
        exactly = {"rtol": 0, "atol": 1e-12}
        torch.testing.assert_close(score(logits[order]), whole[order], **exactly)
        torch.testing.assert_close(torch.cat([score(logits[i : i + 1]) for i in order]), whole[order], **exactly)
        torch.testing.assert_close(score(logits + offset), whole, rtol=0, atol=1e-9)
        torch.testing.assert_close(score(logits.log_softmax(1)), whole, rtol=0, atol=1e-9)
        names = random.sample(range(shape[1]), shape[1])
        torch.testing.assert_close(score(logits[:, names]), whole, **exactly)

    @of_logits
    def test_are_1_where_all_is_certain_even_with_infinite_logits(self, score):
        logits = torch.full((1, 3, 2, 2), -math.inf)
        logits[:, 1] = 0.0
        assert score(logits).tolist() == [1.0]

    def test_are_lowest_where_all_is_equally_probable(self):
        logits = torch.zeros(1, 4, 2, 2)
        assert mean_confidence(logits).tolist() == [0.25]
        assert mean_margin(logits).tolist() == [0.0]
        assert mean_certainty(logits).tolist() == [0.0]
        assert expected_iou(logits).tolist() == [0.25]

    @of_logits
    def test_of_half_precision_are_those_of_single(self, score):
        logits = drawn_logits(0, (2, 4, 5, 6)).bfloat16()
        assert torch.equal(score(logits), score(logits.float()))

    @of_logits
    def test_are_nan_for_the_image_with_nan_alone(self, score):
        logits = drawn_logits(0, (3, 4, 2, 2))
        logits[1, 2, 0, 1] = math.nan
        assert score(logits).isnan().tolist() == [False, True, False]

    @of_logits
    def test_of_an_empty_batch_are_empty(self, score):
        assert score(torch.zeros(0, 3, 4, 4)).shape == (0,)

    @of_logits
    @pytest.mark.parametrize(
        "logits",
        [torch.zeros(3, 2, 2), torch.zeros(1, 3, 2, 2).long(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 0, 2)],
    )
    def test_refuse_what_are_no_logits(self, score, logits):
        with pytest.raises(ValueError, match=r"expected float \(B, K, H, W\) of two or more classes"):
            score(logits)
