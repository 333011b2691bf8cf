"""Targets of consistency, and their loss, against loops over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import example, pixels, softmax
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from stseg.functional import (
    adversarial_loss,
    confident_share,
    consistency_loss,
    consistency_target,
    cross_entropy,
    entropy,
    ohem_cross_entropy,
    squared_difference,
    sure_share,
)

few = settings(max_examples=25, deadline=None)


def validity(seed, share=0.7):
    return torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed)) < share


class TestTarget:
    @few
    @given(st.integers(0, 999), st.floats(0, 1), st.sampled_from([255, -100, 3, 4]), st.booleans())
    def test_tells_classes_unsure_and_ignored_pixels_apart(self, seed, threshold, ignore_index, padded):
        logits, _ = example(seed)
        valid = validity(seed) if padded else None
        target = consistency_target(logits, threshold=threshold, valid=valid, ignore_index=ignore_index)
        assert target.dtype == torch.int64
        unsure = 4 if ignore_index == 3 else 3
        for b, y, x in pixels(2, 4, 5):
            p = softmax(logits[b, :, y, x].tolist())
            if valid is not None and not valid[b, y, x]:
                assert target[b, y, x] == ignore_index
            elif abs(max(p) - threshold) > 1e-5:
                assert target[b, y, x] == (p.argmax() if max(p) >= threshold else unsure)

    def test_a_threshold_of_zero_leaves_nobody_unsure(self):
        logits, _ = example()
        assert torch.equal(consistency_target(logits, threshold=0), logits.argmax(1))

    def test_pixels_that_are_no_number_are_unsure(self):
        assert consistency_target(torch.full((1, 3, 1, 1), math.nan), threshold=0.0).item() == 3

    def test_has_no_gradient(self):
        assert not consistency_target(example()[0].requires_grad_(), threshold=0.5).requires_grad

    @pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan])
    def test_refuses_thresholds_that_are_no_probability(self, threshold):
        with pytest.raises(ValueError, match=r"threshold is .*; expected a probability"):
            consistency_target(example()[0], threshold=threshold)

    def test_refuses_an_ignore_index_that_is_a_class(self):
        with pytest.raises(ValueError, match="ignore_index 2 is one of the 3 classes"):
            consistency_target(example()[0], threshold=0.5, ignore_index=2)


class TestLoss:
    @few
    @given(st.integers(0, 999), st.floats(0, 1), st.sampled_from([255, -100, 3]))
    def test_divides_the_sure_pixels_by_the_valid_ones(self, seed, threshold, ignore_index):
        view, _ = example(seed + 1)
        target = consistency_target(
            example(seed)[0], threshold=threshold, valid=validity(seed), ignore_index=ignore_index
        )
        total, count, sure = 0.0, 0, 0
        for b, y, x in pixels(2, 4, 5):
            value = int(target[b, y, x])
            count += value != ignore_index
            if 0 <= value < 3:
                sure += 1
                total -= math.log(softmax(view[b, :, y, x].tolist())[value])
        found = consistency_loss(view, target, ignore_index=ignore_index)
        assert float(found) == pytest.approx(total / max(count, 1), rel=1e-5, abs=1e-7)
        share = sure_share(target, 3, ignore_index=ignore_index)
        assert float(share) == pytest.approx(sure / max(count, 1))

    def test_is_cross_entropy_where_all_are_sure(self):
        view, _ = example(1)
        target = consistency_target(example(0)[0], threshold=0)
        assert consistency_loss(view, target) == cross_entropy(view, target)

    @pytest.mark.parametrize("value", [3, 255])
    def test_is_zero_with_a_gradient_of_zero_where_nobody_is_sure_or_nothing_counts(self, value):
        view = example()[0].requires_grad_()
        target = torch.full((2, 4, 5), value)
        loss = consistency_loss(view, target)
        loss.backward()
        assert loss == 0
        assert not view.grad.any()
        assert sure_share(target, 3) == 0

    def test_a_saturated_network_agrees_with_itself(self):
        logits = 1000 * torch.eye(3)[torch.arange(12).reshape(1, 3, 4) % 3].permute(0, 3, 1, 2)
        assert consistency_loss(logits, consistency_target(logits, threshold=1.0)) == 0


def test_no_loss_reads_a_value_back_from_the_device():
    with FakeTensorMode():  # in which tensors have no values: reading one raises
        logits, masks = torch.empty(2, 3, 4, 5, requires_grad=True), torch.empty(2, 4, 5, dtype=torch.int64)
        where, other = masks != 255, torch.empty(2, 3, 4, 5)
        target = consistency_target(logits, threshold=0.9, valid=where)
        losses = [
            consistency_loss(logits, target),
            cross_entropy(logits, masks),
            cross_entropy(logits, masks, weight=where),
            ohem_cross_entropy(logits, masks),
            squared_difference(logits, other, where=where),
            entropy(logits, where=where),
            adversarial_loss(logits[:, :1], real=False, where=where),
        ]
        sum(losses).backward()
        sure_share(target, 3)
        with pytest.raises(DataDependentOutputException):
            losses[0].item()


class TestConfidentShare:
    @few
    @given(st.integers(0, 99), st.floats(0, 1))
    def test_is_counted_over_the_pixels_that_count(self, seed, threshold):
        confidence, where = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed)), validity(seed)
        counted = [float(confidence[b, y, x]) for b, y, x in pixels(2, 4, 5) if where[b, y, x]]
        wanted = int((torch.tensor(counted) >= threshold).sum()) / max(1, len(counted))
        assert float(confident_share(confidence, threshold=threshold, where=where)) == pytest.approx(wanted)

    def test_is_zero_where_nothing_counts(self):
        confidence = torch.ones(1, 2, 2)
        assert confident_share(confidence, threshold=0, where=torch.zeros(1, 2, 2, dtype=torch.bool)) == 0
        assert confident_share(confidence, threshold=1.0) == 1

    def test_refuses_another_shape(self):
        with pytest.raises(ValueError, match=r"where has shape \(1, 2\) and confidence \(1, 2, 2\)"):
            confident_share(torch.ones(1, 2, 2), threshold=0, where=torch.ones(1, 2, dtype=torch.bool))
