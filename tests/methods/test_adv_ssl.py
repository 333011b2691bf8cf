from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch

from stseg import TrainConfig
from stseg.methods import AdvSSL


def binary(scores: np.ndarray, where: np.ndarray, *, real: bool) -> float:
    values = [
        float(np.logaddexp(0, -scores[b, 0, i, j] if real else scores[b, 0, i, j]))
        for b, i, j in np.ndindex(*where.shape)
        if where[b, i, j]
    ]
    return sum(values) / max(1, len(values))


class TestAdvSSL(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return AdvSSL(Network(), num_classes=CLASSES, semi_from=0.5)

    def plain(self):
        torch.manual_seed(5)
        return AdvSSL(Plain(), num_classes=CLASSES, semi_from=0.5)

    @pytest.mark.parametrize("step", [2, 3])
    def test_loss_is_the_formula(self, step):
        torch.manual_seed(1)
        method = AdvSSL(Plain(), num_classes=CLASSES, adversarial=(0.3, 0.2), semi=0.7, semi_from=0.5)
        one = batch(step=step, steps=6)
        with torch.no_grad():  # a threshold that some of the scores exceed, and some not
            scores = method.critic(method.model(one.unlabeled).softmax(1)).sigmoid()[:, 0][one.valid]
        method.threshold = float(scores.sort().values[[51, 52]].mean())
        known, valid = (one.masks != 255).numpy(), one.valid.numpy()
        with torch.no_grad():
            labeled, unlabeled = method.model(one.images), method.model(one.unlabeled)
            score_l, score_u = (method.critic(z.softmax(1)).numpy() for z in (labeled, unlabeled))
            real = torch.zeros(2, CLASSES, 8, 8)
            for b, i, j in np.ndindex(2, 8, 8):
                if known[b, i, j]:
                    real[b, one.masks[b, i, j], i, j] = 1
            score_real = method.critic(real).numpy()
        labels, _ = naive.targets(unlabeled.numpy())
        trusted = valid & (1 / (1 + np.exp(-score_u[:, 0])) >= method.threshold)
        assert 0 < trusted.sum() < valid.sum()
        supervised = naive.supervised(labeled.numpy(), one.masks.numpy())
        adversarial = 0.3 * binary(score_l, known, real=True) + 0.2 * binary(score_u, valid, real=True)
        semi = naive.supervised(unlabeled.numpy(), np.where(trusted, labels, 255))
        fake = binary(np.concatenate([score_l, score_u]), np.concatenate([known, valid]), real=False)
        critic = 0.5 * fake + 0.5 * binary(score_real, known, real=True)
        losses = method(one)
        for name, value in {
            "supervised": supervised,
            "adversarial": adversarial,
            "semi": semi,
            "critic": critic,
        }.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        total = supervised + adversarial + (0.7 * semi if step >= 3 else 0) + critic
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_the_critic_learns_from_its_own_loss_alone(self):
        """Its gradient does not change with the weights of the network's adversarial terms."""
        gradients = []
        for adversarial in ((0.0, 0.0), (5.0, 5.0)):
            torch.manual_seed(1)
            method = AdvSSL(Plain(), num_classes=CLASSES, adversarial=adversarial)
            method(batch()).total.backward()
            gradients.append([p.grad.clone() for p in method.critic.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_the_network_does_not_learn_from_the_critics_loss(self):
        torch.manual_seed(1)
        method = AdvSSL(Plain(), num_classes=CLASSES, adversarial=(0.0, 0.0), semi=0.0)
        one = batch()
        method(one).total.backward()
        network = Plain()
        from stseg import Segmenter

        torch.nn.functional.cross_entropy(Segmenter(network)(one.images), one.masks, ignore_index=255).backward()
        for mine, theirs in zip(method.model.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)

    def test_the_adversarial_terms_reach_the_network(self):
        gradients = []
        for adversarial in ((0.0, 0.0), (1.0, 1.0)):
            torch.manual_seed(1)
            method = AdvSSL(Plain(), num_classes=CLASSES, adversarial=adversarial, semi=0.0)
            method(batch()).total.backward()
            gradients.append(method.model.network.head.weight.grad)
        assert not torch.allclose(*gradients)

    def test_has_an_adam_for_the_critic(self):
        method = self.make()
        network, critic = method.optimizers(TrainConfig(steps=1, lr=0.01))
        assert isinstance(critic, torch.optim.Adam)
        assert (critic.param_groups[0]["lr"], critic.param_groups[0]["betas"]) == (1e-4, (0.9, 0.99))
        held = {id(p) for group in critic.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.critic.parameters()}
        assert held.isdisjoint(id(p) for group in network.param_groups for p in group["params"])

    @pytest.mark.parametrize(("classes", "parameters"), [(21, 2_783_169), (19, 2_781_121)])
    def test_the_critic_has_as_many_parameters_as_the_authors(self, classes, parameters):
        critic = AdvSSL(Plain(), num_classes=classes).critic
        assert sum(p.numel() for p in critic.parameters()) == parameters
