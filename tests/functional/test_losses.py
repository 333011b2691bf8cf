"""Losses, against loops over pixels in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stseg.functional import (
    adversarial_loss,
    cross_entropy,
    entropy,
    mean_over_processes,
    ohem_cross_entropy,
    squared_difference,
    supervised_loss,
    without_ignored,
)

few = settings(max_examples=25, deadline=None)


def example(seed=0, batch=2, classes=3, height=4, width=5, ignored=0.3, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, height, width, generator=generator)
    masks = torch.randint(classes, (batch, height, width), generator=generator)
    masks[torch.rand(batch, height, width, generator=generator) < ignored] = ignore_index
    return logits, masks


def pixels(*shape):
    return np.ndindex(*shape)


def softmax(values):
    exponentials = np.exp(np.asarray(values, dtype=np.float64) - max(values))
    return exponentials / exponentials.sum()


def cross_entropy_by_loops(logits, masks, weight=None, ignore_index=255):
    total, count = 0.0, 0
    for b, y, x in pixels(*masks.shape):
        if masks[b, y, x] != ignore_index:
            count += 1
            part = 1.0 if weight is None else float(weight.expand(masks.shape)[b, y, x])
            total -= part * math.log(softmax(logits[b, :, y, x].tolist())[int(masks[b, y, x])])
    return total / max(count, 1)


class TestCrossEntropy:
    @few
    @given(st.integers(0, 999), st.sampled_from([0, 0.4, 1]), st.sampled_from([255, -100]))
    def test_is_the_mean_over_the_pixels_that_count(self, seed, ignored, ignore_index):
        logits, masks = example(seed, ignored=ignored, ignore_index=ignore_index)
        found = cross_entropy(logits, masks, ignore_index=ignore_index)
        assert float(found) == pytest.approx(cross_entropy_by_loops(logits, masks, None, ignore_index), rel=1e-5)

    @few
    @given(st.integers(0, 999), st.sampled_from([(), (2, 1, 1), (1, 4, 5), (2, 4, 5)]), st.booleans())
    def test_weights_multiply_losses_and_leave_the_denominator_alone(self, seed, shape, as_bool):
        logits, masks = example(seed)
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        weight = weight > 0.5 if as_bool else weight
        wanted = cross_entropy_by_loops(logits, masks, weight)
        assert float(cross_entropy(logits, masks, weight=weight)) == pytest.approx(wanted, rel=1e-5)

    def test_weights_of_images_have_bit_for_bit_the_gradient_of_weighted_sums(self):
        logits, masks = example(3, batch=4, height=17, width=13)
        rows = torch.tensor([1.0, 0.3, 1.0, 0.7])
        first, second = (logits.clone().requires_grad_() for _ in range(2))
        count = (masks != 255).sum().float()
        losses = F.cross_entropy(first, masks, ignore_index=255, reduction="none").sum((1, 2)) @ rows
        (losses * (1 / count)).backward()
        cross_entropy(second, masks, weight=rows[:, None, None]).backward()
        assert torch.equal(first.grad, second.grad)

    def test_without_weights_has_bit_for_bit_the_gradient_of_the_sum(self):
        logits, masks = example(3, batch=4, height=17, width=13)
        first, second = (logits.clone().requires_grad_() for _ in range(2))
        count = (masks != 255).sum().float()
        (F.cross_entropy(first, masks, ignore_index=255, reduction="sum") * (1 / count)).backward()
        cross_entropy(second, masks).backward()
        assert torch.equal(first.grad, second.grad)

    @pytest.mark.parametrize("weight", [None, torch.tensor(2.0)])
    def test_is_zero_with_a_gradient_of_zero_where_nothing_counts(self, weight):
        logits, masks = example(ignored=1)
        logits.requires_grad_()
        loss = cross_entropy(logits, masks, weight=weight)
        loss.backward()
        assert loss == 0
        assert not logits.grad.any()

    def test_takes_masks_of_bytes_and_logits_of_half_precision(self):
        logits, masks = example()
        assert cross_entropy(logits, masks.byte()) == cross_entropy(logits, masks)
        half = cross_entropy(logits.bfloat16(), masks, weight=torch.tensor(0.5))
        assert half.dtype == torch.float32
        assert half == cross_entropy(logits.bfloat16().float(), masks, weight=torch.tensor(0.5))
        assert cross_entropy(logits.double(), masks).dtype == torch.float64

    @pytest.mark.parametrize("shape", [(2,), (5,), (4, 5), (2, 1, 1, 1), (3, 1, 1), (2, 4, 6)])
    def test_refuses_weights_of_another_shape(self, shape):
        logits, masks = example()
        with pytest.raises(ValueError, match="weight has shape"):
            cross_entropy(logits, masks, weight=torch.ones(shape))

    def test_names_the_shape_of_weights_for_images(self):
        with pytest.raises(ValueError, match=r"weight has shape \(2,\) and masks \(2, 4, 5\).*\(B, 1, 1\)"):
            cross_entropy(*example(), weight=torch.ones(2))


class TestOhem:
    def by_loops(self, logits, masks, threshold, min_kept):
        counted = [(b, y, x) for b, y, x in pixels(*masks.shape) if masks[b, y, x] != 255]
        p = [softmax(logits[b, :, y, x].tolist())[int(masks[b, y, x])] for b, y, x in counted]
        if not p:
            return 0.0
        least = sorted(p)[:min_kept]
        limit = math.inf if len(p) < min_kept else max(threshold, least[-1] if least else 0.0)
        kept = [value for value in p if value <= limit]
        return sum(-math.log(value) for value in kept) / max(len(kept), 1)

    @few
    @given(st.integers(0, 999), st.floats(0, 1), st.sampled_from([0, 1, 7, 20, 30, 1000]), st.sampled_from([0, 0.4, 1]))
    def test_is_the_mean_over_the_hard_pixels(self, seed, threshold, min_kept, ignored):
        logits, masks = example(seed, ignored=ignored)
        found = ohem_cross_entropy(logits, masks, threshold=threshold, min_kept=min_kept)
        assert float(found) == pytest.approx(self.by_loops(logits, masks, threshold, min_kept), rel=1e-4, abs=1e-6)

    def test_equals_cross_entropy_where_there_are_too_few_pixels(self):
        logits, masks = example()
        assert float(ohem_cross_entropy(logits, masks)) == pytest.approx(float(cross_entropy(logits, masks)), rel=1e-6)

    def test_easy_pixels_get_no_gradient(self):
        logits = torch.zeros(1, 2, 1, 3)
        logits[0, 0, 0] = torch.tensor([8.0, 0.0, -8.0])
        logits.requires_grad_()
        ohem_cross_entropy(logits, torch.zeros(1, 1, 3, dtype=torch.int64), min_kept=1).backward()
        assert (logits.grad.abs().sum(1) > 0).tolist() == [[[False, True, True]]]


class TestSquaredDifference:
    @few
    @given(st.integers(0, 999), st.sampled_from([None, 0, 0.5, 1]))
    def test_is_the_mean_over_classes_and_pixels(self, seed, share):
        a, _ = example(seed)
        b, _ = example(seed + 1)
        where = None if share is None else torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed)) < share
        values = [
            float(((a[i, :, y, x] - b[i, :, y, x]) ** 2).sum()) / 3
            for i, y, x in pixels(2, 4, 5)
            if where is None or where[i, y, x]
        ]
        wanted = sum(values) / max(len(values), 1)
        assert float(squared_difference(a, b, where=where)) == pytest.approx(wanted, rel=1e-5)

    def test_refuses_other_shapes(self):
        a = torch.zeros(2, 3, 4, 5)
        with pytest.raises(ValueError, match=r"prediction has shape \(2, 3, 4, 5\) and target \(2, 1, 4, 5\)"):
            squared_difference(a, a[:, :1])
        with pytest.raises(ValueError, match=r"where has shape \(4, 5\)"):
            squared_difference(a, a, where=torch.ones(4, 5, dtype=torch.bool))


class TestEntropy:
    @few
    @given(st.integers(0, 999), st.sampled_from([None, 0, 0.5]))
    def test_is_the_mean_entropy_of_the_pixels(self, seed, share):
        logits, _ = example(seed)
        where = None if share is None else torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed)) < share
        values = []
        for b, y, x in pixels(2, 4, 5):
            if where is None or where[b, y, x]:
                p = softmax(logits[b, :, y, x].tolist())
                values.append(-sum(v * math.log(v) for v in p))
        wanted = sum(values) / max(len(values), 1)
        assert float(entropy(logits, where=where)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)

    def test_its_gradient_makes_predictions_surer(self):
        logits, _ = example()
        logits.requires_grad_()
        before = entropy(logits)
        before.backward()
        assert entropy(logits - logits.grad) < before

    def test_is_zero_with_a_finite_gradient_where_the_network_is_sure(self):
        logits = torch.tensor([500.0, 0.0, -500.0]).reshape(1, 3, 1, 1).requires_grad_()
        loss = entropy(logits)
        loss.backward()
        assert loss == 0
        assert logits.grad.isfinite().all()


class TestAdversarialLoss:
    @few
    @given(st.integers(0, 999), st.booleans(), st.sampled_from([None, 0, 0.5]))
    def test_is_the_mean_binary_cross_entropy(self, seed, real, share):
        scores = example(seed, classes=1)[0]
        where = None if share is None else torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed)) < share
        values = []
        for b, y, x in pixels(2, 4, 5):
            if where is None or where[b, y, x]:
                p = 1 / (1 + math.exp(-float(scores[b, 0, y, x])))
                values.append(-math.log(p if real else 1 - p))
        wanted = sum(values) / max(len(values), 1)
        assert float(adversarial_loss(scores, real=real, where=where)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)

    def test_refuses_scores_of_several_channels(self):
        with pytest.raises(ValueError, match=r"scores have shape \(2, 3, 4, 5\); expected \(B, 1, H, W\)"):
            adversarial_loss(torch.zeros(2, 3, 4, 5), real=True)


class TestSupervisedLoss:
    def test_is_cross_entropy_unless_told_otherwise(self):
        logits, masks = example(ignore_index=-1)
        assert supervised_loss(logits, masks, ignore_index=-1) == cross_entropy(logits, masks, ignore_index=-1)

    def test_takes_the_losses_of_other_libraries(self):
        logits, masks = example()
        dice = smp.losses.DiceLoss("multiclass", ignore_index=255)
        assert supervised_loss(logits, masks, loss=dice) == dice(logits, masks)

    def test_refuses_what_is_no_scalar(self):
        logits, masks = example()
        with pytest.raises(ValueError, match=r"returned a tensor of shape \(2, 4, 5\); expected a scalar"):
            supervised_loss(logits, masks, loss=nn.CrossEntropyLoss(ignore_index=255, reduction="none"))
        with pytest.raises(TypeError, match="returned float; expected a scalar tensor"):
            supervised_loss(logits, masks, loss=lambda logits, masks: 0.5)


class TestWithoutIgnored:
    def test_equals_the_loss_of_what_counts(self):
        logits, masks = example(ignored=0)
        jaccard = smp.losses.JaccardLoss("multiclass")
        wanted = jaccard(logits, masks)
        wide, wide_masks = F.pad(logits, (0, 3), value=7.0), F.pad(masks, (0, 3), value=255)
        assert float(without_ignored(jaccard)(wide, wide_masks)) == pytest.approx(float(wanted), rel=1e-5)
        assert float(jaccard(logits, masks)) != pytest.approx(float(jaccard(wide, wide_masks.clamp(max=2))), rel=1e-3)

    def test_hands_over_each_pixel_with_its_class(self):
        seen = []
        logits, masks = example()
        without_ignored(lambda logits, masks: seen.append((logits, masks)) or logits.sum())(logits, masks)
        ((given_logits, given_masks),) = seen
        wanted = [(tuple(logits[b, :, y, x].tolist()), int(masks[b, y, x])) for b, y, x in pixels(*masks.shape)]
        wanted = [pair for pair in wanted if pair[1] != 255]
        assert given_logits.shape == (1, 3, len(wanted), 1)
        assert given_masks.shape == (1, len(wanted), 1)
        found = zip(given_logits[0, :, :, 0].T.tolist(), given_masks.flatten().tolist(), strict=True)
        assert [(tuple(values), value) for values, value in found] == wanted

    def test_is_zero_with_a_gradient_where_nothing_counts(self):
        logits, masks = example(ignored=1)
        logits.requires_grad_()
        loss = without_ignored(smp.losses.JaccardLoss("multiclass"))(logits, masks)
        loss.backward()
        assert loss == 0
        assert not logits.grad.any()

    def test_moves_with_the_loss_and_says_what_it_wraps(self):
        weighted = without_ignored(nn.CrossEntropyLoss(weight=torch.ones(3)), ignore_index=7).double()
        assert weighted.loss.weight.dtype == torch.float64
        assert "CrossEntropyLoss" in repr(weighted)
        assert "ignore_index=7" in repr(weighted)
        assert "0x" not in repr(without_ignored(F.cross_entropy))


def test_a_mean_lets_no_gradient_through_its_count():
    total, count = torch.tensor(6.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    mean_over_processes(total, count).backward()
    assert total.grad == 0.25
    assert count.grad is None
