from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch
from torch import nn

from stseg import TrainConfig
from stseg.methods import ECS


def corrector(seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(3 + CLASSES, CLASSES + 1, 3, padding=1)


class TestECS(MethodTester):
    def make(self):
        return ECS(Network(), corrector())

    def plain(self):
        return ECS(Plain(), corrector())

    def test_loss_is_the_formula(self):
        net = corrector()
        with torch.no_grad():
            net.weight.mul_(8)  # so that it names all there is
        method, one = ECS(Plain(), net, approval=0.3, correction=0.7, rampup=1.0), batch(step=3, steps=6)
        with torch.no_grad():
            labeled, unlabeled = method.model(one.images), method.model(one.unlabeled)
            judged, named = (
                net(torch.cat([images, z.softmax(1)], 1)).numpy()
                for images, z in ((one.images, labeled), (one.unlabeled, unlabeled))
            )
        masks, valid = one.masks.numpy(), one.valid.numpy()
        labels, _ = naive.targets(labeled.numpy())
        wanted = np.where(masks == 255, 255, np.where(labels == masks, CLASSES, masks))
        choice, weight = naive.targets(named)
        guess, _ = naive.targets(unlabeled.numpy())
        assert {CLASSES} < set(np.unique(choice))
        total = 0.0
        for b, i, j in np.ndindex(*valid.shape):
            if valid[b, i, j]:
                target = guess[b, i, j] if choice[b, i, j] == CLASSES else choice[b, i, j]
                total += weight[b, i, j] * naive.cross_entropy(unlabeled[b, :, i, j].numpy(), target)
        parts = {
            "supervised": naive.supervised(labeled.numpy(), masks),
            "approval": naive.supervised(judged, np.where(masks == 255, 255, CLASSES)),
            "correction": total / valid.sum(),
            "corrector": naive.supervised(judged, wanted),
        }
        losses = method(one)
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        ramp = math.exp(-5 * (1 - 3 / 6) ** 2)
        expected = parts["supervised"] + 0.3 * parts["approval"] + 0.7 * ramp * parts["correction"] + parts["corrector"]
        assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-4)

    def test_the_corrector_learns_from_its_own_loss_alone(self):
        gradients = []
        for weight in (0.0, 5.0):
            method = ECS(Plain(), corrector(), approval=weight, correction=weight)
            method(batch()).total.backward()
            gradients.append([p.grad.clone() for p in method.corrector.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_the_network_learns_from_approval_and_correction_not_from_the_corrector(self):
        gradients = []
        for approval, correction in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
            method = ECS(Plain(), corrector(), approval=approval, correction=correction, rampup=0)
            method(batch()).total.backward()
            gradients.append(method.model.network.head.weight.grad)
        plain = Plain()
        logits = ECS(plain, corrector()).model(batch().images)
        nn.functional.cross_entropy(logits, batch().masks, ignore_index=255).backward()
        torch.testing.assert_close(gradients[0], plain.head.weight.grad)
        assert not torch.allclose(gradients[0], gradients[1])
        assert not torch.allclose(gradients[0], gradients[2])

    def test_an_ignore_index_that_is_the_number_of_classes_is_no_class_of_the_corrector(self):
        method, one = self.plain(), batch()
        other = one._replace(masks=one.masks.masked_fill(one.masks == 255, CLASSES), ignore_index=CLASSES)
        assert torch.equal(method(one).total, method(other).total)

    def test_has_an_adam_for_the_corrector(self):
        network, adam = self.make().optimizers(TrainConfig(steps=1, lr=0.01))
        assert (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (1e-4, (0.9, 0.99))
        assert isinstance(network, torch.optim.SGD)

    def test_another_number_of_channels_is_refused(self):
        method = ECS(Plain(), nn.Conv2d(6, 3, 1))
        with pytest.raises(ValueError, match="the corrector gives 3 channels; expected 4: the classes, and 'is right'"):
            method(batch())
