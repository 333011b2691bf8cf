from __future__ import annotations

from dataclasses import dataclass

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen
from torch import nn

import stseg
from stseg.augment import CutMix
from stseg.methods import FixMatch


@dataclass(frozen=True)
class FixedBox(CutMix):
    """CutMix with one box for all images."""

    box: tuple[int, int, int, int] = (1, 2, 6, 5)

    def draw(self, images, generator=None):
        return torch.tensor([self.box] * len(images))


class TestFixMatch(MethodTester):
    def make(self):
        return FixMatch(Network(), threshold=0.4)

    def plain(self):
        return FixMatch(Plain(), threshold=0.4, strong=None, mix=None)

    @pytest.mark.parametrize("threshold", [0.0, 0.36, 0.4, 1.0])
    def test_loss_is_the_formula(self, threshold):
        method, one = FixMatch(Plain(), threshold=threshold, strong=None, mix=FixedBox()), batch(3)
        with torch.no_grad():
            labeled = method.model(one.images).numpy()
            label, confidence = naive.targets(method.model(one.unlabeled).numpy())
            mixed = torch.from_numpy(naive.paste(FixedBox.box, one.unlabeled.numpy()))
            strong = method.model(mixed).numpy()
        label, confidence, valid = (naive.paste(FixedBox.box, x) for x in (label, confidence, one.valid.numpy()))
        supervised = naive.supervised(labeled, one.masks.numpy())
        consistency = naive.consistency(strong, label, confidence, valid, threshold)
        losses = method(one)
        assert float(losses.total.detach()) == pytest.approx((supervised + consistency) / 2, rel=1e-5)
        assert float(losses.logged["supervised"]) == pytest.approx(supervised, rel=1e-5)
        assert float(losses.logged["consistency"]) == pytest.approx(consistency, rel=1e-5)
        sure = np.logical_and(confidence >= threshold, valid).sum() / valid.sum()
        assert float(losses.logged["sure"]) == pytest.approx(sure)

    def test_targets_have_no_gradient(self):
        """The gradient is that of a loss whose targets are constants."""
        method, one = self.plain(), batch()
        method(one).total.backward()
        network = Plain()
        model = stseg.Segmenter(network)
        target = model(one.unlabeled).detach()
        confident = (target.softmax(1).amax(1) >= 0.4) & one.valid
        losses = nn.functional.cross_entropy(model(one.unlabeled), target.argmax(1), reduction="none")
        supervised = nn.functional.cross_entropy(model(one.images), one.masks, ignore_index=255)
        ((supervised + (losses * confident).sum() / one.valid.sum()) / 2).backward()
        for mine, theirs in zip(method.model.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)

    def test_agreeing_views_of_a_sure_network_cost_nothing(self):
        network = Plain()
        network.head.bias.data.copy_(torch.tensor([0.0, 1e3, 0.0]))
        method = FixMatch(network, threshold=0.0, strong=None, mix=None)
        assert float(method(batch(seed=1)).logged["consistency"]) == 0

    def test_without_a_confident_pixel_there_is_no_consistency(self):
        method = FixMatch(Plain(), threshold=1.0, strong=None, mix=None)
        assert float(method(batch()).logged["consistency"]) == 0
        assert float(method(batch()).logged["sure"]) == 0

    def test_labeled_and_unlabeled_images_share_batch_statistics(self):
        method, one = FixMatch(Network(), threshold=2 / 3, strong=None, mix=None).train(), batch()
        seen = rows_seen(method.model.network.encoder)
        method(one)
        assert seen == [4, 2]

    @pytest.mark.parametrize("threshold", [-0.1, 1.5])
    def test_refuses_a_threshold_that_is_no_probability(self, threshold):
        with pytest.raises(ValueError, match=f"threshold is {threshold}; expected a probability"):
            FixMatch(Plain(), threshold=threshold)
