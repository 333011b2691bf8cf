from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch
from torch import nn

from stseg import Segmenter, TrainConfig
from stseg.functional import sigmoid_rampup
from stseg.methods import ECS


def corrector(seed: int = 7, *, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3 + CLASSES, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES + 1, 1)]
        return nn.Sequential(*layers[:1], nn.BatchNorm2d(8), *layers[1:]) if norm else nn.Sequential(*layers)


class TestECS(MethodTester):
    def make(self):
        return ECS(Network(), corrector(norm=True))

    def plain(self):
        return ECS(Plain(), corrector())

    @pytest.mark.parametrize("step", [0, 2, 6])
    def test_loss_is_the_formula(self, step):
        network = Plain()
        network.head.bias.data = torch.tensor([0.2, -0.1, 0.1])
        method = ECS(network, corrector(), agreement=0.3, semi=0.7, rampup=0.5)
        method.corrector.network[-1].weight.data *= 8  # so that the corrector changes its mind from pixel to pixel
        one = batch(step=step, steps=8)
        with torch.no_grad():
            labeled, unlabeled = method.model(one.images), method.model(one.unlabeled)
            judged = method.corrector(torch.cat([one.images, labeled.softmax(1)], 1)).numpy()
            corrected = method.corrector(torch.cat([one.unlabeled, unlabeled.softmax(1)], 1)).numpy()
        labeled, unlabeled, masks = labeled.numpy(), unlabeled.numpy(), one.masks.numpy()
        wanted, right, semi, changed, valid = np.full_like(masks, 255), np.full_like(masks, 255), 0.0, 0, 0
        for b, i, j in np.ndindex(*masks.shape):
            if masks[b, i, j] != 255:
                right[b, i, j] = CLASSES
                is_right = labeled[b, :, i, j].argmax() == masks[b, i, j]
                wanted[b, i, j] = CLASSES if is_right else masks[b, i, j]
            if one.valid[b, i, j]:
                valid += 1
                said = naive.softmax(corrected[b, :, i, j].astype(np.float64))
                own, theirs = unlabeled[b, :, i, j].argmax(), said.argmax()
                target = own if theirs == CLASSES else theirs
                changed += target != own
                semi += said.max() * naive.cross_entropy(unlabeled[b, :, i, j], target)
        assert 0 < changed < valid
        assert len(np.unique(wanted)) == CLASSES + 2
        parts = {
            "supervised": naive.supervised(labeled, masks),
            "agreement": naive.supervised(judged, right),
            "semi": semi / valid,
            "corrector": naive.supervised(judged, wanted),
            "corrected": changed / valid,
        }
        losses = method(one)
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        weight = 0.7 * sigmoid_rampup(step, 4)
        total = parts["supervised"] + 0.3 * parts["agreement"] + weight * parts["semi"] + parts["corrector"]
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_the_corrector_learns_from_its_own_loss_alone(self):
        gradients = []
        for weight in (0.0, 5.0):
            method = ECS(Plain(), corrector(), agreement=weight, semi=weight, rampup=0)
            method(batch()).total.backward()
            gradients.append([p.grad.clone() for p in method.corrector.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_the_network_does_not_learn_from_the_correctors_loss(self):
        method, one, network = ECS(Plain(), corrector(), agreement=0.0, semi=0.0), batch(), Plain()
        method(one).total.backward()
        torch.nn.functional.cross_entropy(Segmenter(network)(one.images), one.masks, ignore_index=255).backward()
        for mine, theirs in zip(method.model.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)

    @pytest.mark.parametrize("term", ["agreement", "semi"])
    def test_a_term_reaches_the_network(self, term):
        gradients = []
        for weight in (0.0, 1.0):
            method = ECS(Plain(), corrector(), rampup=0, **{"agreement": 0.0, "semi": 0.0, term: weight})
            method(batch()).total.backward()
            gradients.append(method.model.network.head.weight.grad)
        assert not torch.allclose(*gradients)

    def test_a_corrector_that_finds_all_right_leaves_the_prediction(self):
        method = self.plain()
        method.corrector.network[-1].bias.data[CLASSES] = 1e3
        logged = method(batch()).logged
        assert logged["corrected"] == logged["agreement"] == 0

    def test_the_class_of_right_may_be_the_ignore_index(self):
        method, one = self.plain(), batch()
        other = one._replace(masks=one.masks.masked_fill(one.masks == 255, CLASSES), ignore_index=CLASSES)
        assert torch.equal(method(one).total, method(other).total)

    def test_images_of_any_size_are_corrected(self):
        """The corrector is wrapped: its network may want multiples of a number."""
        strided = nn.Sequential(nn.Conv2d(3 + CLASSES, 8, 3, stride=4, padding=1), nn.Conv2d(8, CLASSES + 1, 1))
        assert ECS(Plain(), strided)(batch(2, 18)).total.isfinite()

    def test_has_an_adam_for_the_corrector(self):
        method = self.make()
        network, adam = method.optimizers(TrainConfig(steps=1, lr=0.01))
        assert isinstance(adam, torch.optim.Adam)
        assert (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (1e-4, (0.9, 0.99))
        held = {id(p) for group in adam.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.corrector.parameters()}
        assert held.isdisjoint(id(p) for group in network.param_groups for p in group["params"])

    def test_names_a_corrector_of_other_classes(self):
        with pytest.raises(ValueError, match="corrector gives 3 classes and the network 3; expected 4"):
            ECS(Plain(), nn.Conv2d(3 + CLASSES, CLASSES, 1))(batch())

    def test_refuses_one_network_twice(self):
        network = Plain()
        with pytest.raises(ValueError, match="share parameters"):
            ECS(network, network)

    @pytest.mark.parametrize("settings", [{"agreement": -1}, {"semi": math.inf}, {"rampup": -0.1}])
    def test_checks_its_settings(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ECS(Plain(), corrector(), **settings)

    def test_says_that_it_is_a_reconstruction(self):
        assert "reconstruction" in ECS.__doc__
