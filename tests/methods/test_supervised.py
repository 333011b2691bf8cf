from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from tester import MethodTester, Network, Plain, batch

from stseg import StrongAugment
from stseg.functional import supervised_loss
from stseg.methods import Supervised


class TestSupervised(MethodTester):
    def make(self):
        return Supervised(Network(), strong=StrongAugment())

    def plain(self):
        return Supervised(Plain())

    def test_a_custom_loss_is_weighted_by_the_share_of_pixels(self):
        loss = smp.losses.DiceLoss("multiclass", ignore_index=255)
        method, one = Supervised(Plain(), loss=loss, pseudo_weight=0.25), batch(4)
        is_pseudo = torch.tensor([True, False, False, True])
        logits = method.model(one.images)
        counted = one.masks != 255
        expected = sum(
            weight * counted[rows].sum() / counted.sum() * loss(logits[rows], one.masks[rows])
            for rows, weight in ((~is_pseudo, 1.0), (is_pseudo, 0.25))
        )
        torch.testing.assert_close(method(one._replace(is_pseudo=is_pseudo)).total, expected)

    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_a_custom_loss_of_a_batch_without_labels_is_nothing(self, weight):
        loss = torch.nn.CrossEntropyLoss(ignore_index=255)
        method = Supervised(Plain(), loss=loss, pseudo_weight=weight)
        one = batch()
        unknown = one._replace(masks=torch.full_like(one.masks, 255), is_pseudo=torch.tensor([True, False]))
        assert float(method(unknown).total.detach()) == 0

    def test_a_custom_loss_is_given_logits_and_masks(self):
        method, one = Supervised(Plain(), loss=lambda logits, masks: supervised_loss(logits, masks) * 3), batch()
        torch.testing.assert_close(method(one).total, 3 * Supervised(Plain())(one).total)
