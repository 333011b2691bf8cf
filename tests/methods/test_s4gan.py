from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch

from stseg import TrainConfig
from stseg.methods import S4GAN
from stseg.modules import ImageCritic


def binary(scores: np.ndarray, *, real: bool) -> float:
    return float(np.mean([np.logaddexp(0, -s if real else s) for s in scores]))


class TestS4GAN(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return S4GAN(Network(), num_classes=CLASSES, threshold=0.5)

    def plain(self):
        torch.manual_seed(5)
        return S4GAN(Plain(), num_classes=CLASSES, threshold=0.5, dropout=0.0)

    @pytest.mark.parametrize("step", [0, 2])
    def test_loss_is_the_formula(self, step):
        torch.manual_seed(1)
        method = S4GAN(Plain(), num_classes=CLASSES, matching=0.3, semi=0.7, dropout=0.0)
        one = batch(3, step=step)
        known, valid = (one.masks != 255).numpy(), one.valid.numpy()
        with torch.no_grad():
            labeled, unlabeled = method.model(one.images), method.model(one.unlabeled)
            real = torch.zeros(3, CLASSES, 8, 8)
            for b, i, j in np.ndindex(3, 8, 8):
                if known[b, i, j]:
                    real[b, one.masks[b, i, j], i, j] = 1
            fake = torch.cat([unlabeled.softmax(1), one.unlabeled], 1)
            for b, i, j in np.ndindex(3, 8, 8):
                if not valid[b, i, j]:
                    fake[b, :, i, j] = 0
            (h_fake, s_fake), (h_real, s_real) = (
                [x.numpy() for x in method.critic(maps)] for maps in (fake, torch.cat([real, one.images], 1))
            )
        chance = 1 / (1 + np.exp(-s_fake))
        method.threshold = float(np.sort(chance)[:2].mean())  # the lowest of three is not trusted
        trusted = chance > method.threshold
        labels, _ = naive.targets(unlabeled.numpy())
        target = np.where(valid & trusted[:, None, None], labels, 255)
        supervised = naive.supervised(labeled.numpy(), one.masks.numpy())
        matching = np.abs(h_real.mean(0) - h_fake.mean(0)).mean()
        semi = naive.supervised(unlabeled.numpy(), target)
        critic = 0.5 * binary(s_fake, real=False) + 0.5 * binary(s_real, real=True)
        losses = method(one)
        parts = {"supervised": supervised, "matching": matching, "semi": semi, "critic": critic, "trusted": 2 / 3}
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        total = supervised + 0.3 * matching + (0.7 * semi if step else 0) + critic
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_the_critic_learns_from_its_own_loss_alone(self):
        gradients = []
        for matching, semi in ((0.0, 0.0), (5.0, 5.0)):
            torch.manual_seed(1)
            method = S4GAN(Plain(), num_classes=CLASSES, matching=matching, semi=semi, dropout=0.0)
            method(batch()).total.backward()
            gradients.append([p.grad.clone() for p in method.critic.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_feature_matching_reaches_the_network(self):
        gradients = []
        for matching in (0.0, 1.0):
            torch.manual_seed(1)
            method = S4GAN(Plain(), num_classes=CLASSES, matching=matching, semi=0.0, dropout=0.0)
            method(batch()).total.backward()
            gradients.append(method.model.network.head.weight.grad)
        assert not torch.allclose(*gradients)

    def test_without_a_trusted_image_nothing_is_learned_from_them(self):
        losses = S4GAN(Plain(), num_classes=CLASSES, threshold=1.0)(batch())
        assert (float(losses.logged["semi"]), float(losses.logged["trusted"])) == (0, 0)

    def test_has_an_adam_for_the_critic(self):
        network, critic = self.make().optimizers(TrainConfig(steps=1, lr=0.01))
        assert (critic.param_groups[0]["lr"], critic.param_groups[0]["betas"]) == (1e-4, (0.9, 0.99))
        assert isinstance(network, torch.optim.SGD)

    def test_the_critic_has_as_many_parameters_as_the_authors(self):
        assert sum(p.numel() for p in ImageCritic(21 + 3).parameters()) == 2_778_561

    @pytest.mark.parametrize("options", [{"threshold": 2}, {"semi": -1}, {"matching": -1}, {"dropout": 2}])
    def test_mistakes_are_named(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            S4GAN(Plain(), num_classes=CLASSES, **options)
